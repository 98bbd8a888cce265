//! What a conntrack entry says about the connection: where it stands, or why it ended.

use std::time::Duration;

use super::{
    mark::End,
    record::{Record, Side, State},
    route::RouteInfo,
};
use crate::{
    config::Protocol,
    conntrack::{Entry, TcpState},
    reason::Reason,
};

/// `IPS_SEEN_REPLY`
const SEEN_REPLY: u32 = 1 << 1;
/// `IPS_ASSURED`: for TCP, the handshake was completed (`nf_conntrack_tcp_packet`).
const ASSURED: u32 = 1 << 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// One of the active states.
    Alive(State),
    Over(Reason),
}

/// Where a living entry stands. `known`: what the table held until now.
pub(super) fn standing(entry: &Entry, end: End, known: State) -> Standing {
    match (end, entry.protocol) {
        (End::Open, Protocol::Udp) => Standing::Alive(State::Established),
        (End::Open, Protocol::Tcp) => open_tcp(entry, known),
        (End::ClientFinished, _) => Standing::Alive(State::HalfClosed { first: Side::Client }),
        (End::BackendFinished, _) => Standing::Alive(State::HalfClosed { first: Side::Backend }),
        (End::FinishedClientFirst, _) => Standing::Over(Reason::FinishedClientFirst),
        (End::FinishedBackendFirst, _) => Standing::Over(Reason::FinishedBackendFirst),
        (End::ResetByClient, _) => Standing::Over(Reason::ResetByClient),
        (End::ResetByBackend, _) => Standing::Over(reset_by_backend(entry, known)),
        // Only the daemon writes it; if the table does not know why, a daemon before this one did it.
        (End::Cut, _) => Standing::Over(Reason::Killed),
    }
}

/// The ruleset has seen neither FIN nor RST.
fn open_tcp(entry: &Entry, known: State) -> Standing {
    match entry.tcp_state {
        None => Standing::Alive(known),
        Some(TcpState::None | TcpState::SynSent | TcpState::SynRecv | TcpState::SynSent2) => {
            Standing::Alive(State::Dialing)
        }
        Some(TcpState::Established | TcpState::FinWait | TcpState::CloseWait | TcpState::LastAck) => {
            Standing::Alive(match known {
                State::HalfClosed { .. } => known,
                State::Dialing | State::Established | State::Closing { .. } => State::Established,
            })
        }
        Some(TcpState::TimeWait) => Standing::Over(Reason::KernelExpired),
        Some(TcpState::Close) => Standing::Over(unmarked_reset(entry, known)),
    }
}

/// A reset during the handshake is a refusal.
fn reset_by_backend(entry: &Entry, known: State) -> Reason {
    match known {
        State::Dialing if entry.status & ASSURED == 0 => Reason::ConnectRefused,
        State::Dialing | State::Established | State::HalfClosed { .. } | State::Closing { .. } => {
            Reason::ResetByBackend
        }
    }
}

/// `CLOSE` without end bits. The kernel drops an entry whose only answer is a RST, or whose client resets before any
/// answer, before the packet reaches the ruleset (`nf_conntrack_tcp_packet`, `nf_ct_kill_acct`).
fn unmarked_reset(entry: &Entry, known: State) -> Reason {
    let answered = entry.traffic_out.is_none_or(|out| out.packets > 0);
    match known {
        State::Dialing if !answered => Reason::ResetByClient,
        State::Dialing if entry.status & ASSURED == 0 => Reason::ConnectRefused,
        State::Dialing | State::Established | State::HalfClosed { .. } | State::Closing { .. } => Reason::KernelExpired,
    }
}

/// Why an active record's entry is gone. `idle`: the longest it can have been silent; `slack`: how far that may be
/// short of the truth.
pub(super) fn destroyed(
    entry: &Entry,
    end: End,
    record: &Record,
    route: &RouteInfo,
    idle: Duration,
    slack: Duration,
) -> Reason {
    let state = match standing(entry, end, record.state) {
        Standing::Over(reason) => return reason,
        Standing::Alive(state) => state,
    };
    let silent_for = |limit: Option<Duration>| limit.is_some_and(|limit| idle + slack >= limit);
    match (record.protocol, state) {
        (Protocol::Udp, _) => Reason::IdleTimeout,
        (Protocol::Tcp, State::HalfClosed { .. }) if silent_for(route.half_closed) => Reason::HalfClosedTimeout,
        (Protocol::Tcp, State::Dialing) if unanswered(entry) => Reason::ConnectTimeout,
        (Protocol::Tcp, State::Dialing) if entry.tcp_state.is_none() && killed_by_its_answer(entry) => {
            Reason::ConnectRefused
        }
        (Protocol::Tcp, State::Established) if silent_for(route.idle) => Reason::IdleTimeout,
        // Without protocol state in DESTROY (before v5.12) a short connection is not known to be past its handshake.
        (Protocol::Tcp, State::Dialing) if entry.tcp_state.is_none() && silent_for(route.idle) => Reason::IdleTimeout,
        (Protocol::Tcp, _) => Reason::KernelExpired,
    }
}

/// The first answer was a RST, where DESTROY does not say that the entry was in `CLOSE` (before v5.12): the entry goes, its packet counted,
/// before the answer is noted in the status (`nf_conntrack_tcp_packet`, `nf_conntrack_in`).
fn killed_by_its_answer(entry: &Entry) -> bool {
    entry.status & SEEN_REPLY == 0 && entry.traffic_out.is_some_and(|out| out.packets > 0)
}

fn unanswered(entry: &Entry) -> bool {
    entry.status & SEEN_REPLY == 0 && entry.traffic_out.is_none_or(|out| out.packets == 0)
}
