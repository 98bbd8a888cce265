//! From the numbers of one connection to those of the other; arithmetic wraps (RFC 9293 §3.4).

use std::time::Duration;

use super::{Both, Failure};

/// What the kernel says of one of the two sockets, in the sequence numbers of its connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// The next byte that will be written.
    pub write_seq: u32,
    /// The next byte from the peer.
    pub rcv_nxt: u32,
    /// Bytes received and not read.
    pub unread: u32,
    /// Bytes written and not acknowledged …
    pub unacked: u32,
    /// … of these, never sent.
    pub unsent: u32,
    /// Bytes that were read from this socket and are not yet written to the other.
    pub held: u32,
    /// What its peer takes behind what it has acknowledged; 0: not known.
    pub window: u32,
    /// What its peer was told that it may send; 0: not known.
    pub announced: u32,
    pub round_trip: Duration,
}

/// What is added to the sequence numbers of packets from the client, and of those from the backend, and taken off the
/// acknowledgements of the other direction. Relaying does not change it: it moves bytes between terms of one sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offsets(pub Both<u32>);

impl Offsets {
    pub fn of(sockets: &Both<Seen>) -> Self {
        let from = |this: &Seen, other: &Seen| {
            let read_up_to = this.rcv_nxt.wrapping_sub(this.unread);
            other.write_seq.wrapping_add(this.held).wrapping_sub(read_up_to)
        };
        let [client, backend] = sockets;
        Self([from(client, backend), from(backend, client)])
    }
}

/// What is on its way through the daemon, be it in its sockets: `unread`, `held`, `unsent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// It may be overtaken.
    Little,
    /// It gets less while nothing is read.
    Shrinks,
    /// … and so much is left.
    Much,
}

impl Rest {
    /// In one direction, in bytes. It is sent within a round trip, and until then its reader keeps what overtakes it.
    pub const MOST: u32 = 256 << 10;
    /// What our socket announces at most when the rest has been read from it.
    pub const ANNOUNCED: u32 = 16 << 10;

    pub fn of(sockets: &Both<Seen>) -> Self {
        let [client, backend] = sockets;
        let ways = [(client, backend), (backend, client)].map(|(from, to)| Self::of_way(from, to));
        if ways == [Self::Little; 2] {
            Self::Little
        } else if ways.contains(&Self::Much) {
            Self::Much
        } else {
            Self::Shrinks
        }
    }

    fn of_way(from: &Seen, to: &Seen) -> Self {
        let unwritten = from.unread + from.held;
        let rest = unwritten + to.unsent;
        // Beyond its window the reader would throw away what overtakes the rest.
        let announced = from.announced.max(Self::ANNOUNCED);
        let fits = u64::from(to.unacked) + u64::from(unwritten) + u64::from(announced) <= u64::from(to.window);
        if rest == 0 || rest <= Self::MOST && fits {
            Self::Little
        } else if to.unacked > 0 {
            Self::Shrinks
        } else {
            Self::Much
        }
    }
}

/// What was agreed when a connection began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Neither side has finished.
    pub established: bool,
    pub timestamps: bool,
    pub sack: bool,
    pub ecn: bool,
    /// Timestamps count microseconds.
    pub timestamps_in_micros: bool,
    /// The peer's windows are to be shifted by so much; 0 when nothing was agreed.
    pub peer_scale: u8,
    /// … and ours.
    pub own_scale: u8,
    /// The largest payload sent in one segment: what the peer takes and the path allows, less options.
    pub snd_mss: u32,
    /// The largest segment that was announced to the peer, without options.
    pub announced_mss: u32,
    /// Segments that came out of order, ever (v5.4+; 0 before).
    pub out_of_order: u32,
    /// The interface's and the peer's limit: the largest segment that the peer takes, without options.
    pub peer_mss: u32,
    /// See [`Seen::window`] (v5.4+).
    pub window: u32,
    /// See [`Seen::announced`] (v6.2+).
    pub announced: u32,
    pub round_trip: Duration,
}

/// Why a pair of connections cannot be joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error("one side has finished")]
    Finished,
    #[error("the backend sends segments of {sent} bytes, the client takes {taken}")]
    ToClient { sent: u32, taken: u32 },
    #[error("the client sends segments of {sent} bytes, the backend takes {taken}")]
    ToBackend { sent: u32, taken: u32 },
}

impl Unfit {
    pub const fn failure(self) -> Failure {
        match self {
            Self::Finished => Failure::Finished,
            Self::ToClient { .. } | Self::ToBackend { .. } => Failure::SegmentSize,
        }
    }
}

/// Whether the ends can talk to each other. Our sockets ask for neither MPTCP nor TCP-AO nor MD5 signatures, so no connection of
/// theirs has them.
pub fn fit(client: &Facts, backend: &Facts) -> Result<(), Unfit> {
    if !(client.established && backend.established) {
        return Err(Unfit::Finished);
    }
    let (sent, taken) = (backend.announced_mss, client.peer_mss);
    if sent > taken {
        return Err(Unfit::ToClient { sent, taken });
    }
    let (sent, taken) = (client.announced_mss, backend.peer_mss);
    if sent > taken {
        return Err(Unfit::ToBackend { sent, taken });
    }
    Ok(())
}
