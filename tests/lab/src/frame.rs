//! What a TCP segment says, read from an Ethernet frame.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const ETHERNET: usize = 14;
const TCP: u8 = 6;

/// Flags of a TCP header (RFC 9293 §3.1).
pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// One TCP segment.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// TTL or hop limit.
    pub hops: u8,
    pub seq: u32,
    pub ack: u32,
    /// Bits of [`flag`], and the others.
    pub flags: u8,
    /// As on the wire, unscaled.
    pub window: u16,
    /// TSval, where there is one.
    pub clock: Option<u32>,
    pub payload: &'a [u8],
    /// The checksums of IP and TCP are right.
    pub sound: bool,
}

impl<'a> Segment<'a> {
    /// `None` for everything that is no whole TCP segment over IP.
    pub fn of(frame: &'a [u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET..)?;
        let (from, to, hops, sound, tcp) = match pair(frame, 12)? {
            0x0800 => {
                let header = ip.get(..usize::from(ip.first()? & 15) * 4)?;
                let (from, to): ([u8; 4], [u8; 4]) = (array(header, 12)?, array(header, 16)?);
                let tcp = ip.get(header.len()..usize::from(pair(ip, 2)?))?;
                if header[9] != TCP {
                    return None;
                }
                let sound = folded(words(header)) == 0xffff && is_sound(&[from, to].concat(), tcp);
                (IpAddr::from(Ipv4Addr::from(from)), IpAddr::from(Ipv4Addr::from(to)), header[8], sound, tcp)
            }
            0x86dd => {
                let header = ip.get(..40)?;
                let (from, to): ([u8; 16], [u8; 16]) = (array(header, 8)?, array(header, 24)?);
                let tcp = ip.get(40..40 + usize::from(pair(ip, 4)?))?;
                if header[6] != TCP {
                    return None;
                }
                let sound = is_sound(&[from, to].concat(), tcp);
                (IpAddr::from(Ipv6Addr::from(from)), IpAddr::from(Ipv6Addr::from(to)), header[7], sound, tcp)
            }
            _ => return None,
        };
        let header = tcp.get(..usize::from(tcp.get(12)? >> 4) * 4).filter(|header| header.len() >= 20)?;
        Some(Self {
            from: SocketAddr::new(from, pair(header, 0)?),
            to: SocketAddr::new(to, pair(header, 2)?),
            hops,
            seq: u32::from_be_bytes(array(header, 4)?),
            ack: u32::from_be_bytes(array(header, 8)?),
            flags: header[13],
            window: pair(header, 14)?,
            clock: clock(&header[20..]),
            payload: &tcp[header.len()..],
            sound,
        })
    }

    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// TSval among the options (RFC 7323 §3.2).
fn clock(mut options: &[u8]) -> Option<u32> {
    loop {
        match (options.first()?, options.get(1)) {
            (0, _) => return None,
            (1, _) => options = &options[1..],
            (8, Some(10)) => return Some(u32::from_be_bytes(array(options, 2)?)),
            (_, Some(length)) => options = options.get(usize::from(*length).max(2)..)?,
            (_, None) => return None,
        }
    }
}

/// Whether a segment has the right checksum between these addresses (RFC 9293 §3.1).
fn is_sound(addresses: &[u8], tcp: &[u8]) -> bool {
    let length = u64::try_from(tcp.len()).unwrap_or(u64::MAX);
    folded(words(addresses) + words(tcp) + u64::from(TCP) + length) == 0xffff
}

fn words(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    bytes.chunks(2).map(word).sum()
}

fn folded(mut sum: u64) -> u64 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn pair(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A SYN of curl's to 10.88.1.1:8004, as tcpdump has seen it.
    fn syn() -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00]);
        frame.extend([0x45, 0, 0, 52, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 88, 1, 2, 10, 88, 1, 1]);
        frame.extend([0x10, 0x92, 0x1f, 0x44, 0, 0, 0, 7, 0, 0, 0, 0, 0x80, 2, 0xfa, 0xf0, 0, 0, 0, 0]);
        frame.extend([1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 0, 0]);
        let ip = (!folded(words(&frame[14..34])) as u16).to_be_bytes();
        frame[24..26].copy_from_slice(&ip);
        let tcp = folded(words(&frame[26..34]) + words(&frame[34..]) + 6 + 32);
        frame[50..52].copy_from_slice(&(!tcp as u16).to_be_bytes());
        frame
    }

    #[test]
    fn a_segment_is_read_with_its_clock() {
        let frame = syn();
        let segment = Segment::of(&frame).expect("a segment");
        assert_eq!((segment.from.port(), segment.to.port(), segment.seq), (4242, 8004, 7));
        assert!(segment.has(flag::SYN) && !segment.has(flag::ACK | flag::FIN) && segment.payload.is_empty());
        assert_eq!((segment.clock, segment.hops, segment.sound), (Some(0x0102), 64, true));
    }

    #[test]
    fn one_flipped_bit_shows() {
        let mut frame = syn();
        frame[40] ^= 1;
        assert!(!Segment::of(&frame).expect("a segment").sound);
    }
}
