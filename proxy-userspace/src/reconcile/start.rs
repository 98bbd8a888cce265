//! Start: adopt what a daemon before this one left in the kernel, make it what the configuration wants, and verify.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use proxy_core::{
    capability::Capabilities,
    config::{Config, Route, RouteName},
    diff::{Assembly, Snapshot, diff},
    flow::MarkLayout,
    plan::{RoutePlan, plan},
    pool::Pool,
    ruleset::{Key, KeyPart, Ruleset, draining, names, skeleton},
    view,
};

use super::{DRAIN_OF_ADOPTED, Drain, Effect, Ids, Outcome, ReconcileError, Reconciler, mark_of, without_routes};
use crate::kernel::nft::{Nft, NftError};

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
    /// The routes to be served, with their ids.
    pub serves: Vec<(u32, Arc<Route>)>,
}

impl<N: Nft> Reconciler<N> {
    /// Plans `config` and reads what the kernel holds. Changes nothing: [`Self::install`] does.
    pub fn open(
        nft: N,
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
            capabilities,
            config: without_routes(config),
            plan,
            assembly: Assembly::new(skeleton(layout)),
            ids: Ids::new(layout),
            served: HashMap::new(),
            draining: Default::default(),
            last_counters: HashMap::new(),
            status: view::ReconcileStatus::default(),
            ejecting: HashSet::new(),
            unpublished: true,
        };
        let snapshot = reconciler.nft.snapshot()?;
        if snapshot.table.is_some_and(|t| t.owned_by_other) {
            return Err(NftError::OwnedByOther.into());
        }
        let adopted = reconciler.adopt(&snapshot, now);
        let plans = reconciler.plan.routes().to_vec();
        reconciler.obtain_ids(&plans)?;
        let id = |plan: &Arc<RoutePlan>| Some((reconciler.ids.id(&plan.route.name)?, Arc::clone(&plan.route)));
        let serves = plans.iter().filter_map(id).collect();
        Ok((reconciler, Found { began, snapshot, adopted, serves }))
    }

    /// Takes the ids over that live connections carry in their marks, if the table is of this build's shape and mask.
    fn adopt(&mut self, snapshot: &Snapshot, now: Instant) -> Adopted {
        let mut adopted = Adopted::default();
        let same_marks = skeleton(self.ids.layout()).chains.get("track").is_some_and(|track| {
            let rules: Vec<_> = track.rules.iter().map(|rule| self.nft.fingerprint(rule)).collect();
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
                self.draining.insert(id, Drain { name, deadline: now + DRAIN_OF_ADOPTED });
            }
        }
        adopted
    }

    /// Makes the kernel's table the one the configuration wants. On an error the kernel is as it was.
    pub fn install(&mut self, found: &Found) -> Result<Outcome, ReconcileError> {
        let mut outcome = Outcome::default();
        let refused_before = found.snapshot.sets.get(names::NO_BACKEND);
        let mut whole = self.assembly.whole();
        for plan in self.plan.routes().to_vec() {
            let Some(id) = self.ids.id(&plan.route.name) else { continue };
            let counts_no_backend =
                refused_before.is_some_and(|set| set.elements.contains_key(&Key::new(&[KeyPart::Mark(self.mark(id))])));
            let served = self.make(id, &plan, Pool::new(&plan.route), counts_no_backend);
            let fragment = self.fragment(&served);
            self.assembly.add(&fragment);
            whole.add(fragment);
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
        outcome.changes = self.equalize(whole.finish(), &found.snapshot)?;
        outcome.apply = found.began.elapsed();
        self.status.last_apply_ms = outcome.apply.as_secs_f64() * 1e3;
        self.status.last_changes = outcome.changes;
        self.status.ok = 1;
        Ok(outcome)
    }

    /// The number of messages it took.
    fn equalize(&mut self, wanted: Ruleset, snapshot: &Snapshot) -> Result<usize, NftError> {
        let nft = &self.nft;
        let changes = diff(wanted, snapshot, self.ownership(false), |rule| nft.fingerprint(rule));
        if !changes.is_empty() {
            self.nft.apply(&changes)?;
        }
        Ok(changes.len())
    }

    /// Reads the table back and compares it with what was asked for: the number of differences, 0 when all is well.
    pub fn verify(&mut self) -> Result<usize, NftError> {
        let snapshot = self.nft.snapshot()?;
        let nft = &self.nft;
        let ownership = self.ownership(true);
        Ok(diff(self.wanted(), &snapshot, ownership, |rule| nft.fingerprint(rule)).len())
    }
}
