//! Dumps: live counters, and what events have missed.

use std::{
    num::{NonZeroU16, NonZeroU64},
    time::Duration,
};

use super::{
    record::{FlowId, Now, Record, State},
    table::{FlowTable, meter, report, touch},
    verdict::{Standing, standing},
};
use crate::conntrack::Entry;

/// Which entries a dump has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DumpKind {
    /// All of shunt's, ended ones too. Only such a dump can show that an entry is gone.
    Full,
    /// Those not ended.
    Live,
}

/// A connection's last packets (the final ACK) pass within this time of its end; a dump after it has the final numbers.
const SETTLED: Duration = Duration::from_secs(1);

impl FlowTable {
    /// A dump begins. `next`: when the one after it is due ([`Now::mono`]).
    pub fn begin_dump(&mut self, kind: DumpKind, next: Duration, now: Now) {
        self.timers.restart(next);
        self.dumping = self.dumping.wrapping_add(1);
        self.lost_before = self.counts.lost;
        self.dump_began = now.mono;
        self.dump_gap = next.saturating_sub(now.mono);
        if kind == DumpKind::Full {
            self.generation = self.generation.wrapping_add(1);
            self.current = 0;
            self.untracked_building = 0;
        }
        for tally in self.tallies.values_mut().filter(|tally| tally.active > 0) {
            tally.oldest_building = None;
        }
    }

    /// One entry of the dump.
    pub fn observe(&mut self, entry: &Entry, now: Now) {
        let id = FlowId::of(entry);
        if self.flows.get(&id).is_some_and(|record| self.is_another(record, entry)) {
            if !self.stale {
                // The id was given again; the events that say so are still in the socket.
                self.keep(id);
                return;
            }
            self.remove(id, None, now);
        }
        let adopted = !self.flows.contains_key(&id);
        if adopted {
            if self.is_full() {
                self.untracked_building += u64::from(self.is_ours(entry));
                return;
            }
            let end = self.layout.end(entry.mark);
            if self.generation <= 1
                && let Standing::Over(reason) = standing(entry, end, State::Established)
            {
                self.insert_over(entry, reason, now);
                return;
            }
            self.insert(entry, now);
            self.adopt(id, entry, now);
        }
        self.keep(id);
        self.advance(id, entry, now);
        let Some(record) = self.flows.get_mut(&id) else { return };
        let Some(tally) = self.tallies.get_mut(&record.route) else { return };
        if !record.start_told {
            record.begin_as(entry, now);
        }
        record.seen_ns = record.seen_ns.or(entry.started_ns.and_then(NonZeroU64::new));
        record.expires = entry.timeout.map(|left| now.mono + Duration::from_secs(left.into()));
        if meter(record, entry, tally) && !adopted {
            record.last_activity = now.mono;
            record.silent_since = self.last_dump.max(record.start);
            record.warned = false;
        }
        match record.state {
            State::Closing { ended, .. } => {
                if now.mono.saturating_sub(ended) >= SETTLED {
                    report(record, tally, now, &mut self.ended);
                    touch(tally, record.route, &mut self.changed);
                }
            }
            State::Dialing | State::Established | State::HalfClosed { .. } => {
                let oldest = tally.oldest_building.get_or_insert(record.start);
                *oldest = record.start.min(*oldest);
                let silent_for = |after| now.mono.saturating_sub(record.last_activity) >= after;
                // What an adopted flow's silence was is a guess until the next dump.
                let known = record.adopted_by != NonZeroU16::new(self.dumping as u16);
                if known && !record.warned && tally.info.idle_warning.is_some_and(silent_for) {
                    record.warned = true;
                    self.silent.push(id);
                }
                self.timers.watch(record, &tally.info);
                // Its bytes, and its age, are news.
                touch(tally, record.route, &mut self.changed);
            }
        }
    }

    /// Whether the entry is a later connection under the record's id: it began later, counts less, or lives where the record
    /// has ended.
    fn is_another(&self, record: &Record, entry: &Entry) -> bool {
        let lives = || matches!(standing(entry, self.layout.end(entry.mark), record.state), Standing::Alive(_));
        record.began_before(entry) || record.is_ahead_of(entry) || !record.state.is_active() && lives()
    }

    /// The record is in this dump.
    fn keep(&mut self, id: FlowId) {
        if let Some(record) = self.flows.get_mut(&id)
            && record.generation != self.generation
        {
            record.generation = self.generation;
            self.current += 1;
        }
    }

    /// An adopted flow has been silent for as long as its timeout has run, but no longer than it lives: the kernel begins a shorter
    /// timeout than the route's while data is unacknowledged (`nf_conntrack_tcp_timeout_unacknowledged`).
    fn adopt(&mut self, id: FlowId, entry: &Entry, now: Now) {
        let Some(record) = self.flows.get_mut(&id) else { return };
        record.adopted_by = NonZeroU16::new(self.dumping as u16);
        let Some(tally) = self.tallies.get(&record.route).filter(|tally| tally.info.kernel_timeouts) else { return };
        let (Some(limit), Some(left)) = (tally.info.idle, entry.timeout) else { return };
        let idle = limit.saturating_sub(Duration::from_secs(u64::from(left)));
        let silent_since = now.mono.saturating_sub(idle);
        if !record.start_told {
            record.start = record.start.min(silent_since);
        }
        record.last_activity = silent_since.max(record.start);
        record.silent_since = record.last_activity;
    }

    /// The dump is over, and the events that were queued before its end have been applied. Records that the kernel no
    /// longer has are ended; without lost events only after two full dumps have missed them.
    pub fn end_dump(&mut self, kind: DumpKind, now: Now) {
        self.counts.dumps += 1;
        self.last_dump = self.dump_began;
        for tally in self.tallies.values_mut().filter(|tally| tally.active > 0) {
            tally.oldest = tally.oldest_building.take();
        }
        if kind == DumpKind::Live {
            return;
        }
        if self.current < self.flows.len() {
            self.sweep(now);
        }
        self.untracked = self.untracked_building;
        // Events lost while it ran are for the next one to heal.
        self.stale = self.counts.lost != self.lost_before;
    }

    fn sweep(&mut self, now: Now) {
        let generation = self.generation;
        let patience = if self.stale { 0 } else { 1 };
        let gone: Vec<FlowId> = self
            .flows
            .values()
            .filter(|record| generation.wrapping_sub(record.generation) > patience)
            .map(|record| record.id)
            .collect();
        for id in gone {
            self.remove(id, None, now);
        }
    }
}
