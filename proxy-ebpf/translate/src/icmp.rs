//! ICMP errors about translated packets (RFC 792, 1191, 4443, 8201): they quote a packet as it was sent, and are meant for its sender.

use proxy_abi::{
    flow::IPV4,
    handoff::{HandoffEnd, HandoffEntry, HandoffKey, gate, outcome},
};

use crate::{
    Packet, byte, checksum,
    network::{self, Change, IPV4_HEADER, IPV6_HEADER, Ipv4, Ipv6, Network},
    segment::Verdict,
};

const HEADER: usize = 8;
const CHECKSUM: usize = 2;

/// The packet that an error quotes.
#[derive(Debug, Clone, Copy)]
pub struct Quoted {
    /// Of packets from the end that the quoted packet went to.
    pub key: HandoffKey,
    /// Where its IP header begins.
    pub at: usize,
    /// Where its TCP header begins.
    pub transport: usize,
    /// The first two words of its TCP header: ports and sequence number. Nothing more need be there.
    head: [u32; 2],
}

impl Quoted {
    const fn seq(&self) -> u32 {
        u32::from_be(self.head[1])
    }
}

/// Whether an ICMP message of that type is an error.
#[inline(always)]
const fn is_error(version: u8, kind: u8) -> bool {
    if version == IPV4 { matches!(kind, 3 | 11 | 12) } else { matches!(kind, 1..=4) }
}

/// What the ICMP message after `network` quotes; `None` when it is no error about a TCP packet.
#[inline(always)]
pub fn quoted<P: Packet>(packet: &P, network: &Network) -> Option<Quoted> {
    let [first] = packet.load::<1>(network.transport)?;
    if !is_error(network.version, byte(&[first], 0)) || network.fragment {
        return None;
    }
    let at = network.transport + HEADER;
    if network.version == IPV4 {
        let header: Ipv4 = packet.load(at)?;
        let inner = Network::v4(&header, at, packet.length())?;
        if inner.protocol != network::TCP || inner.has_options {
            return None;
        }
        let transport = at + IPV4_HEADER;
        let head = packet.load::<2>(transport)?;
        Some(Quoted { key: network::answer_v4(&header, head[0]), at, transport, head })
    } else {
        let header: Ipv6 = packet.load(at)?;
        if Network::v6(&header, at)?.protocol != network::TCP {
            return None;
        }
        let transport = at + IPV6_HEADER;
        let head = packet.load::<2>(transport)?;
        Some(Quoted { key: network::answer_v6(&header, head[0]), at, transport, head })
    }
}

/// Translates an error about a packet that went to the end `this`, whose packets `entry` translates: to the end that sent it, about the
/// packet as that end sent it. The error's source stays: it is the router that has something to say.
#[inline(always)]
pub fn translate<P: Packet>(
    packet: &mut P,
    (network_at, network): (usize, &Network),
    quoted: &Quoted,
    entry: &HandoffEntry,
    gate: u32,
    this: &HandoffEnd,
) -> Verdict {
    if gate == gate::CLOSED || gate == gate::OPEN && (quoted.seq().wrapping_sub(this.own_seq) as i32) < 0 {
        return Verdict::Stack(outcome::ICMP_OWN);
    }
    if network.has_options {
        return Verdict::Drop(outcome::IP_OPTIONS);
    }
    if network.hops <= 1 {
        return Verdict::Drop(outcome::TTL_EXPIRED);
    }
    match rewrite(packet, (network_at, network), quoted, entry) {
        Some(()) => Verdict::Send { outcome: outcome::ICMP_TRANSLATED, ended: false },
        None => Verdict::Drop(outcome::NOT_WRITABLE),
    }
}

#[inline(always)]
fn rewrite<P: Packet>(
    packet: &mut P,
    (network_at, network): (usize, &Network),
    quoted: &Quoted,
    entry: &HandoffEntry,
) -> Option<()> {
    let [a, b] = entry.destination.port_be;
    let [c, d] = entry.source.port_be;
    let head = [u32::from_ne_bytes([a, b, c, d]), quoted.seq().wrapping_sub(entry.dack).to_be()];
    packet.store(quoted.transport, &head)?;
    let of_head = checksum::difference(checksum::sum(&quoted.head), checksum::sum(&head));
    let change =
        Change { source: Some(&entry.destination), destination: &entry.source, clear_ecn: false, forwarded: false };
    let of_quoted = if network.version == IPV4 {
        let mut header: Ipv4 = packet.load(quoted.at)?;
        let old = checksum::sum(&header);
        network::rewrite_v4(&mut header, change);
        packet.store(quoted.at, &header)?;
        checksum::difference(old, checksum::sum(&header))
    } else {
        let mut header: Ipv6 = packet.load(quoted.at)?;
        let difference = network::rewrite_v6(&mut header, change);
        packet.store(quoted.at, &header)?;
        difference
    };
    let change = Change { source: None, destination: &entry.destination, clear_ecn: false, forwarded: true };
    let of_outer = network::rewrite(packet, network.version, network_at, change)?;
    // Only ICMPv6 has a pseudo-header.
    let pseudo = if network.version == IPV4 { 0 } else { of_outer };
    packet.adjust_checksum(network.transport + CHECKSUM, pseudo, checksum::add(of_head, of_quoted))
}
