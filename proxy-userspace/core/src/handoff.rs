//! How a connection leaves the daemon for the packet level: `State × Event × now → Action`, without a socket.
//!
//! The one thing that must never happen is that our stack acknowledges a byte that does not reach the other end. So entries are
//! made while bytes are still relayed (armed), the gate opens when little is on its way through the daemon (committed), that and
//! what slipped in is still relayed (draining), and the sockets go when neither end can reach them any more (leaving).
//!
//! What is on its way at that moment is overtaken by what the ends send each other from then on. They put it in order, as long as
//! it fits into their windows; so it must be little. On a connection that is busy it is so after a pause: nothing more is read
//! until what was written has reached its reader.

mod offsets;

use std::{fmt, time::Duration};

pub use self::offsets::{Facts, Offsets, Rest, Seen, Unfit, fit};
use crate::session::Tick;

/// When a connection is worth it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct When {
    /// Bytes relayed in both directions together …
    pub bytes: u64,
    /// … or the time since a backend answered.
    pub age: Duration,
}

/// After so many attempts that came to nothing, the next ones are rarer.
const EAGER: u32 = 8;
/// Between attempts that found the connection busy.
const SOON: Duration = Duration::from_millis(2);
/// … and once it has been busy for long, or something was full. Doubled up to [`RARELY`].
const LATER: Duration = Duration::from_millis(50);
const RARELY: Duration = Duration::from_secs(2);
/// Nothing is read for so long, and two round trips more.
const PAUSE: Duration = Duration::from_millis(20);
/// … but not for longer, however far the ends are.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A peer that has not acknowledged our last bytes by then is gone: what TCP itself tries for (`tcp_retries2`, RFC 9293 §3.8.3).
pub const DRAIN: Duration = Duration::from_secs(100);

/// Why a connection is not handed over, or not yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// Too much was on its way through the daemon: tried again.
    Busy,
    /// Segments came out of order; what is missing would be sent again late, were they given up: tried again.
    OutOfOrder,
    /// The table of the program is full: tried again.
    TableFull,
    /// An older flow of the same addresses and ports lingers: tried again.
    Taken,
    /// Its owner is behind: tried again.
    OwnerBusy,
    /// A call failed: tried again.
    Kernel,
    /// No source port of our own was free when it was dialled.
    NoPort,
    /// One side has finished.
    Finished,
    /// Urgent data has come, and reads stop at its mark.
    Urgent,
    /// One end would send larger segments than the other takes.
    SegmentSize,
    /// One end speaks IPv4, the other IPv6.
    AddressFamilies,
    /// One end is on this machine: its packets do not come by the program.
    OnThisMachine,
    /// The program is not on the interface that leads to one end.
    Interface,
    /// Somebody's NAT changes the addresses between the wire and our socket.
    Translated,
    /// A defect in shunt: must stay 0.
    OffsetsMoved,
}

impl Failure {
    /// In the order of the documentation.
    pub const ALL: [Self; 15] = [
        Self::Busy,
        Self::OutOfOrder,
        Self::TableFull,
        Self::Taken,
        Self::OwnerBusy,
        Self::Kernel,
        Self::NoPort,
        Self::Finished,
        Self::Urgent,
        Self::SegmentSize,
        Self::AddressFamilies,
        Self::OnThisMachine,
        Self::Interface,
        Self::Translated,
        Self::OffsetsMoved,
    ];

    /// The value of the `reason` label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::OutOfOrder => "out_of_order",
            Self::TableFull => "table_full",
            Self::Taken => "taken",
            Self::OwnerBusy => "owner_busy",
            Self::Kernel => "kernel",
            Self::NoPort => "no_port",
            Self::Finished => "finished",
            Self::Urgent => "urgent",
            Self::SegmentSize => "segment_size",
            Self::AddressFamilies => "address_families",
            Self::OnThisMachine => "on_this_machine",
            Self::Interface => "interface",
            Self::Translated => "translated",
            Self::OffsetsMoved => "offsets_moved",
        }
    }

    /// It may go better later.
    const fn passes(self) -> bool {
        match self {
            Self::Busy | Self::OutOfOrder | Self::TableFull | Self::Taken | Self::OwnerBusy | Self::Kernel => true,
            Self::NoPort
            | Self::Finished
            | Self::Urgent
            | Self::SegmentSize
            | Self::AddressFamilies
            | Self::OnThisMachine
            | Self::Interface
            | Self::Translated
            | Self::OffsetsMoved => false,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Busy => "too much was on its way through the daemon",
            Self::OutOfOrder => "segments have come out of order, and some are missing",
            Self::TableFull => "the table of handed-over connections is full",
            Self::Taken => "an older connection of the same addresses and ports lingers in the table",
            Self::OwnerBusy => "too many connections are being handed over at once",
            Self::Kernel => "a system call failed (log level debug says which)",
            Self::NoPort => "no source port of those for handed-over connections was free when its backend was dialled",
            Self::Finished => "one side has finished sending",
            Self::Urgent => "urgent data has come on it",
            Self::SegmentSize => "one end would send larger segments than the other takes",
            Self::AddressFamilies => "one end speaks IPv4, the other IPv6",
            Self::OnThisMachine => "one end is on this machine: its packets come by no interface",
            Self::Interface => {
                "the way to one end leads through an interface that the program is not on (WireGuard, tun, no address)"
            }
            Self::Translated => "somebody's NAT changes its addresses between the wire and the daemon's socket",
            Self::OffsetsMoved => "a defect in shunt: its sequence numbers do not fit; please report it",
        })
    }
}

/// Client and backend, in this order.
pub type Both<T> = [T; 2];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Bytes go through the daemon; an attempt is due after this.
    Relaying {
        not_before: Tick,
    },
    /// Nothing more is read. What was goes on to its readers.
    Paused {
        until: Tick,
    },
    /// As before, and entries are there. Their gate is closed: packets come to the sockets.
    Armed {
        offsets: Offsets,
        until: Tick,
    },
    /// The gate is open. What the sockets had written is not acknowledged yet.
    Draining {
        written: Both<u32>,
        until: Tick,
    },
    /// No packet is for the sockets any more; one that was already on its way to them may still arrive.
    Leaving {
        written: Both<u32>,
    },
    Vanished,
    /// Relayed to its end.
    Never(Failure),
}

/// What the program knows of one end: what it has acknowledged, if anything came.
pub type Acknowledged = Option<u32>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// What could be relayed has been. `held`: something was read and could not be written.
    Turn { bytes: u64, age: Duration, held: bool },
    /// As [`Action::Measure`] asked.
    Measured { sockets: Both<Seen>, established: bool },
    /// What was asked for could not be done.
    Failed(Failure),
    /// As [`Action::Look`] asked, while draining or leaving.
    Looked { sockets: Both<Seen>, acknowledged: Both<Acknowledged>, settled: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Nothing,
    /// Hold both sockets and read their numbers: [`Event::Measured`].
    Measure,
    /// Make the entries, then measure again.
    Arm(Offsets),
    /// Open the gate, and pass on what is left. From here on there is no way back.
    Commit,
    /// Release the sockets, but read nothing: only what was read is written. Come again soon.
    Pause,
    /// Take the entries away, if there are any, release the sockets and go on relaying.
    Relay {
        armed: bool,
        why: Failure,
    },
    /// Look again soon.
    Look,
    /// Pass on what has slipped into the sockets, then look again.
    PassOn,
    /// Nothing is for the sockets any more: say so to the program, and wait until what was on its way has arrived.
    Leave,
    /// Close both sockets without a packet.
    Vanish,
    /// A peer is gone: end the connection.
    GiveUp,
}

/// One connection on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handover {
    state: State,
    attempts: u32,
    wait: Duration,
    /// What the last attempt came to.
    why: Option<Failure>,
}

impl Handover {
    /// A connection whose backend has answered. Without a port of our own it stays.
    pub fn new(has_port: bool, now: Tick) -> Self {
        if has_port {
            return Self { state: State::Relaying { not_before: now }, attempts: 0, wait: LATER, why: None };
        }
        Self { state: State::Never(Failure::NoPort), attempts: 0, wait: LATER, why: Some(Failure::NoPort) }
    }

    /// Why its bytes still go through the daemon, one sentence.
    pub fn why(&self) -> String {
        match (self.state, self.why) {
            (State::Draining { .. } | State::Leaving { .. } | State::Vanished, _) => "it is being handed over".into(),
            (State::Never(why), _) => why.to_string(),
            (State::Relaying { .. } | State::Paused { .. } | State::Armed { .. }, Some(why)) => {
                format!("{why}; it is tried again")
            }
            (State::Relaying { .. } | State::Paused { .. } | State::Armed { .. }, None) => {
                "its time has not come: short connections are relayed to their end".into()
            }
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// The gate is open: bytes pass by the daemon.
    pub fn is_committed(&self) -> bool {
        matches!(self.state, State::Draining { .. } | State::Leaving { .. } | State::Vanished)
    }

    /// It is to be handed over as soon as possible.
    pub fn is_eager(&self) -> bool {
        self.attempts < EAGER && !matches!(self.state, State::Never(_))
    }

    /// Nothing is read from the sockets.
    pub fn is_paused(&self) -> bool {
        matches!(self.state, State::Paused { .. } | State::Armed { .. })
    }

    /// When the next turn should be, should none come by itself. `None`: there is nothing to wait for.
    pub fn due(&self, when: &When, connected: Tick) -> Option<Tick> {
        match self.state {
            State::Relaying { not_before } => Some(not_before.max(connected.after(when.age))),
            State::Paused { .. } | State::Armed { .. } => Some(connected),
            State::Draining { .. } | State::Leaving { .. } | State::Vanished | State::Never(_) => None,
        }
    }

    pub fn step(&mut self, event: Event, when: &When, now: Tick) -> Action {
        match (self.state, event) {
            (State::Vanished | State::Never(_), _) => Action::Nothing,
            (State::Relaying { not_before }, Event::Turn { bytes, age, held }) => {
                let worth = bytes >= when.bytes || age >= when.age;
                match worth && now >= not_before {
                    true if held => self.pause(now.after(PAUSE)),
                    true => Action::Measure,
                    false => Action::Nothing,
                }
            }
            (State::Paused { until } | State::Armed { until, .. }, Event::Turn { held: true, .. }) => {
                if now < until {
                    Action::Nothing
                } else {
                    self.back(Failure::Busy, now)
                }
            }
            (State::Paused { .. } | State::Armed { .. }, Event::Turn { held: false, .. }) => Action::Measure,
            (State::Relaying { .. } | State::Paused { .. } | State::Armed { .. }, Event::Failed(why)) => {
                self.back(why, now)
            }
            (
                State::Relaying { .. } | State::Paused { .. } | State::Armed { .. },
                Event::Measured { established: false, .. },
            ) => self.back(Failure::Finished, now),
            (State::Relaying { .. }, Event::Measured { sockets, .. }) => {
                let patience = (PAUSE + 2 * sockets[0].round_trip.max(sockets[1].round_trip)).min(LONGEST_PAUSE);
                self.measured(&sockets, now.after(patience), now)
            }
            (State::Paused { until }, Event::Measured { sockets, .. }) => self.measured(&sockets, until, now),
            (State::Armed { offsets, until }, Event::Measured { sockets, .. }) => match Rest::of(&sockets) {
                _ if Offsets::of(&sockets) != offsets => self.back(Failure::OffsetsMoved, now),
                Rest::Little => {
                    let written = sockets.map(|socket| socket.write_seq);
                    self.state = State::Draining { written, until: now.after(DRAIN) };
                    Action::Commit
                }
                Rest::Shrinks if now < until => Action::Pause,
                Rest::Shrinks | Rest::Much => self.back(Failure::Busy, now),
            },
            (State::Draining { until, .. }, Event::Looked { sockets, acknowledged, .. }) => {
                let written = sockets.map(|socket| socket.write_seq);
                self.state = State::Draining { written, until };
                if sockets.iter().any(|socket| socket.unread > 0) {
                    return Action::PassOn;
                }
                if (0..2).all(|end| is_drained(&sockets[end], acknowledged[end])) {
                    self.state = State::Leaving { written };
                    return Action::Leave;
                }
                if now >= until { Action::GiveUp } else { Action::Look }
            }
            (State::Leaving { .. }, Event::Looked { settled: false, .. }) => Action::Look,
            (State::Leaving { .. }, Event::Looked { sockets, settled: true, .. }) => {
                if sockets.iter().any(|socket| socket.unread > 0) {
                    // It came before the gate was open, so it is not for the other end's program yet.
                    let written = sockets.map(|socket| socket.write_seq);
                    self.state = State::Draining { written, until: now.after(DRAIN) };
                    return Action::PassOn;
                }
                self.state = State::Vanished;
                Action::Vanish
            }
            // Nothing of the kind was asked for.
            (State::Relaying { .. } | State::Paused { .. } | State::Armed { .. }, Event::Looked { .. })
            | (
                State::Draining { .. } | State::Leaving { .. },
                Event::Turn { .. } | Event::Measured { .. } | Event::Failed(_),
            ) => Action::Nothing,
        }
    }

    /// Without entries so far.
    fn measured(&mut self, sockets: &Both<Seen>, until: Tick, now: Tick) -> Action {
        match Rest::of(sockets) {
            Rest::Little => {
                let offsets = Offsets::of(sockets);
                self.state = State::Armed { offsets, until };
                Action::Arm(offsets)
            }
            Rest::Shrinks if now < until => self.pause(until),
            Rest::Shrinks | Rest::Much => self.back(Failure::Busy, now),
        }
    }

    fn pause(&mut self, until: Tick) -> Action {
        self.state = State::Paused { until };
        Action::Pause
    }

    /// Bytes go on through the daemon.
    fn back(&mut self, why: Failure, now: Tick) -> Action {
        let armed = matches!(self.state, State::Armed { .. });
        self.why = Some(why);
        if !why.passes() {
            self.state = State::Never(why);
            return Action::Relay { armed, why };
        }
        self.attempts += 1;
        let wait = if why == Failure::Busy && self.attempts < EAGER {
            SOON
        } else {
            let wait = self.wait;
            self.wait = (wait * 2).min(RARELY);
            wait
        };
        self.state = State::Relaying { not_before: now.after(wait) };
        Action::Relay { armed, why }
    }
}

/// Everything that this socket wrote has been acknowledged: to it, or, as the program saw, by a packet that was not for it.
fn is_drained(socket: &Seen, acknowledged: Acknowledged) -> bool {
    let reached = |ack: u32| ack.wrapping_sub(socket.write_seq) as i32 >= 0;
    socket.unacked == 0 || acknowledged.is_some_and(reached)
}

#[cfg(test)]
mod tests;
