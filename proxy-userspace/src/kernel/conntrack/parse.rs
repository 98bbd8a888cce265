//! Conntrack messages: bytes in, [`Entry`] out. The hot path: no allocation, and foreign marks are let go before
//! anything else is decoded.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_core::{
    config::Protocol,
    conntrack::{Entry, Event, TcpState, Traffic, Tuple},
};

use super::wire::{Attributes, CT_DELETE, CT_NEW, Message, NFGENMSG, NLM_F_CREATE, cta};

/// The highest attribute number looked at.
const SLOTS: usize = cta::TIMESTAMP_EVENT as usize + 1;

/// The event a message tells. `None`: not conntrack's, not shunt's (no bit of `id_mask` in its mark), or malformed.
pub fn event(message: &Message<'_>, id_mask: u32) -> Option<Event> {
    match message.kind {
        CT_NEW if message.flags & NLM_F_CREATE != 0 => entry(message.payload, id_mask).map(Event::New),
        CT_NEW => entry(message.payload, id_mask).map(Event::Update),
        CT_DELETE => entry(message.payload, id_mask).map(Event::Destroy),
        _ => None,
    }
}

/// The entry in a message's payload, which begins with `struct nfgenmsg`.
pub fn entry(payload: &[u8], id_mask: u32) -> Option<Entry> {
    let mut slots: [&[u8]; SLOTS] = [&[]; SLOTS];
    for (kind, value) in Attributes(payload.get(NFGENMSG..)?) {
        if let Some(slot) = slots.get_mut(usize::from(kind)) {
            *slot = value;
        }
    }
    let slot = |kind: u16| slots[usize::from(kind)];
    let mark = be32(slot(cta::MARK))?;
    if mark & id_mask == 0 {
        return None;
    }
    let (protocol, original) = tuple(slot(cta::TUPLE_ORIG))?;
    let (_, reply) = tuple(slot(cta::TUPLE_REPLY))?;
    let stamp = slot(cta::TIMESTAMP);
    Some(Entry {
        id: be32(slot(cta::ID))?,
        protocol,
        original,
        reply,
        mark,
        status: be32(slot(cta::STATUS)).unwrap_or(0),
        timeout: be32(slot(cta::TIMEOUT)),
        tcp_state: tcp_state(slot(cta::PROTOINFO)),
        traffic_in: traffic(slot(cta::COUNTERS_ORIG)),
        traffic_out: traffic(slot(cta::COUNTERS_REPLY)),
        started_ns: find(stamp, cta::TIMESTAMP_START).and_then(be64),
        stopped_ns: find(stamp, cta::TIMESTAMP_STOP).and_then(be64),
        event_ns: be64(slot(cta::TIMESTAMP_EVENT)),
    })
}

/// The addresses of an entry in both directions, whatever its mark.
pub fn directions(payload: &[u8]) -> Option<[Tuple; 2]> {
    let attributes = payload.get(NFGENMSG..)?;
    let (_, original) = tuple(find(attributes, cta::TUPLE_ORIG)?)?;
    let (_, reply) = tuple(find(attributes, cta::TUPLE_REPLY)?)?;
    Some([original, reply])
}

fn tuple(bytes: &[u8]) -> Option<(Protocol, Tuple)> {
    let (mut ips, mut protos) = (&[][..], &[][..]);
    for (kind, value) in Attributes(bytes) {
        match kind {
            cta::TUPLE_IP => ips = value,
            cta::TUPLE_PROTO => protos = value,
            _ => {}
        }
    }
    let (mut source, mut destination) = (None, None);
    for (kind, value) in Attributes(ips) {
        match kind {
            cta::IP_V4_SRC | cta::IP_V6_SRC => source = address(value),
            cta::IP_V4_DST | cta::IP_V6_DST => destination = address(value),
            _ => {}
        }
    }
    let (mut protocol, mut source_port, mut destination_port) = (None, 0, 0);
    for (kind, value) in Attributes(protos) {
        match kind {
            cta::PROTO_NUM => protocol = protocol_of(*value.first()?),
            cta::PROTO_SRC_PORT => source_port = be16(value)?,
            cta::PROTO_DST_PORT => destination_port = be16(value)?,
            _ => {}
        }
    }
    let tuple = Tuple {
        source: SocketAddr::new(source?, source_port),
        destination: SocketAddr::new(destination?, destination_port),
    };
    Some((protocol?, tuple))
}

const fn protocol_of(number: u8) -> Option<Protocol> {
    match number {
        6 => Some(Protocol::Tcp),
        17 => Some(Protocol::Udp),
        _ => None,
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(octets).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|octets| Ipv6Addr::from(octets).into())
}

fn tcp_state(protoinfo: &[u8]) -> Option<TcpState> {
    let tcp = find(protoinfo, cta::PROTOINFO_TCP)?;
    TcpState::from_kernel(*find(tcp, cta::PROTOINFO_TCP_STATE)?.first()?)
}

fn traffic(bytes: &[u8]) -> Option<Traffic> {
    let packets = find(bytes, cta::COUNTERS_PACKETS).and_then(be64)?;
    let bytes = find(bytes, cta::COUNTERS_BYTES).and_then(be64)?;
    Some(Traffic { packets, bytes })
}

fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    Attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn be16(bytes: &[u8]) -> Option<u16> {
    bytes.try_into().ok().map(u16::from_be_bytes)
}

fn be32(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_be_bytes)
}

fn be64(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
