//! TLS handshakes: with the client before a backend is dialled, with the backend before bytes are relayed.
//!
//! A handshake costs as much as relaying a hundred kilobytes, and a flood of them must not be what connections that are
//! established wait for: handshakes have a queue of their own, and a share of each round.

use std::time::{Duration, Instant};

use proxy_core::{
    flow::Side,
    reason::Reason,
    session::{Event, How, State},
};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};
use rustls::{Error, ProtocolVersion};

use super::{Fate, Worker};
use crate::{
    stream::{
        flow::Flow,
        meter::Shaken,
        relay::{
            Broken, Moved,
            buffers::Buffers,
            secured::End,
            tls::{Leg, MAX_PENDING, RECORD},
        },
        socket::Socket,
    },
    tls::common_name,
};

/// Handshakes have so much of a round, and at least one step.
const SHARE: Duration = Duration::from_micros(200);

/// How far a handshake is.
enum Step {
    Waits,
    Done,
    /// The other side is gone.
    Closed,
    Reset,
    Failed(Error),
}

impl Worker {
    /// In its turn.
    pub(super) fn handshake_later(&mut self, key: u32, flow: &mut Flow) -> Fate {
        if !flow.queued {
            flow.queued = true;
            self.handshakes.push_back(key);
        }
        Fate::Lives
    }

    pub(super) fn shake_hands(&mut self) {
        if self.handshakes.is_empty() {
            return;
        }
        let until = Instant::now() + SHARE;
        for _ in 0..self.handshakes.len() {
            let Some(key) = self.handshakes.pop_front() else { return };
            self.with(key, |worker, flow| {
                flow.queued = false;
                worker.handshake(key, flow)
            });
            if Instant::now() >= until {
                return;
            }
        }
    }

    pub(super) fn begin_handshake(&mut self, key: u32, flow: &mut Flow) -> Fate {
        // A backend has been dialled: it is the one to shake hands with.
        let with_backend = flow.backend.is_some();
        let leg = if with_backend { self.leg_with_backend(flow) } else { self.leg_with_client(flow) };
        let leg = match leg {
            Some(Ok(leg)) => leg,
            Some(Err(error)) => {
                tracing::error!(route = %self.slots[flow.slot].name, %error, "TLS cannot begin");
                return self.step(key, flow, Event::Cut(Reason::InternalError));
            }
            None => return self.step(key, flow, Event::Cut(Reason::InternalError)),
        };
        let secured = flow.tls.get_or_insert_default();
        *if with_backend { &mut secured.backend } else { &mut secured.client } = Some(leg);
        self.arm(key, flow);
        self.handshake_later(key, flow)
    }

    fn leg_with_client(&self, flow: &mut Flow) -> Option<Result<Leg, Error>> {
        let challenge = flow.early.as_ref().and_then(|early| early.challenge.clone());
        let config = match challenge {
            Some(config) => config,
            None => self.slots[flow.slot].route.as_ref()?.tls.as_ref()?.server()?,
        };
        let received = flow.early.as_mut().map(|early| std::mem::take(&mut early.received));
        Some(Leg::with_client(config, received.unwrap_or_default()))
    }

    fn leg_with_backend(&self, flow: &mut Flow) -> Option<Result<Leg, Error>> {
        let route = self.slots[flow.slot].route.as_ref()?;
        let config = route.tls.as_ref()?.client()?;
        let name = route.server_name(flow.backend_address?.ip())?;
        let secured = flow.tls.get_or_insert_default();
        let alpn = secured.client.as_ref().and_then(|client| client.alpn()).map(<[u8]>::to_vec);
        Some(Leg::with_backend(config, name, alpn, std::mem::take(&mut secured.header)))
    }

    fn handshake(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let Some(tls) = flow.tls.as_deref_mut() else { return Fate::Lives };
        let (side, socket, leg) = match flow.session.state() {
            State::Handshaking { .. } => (Side::Client, Some(&mut flow.client), tls.client.as_mut()),
            State::Securing { .. } => (Side::Backend, flow.backend.as_mut(), tls.backend.as_mut()),
            // It was done in an earlier turn.
            State::Classifying { .. }
            | State::Dialing { .. }
            | State::Established { .. }
            | State::HalfClosed { .. }
            | State::Closed(_) => return Fate::Lives,
        };
        let (Some(socket), Some(leg)) = (socket, leg) else { return Fate::Lives };
        match go_on(socket, leg, &mut self.stores.buffers) {
            Step::Waits => Fate::Lives,
            Step::Done => {
                let shaken = if leg.is_resumed() { Shaken::Resumed } else { Shaken::Full };
                self.handshake_ended(flow, shaken);
                match flow.early.as_ref().is_some_and(|early| early.challenge.is_some()) {
                    true => self.part(flow),
                    false => self.step(key, flow, Event::Secured),
                }
            }
            Step::Closed => {
                self.handshake_ended(flow, Shaken::Closed);
                self.step(key, flow, Event::HandshakeFailed)
            }
            Step::Reset => {
                self.handshake_ended(flow, Shaken::Closed);
                self.step(key, flow, Event::Reset(side))
            }
            Step::Failed(error) => {
                let (route, client) = (&self.slots[flow.slot].name, flow.client_address);
                tracing::debug!(%route, %client, ?side, %error, "TLS handshake failed");
                self.handshake_ended(flow, failure(&error));
                self.step(key, flow, Event::HandshakeFailed)
            }
        }
    }

    /// The CA has seen what it came for (RFC 8737 §3: nothing else is exchanged).
    fn part(&mut self, flow: &mut Flow) -> Fate {
        if let Some(leg) = flow.tls.as_deref_mut().and_then(|tls| tls.client.as_mut()) {
            leg.control = leg.close();
            flow.client.told = say(&mut flow.client, leg) == Ok(true);
        }
        self.cut(flow, Reason::ChallengeAnswered, How::Finished)
    }

    /// Counts it; a backend that cannot do it is out of use for a while, as one that does not answer.
    pub(super) fn handshake_ended(&self, flow: &Flow, shaken: Shaken) {
        let side = usize::from(flow.backend.is_some());
        self.slots[flow.slot].meter.tls[side].handshakes[shaken as usize].add(1);
        if let (Some(backend), true) = (flow.backend_address, side == 1)
            && !matches!(shaken, Shaken::Full | Shaken::Resumed)
        {
            self.tell_failed_dial(flow.slot, backend);
        }
    }

    /// Its bytes wait; one that is gone is not shaken hands for.
    pub(super) fn client_while_securing(&mut self, key: u32, flow: &mut Flow) -> Fate {
        match flow.client.hung_up {
            true => self.step(key, flow, Event::Reset(Side::Client)),
            false => Fate::Lives,
        }
    }

    /// Bytes both ways where TLS begins or ends here.
    pub(super) fn pump_secured(&mut self, flow: &mut Flow) -> (Result<Moved, Broken>, Result<Moved, Broken>) {
        let now = self.now();
        let (Some(tls), Some(backend)) = (flow.tls.as_deref_mut(), flow.backend.as_mut()) else {
            return (Err(Broken::To), Err(Broken::From));
        };
        let cut_before = [flow.up.truncated, flow.down.truncated];
        let from = End { socket: &mut flow.client, leg: tls.client.as_mut(), early: Some(&mut tls.early) };
        let to = End { socket: backend, leg: tls.backend.as_mut(), early: None };
        let (up_over, down_over) = (flow.up.passed_on, flow.down.passed_on);
        let mut up = flow.up.pump_secured(from, to, down_over, &mut self.stores, now);
        let down = match up {
            Err(Broken::From) => Ok(Moved::default()),
            Ok(_) | Err(Broken::To) => {
                let from = End { socket: backend, leg: tls.backend.as_mut(), early: None };
                let to = End { socket: &mut flow.client, leg: tls.client.as_mut(), early: None };
                flow.down.pump_secured(from, to, up_over, &mut self.stores, now)
            }
        };
        // What reading from the backend has made this side say to it.
        let unsaid = tls.backend.as_ref().is_some_and(|leg| !leg.control.is_empty());
        if let (Ok(up), true) = (&mut up, unsaid && backend.writable) {
            up.again = true;
        }
        let meter = &self.slots[flow.slot].meter;
        for (side, (way, before)) in [&flow.up, &flow.down].into_iter().zip(cut_before).enumerate() {
            if way.truncated && !before {
                meter.tls[side].truncated.add(1);
            }
        }
        if [&up, &down].into_iter().any(|way| way.is_ok_and(|moved| moved.moved)) {
            flow.session.moved(now);
        }
        (up, down)
    }
}

/// Says and hears what can be said and heard without waiting.
fn go_on(socket: &mut Socket, leg: &mut Leg, buffers: &mut Buffers) -> Step {
    loop {
        match say(socket, leg) {
            Ok(true) => {}
            Ok(false) => return Step::Waits,
            Err(_) => return Step::Reset,
        }
        if !leg.is_handshaking() {
            // Tickets go out now, not with the first answer. What is not taken is said before it.
            leg.say_the_rest();
            leg.more = true;
            return if say(socket, leg).is_ok() { Step::Done } else { Step::Reset };
        }
        let (_, room) = buffers.both();
        let kept = leg.pending.len();
        let Some(place) = room.get_mut(..kept).filter(|_| kept <= MAX_PENDING) else {
            return Step::Failed(Error::General("the handshake is too long".into()));
        };
        place.copy_from_slice(&leg.pending);
        let mut there = kept;
        if !leg.more {
            if !socket.readable {
                return Step::Waits;
            }
            match recv(&socket.fd, room.get_mut(kept..kept + RECORD).unwrap_or_default(), RecvFlags::empty()) {
                Ok((0, _)) => return Step::Closed,
                Ok((read, _)) => {
                    there += read;
                    if read < RECORD {
                        socket.read_short();
                    }
                }
                Err(Errno::AGAIN) => {
                    socket.readable = false;
                    return Step::Waits;
                }
                Err(Errno::INTR) => continue,
                Err(_) => return Step::Reset,
            }
        }
        if let Err(error) = leg.shake(room.get_mut(..there).unwrap_or_default()) {
            leg.say_why();
            socket.told = say(socket, leg) == Ok(true);
            return Step::Failed(error);
        }
    }
}

/// True when everything is said.
fn say(socket: &mut Socket, leg: &mut Leg) -> Result<bool, Errno> {
    while !leg.control.is_empty() {
        if !socket.writable {
            return Ok(false);
        }
        match send(&socket.fd, &leg.control, SendFlags::NOSIGNAL) {
            Ok(sent) => drop(leg.control.drain(..sent.min(leg.control.len()))),
            Err(Errno::AGAIN) => socket.writable = false,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    leg.control = Vec::new();
    Ok(true)
}

fn failure(error: &Error) -> Shaken {
    match error {
        Error::AlertReceived(_) => Shaken::Alert,
        Error::NoCertificatesPresented => Shaken::NoCertificate,
        Error::InvalidCertificate(_) => Shaken::BadCertificate,
        Error::PeerIncompatible(_) | Error::NoApplicationProtocol => Shaken::Incompatible,
        _ => Shaken::Failed,
    }
}

/// The TLV of type `PP2_TYPE_SSL`: what a backend may know of the client's TLS (PROXY protocol, §2.2.6). Without
/// the cipher, as HAProxy does it: nginx before 1.23 reads no header of more than 107 bytes before TLS.
pub(super) fn about_tls(leg: &Leg) -> Vec<u8> {
    const TLS: u8 = 0x01;
    const CERTIFICATE: u8 = 0x02 | 0x04;
    const VERSION: u8 = 0x21;
    const COMMON_NAME: u8 = 0x22;
    let certificate = leg.certificate();
    let flags = if certificate.is_some() { TLS | CERTIFICATE } else { TLS };
    let mut tlv = vec![flags];
    // Zero: a certificate was shown and found good. Another one does not come this far.
    tlv.extend_from_slice(&u32::from(certificate.is_none()).to_be_bytes());
    let mut add = |kind: u8, value: &str| {
        let value = value.as_bytes().get(..value.len().min(256)).unwrap_or_default();
        tlv.push(kind);
        tlv.extend_from_slice(&(value.len() as u16).to_be_bytes());
        tlv.extend_from_slice(value);
    };
    match leg.version() {
        Some(ProtocolVersion::TLSv1_3) => add(VERSION, "TLSv1.3"),
        Some(_) | None => add(VERSION, "TLSv1.2"),
    }
    if let Some(name) = certificate.and_then(common_name) {
        add(COMMON_NAME, &name);
    }
    tlv
}
