//! What the kernel has counted: with many routes, only those are asked for that may have moved.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use proxy_core::{
    flow::MarkLayout,
    ruleset::{Counter, Key, KeyPart, Ruleset, names},
};

use super::{Counters, Reconciler, table::mark_of};
use crate::{
    kernel::nft::{Nft, NftError},
    stream::Streams,
};

/// Up to so many elements are read whole, and of a larger table up to so many routes one by one.
const FEW: usize = 1000;
/// But the whole is read at least so often: a connection that is refused leaves no trace in conntrack, and the table of flows
/// can be full.
pub(super) const WHOLE: Duration = Duration::from_secs(20);

/// When a large table was read as a whole, and what there is to read in parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct WholeRead {
    at: Instant,
    /// Elements of the sets that count refusals.
    refusals: usize,
}

impl<N: Nft, S: Streams> Reconciler<N, S> {
    /// What the kernel has counted, by route id. `moving`: the routes that have connections or have had some lately. Routes
    /// that are silent, or were not asked for, are left out.
    pub fn counters(&mut self, moving: &[u32], now: Instant) -> Result<Vec<(u32, &Counters)>, NftError> {
        let layout = self.ids.layout();
        let Some(nft) = self.nft.as_mut().filter(|_| self.table) else { return Ok(Vec::new()) };
        let whole = self.last_whole.filter(|whole| now.saturating_duration_since(whole.at) < WHOLE);
        if let Some(whole) = whole.filter(|_| self.last_counters.len() > FEW || self.served.len() > FEW)
            && moving.len() <= FEW
            && let Ok(ids) = read_some(nft, layout, &mut self.last_counters, moving, whole.refusals <= FEW)
        {
            let counters = &self.last_counters;
            return Ok(ids.into_iter().filter_map(|id| Some((id, counters.get(&id)?))).collect());
        }
        let refusals = read_whole(nft, layout, &mut self.last_counters)?;
        self.last_whole = Some(WholeRead { at: now, refusals });
        Ok(self.last_counters.iter().map(|(id, counters)| (*id, counters)).collect())
    }
}

/// The number of elements that count refusals.
fn read_whole<N: Nft>(nft: &mut N, layout: MarkLayout, known: &mut HashMap<u32, Counters>) -> Result<usize, NftError> {
    let mut all: HashMap<u32, Counters> = HashMap::with_capacity(known.len());
    let mut refusals = 0;
    let mut read = |set: &str, put: &dyn Fn(&mut Counters, Counter)| {
        let counters = nft.counters(set)?;
        let elements = counters.len();
        for (key, counter) in counters.into_iter().filter(|(_, counter)| counter.packets > 0) {
            if let Some(id) = mark_of(&key).and_then(|mark| layout.route_id(mark)) {
                put(all.entry(id).or_default(), counter);
            }
        }
        Ok::<usize, NftError>(elements)
    };
    read(names::CONNECTIONS, &|c, n| c.connections = n.packets)?;
    read(names::TRAFFIC_IN, &|c, n| c.inbound = n)?;
    read(names::TRAFFIC_OUT, &|c, n| c.outbound = n)?;
    for (name, reason) in names::REFUSALS {
        refusals += read(name, &|c, n| c.refused.push((reason, n.packets)))?;
    }
    *known = all;
    Ok(refusals)
}

/// The routes that were read: `moving`, and those that have refused since. All or nothing.
fn read_some<N: Nft>(
    nft: &mut N,
    layout: MarkLayout,
    known: &mut HashMap<u32, Counters>,
    moving: &[u32],
    with_refusals: bool,
) -> Result<HashSet<u32>, NftError> {
    let mut read: HashMap<u32, Counters> = HashMap::new();
    let mut refused: HashMap<u32, Vec<_>> = HashMap::new();
    for (name, reason) in names::REFUSALS.iter().filter(|_| with_refusals) {
        for (key, counter) in nft.counters(name)?.into_iter().filter(|(_, counter)| counter.packets > 0) {
            if let Some(id) = mark_of(&key).and_then(|mark| layout.route_id(mark)) {
                refused.entry(id).or_default().push((*reason, counter.packets));
            }
        }
    }
    for (id, refused) in refused {
        if known.get(&id).map(|counters| &counters.refused) != Some(&refused) {
            read.insert(id, Counters { refused, ..Counters::default() });
        }
    }
    for id in moving {
        let refused = || known.get(id).map(|counters| counters.refused.clone()).unwrap_or_default();
        read.entry(*id).or_insert_with(|| Counters { refused: refused(), ..Counters::default() });
    }
    let key = |id: &u32| layout.route_mark(*id).map(|mark| Key::new(&[KeyPart::Mark(mark)]));
    let keys: Vec<Key> = read.keys().filter_map(key).collect();
    let mut take = |set: &str, put: &dyn Fn(&mut Counters, Counter)| {
        for (key, counter) in nft.some_counters(set, &keys)? {
            if let Some(counters) = mark_of(&key).and_then(|mark| read.get_mut(&layout.route_id(mark)?)) {
                put(counters, counter);
            }
        }
        Ok::<(), NftError>(())
    };
    take(names::CONNECTIONS, &|c, n| c.connections = n.packets)?;
    take(names::TRAFFIC_IN, &|c, n| c.inbound = n)?;
    take(names::TRAFFIC_OUT, &|c, n| c.outbound = n)?;
    let ids = read.keys().copied().collect();
    known.extend(read);
    Ok(ids)
}

/// Counters of a table that somebody deleted go on from what was read last.
pub(super) fn seed_counters(last: &HashMap<u32, Counters>, layout: MarkLayout, ruleset: &mut Ruleset) {
    let mut seed = |set: &str, of: &dyn Fn(&Counters) -> Counter| {
        let Some(set) = ruleset.sets.get_mut(set) else { return };
        for (key, element) in &mut set.elements {
            let known = mark_of(key).and_then(|mark| last.get(&layout.route_id(mark)?));
            element.counter = known.map(of).unwrap_or_default();
        }
    };
    let packets = |packets| Counter { packets, bytes: 0 };
    seed(names::CONNECTIONS, &|c| packets(c.connections));
    seed(names::TRAFFIC_IN, &|c| c.inbound);
    seed(names::TRAFFIC_OUT, &|c| c.outbound);
    for (name, reason) in names::REFUSALS {
        seed(name, &|c| packets(c.refused.iter().find(|(r, _)| *r == reason).map_or(0, |&(_, n)| n)));
    }
}
