//! How a handed-over flow is read, and how its two ends are told that it is over.

use proxy_abi::{
    flow::{Endpoint, IPV4},
    handoff::{FROM_BACKEND, FROM_CLIENT, HandoffEntry, HandoffFlow, HandoffKey, closing, option, seen},
};
use proxy_core::{
    flow::Side,
    handed::{Ending, Look},
    session::Tick,
};
use proxy_translate::options::clock_at;

use super::clock::tick_of;
use crate::{
    kernel::{
        bpf::handoff::HandoffStore,
        segment::{ACK, RST, Segment, Sender},
    },
    stream::handover::Ends,
};

const CLIENT: usize = FROM_CLIENT as usize;
const BACKEND: usize = FROM_BACKEND as usize;

/// What the program has seen of the flow so far.
pub fn look(flow: &HandoffFlow) -> Look {
    let [client, backend] = &flow.ends;
    Look {
        bytes: [client.bytes(), backend.bytes()],
        packets: [client.packets, backend.packets],
        last: tick_of(client.last_seen_ns.max(backend.last_seen_ns)),
        ending: ending(flow.closing),
    }
}

fn ending(bits: u32) -> Ending {
    let first = if bits & closing::BACKEND_FIRST != 0 { Side::Backend } else { Side::Client };
    match bits {
        // A reset behind both ends takes nothing away: whoever has forgotten a connection answers so what is sent again.
        bits if bits & closing::FINISHED != 0 => Ending::Finished(first),
        bits if bits & closing::RESET_BY_CLIENT != 0 => Ending::Reset(Side::Client),
        bits if bits & closing::RESET_BY_BACKEND != 0 => Ending::Reset(Side::Backend),
        bits if bits & closing::OVER != 0 => Ending::Finished(first),
        bits if bits & (closing::CLIENT_FIRST | closing::BACKEND_FIRST) != 0 => Ending::HalfClosed(first),
        _ => Ending::No,
    }
}

/// Resets in both directions, from the addresses that each end knows.
#[derive(Debug)]
pub struct Resets(Sender);

impl Resets {
    pub fn new(sender: Sender) -> Self {
        Self(sender)
    }

    /// To be called while the flow's entries are there: they say what each end has received.
    pub fn send(&self, store: &dyn HandoffStore, flow: &HandoffFlow, ends: &Ends) {
        let there = store.entry(&flow.key);
        let back = there.and_then(|there| store.entry(&there.opposite_key(flow.key.ip_version)));
        let (Some(there), Some(back)) = (there, back) else { return };
        for sequence in expected(flow, CLIENT, &back) {
            self.0.send(ends.listen, ends.client, Segment { flags: RST, sequence, ..Segment::default() });
        }
        for sequence in expected(flow, BACKEND, &there) {
            self.0.send(ends.source, ends.backend, Segment { flags: RST, sequence, ..Segment::default() });
        }
    }

    /// Makes one end answer if it is there: a segment it has acknowledged already, as keepalive sends it.
    pub fn ask(&self, store: &dyn HandoffStore, flow: &HandoffFlow, ends: &Ends, side: Side, now: Tick) {
        let there = store.entry(&flow.key);
        let back = there.and_then(|there| store.entry(&there.opposite_key(flow.key.ip_version)));
        let (Some(there), Some(back)) = (there, back) else { return };
        let (index, towards, from, to) = match side {
            Side::Client => (CLIENT, back, ends.listen, ends.client),
            Side::Backend => (BACKEND, there, ends.source, ends.backend),
        };
        let Some(next) = expected(flow, index, &towards).next() else { return };
        let acknowledgement = flow.ends[index].end_seq as u32;
        // The clock goes on from where our socket's was. What the other end has said meanwhile may have been later: hence the byte.
        let agreed = towards.options & option::TIMESTAMPS_OUT != 0;
        let timestamp = agreed.then(|| clock_at(&towards, now.0 * 1_000_000));
        let sequence = next.wrapping_sub(1);
        self.0.send(from, to, Segment { flags: ACK, sequence, acknowledgement, timestamp, old_byte: true });
    }
}

/// The sequence numbers that this end may be waiting for: after the last byte that went to it, and where it has acknowledged
/// up to, which differ while something is on the way. A reset counts only with exactly that number (RFC 5961 §3).
/// `towards`: the entry of packets that go to this end.
fn expected(flow: &HandoffFlow, end: usize, towards: &HandoffEntry) -> impl Iterator<Item = u32> {
    let (this, other) = (&flow.ends[end], &flow.ends[1 - end]);
    let sent = if other.seen & seen::FIN != 0 { other.fin_end } else { other.end_seq as u32 };
    let next = sent.wrapping_add(towards.dseq);
    let acknowledged = (this.seen & seen::ACK != 0).then_some(this.ack);
    [Some(next), acknowledged.filter(|ack| *ack != next)].into_iter().flatten()
}

/// The addresses of a flow that an earlier daemon has left, from what the kernel holds of it.
pub fn ends_of(store: &dyn HandoffStore, key: &HandoffKey) -> Option<Ends> {
    let there = store.entry(key)?;
    let address = |endpoint: &Endpoint| socket_address(endpoint, key.ip_version);
    Some(Ends {
        client: address(&key.source),
        listen: address(&key.destination),
        source: address(&there.source),
        backend: address(&there.destination),
    })
}

fn socket_address(endpoint: &Endpoint, version: u8) -> std::net::SocketAddr {
    let port = u16::from_be_bytes(endpoint.port_be);
    let [a, b, c, d, ..] = endpoint.address;
    match version {
        IPV4 => (std::net::Ipv4Addr::new(a, b, c, d), port).into(),
        _ => (std::net::Ipv6Addr::from(endpoint.address), port).into(),
    }
}
