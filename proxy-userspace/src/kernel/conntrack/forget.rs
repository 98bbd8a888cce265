//! What conntrack thinks of connections that the daemon has sockets of: asked and deleted one by one, by their addresses.

use std::net::SocketAddr;

use proxy_core::{config::Protocol, conntrack::Tuple, flow::EntryKey};

use super::{
    ConntrackError, parse,
    socket::RequestSocket,
    wire::{self, Messages, NLM_F_ACK, Requests},
};

/// A socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Forgetter {
    asks: RequestSocket,
    requests: Requests,
    sequence: u32,
}

impl Forgetter {
    pub fn open() -> Result<Self, ConntrackError> {
        Ok(Self { asks: RequestSocket::open()?, requests: Requests::default(), sequence: 0 })
    }

    /// Deletes the entries of these TCP connections, each named by our end and the other one, whoever began it. Those of
    /// connections that are handed over would stay for days, since their packets do not pass conntrack any more.
    pub fn forget(&mut self, connections: &[(SocketAddr, SocketAddr)]) {
        self.requests.clear();
        for ends in connections {
            self.ask(wire::CT_DELETE, NLM_F_ACK, *ends);
        }
        if self.asks.send(self.requests.bytes()).is_err() {
            return;
        }
        // One answer each, whether there was an entry or not.
        for _ in connections {
            if self.asks.receive().is_err() {
                return;
            }
        }
    }

    /// Whether somebody's NAT has its hands in this connection: its packets have other addresses on the wire than our
    /// socket knows. `None`: not tracked.
    pub fn is_translated(&mut self, ours: SocketAddr, theirs: SocketAddr) -> Option<bool> {
        self.requests.clear();
        self.ask(wire::CT_GET, 0, (ours, theirs));
        let sequence = self.sequence;
        self.asks.send(self.requests.bytes()).ok()?;
        let answer = Messages(self.asks.receive().ok()?).find(|message| message.sequence == sequence)?;
        let directions = parse::directions(answer.payload)?;
        // The kernel finds an entry by either direction.
        let is = |source, destination| directions.contains(&Tuple { source, destination });
        Some(!(is(ours, theirs) && is(theirs, ours)))
    }

    fn ask(&mut self, kind: u16, flags: u16, (source, destination): (SocketAddr, SocketAddr)) {
        let key = EntryKey { protocol: Protocol::Tcp, original: Tuple { source, destination }, id: 0 };
        self.sequence = self.sequence.wrapping_add(1);
        self.requests.start(kind, flags, self.sequence, wire::family(&key));
        self.requests.original(&key);
        self.requests.finish();
    }
}
