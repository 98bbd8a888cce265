//! A whole packet in memory, from its Ethernet header on: what the program does with the kernel's, without maps and routes.

use proxy_abi::{
    flow::IPV4,
    handoff::{HandoffEntry, HandoffFlow, HandoffKey, gate, outcome},
};

use crate::{
    Packet,
    flow::Flow,
    icmp,
    network::{self, ETHERNET, IPV4_HEADER, IPV6_HEADER, Network},
    segment::{self, Context, Verdict},
    tcp,
};

const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_IPV6: u32 = 0x86dd;

/// Translates the packet by the entry that `find` has for its key, changing the flow.
pub fn translate<P: Packet>(
    packet: &mut P,
    find: impl Fn(&HandoffKey) -> Option<HandoffEntry>,
    flow: &mut HandoffFlow,
    context: Context,
) -> Verdict {
    try_translate(packet, find, flow, context).unwrap_or(Verdict::Stack(outcome::NOT_OURS))
}

fn try_translate<P: Packet>(
    packet: &mut P,
    find: impl Fn(&HandoffKey) -> Option<HandoffEntry>,
    flow: &mut HandoffFlow,
    context: Context,
) -> Option<Verdict> {
    let (network, key) = headers(packet)?;
    let icmp = if network.version == IPV4 { network::ICMP } else { network::ICMPV6 };
    if network.protocol == icmp {
        let quoted = icmp::quoted(packet, &network)?;
        let entry = find(&quoted.key)?;
        let this = flow.ends[usize::from(entry.direction & 1)];
        return Some(icmp::translate(packet, (ETHERNET, &network), &quoted, &entry, flow.gate, &this));
    }
    if network.protocol != network::TCP {
        return None;
    }
    let entry = find(&key)?;
    if flow.gate == gate::CLOSED {
        return Some(Verdict::Stack(outcome::PENDING));
    }
    let Some(header) = packet.load::<{ tcp::HEADER / 4 }>(network.transport) else {
        return Some(Verdict::Drop(outcome::MALFORMED));
    };
    let HandoffFlow { gate, closing, closed_ns, ends: [client, backend], .. } = flow;
    let (this, other) = if entry.direction & 1 == 0 { (client, backend) } else { (backend, client) };
    let mut sides = Flow { gate: *gate, closing, closed_ns, this, other };
    Some(segment::translate(packet, (ETHERNET, &network), &header, &entry, &mut sides, context))
}

/// What the IP header says, and the key that a TCP packet has.
fn headers<P: Packet>(packet: &P) -> Option<(Network, HandoffKey)> {
    let [kind] = packet.load::<1>(ETHERNET - 4)?;
    let (network, key) = match u32::from_be(kind) & 0xffff {
        ETHERTYPE_IPV4 => {
            let header = packet.load::<{ IPV4_HEADER / 4 }>(ETHERNET)?;
            let network = Network::v4(&header, ETHERNET, packet.length())?;
            let [ports] = packet.load(network.transport)?;
            (network, network::key_v4(&header, ports))
        }
        ETHERTYPE_IPV6 => {
            let header = packet.load::<{ IPV6_HEADER / 4 }>(ETHERNET)?;
            let network = Network::v6(&header, ETHERNET)?;
            let [ports] = packet.load(network.transport)?;
            (network, network::key_v6(&header, ports))
        }
        _ => return None,
    };
    Some((network, key))
}
