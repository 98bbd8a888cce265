//! One worker: a thread that owns its connections and waits for their sockets.

mod accept;
mod carry;
mod command;
mod dial;
mod farewell;
mod first;
mod handover;
mod handshake;
mod join;

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::AtomicU64, mpsc},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use proxy_core::{
    config::Engine,
    flow::Side,
    session::{Action, Event, How, Limits, State, Tick},
    wheel::Wheel,
};
use rustix::event::epoll::EventFlags;

pub use self::command::{Applied, Command, Leaving, PortChange, Row};
use self::{accept::Listener, command::Departure, farewell::Farewells, join::Joins};
use super::{
    Ended, StreamId,
    flow::{Flow, Flows},
    handover::{HandoffEngine, Paths},
    meter::{ENGINES, Pressure, RouteMeter},
    poll::{Events, Poll, Source},
    relay::{Means, Stores, buffers::Buffers, pipes::Pipes},
    route::Route,
};
use crate::{
    acme::Challenges,
    kernel::{memory, schedule},
    track::FailedDial,
};

/// Ended connections are told together, at most so many …
const TOLD_TOGETHER: usize = 256;
/// … and so late.
const TOLD_AFTER: Duration = Duration::from_millis(50);
/// Ended connections that wait for a slow hearer at most.
const UNTOLD: usize = 16_384;
/// After so many connections have gone, memory is given back when nothing else is to be done.
const WORTH_TRIMMING: usize = 4096;

/// What a worker shares with the others.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Connections open in all workers.
    pub open: Arc<AtomicU64>,
    pub pressure: Arc<Pressure>,
    /// The origin of all workers' clocks.
    pub began: Instant,
    pub failed_dials: tokio::sync::mpsc::Sender<FailedDial>,
    pub drained: tokio::sync::mpsc::Sender<u32>,
    pub ended: tokio::sync::mpsc::Sender<Vec<Ended>>,
    /// `None`: every connection is relayed to its end.
    pub handoff: Option<HandoffEngine>,
    /// What is answered to a CA that looks whose a name is.
    pub challenges: Challenges,
}

#[derive(Debug)]
pub struct Worker {
    index: u8,
    shared: Shared,
    poll: Poll,
    wake: Arc<OwnedFd>,
    commands: mpsc::Receiver<Command>,
    /// Microseconds since [`Shared::began`], read once per round.
    micros: u64,
    /// Times the kernel was asked for events.
    rounds: u64,
    flows: Flows,
    next_number: u64,
    wheel: Wheel,
    woken: Vec<u32>,
    /// Flows that had more to do when their turn was over.
    queue: VecDeque<u32>,
    /// Flows whose handshake can go on.
    handshakes: VecDeque<u32>,
    stores: Stores,
    joins: Joins,
    farewells: Farewells,
    slots: Vec<Slot>,
    /// Slots of routes that are gone.
    free_slots: Vec<usize>,
    /// By route id.
    by_id: HashMap<u32, usize>,
    listeners: Vec<Option<Listener>>,
    told: Vec<Ended>,
    tell_at: Option<u64>,
    /// Nothing is accepted before.
    accept_at: Option<u64>,
    /// From the first connection that is to be handed over on.
    paths: Option<Paths>,
    random: u64,
    gone_since_trim: usize,
    stopping: bool,
}

/// A route at this worker. The first is no route: connections that have not found theirs.
#[derive(Debug)]
struct Slot {
    route: Option<Arc<Route>>,
    name: Arc<str>,
    limits: Limits,
    engine: Engine,
    meter: Arc<RouteMeter>,
    open: usize,
    sequence: u64,
    leaving: Option<Departure>,
}

/// The slot of connections whose route is not known.
const NO_ROUTE: usize = 0;

/// Whether a flow goes on after what has been done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lives,
    Over,
}

impl Worker {
    /// `unrouted`: counts connections that found no route. `pipes`: to be had by this worker.
    pub fn new(
        index: u8,
        shared: Shared,
        wake: Arc<OwnedFd>,
        commands: mpsc::Receiver<Command>,
        unrouted: Arc<RouteMeter>,
        pipes: usize,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add_level(&wake, Source::Wake)?;
        let no_route = Slot {
            route: None,
            name: "-".into(),
            limits: Limits::NONE,
            engine: Engine::Copy,
            meter: unrouted,
            open: 0,
            sequence: 0,
            leaving: None,
        };
        Ok(Self {
            index,
            poll,
            wake,
            commands,
            micros: shared.began.elapsed().as_micros() as u64,
            rounds: 0,
            flows: Flows::default(),
            // Beyond what an earlier daemon gave: connections that it handed over live on with their ids.
            next_number: wall().as_secs() << 20,
            wheel: Wheel::new(Tick(0)),
            woken: Vec::new(),
            queue: VecDeque::new(),
            handshakes: VecDeque::new(),
            stores: Stores { buffers: Buffers::default(), pipes: Pipes::new(pipes), sockmap: None },
            joins: Joins::default(),
            farewells: Farewells::default(),
            slots: vec![no_route],
            free_slots: Vec::new(),
            by_id: HashMap::new(),
            listeners: Vec::new(),
            told: Vec::new(),
            tell_at: None,
            accept_at: None,
            paths: shared.handoff.as_ref().and_then(HandoffEngine::paths),
            random: 0x9e37_79b9_7f4a_7c15 ^ u64::from(index) << 32 ^ wall().as_nanos() as u64,
            gone_since_trim: 0,
            stopping: false,
            shared,
        })
    }

    /// Until it is told to stop and its last connection has ended.
    pub fn run(mut self) {
        // Whoever waits for a worker waits for all of its connections: it must not stand behind the slices of others.
        if let Err(error) = schedule::short_slices() {
            tracing::debug!(worker = self.index, %error, "sched_setattr: the kernel's usual slices");
        }
        let mut events = Events::default();
        while !(self.stopping && self.flows.open() == 0) {
            self.round(&mut events);
        }
        self.tell(true);
    }

    fn round(&mut self, events: &mut Events) {
        self.rounds += 1;
        let count = match self.poll.wait(events, self.patience()) {
            Ok(count) => count,
            Err(errno) => {
                tracing::error!(worker = self.index, %errno, "epoll_wait");
                std::thread::sleep(Duration::from_millis(10));
                0
            }
        };
        self.micros = self.shared.began.elapsed().as_micros() as u64;
        for index in 0..count {
            if let Some((source, flags)) = events.get(index) {
                self.dispatch(source, flags);
            }
        }
        for _ in 0..self.queue.len() {
            let Some(key) = self.queue.pop_front() else { break };
            self.with(key, |worker, flow| {
                flow.queued = false;
                worker.relay(key, flow)
            });
        }
        self.shake_hands();
        self.look_again();
        self.wheel_turns();
        self.look_after_farewells();
        self.resume();
        self.tell(false);
        if count == 0 && self.gone_since_trim >= WORTH_TRIMMING {
            self.gone_since_trim = 0;
            memory::give_back();
        }
    }

    /// How long nothing has to be done if no event comes.
    fn patience(&self) -> Option<Duration> {
        if !self.queue.is_empty() || !self.handshakes.is_empty() {
            return Some(Duration::ZERO);
        }
        let timer = self.wheel.next().map(|tick| tick.0 * 1000);
        let trim = (self.gone_since_trim >= WORTH_TRIMMING).then_some(self.micros + 1_000_000);
        let due = [timer, self.tell_at, self.accept_at, self.joins.due(), self.farewells.due(), trim];
        let next = due.into_iter().flatten().min()?;
        let now = self.shared.began.elapsed().as_micros() as u64;
        Some(Duration::from_micros(next.saturating_sub(now)))
    }

    fn dispatch(&mut self, source: Source, events: EventFlags) {
        match source {
            Source::Wake => self.obey(),
            Source::Calls => self.called(),
            Source::Listener(index) => drop(self.accept(index as usize)),
            Source::Flow { key, number, side } => {
                self.with(key, |worker, flow| {
                    if flow.source(key, side) != (Source::Flow { key, number, side }) {
                        return Fate::Lives;
                    }
                    // Of two backends that are asked at once an event does not say which it is of, and in the round in
                    // which one of them was replaced or has won it may still be of the other. They are asked themselves.
                    let two = flow.asked_in == worker.rounds || flow.early.as_ref().is_some_and(|e| e.rival.is_some());
                    if let Some(socket) = flow.socket(side).filter(|_| side == Side::Client || !two) {
                        socket.note(events);
                    }
                    worker.on_socket(key, flow, side)
                });
            }
        }
    }

    fn on_socket(&mut self, key: u32, flow: &mut Flow, side: Side) -> Fate {
        match (flow.session.state(), side) {
            (State::Classifying { .. }, _) => self.read_first(key, flow),
            (State::Handshaking { .. }, _) | (State::Securing { .. }, Side::Backend) => self.handshake_later(key, flow),
            (State::Securing { .. }, Side::Client) => self.client_while_securing(key, flow),
            (State::Dialing { .. }, Side::Client) => self.client_while_dialing(key, flow),
            (State::Dialing { .. }, Side::Backend) => self.dialed(key, flow),
            (State::Established { .. } | State::HalfClosed { .. }, _) => self.relay(key, flow),
            (State::Closed(_), _) => Fate::Over,
        }
    }

    /// Does something with a flow; one that is over is gone afterwards.
    fn with(&mut self, key: u32, act: impl FnOnce(&mut Self, &mut Flow) -> Fate) {
        let Some(mut flow) = self.flows.take(key) else { return };
        // What a stranger sends goes through code of others too. A defect there is the end of that connection, not of all.
        let fate = catch_unwind(AssertUnwindSafe(|| act(self, &mut flow)));
        let fate = fate.unwrap_or_else(|_| {
            tracing::error!(client = %flow.client_address, route = %self.slots[flow.slot].name, "a defect ends a connection");
            self.end(&mut flow, proxy_core::reason::Reason::InternalError, How::Reset)
        });
        match fate {
            Fate::Lives => self.flows.put(key, flow),
            Fate::Over => {
                self.wheel.clear(key);
                self.part_from(*flow);
                self.flows.release(key);
                self.gone_since_trim += 1;
            }
        }
    }

    fn wheel_turns(&mut self) {
        let mut woken = std::mem::take(&mut self.woken);
        self.wheel.advance(self.now(), &mut woken);
        for key in woken.drain(..) {
            self.with(key, |worker, flow| worker.on_time(key, flow));
        }
        self.woken = woken;
    }

    fn on_time(&mut self, key: u32, flow: &mut Flow) -> Fate {
        let now = self.now();
        let slot = &self.slots[flow.slot];
        if slot.leaving.as_ref().is_some_and(|leaving| leaving.until <= now) {
            return self.step(key, flow, Event::Cut(proxy_core::reason::Reason::Drained));
        }
        if flow.early.as_ref().and_then(|early| early.attempt_until).is_some_and(|until| until <= now) {
            return self.attempt_over(key, flow);
        }
        if let Some(due) = flow.joined.as_mut().and_then(|joined| joined.look_at.take_if(|at| *at <= now))
            && self.relay(key, flow) == Fate::Over
        {
            tracing::trace!(?due, "ended by a late look");
            return Fate::Over;
        }
        self.take_count(flow);
        if self.step(key, flow, Event::Tick) == Fate::Over {
            return Fate::Over;
        }
        self.handover_due(key, flow)
    }

    /// Tells the session, and does what it says.
    fn step(&mut self, key: u32, flow: &mut Flow, event: Event) -> Fate {
        let now = self.now();
        if flow.is_handed_over() {
            return self.while_leaving(key, flow, event);
        }
        match flow.session.step(event, &self.slots[flow.slot].limits, now) {
            Action::Nothing => {
                self.arm(key, flow);
                Fate::Lives
            }
            Action::Handshake => self.begin_handshake(key, flow),
            Action::Dial => self.dial(key, flow),
            Action::Relay => {
                self.arm(key, flow);
                self.relay(key, flow)
            }
            Action::WarnIdle => {
                let id = self.id(flow);
                tracing::warn!(%id, client = %flow.client_address, route = %self.slots[flow.slot].name, "idle for long");
                self.arm(key, flow);
                Fate::Lives
            }
            Action::End { reason, how } => self.end(flow, reason, how),
        }
    }

    /// Sets the flow's timer, unless it will wake early enough: bytes only ever move a deadline away, and who is woken too
    /// early looks again.
    fn arm(&mut self, key: u32, flow: &Flow) {
        let slot = &self.slots[flow.slot];
        let deadlines = [
            flow.session.deadline(&slot.limits),
            flow.early.as_ref().and_then(|early| early.attempt_until),
            slot.leaving.as_ref().map(|leaving| leaving.until),
            flow.joined.as_ref().and_then(|joined| joined.look_at),
            flow.handover.as_ref().and_then(|handing| self.next_look(handing)),
        ];
        let Some(due) = deadlines.into_iter().flatten().min() else { return self.wheel.clear(key) };
        if self.wheel.due(key).is_none_or(|set| set > due) {
            self.wheel.set(key, due);
        }
    }

    fn now(&self) -> Tick {
        Tick(self.micros / 1000)
    }

    fn clock(&self) -> Duration {
        Duration::from_micros(self.micros)
    }

    fn id(&self, flow: &Flow) -> StreamId {
        StreamId::new(self.index, flow.number)
    }

    /// xorshift64*: for choices that need no secrecy.
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Hands on what has ended, when it is enough or time.
    fn tell(&mut self, all: bool) {
        if self.told.is_empty() {
            return;
        }
        let due = *self.tell_at.get_or_insert(self.micros + TOLD_AFTER.as_micros() as u64);
        if !all && self.told.len() < TOLD_TOGETHER && self.micros < due {
            return;
        }
        self.tell_at = None;
        let told = std::mem::take(&mut self.told);
        if all {
            // The last words: the hearer drains its queue before it ends.
            let _ = self.shared.ended.blocking_send(told);
            return;
        }
        if let Err(tokio::sync::mpsc::error::TrySendError::Full(told)) = self.shared.ended.try_send(told) {
            // Tried again also when nothing else happens.
            (self.told, self.tell_at) = (told, Some(self.micros + TOLD_AFTER.as_micros() as u64));
        }
    }
}

/// Where an engine's counters are.
fn meter_slot(means: Means) -> usize {
    let engine = engine_of(means);
    ENGINES.iter().position(|one| *one == engine).unwrap_or_default()
}

fn engine_of(means: Means) -> Engine {
    match means {
        Means::Copy => Engine::Copy,
        Means::Splice => Engine::Splice,
        Means::Sockmap => Engine::Sockmap,
    }
}

fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests;
