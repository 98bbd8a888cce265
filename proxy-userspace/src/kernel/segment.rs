//! Single TCP segments, sent past the kernel's own TCP: for connections that have no socket here.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};

pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;
const TCP: u8 = 6;
const TCP_HEADER: usize = 20;

/// A segment without payload of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgement: u32,
    /// TSval of the timestamps option, its one option if any: some peers drop a segment without it (RFC 7323 §3.2).
    pub timestamp: Option<u32>,
    /// One byte that the peer has already. It answers such a segment even where it takes it for an old duplicate by its timestamp,
    /// which it would let a bare acknowledgement pass for in silence (`tcp_disordered_ack_check`, v6.18; RFC 1122 §4.2.3.6).
    pub old_byte: bool,
}

/// Raw sockets of both families. Without `CAP_NET_RAW` there are none, and nothing is sent.
#[derive(Debug)]
pub struct Sender {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
}

impl Sender {
    /// In the network namespace of the calling thread.
    pub fn open() -> Self {
        let open = |family| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(family, SockType::Raw, flags, SockProtocol::Raw).ok()
        };
        Self { v4: open(AddressFamily::Inet), v6: open(AddressFamily::Inet6) }
    }

    /// Whether segments can be sent at all.
    pub fn is_open(&self) -> bool {
        self.v4.is_some()
    }

    /// Best effort: as with every segment, the network may lose it.
    pub fn send(&self, from: SocketAddr, to: SocketAddr, segment: Segment) {
        match (from, to) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                if let Some(socket) = &self.v4 {
                    let target = SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0));
                    let _ = sendto(socket.as_raw_fd(), &v4(from, to, segment), &target, MsgFlags::empty());
                }
            }
            (SocketAddr::V6(from), SocketAddr::V6(to)) => {
                if let Some(socket) = &self.v6 {
                    // The scope says which link a link-local address is on.
                    let target = SockaddrIn6::from(SocketAddrV6::new(*to.ip(), 0, 0, to.scope_id()));
                    let _ = sendto(socket.as_raw_fd(), &v6(from, to, segment), &target, MsgFlags::empty());
                }
            }
            (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => {}
        }
    }
}

/// The kernel fills in length, id and checksum of the IPv4 header (`raw_send_hdrinc`).
fn v4(from: SocketAddrV4, to: SocketAddrV4, segment: Segment) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, TCP, 0, 0];
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    packet.extend(encode(from.into(), to.into(), segment));
    packet
}

fn v6(from: SocketAddrV6, to: SocketAddrV6, segment: Segment) -> Vec<u8> {
    let tcp = encode(from.into(), to.into(), segment);
    let mut packet = vec![0x60, 0, 0, 0, 0, tcp.len() as u8, TCP, 64];
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    packet.extend(tcp);
    packet
}

fn encode(from: SocketAddr, to: SocketAddr, segment: Segment) -> Vec<u8> {
    let mut bytes = vec![0; TCP_HEADER];
    bytes[0..2].copy_from_slice(&from.port().to_be_bytes());
    bytes[2..4].copy_from_slice(&to.port().to_be_bytes());
    bytes[4..8].copy_from_slice(&segment.sequence.to_be_bytes());
    bytes[8..12].copy_from_slice(&segment.acknowledgement.to_be_bytes());
    if let Some(clock) = segment.timestamp {
        // NOP, NOP, timestamps; nothing is echoed.
        bytes.extend([1, 1, 8, 10]);
        bytes.extend(clock.to_be_bytes());
        bytes.extend([0; 4]);
    }
    bytes[12] = (bytes.len() as u8 / 4) << 4;
    bytes.extend(segment.old_byte.then_some(0));
    bytes[13] = segment.flags;
    bytes[14..16].copy_from_slice(&u16::MAX.to_be_bytes());
    let checksum = checksum(from.ip(), to.ip(), &bytes);
    bytes[16..18].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

/// RFC 9293 §3.1 over the pseudo-header and the segment.
fn checksum(from: IpAddr, to: IpAddr, segment: &[u8]) -> u16 {
    let mut sum = u32::from(TCP) + segment.len() as u32;
    let mut add = |bytes: &[u8]| {
        sum +=
            bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b))).sum::<u32>();
    };
    for ip in [from, to] {
        match ip {
            IpAddr::V4(ip) => add(&Ipv4Addr::octets(&ip)),
            IpAddr::V6(ip) => add(&Ipv6Addr::octets(&ip)),
        }
    }
    add(segment);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_sums_to_zero_with_its_checksum() {
        for (from, to) in [("10.0.0.1:40000", "10.0.0.2:80"), ("[fd00::1]:40000", "[fd00::2]:80")] {
            let [from, to]: [SocketAddr; 2] = [from, to].map(|text| text.parse().expect("address"));
            for (timestamp, old_byte, header) in [(None, false, 20), (Some(9), false, 32), (Some(9), true, 32)] {
                let (sequence, acknowledgement) = (0xfedc_ba98, 7);
                let segment = Segment { flags: RST | ACK, sequence, acknowledgement, timestamp, old_byte };
                let segment = encode(from, to, segment);
                assert_eq!(checksum(from.ip(), to.ip(), &segment), 0);
                assert_ne!(segment[16..18], [0, 0]);
                assert_eq!(segment[4..8], [0xfe, 0xdc, 0xba, 0x98]);
                let length = header + usize::from(old_byte);
                assert_eq!((segment.len(), usize::from(segment[12] >> 4) * 4), (length, header));
            }
        }
    }
}
