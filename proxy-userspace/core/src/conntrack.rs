//! Conntrack entries and events as the kernel tells them (`ctnetlink`), free of netlink.

use std::net::{IpAddr, SocketAddr};

use crate::config::Protocol;

/// Addresses and ports of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// TCP states of conntrack (`enum tcp_conntrack`), in the kernel's numbering from `TCP_CONNTRACK_NONE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TcpState {
    None,
    SynSent,
    SynRecv,
    Established,
    FinWait,
    CloseWait,
    LastAck,
    TimeWait,
    Close,
    SynSent2,
}

impl TcpState {
    /// `None` for a number this enum does not know.
    pub const fn from_kernel(state: u8) -> Option<Self> {
        Some(match state {
            0 => Self::None,
            1 => Self::SynSent,
            2 => Self::SynRecv,
            3 => Self::Established,
            4 => Self::FinWait,
            5 => Self::CloseWait,
            6 => Self::LastAck,
            7 => Self::TimeWait,
            8 => Self::Close,
            9 => Self::SynSent2,
            _ => return None,
        })
    }
}

/// Packets and bytes (from the IP header on) of one direction, as `nf_conntrack_acct` counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

/// One conntrack entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// `CTA_ID`: constant while the entry lives.
    pub id: u32,
    pub protocol: Protocol,
    /// As the client sent it.
    pub original: Tuple,
    /// As the backend answers: `source` is the backend.
    pub reply: Tuple,
    pub mark: u32,
    /// `IPS_*` bits.
    pub status: u32,
    /// Seconds until the entry expires, where told.
    pub timeout: Option<u32>,
    /// `None` for UDP and where not told.
    pub tcp_state: Option<TcpState>,
    /// Client → backend. `None` without `nf_conntrack_acct` and in `New` and `Update` events.
    pub traffic_in: Option<Traffic>,
    /// Backend → client.
    pub traffic_out: Option<Traffic>,
    /// Wall-clock start in nanoseconds since the epoch, with `nf_conntrack_timestamp`.
    pub started_ns: Option<u64>,
    /// Wall-clock end, in `Destroy` events, with `nf_conntrack_timestamp`.
    pub stopped_ns: Option<u64>,
    /// Wall-clock time of the event itself, with `nf_conntrack_timestamp` (v6.14+).
    pub event_ns: Option<u64>,
}

impl Entry {
    pub fn client(&self) -> SocketAddr {
        self.original.source
    }

    pub fn listen(&self) -> SocketAddr {
        self.original.destination
    }

    pub fn backend(&self) -> SocketAddr {
        self.reply.source
    }

    pub fn is_ipv4(&self) -> bool {
        matches!(self.original.source.ip(), IpAddr::V4(_))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    New(Entry),
    Update(Entry),
    Destroy(Entry),
    /// The socket's buffer ran over: events before this point are missing. A dump heals it.
    Lost,
}
