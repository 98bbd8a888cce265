//! The task itself.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_core::{
    config::{Engine, Protocol},
    flow::{DumpKind, End, Ended, EntryKey, FlowId, FlowTable, Now, RouteInfo, RouteTable},
    reason::Reason,
    view,
};
use tokio::sync::{mpsc, watch};

use super::{Clock, DropUdp, FailedDial, Input, Options, commands, publish::Publisher};
use crate::{
    access_log::AccessLog,
    control::{FlowCommand, FlowState},
    kernel::conntrack::{Conntrack, ConntrackError, Drained, MarkFilter, Usage},
};

/// After reading events, more may come together for so long: a wake-up costs as much as ten events.
const REST: Duration = Duration::from_millis(10);
/// How long the ends of a cut flow have to be answered with a reset before the entry goes.
const GRACE: Duration = Duration::from_secs(1);
/// Flows told of their end at once in one go; the others hear of it with their next packet.
const NUDGED: usize = 2000;
/// Dumps take at most one part in so many of a core.
const DUMP_SHARE: u32 = 40;
/// But they are never further apart than so many intervals.
const MOST_INTERVALS: u32 = 5;
/// The same for full dumps while many ended entries linger.
const FULL_DUMP_SHARE: u32 = 100;
/// Entries deleted from one look at the events to the next: each is told as an event, and the socket holds some 50,000.
const DELETED_AT_ONCE: usize = 4096;
/// With fewer lingering entries than this, leaving them out of a dump saves nothing.
const FEW_LINGERING: u64 = 10_000;
/// After a failed call.
const RETRY: Duration = Duration::from_secs(1);
/// How long a warning about lost events stays up.
const WARN_LOST: Duration = Duration::from_secs(60);

enum Wake {
    Events(Result<(), ConntrackError>),
    Input(Option<Input>),
    Command(Option<FlowCommand>),
    Time,
}

#[derive(Debug)]
pub struct Task<C> {
    conntrack: C,
    table: FlowTable,
    clock: Clock,
    interval: Duration,
    log: AccessLog,
    drained: mpsc::Sender<u32>,
    failed_dials: mpsc::Sender<FailedDial>,
    publisher: Publisher,
    /// Routes have come: before, no flow would be known.
    routed: bool,
    retry_at: Option<Instant>,
    next_dump: Duration,
    next_full_dump: Duration,
    next_publish: Duration,
    last_dump_took: Duration,
    /// Entries marked as cut, and when to delete them.
    condemned: VecDeque<(Duration, EntryKey)>,
    /// Looked at once more at the next dump: a datagram under way may have confirmed an old choice.
    down: Vec<DropUdp>,
    told_drained: HashSet<u32>,
    lost_at: Option<Duration>,
    failure: Option<String>,
    ended: Vec<Ended>,
}

impl<C: Conntrack> Task<C> {
    pub fn new(options: Options, conntrack: C, publish: watch::Sender<Arc<FlowState>>) -> Self {
        Self {
            conntrack,
            table: FlowTable::new(options.layout, options.max_flows),
            clock: options.clock,
            interval: options.interval,
            log: options.access_log,
            drained: options.drained,
            failed_dials: options.failed_dials,
            publisher: Publisher::new(publish),
            routed: false,
            retry_at: None,
            next_dump: Duration::ZERO,
            next_full_dump: Duration::ZERO,
            next_publish: Duration::ZERO,
            last_dump_took: Duration::ZERO,
            condemned: VecDeque::new(),
            down: Vec::new(),
            told_drained: HashSet::new(),
            lost_at: None,
            failure: None,
            ended: Vec::new(),
        }
    }

    /// Until [`Input::Stop`], or until nobody is left to talk to.
    pub async fn run(mut self, mut commands: mpsc::Receiver<FlowCommand>, mut inputs: mpsc::Receiver<Input>) {
        loop {
            let until = self.next_wake();
            // Events of routes that are not known yet wait.
            let listening = self.routed && self.retry_at.is_none();
            let mut rest = false;
            let wake = tokio::select! {
                // Who asks is answered with what has been said before.
                biased;
                input = inputs.recv() => Wake::Input(input),
                command = commands.recv() => Wake::Command(command),
                result = self.conntrack.readable(), if listening => Wake::Events(result),
                () = tokio::time::sleep_until(until.into()) => Wake::Time,
            };
            match wake {
                Wake::Input(None | Some(Input::Stop)) | Wake::Command(None) => break,
                Wake::Input(Some(input)) => self.take(input),
                Wake::Command(Some(command)) => self.obey(command),
                Wake::Events(Ok(())) => {
                    self.drain();
                    rest = true;
                }
                Wake::Events(Err(error)) => self.failed(&error),
                Wake::Time => {}
            }
            self.work();
            if rest {
                // Not the runtime's sleep: an idle runtime wakes for every event, which is what this is to avoid.
                std::thread::sleep(REST);
            }
        }
        self.close();
    }

    /// Logs what has ended.
    fn close(&mut self) {
        self.look();
        let now = self.clock.now();
        self.table.report_all(now);
        self.log_ended();
    }

    fn next_wake(&self) -> Instant {
        let due = [
            Some(self.next_dump.min(self.next_publish)).filter(|_| self.routed),
            self.table.next_expiry(),
            self.condemned.front().map(|(at, _)| *at),
        ];
        let due = due.into_iter().flatten().min().map(|at| self.clock.instant(at));
        let idle = Instant::now() + self.interval;
        [due, self.retry_at].into_iter().flatten().fold(idle, Instant::min)
    }

    /// Everything whose time has come.
    fn work(&mut self) {
        if self.retry_at.is_some_and(|until| until <= Instant::now()) {
            self.retry_at = None;
        }
        let now = self.clock.now();
        let overrun = self.table.is_stale() && now.mono >= self.next_dump.saturating_sub(self.interval * 9 / 10);
        if self.routed && (now.mono >= self.next_dump || overrun) {
            self.regular_dump();
        } else if self.routed && now.mono >= self.next_publish {
            self.publish_flows(now);
        }
        let now = self.clock.now();
        let cuts = self.table.expire(now);
        self.condemn(cuts, now);
        self.execute(now);
        self.tell_drained();
        self.log_ended();
    }

    fn take(&mut self, input: Input) {
        let now = self.clock.now();
        match input {
            Input::Routes(routes) => self.set_routes(&routes, now),
            Input::Change { routes, gone } => self.change_routes(&routes, &gone, now),
            Input::Counters(counters) => {
                self.publisher.counters(counters, now);
                self.publish(now);
            }
            Input::DropUdp(down) => {
                // A flow must be known before it can be dropped.
                self.look();
                self.drop_udp(&down, now);
                self.down.push(down);
            }
            Input::AccessLog(filter) => self.log.set_filter(filter),
            Input::Stop => {}
        }
    }

    fn set_routes(&mut self, routes: &RouteTable, now: Now) {
        let gone: Vec<u32> = self.table.tallies().map(|(id, _)| id).filter(|id| !routes.contains_key(id)).collect();
        let changed: Vec<_> = routes.iter().map(|(id, info)| (*id, Arc::clone(info))).collect();
        self.change_routes(&changed, &gone, now);
    }

    fn change_routes(&mut self, changed: &[(u32, Arc<RouteInfo>)], gone: &[u32], now: Now) {
        // What a route leaves behind must be known before it is cut, or the route said to be drained.
        if !gone.is_empty() || changed.iter().any(|(_, info)| info.drain_until.is_some()) {
            self.look();
        } else if self.routed {
            self.drain();
        }
        let name = |id: &u32| Some((*id, Arc::clone(&self.table.tally(*id)?.info.name)));
        let renamed = changed.iter().filter_map(|(id, info)| name(id).filter(|(_, known)| *known != info.name));
        let forgotten: Vec<(u32, Arc<str>)> = gone.iter().filter_map(name).chain(renamed).collect();
        let cuts = self.table.change_routes(changed, gone, now);
        self.publisher.forget(forgotten);
        self.condemn(cuts, now);
        self.told_drained.clear();
        self.routed = true;
    }

    fn obey(&mut self, command: FlowCommand) {
        match command {
            FlowCommand::Connections { filter, reply } => {
                self.look();
                let _ = reply.send(Ok(commands::list(&self.table, &filter, self.clock.now())));
            }
            FlowCommand::Kill { id, reply } => {
                self.drain();
                let _ = reply.send(self.kill(&id));
            }
        }
    }

    fn kill(&mut self, text: &str) -> Result<view::Killed, view::Failure> {
        let now = self.clock.now();
        let failure = |error: String| view::Failure {
            error,
            hint: Some("`shunt connections` lists the ids of living connections".into()),
        };
        let id: FlowId = text.parse().map_err(|error| failure(format!("connection id {text:?}: {error}")))?;
        let record = self.table.get(id).ok_or_else(|| failure(format!("there is no connection {text}")))?;
        let route = self.table.tally(record.route).map(|tally| tally.info.name.to_string()).unwrap_or_default();
        let killed = view::Killed { id: text.into(), route, client: record.client };
        let key = self
            .table
            .cut(id, Reason::Killed, now)
            .ok_or_else(|| failure(format!("connection {text} has ended already")))?;
        self.condemn(vec![key], now);
        Ok(killed)
    }

    fn drop_udp(&mut self, down: &DropUdp, now: Now) {
        for backend in &down.backends {
            let cuts = self.table.drop_udp(down.route, *backend, now);
            self.condemn(cuts, now);
        }
    }

    /// Marks the entries as cut; TCP entries stay long enough for both ends to hear a reset.
    fn condemn(&mut self, cuts: Vec<EntryKey>, now: Now) {
        if cuts.is_empty() {
            return;
        }
        let (tcp, udp): (Vec<EntryKey>, Vec<EntryKey>) =
            cuts.into_iter().partition(|key| key.protocol == Protocol::Tcp);
        let layout = self.table.layout();
        let result = self.conntrack.set_mark(&tcp, layout.end_bits(End::Cut), layout.end_mask());
        if let Err(error) = result {
            self.failed(&error);
        }
        self.delete(&udp);
        self.conntrack.nudge(&tcp[..tcp.len().min(NUDGED)]);
        self.condemned.extend(tcp.into_iter().map(|key| (now.mono + GRACE, key)));
    }

    /// Deletes what has been marked long enough.
    fn execute(&mut self, now: Now) {
        let due = self.condemned.iter().take_while(|(at, _)| *at <= now.mono).count();
        if due == 0 {
            return;
        }
        let keys: Vec<EntryKey> = self.condemned.drain(..due).map(|(_, key)| key).collect();
        self.delete(&keys);
    }

    /// Deletes entries and hears of it. What is deleted at once must fit into the socket beside what others have to tell: the
    /// ends that are lost may be those of connections whose entries are gone when a dump comes to heal it.
    fn delete(&mut self, keys: &[EntryKey]) {
        for keys in keys.chunks(DELETED_AT_ONCE) {
            if let Err(error) = self.conntrack.delete(keys) {
                return self.failed(&error);
            }
            self.drain();
        }
    }

    /// Takes all queued events.
    fn drain(&mut self) {
        let now = self.clock.now();
        loop {
            let table = &mut self.table;
            match self.conntrack.drain(&mut |event| table.apply(event, now)) {
                Ok(Drained { more: true }) => {}
                Ok(Drained { more: false }) => break,
                Err(error) => return self.failed(&error),
            }
        }
        if self.table.is_stale() && self.table.counts().lost > 0 && self.lost_at.is_none() {
            self.lost_at = Some(now.mono);
            tracing::warn!(lost = self.table.counts().lost, "conntrack events were lost; a dump heals the flow table");
        }
    }

    fn regular_dump(&mut self) {
        self.dump();
        let now = self.clock.now();
        for down in std::mem::take(&mut self.down) {
            self.drop_udp(&down, now);
        }
        if self.lost_at.is_some_and(|at| !self.table.is_stale() && now.mono.saturating_sub(at) > WARN_LOST) {
            self.lost_at = None;
        }
        self.warn_of_silence();
        self.publish_flows(now);
    }

    fn warn_of_silence(&mut self) {
        for id in self.table.take_silent() {
            let Some(record) = self.table.get(id) else { continue };
            let route = self.table.tally(record.route).map(|tally| &tally.info.name);
            tracing::warn!(%id, client = %record.client, route = route.map(tracing::field::display), "idle for long");
        }
    }

    /// Also between dumps that are far apart: what events tell is known.
    fn publish_flows(&mut self, now: Now) {
        self.next_publish = now.mono + self.interval;
        self.relieve();
        let changed = self.table.take_changed();
        self.publisher.sample(&self.table, changed, now);
        self.publish(now);
    }

    /// Ended connections hold their ports for a minute. Before a flood of short ones fills the kernel's table, those that
    /// are missed least are let go.
    fn relieve(&mut self) {
        let Some(usage) = self.conntrack.usage() else { return };
        let excess = usage.entries.saturating_sub(usage.max / 2);
        if excess == 0 {
            return;
        }
        // An id that was given again while nobody listened names a living connection.
        self.drain();
        let over = self.table.lingering(usize::try_from(excess).unwrap_or(usize::MAX));
        self.delete(&over);
    }

    /// Everything that lives now is known then.
    fn look(&mut self) {
        if self.routed {
            self.dump();
        }
    }

    fn dump(&mut self) {
        let now = self.clock.now();
        let kind = self.dump_kind(now);
        self.drain();
        let stretched = (self.last_dump_took * DUMP_SHARE).clamp(self.interval, self.interval * MOST_INTERVALS);
        self.next_dump = now.mono + stretched;
        self.table.begin_dump(kind, self.next_dump, now);
        let filter = self.filter(kind);
        let table = &mut self.table;
        if let Err(error) = self.conntrack.dump(filter, &mut |entry| table.observe(entry, now)) {
            return self.failed(&error);
        }
        self.drain();
        let end = self.clock.now();
        self.table.end_dump(kind, end);
        self.failure = None;
        self.last_dump_took = end.mono.saturating_sub(now.mono);
        if kind == DumpKind::Full {
            self.next_full_dump = end.mono + self.last_dump_took * FULL_DUMP_SHARE;
        }
    }

    /// With many ended entries lingering, most dumps leave them out.
    fn dump_kind(&self, now: Now) -> DumpKind {
        let active = self.table.active();
        let lingering = self.table.len() as u64 - active.min(self.table.len() as u64);
        if self.table.is_stale() || lingering < FEW_LINGERING.max(active / 4) || now.mono >= self.next_full_dump {
            DumpKind::Full
        } else {
            DumpKind::Live
        }
    }

    fn filter(&self, kind: DumpKind) -> MarkFilter {
        match kind {
            DumpKind::Full => MarkFilter { value: 0, mask: 0 },
            DumpKind::Live => MarkFilter { value: 0, mask: self.table.layout().over_mask() },
        }
    }

    fn tell_drained(&mut self) {
        for id in self.table.drained() {
            if !self.told_drained.contains(&id) && self.drained.try_send(id).is_ok() {
                self.told_drained.insert(id);
            }
        }
    }

    fn log_ended(&mut self) {
        self.table.take_ended(&mut self.ended);
        if self.ended.is_empty() {
            return;
        }
        for ended in self.ended.drain(..) {
            if matches!(ended.reason, Reason::ConnectRefused | Reason::ConnectTimeout) {
                let failed = FailedDial { route: Arc::clone(&ended.route), backend: ended.backend };
                let _ = self.failed_dials.try_send(failed);
            }
            self.log.write(&ended, Engine::Nft);
        }
        self.log.flush();
    }

    fn publish(&mut self, now: Now) {
        let usage = self.conntrack.usage();
        let counts = self.table.counts();
        let warnings = self.warnings(usage, now);
        let last_dump_ms = view::milliseconds(self.last_dump_took);
        self.publisher.publish(&self.table, now, |state| {
            state.conntrack = view::ConntrackStatus {
                entries: usage.map_or(0, |usage| usage.entries),
                max: usage.map_or(0, |usage| usage.max),
                events: counts.events,
                events_lost: counts.lost,
                dumps: counts.dumps,
                last_dump_ms,
            };
            state.warnings = warnings;
        });
    }

    fn warnings(&self, usage: Option<Usage>, now: Now) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(usage) = usage.filter(|usage| usage.entries * 10 >= usage.max * 9) {
            warnings.push(format!(
                "the conntrack table is nearly full ({} of {} entries): raise net.netfilter.nf_conntrack_max",
                usage.entries, usage.max
            ));
        }
        if let Some(at) = self.lost_at {
            let ago = now.mono.saturating_sub(at).as_secs();
            let healed = if self.table.is_stale() { "numbers are behind" } else { "a dump has set the numbers right" };
            warnings.push(format!("conntrack events were lost {ago} s ago; {healed}"));
        }
        if self.table.untracked() > 0 {
            warnings.push(format!(
                "the flow table is full ({} flows): {} connections are not shown",
                self.table.capacity(),
                self.table.untracked()
            ));
        }
        if self.log.lost() > 0 {
            warnings.push(format!("{} access log lines were dropped: standard output is not read", self.log.lost()));
        }
        warnings.extend(self.failure.clone());
        warnings
    }

    /// A kernel call failed: said once, shown until one succeeds.
    fn failed(&mut self, error: &ConntrackError) {
        let text = error.to_string();
        if self.failure.as_ref() != Some(&text) {
            tracing::warn!(%error, "conntrack");
        }
        self.failure = Some(text);
        self.retry_at = Some(Instant::now() + RETRY);
    }
}
