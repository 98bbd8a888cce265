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
const NONE: usize = OPTIONS;
/// Steps that are enough for 40 bytes: two in a row take three bytes at least, a NOP alone and an option of two.
const STEPS: usize = 27;

/// Where the options that are translated begin, [`OPTIONS`] = not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub timestamps: usize,
    pub sack: usize,
    /// Of the SACK option, with kind and length: 10, 18, 26, 34.
    pub sack_length: usize,
}

/// Finds them in the `length` (0–40) bytes at `start`. As receivers do, it stops at what it cannot walk over, and the last of a kind counts.
///
/// Bytes are loaded one pair at a time, at an offset that the helper checks: an index into memory would be pointer arithmetic.
#[inline(always)]
pub fn scan<P: Packet>(packet: &mut P, start: usize, length: usize) -> Option<Layout> {
    let mut layout = Layout { timestamps: NONE, sack: NONE, sack_length: 0 };
    let (mut at, mut steps) = (0, 0);
    while steps < STEPS {
        steps += 1;
        if at + 1 >= length {
            break;
        }
        let [kind, size] = packet.pair(start + at)?;
        if kind == NOP {
            at = packet.opaque(if size == NOP { at + 2 } else { at + 1 });
            continue;
        }
        let size = size as usize;
        if kind == END || size < 2 || at + size > length {
            break;
        }
        if kind == TIMESTAMPS && size == TIMESTAMPS_LENGTH as usize {
            layout.timestamps = at;
        }
        if kind == SACK && matches!(size, 10 | 18 | 26 | 34) {
            layout.sack = at;
            layout.sack_length = size;
        }
        at = packet.opaque(at + size);
    }
    Some(Layout {
        timestamps: packet.opaque(layout.timestamps),
        sack: packet.opaque(layout.sack),
        sack_length: packet.opaque(layout.sack_length),
    })
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
    let layout = scan(packet, at, length)?;
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
        if work.entry.options & both == both && work.mode == TRANSLATE {
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
