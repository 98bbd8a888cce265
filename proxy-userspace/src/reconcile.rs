//! The owner of the routes and of shunt's table: what the configuration wants and what the kernel holds are made equal here.
//!
//! A reload is all or nothing: everything that can fail without the kernel is done first, and then one atomic batch.

pub mod announce;
mod backends;
mod ids;
mod start;
pub mod task;
pub mod views;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_core::{
    capability::Capabilities,
    config::{Config, Route, RouteName},
    diff::{Assembly, Ownership, Update, Updates, diff},
    flow::MarkLayout,
    plan::{Plan, Replan, RoutePlan, Unserved, replan},
    pool::Pool,
    ruleset::{Context, Fragment, Ruleset, draining, fragment, names},
    view,
};

use ids::Ids;
pub use ids::TooManyRoutes;

use crate::kernel::{
    memory,
    nft::{Nft, NftError},
};

/// How long connections of a route may last that nobody configures any more and whose own `drain` is not known.
const DRAIN_OF_ADOPTED: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Reconciler<N> {
    nft: N,
    capabilities: Capabilities,
    /// Without its routes: the plan has those.
    config: Config,
    plan: Plan,
    assembly: Assembly,
    ids: Ids,
    served: HashMap<RouteName, Served>,
    draining: BTreeMap<u32, Drain>,
    /// What the kernel's counters said last, to go on from after somebody deletes the table.
    last_counters: HashMap<u32, Counters>,
    status: view::ReconcileStatus,
    /// Routes with a host out of use for failed dials.
    ejecting: HashSet<RouteName>,
    /// Something that others are shown has changed.
    unpublished: bool,
}

/// A route the kernel serves.
#[derive(Debug)]
struct Served {
    id: u32,
    plan: Arc<RoutePlan>,
    pool: Pool,
    /// It has been without a backend once: its counter of refusals stays.
    counts_no_backend: bool,
    view: Arc<view::Route>,
}

/// A route that is gone from the configuration while connections may be left.
#[derive(Debug, Clone)]
pub struct Drain {
    pub name: RouteName,
    pub deadline: Instant,
}

/// Kernel counters of one route.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counters {
    pub connections: u64,
    pub inbound: proxy_core::ruleset::Counter,
    pub outbound: proxy_core::ruleset::Counter,
    pub refused: Vec<(proxy_core::reason::Reason, u64)>,
}

/// What the owner of the flow table must hear about.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Its connections may last until `deadline`.
    Drain { id: u32, name: RouteName, deadline: Instant },
    /// Nothing is left of it.
    Forget { id: u32 },
    /// A UDP backend takes no more packets: its conntrack entries would hold clients to it.
    DropUdp { id: u32, backends: Vec<IpAddr> },
}

#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Unserved(Vec<Unserved>),
    #[error(transparent)]
    TooManyRoutes(#[from] TooManyRoutes),
    #[error("{0} cannot change while the daemon runs: restart it")]
    NeedsRestart(&'static str),
    #[error(transparent)]
    Nft(#[from] NftError),
}

/// What an accepted change did.
#[derive(Debug, Default)]
pub struct Outcome {
    pub added: Vec<RouteName>,
    pub changed: Vec<RouteName>,
    pub removed: Vec<RouteName>,
    pub changes: usize,
    pub apply: Duration,
    pub effects: Vec<Effect>,
}

/// A change that is sound and has its ids, before the kernel hears of it: given to [`Reconciler::carry_out`].
#[derive(Debug)]
pub struct Prepared {
    began: Instant,
    config: Config,
    replan: Replan,
    next: Vec<Arc<RoutePlan>>,
    gone: Vec<Arc<RoutePlan>>,
    /// Ids given for it, to be given back when it fails.
    fresh: Vec<u32>,
    added: Vec<RouteName>,
    changed: Vec<RouteName>,
}

impl<N: Nft> Reconciler<N> {
    /// Everything about a new configuration that can fail without the kernel.
    pub fn prepare(&mut self, config: Config) -> Result<Prepared, ReconcileError> {
        let began = Instant::now();
        if config.kernel != self.config.kernel {
            return Err(ReconcileError::NeedsRestart("[kernel]"));
        }
        if config.admin != self.config.admin {
            return Err(ReconcileError::NeedsRestart("[admin]"));
        }
        let replan = replan(&config, &self.capabilities, &self.plan);
        let unserved = replan.unserved();
        if !unserved.is_empty() {
            return Err(ReconcileError::Unserved(unserved));
        }
        let (old, new) = (self.plan.replaced(&replan), &replan.routes);
        let kept: HashSet<&RouteName> = new.iter().map(|r| &r.route.name).collect();
        let gone = old.iter().filter(|r| !kept.contains(&r.route.name)).cloned().collect();
        let (mut next, mut added, mut changed) = (Vec::new(), Vec::new(), Vec::new());
        for route in new {
            match self.served.get(&route.route.name) {
                Some(served) if served.plan.route.fingerprint == route.route.fingerprint => continue,
                Some(_) => changed.push(route.route.name.clone()),
                None => added.push(route.route.name.clone()),
            }
            next.push(Arc::clone(route));
        }
        let fresh = self.obtain_ids(&next)?;
        Ok(Prepared { began, config, replan, next, gone, fresh, added, changed })
    }

    /// The routes that a prepared change serves anew, with their ids.
    pub fn serves(&self, prepared: &Prepared) -> Vec<(u32, Arc<Route>)> {
        let id = |plan: &Arc<RoutePlan>| Some((self.ids.id(&plan.route.name)?, Arc::clone(&plan.route)));
        prepared.next.iter().filter_map(id).collect()
    }

    /// Makes the kernel serve it. On an error nothing has changed, here or in the kernel.
    pub fn carry_out(&mut self, prepared: Prepared, now: Instant) -> Result<Outcome, ReconcileError> {
        let Prepared { began, config, replan, next, gone, fresh, added, changed } = prepared;
        let mut outcome = Outcome { added, changed, ..Outcome::default() };
        if let Err(error) = self.replace(&next, &gone, now, &mut outcome) {
            fresh.into_iter().for_each(|id| self.ids.release(id));
            return Err(error);
        }
        outcome.apply = began.elapsed();
        self.plan.put(replan);
        self.config = without_routes(config);
        self.status.last_apply_ms = outcome.apply.as_secs_f64() * 1e3;
        self.status.last_changes = outcome.changes;
        Ok(outcome)
    }

    /// Ids for routes that have none yet: the new ones, given back when the change fails.
    fn obtain_ids(&mut self, routes: &[Arc<RoutePlan>]) -> Result<Vec<u32>, TooManyRoutes> {
        let mut fresh = Vec::new();
        for route in routes {
            let name = &route.route.name;
            let known = self.ids.id(name).is_some();
            match self.ids.obtain(name) {
                Ok(id) if !known => fresh.push(id),
                Ok(_) => {}
                Err(error) => {
                    fresh.into_iter().for_each(|id| self.ids.release(id));
                    return Err(error);
                }
            }
        }
        Ok(fresh)
    }

    fn replace(
        &mut self,
        next: &[Arc<RoutePlan>],
        gone: &[Arc<RoutePlan>],
        now: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), ReconcileError> {
        let mut updates = Updates::new();
        let mut served = Vec::with_capacity(next.len());
        for plan in next {
            let old = self.served.get(&plan.route.name);
            let pool = Pool::updated(&plan.route, old.map(|s| &s.pool));
            let counts_no_backend = old.is_some_and(|s| s.counts_no_backend);
            let Some(id) = self.ids.id(&plan.route.name) else { continue };
            let made = self.make(id, plan, pool, counts_no_backend);
            updates.insert(id, Update { old: self.committed(id), new: self.fragment(&made) });
            served.push(made);
        }
        for plan in gone {
            if let Some(served) = self.served.get(&plan.route.name) {
                let mark = self.mark(served.id);
                let new = draining(&plan.route.name, mark);
                updates.insert(served.id, Update { old: self.fragment(served), new });
            }
        }
        outcome.changes = self.apply(&updates)?;
        self.unpublished = true;
        for made in served {
            self.draining.remove(&made.id);
            self.served.insert(made.plan.route.name.clone(), made);
        }
        for plan in gone {
            let Some(served) = self.served.remove(&plan.route.name) else { continue };
            let name = plan.route.name.clone();
            let deadline = now + plan.route.timeouts.drain;
            self.draining.insert(served.id, Drain { name: name.clone(), deadline });
            outcome.effects.push(Effect::Drain { id: served.id, name: name.clone(), deadline });
            outcome.removed.push(name);
        }
        Ok(())
    }

    fn make(&self, id: u32, plan: &Arc<RoutePlan>, pool: Pool, counts_no_backend: bool) -> Served {
        let view = Arc::new(views::route(plan, &pool, self.mark(id)));
        Served { id, plan: Arc::clone(plan), pool, counts_no_backend, view }
    }

    fn mark(&self, id: u32) -> u32 {
        self.ids.layout().route_mark(id).unwrap_or_default()
    }

    fn fragment(&self, served: &Served) -> Fragment {
        let endpoints = served.pool.endpoints();
        fragment(
            &served.plan,
            Context {
                mark: self.ids.layout(),
                own: self.mark(served.id),
                marks: &self.ids,
                endpoints: &endpoints,
                counts_no_backend: served.counts_no_backend,
            },
        )
    }

    /// The fragment of a route as it is in the kernel; empty for a route that is not there.
    fn committed(&self, id: u32) -> Fragment {
        if let Some(drain) = self.draining.get(&id) {
            return draining(&drain.name, self.mark(id));
        }
        let served = self.ids.name(id).and_then(|name| self.served.get(name));
        served.map(|served| self.fragment(served)).unwrap_or_default()
    }

    /// The table as it should be.
    fn wanted(&self) -> Ruleset {
        let served = self.served.values().map(|served| self.fragment(served));
        let draining = self.draining.iter().map(|(&id, drain)| draining(&drain.name, self.mark(id)));
        let mut whole = self.assembly.whole();
        served.chain(draining).for_each(|fragment| whole.add(fragment));
        whole.finish()
    }

    /// One atomic batch. The number of its messages.
    fn apply(&mut self, updates: &Updates) -> Result<usize, NftError> {
        let changes = self.assembly.changes(updates);
        let result = if changes.is_empty() { Ok(()) } else { self.nft.apply(&changes) };
        match result {
            Ok(()) => {
                self.assembly.commit(updates);
                self.status.ok += 1;
                self.status.last_error = None;
                Ok(changes.len())
            }
            Err(error) => {
                self.status.failed += 1;
                self.status.last_error = Some(error.to_string());
                Err(error)
            }
        }
    }

    /// Nothing is left of a route that was draining.
    pub fn drained(&mut self, id: u32) -> Result<Vec<Effect>, NftError> {
        if self.draining.contains_key(&id) {
            let update = Update { old: self.committed(id), new: Fragment::default() };
            self.apply(&Updates::from([(id, update)]))?;
            self.draining.remove(&id);
            self.ids.release(id);
            self.last_counters.remove(&id);
            self.unpublished = true;
            return Ok(vec![Effect::Forget { id }]);
        }
        Ok(Vec::new())
    }

    /// Compares the table with what it should be and mends it. True when there was something to mend.
    pub fn repair(&mut self) -> Result<bool, NftError> {
        let snapshot = self.nft.snapshot()?;
        let mut wanted = self.wanted();
        self.seed_counters(&mut wanted);
        let nft = &self.nft;
        let changes = diff(wanted, &snapshot, self.ownership(true), |rule| nft.fingerprint(rule));
        if changes.is_empty() {
            return Ok(false);
        }
        self.nft.apply(&changes)?;
        self.status.drift += 1;
        self.unpublished = true;
        Ok(true)
    }

    /// Nobody else can change the table.
    pub fn is_locked(&self) -> bool {
        self.ownership(true) == Ownership::Keep
    }

    /// `running`: the table is this process's already, if it is locked.
    fn ownership(&self, running: bool) -> Ownership {
        match (self.config.kernel.lock_table && self.capabilities.nft_owner_persist, running) {
            (false, _) => Ownership::Shared,
            (true, false) => Ownership::Take,
            (true, true) => Ownership::Keep,
        }
    }

    /// Counters of a table that somebody deleted go on from what was read last.
    fn seed_counters(&self, ruleset: &mut Ruleset) {
        let layout = self.ids.layout();
        let mut seed = |set: &str, of: &dyn Fn(&Counters) -> proxy_core::ruleset::Counter| {
            let Some(set) = ruleset.sets.get_mut(set) else { return };
            for (key, element) in &mut set.elements {
                let known = mark_of(key).and_then(|mark| self.last_counters.get(&layout.route_id(mark)?));
                element.counter = known.map(of).unwrap_or_default();
            }
        };
        let packets = |packets| proxy_core::ruleset::Counter { packets, bytes: 0 };
        seed(names::CONNECTIONS, &|c| packets(c.connections));
        seed(names::TRAFFIC_IN, &|c| c.inbound);
        seed(names::TRAFFIC_OUT, &|c| c.outbound);
        for (name, reason) in names::REFUSALS {
            seed(name, &|c| packets(c.refused.iter().find(|(r, _)| *r == reason).map_or(0, |&(_, n)| n)));
        }
    }

    /// What the kernel has counted, by route id; silent routes are left out.
    pub fn counters(&mut self) -> Result<&HashMap<u32, Counters>, NftError> {
        let layout = self.ids.layout();
        let mut all: HashMap<u32, Counters> = HashMap::with_capacity(self.last_counters.len());
        let mut read = |nft: &mut N, set: &str, put: &dyn Fn(&mut Counters, proxy_core::ruleset::Counter)| {
            let counted = |counter: &proxy_core::ruleset::Counter| counter.packets > 0;
            for (key, counter) in nft.counters(set)?.into_iter().filter(|(_, counter)| counted(counter)) {
                if let Some(id) = mark_of(&key).and_then(|mark| layout.route_id(mark)) {
                    put(all.entry(id).or_default(), counter);
                }
            }
            Ok::<(), NftError>(())
        };
        let nft = &mut self.nft;
        read(nft, names::CONNECTIONS, &|c, n| c.connections = n.packets)?;
        read(nft, names::TRAFFIC_IN, &|c, n| c.inbound = n)?;
        read(nft, names::TRAFFIC_OUT, &|c, n| c.outbound = n)?;
        for (name, reason) in names::REFUSALS {
            read(nft, name, &|c, n| c.refused.push((reason, n.packets)))?;
        }
        self.last_counters = all;
        Ok(&self.last_counters)
    }

    /// True once after each change that others should be shown.
    pub fn take_unpublished(&mut self) -> bool {
        std::mem::take(&mut self.unpublished)
    }

    pub fn route(&self, name: &RouteName) -> Option<Arc<Route>> {
        Some(Arc::clone(&self.served.get(name)?.plan.route))
    }

    /// What serves, in file order.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn layout(&self) -> MarkLayout {
        self.ids.layout()
    }

    /// Draining routes, by id.
    pub fn draining(&self) -> &BTreeMap<u32, Drain> {
        &self.draining
    }
}

fn mark_of(key: &proxy_core::ruleset::Key) -> Option<u32> {
    Some(u32::from_ne_bytes(key.bytes().try_into().ok()?))
}

/// The plan holds the routes; a second copy of fifty thousand of them is not kept. Letting go of them takes a while: elsewhere.
fn without_routes(mut config: Config) -> Config {
    let routes = std::mem::take(&mut config.routes);
    let work = move || {
        drop(routes);
        memory::give_back();
    };
    if let Err(error) = std::thread::Builder::new().name("drop".into()).spawn(work) {
        tracing::debug!(%error, "no thread");
    }
    config
}
