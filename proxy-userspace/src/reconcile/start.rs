//! Start: adopt what a daemon before this one left in the kernel, make it what the configuration wants, and verify.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use proxy_core::{
    capability::Capabilities,
    config::{Config, Engine, Route, RouteName},
    diff::{Assembly, Snapshot, diff},
    flow::MarkLayout,
    plan::{RoutePlan, plan},
    pool::Pool,
    ruleset::{Key, KeyPart, Ruleset, draining, names, skeleton},
    view,
};

use super::{
    Carriers, DRAIN_OF_ADOPTED, Drain, Effect, Ids, Outcome, ReconcileError, Reconciler, Sockets, relay,
    table::mark_of, without_routes,
};
use crate::{
    kernel::nft::{Nft, NftError},
    stream::{self, Streams},
};

/// What was found at start.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// Routes whose marks, counters and connections go on.
    pub routes: usize,
    /// Routes that the configuration no longer has: they drain.
    pub draining: usize,
}

/// The kernel as it was found, for [`Reconciler::install`].
#[derive(Debug)]
pub struct Found {
    began: Instant,
    snapshot: Snapshot,
    pub adopted: Adopted,
    /// The routes that the kernel serves or has connections of, with their ids.
    pub serves: Vec<(u32, Arc<Route>)>,
}

impl<N: Nft, S: Streams> Reconciler<N, S> {
    /// Plans `config` and reads what the kernel holds. Changes nothing: [`Self::install`] does.
    ///
    /// `nft`: `None` where `capabilities` have none.
    pub fn open(
        nft: Option<N>,
        streams: S,
        config: Config,
        capabilities: Capabilities,
        now: Instant,
    ) -> Result<(Self, Found), ReconcileError> {
        let began = Instant::now();
        let layout = MarkLayout::new(config.kernel.mark_mask);
        let plan = plan(&config, &capabilities);
        let unserved = plan.unserved();
        if !unserved.is_empty() {
            return Err(ReconcileError::Unserved(unserved));
        }
        let mut reconciler = Self {
            nft,
            table: false,
            streams: Some(streams),
            sockets: Sockets::default(),
            capabilities,
            config: without_routes(config),
            plan,
            assembly: Assembly::new(skeleton(layout)),
            ids: Ids::new(layout),
            served: HashMap::new(),
            draining: Default::default(),
            last_counters: HashMap::new(),
            last_whole: None,
            status: view::ReconcileStatus::default(),
            ejecting: HashSet::new(),
            unpublished: true,
        };
        let snapshot = match &mut reconciler.nft {
            Some(nft) => nft.snapshot()?,
            None => Snapshot::default(),
        };
        reconciler.table = snapshot.table.is_some();
        if snapshot.table.is_some_and(|t| t.owned_by_other) {
            return Err(NftError::OwnedByOther.into());
        }
        let adopted = reconciler.adopt(&snapshot, now);
        let plans = reconciler.plan.routes().to_vec();
        reconciler.obtain_ids(&plans)?;
        let id = |plan: &Arc<RoutePlan>| {
            let id = reconciler.ids.id(&plan.route.name)?;
            let kernel = plan.engine == Some(Engine::Nft) || reconciler.was_forwarded(id, &snapshot);
            kernel.then(|| (id, Arc::clone(&plan.route)))
        };
        let serves = plans.iter().filter_map(id).collect();
        Ok((reconciler, Found { began, snapshot, adopted, serves }))
    }

    /// Takes the ids over that live connections carry in their marks, if the table is of this build's shape and mask.
    fn adopt(&mut self, snapshot: &Snapshot, now: Instant) -> Adopted {
        let mut adopted = Adopted::default();
        let Some(nft) = &self.nft else { return adopted };
        let same_marks = skeleton(self.ids.layout()).chains.get("track").is_some_and(|track| {
            let rules: Vec<_> = track.rules.iter().map(|rule| nft.fingerprint(rule)).collect();
            snapshot.chains.get("track").is_some_and(|chain| chain.rules == rules)
        });
        if !same_marks {
            return adopted;
        }
        let configured: HashSet<RouteName> = self.plan.routes().iter().map(|r| r.route.name.clone()).collect();
        let known = snapshot.sets.get(names::CONNECTIONS).into_iter().flat_map(|set| &set.elements);
        for (key, element) in known {
            let name = element.comment.as_deref().and_then(RouteName::new);
            let id = mark_of(key).and_then(|mark| self.ids.layout().route_id(mark));
            let (Some(name), Some(id)) = (name, id) else { continue };
            if !self.ids.adopt(&name, id) {
                continue;
            }
            if configured.contains(&name) {
                adopted.routes += 1;
            } else {
                adopted.draining += 1;
                let (deadline, carriers) = (now + DRAIN_OF_ADOPTED, Carriers { kernel: true, daemon: false });
                self.draining.insert(id, Drain { name, deadline, engine: Engine::Nft, carriers });
            }
        }
        adopted
    }

    /// The table that was found has a route with this id.
    fn was_forwarded(&self, id: u32, found: &Snapshot) -> bool {
        let key = Key::new(&[KeyPart::Mark(self.mark(id))]);
        found.sets.get(names::CONNECTIONS).is_some_and(|set| set.elements.contains_key(&key))
    }

    /// Makes the kernel's table and the listen sockets what the configuration wants. On an error the kernel is as it was.
    pub fn install(&mut self, found: &Found) -> Result<Outcome, ReconcileError> {
        let mut outcome = Outcome::default();
        let refused_before = found.snapshot.sets.get(names::NO_BACKEND);
        let mut whole = self.assembly.whole();
        let mut change = stream::Change::default();
        for plan in self.plan.routes().to_vec() {
            let Some(id) = self.ids.id(&plan.route.name) else { continue };
            let counts_no_backend =
                refused_before.is_some_and(|set| set.elements.contains_key(&Key::new(&[KeyPart::Mark(self.mark(id))])));
            let before = Carriers { kernel: self.was_forwarded(id, &found.snapshot), daemon: false };
            let served = self.make(id, &plan, Pool::new(&plan.route), counts_no_backend, before);
            let fragment = self.fragment(&served);
            self.assembly.add(&fragment);
            whole.add(fragment);
            if served.carriers.daemon {
                change.routes.push(relay::spec(&served));
            }
            outcome.added.push(plan.route.name.clone());
            self.served.insert(plan.route.name.clone(), served);
        }
        for (&id, drain) in &self.draining {
            let fragment = draining(&drain.name, self.mark(id));
            self.assembly.add(&fragment);
            whole.add(fragment);
            let (name, deadline) = (drain.name.clone(), drain.deadline);
            outcome.effects.push(Effect::Drain { id, name, deadline });
        }
        let sockets = self.sockets.changes(&[], self.plan.routes(), &self.ids);
        change.ports = sockets.clone();
        let prepared = match &mut self.streams {
            Some(streams) if !relay::is_empty(&change) => Some(streams.prepare(change)?),
            Some(_) | None => None,
        };
        outcome.changes = self.equalize(whole.finish(), &found.snapshot)?;
        if let (Some(streams), Some(prepared)) = (&mut self.streams, prepared) {
            streams.commit(prepared);
        }
        self.sockets.take_over(sockets);
        outcome.apply = found.began.elapsed();
        self.status.last_apply_ms = view::milliseconds(outcome.apply);
        self.status.last_changes = outcome.changes;
        self.status.ok = 1;
        Ok(outcome)
    }

    /// The number of messages it took. A configuration without a route for it makes no table.
    fn equalize(&mut self, wanted: Ruleset, snapshot: &Snapshot) -> Result<usize, NftError> {
        let ownership = self.ownership(false);
        let needed = self.table || self.plan.uses_nft();
        let Some(nft) = self.nft.as_mut().filter(|_| needed) else { return Ok(0) };
        let changes = diff(wanted, snapshot, ownership, |rule| nft.fingerprint(rule));
        if !changes.is_empty() {
            nft.apply(&changes)?;
        }
        self.table = true;
        Ok(changes.len())
    }

    /// Reads the table back and compares it with what was asked for: the number of differences, 0 when all is well.
    pub fn verify(&mut self) -> Result<usize, NftError> {
        let ownership = self.ownership(true);
        let wanted = self.wanted();
        let Some(nft) = self.nft.as_mut().filter(|_| self.table) else { return Ok(0) };
        let snapshot = nft.snapshot()?;
        Ok(diff(wanted, &snapshot, ownership, |rule| nft.fingerprint(rule)).len())
    }
}
