//! The first bytes of a connection: which route it belongs to, and whether it may have it.

use std::sync::Arc;

use proxy_core::{
    classify::{Decision, First},
    config::ProxyVersion,
    flow::Side,
    reason::Reason,
    session::{Event, How},
    sniff::{
        hello::{Alert, Hello, MAX_HELLO, NotHello},
        proxy::{self, MAX_HEADER, Outgoing, kind, write_v1, write_v2},
    },
};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};

use rustls::ServerConfig;

use super::{Fate, NO_ROUTE, Worker, handshake::about_tls};
use crate::{
    acme::Challenges,
    stream::{
        flow::{Early, Flow},
        route::Listen,
    },
};

/// The most bytes that are held of a connection whose route is not known.
const MOST: usize = MAX_HELLO + MAX_HEADER;

/// What the first bytes say.
enum Verdict {
    /// Not enough yet.
    Wait,
    Route(u32),
    /// For this route, though not from one of its clients: a CA looks at a name of it.
    Challenge(u32, Arc<ServerConfig>),
    /// Refused; with this alert, where the client speaks TLS.
    No(Reason, Option<Alert>),
}

impl Worker {
    /// Reads until the route is known.
    pub(super) fn read_first(&mut self, key: u32, flow: &mut Flow) -> Fate {
        while flow.client.readable {
            let Some(early) = flow.early.as_mut() else { return Fate::Lives };
            let room = MOST.saturating_sub(early.received.len()).max(1);
            let scratch = self.stores.buffers.scratch();
            let room = room.min(scratch.len());
            match recv(&flow.client.fd, &mut scratch[..room], RecvFlags::empty()) {
                Ok((0, _)) => return self.step(key, flow, Event::Finished { side: Side::Client, silent: true }),
                Ok((read, _)) => {
                    early.received.extend_from_slice(&scratch[..read]);
                    if read < room {
                        flow.client.read_short();
                    }
                }
                Err(Errno::AGAIN) => {
                    flow.client.readable = false;
                    break;
                }
                Err(Errno::INTR) => continue,
                Err(_) => return self.step(key, flow, Event::Reset(Side::Client)),
            }
            let fate = self.classify(key, flow);
            let known = flow.early.as_ref().is_none_or(|early| early.listen.is_none());
            if known || fate == Fate::Over {
                return fate;
            }
        }
        Fate::Lives
    }

    /// Decides with what is there, which may be nothing.
    pub(super) fn classify(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let Some(early) = flow.early.as_mut() else { return Fate::Lives };
        match verdict(early, &mut flow.client_address, &self.shared.challenges) {
            Verdict::Wait => Fate::Lives,
            Verdict::No(reason, alert) => self.refuse(flow, reason, alert),
            Verdict::Route(id) => {
                early.listen = None;
                let Some(&slot) = self.by_id.get(&id) else { return self.refuse(flow, Reason::NoRoute, None) };
                self.assign(flow, slot);
                self.admit(key, flow)
            }
            Verdict::Challenge(id, config) => {
                (early.listen, early.challenge) = (None, Some(config));
                let Some(&slot) = self.by_id.get(&id) else { return self.refuse(flow, Reason::NoRoute, None) };
                self.assign(flow, slot);
                // Not admitted: who may be a client of the route, and how many, does not concern the CA.
                self.step(key, flow, Event::Classified { tls: true })
            }
        }
    }

    fn admit(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let Some(route) = &self.slots[flow.slot].route else { return self.refuse(flow, Reason::InternalError, None) };
        match route.admission.enter(&route.config, flow.client_address.ip(), self.clock()) {
            Ok(admitted) => {
                flow.admitted = Some(admitted);
                if route.probes_peers() {
                    flow.client.probe_peer();
                }
                let tls = route.tls.as_ref().is_some_and(|tls| tls.terminates());
                let hello = flow.early.as_ref().and_then(|early| early.hello.as_ref());
                let name = hello.and_then(|hello| hello.sni.as_deref());
                if route.tls.as_ref().is_some_and(|tls| tls.lacks(name)) {
                    return self.refuse(flow, Reason::CertificatePending, Some(Alert::InternalError));
                }
                self.step(key, flow, Event::Classified { tls })
            }
            Err(reason) => self.refuse(flow, reason, None),
        }
    }

    fn refuse(&mut self, flow: &mut Flow, reason: Reason, alert: Option<Alert>) -> Fate {
        // The queue of a socket that has sent nothing has room for seven bytes.
        flow.client.told =
            alert.is_some_and(|alert| send(&flow.client.fd, &alert.record(), SendFlags::NOSIGNAL).is_ok());
        self.cut(flow, reason, How::Reset)
    }

    /// Ends it for a reason of ours; without a reset, where it has been told.
    pub(super) fn cut(&mut self, flow: &mut Flow, reason: Reason, how: How) -> Fate {
        flow.session.step(Event::Cut(reason), &self.slots[flow.slot].limits, self.now());
        self.end(flow, reason, how)
    }

    /// Counts the flow for another route than before.
    pub(super) fn assign(&mut self, flow: &mut Flow, slot: usize) {
        if slot == flow.slot {
            return;
        }
        for (slot, comes) in [(flow.slot, false), (slot, true)] {
            let Some(slot) = self.slots.get_mut(slot) else { return };
            // Every connection begins in `copy`.
            let engine = &slot.meter.engines[0];
            if comes {
                slot.open += 1;
                engine.active.add(1);
            } else {
                slot.open -= 1;
                engine.active.sub(1);
            }
        }
        debug_assert_ne!(slot, NO_ROUTE, "a route that is known is not forgotten");
        self.slots[slot].meter.engines[0].began.add(1);
        flow.slot = slot;
    }

    /// The bytes that go to the backend before the client's.
    pub(super) fn outgoing_header(&self, flow: &Flow, early: &Early) -> Vec<u8> {
        let Some(route) = &self.slots[flow.slot].route else { return Vec::new() };
        let Some(version) = route.config.proxy_protocol.send else { return Vec::new() };
        let source = flow.client_address;
        let ends = early.header.as_ref().and_then(|header| header.ends);
        let destination = ends.map_or(flow.listen, |ends| ends.destination);
        match version {
            ProxyVersion::V1 => write_v1(source, destination),
            ProxyVersion::V2 => {
                let own_id = self.id(flow).to_string();
                let received = early.header.as_ref().map(|header| &header.tlvs);
                // The first proxy's name for the connection is the one that all of them know.
                let named = received.is_some_and(|tlvs| tlvs.get(kind::UNIQUE_ID).is_some());
                let hello = early.hello.as_ref();
                let leg = flow.tls.as_ref().and_then(|tls| tls.client.as_ref());
                let ssl = leg.map(about_tls);
                let outgoing = Outgoing {
                    alpn: match leg {
                        Some(leg) => leg.alpn(),
                        None => hello.and_then(only_protocol),
                    },
                    authority: hello.and_then(|hello| hello.sni.as_deref()),
                    unique_id: Some(own_id.as_bytes()).filter(|_| !named),
                    ssl: ssl.as_deref(),
                    received,
                    ..Outgoing::new(source, destination)
                };
                write_v2(&outgoing, true)
            }
        }
    }
}

/// What the client and the backend will agree on is only known when there is no choice.
fn only_protocol(hello: &Hello) -> Option<&[u8]> {
    let mut offered = hello.alpn.iter();
    offered.next().filter(|_| offered.next().is_none())
}

/// The route whose name a CA looks at, and what it gets to see.
fn challenge(hello: &Hello, listen: &Listen, challenges: &Challenges) -> Option<(u32, Arc<ServerConfig>)> {
    let config = challenges.answer(hello)?;
    let index = listen.port.prover(hello.sni.as_deref()?)?;
    Some((*listen.members.get(index)?, config))
}

fn verdict(early: &mut Early, client: &mut std::net::SocketAddr, challenges: &Challenges) -> Verdict {
    let Some(listen) = early.listen.as_ref().map(Arc::clone) else { return Verdict::Wait };
    if early.header_expected {
        match proxy::parse(&early.received) {
            Ok(None) => return Verdict::Wait,
            Ok(Some((header, length))) => {
                if let Some(ends) = header.ends {
                    *client = ends.source;
                }
                early.received.drain(..length.min(early.received.len()));
                early.header = Some(header);
                early.header_expected = false;
            }
            Err(_) => return Verdict::No(Reason::ProxyHeaderInvalid, None),
        }
    }
    let mut alert = Some(Alert::UnrecognizedName);
    let decision = match listen.port.choose(client.ip(), First::Nothing) {
        Decision::NeedHello if early.received.is_empty() => return Verdict::Wait,
        Decision::NeedHello => match early.reader.advance(&early.received) {
            Ok(None) => return Verdict::Wait,
            Ok(Some(hello)) => {
                if let Some((id, config)) = challenge(&hello, &listen, challenges) {
                    return Verdict::Challenge(id, config);
                }
                let alpn: Vec<&[u8]> = hello.alpn.iter().collect();
                let first = First::Hello { sni: hello.sni.as_deref(), alpn: &alpn };
                let decision = listen.port.choose(client.ip(), first);
                early.hello = Some(hello);
                decision
            }
            Err(NotHello::NotTls) => {
                alert = None;
                listen.port.choose(client.ip(), First::NotTls)
            }
            // What is TLS, but not as it should be, is for no route: it would be read one way here and another way there.
            Err(bad) => return Verdict::No(Reason::TlsHandshakeFailed, bad.alert()),
        },
        known => {
            alert = None;
            known
        }
    };
    match decision {
        Decision::Route(index) => {
            listen.members.get(index).map_or(Verdict::No(Reason::InternalError, None), |id| Verdict::Route(*id))
        }
        Decision::NeedHello | Decision::NoRoute => Verdict::No(Reason::NoRoute, alert),
    }
}
