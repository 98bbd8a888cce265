//! TCP options: timestamps (RFC 7323) and selective acknowledgements (RFC 2018).

use proxy_abi::handoff::{HandoffEnd, HandoffEntry, option, seen};

use crate::{OPTIONS, Packet, checksum, tcp::Tcp};

const END: u8 = 0;
const NOP: u8 = 1;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;
const TIMESTAMPS_LENGTH: u8 = 10;
/// The layout of nearly every packet: `NOP NOP` and timestamps.
const USUAL: u32 = u32::from_ne_bytes([NOP, NOP, TIMESTAMPS, TIMESTAMPS_LENGTH]);
const USUAL_LENGTH: usize = 12;
const NOPS: u32 = u32::from_ne_bytes([NOP; 4]);
const NONE: u8 = OPTIONS as u8;

/// How far options were walked over, and which are translated. Each is a byte of one word: what the program's functions pass to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// The next one, [`OPTIONS`] behind the last.
    next: u8,
    /// Where they begin, [`NONE`] = not there.
    timestamps: u8,
    sack: u8,
    /// Of the SACK option, with kind and length: 10, 18, 26, 34.
    sack_length: u8,
}

impl Layout {
    const BEFORE: Self = Self { next: 0, timestamps: NONE, sack: NONE, sack_length: 0 };

    #[inline(always)]
    pub const fn word(self) -> u32 {
        u32::from_ne_bytes([self.next, self.timestamps, self.sack, self.sack_length])
    }

    #[inline(always)]
    pub const fn of(word: u32) -> Self {
        let [next, timestamps, sack, sack_length] = word.to_ne_bytes();
        Self { next, timestamps, sack, sack_length }
    }
}

/// Walks over one option, or two NOPs, of the `length` (0–40) bytes at `start`. As receivers do, it stops at what it cannot walk over,
/// and the last of a kind counts.
///
/// Bytes are loaded one pair at a time, at an offset that the helper checks: an index into memory would be pointer arithmetic.
#[inline(always)]
pub fn step<P: Packet>(packet: &P, start: usize, length: usize, layout: Layout) -> Layout {
    let (at, last) = (layout.next as usize, Layout { next: OPTIONS as u8, ..layout });
    if at + 1 >= length {
        return last;
    }
    let Some([kind, size]) = packet.pair(start + at) else { return last };
    if kind == NOP {
        return Layout { next: layout.next + if size == NOP { 2 } else { 1 }, ..layout };
    }
    if kind == END || size < 2 || at + size as usize > length {
        return last;
    }
    let walked = Layout { next: layout.next.wrapping_add(size), ..layout };
    match (kind, size) {
        (TIMESTAMPS, TIMESTAMPS_LENGTH) => Layout { timestamps: layout.next, ..walked },
        (SACK, 10 | 18 | 26 | 34) => Layout { sack: layout.next, sack_length: size, ..walked },
        _ => walked,
    }
}

/// Finds the options that are translated: in 27 steps, which are enough for 40 bytes, as two in a row take three at least, a NOP alone and
/// an option of two. Without a loop: the verifier of a process without `CAP_PERFMON` would also walk every round that a CPU might speculate.
#[inline(always)]
fn scan<P: Packet>(packet: &P, start: usize, length: usize) -> Layout {
    let mut layout = nine_steps(packet, start, length, Layout::BEFORE);
    if (layout.next as usize) < length {
        layout = nine_steps(packet, start, length, layout);
        layout = nine_steps(packet, start, length, layout);
    }
    layout
}

#[inline(always)]
fn nine_steps<P: Packet>(packet: &P, start: usize, length: usize, layout: Layout) -> Layout {
    let three = |layout| {
        let two = packet.step(start, length, packet.step(start, length, layout));
        packet.step(start, length, two)
    };
    three(three(three(layout)))
}

/// What is done to the options of one packet.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    pub entry: &'a HandoffEntry,
    pub tcp: Tcp,
    /// One of [`TRANSLATE`], [`WITHOUT_SACK`], [`BLANK`].
    pub mode: usize,
    pub now_ns: u64,
}

/// Every option that is known.
pub const TRANSLATE: usize = 0;
/// The acknowledgement is not the sender's own: its blocks are about bytes that were our socket's.
pub const WITHOUT_SACK: usize = 1;
/// Nothing of the options is left.
pub const BLANK: usize = 2;

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
    if length == USUAL_LENGTH && work.mode != BLANK {
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
    let old = checksum::sum(packet.options(at, length)?);
    if work.mode == BLANK {
        packet.fill_with_nops(at, length)?;
    } else {
        known(packet, at, length, work, this, other)?;
    }
    Some(checksum::difference(old, checksum::sum(packet.options(at, length)?)))
}

#[inline(always)]
fn known<P: Packet>(
    packet: &mut P,
    at: usize,
    length: usize,
    work: Work<'_>,
    this: &mut HandoffEnd,
    other: &HandoffEnd,
) -> Option<()> {
    let layout = scan(packet, at, length);
    if layout.timestamps != NONE {
        let first = at + layout.timestamps as usize;
        if keeps_timestamps(work.entry) {
            let pair = packet.load::<2>(first + 2)?;
            packet.store(first + 2, &timestamps(pair, work, this, other))?;
        } else {
            packet.fill_with_nops(first, TIMESTAMPS_LENGTH as usize)?;
        }
    }
    if layout.sack != NONE {
        let (first, length) = (at + layout.sack as usize, layout.sack_length as usize);
        let both = option::SACK_IN | option::SACK_OUT;
        if work.entry.options & both != both || work.mode != TRANSLATE {
            return packet.fill_with_nops(first, length);
        }
        block(packet, first + 2, work.entry.dack)?;
        if length >= 18 {
            block(packet, first + 10, work.entry.dack)?;
        }
        if length >= 26 {
            block(packet, first + 18, work.entry.dack)?;
        }
        if length >= 34 {
            block(packet, first + 26, work.entry.dack)?;
        }
    }
    Some(())
}

/// So much later than our socket's clock says are the packets of the end. Some have been on their way for longer than the first one
/// that is seen; were they behind what our socket still sends, they would be thrown away as old duplicates (RFC 7323 §5).
const AHEAD_NS: u64 = 1_000_000_000;

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
        this.clock_offset = clock_at(work.entry, work.now_ns.wrapping_add(AHEAD_NS)).wrapping_sub(value);
        this.seen |= seen::CLOCK;
    }
    // Zero, "no echo", for a clock that is not known: receivers take no time from it.
    let known = other.seen & seen::CLOCK != 0 && work.tcp.has(crate::tcp::ACK) && echo != 0;
    let echo = if known { echo.wrapping_sub(other.clock_offset) } else { 0 };
    [value.wrapping_add(this.clock_offset).to_be(), echo.to_be()]
}

/// What the clock of our socket on the other connection would say now.
#[inline(always)]
pub const fn clock_at(entry: &HandoffEntry, now_ns: u64) -> u32 {
    let tick = if entry.clock_tick_ns == 0 { 1_000_000 } else { entry.clock_tick_ns };
    entry.clock.wrapping_add((now_ns.wrapping_sub(entry.clock_ns) / tick as u64) as u32)
}
