//! Makes the ends of a cut flow speak, so that they hear at once that it is cut.
//!
//! A silent end learns of a reset only when it sends something. A SYN inside an established connection makes either end
//! answer with a challenge ACK (RFC 9293 §3.10.7.4, RFC 5961 §4); the ruleset answers that ACK with a reset whose numbers
//! are right, because they come from the ACK itself. Conntrack lets such a SYN pass and translates it without changing
//! its own state (`TCP_CONNTRACK_IGNORE` in `nf_conntrack_tcp_packet`).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};
use proxy_core::conntrack::{Entry, Tuple};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const TCP: u8 = 6;
const TCP_HEADER: usize = 20;

/// Raw sockets of both families. Without `CAP_NET_RAW` there are none, and a cut flow hears of its end with its next
/// packet.
#[derive(Debug)]
pub struct Nudge {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
}

impl Nudge {
    pub fn open() -> Self {
        let open = |family| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(family, SockType::Raw, flags, SockProtocol::Raw).ok()
        };
        Self { v4: open(AddressFamily::Inet), v6: open(AddressFamily::Inet6) }
    }

    /// Sends both ends something to answer. Lost packets are not missed: the next packet of either end does as well.
    pub fn both_ends(&self, entry: &Entry) {
        self.send(entry.original, SYN);
        self.send(entry.reply, SYN | ACK);
    }

    fn send(&self, tuple: Tuple, flags: u8) {
        match (tuple.source, tuple.destination) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                if let Some(socket) = &self.v4 {
                    let target = SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0));
                    let _ = sendto(socket.as_raw_fd(), &v4(from, to, flags), &target, MsgFlags::empty());
                }
            }
            (SocketAddr::V6(from), SocketAddr::V6(to)) => {
                if let Some(socket) = &self.v6 {
                    let target = SockaddrIn6::from(SocketAddrV6::new(*to.ip(), 0, 0, 0));
                    let _ = sendto(socket.as_raw_fd(), &v6(from, to, flags), &target, MsgFlags::empty());
                }
            }
            (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => {}
        }
    }
}

/// The kernel fills in length, id and checksum of the IPv4 header (`raw_send_hdrinc`).
fn v4(from: SocketAddrV4, to: SocketAddrV4, flags: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, TCP, 0, 0];
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    packet.extend(segment(from.into(), to.into(), flags));
    packet
}

fn v6(from: SocketAddrV6, to: SocketAddrV6, flags: u8) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, TCP_HEADER as u8, TCP, 64];
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    packet.extend(segment(from.into(), to.into(), flags));
    packet
}

/// Sequence and acknowledgement number zero: a challenge is due whatever they are, and conntrack must not take a
/// SYN-ACK for the answer to the SYN.
fn segment(from: SocketAddr, to: SocketAddr, flags: u8) -> [u8; TCP_HEADER] {
    let mut segment = [0; TCP_HEADER];
    segment[0..2].copy_from_slice(&from.port().to_be_bytes());
    segment[2..4].copy_from_slice(&to.port().to_be_bytes());
    segment[12] = (TCP_HEADER as u8 / 4) << 4;
    segment[13] = flags;
    segment[14..16].copy_from_slice(&u16::MAX.to_be_bytes());
    let checksum = checksum(from.ip(), to.ip(), &segment);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    segment
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
            let segment = segment(from, to, SYN | ACK);
            assert_eq!(checksum(from.ip(), to.ip(), &segment), 0);
            assert_ne!(segment[16..18], [0, 0]);
        }
    }
}
