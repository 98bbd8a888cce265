//! A connection's two entries in the program's table.

use std::net::{IpAddr, SocketAddr};

use proxy_abi::{
    flow::{Endpoint, IPV4, IPV6},
    handoff::{HandoffEntry, HandoffKey, option},
};
use proxy_core::{
    flow::Side,
    handoff::{Both, Facts, Offsets},
};
use rustix::{
    net::{getpeername, getsockname},
    time::{ClockId, clock_gettime},
};

use crate::stream::{flow::Flow, handover::Ends, socket::Socket};

pub(super) fn ends_of(flow: &Flow) -> Option<Ends> {
    let backend = flow.backend.as_ref()?;
    let peer = |socket: &Socket| SocketAddr::try_from(getpeername(&socket.fd).ok()??).ok();
    let own = |socket: &Socket| SocketAddr::try_from(getsockname(&socket.fd).ok()?).ok();
    Some(Ends {
        client: peer(&flow.client)?,
        listen: own(&flow.client)?,
        source: own(backend)?,
        backend: peer(backend)?,
    })
}

fn endpoint(address: SocketAddr) -> Endpoint {
    let port = address.port().to_be_bytes();
    match address.ip() {
        IpAddr::V4(ip) => Endpoint::v4(ip.octets(), port),
        IpAddr::V6(ip) => Endpoint::v6(ip.octets(), port),
    }
}

pub(super) fn entries(
    ends: &Ends,
    facts: &Both<Facts>,
    Offsets(offsets): Offsets,
    clocks: Both<u32>,
    clock_ns: u64,
) -> [(HandoffKey, HandoffEntry); 2] {
    let version = if ends.client.is_ipv4() { IPV4 } else { IPV6 };
    let there = [(ends.client, ends.listen), (ends.backend, ends.source)];
    [Side::Client, Side::Backend].map(|from| {
        let (this, other) = if from == Side::Client { (0, 1) } else { (1, 0) };
        let (source, destination) = there[this];
        let (other_end, own_there) = there[other];
        let (from, to) = (&facts[this], &facts[other]);
        let has = |yes: bool, bit: u8| if yes { bit } else { 0 };
        let entry = HandoffEntry {
            options: has(from.timestamps, option::TIMESTAMPS_IN)
                | has(to.timestamps, option::TIMESTAMPS_OUT)
                | has(from.sack, option::SACK_IN)
                | has(to.sack, option::SACK_OUT)
                | has(from.ecn, option::ECN_IN)
                | has(to.ecn, option::ECN_OUT),
            scale_in: from.peer_scale,
            scale_out: to.own_scale,
            dseq: offsets[this],
            dack: offsets[other],
            clock: clocks[other],
            clock_tick_ns: if to.timestamps_in_micros { 1_000 } else { 1_000_000 },
            clock_ns,
            source: endpoint(own_there),
            destination: endpoint(other_end),
            ..HandoffEntry::default()
        };
        (HandoffKey::new(endpoint(source), endpoint(destination), version), entry)
    })
}

pub(super) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
