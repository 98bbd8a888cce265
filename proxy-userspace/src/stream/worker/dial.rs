//! A backend for a connection: chosen, dialled, and another one when it does not answer.
//!
//! All attempts together have `timeouts.connect`. Nothing has been sent while they last, so the client does not notice. A
//! backend that is slow to answer is not given up: the next one is asked beside it, and the first to answer has it (RFC
//! 8305, "Happy Eyeballs", for whatever reason there is more than one address).

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use proxy_core::{balance::Asked, flow::Side, reason::Reason, session::Event};
use rustix::{
    io::Errno,
    net::{RecvFlags, getpeername, recv, sockopt},
};

use super::{Fate, Worker};
use crate::{
    stream::{
        flow::{Counted, Dialled, Early, Flow},
        relay::{Waiting, buffers::Held},
        socket::Socket,
    },
    track::FailedDial,
};

/// How long a backend is waited for alone while another one could be asked: a SYN that was lost is sent again after 1 s
/// (RFC 6298 §2), and its answer has time to come.
const ALONE: Duration = Duration::from_millis(2500);

/// The same for a name with addresses of both families: "Connection Attempt Delay", RFC 8305 §5.
const ALONE_OF_BOTH_FAMILIES: Duration = Duration::from_millis(250);

/// How far a dial is.
enum Answer {
    Waiting,
    Connected,
    /// Accepted, and gone again.
    Reset,
    No(Reason),
}

impl Worker {
    /// Tries backends until one of them is being connected to.
    pub(super) fn dial(&mut self, key: u32, flow: &mut Flow) -> Fate {
        if flow.dialed == 0 {
            flow.dialed = self.micros;
            self.slots[flow.slot].sequence += 1;
        }
        let Some(route) = self.slots[flow.slot].route.clone() else {
            return self.step(key, flow, Event::Cut(Reason::InternalError));
        };
        let mut failure = Reason::NoBackend;
        loop {
            let asked = Asked {
                client: flow.client_address.ip(),
                random: self.random(),
                sequence: self.slots[flow.slot].sequence,
            };
            let early = flow.early.get_or_insert_default();
            if !early.tried.is_empty() && failure == Reason::NoBackend {
                failure = early.failure;
            }
            let Some(chosen) = route.choose(asked, flow.listen.port(), &early.tried) else {
                return match early.rival.take() {
                    // It may still answer.
                    Some(Dialled { socket, address, counted, port }) => {
                        (flow.backend, flow.counted, flow.backend_address) =
                            (Some(socket), Some(counted), Some(address));
                        early.port = port;
                        self.arm(key, flow);
                        Fate::Lives
                    }
                    None => self.step(key, flow, Event::DialFailed(failure)),
                };
            };
            early.tried.push(chosen.address);
            early.attempt_until = None;
            let source = route.is_transparent().then(|| flow.client_address.ip());
            if source.is_some_and(|source| !can_dial(source, chosen.address)) {
                failure = Reason::ConnectUnreachable;
                early.failure = failure;
                continue;
            }
            flow.backend_address = Some(chosen.address);
            let (dialled, port) = self.dial_from(flow, &route, chosen.address, source);
            let added = dialled.and_then(|socket| {
                self.poll.add_flow(&socket, flow.source(key, Side::Backend))?;
                Ok(socket)
            });
            match added {
                Ok(socket) => {
                    let alone = if route.both_families { ALONE_OF_BOTH_FAMILIES } else { ALONE };
                    if !chosen.is_last {
                        let until = self.now().after(alone.min(route.limits.connect / 2));
                        flow.early.get_or_insert_default().attempt_until = Some(until);
                    }
                    flow.counted = Some(Counted::new(chosen.open));
                    flow.early.get_or_insert_default().port = port;
                    (flow.backend, flow.asked_in) = (Some(socket), self.rounds);
                    self.arm(key, flow);
                    return Fate::Lives;
                }
                // Ours, not the backend's.
                Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    tracing::warn!(%errno, "a backend cannot be dialled");
                    self.shared.pressure.refused.fetch_add(1, Relaxed);
                    return self.step(key, flow, Event::DialFailed(Reason::LimitConnections));
                }
                Err(errno) => {
                    failure = reason(errno);
                    // The kernel may not like the client's address: nothing against the backend.
                    if source.is_none() {
                        self.tell_failed_dial(flow.slot, chosen.address);
                    }
                    flow.early.get_or_insert_default().failure = failure;
                }
            }
        }
    }

    /// One of the backends' sockets has something to say.
    pub(super) fn dialed(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let Some(backend) = flow.backend.as_ref() else { return Fate::Lives };
        let Some(rival) = flow.early.as_mut().and_then(|early| early.rival.take()) else {
            return match answer_told(backend) {
                Answer::Waiting => Fate::Lives,
                Answer::Connected => self.connected(key, flow),
                Answer::Reset => self.step(key, flow, Event::Reset(Side::Backend)),
                Answer::No(reason) => self.attempt_failed(key, flow, reason),
            };
        };
        // The event does not say of which of the two it is.
        match (answer_asked(&rival.socket), answer_asked(backend)) {
            (Answer::Connected | Answer::Reset, _) => {
                (flow.backend, flow.counted) = (Some(rival.socket), Some(rival.counted));
                flow.backend_address = Some(rival.address);
                flow.early.get_or_insert_default().port = rival.port;
                self.won(key, flow)
            }
            (_, Answer::Connected | Answer::Reset) => self.won(key, flow),
            (Answer::No(_), Answer::Waiting) => {
                self.tell_failed_dial(flow.slot, rival.address);
                Fate::Lives
            }
            (Answer::No(_), Answer::No(reason)) => {
                self.tell_failed_dial(flow.slot, rival.address);
                self.attempt_failed(key, flow, reason)
            }
            (Answer::Waiting, Answer::No(reason)) => {
                flow.early.get_or_insert_default().rival = Some(rival);
                self.attempt_failed(key, flow, reason)
            }
            (Answer::Waiting, Answer::Waiting) => {
                flow.early.get_or_insert_default().rival = Some(rival);
                Fate::Lives
            }
        }
    }

    /// The backend has had its time alone: another is asked beside it. A third one takes the place of the first.
    pub(super) fn attempt_over(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let asked = (flow.backend.take(), flow.backend_address, flow.counted.take());
        let early = flow.early.get_or_insert_default();
        (early.attempt_until, early.failure) = (None, Reason::ConnectTimeout);
        if let (Some(socket), Some(address), Some(counted)) = asked {
            let port = early.port.take();
            let before = early.rival.replace(Dialled { socket, address, counted, port });
            if let Some(before) = before {
                self.tell_failed_dial(flow.slot, before.address);
            }
        }
        self.dial(key, flow)
    }

    fn attempt_failed(&mut self, key: u32, flow: &mut Flow, reason: Reason) -> Fate {
        if let Some(backend) = flow.backend_address {
            self.tell_failed_dial(flow.slot, backend);
        }
        let early = flow.early.get_or_insert_default();
        (early.failure, early.attempt_until, early.port) = (reason, None, None);
        (flow.backend, flow.counted) = (None, None);
        self.dial(key, flow)
    }

    /// While two were asked, their events were not kept apart.
    fn won(&mut self, key: u32, flow: &mut Flow) -> Fate {
        flow.asked_in = self.rounds;
        if let Some(backend) = flow.backend.as_mut() {
            (backend.readable, backend.writable) = (true, true);
        }
        self.connected(key, flow)
    }

    fn connected(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let took = Duration::from_micros(self.micros.saturating_sub(flow.dialed));
        self.slots[flow.slot].meter.connected(took);
        let route = self.slots[flow.slot].route.as_ref();
        let tls = route.and_then(|route| route.tls.as_ref()).is_some_and(|tls| tls.encrypts_again());
        if let Some(mut early) = flow.early.take() {
            self.will_hand_over(flow, early.port.take());
            let header = self.outgoing_header(flow, &early);
            if tls {
                let secured = flow.tls.get_or_insert_default();
                (secured.header, secured.early) = (header, early.received);
            } else if !header.is_empty() || !early.received.is_empty() {
                flow.up.waiting = Waiting::Bytes(Held::first(header, &early.received));
            }
        }
        let fate = self.step(key, flow, Event::Connected { tls });
        // A backend that speaks first waits for it; it is sent anyway after 200 ms.
        if let Some(backend) = flow.backend.as_ref().filter(|_| fate == Fate::Lives && flow.up.bytes == 0) {
            backend.acknowledge();
        }
        fate
    }

    /// A client that resets is not dialled for any more; one that has only finished may still want an answer.
    pub(super) fn client_while_dialing(&mut self, key: u32, flow: &mut Flow) -> Fate {
        if flow.client.hung_up {
            return self.step(key, flow, Event::Reset(Side::Client));
        }
        if !flow.client.finished {
            return Fate::Lives;
        }
        let nothing_before = flow.early.as_ref().is_none_or(|early| early.received.is_empty());
        let peeked = recv(&flow.client.fd, &mut [0u8; 1][..], RecvFlags::PEEK);
        let silent = nothing_before && matches!(peeked, Ok((0, _)));
        self.step(key, flow, Event::Finished { side: Side::Client, silent })
    }

    /// The owner of the backends hears of it, unless it is behind.
    pub(super) fn tell_failed_dial(&self, slot: usize, backend: SocketAddr) {
        let route = self.slots[slot].name.clone();
        let _ = self.shared.failed_dials.try_send(FailedDial { route, backend });
    }
}

/// A connection from there to there can be. A PROXY header may name any address, and for those that nobody can have the
/// kernel would take one of this machine (`__inet_bind`, v6.18).
fn can_dial(source: IpAddr, to: SocketAddr) -> bool {
    let nobody = source.is_unspecified() || source.is_multicast() || source == IpAddr::V4(Ipv4Addr::BROADCAST);
    source.is_ipv4() == to.is_ipv4() && !nobody
}

/// What the socket's events have told.
fn answer_told(socket: &Socket) -> Answer {
    match socket {
        Socket { hung_up: true, .. } => error_of(socket),
        Socket { writable: true, .. } => Answer::Connected,
        _ => Answer::Waiting,
    }
}

/// What the kernel says when it is asked.
fn answer_asked(socket: &Socket) -> Answer {
    match getpeername(&socket.fd) {
        Ok(Some(_)) => Answer::Connected,
        Ok(None) | Err(_) => error_of(socket),
    }
}

fn error_of(socket: &Socket) -> Answer {
    match sockopt::socket_error(&socket.fd) {
        Ok(Ok(())) if !socket.hung_up => Answer::Waiting,
        Ok(Ok(()) | Err(Errno::CONNRESET | Errno::PIPE)) => Answer::Reset,
        Ok(Err(errno)) | Err(errno) => Answer::No(reason(errno)),
    }
}

/// What the kernel's answer to a SYN, or its refusal to send one, is called.
fn reason(errno: Errno) -> Reason {
    match errno {
        Errno::CONNREFUSED => Reason::ConnectRefused,
        Errno::TIMEDOUT => Reason::ConnectTimeout,
        // No route, or a filter's word; EADDRNOTAVAIL: no source port is left.
        _ => Reason::ConnectUnreachable,
    }
}

impl Default for Early {
    fn default() -> Self {
        Self {
            listen: None,
            received: Vec::new(),
            header: None,
            header_expected: false,
            reader: Default::default(),
            hello: None,
            challenge: None,
            tried: Vec::new(),
            failure: Reason::NoBackend,
            attempt_until: None,
            rival: None,
            port: None,
        }
    }
}
