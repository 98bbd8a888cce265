//! The life of a relayed connection against a model that knows no states, only what has happened so far.

#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use proxy_core::{
    flow::Side,
    reason::Reason,
    session::{Action, Event, How, Limits, SILENT_CLIENT, Session, State, Tick},
};

/// What has happened, in milliseconds.
#[derive(Default)]
struct Story {
    classified: Option<u64>,
    connected: Option<u64>,
    /// While dialling: the client has finished without a byte, at.
    silent: Option<u64>,
    client_finished: Option<u64>,
    backend_finished: Option<u64>,
    first: Option<Side>,
    /// The last byte or turn of events.
    active: u64,
    warned: bool,
    over: bool,
}

impl Story {
    /// When what ends the connection, if nothing else happens.
    fn timeout(&self, limits: &Limits) -> Option<(u64, Reason)> {
        let ms = |limit: Duration| limit.as_millis() as u64;
        let quiet = |limit: Option<Duration>, reason| limit.map(|limit| (self.active + ms(limit), reason));
        let own = match (self.classified, self.connected, self.first) {
            (None, ..) => Some((ms(limits.initial_data), Reason::InitialDataTimeout)),
            (Some(at), None, _) => {
                let all = at + ms(limits.connect);
                let silent = self.silent.map(|at| at + ms(SILENT_CLIENT)).filter(|until| *until < all);
                Some(silent.map_or((all, Reason::ConnectTimeout), |until| (until, Reason::FinishedClientFirst)))
            }
            (_, Some(_), None) => quiet(limits.idle, Reason::IdleTimeout),
            (_, Some(_), Some(_)) => quiet(limits.half_closed, Reason::HalfClosedTimeout),
        };
        let lifetime = limits.lifetime.map(|limit| (ms(limit), Reason::LifetimeExceeded));
        match (own, lifetime) {
            (Some(own), Some(lifetime)) => Some(if lifetime.0 < own.0 { lifetime } else { own }),
            (own, lifetime) => own.or(lifetime),
        }
    }

    fn end(&mut self, reason: Reason, how: How) -> Action {
        self.over = true;
        Action::End { reason, how }
    }

    fn tell(&mut self, event: Event, limits: &Limits, now: u64) -> Action {
        if self.over {
            return Action::Nothing;
        }
        match event {
            Event::Cut(reason) => self.end(reason, How::Reset),
            Event::Reset(Side::Client) => self.end(Reason::ResetByClient, How::Reset),
            Event::Reset(Side::Backend) => self.end(Reason::ResetByBackend, How::Reset),
            Event::Tick => self.tick(limits, now),
            Event::Classified { .. } if self.classified.is_none() => {
                (self.classified, self.active) = (Some(now), now);
                Action::Dial
            }
            Event::Connected { .. } if self.classified.is_some() && self.connected.is_none() => {
                (self.connected, self.active) = (Some(now), now);
                Action::Relay
            }
            Event::DialFailed(reason) if self.classified.is_some() && self.connected.is_none() => {
                self.end(reason, How::Reset)
            }
            Event::Moved if self.connected.is_some() => {
                (self.active, self.warned) = (now, false);
                Action::Nothing
            }
            Event::Finished { side, silent } => self.finished(side, silent, now),
            Event::Classified { .. }
            | Event::Connected { .. }
            | Event::Secured
            | Event::HandshakeFailed
            | Event::DialFailed(_)
            | Event::Moved => Action::Nothing,
        }
    }

    fn finished(&mut self, side: Side, silent: bool, now: u64) -> Action {
        if self.classified.is_none() {
            return self.end(Reason::FinishedClientFirst, How::Finished);
        }
        if self.connected.is_none() {
            if side == Side::Client && silent {
                self.silent.get_or_insert(now);
            }
            return Action::Nothing;
        }
        let (this, other) = match side {
            Side::Client => (&mut self.client_finished, self.backend_finished),
            Side::Backend => (&mut self.backend_finished, self.client_finished),
        };
        if this.is_some() {
            return Action::Nothing;
        }
        *this = Some(now);
        match (other, self.first) {
            (Some(_), Some(Side::Client)) => self.end(Reason::FinishedClientFirst, How::Finished),
            (Some(_), _) => self.end(Reason::FinishedBackendFirst, How::Finished),
            (None, _) => {
                (self.first, self.active) = (Some(side), now);
                Action::Nothing
            }
        }
    }

    fn tick(&mut self, limits: &Limits, now: u64) -> Action {
        if let Some((at, reason)) = self.timeout(limits)
            && at <= now
        {
            return self.end(reason, How::Reset);
        }
        let open = self.connected.is_some() && self.first.is_none();
        let due = limits.idle_warning.is_some_and(|after| self.active + after.as_millis() as u64 <= now);
        if open && due && !self.warned {
            self.warned = true;
            return Action::WarnIdle;
        }
        Action::Nothing
    }
}

/// Each event is two bytes: what, and how long after the one before.
fn event(byte: u8) -> Event {
    let side = if byte & 0x80 == 0 { Side::Client } else { Side::Backend };
    match byte & 7 {
        0 => Event::Classified { tls: false },
        1 => Event::Connected { tls: false },
        2 => Event::DialFailed(Reason::ConnectRefused),
        3 => Event::Moved,
        4 => Event::Finished { side, silent: byte & 8 != 0 },
        5 if byte & 0x78 == 0 => Event::Reset(side),
        6 if byte & 0x78 == 0 => Event::Cut(Reason::Killed),
        _ => Event::Tick,
    }
}

fn limits(bytes: [u8; 6]) -> Limits {
    let seconds = |byte: u8| Duration::from_secs(1 + u64::from(byte % 60));
    let sometimes = |byte: u8| (byte & 0x80 == 0).then(|| seconds(byte));
    Limits {
        initial_data: seconds(bytes[0]),
        tls_handshake: seconds(bytes[1]),
        connect: seconds(bytes[1]),
        idle: sometimes(bytes[2]).map(|idle| idle * 6),
        idle_warning: sometimes(bytes[2]).filter(|_| bytes[3] & 0x40 == 0),
        half_closed: sometimes(bytes[4]),
        lifetime: sometimes(bytes[5]).map(|life| life * 9),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first_chunk::<6>() else { return };
    let limits = limits(*first);
    let (mut session, mut story, mut now) = (Session::accepted(limits.initial_data, Tick(0)), Story::default(), 0u64);
    for pair in rest.chunks_exact(2) {
        now += u64::from(pair[1]) * 250;
        let event = event(pair[0]);
        let action = session.step(event, &limits, Tick(now));
        assert_eq!(action, story.tell(event, &limits, now), "{event:?} at {now}");
        assert_eq!(matches!(session.state(), State::Closed(_)), story.over);
        let left = story.timeout(&limits).filter(|_| !story.over).map(|(at, _)| at.saturating_sub(now));
        assert_eq!(session.expires_in(&limits, Tick(now)).map(|left| left.as_millis() as u64), left);
        // It is never woken too late.
        let due = session.deadline(&limits).map(|tick| tick.0);
        assert!(left.is_none() || due.is_some_and(|due| due <= now + left.unwrap_or_default() || due <= now));
    }
});
