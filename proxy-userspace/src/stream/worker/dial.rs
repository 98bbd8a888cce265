//! A backend for a connection: chosen, dialled, and another one when it does not answer.
//!
//! All attempts together have `timeouts.connect`. Nothing has been sent while they last, so the client does not notice.

use std::time::Duration;

use proxy_core::{balance::Asked, flow::Side, reason::Reason, session::Event};
use rustix::{
    io::Errno,
    net::{RecvFlags, recv, sockopt},
};

use super::{Fate, Worker};
use crate::{
    stream::{
        flow::{Counted, Early, Flow},
        relay::{Waiting, buffers::Held},
        socket,
    },
    track::FailedDial,
};

/// How long a backend may take while another one could be asked: a SYN that was lost is sent again after 1 s (RFC 6298 §2),
/// and its answer has time to come.
const ATTEMPT: Duration = Duration::from_millis(2500);

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
                return self.step(key, flow, Event::DialFailed(failure));
            };
            early.tried.push(chosen.index);
            early.attempt_until = None;
            flow.backend_address = Some(chosen.address);
            let dialled = socket::dial(chosen.address, route.probes_peers());
            let added = dialled.and_then(|socket| {
                self.poll.add_flow(&socket, flow.source(key, Side::Backend))?;
                Ok(socket)
            });
            match added {
                Ok(socket) => {
                    let attempt = ATTEMPT.min(route.limits.connect / 2);
                    if !chosen.is_last {
                        flow.early.get_or_insert_default().attempt_until = Some(self.now().after(attempt));
                    }
                    flow.counted = Some(Counted::new(chosen.open));
                    flow.backend = Some(socket);
                    self.arm(key, flow);
                    return Fate::Lives;
                }
                Err(errno) => {
                    failure = reason(errno);
                    self.tell_failed_dial(flow);
                    flow.early.get_or_insert_default().failure = failure;
                }
            }
        }
    }

    /// The backend's socket has something to say.
    pub(super) fn dialed(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let Some(backend) = flow.backend.as_ref() else { return Fate::Lives };
        if !backend.hung_up {
            return if backend.writable { self.connected(key, flow) } else { Fate::Lives };
        }
        match sockopt::socket_error(&backend.fd) {
            // It had accepted, and is gone again.
            Ok(Ok(()) | Err(Errno::CONNRESET | Errno::PIPE)) => self.step(key, flow, Event::Reset(Side::Backend)),
            Ok(Err(errno)) | Err(errno) => self.attempt_failed(key, flow, reason(errno)),
        }
    }

    /// The attempt has had its time while others wait to be asked.
    pub(super) fn attempt_over(&mut self, key: u32, flow: &mut Flow) -> Fate {
        self.attempt_failed(key, flow, Reason::ConnectTimeout)
    }

    fn attempt_failed(&mut self, key: u32, flow: &mut Flow, reason: Reason) -> Fate {
        self.tell_failed_dial(flow);
        flow.backend = None;
        flow.counted = None;
        let early = flow.early.get_or_insert_default();
        (early.failure, early.attempt_until) = (reason, None);
        self.dial(key, flow)
    }

    fn connected(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let took = Duration::from_micros(self.micros.saturating_sub(flow.dialed));
        self.slots[flow.slot].meter.connected(took);
        if let Some(early) = flow.early.take() {
            let header = self.outgoing_header(flow, &early);
            if !header.is_empty() || !early.received.is_empty() {
                flow.up.waiting = Waiting::Bytes(Held::first(header, &early.received));
            }
        }
        self.step(key, flow, Event::Connected)
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
    pub(super) fn tell_failed_dial(&self, flow: &Flow) {
        let slot = &self.slots[flow.slot];
        if let Some(backend) = flow.backend_address {
            let _ = self.shared.failed_dials.try_send(FailedDial { route: slot.name.clone(), backend });
        }
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
            tried: Vec::new(),
            failure: Reason::NoBackend,
            attempt_until: None,
        }
    }
}
