//! What becomes of handed-over flows: the part that needs no runtime.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use proxy_abi::handoff::{HandoffEvent, OWNER_BYTES};
use proxy_core::{
    config::Engine,
    flow::Side,
    handed::{Handed, Record, route_hash},
    reason::Reason,
    session::{Action, Event, How, Limits, Session, Tick},
    view,
    wheel::Wheel,
};

use super::{
    Gauge,
    clock::{Clock, tick_of},
    ends::{Resets, look},
    probing::{Asked, Next, Probing},
    table::{Departure, Flow, Flows, Lingering, Served},
};
use crate::{
    control::ConnectionFilter,
    kernel::bpf::handoff::{Gate, HandoffStore},
    stream::{Ended, StreamId, handover::HandedOver, route::Route, worker::Leaving},
};

/// How long the entries of a flow that has ended still answer what is sent again, and its port rests: a last acknowledgement
/// that is lost five times is made up for (RFC 6298: 0.2 + 0.4 + 0.8 + 1.6 + 3.2 s).
pub const LINGER: Duration = Duration::from_secs(10);
/// Ended connections that wait for a slow hearer at most.
const UNTOLD: usize = 16_384;
/// What flows of an earlier daemon have whose route nobody configures any more.
const DRAIN_OF_ADOPTED: Duration = Duration::from_secs(30);
/// The id of no route.
pub const NO_ROUTE: u32 = 0;

pub struct Owner {
    pub store: Arc<dyn HandoffStore>,
    pub flows: Flows,
    pub routes: HashMap<u32, Served>,
    pub clock: Clock,
    pub gauge: Arc<Gauge>,
    pub resets: Resets,
    pub probing: Probing,
    wheel: Wheel,
    woken: Vec<u32>,
    lingering: VecDeque<Lingering>,
    /// What has ended and is not told yet.
    pub told: Vec<Ended>,
    /// Routes that have nothing left, not told yet.
    pub gone: Vec<u32>,
}

impl Owner {
    pub fn new(store: Arc<dyn HandoffStore>, resets: Resets, gauge: Arc<Gauge>) -> Self {
        let clock = Clock::start();
        Self {
            store,
            flows: Flows::default(),
            routes: HashMap::new(),
            wheel: Wheel::new(clock.now()),
            clock,
            gauge,
            resets,
            probing: Probing::of_this_namespace(),
            woken: Vec::new(),
            lingering: VecDeque::new(),
            told: Vec::new(),
            gone: Vec::new(),
        }
    }

    /// Takes a flow over from its worker. What the next daemon needs goes beside its entries.
    pub fn receive(&mut self, handed: HandedOver) {
        let HandedOver { id, route_id, client, ends, gate, meters, held, cut, .. } = handed;
        let gate = Gate(gate);
        let relayed = [handed.bytes_in, handed.bytes_out];
        let session = Session::established(self.clock.tick(handed.accepted), self.clock.tick(handed.active));
        let record = Record { route: route_hash(&handed.route), client, began: session.began().0, relayed };
        self.store.set_owner(gate, record.encode());
        let served = self.routes.entry(route_id).or_insert_with(|| Served {
            name: handed.route,
            limits: handed.limits,
            drain: DRAIN_OF_ADOPTED,
            open: 0,
            leaving: None,
            route: None,
        });
        served.open += 1;
        let flow = Flow {
            id,
            route: route_id,
            client,
            ends,
            handed: Handed::new(session, relayed, handed.passed_on),
            stamp: (0, 0),
            asked: [Asked::since(session.last_activity()); 2],
            meters,
            held: (held.seat, held.counted),
            port: Some(held.port),
        };
        if let Some(meter) = flow.meter() {
            meter.promoted.add(1);
            meter.active.add(1);
            meter.bytes_in.add(handed.passed_on[0]);
            meter.bytes_out.add(handed.passed_on[1]);
        }
        self.flows.insert(gate, flow);
        match cut {
            Some(reason) => self.cut(gate, reason),
            // It may have ended before it came here.
            None => self.look(gate),
        }
    }

    /// The program says that a flow is over. One that has not come from its worker yet is looked at when it does.
    pub fn heard(&mut self, event: &HandoffEvent) {
        let gate = Gate(event.flow);
        if self.flows.get(gate).is_some_and(|flow| flow.id.bits() == event.id) {
            self.look(gate);
        }
    }

    /// Reads every counter. Whether anything has come since the last time.
    pub fn look_at_all(&mut self) -> bool {
        let mut news = false;
        for gate in self.flows.gates() {
            let before = self.flows.get(gate).map(|flow| flow.stamp);
            self.look(gate);
            news |= before != self.flows.get(gate).map(|flow| flow.stamp);
        }
        news
    }

    /// Timers whose time has come, and flows that have lingered.
    pub fn advance(&mut self) {
        let now = self.clock.now();
        let mut woken = std::mem::take(&mut self.woken);
        self.wheel.advance(now, &mut woken);
        for gate in woken.drain(..).map(Gate) {
            // Bytes since the last look have moved the deadline.
            self.look(gate);
            self.on_time(gate, now);
        }
        self.woken = woken;
        while let Some(lingered) = self.lingering.pop_front_if(|lingering| lingering.until <= now) {
            if let Some(gate) = lingered.gate {
                self.store.remove(gate);
            }
        }
    }

    /// When [`Self::advance`] is due.
    pub fn next(&self) -> Option<Tick> {
        [self.wheel.next(), self.lingering.front().map(|first| first.until)].into_iter().flatten().min()
    }

    pub fn serve(&mut self, routes: Vec<Arc<Route>>) {
        for route in routes {
            let open = self.routes.get(&route.id).map_or(0, |before| before.open);
            let id = route.id;
            let served = Served {
                name: Arc::clone(&route.meters.name),
                limits: route.limits,
                drain: route.config.timeouts.drain,
                open,
                leaving: None,
                route: Some(route),
            };
            self.routes.insert(id, served);
            self.rearm(id);
        }
    }

    /// A route is gone from the configuration.
    pub fn leave(&mut self, id: u32, leaving: Leaving) {
        let now = self.clock.now();
        let Some(served) = self.routes.get_mut(&id) else {
            return self.say_gone(id, &leaving);
        };
        served.leaving = Some(Departure { until: now.after(served.drain), leaving: Some(leaving) });
        self.rearm(id);
        self.look_whether_gone(id);
    }

    pub fn kill(&mut self, id: StreamId) -> Option<(Arc<str>, SocketAddr)> {
        let gate = self.flows.find(id)?;
        let flow = self.flows.get(gate)?;
        let told = (self.name(flow.route), flow.client);
        self.cut(gate, Reason::Killed);
        Some(told)
    }

    pub fn list(&mut self, filter: &ConnectionFilter) -> Vec<view::Connection> {
        let id = filter.id.as_ref().map(|id| id.parse::<StreamId>().ok());
        let wanted = |flow: &Flow| {
            filter.client.is_none_or(|client| flow.client.ip() == client)
                && filter.client_port.is_none_or(|port| flow.client.port() == port)
                && filter.route.as_ref().is_none_or(|route| **route == *self.name(flow.route))
                && id.is_none_or(|id| id == Some(flow.id))
        };
        let most = if filter.limit == 0 { usize::MAX } else { filter.limit };
        let gates: Vec<Gate> =
            self.flows.iter().filter(|(_, flow)| wanted(flow)).map(|(gate, _)| gate).take(most).collect();
        gates
            .into_iter()
            .filter_map(|gate| {
                self.look(gate);
                self.flows.get(gate).map(|flow| self.view(flow))
            })
            .collect()
    }

    fn view(&self, flow: &Flow) -> view::Connection {
        let (now, session) = (self.clock.now(), &flow.handed.session);
        let expires = self.routes.get(&flow.route).and_then(|served| session.expires_in(&served.limits, now));
        let ([bytes_in, bytes_out], [packets_in, packets_out]) = (flow.handed.bytes(), flow.handed.packets());
        view::Connection {
            id: flow.id.to_string(),
            route: self.name(flow.route).to_string(),
            engine: Engine::Handoff,
            protocol: "tcp".into(),
            client: flow.client,
            listen: flow.ends.listen,
            backend: Some(flow.ends.backend),
            state: session.state().label().into(),
            age_seconds: now.since(session.began()).as_secs_f64(),
            idle_seconds: now.since(session.last_activity()).as_secs_f64(),
            expires_seconds: expires.map(|left| left.as_secs_f64()),
            bytes_in,
            bytes_out,
            packets_in,
            packets_out,
            metered: true,
            not_handed_over: None,
        }
    }

    /// Takes over what the program has seen of a flow.
    pub fn look(&mut self, gate: Gate) {
        let seen = self.store.flow(gate);
        let Some(flow) = self.flows.get_mut(gate).filter(|flow| flow.id.bits() == seen.id) else { return };
        let stamp = (seen.ends[0].last_seen_ns.max(seen.ends[1].last_seen_ns), seen.closing);
        if flow.stamp == stamp && self.wheel.due(gate.0).is_some() {
            return;
        }
        flow.stamp = stamp;
        let now = self.clock.now();
        let Some(served) = self.routes.get(&flow.route) else { return };
        let before = flow.handed.session.state();
        let ([bytes_in, bytes_out], action) = flow.handed.look(look(&seen), &served.limits, now);
        if let Some(meter) = flow.meter() {
            meter.bytes_in.add(bytes_in);
            meter.bytes_out.add(bytes_out);
        }
        for (asked, end) in flow.asked.iter_mut().zip(&seen.ends) {
            asked.heard(tick_of(end.last_seen_ns).min(now));
        }
        let changed = before != flow.handed.session.state();
        self.act(gate, action, changed);
    }

    /// Ends a flow now.
    pub fn cut(&mut self, gate: Gate, reason: Reason) {
        let now = self.clock.now();
        self.look(gate);
        let Some(flow) = self.flows.get_mut(gate) else { return };
        let Some(served) = self.routes.get(&flow.route) else { return };
        let action = flow.handed.cut(reason, &served.limits, now);
        self.act(gate, action, false);
    }

    fn on_time(&mut self, gate: Gate, now: Tick) {
        let Some(flow) = self.flows.get_mut(gate) else { return };
        let Some(served) = self.routes.get(&flow.route) else { return };
        if served.leaving.as_ref().is_some_and(|leaving| leaving.until <= now) {
            return self.cut(gate, Reason::Drained);
        }
        let mut action = flow.handed.tick(&served.limits, now);
        if action == Action::Nothing && served.limits.idle.is_none() {
            let seen = self.store.flow(gate);
            for (asked, side) in flow.asked.iter_mut().zip([Side::Client, Side::Backend]) {
                match asked.next(&self.probing, now) {
                    Next::Wait => {}
                    Next::Ask => self.resets.ask(&*self.store, &seen, &flow.ends, side, now),
                    Next::Gone => action = flow.handed.session.step(Event::Reset(side), &served.limits, now),
                }
                if action != Action::Nothing {
                    break;
                }
            }
        }
        self.act(gate, action, true);
    }

    /// `rearm`: its deadline may be nearer than it was. Bytes only ever move it away, and who is woken too early looks again.
    pub fn act(&mut self, gate: Gate, action: Action, rearm: bool) {
        match action {
            Action::End { reason, how } => self.end(gate, reason, how),
            Action::WarnIdle => {
                if let Some(flow) = self.flows.get(gate) {
                    let (id, client, route) = (flow.id, flow.client, self.name(flow.route));
                    tracing::warn!(%id, %client, %route, "idle for long");
                }
                self.arm(gate);
            }
            Action::Nothing | Action::Handshake | Action::Dial | Action::Relay => {
                if rearm || self.wheel.due(gate.0).is_none() {
                    self.arm(gate);
                }
            }
        }
    }

    pub fn arm(&mut self, gate: Gate) {
        let Some(flow) = self.flows.get(gate) else { return };
        let Some(served) = self.routes.get(&flow.route) else { return };
        let probe = flow.asked.iter().map(|asked| asked.due(&self.probing)).min();
        let deadlines = [
            flow.handed.session.deadline(&served.limits),
            served.leaving.as_ref().map(|leaving| leaving.until),
            probe.filter(|_| served.limits.idle.is_none()),
        ];
        match deadlines.into_iter().flatten().min() {
            Some(due) => self.wheel.set(gate.0, due),
            None => self.wheel.clear(gate.0),
        }
    }

    fn rearm(&mut self, route: u32) {
        let gates: Vec<Gate> =
            self.flows.iter().filter(|(_, flow)| flow.route == route).map(|(gate, _)| gate).collect();
        gates.into_iter().for_each(|gate| self.arm(gate));
    }

    /// Counts the end, tells it, and what is still to be told to the two ends is told.
    fn end(&mut self, gate: Gate, reason: Reason, how: How) {
        self.wheel.clear(gate.0);
        let Some(mut flow) = self.flows.take(gate) else { return };
        let now = self.clock.now();
        let age = now.since(flow.handed.session.began());
        if let Some(meter) = flow.meter() {
            meter.active.sub(1);
            meter.terminations[reason as usize].add(1);
        }
        if let Some(meter) = flow.meters.of_owner() {
            meter.aged(age);
        }
        self.report(&flow, reason, age);
        // Without its reset, an end that is called gone was not heard of any more.
        let was_told = self.store.flow(gate).is_over();
        let entries_stay = how == How::Finished || was_told;
        if entries_stay {
            // Told once: a daemon that is started while it lingers takes it for nobody's.
            self.store.set_owner(gate, [0; OWNER_BYTES]);
        } else {
            self.resets.send(&*self.store, &self.store.flow(gate), &flow.ends);
            // From now on the kernel answers with a reset of its own: nobody can miss ours.
            self.store.remove(gate);
        }
        let until = now.after(LINGER);
        self.lingering.push_back(Lingering { until, gate: entries_stay.then_some(gate), port: flow.port.take() });
        let route = flow.route;
        drop(flow);
        if let Some(served) = self.routes.get_mut(&route) {
            served.open -= 1;
        }
        self.look_whether_gone(route);
    }

    fn report(&mut self, flow: &Flow, reason: Reason, duration: Duration) {
        if self.told.len() >= UNTOLD {
            self.gauge.unlogged.fetch_add(1, Relaxed);
            return;
        }
        let [bytes_in, bytes_out] = flow.handed.bytes();
        self.told.push(Ended {
            id: flow.id,
            route: self.name(flow.route),
            engine: Engine::Handoff,
            client: flow.client,
            listen: flow.ends.listen,
            backend: Some(flow.ends.backend),
            reason,
            at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            duration,
            bytes_in,
            bytes_out,
        });
    }

    fn name(&self, route: u32) -> Arc<str> {
        self.routes.get(&route).map_or_else(|| "-".into(), |served| Arc::clone(&served.name))
    }

    /// A route that is leaving and has nothing open is forgotten.
    fn look_whether_gone(&mut self, id: u32) {
        let Some(served) = self.routes.get_mut(&id).filter(|served| served.open == 0) else { return };
        let Some(leaving) = served.leaving.as_mut().and_then(|departure| departure.leaving.take()) else { return };
        self.routes.remove(&id);
        self.say_gone(id, &leaving);
    }

    fn say_gone(&mut self, id: u32, leaving: &Leaving) {
        if leaving.done() {
            self.gone.push(id);
        }
    }

    /// Where flows go whose route is not there any more.
    pub fn no_route(&mut self) {
        let until = self.clock.now().after(DRAIN_OF_ADOPTED);
        self.routes.entry(NO_ROUTE).or_insert_with(|| Served {
            name: "-".into(),
            limits: Limits::NONE,
            drain: DRAIN_OF_ADOPTED,
            open: 0,
            leaving: Some(Departure { until, leaving: None }),
            route: None,
        });
    }

    /// What others see.
    pub fn show(&self) {
        let (used, max) = self.store.used();
        self.gauge.used.store(u64::from(used), Relaxed);
        self.gauge.max.store(u64::from(max), Relaxed);
        self.gauge.open.store(self.flows.len() as u64, Relaxed);
    }
}
