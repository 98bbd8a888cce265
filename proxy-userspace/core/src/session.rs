//! The life of one relayed connection: `State × Event × now → Action`, without a socket.
//!
//! Sockets, buffers and timers belong to the caller; what they tell comes in as an [`Event`], what is to be done with them
//! goes out as one [`Action`]. A session ends exactly once: after [`Action::End`] every further event is
//! [`Action::Nothing`].

use std::time::Duration;

use crate::{
    config::{Keepalive, Route},
    flow::Side,
    reason::Reason,
};

/// Milliseconds on the caller's monotonic clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub u64);

impl Tick {
    /// A deadline further away than the clock can count never comes.
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// A client that has finished without a byte may only wait for the backend's words, or be gone: it is given so long to be
/// dialled for, enough for one SYN to be sent again (RFC 6298 §2).
pub const SILENT_CLIENT: Duration = Duration::from_millis(1500);

/// The limits of a route, keepalive applied. `None`: never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub initial_data: Duration,
    /// Each handshake: the client's, and the backend's.
    pub tls_handshake: Duration,
    /// All attempts to reach a backend together.
    pub connect: Duration,
    /// No byte in either direction.
    pub idle: Option<Duration>,
    /// When a warning is due before `idle`.
    pub idle_warning: Option<Duration>,
    pub half_closed: Option<Duration>,
    pub lifetime: Option<Duration>,
}

impl Limits {
    /// Where there is no route: what comes there ends by other means.
    pub const NONE: Self = Self {
        initial_data: Duration::ZERO,
        tls_handshake: Duration::ZERO,
        connect: Duration::ZERO,
        idle: None,
        idle_warning: None,
        half_closed: None,
        lifetime: None,
    };

    pub fn of(route: &Route) -> Self {
        let timeouts = &route.timeouts;
        let (idle, idle_warning) = match route.keepalive {
            Keepalive::Standard => (timeouts.idle, None),
            Keepalive::Extended => (timeouts.idle.map(|idle| idle.saturating_mul(6)), timeouts.idle),
            Keepalive::Immortal => (None, None),
        };
        Self {
            initial_data: timeouts.initial_data,
            tls_handshake: timeouts.tls_handshake,
            connect: timeouts.connect,
            idle,
            idle_warning,
            half_closed: timeouts.half_closed,
            lifetime: timeouts.lifetime,
        }
    }
}

/// Where a session stands; each variant holds what is true in it and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The first bytes do not say yet where to go.
    Classifying {
        until: Tick,
    },
    /// TLS with the client begins.
    Handshaking {
        until: Tick,
    },
    /// No backend has answered yet.
    Dialing {
        until: Tick,
        /// The client's FIN has come; it goes on when there is a backend.
        client_finished: bool,
    },
    /// TLS with the backend begins.
    Securing {
        until: Tick,
    },
    Established {
        /// The warning before a long idle limit has been given for this silence.
        warned: bool,
    },
    /// One side has finished and the other knows it.
    HalfClosed {
        first: Side,
    },
    Closed(Reason),
}

impl State {
    /// As `shunt connections` shows it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Classifying { .. } => "classifying",
            Self::Handshaking { .. } => "handshaking",
            Self::Dialing { .. } => "dialing",
            Self::Securing { .. } => "securing",
            Self::Established { .. } => "established",
            Self::HalfClosed { .. } => "half_closed",
            Self::Closed(_) => "closing",
        }
    }
}

/// What has happened to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The route is known: a backend can be dialled, after TLS with the client where it ends here.
    Classified { tls: bool },
    /// A backend has answered; with `tls` it expects a handshake.
    Connected { tls: bool },
    /// The handshake that was under way is complete.
    Secured,
    /// … or has come to nothing.
    HandshakeFailed,
    /// No backend of the route is left to try.
    DialFailed(Reason),
    /// Bytes have been passed on, in whichever direction.
    Moved,
    /// Everything this side had to say, its FIN included, has been passed on to the other. While dialling: the client's
    /// FIN has come; `silent` when no byte came before it.
    Finished { side: Side, silent: bool },
    /// This side has sent a reset, or vanished.
    Reset(Side),
    /// Refused, killed, drained.
    Cut(Reason),
    /// Time has passed.
    Tick,
}

/// What the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Nothing,
    /// Begin TLS: with the client, or with the backend where there is one.
    Handshake,
    /// Choose a backend and connect to it.
    Dial,
    /// Pass bytes on, both ways.
    Relay,
    /// Say in the log that the connection has been silent for long.
    WarnIdle,
    /// Close both sockets.
    End {
        reason: Reason,
        how: How,
    },
}

/// How the sockets are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Both FINs are through: nothing is left to be said.
    Finished,
    /// With a reset, so that nobody takes what came for all there was.
    Reset,
}

/// One connection's state and times. 48 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    state: State,
    began: Tick,
    /// The last byte, or the last change of state.
    active: Tick,
}

impl Session {
    /// A connection that has been accepted.
    pub fn accepted(initial_data: Duration, now: Tick) -> Self {
        Self { state: State::Classifying { until: now.after(initial_data) }, began: now, active: now }
    }

    /// One that a daemon before this one has accepted.
    pub fn established(began: Tick, active: Tick) -> Self {
        Self { state: State::Established { warned: false }, began, active }
    }

    /// The same on a clock that began so many milliseconds earlier. For established sessions: the deadlines of others stay.
    pub fn on_older_clock(self, milliseconds: u64) -> Self {
        let shifted = |Tick(tick): Tick| Tick(tick.saturating_add(milliseconds));
        Self { state: self.state, began: shifted(self.began), active: shifted(self.active) }
    }

    pub fn state(&self) -> State {
        self.state
    }

    pub fn began(&self) -> Tick {
        self.began
    }

    pub fn last_activity(&self) -> Tick {
        self.active
    }

    /// Bytes have moved: on the hot path, so nothing but a store.
    pub fn moved(&mut self, now: Tick) {
        self.active = now;
        if let State::Established { warned } = &mut self.state {
            *warned = false;
        }
    }

    pub fn step(&mut self, event: Event, limits: &Limits, now: Tick) -> Action {
        match (self.state, event) {
            (State::Closed(_), _) => Action::Nothing,
            (_, Event::Cut(reason)) => self.end(reason, How::Reset),
            (_, Event::Reset(Side::Client)) => self.end(Reason::ResetByClient, How::Reset),
            (_, Event::Reset(Side::Backend)) => self.end(Reason::ResetByBackend, How::Reset),
            (_, Event::Tick) => self.tick(limits, now),
            (State::Classifying { .. }, Event::Classified { tls: true }) => {
                self.state = State::Handshaking { until: now.after(limits.tls_handshake) };
                self.active = now;
                Action::Handshake
            }
            (State::Classifying { .. }, Event::Classified { tls: false })
            | (State::Handshaking { .. }, Event::Secured) => {
                self.state = State::Dialing { until: now.after(limits.connect), client_finished: false };
                self.active = now;
                Action::Dial
            }
            // The alert that tells the client why is on its way: no reset may overtake it.
            (State::Handshaking { .. }, Event::HandshakeFailed | Event::Finished { .. }) => {
                self.end(Reason::TlsHandshakeFailed, How::Finished)
            }
            (State::Securing { .. }, Event::HandshakeFailed | Event::Finished { side: Side::Backend, .. }) => {
                self.end(Reason::TlsHandshakeFailed, How::Reset)
            }
            // What came does not tell where to go, and nothing more will come.
            (State::Classifying { .. }, Event::Finished { .. }) => self.end(Reason::FinishedClientFirst, How::Finished),
            (State::Dialing { .. }, Event::Connected { tls: true }) => {
                self.state = State::Securing { until: now.after(limits.tls_handshake) };
                self.active = now;
                Action::Handshake
            }
            (State::Dialing { .. }, Event::Connected { tls: false }) | (State::Securing { .. }, Event::Secured) => {
                self.state = State::Established { warned: false };
                self.active = now;
                Action::Relay
            }
            (State::Dialing { .. }, Event::DialFailed(reason)) => self.end(reason, How::Reset),
            (State::Dialing { until, .. }, Event::Finished { side: Side::Client, silent }) => {
                let until = if silent { until.min(now.after(SILENT_CLIENT)) } else { until };
                self.state = State::Dialing { until, client_finished: true };
                Action::Nothing
            }
            (State::Established { .. } | State::HalfClosed { .. }, Event::Moved) => {
                self.moved(now);
                Action::Nothing
            }
            (State::Established { .. }, Event::Finished { side, .. }) => {
                self.state = State::HalfClosed { first: side };
                self.active = now;
                Action::Nothing
            }
            (State::HalfClosed { first }, Event::Finished { side, .. }) if side != first => match first {
                Side::Client => self.end(Reason::FinishedClientFirst, How::Finished),
                Side::Backend => self.end(Reason::FinishedBackendFirst, How::Finished),
            },
            // A side finishes once; nothing else can be said in these states.
            (State::HalfClosed { .. }, Event::Finished { .. })
            | (
                State::Classifying { .. },
                Event::Connected { .. }
                | Event::Secured
                | Event::HandshakeFailed
                | Event::DialFailed(_)
                | Event::Moved,
            )
            | (
                State::Handshaking { .. },
                Event::Classified { .. } | Event::Connected { .. } | Event::DialFailed(_) | Event::Moved,
            )
            | (
                State::Dialing { .. },
                Event::Classified { .. }
                | Event::Secured
                | Event::HandshakeFailed
                | Event::Moved
                | Event::Finished { side: Side::Backend, .. },
            )
            // The client's FIN is still in its socket, and goes on from there.
            | (
                State::Securing { .. },
                Event::Classified { .. }
                | Event::Connected { .. }
                | Event::DialFailed(_)
                | Event::Moved
                | Event::Finished { side: Side::Client, .. },
            )
            | (
                State::Established { .. } | State::HalfClosed { .. },
                Event::Classified { .. }
                | Event::Connected { .. }
                | Event::Secured
                | Event::HandshakeFailed
                | Event::DialFailed(_),
            ) => Action::Nothing,
        }
    }

    /// When [`Event::Tick`] is due next, if nothing else happens. `None` only when nothing will ever time out.
    pub fn deadline(&self, limits: &Limits) -> Option<Tick> {
        let (at, _) = self.next_timeout(limits)?;
        Some(match (self.state, limits.idle_warning) {
            (State::Established { warned: false }, Some(warning)) => at.min(self.active.after(warning)),
            _ => at,
        })
    }

    /// Until the timeout of its present state, if nothing comes.
    pub fn expires_in(&self, limits: &Limits, now: Tick) -> Option<Duration> {
        self.next_timeout(limits).map(|(at, _)| at.since(now))
    }

    fn next_timeout(&self, limits: &Limits) -> Option<(Tick, Reason)> {
        let quiet = |limit: Option<Duration>, reason| limit.map(|limit| (self.active.after(limit), reason));
        let of_state = match self.state {
            State::Classifying { until } => Some((until, Reason::InitialDataTimeout)),
            State::Handshaking { until } | State::Securing { until } => Some((until, Reason::TlsHandshakeTimeout)),
            State::Dialing { until, client_finished: true } if until < self.active.after(limits.connect) => {
                Some((until, Reason::FinishedClientFirst))
            }
            State::Dialing { until, .. } => Some((until, Reason::ConnectTimeout)),
            State::Established { .. } => quiet(limits.idle, Reason::IdleTimeout),
            State::HalfClosed { .. } => quiet(limits.half_closed, Reason::HalfClosedTimeout),
            State::Closed(_) => return None,
        };
        let lifetime = limits.lifetime.map(|limit| (self.began.after(limit), Reason::LifetimeExceeded));
        [of_state, lifetime].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn tick(&mut self, limits: &Limits, now: Tick) -> Action {
        if let Some((_, reason)) = self.next_timeout(limits).filter(|(at, _)| *at <= now) {
            return self.end(reason, How::Reset);
        }
        if let (State::Established { warned: false }, Some(warning)) = (self.state, limits.idle_warning)
            && self.active.after(warning) <= now
        {
            self.state = State::Established { warned: true };
            return Action::WarnIdle;
        }
        Action::Nothing
    }

    fn end(&mut self, reason: Reason, how: How) -> Action {
        self.state = State::Closed(reason);
        Action::End { reason, how }
    }
}

const _: () = assert!(size_of::<Session>() <= 48);

#[cfg(test)]
mod tests;
