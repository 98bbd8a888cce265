//! Connections that leave for the packet level, step by step as [`proxy_core::handoff`] says.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use proxy_abi::{
    flow::{Endpoint, IPV4, IPV6},
    handoff::{HandoffEntry, HandoffKey, OWNER_BYTES, option, seen},
};
use proxy_core::{
    config::Engine,
    flow::Side,
    handed::{Record, route_hash},
    handoff::{self, Action, Both, Facts, Failure, Handover, Offsets, Seen, Unfit},
    reason::Reason,
    session::{Event, State, Tick},
};
use rustix::{
    io::Errno,
    net::{getpeername, getsockname},
    time::{ClockId, clock_gettime},
};

use super::{Fate, Worker, meter_slot};
use crate::{
    kernel::{
        bpf::handoff::{Boundary, Gate, InsertError, NewFlow},
        repair::{self, RepairError},
    },
    stream::{
        admission::Seat,
        flow::Flow,
        handover::{Committed, Ends, HandedOver, Handing, Held, OnInterfaces, Paths, SourcePort},
        relay::{Means, Waiting},
        route::Route,
        socket::{self, Socket},
    },
};

/// Other ports that are tried when the kernel does not like one: somebody listens there, or a connection of before is not over.
const OTHER_PORTS: usize = 4;
/// The longest wait between two looks at a connection that is leaving.
const MOST_PATIENCE: Duration = Duration::from_millis(16);

/// What both sockets have been found to be.
struct Found {
    sockets: Both<Seen>,
    facts: Both<Facts>,
}

impl Flow {
    pub(super) fn is_handed_over(&self) -> bool {
        self.handover.as_ref().is_some_and(|handing| handing.committed.is_some())
    }

    /// Nothing is held in the daemon.
    fn is_quiet(&self) -> bool {
        let empty = |waiting: &Waiting| matches!(waiting, Waiting::Nothing);
        empty(&self.up.waiting)
            && empty(&self.down.waiting)
            && matches!(self.session.state(), State::Established { .. })
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
        flow.handover = Some(Box::new(Handing { protocol, connected, port, gate: None, committed: None }));
    }

    /// Its time has come, be there anything to relay or not.
    pub(super) fn handover_due(&mut self, key: u32, flow: &mut Flow) -> Fate {
        if flow.is_handed_over() { Fate::Lives } else { self.hand_over(key, flow) }
    }

    /// When something is to be done without an event.
    pub(super) fn next_look(&self, handing: &Handing) -> Option<Tick> {
        let engine = self.shared.handoff.as_ref()?;
        match &handing.committed {
            Some(committed) => Some(committed.look_at),
            None => handing.protocol.due(&engine.when, handing.connected).map(|due| due.max(Tick(self.now().0 + 1))),
        }
    }

    /// Whenever bytes have been relayed: hands the connection over if it is the moment.
    pub(super) fn hand_over(&mut self, key: u32, flow: &mut Flow) -> Fate {
        if flow.handover.is_none() || !flow.is_quiet() {
            return Fate::Lives;
        }
        let Some(mut handing) = flow.handover.take() else { return Fate::Lives };
        self.try_to_hand_over(flow, &mut handing);
        let committed = handing.committed.is_some();
        flow.handover = Some(handing);
        self.arm(key, flow);
        if committed { self.look_after(key, flow) } else { Fate::Lives }
    }

    fn try_to_hand_over(&mut self, flow: &mut Flow, handing: &mut Handing) {
        let Some(engine) = self.shared.handoff.clone() else { return };
        let now = self.now();
        let step = |handing: &mut Handing, event| handing.protocol.step(event, &engine.when, now);
        let age = now.since(handing.connected);
        let mut action = step(handing, handoff::Event::Quiet { bytes: flow.up.bytes + flow.down.bytes, age });
        let mut found = None;
        loop {
            action = match action {
                Action::Measure => {
                    let event = match self.measure(flow) {
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
                        Ok(gate) => {
                            handing.gate = Some(gate);
                            step(handing, handoff::Event::Quiet { bytes: u64::MAX, age })
                        }
                        Err(why) => step(handing, handoff::Event::Failed(why)),
                    }
                }
                Action::Commit => {
                    if let (Some(found), Some(gate)) = (&found, handing.gate) {
                        self.commit(flow, handing, found, gate);
                    }
                    return;
                }
                Action::Relay { armed, why } => {
                    self.count_failure(flow, why);
                    release(flow);
                    if let Some(gate) = handing.gate.take_if(|_| armed) {
                        engine.store.remove(gate);
                    }
                    return;
                }
                Action::Nothing | Action::Look | Action::PassOn | Action::Leave | Action::Vanish | Action::GiveUp => {
                    return;
                }
            };
        }
    }

    /// Holds both sockets and reads their numbers.
    fn measure(&mut self, flow: &Flow) -> Result<Found, Failure> {
        let backend = flow.backend.as_ref().ok_or(Failure::Kernel)?;
        if flow.client.urgent || backend.urgent {
            return Err(Failure::Urgent);
        }
        if flow.client.finished || backend.finished {
            return Err(Failure::Finished);
        }
        // Most attempts at a busy connection end here, for two calls.
        for socket in [&flow.client, backend] {
            if repair::unread(socket).map_err(told)? > 0 {
                return Err(Failure::Busy);
            }
        }
        let one = |socket: &Socket| -> Result<(Seen, Facts), Failure> {
            repair::hold(socket).map_err(told)?;
            let before = repair::unread(socket).map_err(told)?;
            let numbers = repair::sequences(socket).map_err(told)?;
            let queued = repair::queued(socket).map_err(told)?;
            if queued.unread != before {
                // Something has come meanwhile: the numbers are not of one moment.
                return Err(Failure::Busy);
            }
            let seen = Seen {
                write_seq: numbers.write_seq,
                rcv_nxt: numbers.rcv_nxt,
                unread: queued.unread,
                unacked: queued.unacked,
                unsent: queued.unsent,
                held: 0,
            };
            Ok((seen, repair::facts(socket).map_err(told)?))
        };
        let (client, client_facts) = one(&flow.client)?;
        let (backend_seen, backend_facts) = one(backend)?;
        for (socket, facts) in [(&flow.client, &client_facts), (backend, &backend_facts)] {
            if facts.out_of_order > 0 && repair::receive_memory(socket).map_err(told)? > 0 {
                return Err(Failure::OutOfOrder);
            }
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

    fn arm_entries(&mut self, flow: &Flow, found: &Found, offsets: Offsets) -> Result<Gate, Failure> {
        let engine = self.shared.handoff.as_ref().ok_or(Failure::Kernel)?;
        let ends = ends_of(flow).ok_or(Failure::Kernel)?;
        let backend = flow.backend.as_ref().ok_or(Failure::Kernel)?;
        if ends.client.is_ipv4() != ends.backend.is_ipv4() {
            return Err(Failure::AddressFamilies);
        }
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
        store.insert(&new).map_err(|error| match error {
            InsertError::Full { .. } => Failure::TableFull,
            InsertError::Taken => Failure::Taken,
            InsertError::Kernel(error) => {
                tracing::warn!(%error, "a connection cannot be handed over");
                Failure::Kernel
            }
        })
    }

    fn paths(&mut self, on: OnInterfaces) -> Result<&mut Paths, Failure> {
        match &mut self.paths {
            Some(paths) => Ok(paths),
            none => Ok(none.insert(Paths::open(on).ok_or(Failure::Kernel)?)),
        }
    }

    /// From here on the ends talk to each other. The sockets stay held: even killed, they say nothing.
    fn commit(&mut self, flow: &mut Flow, handing: &mut Handing, found: &Found, gate: Gate) {
        let Some(engine) = self.shared.handoff.clone() else { return };
        let (Ok(place), Some(ends)) = (engine.owner.clone().try_reserve_owned(), ends_of(flow)) else {
            // Its owner is behind. The protocol takes it back as it does before any commit.
            handing.protocol = Handover::new(true, self.now());
            handing.connected = self.now();
            self.count_failure(flow, Failure::OwnerBusy);
            release(flow);
            handing.gate = None;
            engine.store.remove(gate);
            return;
        };
        for socket in [Some(&flow.client), flow.backend.as_ref()].into_iter().flatten() {
            // Best effort: what is not acknowledged is sent again, and answered by the other end.
            let _ = repair::quick_ack(socket);
        }
        let at = found.sockets.map(|socket| Boundary {
            own_seq: socket.write_seq,
            // What is not read yet is passed on, and counts, after this.
            first_seq: socket.rcv_nxt.wrapping_sub(socket.unread),
            drained: socket.unacked == 0,
        });
        engine.store.set_owner(gate, self.record(flow).encode());
        engine.store.open_gate(gate, at);
        handing.committed = Some(Committed {
            ends,
            place,
            relayed: [flow.up.bytes, flow.down.bytes],
            written: found.sockets.map(|socket| socket.write_seq),
            ticket: None,
            look_at: self.now(),
            patience: Duration::from_millis(1),
            cut: None,
        });
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

    /// The connection has left the relay and its sockets are still there.
    pub(super) fn look_after(&mut self, key: u32, flow: &mut Flow) -> Fate {
        // A reset that slipped in: the program has not seen it.
        let failed = |socket: &Socket| socket.failed;
        if failed(&flow.client) {
            return self.give_up(flow, Reason::ResetByClient);
        }
        if flow.backend.as_ref().is_some_and(failed) {
            return self.give_up(flow, Reason::ResetByBackend);
        }
        let Some(mut handing) = flow.handover.take() else { return Fate::Lives };
        let action = self.look_at_both(flow, &mut handing);
        match action {
            Ok(Action::Vanish) => return self.vanish(flow, *handing),
            Ok(Action::GiveUp) => {
                flow.handover = Some(handing);
                return self.give_up(flow, Reason::ResetByBackend);
            }
            Ok(_) => {}
            Err(error) => {
                tracing::error!(%error, "a connection that was handed over cannot be looked after");
                flow.handover = Some(handing);
                return self.give_up(flow, Reason::InternalError);
            }
        }
        if let Some(committed) = &mut handing.committed {
            committed.look_at = self.now().after(committed.patience);
            committed.patience = (committed.patience * 2).min(MOST_PATIENCE);
        }
        flow.handover = Some(handing);
        self.arm(key, flow);
        Fate::Lives
    }

    fn look_at_both(&mut self, flow: &mut Flow, handing: &mut Handing) -> Result<Action, RepairError> {
        let (Some(engine), Some(gate)) = (self.shared.handoff.clone(), handing.gate) else { return Ok(Action::GiveUp) };
        loop {
            let Some(committed) = &mut handing.committed else { return Ok(Action::GiveUp) };
            let Some(backend) = flow.backend.as_ref() else { return Ok(Action::GiveUp) };
            let mut sockets: Both<Seen> = Default::default();
            // A FIN that slipped in is passed on like a byte.
            let fin = [flow.client.finished && !flow.up.ended, backend.finished && !flow.down.ended];
            let held = [&flow.up, &flow.down].map(|way| match &way.waiting {
                Waiting::Nothing => 0,
                Waiting::Bytes(held) => held.left().len() as u32,
                // Nothing is taken into a pipe any more, and none was loaded at commit.
                Waiting::Pipe(loaded) => loaded.bytes as u32,
            });
            for (index, socket) in [&flow.client, backend].into_iter().enumerate() {
                let queued = repair::queued(socket)?;
                sockets[index] = Seen {
                    write_seq: committed.written[index],
                    rcv_nxt: 0,
                    unread: queued.unread + held[index] + u32::from(fin[index]),
                    unacked: queued.unacked,
                    unsent: queued.unsent,
                    held: 0,
                };
            }
            let record = engine.store.flow(gate);
            let written = committed.written;
            let acknowledged = [0, 1].map(|index| {
                let end = &record.ends[index];
                // The program's own word holds for what was written up to commit.
                let all = end.seen & seen::DRAINED != 0 && end.own_seq == written[index];
                if all { Some(written[index]) } else { (end.seen & seen::ACK != 0).then_some(end.ack) }
            });
            let settled = committed.ticket.is_some_and(|ticket| engine.grace.passed(ticket));
            let event = handoff::Event::Looked { sockets, acknowledged, settled };
            match handing.protocol.step(event, &engine.when, self.now()) {
                Action::PassOn => {
                    for (end, socket) in sockets.iter().enumerate() {
                        let relayed = if end == 0 { flow.up.bytes } else { flow.down.bytes };
                        let bytes = relayed - committed.relayed[end] + u64::from(socket.unread);
                        engine.store.passed_on(gate, end, bytes);
                    }
                    if !self.pass_on(flow, handing)? {
                        return Ok(Action::Look);
                    }
                }
                Action::Leave => {
                    engine.store.leave(gate);
                    committed.ticket = Some(engine.grace.ask());
                    return Ok(Action::Leave);
                }
                action => return Ok(action),
            }
        }
    }

    /// What slipped into the sockets before the gate was open goes to the other end as ever. True when all of it has.
    fn pass_on(&mut self, flow: &mut Flow, handing: &mut Handing) -> Result<bool, RepairError> {
        let (Some(committed), Some(backend)) = (&mut handing.committed, flow.backend.as_mut()) else { return Ok(true) };
        repair::release(&flow.client)?;
        repair::release(&*backend)?;
        (flow.client.readable, backend.readable) = (true, true);
        let before = [flow.down.bytes, flow.up.bytes];
        // An end that is gone is for the program to notice.
        let _ = flow.up.pump(Means::Copy, &mut flow.client, backend, &mut self.stores);
        let _ = flow.down.pump(Means::Copy, backend, &mut flow.client, &mut self.stores);
        let after = [flow.down.bytes, flow.up.bytes];
        for (end, written) in committed.written.iter_mut().enumerate() {
            *written = written.wrapping_add((after[end] - before[end]) as u32);
        }
        let done = [&flow.up, &flow.down].iter().all(|way| matches!(way.waiting, Waiting::Nothing));
        repair::hold(&flow.client)?;
        repair::hold(&*backend)?;
        Ok(done)
    }

    /// What would have ended a relayed connection ends it with its owner, a few milliseconds later.
    pub(super) fn while_leaving(&mut self, key: u32, flow: &mut Flow, event: Event) -> Fate {
        if let (Event::Cut(reason), Some(committed)) =
            (event, flow.handover.as_mut().and_then(|handing| handing.committed.as_mut()))
        {
            committed.cut.get_or_insert(reason);
        }
        let committed = flow.handover.as_ref().and_then(|handing| handing.committed.as_ref());
        if committed.is_some_and(|committed| committed.look_at <= self.now()) {
            return self.look_after(key, flow);
        }
        self.arm(key, flow);
        Fate::Lives
    }

    /// Both sockets go without a packet; the connection has another owner.
    fn vanish(&mut self, flow: &mut Flow, handing: Handing) -> Fate {
        let Handing { port: Some(port), gate: Some(gate), committed: Some(committed), .. } = handing else {
            return self.give_up(flow, Reason::InternalError);
        };
        let index = flow.slot;
        let slot = &mut self.slots[index];
        let Some(route) = slot.route.clone() else { return self.give_up(flow, Reason::InternalError) };
        slot.open -= 1;
        slot.meter.engines[meter_slot(flow.means)].active.sub(1);
        slot.meter.handed_over.add(1);
        let admission = Arc::clone(&route.admission);
        let seat = flow.admitted.take().map(|admitted| Seat { admission, admitted });
        let [bytes_in, bytes_out] = committed.relayed;
        let at = |micros: u64| self.shared.began + Duration::from_micros(micros);
        let handed = HandedOver {
            id: self.id(flow),
            route_id: route.id,
            route: Arc::clone(&route.meters.name),
            client: flow.client_address,
            ends: committed.ends,
            gate: gate.0,
            bytes_in,
            bytes_out,
            passed_on: [flow.up.bytes - bytes_in, flow.down.bytes - bytes_out],
            accepted: at(flow.accepted),
            active: at(flow.session.last_activity().0 * 1000),
            limits: route.limits,
            cut: committed.cut,
            meters: Arc::clone(&route.meters),
            held: Held { seat, counted: flow.counted.take(), port },
        };
        flow.backend = None;
        committed.place.send(handed);
        self.shared.open.fetch_sub(1, Relaxed);
        self.look_whether_gone(index);
        Fate::Over
    }

    /// The ends hear of it by a reset each, as far as their numbers are still known here.
    fn give_up(&mut self, flow: &mut Flow, reason: Reason) -> Fate {
        release(flow);
        self.stays(flow);
        flow.session.step(Event::Cut(reason), &self.slots[flow.slot].limits, self.now());
        self.end(flow, reason, proxy_core::session::How::Reset)
    }

    /// A relayed connection ends: nothing of it stays in the table.
    pub(super) fn stays(&self, flow: &mut Flow) {
        let Some(handing) = flow.handover.take() else { return };
        if let (Some(engine), Some(gate)) = (&self.shared.handoff, handing.gate) {
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

/// Both sockets are read from and written to again.
fn release(flow: &Flow) {
    for socket in [Some(&flow.client), flow.backend.as_ref()].into_iter().flatten() {
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

fn ends_of(flow: &Flow) -> Option<Ends> {
    let backend = flow.backend.as_ref()?;
    let peer = |socket: &Socket| SocketAddr::try_from(getpeername(&socket.fd).ok()??).ok();
    let own = |socket: &Socket| SocketAddr::try_from(getsockname(&socket.fd).ok()?).ok();
    Some(Ends {
        client: peer(&flow.client)?,
        listen: own(&flow.client)?,
        source: own(backend)?,
        backend: peer(backend)?,
    })
}

fn endpoint(address: SocketAddr) -> Endpoint {
    let port = address.port().to_be_bytes();
    match address.ip() {
        IpAddr::V4(ip) => Endpoint::v4(ip.octets(), port),
        IpAddr::V6(ip) => Endpoint::v6(ip.octets(), port),
    }
}

fn entries(
    ends: &Ends,
    facts: &Both<Facts>,
    Offsets(offsets): Offsets,
    clocks: Both<u32>,
    clock_ns: u64,
) -> [(HandoffKey, HandoffEntry); 2] {
    let version = if ends.client.is_ipv4() { IPV4 } else { IPV6 };
    let there = [(ends.client, ends.listen), (ends.backend, ends.source)];
    [Side::Client, Side::Backend].map(|from| {
        let (this, other) = if from == Side::Client { (0, 1) } else { (1, 0) };
        let (source, destination) = there[this];
        let (other_end, own_there) = there[other];
        let (from, to) = (&facts[this], &facts[other]);
        let has = |yes: bool, bit: u8| if yes { bit } else { 0 };
        let entry = HandoffEntry {
            options: has(from.timestamps, option::TIMESTAMPS_IN)
                | has(to.timestamps, option::TIMESTAMPS_OUT)
                | has(from.sack, option::SACK_IN)
                | has(to.sack, option::SACK_OUT)
                | has(from.ecn, option::ECN_IN)
                | has(to.ecn, option::ECN_OUT),
            scale_in: from.peer_scale,
            scale_out: to.own_scale,
            dseq: offsets[this],
            dack: offsets[other],
            clock: clocks[other],
            clock_tick_ns: if to.timestamps_in_micros { 1_000 } else { 1_000_000 },
            clock_ns,
            source: endpoint(own_there),
            destination: endpoint(other_end),
            ..HandoffEntry::default()
        };
        (HandoffKey::new(endpoint(source), endpoint(destination), version), entry)
    })
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
