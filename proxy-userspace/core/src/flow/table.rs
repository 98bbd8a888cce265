//! The table itself: events in, ended connections out.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU64,
    sync::Arc,
    time::Duration,
};

use super::{
    mark::MarkLayout,
    record::{Ended, EntryKey, FlowId, Now, Record, SpreadHash, State},
    route::{RouteInfo, RouteTable, RouteTally, Tallies},
    timers::Timers,
    verdict::{self, Standing},
};
use crate::{
    conntrack::{Entry, Event, Traffic},
    reason::Reason,
};

/// What the table has been told, and what it could not keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub events: u64,
    /// Times the event socket ran over.
    pub lost: u64,
    pub dumps: u64,
    /// Connections that found the table full: not shown while they live, counted when they end.
    pub overflowed: u64,
}

/// Every connection of every route.
#[derive(Debug)]
pub struct FlowTable {
    pub(super) layout: MarkLayout,
    max: usize,
    // Boxed: the index stays small when it doubles, and memory follows the number of flows.
    pub(super) flows: HashMap<FlowId, Box<Record>, SpreadHash>,
    pub(super) tallies: Tallies,
    pub(super) changed: Vec<u32>,
    pub(super) ended: Vec<Ended>,
    /// Silent for so long that a warning is due.
    pub(super) silent: Vec<FlowId>,
    pub(super) timers: Timers,
    pub(super) counts: Counts,
    /// Events are missing, or none have been asked for yet: a full dump heals it.
    pub(super) stale: bool,
    /// [`Counts::lost`] when the present dump began.
    pub(super) lost_before: u64,
    /// Dumps begun.
    pub(super) dumping: u32,
    /// Full dumps begun.
    pub(super) generation: u32,
    /// Records that have the present generation.
    pub(super) current: usize,
    /// Living connections that found the table full.
    pub(super) untracked: u64,
    /// The same, as the dump under way finds them.
    pub(super) untracked_building: u64,
    pub(super) dump_began: Duration,
    /// When the last dump that was completed began.
    pub(super) last_dump: Duration,
    /// From one dump to the next.
    pub(super) dump_gap: Duration,
    pub(super) draining: Vec<u32>,
}

impl FlowTable {
    /// `max`: records held at most.
    pub fn new(layout: MarkLayout, max: usize) -> Self {
        Self {
            layout,
            max,
            flows: HashMap::default(),
            tallies: Tallies::default(),
            changed: Vec::new(),
            ended: Vec::new(),
            silent: Vec::new(),
            timers: Timers::default(),
            counts: Counts::default(),
            stale: true,
            lost_before: 0,
            dumping: 0,
            generation: 0,
            current: 0,
            untracked: 0,
            untracked_building: 0,
            dump_began: Duration::ZERO,
            last_dump: Duration::ZERO,
            dump_gap: Duration::ZERO,
            draining: Vec::new(),
        }
    }

    pub fn layout(&self) -> MarkLayout {
        self.layout
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// True until a full dump has healed what lost events left behind.
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// Records, lingering ones too.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Records that are not ended.
    pub fn active(&self) -> u64 {
        self.tallies.values().map(|tally| tally.active).sum()
    }

    /// Living connections that found the table full.
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// The most records the table will hold.
    pub fn capacity(&self) -> usize {
        self.max
    }

    pub fn get(&self, id: FlowId) -> Option<&Record> {
        self.flows.get(&id).map(Box::as_ref)
    }

    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.flows.values().map(Box::as_ref)
    }

    pub fn tally(&self, route: u32) -> Option<&RouteTally> {
        self.tallies.get(&route)
    }

    pub fn tallies(&self) -> impl Iterator<Item = (u32, &RouteTally)> {
        self.tallies.iter().map(|(id, tally)| (*id, tally))
    }

    /// The routes whose tally has changed since the last call.
    pub fn take_changed(&mut self) -> Vec<u32> {
        for id in &self.changed {
            if let Some(tally) = self.tallies.get_mut(id) {
                tally.changed = false;
            }
        }
        std::mem::take(&mut self.changed)
    }

    /// Moves the connections that ended since the last call, with their final numbers, to the end of `into`.
    pub fn take_ended(&mut self, into: &mut Vec<Ended>) {
        into.append(&mut self.ended);
    }

    /// Those that have been silent for [`RouteInfo::idle_warning`] since the last call; each silence is told once.
    pub fn take_silent(&mut self) -> Vec<FlowId> {
        std::mem::take(&mut self.silent)
    }

    /// Takes the new set of routes. What is left of routes that are gone is ended as drained; the entries to cut are
    /// returned.
    pub fn set_routes(&mut self, routes: &RouteTable, now: Now) -> Vec<EntryKey> {
        let gone: Vec<u32> = self.tallies.keys().filter(|id| !routes.contains_key(id)).copied().collect();
        let changed: Vec<(u32, Arc<RouteInfo>)> = routes.iter().map(|(id, info)| (*id, Arc::clone(info))).collect();
        self.change_routes(&changed, &gone, now)
    }

    /// Adds or replaces some routes and forgets others, as [`Self::set_routes`] does with all.
    pub fn change_routes(&mut self, changed: &[(u32, Arc<RouteInfo>)], gone: &[u32], now: Now) -> Vec<EntryKey> {
        let renamed =
            changed.iter().filter(|(id, info)| self.tallies.get(id).is_some_and(|t| t.info.name != info.name));
        let gone: Vec<u32> = renamed.map(|(id, _)| *id).chain(gone.iter().copied()).collect();
        let cuts = if gone.is_empty() { Vec::new() } else { self.forget_routes(&gone, now) };
        let touched: HashSet<u32> = changed.iter().map(|(id, _)| *id).chain(gone).collect();
        self.draining.retain(|id| !touched.contains(id));
        for (id, info) in changed {
            if info.drain_until.is_some() {
                self.draining.push(*id);
            }
            match self.tallies.get_mut(id) {
                Some(tally) => tally.info = Arc::clone(info),
                None => {
                    self.tallies.insert(*id, RouteTally::new(Arc::clone(info)));
                    self.changed.push(*id);
                }
            }
        }
        cuts
    }

    fn forget_routes(&mut self, gone: &[u32], now: Now) -> Vec<EntryKey> {
        let ids: Vec<FlowId> =
            self.flows.values().filter(|record| gone.contains(&record.route)).map(|record| record.id).collect();
        let mut cuts = Vec::new();
        for id in ids {
            cuts.extend(self.cut(id, Reason::Drained, now));
            self.remove(id, None, now);
        }
        for id in gone {
            self.tallies.remove(id);
        }
        cuts
    }

    /// Takes one event. Entries of other marks and unknown routes are ignored.
    pub fn apply(&mut self, event: &Event, now: Now) {
        self.counts.events += 1;
        match event {
            Event::New(entry) => self.on_new(entry, now),
            Event::Update(entry) => self.on_update(entry, now),
            Event::Destroy(entry) => self.on_destroy(entry, now),
            Event::Lost => {
                self.counts.lost += 1;
                self.stale = true;
            }
        }
    }

    fn on_new(&mut self, entry: &Entry, now: Now) {
        let id = FlowId::of(entry);
        let now = now.back_to(entry.event_ns);
        if let Some(record) = self.flows.get_mut(&id)
            && record.adopted_by.take().is_some_and(|dump| dump.get() == self.dumping as u16)
        {
            return;
        }
        match self.flows.get(&id).map(|record| record.state) {
            // The id is given again and the end of its former owner was lost.
            Some(State::Closing { .. }) => self.remove(id, None, now),
            // The kernel does not say it twice.
            Some(State::Dialing | State::Established | State::HalfClosed { .. }) => return,
            None => {}
        }
        if self.is_full() && self.is_ours(entry) {
            self.counts.overflowed += 1;
            self.untracked += 1;
            self.untracked_building += 1;
            return;
        }
        self.insert(entry, now);
        if let Some(record) = self.flows.get_mut(&id) {
            record.start_told = true;
        }
        self.advance(id, entry, now);
    }

    fn on_update(&mut self, entry: &Entry, now: Now) {
        let id = FlowId::of(entry);
        let now = now.back_to(entry.event_ns);
        if self.flows.get(&id).is_some_and(|record| record.over_before) {
            self.end_is_told(id, entry);
        }
        if !self.flows.contains_key(&id) && !self.is_full() {
            self.insert(entry, now);
        }
        self.advance(id, entry, now);
    }

    fn on_destroy(&mut self, entry: &Entry, now: Now) {
        let id = FlowId::of(entry);
        match self.flows.get(&id) {
            Some(record) if !record.began_before(entry) => self.remove(id, Some(entry), now),
            // The id was given again, and nobody told that the former owner is gone.
            Some(_) => {
                self.remove(id, None, now);
                self.end_unknown(entry, now);
            }
            None => self.end_unknown(entry, now),
        }
    }

    /// The first dump was faster than the event: nobody has counted this connection yet.
    fn end_is_told(&mut self, id: FlowId, entry: &Entry) {
        let over = verdict::standing(entry, self.layout.end(entry.mark), State::Established);
        let Some(record) = self.flows.get_mut(&id).filter(|_| matches!(over, Standing::Over(_))) else { return };
        record.over_before = false;
        record.state = State::Established;
        if let Some(tally) = self.tallies.get_mut(&record.route) {
            // It is among the records already.
            tally.records = tally.records.saturating_sub(1);
            tally.began(record.backend);
        }
    }

    /// A connection that came and went between two dumps, or found the table full: counted, never held.
    fn end_unknown(&mut self, entry: &Entry, now: Now) {
        if !self.is_ours(entry) {
            return;
        }
        if !self.stale {
            self.untracked = self.untracked.saturating_sub(1);
        }
        self.insert(entry, now);
        self.remove(FlowId::of(entry), Some(entry), now);
    }

    pub(super) fn is_full(&self) -> bool {
        self.flows.len() >= self.max
    }

    pub(super) fn is_ours(&self, entry: &Entry) -> bool {
        self.layout.route_id(entry.mark).is_some_and(|route| self.tallies.contains_key(&route))
    }

    /// Adds a record for `entry`, if its route is known. Whether there is room is the caller's question.
    pub(super) fn insert(&mut self, entry: &Entry, now: Now) {
        let Some(route) = self.layout.route_id(entry.mark) else { return };
        let Some(tally) = self.tallies.get_mut(&route) else { return };
        let mut record = Record::new(entry, route, now);
        record.generation = self.generation;
        self.current += 1;
        tally.began(record.backend);
        touch(tally, route, &mut self.changed);
        self.timers.watch(&record, &tally.info);
        self.flows.insert(record.id, Box::new(record));
    }

    /// Adds a record for an entry that had ended before anybody watched: nobody knows whether it was counted then, so it is
    /// not counted now.
    pub(super) fn insert_over(&mut self, entry: &Entry, reason: Reason, now: Now) {
        let Some(route) = self.layout.route_id(entry.mark) else { return };
        let Some(tally) = self.tallies.get_mut(&route) else { return };
        let mut record = Record::new(entry, route, now);
        record.generation = self.generation;
        record.state = State::Closing { reason, ended: now.mono, reported: true };
        record.over_before = true;
        self.current += 1;
        tally.records += 1;
        self.flows.insert(record.id, Box::new(record));
    }

    /// Up to `most` ended and reported connections that the kernel may let go of early: first those whose backend remembers
    /// nothing, because the client finished first or somebody reset; then the oldest.
    pub fn lingering(&self, most: usize) -> Vec<EntryKey> {
        let rank = |record: &&Record| match record.state {
            State::Closing { reason, ended, reported: true } => Some((reason == Reason::FinishedBackendFirst, ended)),
            _ => None,
        };
        let mut over: Vec<_> = self.records().filter_map(|r| Some((rank(&r)?, r.key()))).collect();
        if over.len() > most {
            // In a flood there are a hundred thousand of them every two seconds, and their order does not matter.
            over.select_nth_unstable_by_key(most, |(rank, _)| *rank);
            over.truncate(most);
        }
        over.into_iter().map(|(_, key)| key).collect()
    }

    /// Moves a record to where the entry stands now.
    pub(super) fn advance(&mut self, id: FlowId, entry: &Entry, now: Now) {
        let Some(record) = self.flows.get_mut(&id) else { return };
        if !record.state.is_active() || self.layout.route_id(entry.mark) != Some(record.route) {
            return;
        }
        match verdict::standing(entry, self.layout.end(entry.mark), record.state) {
            Standing::Alive(state) => record.state = state,
            Standing::Over(reason) => {
                if let Some(tally) = self.tallies.get_mut(&record.route) {
                    close(record, tally, reason, now);
                    record.seen_ns = entry.event_ns.and_then(NonZeroU64::new).max(record.seen_ns);
                    touch(tally, record.route, &mut self.changed);
                }
            }
        }
    }

    /// Takes the record out; counts its end unless that was done, and reports it unless that was done.
    /// `last`: the entry as `Destroy` told it; `None` when the kernel lost it without a word.
    pub(super) fn remove(&mut self, id: FlowId, last: Option<&Entry>, now: Now) {
        let Some(mut record) = self.flows.remove(&id) else { return };
        self.current -= usize::from(record.generation == self.generation && self.current > 0);
        let Some(tally) = self.tallies.get_mut(&record.route) else { return };
        touch(tally, record.route, &mut self.changed);
        tally.records = tally.records.saturating_sub(1);
        let mut now = now;
        let mut reason = Reason::KernelExpired;
        if let Some(entry) = last {
            record.begin_as(entry, now);
            now = now.back_to(entry.stopped_ns.or(entry.event_ns));
            let moved = meter(&mut record, entry, tally);
            let since = if moved { self.last_dump.max(record.start) } else { record.silent_since };
            let idle = now.mono.saturating_sub(since);
            let end = self.layout.end(entry.mark);
            reason = verdict::destroyed(entry, end, &record, &tally.info, idle, self.dump_gap);
        }
        if record.state.is_active() {
            close(&mut record, tally, reason, now);
        }
        report(&mut record, tally, now, &mut self.ended);
    }
}

/// Marks the tally for the next [`FlowTable::take_changed`].
pub(super) fn touch(tally: &mut RouteTally, route: u32, changed: &mut Vec<u32>) {
    if !tally.changed {
        tally.changed = true;
        changed.push(route);
    }
}

/// Counts the end of an active connection.
pub(super) fn close(record: &mut Record, tally: &mut RouteTally, reason: Reason, now: Now) {
    tally.ended(record.backend, reason);
    record.state = State::Closing { reason, ended: now.mono, reported: false };
}

/// Hands out the final numbers of a closing record, once. Its age is among them: an event that tells an end does not tell
/// the beginning.
pub(super) fn report(record: &mut Record, tally: &mut RouteTally, now: Now, into: &mut Vec<Ended>) {
    let State::Closing { reason, ended, reported: false } = record.state else { return };
    record.state = State::Closing { reason, ended, reported: true };
    let duration = ended.saturating_sub(record.start);
    tally.was(duration);
    into.push(Ended {
        id: record.id,
        route: Arc::clone(&tally.info.name),
        protocol: record.protocol,
        client: record.client,
        listen: record.listen,
        backend: record.backend,
        reason,
        at: now.wall.saturating_sub(now.mono.saturating_sub(ended)),
        duration,
        traffic_in: record.traffic_in,
        traffic_out: record.traffic_out,
        metered: record.metered,
    });
}

/// Takes the entry's counters over. True when they have moved.
pub(super) fn meter(record: &mut Record, entry: &Entry, tally: &mut RouteTally) -> bool {
    let (Some(inward), Some(outward)) = (entry.traffic_in, entry.traffic_out) else {
        record.metered = false;
        return false;
    };
    record.metered = true;
    let moved_in = grow(&mut record.traffic_in, inward, &mut tally.traffic_in);
    let moved_out = grow(&mut record.traffic_out, outward, &mut tally.traffic_out);
    moved_in || moved_out
}

/// Counters only grow: what is behind is old news.
fn grow(known: &mut Traffic, told: Traffic, total: &mut Traffic) -> bool {
    let packets = told.packets.saturating_sub(known.packets);
    let bytes = told.bytes.saturating_sub(known.bytes);
    known.packets += packets;
    known.bytes += bytes;
    total.packets = total.packets.wrapping_add(packets);
    total.bytes = total.bytes.wrapping_add(bytes);
    packets > 0
}
