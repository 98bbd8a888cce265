//! What the flow table and the ruleset's counters add up to, for everybody to see.
//!
//! Only routes that changed are written anew: with 50,000 routes a snapshot made from nothing would cost more than
//! everything else the tracker does.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use proxy_core::{
    conntrack::Traffic,
    flow::{FlowTable, Now, RouteTally},
    reason::Reason,
    view,
};
use tokio::sync::watch;

use super::{KernelCounters, RouteCounters};
use crate::control::FlowState;

/// A change is written this many times: the snapshot written next is the one before last, and a rate that falls back to
/// zero shows one interval after its cause.
const ROUNDS: usize = 3;

#[derive(Debug)]
pub struct Publisher {
    out: watch::Sender<Arc<FlowState>>,
    /// The snapshot before the one that is out: written next, if nobody holds it any more.
    spare: Arc<FlowState>,
    counters: HashMap<u32, RouteCounters>,
    rates: HashMap<u32, Rates>,
    /// When the records were last looked at.
    sampled: Duration,
    /// Routes with a connection then.
    active: Vec<u32>,
    /// Routes to write, by round.
    changed: [HashSet<u32>; ROUNDS],
    /// Names no longer routed, and in how many snapshots they may still be.
    gone: Vec<(Arc<str>, usize)>,
}

/// A route's totals when they were last looked at, and how fast they grew until then.
#[derive(Debug, Clone, Copy, Default)]
struct Rates {
    totals: [u64; 3],
    /// When that was.
    at: Duration,
    per_second: [f64; 3],
}

impl Rates {
    fn sample(&mut self, totals: [u64; 3], now: Duration) {
        let seconds = now.saturating_sub(self.at).as_secs_f64();
        // Two samples at once say nothing about speed.
        if seconds < 0.001 {
            return;
        }
        for ((rate, new), old) in self.per_second.iter_mut().zip(totals).zip(self.totals) {
            *rate = new.saturating_sub(old) as f64 / seconds;
        }
        self.totals = totals;
        self.at = now;
    }

    const fn from(totals: [u64; 3], at: Duration) -> Self {
        Self { totals, at, per_second: [0.0; 3] }
    }

    fn moving(&self) -> bool {
        self.per_second.iter().any(|rate| *rate > 0.0)
    }
}

impl Publisher {
    pub fn new(out: watch::Sender<Arc<FlowState>>) -> Self {
        Self {
            out,
            spare: Arc::default(),
            counters: HashMap::new(),
            rates: HashMap::new(),
            sampled: Duration::ZERO,
            active: Vec::new(),
            changed: Default::default(),
            gone: Vec::new(),
        }
    }

    /// These routes are no longer there.
    pub fn forget(&mut self, routes: impl IntoIterator<Item = (u32, Arc<str>)>) {
        for (id, name) in routes {
            self.counters.remove(&id);
            self.rates.remove(&id);
            self.gone.push((name, ROUNDS));
        }
    }

    pub fn counters(&mut self, told: KernelCounters, now: Now) {
        for (id, counters) in told.routes {
            let totals = [counters.connections, counters.traffic_in.bytes, counters.traffic_out.bytes];
            let known = self.counters.get(&id);
            match self.rates.get_mut(&id).filter(|_| known.is_some()) {
                Some(rates) if known == Some(&counters) && !rates.moving() => {
                    rates.at = now.mono;
                    continue;
                }
                Some(rates) => rates.sample(totals, now.mono),
                None => {
                    self.rates.insert(id, Rates::from(totals, now.mono));
                }
            }
            self.changed[0].insert(id);
            self.counters.insert(id, counters);
        }
    }

    /// After a dump: routes without counters of their own take their rates from the records.
    pub fn sample(&mut self, table: &FlowTable, changed: impl IntoIterator<Item = u32>, now: Now) {
        let since = std::mem::replace(&mut self.sampled, now.mono);
        self.changed[0].extend(changed);
        self.active = table.tallies().filter(|(_, tally)| tally.active > 0).map(|(id, _)| id).collect();
        let moving = self.rates.iter().filter(|(_, rates)| rates.moving()).map(|(id, _)| *id);
        let ids: HashSet<u32> = moving.chain(self.changed[0].iter().copied()).collect();
        for id in ids {
            let Some(tally) = table.tally(id).filter(|_| !self.counters.contains_key(&id)) else { continue };
            let totals = [tally.seen, tally.traffic_in.bytes, tally.traffic_out.bytes];
            // What the first dump adopts has not come just now.
            let start = if since.is_zero() { totals } else { [0; 3] };
            let rates = self.rates.entry(id).or_insert(Rates::from(start, since));
            // Unchanged until then, or it would have been looked at.
            rates.at = rates.at.max(since);
            rates.sample(totals, now.mono);
            self.changed[0].insert(id);
        }
    }

    /// Makes the next snapshot. `about` fills in what is not per route.
    pub fn publish(&mut self, table: &FlowTable, now: Now, about: impl FnOnce(&mut FlowState)) {
        let present = self.out.borrow().clone();
        let mut next = match Arc::try_unwrap(std::mem::replace(&mut self.spare, Arc::clone(&present))) {
            Ok(state) => state,
            // Somebody still reads it, or there is none yet.
            Err(_) => FlowState::clone(&present),
        };
        for (name, rounds) in &mut self.gone {
            *rounds -= 1;
            next.routes.remove(&**name);
            next.backends.remove(&**name);
            next.ages.remove(&**name);
        }
        self.gone.retain(|(_, rounds)| *rounds > 0);
        let changed: HashSet<u32> = self.changed.iter().flatten().copied().collect();
        for id in &changed {
            if let Some(tally) = table.tally(*id) {
                self.write(&mut next, *id, tally, now);
            }
        }
        let rising = self.rates.iter().filter(|(_, rates)| rates.moving()).map(|(id, _)| *id);
        let moving: HashSet<u32> = changed.into_iter().chain(rising).chain(self.active.iter().copied()).collect();
        next.moving = moving.into_iter().filter(|id| table.tally(*id).is_some()).collect();
        self.changed.rotate_right(1);
        self.changed[0].clear();
        about(&mut next);
        self.out.send_replace(Arc::new(next));
    }

    fn write(&self, state: &mut FlowState, id: u32, tally: &RouteTally, now: Now) {
        let name = &*tally.info.name;
        let stats = stats(tally, self.counters.get(&id), self.rates.get(&id), now);
        match state.routes.get_mut(name) {
            Some(known) => *known = stats,
            // Most of fifty thousand routes are silent: what is absent is zero.
            None if stats == view::RouteStats::default() => {}
            None => {
                state.routes.insert(name.into(), stats);
            }
        }
        match state.backends.get_mut(name) {
            Some(known) => known.clone_from(&tally.backends),
            None if tally.backends.is_empty() => {}
            None => {
                state.backends.insert(name.into(), tally.backends.clone());
            }
        }
        if let Some(ages) = tally.ages() {
            match state.ages.get_mut(name) {
                Some(known) => *known = *ages,
                None => {
                    state.ages.insert(name.into(), *ages);
                }
            }
        }
    }
}

fn stats(tally: &RouteTally, kernel: Option<&RouteCounters>, rates: Option<&Rates>, now: Now) -> view::RouteStats {
    let mut terminations: std::collections::BTreeMap<Reason, u64> =
        Reason::ALL.iter().map(|reason| (*reason, tally.terminated(*reason))).filter(|(_, count)| *count > 0).collect();
    for (reason, count) in kernel.iter().flat_map(|kernel| &kernel.refused).filter(|(_, count)| *count > 0) {
        *terminations.entry(*reason).or_default() += count;
    }
    // The kernel's counters know what was before this daemon; the records know what went with a table that somebody deleted.
    let more = |kernel: Option<Traffic>, records: Traffic| {
        kernel.filter(|kernel| kernel.bytes >= records.bytes).unwrap_or(records)
    };
    let inward = more(kernel.map(|kernel| kernel.traffic_in), tally.traffic_in);
    let outward = more(kernel.map(|kernel| kernel.traffic_out), tally.traffic_out);
    let [connections_rate, bytes_in_rate, bytes_out_rate] = rates.map_or([0.0; 3], |rates| rates.per_second);
    view::RouteStats {
        connections_active: tally.active,
        connections_total: kernel.map_or(0, |kernel| kernel.connections).max(tally.seen),
        bytes_in: inward.bytes,
        bytes_out: outward.bytes,
        packets_in: inward.packets,
        packets_out: outward.packets,
        connections_rate,
        bytes_in_rate,
        bytes_out_rate,
        terminations,
        oldest_seconds: tally.oldest.map_or(0.0, |start| now.mono.saturating_sub(start).as_secs_f64()),
    }
}
