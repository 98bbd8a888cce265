//! The TCP header without its options: RFC 9293 §3.1.

use proxy_abi::handoff::HandoffEntry;

use crate::checksum;

pub const HEADER: usize = 20;
pub const CHECKSUM: usize = 16;
/// The header without options, as words.
pub type Header = [u32; HEADER / 4];

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;
const URG: u8 = 0x20;
pub const ECE: u8 = 0x40;
pub const CWR: u8 = 0x80;
/// Accurate ECN, once the nonce sum: the lowest bit beside the data offset, in the fourth word.
const AE: u32 = 1 << 24;

/// What a TCP header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcp {
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    /// As on the wire, unscaled.
    pub window: u16,
    /// With options.
    pub header_bytes: usize,
}

impl Tcp {
    #[inline(always)]
    pub const fn of(h: &Header) -> Self {
        let fourth = u32::from_be(h[3]);
        Self {
            seq: u32::from_be(h[1]),
            ack: u32::from_be(h[2]),
            flags: (fourth >> 16) as u8,
            window: fourth as u16,
            header_bytes: (fourth >> 28) as usize * 4,
        }
    }

    #[inline(always)]
    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }
}

/// What the header shall say; ports are the entry's.
#[derive(Debug, Clone, Copy)]
pub struct New {
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub clear_ecn: bool,
}

/// Writes it, all but the checksum; the difference for that. Nothing is urgent any more: a relay makes urgent bytes bytes of the stream
/// (RFC 6093 §4), and when a connection was handed over must not show.
#[inline(always)]
pub const fn rewrite(h: &mut Header, entry: &HandoffEntry, new: New) -> u32 {
    let old = checksum::sum(h);
    let ([a, b], [c, d]) = (entry.source.port_be, entry.destination.port_be);
    h[0] = u32::from_ne_bytes([a, b, c, d]);
    h[1] = new.seq.to_be();
    h[2] = new.ack.to_be();
    // Data offset, reserved bits and AE stay.
    let mut fourth = u32::from_be(h[3]) & 0xff00_0000 | ((new.flags & !URG) as u32) << 16 | new.window as u32;
    if new.clear_ecn {
        fourth &= !(AE | ((ECE | CWR) as u32) << 16);
    }
    h[3] = fourth.to_be();
    h[4] &= 0xffff_0000u32.to_be();
    checksum::difference(old, checksum::sum(h))
}

/// A window in the scale that the other connection announced: never more than the sender said, who meant one that begins `raised`
/// bytes earlier.
#[inline(always)]
pub const fn window(window: u16, raised: u32, entry: &HandoffEntry) -> u16 {
    let bytes = ((window as u64) << (entry.scale_in & 0x0f)).saturating_sub(raised as u64);
    let scaled = bytes >> (entry.scale_out & 0x0f);
    if scaled > 0xffff { 0xffff } else { scaled as u16 }
}
