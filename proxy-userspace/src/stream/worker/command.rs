//! What others ask of a worker.

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::AcqRel},
    },
    time::Duration,
};

use proxy_core::{
    config::Engine,
    reason::Reason,
    session::{Event, State, Tick},
};
use tokio::sync::oneshot;

use super::{Slot, Worker, accept::Listener, engine_of};
use crate::{
    control::ConnectionFilter,
    kernel::sockmap::Sockmap,
    stream::{
        StreamId,
        flow::Flow,
        handover::HandoffEngine,
        route::{Listen, Route},
    },
};

#[derive(Debug)]
pub enum Command {
    /// Answers when it is served.
    Apply(Applied, oneshot::Sender<()>),
    /// What sockets are joined with.
    Join(Box<Sockmap>),
    /// What connections are handed over with.
    HandOver(Box<HandoffEngine>),
    List {
        filter: ConnectionFilter,
        reply: oneshot::Sender<Vec<Row>>,
    },
    /// Answers `None` when there is no such connection.
    Kill {
        number: u64,
        reply: oneshot::Sender<Option<Row>>,
    },
    /// Nothing new is accepted; every route drains.
    Stop,
}

/// A change, for one worker.
#[derive(Debug, Default)]
pub struct Applied {
    pub routes: Vec<Arc<Route>>,
    pub ports: Vec<(SocketAddr, PortChange)>,
    pub gone: Vec<(u32, Leaving)>,
}

#[derive(Debug)]
pub enum PortChange {
    Open(OwnedFd, Arc<Listen>),
    /// Many ports are led to it; its own address is none of them.
    OpenGroup(OwnedFd, Arc<Listen>),
    Update(Arc<Listen>),
    Close,
}

/// A route that is gone from the configuration: the last worker to see its last connection end says so.
#[derive(Debug, Clone)]
pub struct Leaving(Arc<AtomicUsize>);

impl Leaving {
    pub fn new(workers: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(workers)))
    }

    /// True for the last of them.
    pub fn done(&self) -> bool {
        self.0.fetch_sub(1, AcqRel) == 1
    }
}

/// … at one worker.
#[derive(Debug)]
pub(super) struct Departure {
    /// What is left is cut then.
    pub until: Tick,
    /// `None`: the daemon stops, or this worker has said that nothing is left.
    leaving: Option<Leaving>,
}

/// A connection, as copied out of its worker.
#[derive(Debug, Clone)]
pub struct Row {
    pub id: StreamId,
    pub route: Arc<str>,
    pub engine: Engine,
    pub client: SocketAddr,
    pub listen: SocketAddr,
    pub backend: Option<SocketAddr>,
    pub state: &'static str,
    pub age: Duration,
    pub idle: Duration,
    pub expires: Option<Duration>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub not_handed_over: Option<String>,
}

impl Worker {
    pub(super) fn obey(&mut self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Apply(change, done) => {
                    self.apply(change);
                    let _ = done.send(());
                }
                Command::Join(map) => self.take_maps(*map),
                Command::HandOver(engine) => {
                    self.paths = engine.paths();
                    self.shared.handoff = Some(*engine);
                }
                Command::List { filter, reply } => {
                    self.count_all();
                    drop(reply.send(self.list(&filter)));
                }
                Command::Kill { number, reply } => drop(reply.send(self.kill(number))),
                Command::Stop => self.stop(),
            }
        }
    }

    pub(super) fn apply(&mut self, change: Applied) {
        for route in change.routes {
            self.serve(route);
        }
        for (address, port) in change.ports {
            match port {
                PortChange::Open(fd, listen) => {
                    self.listen_on(Listener { fd, address, listen, is_group: false, segment: None })
                }
                PortChange::OpenGroup(fd, listen) => {
                    self.listen_on(Listener { fd, address, listen, is_group: true, segment: None });
                }
                PortChange::Update(listen) => self.replace_listen(address, &listen),
                PortChange::Close => {
                    for index in self.listeners_at(address) {
                        self.stop_listening(index);
                    }
                }
            }
        }
        for (id, leaving) in change.gone {
            match self.by_id.get(&id) {
                Some(&slot) => self.leave(slot, Some(leaving)),
                // Nothing is left of it here.
                None => self.say_gone(id, &leaving),
            }
        }
    }

    pub(super) fn serve(&mut self, route: Arc<Route>) {
        let Some(meter) = route.meters.workers.get(usize::from(self.index)).map(Arc::clone) else { return };
        let slot = Slot {
            name: Arc::clone(&route.meters.name),
            limits: route.limits,
            engine: route.engine,
            meter,
            open: 0,
            sequence: 0,
            leaving: None,
            route: Some(route),
        };
        let id = slot.route.as_ref().map_or(0, |route| route.id);
        match self.by_id.get(&id) {
            Some(&index) => {
                let old = &self.slots[index];
                let (open, sequence) = (old.open, old.sequence);
                let shorter = slot.limits != old.limits;
                self.slots[index] = Slot { open, sequence, ..slot };
                if shorter {
                    self.rearm(index);
                }
            }
            None => {
                let index = match self.free_slots.pop() {
                    Some(index) => {
                        self.slots[index] = slot;
                        index
                    }
                    None => {
                        self.slots.push(slot);
                        self.slots.len() - 1
                    }
                };
                self.by_id.insert(id, index);
            }
        }
    }

    /// The deadlines of a route's connections may be nearer than they were.
    fn rearm(&mut self, slot: usize) {
        let keys: Vec<u32> = self.flows.iter().filter(|(_, flow)| flow.slot == slot).map(|(key, _)| key).collect();
        for key in keys {
            self.with(key, |worker, flow| {
                worker.arm(key, flow);
                super::Fate::Lives
            });
        }
    }

    fn leave(&mut self, slot: usize, leaving: Option<Leaving>) {
        let drains = |slot: &Slot| slot.route.as_ref().map(|route| route.config.timeouts.drain);
        // A connection whose route is not known yet may become one of any.
        let drain =
            drains(&self.slots[slot]).or_else(|| self.slots.iter().filter_map(drains).max()).unwrap_or_default();
        let until = self.now().after(drain);
        self.slots[slot].leaving = Some(Departure { until, leaving });
        self.rearm(slot);
        self.look_whether_gone(slot);
    }

    /// A route that is leaving and has nothing open is forgotten.
    pub(super) fn look_whether_gone(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if slot.open > 0 {
            return;
        }
        let Some(leaving) = slot.leaving.as_mut().and_then(|departure| departure.leaving.take()) else { return };
        let Some(route) = slot.route.take() else { return };
        slot.leaving = None;
        self.by_id.remove(&route.id);
        self.free_slots.push(index);
        self.say_gone(route.id, &leaving);
    }

    fn say_gone(&self, id: u32, leaving: &Leaving) {
        if leaving.done() {
            // Its owner takes it from its own queue: a full one would only delay the news.
            let _ = self.shared.drained.blocking_send(id);
        }
    }

    fn stop(&mut self) {
        self.stopping = true;
        for index in 0..self.listeners.len() {
            self.stop_listening(index);
        }
        for slot in 0..self.slots.len() {
            if self.slots[slot].leaving.is_none() {
                self.leave(slot, None);
            }
        }
    }

    pub(super) fn list(&self, filter: &ConnectionFilter) -> Vec<Row> {
        let id = filter.id.as_ref().map(|id| id.parse::<StreamId>().ok());
        let wanted = |flow: &Flow| {
            filter.client.is_none_or(|client| flow.client_address.ip() == client)
                && filter.client_port.is_none_or(|port| flow.client_address.port() == port)
                && filter.route.as_ref().is_none_or(|route| **route == *self.slots[flow.slot].name)
                && id.is_none_or(|id| id == Some(self.id(flow)))
        };
        let most = if filter.limit == 0 { usize::MAX } else { filter.limit };
        self.flows.iter().filter(|(_, flow)| wanted(flow)).take(most).map(|(_, flow)| self.row(flow)).collect()
    }

    fn kill(&mut self, number: u64) -> Option<Row> {
        let (key, flow) = self.flows.iter().find(|(_, flow)| flow.number == number)?;
        let row = self.row(flow);
        self.with(key, |worker, flow| worker.step(key, flow, Event::Cut(Reason::Killed)));
        Some(row)
    }

    fn row(&self, flow: &Flow) -> Row {
        let slot = &self.slots[flow.slot];
        let now = self.now();
        Row {
            id: self.id(flow),
            route: Arc::clone(&slot.name),
            engine: engine_of(flow.means),
            client: flow.client_address,
            listen: flow.listen,
            backend: flow.backend_address,
            state: flow.session.state().label(),
            age: now.since(flow.session.began()),
            idle: now.since(flow.session.last_activity()),
            expires: flow.session.expires_in(&slot.limits, now),
            bytes_in: flow.up.bytes,
            bytes_out: flow.down.bytes,
            not_handed_over: self.not_handed_over(flow),
        }
    }

    /// `None`: its route does not hand over, or no backend has answered yet.
    fn not_handed_over(&self, flow: &Flow) -> Option<String> {
        self.slots[flow.slot].route.as_ref().filter(|route| route.engine == Engine::Handoff)?;
        match (&flow.handover, flow.session.state()) {
            (Some(handing), _) => Some(handing.protocol.why()),
            (None, State::Established { .. } | State::HalfClosed { .. }) => {
                Some("it began before its route handed connections over".into())
            }
            (
                None,
                State::Classifying { .. }
                | State::Handshaking { .. }
                | State::Dialing { .. }
                | State::Securing { .. }
                | State::Closed(_),
            ) => None,
        }
    }
}
