//! The owner of the routes and of shunt's table: what the configuration wants and what the kernel holds are made equal here.
//!
//! A reload is all or nothing: everything that can fail without the kernel is done first, then the daemon's own listen
//! sockets are bound, then one atomic batch, and only then the sockets are served. What is given up goes in the same
//! order, so that a route that moves between engines is never without one.

pub mod announce;
mod backends;
mod counters;
mod ids;
mod relay;
mod start;
mod table;
pub mod task;
pub mod views;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_core::{
    capability::{Capabilities, FilterChain, Handoff},
    config::{Config, Engine, Route, RouteName},
    diff::{Assembly, Ownership, Update, Updates},
    flow::MarkLayout,
    plan::{Plan, Replan, RoutePlan, Unserved, replan},
    pool::Pool,
    ruleset::Fragment,
    view,
};

use ids::Ids;
pub use ids::TooManyRoutes;
use relay::Sockets;

use crate::{
    acme,
    kernel::{
        memory,
        nft::{Nft, NftError},
    },
    stream::{self, StreamError, Streams},
};

/// How long connections of a route may last that nobody configures any more and whose own `drain` is not known.
const DRAIN_OF_ADOPTED: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Reconciler<N, S> {
    /// `None`: not here, or not with these privileges; then no route of the plan needs it.
    nft: Option<N>,
    /// The table is in the kernel: from the first route that needs it until `shunt cleanup`.
    table: bool,
    /// `None` once it is stopping: nothing changes any more.
    streams: Option<S>,
    sockets: Sockets,
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
    last_whole: Option<counters::WholeRead>,
    status: view::ReconcileStatus,
    /// Routes with a host out of use for failed dials.
    ejecting: HashSet<RouteName>,
    /// Something that others are shown has changed.
    unpublished: bool,
}

/// A route that is served.
#[derive(Debug)]
struct Served {
    id: u32,
    plan: Arc<RoutePlan>,
    pool: Pool,
    carriers: Carriers,
    /// It has been without a backend once: its counter of refusals stays.
    counts_no_backend: bool,
    view: Arc<view::Route>,
}

/// Who may have connections of a route: a route that has changed its engine has connections of both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carriers {
    pub kernel: bool,
    pub daemon: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// As the owner of the flow table tells.
    Kernel,
    /// As the stream path tells.
    Daemon,
}

/// A route that is gone from the configuration while connections may be left.
#[derive(Debug, Clone)]
pub struct Drain {
    pub name: RouteName,
    pub deadline: Instant,
    pub engine: Engine,
    /// Those that have not yet told that nothing is left.
    pub carriers: Carriers,
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
    #[error(transparent)]
    Streams(#[from] StreamError),
    #[error("the daemon is stopping")]
    Stopping,
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

impl<N: Nft, S: Streams> Reconciler<N, S> {
    /// Whether the firewall is to be looked at before the configuration is prepared: what connections that are handed over do not
    /// pass decides how a route is served.
    pub fn could_hand_over(&self, config: &Config) -> bool {
        self.would(config, RoutePlan::could_hand_over)
    }

    pub fn learn_filter(&mut self, found: Option<FilterChain>) {
        self.capabilities.filter = found;
    }

    /// Whether the kernel is to be asked then, if connections can be handed over here.
    pub fn awaits_handoff(&self, config: &Config) -> bool {
        self.would(config, RoutePlan::awaits_handoff)
    }

    pub fn learn_handoff(&mut self, found: Handoff) {
        self.capabilities.handoff = found;
    }

    /// One of its routes, with what is known of this machine so far.
    fn would(&self, config: &Config, does: fn(&RoutePlan) -> bool) -> bool {
        let replan = replan(config, &self.capabilities, &self.plan);
        self.with(&replan).any(|route| does(route))
    }

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
                Some(served) if is_same(&served.plan, route) => continue,
                Some(_) => changed.push(route.route.name.clone()),
                None => added.push(route.route.name.clone()),
            }
            next.push(Arc::clone(route));
        }
        let fresh = self.obtain_ids(&next)?;
        Ok(Prepared { began, config, replan, next, gone, fresh, added, changed })
    }

    /// The routes that the kernel serves anew with a prepared change, or still has connections of, with their ids.
    pub fn serves(&self, prepared: &Prepared) -> Vec<(u32, Arc<Route>)> {
        let kernel = |plan: &&Arc<RoutePlan>| {
            let known = self.served.get(&plan.route.name).is_some_and(|served| served.carriers.kernel);
            plan.engine == Some(Engine::Nft) || known
        };
        let id = |plan: &Arc<RoutePlan>| Some((self.ids.id(&plan.route.name)?, Arc::clone(&plan.route)));
        prepared.next.iter().filter(kernel).filter_map(id).collect()
    }

    /// Every route as it will be with a prepared change.
    pub fn after<'a>(&'a self, prepared: &'a Prepared) -> impl Iterator<Item = &'a Arc<RoutePlan>> {
        self.with(&prepared.replan)
    }

    fn with<'a>(&'a self, replan: &'a Replan) -> impl Iterator<Item = &'a Arc<RoutePlan>> {
        let (plan, range) = (self.plan.routes(), &replan.range);
        let (before, behind) = (plan.get(..range.start), plan.get(range.end..));
        before.into_iter().flatten().chain(&replan.routes).chain(behind.into_iter().flatten())
    }

    /// A prepared change is not carried out.
    pub fn abandon(&mut self, prepared: Prepared) {
        prepared.fresh.into_iter().for_each(|id| self.ids.release(id));
    }

    /// Makes the kernel serve it. On an error nothing has changed, here or in the kernel.
    pub fn carry_out(&mut self, prepared: Prepared, now: Instant) -> Result<Outcome, ReconcileError> {
        let Prepared { began, config, replan, next, gone, fresh, added, changed } = prepared;
        let mut outcome = Outcome { added, changed, ..Outcome::default() };
        if let Err(error) = self.replace(&replan, &next, &gone, now, &mut outcome) {
            fresh.into_iter().for_each(|id| self.ids.release(id));
            return Err(error);
        }
        for plan in &replan.routes {
            // Also of those that are the same: the configuration before is not kept for them.
            if let Some(served) = self.served.get_mut(&plan.route.name) {
                served.plan = Arc::clone(plan);
            }
        }
        outcome.apply = began.elapsed();
        self.plan.put(replan);
        self.config = without_routes(config);
        self.status.last_apply_ms = view::milliseconds(outcome.apply);
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
        replan: &Replan,
        next: &[Arc<RoutePlan>],
        gone: &[Arc<RoutePlan>],
        now: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), ReconcileError> {
        let mut updates = Updates::new();
        let mut change = stream::Change::default();
        let mut served = Vec::with_capacity(next.len());
        for plan in next {
            let old = self.served.get(&plan.route.name);
            let pool = Pool::updated(&plan.route, old.map(|s| &s.pool));
            let counts_no_backend = old.is_some_and(|s| s.counts_no_backend);
            let Some(id) = self.ids.id(&plan.route.name) else { continue };
            let before = old.map(|s| s.carriers).or_else(|| self.draining.get(&id).map(|d| d.carriers));
            let made = self.make(id, plan, pool, counts_no_backend, before.unwrap_or_default());
            updates.insert(id, Update { old: self.committed(id), new: self.fragment(&made) });
            if made.carriers.daemon {
                change.routes.push(relay::spec(&made));
            }
            served.push(made);
        }
        for served in gone.iter().filter_map(|plan| self.served.get(&plan.route.name)) {
            let new = self.counted(&served.plan.route.name, served.id, served.carriers);
            updates.insert(served.id, Update { old: self.fragment(served), new });
            if served.carriers.daemon {
                change.gone.push(served.id);
            }
        }
        let sockets = self.sockets.changes(self.plan.replaced(replan), &replan.routes, &self.ids);
        change.ports = sockets.clone();
        let needs_table = served.iter().any(|made| made.plan.engine == Some(Engine::Nft));
        outcome.changes = self.apply(&updates, change, needs_table)?;
        self.sockets.take_over(sockets);
        self.unpublished = true;
        for made in served {
            self.draining.remove(&made.id);
            self.served.insert(made.plan.route.name.clone(), made);
        }
        for plan in gone {
            let Some(served) = self.served.remove(&plan.route.name) else { continue };
            let (id, name, carriers) = (served.id, plan.route.name.clone(), served.carriers);
            let deadline = now + plan.route.timeouts.drain;
            self.draining.insert(id, Drain { name: name.clone(), deadline, engine: served.view.engine, carriers });
            if carriers.kernel {
                outcome.effects.push(Effect::Drain { id, name: name.clone(), deadline });
            }
            outcome.removed.push(name);
        }
        Ok(())
    }

    /// `before`: who may have connections of it already.
    fn make(&self, id: u32, plan: &Arc<RoutePlan>, pool: Pool, counts_no_backend: bool, before: Carriers) -> Served {
        let carriers = Carriers {
            kernel: before.kernel || plan.engine == Some(Engine::Nft),
            daemon: before.daemon || plan.is_relayed(),
        };
        let mark = if carriers.kernel { self.mark(id) } else { 0 };
        let view = Arc::new(views::route(plan, &pool, mark));
        Served { id, plan: Arc::clone(plan), pool, carriers, counts_no_backend, view }
    }

    fn mark(&self, id: u32) -> u32 {
        self.ids.layout().route_mark(id).unwrap_or_default()
    }

    /// Nothing is left with one carrier of a route that was draining.
    pub fn drained(&mut self, id: u32, carrier: Carrier) -> Result<Vec<Effect>, ReconcileError> {
        let Some(drain) = self.draining.get(&id) else { return Ok(Vec::new()) };
        let left = match carrier {
            Carrier::Kernel => Carriers { kernel: false, ..drain.carriers },
            Carrier::Daemon => Carriers { daemon: false, ..drain.carriers },
        };
        let mut effects = Vec::new();
        if carrier == Carrier::Kernel {
            let update = Update { old: self.committed(id), new: Fragment::default() };
            self.apply(&Updates::from([(id, update)]), stream::Change::default(), false)?;
            self.last_counters.remove(&id);
            effects.push(Effect::Forget { id });
        }
        self.draining.entry(id).and_modify(|drain| drain.carriers = left);
        if left == Carriers::default() {
            self.draining.remove(&id);
            self.ids.release(id);
            self.streams.iter_mut().for_each(|streams| streams.forget(id));
        }
        self.unpublished = true;
        Ok(effects)
    }

    /// Resolves when the stream path serves what it was given last.
    pub async fn settled(&mut self) {
        if let Some(streams) = &mut self.streams {
            streams.settled().await;
        }
    }

    /// What the routes want of the CA.
    pub fn acme(&self) -> acme::Wanted {
        acme::Wanted::by(self.config.acme.as_ref(), self.plan.routes().iter().map(|plan| &plan.route))
    }

    /// Files of certificates may have changed though the configuration has not.
    pub fn look_at_certificates(&mut self) {
        self.streams.iter_mut().for_each(Streams::look_at_certificates);
    }

    /// The stream path, to be stopped; from here on nothing changes.
    pub fn take_streams(&mut self) -> Option<S> {
        self.streams.take()
    }

    /// The longest time that a relayed connection is let finish.
    pub fn longest_drain(&self) -> Duration {
        let relayed = self.served.values().filter(|served| served.carriers.daemon);
        relayed.map(|served| served.plan.route.timeouts.drain).max().unwrap_or_default()
    }

    /// Whether the table is in the kernel.
    pub fn has_table(&self) -> bool {
        self.table
    }

    /// Nobody else can change the table.
    pub fn is_locked(&self) -> bool {
        self.ownership(true) == Ownership::Keep
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

/// Nothing that is done for the route has changed. Who shares a port with a relayed route is a matter of the port: one more
/// name on a port of 50,000 does not change the others.
fn is_same(old: &RoutePlan, new: &RoutePlan) -> bool {
    let itself = old.route.own_fingerprint == new.route.own_fingerprint && old.refused == new.refused;
    let same = old.route.fingerprint == new.route.fingerprint || (old.is_relayed() && itself && same_listens(old, new));
    same && old.engine == new.engine
}

/// What the table has of it ([`passing`](proxy_core::ruleset::passing)) is the same.
fn same_listens(old: &RoutePlan, new: &RoutePlan) -> bool {
    let shared = |plan: &RoutePlan| plan.shared_listens.iter().map(|shared| shared.listen).collect::<Vec<_>>();
    let alone = |plan: &RoutePlan| plan.route.shares_port_with.is_empty();
    old.own_listens == new.own_listens && shared(old) == shared(new) && alone(old) == alone(new)
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

#[cfg(test)]
mod tests;
