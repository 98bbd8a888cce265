//! Start: adopt what a daemon before this one left in the kernel, make it what the configuration wants, and verify.

use std::{collections::HashMap, time::Instant};

use proxy_core::{
    capability::Capabilities,
    config::{Config, RouteName},
    diff::{Assembly, Snapshot, Updates, diff},
    flow::MarkLayout,
    plan::plan,
    pool::Pool,
    ruleset::{draining, names, skeleton},
    view,
};

use super::{DRAIN_OF_ADOPTED, Drain, Effect, Ids, Outcome, ReconcileError, Reconciler, mark_of};
use crate::kernel::nft::{Nft, NftError};

/// What was found at start.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// Routes whose marks, counters and connections go on.
    pub routes: usize,
    /// Routes that the configuration no longer has: they drain.
    pub draining: usize,
}

impl<N: Nft> Reconciler<N> {
    /// Installs `config`. On an error the kernel is as it was.
    pub fn start(
        nft: N,
        config: Config,
        capabilities: Capabilities,
        now: Instant,
    ) -> Result<(Self, Outcome, Adopted), ReconcileError> {
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
            config,
            plan,
            assembly: Assembly::new(skeleton(layout)),
            ids: Ids::new(layout),
            served: HashMap::new(),
            draining: Default::default(),
            last_counters: HashMap::new(),
            status: view::ReconcileStatus::default(),
            unpublished: true,
        };
        let snapshot = reconciler.nft.snapshot()?;
        if snapshot.table.is_some_and(|t| t.owned_by_other) {
            return Err(NftError::OwnedByOther.into());
        }
        let adopted = reconciler.adopt(&snapshot, now);
        let mut outcome = reconciler.install(&snapshot)?;
        outcome.apply = began.elapsed();
        reconciler.status.last_apply_ms = outcome.apply.as_secs_f64() * 1e3;
        reconciler.status.last_changes = outcome.changes;
        reconciler.status.ok = 1;
        Ok((reconciler, outcome, adopted))
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
        let configured: HashMap<&RouteName, ()> = self.config.routes.iter().map(|r| (&r.name, ())).collect();
        let known = snapshot.sets.get(names::CONNECTIONS).into_iter().flat_map(|set| &set.elements);
        for (key, element) in known {
            let name = element.comment.as_deref().and_then(RouteName::new);
            let id = mark_of(key).and_then(|mark| self.ids.layout().route_id(mark));
            let (Some(name), Some(id)) = (name, id) else { continue };
            if !self.ids.adopt(&name, id) {
                continue;
            }
            if configured.contains_key(&name) {
                adopted.routes += 1;
            } else {
                adopted.draining += 1;
                self.draining.insert(id, Drain { name, deadline: now + DRAIN_OF_ADOPTED });
            }
        }
        adopted
    }

    fn install(&mut self, snapshot: &Snapshot) -> Result<Outcome, ReconcileError> {
        let mut outcome = Outcome::default();
        let plans = self.plan.routes.clone();
        self.obtain_ids(&plans)?;
        let refused_before = snapshot.sets.get(names::NO_BACKEND);
        let mut updates = Updates::new();
        for plan in &plans {
            let Some(id) = self.ids.id(&plan.route.name) else { continue };
            let key = proxy_core::ruleset::Key::new(&[proxy_core::ruleset::KeyPart::Mark(self.mark(id))]);
            let counts_no_backend = refused_before.is_some_and(|set| set.elements.contains_key(&key));
            let served = self.make(id, plan, Pool::new(&plan.route), counts_no_backend);
            updates.insert(id, Some(self.fragment(&served)));
            outcome.effects.push(Effect::Serve { id, route: std::sync::Arc::clone(&plan.route) });
            outcome.added.push(plan.route.name.clone());
            self.served.insert(plan.route.name.clone(), served);
        }
        for (&id, drain) in &self.draining {
            updates.insert(id, Some(draining(&drain.name, self.mark(id))));
            let (name, deadline) = (drain.name.clone(), drain.deadline);
            outcome.effects.push(Effect::Drain { id, name, deadline });
        }
        self.assembly.commit(updates);
        outcome.changes = self.equalize(snapshot)?;
        Ok(outcome)
    }

    /// The number of messages it took.
    fn equalize(&mut self, snapshot: &Snapshot) -> Result<usize, NftError> {
        let wanted = self.assembly.ruleset();
        let nft = &self.nft;
        let changes = diff(&wanted, snapshot, self.locks(), |rule| nft.fingerprint(rule));
        drop(wanted);
        if !changes.is_empty() {
            self.nft.apply(&changes)?;
        }
        Ok(changes.len())
    }

    /// Reads the table back and compares it with what was asked for: the number of differences, 0 when all is well.
    pub fn verify(&mut self) -> Result<usize, NftError> {
        let snapshot = self.nft.snapshot()?;
        let nft = &self.nft;
        let locks = self.locks();
        Ok(diff(&self.assembly.ruleset(), &snapshot, locks, |rule| nft.fingerprint(rule)).len())
    }
}
