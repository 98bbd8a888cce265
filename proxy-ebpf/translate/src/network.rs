//! Ethernet and IP headers: RFC 894, 791, 8200, 3168.

use proxy_abi::{
    flow::{Endpoint, IPV4, IPV6},
    handoff::HandoffKey,
};

use crate::{Packet, checksum};

pub const ETHERNET: usize = 14;
pub const IPV4_HEADER: usize = 20;
pub const IPV6_HEADER: usize = 40;
/// An IPv4 header without options, as words.
pub type Ipv4 = [u32; IPV4_HEADER / 4];
/// An IPv6 header, as words.
pub type Ipv6 = [u32; IPV6_HEADER / 4];
pub const TCP: u8 = 6;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
const ECN: u8 = 0x03;

/// What an IP header says.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    /// [`IPV4`] or [`IPV6`].
    pub version: u8,
    pub protocol: u8,
    /// TTL or hop limit.
    pub hops: u8,
    /// TOS or traffic class.
    pub class: u8,
    /// It has IPv4 options.
    pub has_options: bool,
    /// It is the first fragment of several.
    pub fragment: bool,
    /// Where the transport header begins.
    pub transport: usize,
    /// Bytes after the IP header, as it states them.
    pub length: usize,
}

impl Network {
    /// An IPv4 header at `at` of a packet of `packet` bytes; `None` for what is not one, and for a later fragment, which has no ports. Also
    /// of the packet inside an ICMP error. A total length of 0 is that of a super-packet of more than 64 KiB (BIG TCP, v6.3+).
    #[inline(always)]
    pub const fn v4(header: &Ipv4, at: usize, packet: usize) -> Option<Self> {
        let (first, second, third) = (u32::from_be(header[0]), u32::from_be(header[1]), u32::from_be(header[2]));
        let header_bytes = (first >> 24 & 0x0f) as usize * 4;
        let offset_and_flags = second & 0xffff;
        let stated = (first & 0xffff) as usize;
        let total = if stated == 0 { packet.saturating_sub(at) } else { stated };
        if (first >> 28) as u8 != IPV4
            || header_bytes < IPV4_HEADER
            || offset_and_flags & 0x1fff != 0
            || total < header_bytes
        {
            return None;
        }
        Some(Self {
            version: IPV4,
            protocol: (third >> 16) as u8,
            hops: (third >> 24) as u8,
            class: (first >> 16) as u8,
            has_options: header_bytes > IPV4_HEADER,
            fragment: offset_and_flags & 0x2000 != 0,
            transport: at + header_bytes,
            length: total - header_bytes,
        })
    }

    /// An IPv6 header. Extension headers are not walked: behind one nothing is ours.
    #[inline(always)]
    pub const fn v6(header: &Ipv6, at: usize) -> Option<Self> {
        let (first, second) = (u32::from_be(header[0]), u32::from_be(header[1]));
        if (first >> 28) as u8 != IPV6 {
            return None;
        }
        Some(Self {
            version: IPV6,
            protocol: (second >> 8) as u8,
            hops: second as u8,
            class: (first >> 20) as u8,
            has_options: false,
            fragment: false,
            transport: at + IPV6_HEADER,
            length: (second >> 16) as usize,
        })
    }
}

/// The key of a TCP packet with this IPv4 header and the ports after it, one word of memory.
#[inline(always)]
pub const fn key_v4(h: &Ipv4, ports: u32) -> HandoffKey {
    HandoffKey::of_words([h[3], 0, 0, 0], [h[4], 0, 0, 0], ports, IPV4)
}

/// As [`key_v4`], of an IPv6 header.
#[inline(always)]
pub const fn key_v6(h: &Ipv6, ports: u32) -> HandoffKey {
    HandoffKey::of_words([h[2], h[3], h[4], h[5]], [h[6], h[7], h[8], h[9]], ports, IPV6)
}

/// The key of packets that answer one of that IPv4 header.
#[inline(always)]
pub const fn answer_v4(h: &Ipv4, ports: u32) -> HandoffKey {
    HandoffKey::of_words([h[4], 0, 0, 0], [h[3], 0, 0, 0], ports.rotate_left(16), IPV4)
}

/// As [`answer_v4`], of an IPv6 header.
#[inline(always)]
pub const fn answer_v6(h: &Ipv6, ports: u32) -> HandoffKey {
    HandoffKey::of_words([h[6], h[7], h[8], h[9]], [h[2], h[3], h[4], h[5]], ports.rotate_left(16), IPV6)
}

/// An address as four words of memory.
#[inline(always)]
pub const fn words(end: &Endpoint) -> [u32; 4] {
    let a = &end.address;
    [
        u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
        u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
        u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
        u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
    ]
}

/// What changes in an IP header.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// `None`: the source stays, as in an ICMP error.
    pub source: Option<&'a Endpoint>,
    pub destination: &'a Endpoint,
    /// The sender's congestion bits are meant for somebody who does not know them.
    pub clear_ecn: bool,
    /// One hop less.
    pub forwarded: bool,
}

/// Rewrites the IP header at `at`; the difference for checksums with a pseudo-header.
#[inline(always)]
pub fn rewrite<P: Packet>(packet: &mut P, version: u8, at: usize, change: Change<'_>) -> Option<u32> {
    if version == IPV4 {
        let mut header: Ipv4 = packet.load(at)?;
        let pseudo = rewrite_v4(&mut header, change);
        packet.store(at, &header)?;
        Some(pseudo)
    } else {
        let mut header: Ipv6 = packet.load(at)?;
        let pseudo = rewrite_v6(&mut header, change);
        packet.store_unsummed(at, &header)?;
        Some(pseudo)
    }
}

/// With its checksum.
#[inline(always)]
pub const fn rewrite_v4(h: &mut Ipv4, change: Change<'_>) -> u32 {
    let (old, old_addresses) = (checksum::sum(h), checksum::sum(&[h[3], h[4]]));
    if let Some(source) = change.source {
        h[3] = words(source)[0];
    }
    h[4] = words(change.destination)[0];
    if change.clear_ecn {
        h[0] &= !((ECN as u32) << 16).to_be();
    }
    if change.forwarded {
        h[2] = u32::from_be(h[2]).wrapping_sub(1 << 24).to_be();
    }
    let difference = checksum::difference(old, checksum::sum(h));
    let third = h[2].to_ne_bytes();
    let checksum = checksum::adjust(u16::from_ne_bytes([third[2], third[3]]), difference).to_ne_bytes();
    h[2] = u32::from_ne_bytes([third[0], third[1], checksum[0], checksum[1]]);
    checksum::difference(old_addresses, checksum::sum(&[h[3], h[4]]))
}

#[inline(always)]
pub const fn rewrite_v6(h: &mut Ipv6, change: Change<'_>) -> u32 {
    let old = addresses_v6(h);
    if let Some(source) = change.source {
        [h[2], h[3], h[4], h[5]] = words(source);
    }
    [h[6], h[7], h[8], h[9]] = words(change.destination);
    if change.clear_ecn {
        h[0] &= !((ECN as u32) << 20).to_be();
    }
    if change.forwarded {
        h[1] = u32::from_be(h[1]).wrapping_sub(1).to_be();
    }
    checksum::difference(old, addresses_v6(h))
}

#[inline(always)]
const fn addresses_v6(h: &Ipv6) -> u64 {
    checksum::sum(&[h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9]])
}
