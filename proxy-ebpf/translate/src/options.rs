//! TCP options: timestamps (RFC 7323) and selective acknowledgements (RFC 2018).

use proxy_abi::handoff::{HandoffEnd, HandoffEntry, option, seen};

use crate::{OPTIONS, Options, Packet, byte, checksum, tcp::Tcp};

const END: u8 = 0;
const NOP: u8 = 1;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;
const TIMESTAMPS_LENGTH: u8 = 10;
/// The layout of nearly every packet: `NOP NOP` and timestamps.
const USUAL: u32 = u32::from_ne_bytes([NOP, NOP, TIMESTAMPS, TIMESTAMPS_LENGTH]);
const USUAL_LENGTH: usize = 12;
const NOPS: u32 = u32::from_ne_bytes([NOP; 4]);
const NONE: usize = OPTIONS;

/// Where the options that are translated begin, [`OPTIONS`] = not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub timestamps: usize,
    pub sack: usize,
    /// Of the SACK option, with kind and length: 10, 18, 26, 34.
    pub sack_length: usize,
}

/// Finds them in the first `length` bytes. As receivers do, it stops at what it cannot walk over, and the last of a kind counts.
#[inline(always)]
pub fn scan(options: &Options, length: usize) -> Layout {
    let mut scan = Scan { next: 0, layout: Layout { timestamps: NONE, sack: NONE, sack_length: 0 } };
    // One step for each position, all of them known to the compiler: the verifier sees no index.
    macro_rules! steps {
        ($($at:literal)*) => { $(scan.at::<$at>(options, length);)* };
    }
    steps!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38);
    scan.layout
}

struct Scan {
    next: usize,
    layout: Layout,
}

impl Scan {
    #[inline(always)]
    fn at<const AT: usize>(&mut self, options: &Options, length: usize) {
        if self.next != AT || AT + 1 >= length {
            return;
        }
        let (kind, size) = (byte(options, AT), byte(options, AT + 1));
        if kind == NOP {
            self.next = AT + 1;
            return;
        }
        if kind == END || size < 2 || AT + size as usize > length {
            self.next = NONE;
            return;
        }
        self.next = AT + size as usize;
        if kind == TIMESTAMPS && size == TIMESTAMPS_LENGTH {
            self.layout.timestamps = AT;
        }
        if kind == SACK && matches!(size, 10 | 18 | 26 | 34) {
            self.layout.sack = AT;
            self.layout.sack_length = size as usize;
        }
    }
}

/// What is done to the options of one packet.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    pub entry: &'a HandoffEntry,
    pub tcp: Tcp,
    /// The acknowledgement is not the sender's own: its blocks are about bytes that were our socket's.
    pub without_sack: bool,
    pub now_ns: u64,
}

/// Translates the options, which begin at `at` and are `length` bytes (0–40) long; the difference for the checksum.
#[inline(always)]
pub fn translate<P: Packet>(
    packet: &mut P,
    at: usize,
    length: usize,
    work: Work<'_>,
    this: &mut HandoffEnd,
    other: &HandoffEnd,
) -> Option<u32> {
    if length == 0 {
        return Some(0);
    }
    if length == USUAL_LENGTH {
        let mut options = packet.load::<{ USUAL_LENGTH / 4 }>(at)?;
        if options[0] == USUAL {
            let old = checksum::sum(&options);
            if keeps_timestamps(work.entry) {
                [options[1], options[2]] = timestamps([options[1], options[2]], work, this, other);
            } else {
                options = [NOPS; USUAL_LENGTH / 4];
            }
            packet.store(at, &options)?;
            return Some(checksum::difference(old, checksum::sum(&options)));
        }
    }
    any(packet, at, length, work, this, other)
}

/// Every other layout.
#[inline(always)]
fn any<P: Packet>(
    packet: &mut P,
    at: usize,
    length: usize,
    work: Work<'_>,
    this: &mut HandoffEnd,
    other: &HandoffEnd,
) -> Option<u32> {
    let options = packet.options(at, length)?;
    let (old, layout) = (checksum::sum(options), scan(options, length));
    if layout.timestamps != NONE {
        if keeps_timestamps(work.entry) {
            let pair = packet.load::<2>(at + layout.timestamps + 2)?;
            packet.store(at + layout.timestamps + 2, &timestamps(pair, work, this, other))?;
        } else {
            packet.fill_with_nops(at + layout.timestamps, TIMESTAMPS_LENGTH as usize)?;
        }
    }
    if layout.sack != NONE {
        let both = option::SACK_IN | option::SACK_OUT;
        if work.entry.options & both == both && !work.without_sack {
            let first = at + layout.sack + 2;
            block(packet, first, work.entry.dack)?;
            if layout.sack_length >= 18 {
                block(packet, first + 8, work.entry.dack)?;
            }
            if layout.sack_length >= 26 {
                block(packet, first + 16, work.entry.dack)?;
            }
            if layout.sack_length >= 34 {
                block(packet, first + 24, work.entry.dack)?;
            }
        } else {
            packet.fill_with_nops(at + layout.sack, layout.sack_length)?;
        }
    }
    Some(checksum::difference(old, checksum::sum(packet.options(at, length)?)))
}

#[inline(always)]
const fn keeps_timestamps(entry: &HandoffEntry) -> bool {
    let both = option::TIMESTAMPS_IN | option::TIMESTAMPS_OUT;
    entry.options & both == both
}

/// One SACK block: both edges.
#[inline(always)]
fn block<P: Packet>(packet: &mut P, at: usize, dack: u32) -> Option<()> {
    let [left, right] = packet.load::<2>(at)?;
    packet.store(at, &[u32::from_be(left).wrapping_sub(dack).to_be(), u32::from_be(right).wrapping_sub(dack).to_be()])
}

/// TSval and TSecr. TSval goes on with the clock of our vanished socket; TSecr comes back to the clock of the end that it echoes.
#[inline(always)]
fn timestamps(pair: [u32; 2], work: Work<'_>, this: &mut HandoffEnd, other: &HandoffEnd) -> [u32; 2] {
    let (value, echo) = (u32::from_be(pair[0]), u32::from_be(pair[1]));
    if this.seen & seen::CLOCK == 0 {
        this.clock_offset = clock_at(work.entry, work.now_ns).wrapping_sub(value);
        this.seen |= seen::CLOCK;
    }
    // Zero, "no echo", for a clock that is not known: receivers take no time from it.
    let known = other.seen & seen::CLOCK != 0 && work.tcp.has(crate::tcp::ACK) && echo != 0;
    let echo = if known { echo.wrapping_sub(other.clock_offset) } else { 0 };
    [value.wrapping_add(this.clock_offset).to_be(), echo.to_be()]
}

/// What the clock of our socket on the other connection would say now.
#[inline(always)]
const fn clock_at(entry: &HandoffEntry, now_ns: u64) -> u32 {
    let tick = if entry.clock_tick_ns == 0 { 1_000_000 } else { entry.clock_tick_ns };
    entry.clock.wrapping_add((now_ns.wrapping_sub(entry.clock_ns) / tick as u64) as u32)
}
