//! Connections that leave for the packet level, step by step as [`proxy_core::handoff`] says.

mod entries;
mod leaving;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use proxy_abi::handoff::OWNER_BYTES;
use proxy_core::{
    config::Engine,
    handed::{Record, route_hash},
    handoff::{self, Action, Both, Facts, Failure, Handover, Offsets, Rest, Seen, Unfit},
    session::{State, Tick},
};
use rustix::io::Errno;

use self::entries::{ends_of, entries, monotonic_ns};
use super::{Fate, Worker};
use crate::{
    kernel::{
        bpf::handoff::{Boundary, InsertError, NewFlow},
        repair::{self, RepairError},
    },
    stream::{
        flow::Flow,
        handover::{Armed, Committed, Handing, OnInterfaces, Paths, SourcePort, Stage},
        relay::Waiting,
        route::Route,
        socket::{self, Socket},
    },
};

/// Other ports that are tried when the kernel does not like one: somebody listens there, or a connection of before is not over.
const OTHER_PORTS: usize = 4;
/// What may wait in each socket of a connection that is to be handed over soon: with what comes behind it, it must fit into the
/// window of its reader, which is 64 KiB in the beginning.
const WAITING_BYTES: usize = 24 << 10;

/// What both sockets have been found to be.
struct Found {
    sockets: Both<Seen>,
    facts: Both<Facts>,
}

impl Flow {
    pub(super) fn is_handed_over(&self) -> bool {
        self.handover.as_ref().is_some_and(|handing| handing.is_committed())
    }

    /// Something was read and could not be written.
    fn holds(&self) -> bool {
        [&self.up, &self.down].iter().any(|way| !matches!(way.waiting, Waiting::Nothing))
    }
}

impl Worker {
    /// Dials from a port of our own where the connection is to be handed over, else from wherever it is.
    pub(super) fn dial_from(
        &self,
        flow: &Flow,
        route: &Route,
        to: SocketAddr,
        source: Option<IpAddr>,
    ) -> (Result<Socket, Errno>, Option<SourcePort>) {
        let keepalive = route.probes_peers();
        if let (Engine::Handoff, Some(engine), None) = (route.engine, &self.shared.handoff, source) {
            // The backend must not send larger segments than the client takes.
            let segment = repair::facts(&flow.client).ok().map(|facts| segment_of(&facts));
            for _ in 0..=OTHER_PORTS {
                let Some(port) = engine.ports.take(to) else { break };
                match socket::dial(to, socket::From::Port { port: port.port(), segment }, keepalive) {
                    Err(Errno::ADDRINUSE | Errno::ADDRNOTAVAIL) => {}
                    dialled => return (dialled, Some(port)),
                }
            }
        }
        (socket::dial(to, source.map_or(socket::From::Anywhere, socket::From::Address), keepalive), None)
    }

    /// A backend has answered.
    pub(super) fn will_hand_over(&self, flow: &mut Flow, port: Option<SourcePort>) {
        let Some(route) = &self.slots[flow.slot].route else { return };
        if route.engine != Engine::Handoff || route.tls.is_some() || self.shared.handoff.is_none() {
            return;
        }
        let connected = self.now();
        let protocol = Handover::new(port.is_some(), connected);
        if port.is_none() {
            self.count_failure(flow, Failure::NoPort);
        }
        if port.is_some() {
            for socket in both(flow) {
                // Best effort: with more in its sockets it is harder to hand over while it is busy.
                let _ = repair::take_at_most(socket, WAITING_BYTES);
            }
        }
        flow.handover = Some(Box::new(Handing { protocol, connected, port, in_order: [0; 2], stage: Stage::Relayed }));
    }

    /// Its time has come, be there anything to relay or not.
    pub(super) fn handover_due(&mut self, key: u32, flow: &mut Flow) -> Fate {
        if flow.is_handed_over() { Fate::Lives } else { self.hand_over(key, flow) }
    }

    /// When something is to be done without an event.
    pub(super) fn next_look(&self, handing: &Handing) -> Option<Tick> {
        let engine = self.shared.handoff.as_ref()?;
        match &handing.stage {
            Stage::Committed(committed) => Some(committed.look_at),
            Stage::Relayed | Stage::Armed(_) => {
                handing.protocol.due(&engine.when, handing.connected).map(|due| due.max(Tick(self.now().0 + 1)))
            }
        }
    }

    /// Whenever bytes have been relayed: hands the connection over if it is the moment.
    pub(super) fn hand_over(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let Some(mut handing) = flow.handover.take() else { return Fate::Lives };
        self.try_to_hand_over(flow, &mut handing);
        let paused = handing.protocol.is_paused();
        let goes_on = flow.up.paused && !paused;
        (flow.up.paused, flow.down.paused) = (paused, paused);
        let committed = handing.is_committed();
        flow.handover = Some(handing);
        if committed {
            return self.look_after(key, flow);
        }
        if goes_on && !flow.queued {
            // What has come meanwhile makes no new event.
            flow.queued = true;
            self.queue.push_back(key);
        }
        self.arm(key, flow);
        Fate::Lives
    }

    fn try_to_hand_over(&mut self, flow: &mut Flow, handing: &mut Handing) {
        let Some(engine) = self.shared.handoff.clone() else { return };
        let now = self.now();
        let step = |handing: &mut Handing, event| handing.protocol.step(event, &engine.when, now);
        let age = now.since(handing.connected);
        let turn = match flow.session.state() {
            State::Established { .. } => {
                handoff::Event::Turn { bytes: flow.up.bytes + flow.down.bytes, age, held: flow.holds() }
            }
            State::HalfClosed { .. } | State::Closed(_) if handing.protocol.is_paused() => {
                handoff::Event::Failed(Failure::Finished)
            }
            State::HalfClosed { .. } | State::Closed(_) => return,
            // Before both connections are up there is nothing to hand over.
            State::Classifying { .. } | State::Handshaking { .. } | State::Dialing { .. } | State::Securing { .. } => {
                return;
            }
        };
        let mut action = step(handing, turn);
        let mut found = None;
        loop {
            action = match action {
                Action::Measure => {
                    let event = match self.measure(flow, &mut handing.in_order) {
                        Ok(measured) => {
                            let event = handoff::Event::Measured {
                                sockets: measured.sockets,
                                established: measured.facts.iter().all(|facts| facts.established),
                            };
                            found = Some(measured);
                            event
                        }
                        Err(why) => handoff::Event::Failed(why),
                    };
                    step(handing, event)
                }
                Action::Arm(offsets) => {
                    let made =
                        found.as_ref().ok_or(Failure::Kernel).and_then(|found| self.arm_entries(flow, found, offsets));
                    match made {
                        Ok(armed) => {
                            handing.stage = Stage::Armed(armed);
                            step(handing, handoff::Event::Turn { bytes: u64::MAX, age, held: false })
                        }
                        Err(why) => step(handing, handoff::Event::Failed(why)),
                    }
                }
                Action::Commit => {
                    if let (Some(found), Stage::Armed(armed)) = (&found, std::mem::take(&mut handing.stage)) {
                        handing.stage = Stage::Committed(self.commit(flow, found, armed));
                    }
                    return;
                }
                Action::Pause => return release(flow),
                Action::Relay { armed, why } => {
                    self.count_failure(flow, why);
                    release(flow);
                    if !handing.protocol.is_eager() {
                        for socket in both(flow) {
                            // Before Linux 5.14 so much that it is no hindrance, as far as `net.core.rmem_max` allows.
                            let _ = repair::take_as_ever(socket).or_else(|_| repair::take_at_most(socket, 1 << 20));
                        }
                    }
                    if armed && let Stage::Armed(armed) = std::mem::take(&mut handing.stage) {
                        engine.store.remove(armed.gate);
                    }
                    return;
                }
                Action::Nothing | Action::Look | Action::PassOn | Action::Leave | Action::Vanish | Action::GiveUp => {
                    return;
                }
            };
        }
    }

    /// Holds both sockets and reads their numbers. `in_order`: segments out of order when nothing was any more.
    fn measure(&mut self, flow: &Flow, in_order: &mut Both<u32>) -> Result<Found, Failure> {
        let backend = flow.backend.as_ref().ok_or(Failure::Kernel)?;
        if flow.backend_address.is_some_and(|backend| backend.is_ipv4() != flow.listen.is_ipv4()) {
            return Err(Failure::AddressFamilies);
        }
        if flow.client.urgent || backend.urgent {
            return Err(Failure::Urgent);
        }
        if flow.client.finished || backend.finished {
            return Err(Failure::Finished);
        }
        let one = |socket: &Socket| -> Result<(Seen, Facts), Failure> {
            repair::hold(socket).map_err(told)?;
            let numbers = repair::sequences(socket).map_err(told)?.ok_or(Failure::Busy)?;
            let queued = repair::queued(socket).map_err(told)?;
            let facts = repair::facts(socket).map_err(told)?;
            let seen = Seen {
                write_seq: numbers.write_seq,
                rcv_nxt: numbers.rcv_nxt,
                unread: numbers.unread,
                unacked: queued.unacked,
                unsent: queued.unsent,
                held: 0,
                window: facts.window,
                announced: facts.announced,
                round_trip: facts.round_trip,
            };
            Ok((seen, facts))
        };
        let (client, client_facts) = one(&flow.client)?;
        let (backend_seen, backend_facts) = one(backend)?;
        let sockets = [(&flow.client, client.unread, &client_facts), (backend, backend_seen.unread, &backend_facts)];
        for ((socket, unread, facts), in_order) in sockets.into_iter().zip(in_order) {
            if facts.out_of_order == *in_order {
                continue;
            }
            // With bytes before it that were not read, it does not show whether it is still out of order.
            if unread > 0 || repair::receive_memory(socket).map_err(told)? > 0 {
                return Err(Failure::OutOfOrder);
            }
            *in_order = facts.out_of_order;
        }
        if let Err(unfit) = handoff::fit(&client_facts, &backend_facts) {
            self.learn(flow, unfit);
            return Err(unfit.failure());
        }
        Ok(Found { sockets: [client, backend_seen], facts: [client_facts, backend_facts] })
    }

    /// The next clients are told of segments that fit.
    fn learn(&mut self, flow: &Flow, unfit: Unfit) {
        let Unfit::ToBackend { sent, taken } = unfit else { return };
        let taken = u16::try_from(taken).unwrap_or(u16::MAX).max(536);
        for listener in self.listeners.iter_mut().flatten() {
            let address = listener.address;
            let is_ours = address.port() == flow.listen.port()
                && (address.ip() == flow.listen.ip() || address.ip().is_unspecified());
            if is_ours && listener.segment.is_none_or(|segment| segment > taken) {
                listener.segment = Some(taken);
                let limited = repair::limit_segments(&listener.fd, taken);
                tracing::info!(%address, sent, taken, ?limited, "a backend takes smaller segments: new clients are told so");
            }
        }
    }

    fn arm_entries(&mut self, flow: &Flow, found: &Found, offsets: Offsets) -> Result<Armed, Failure> {
        let engine = self.shared.handoff.as_ref().ok_or(Failure::Kernel)?;
        let place = engine.owner.clone().try_reserve_owned().map_err(|_| Failure::OwnerBusy)?;
        let ends = ends_of(flow).ok_or(Failure::Kernel)?;
        let backend = flow.backend.as_ref().ok_or(Failure::Kernel)?;
        let store = Arc::clone(&engine.store);
        let interfaces = match engine.on.clone() {
            Some(on) => self.paths(on)?.fit(&ends)?,
            None => [0; 2],
        };
        let clocks = [&flow.client, backend].map(|socket| repair::timestamp(socket).unwrap_or_default());
        let new = NewFlow {
            id: self.id(flow).bits(),
            owner: [0; OWNER_BYTES],
            entries: entries(&ends, &found.facts, offsets, clocks, monotonic_ns()),
            interfaces,
        };
        let gate = store.insert(&new).map_err(|error| match error {
            InsertError::Full { .. } => Failure::TableFull,
            InsertError::Taken => Failure::Taken,
            InsertError::Kernel(error) => {
                tracing::warn!(%error, "a connection cannot be handed over");
                Failure::Kernel
            }
        })?;
        Ok(Armed { gate, ends, place })
    }

    fn paths(&mut self, on: OnInterfaces) -> Result<&mut Paths, Failure> {
        match &mut self.paths {
            Some(paths) => Ok(paths),
            none => Ok(none.insert(Paths::open(on).ok_or(Failure::Kernel)?)),
        }
    }

    /// From here on the ends talk to each other. The sockets stay held: even killed, they say nothing.
    fn commit(&mut self, flow: &Flow, found: &Found, armed: Armed) -> Committed {
        for socket in both(flow) {
            // Best effort: what is not acknowledged is sent again, and answered by the other end.
            let _ = repair::quick_ack(socket);
            let _ = repair::announce_little(socket, Rest::ANNOUNCED as i32);
        }
        let [client, backend] = found.sockets;
        let at = [(client, backend), (backend, client)].map(|(this, other)| Boundary {
            own_seq: this.write_seq.wrapping_add(other.unread),
            // What is not read yet is passed on, and counts, after this.
            first_seq: this.rcv_nxt.wrapping_sub(this.unread),
            acked: this.write_seq.wrapping_sub(this.unacked),
        });
        if let Some(engine) = &self.shared.handoff {
            engine.store.set_owner(armed.gate, self.record(flow).encode());
            engine.store.open_gate(armed.gate, at);
        }
        Committed {
            armed,
            relayed: [flow.up.bytes, flow.down.bytes],
            written: found.sockets.map(|socket| socket.write_seq),
            ticket: None,
            look_at: self.now(),
            patience: Duration::from_millis(1),
            cut: None,
        }
    }

    /// What the next daemon must know, should this one be gone before the connection has its owner.
    fn record(&self, flow: &Flow) -> Record {
        let age = self.micros.saturating_sub(flow.accepted) / 1000;
        Record {
            route: route_hash(&self.slots[flow.slot].name),
            client: flow.client_address,
            began: (monotonic_ns() / 1_000_000).saturating_sub(age),
            relayed: [flow.up.bytes, flow.down.bytes],
        }
    }

    /// A relayed connection ends: nothing of it stays in the table.
    pub(super) fn stays(&self, flow: &mut Flow) {
        let Some(handing) = flow.handover.take() else { return };
        if let (Some(engine), Some(gate)) = (&self.shared.handoff, handing.gate()) {
            engine.store.remove(gate);
        }
    }

    fn count_failure(&self, flow: &Flow, why: Failure) {
        self.slots[flow.slot].meter.not_handed_over[why as usize].add(1);
    }
}

fn told(error: RepairError) -> Failure {
    tracing::debug!(%error, "a connection cannot be handed over");
    Failure::Kernel
}

fn both(flow: &Flow) -> impl Iterator<Item = &Socket> {
    [Some(&flow.client), flow.backend.as_ref()].into_iter().flatten()
}

/// Both sockets are read from and written to again.
fn release(flow: &Flow) {
    for socket in both(flow) {
        if let Err(error) = repair::release(socket) {
            tracing::error!(%error, "a connection stays under repair");
        }
    }
}

/// What its peer takes in one segment, as far as it shows without holding it.
fn segment_of(facts: &Facts) -> u16 {
    const TIMESTAMPS_TAKE: u32 = 12;
    let options = if facts.timestamps { TIMESTAMPS_TAKE } else { 0 };
    u16::try_from(facts.snd_mss + options).unwrap_or(u16::MAX)
}
