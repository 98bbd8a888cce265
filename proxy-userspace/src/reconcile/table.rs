//! The table: what it should hold, and the batches that make it so.

use proxy_core::{
    config::RouteName,
    diff::{Ownership, Updates, diff},
    ruleset::{Context, Fragment, Key, Ruleset, draining, fragment, passing},
};

use super::{Carriers, ReconcileError, Reconciler, Served, counters::seed_counters, relay};
use crate::{
    kernel::nft::{Nft, NftError},
    stream::{self, Streams},
};

impl<N: Nft, S: Streams> Reconciler<N, S> {
    /// What the table has of a route that is served.
    pub(super) fn fragment(&self, served: &Served) -> Fragment {
        if served.plan.is_relayed() {
            return passing(&served.plan).and(self.counted(&served.plan.route.name, served.id, served.carriers));
        }
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

    /// What the table has of a route whose connections are let finish.
    pub(super) fn counted(&self, name: &RouteName, id: u32, carriers: Carriers) -> Fragment {
        match carriers.kernel {
            true => draining(name, self.mark(id)),
            false => Fragment::default(),
        }
    }

    /// What the table has of a route now; nothing of one that is not there.
    pub(super) fn committed(&self, id: u32) -> Fragment {
        if let Some(drain) = self.draining.get(&id) {
            return self.counted(&drain.name, id, drain.carriers);
        }
        let served = self.ids.name(id).and_then(|name| self.served.get(name));
        served.map(|served| self.fragment(served)).unwrap_or_default()
    }

    /// The table as it should be.
    pub(super) fn wanted(&self) -> Ruleset {
        self.wanted_with(&Updates::new())
    }

    pub(super) fn wanted_with(&self, updates: &Updates) -> Ruleset {
        let served = self.served.values().map(|served| served.id);
        let ids = served.chain(self.draining.keys().copied()).filter(|id| !updates.contains_key(id));
        let mut whole = self.assembly.whole();
        ids.for_each(|id| whole.add(self.committed(id)));
        updates.values().for_each(|update| whole.add(update.new.clone()));
        whole.finish()
    }

    /// Both kernels of a change, or none: what can fail comes before what cannot. The number of messages to nftables.
    pub(super) fn apply(
        &mut self,
        updates: &Updates,
        change: stream::Change,
        needs_table: bool,
    ) -> Result<usize, ReconcileError> {
        let result = self.try_apply(updates, change, needs_table);
        match &result {
            Ok(_) => {
                self.status.ok += 1;
                self.status.last_error = None;
            }
            Err(error) => {
                self.status.failed += 1;
                self.status.last_error = Some(error.to_string());
            }
        }
        result
    }

    pub(super) fn try_apply(
        &mut self,
        updates: &Updates,
        change: stream::Change,
        needs_table: bool,
    ) -> Result<usize, ReconcileError> {
        let prepared = match &mut self.streams {
            _ if relay::is_empty(&change) => None,
            Some(streams) => Some(streams.prepare(change)?),
            None => return Err(ReconcileError::Stopping),
        };
        let changes = match self.table || needs_table {
            true => self.change_table(updates)?,
            false => {
                self.assembly.commit(updates);
                0
            }
        };
        if let (Some(streams), Some(prepared)) = (&mut self.streams, prepared) {
            streams.commit(prepared);
        }
        Ok(changes)
    }

    /// One atomic batch; the first one makes the table. The number of its messages.
    pub(super) fn change_table(&mut self, updates: &Updates) -> Result<usize, NftError> {
        if !self.table {
            return self.make_table(updates);
        }
        let changes = self.assembly.changes(updates);
        if let Some(nft) = self.nft.as_mut().filter(|_| !changes.is_empty()) {
            nft.apply(&changes)?;
        }
        self.assembly.commit(updates);
        Ok(changes.len())
    }

    pub(super) fn make_table(&mut self, updates: &Updates) -> Result<usize, NftError> {
        let (ownership, wanted) = (self.ownership(false), self.wanted_with(updates));
        let Some(nft) = &mut self.nft else { return Ok(0) };
        let snapshot = nft.snapshot()?;
        let changes = diff(wanted, &snapshot, ownership, |rule| nft.fingerprint(rule));
        nft.apply(&changes)?;
        self.assembly.commit(updates);
        self.table = true;
        Ok(changes.len())
    }

    /// Compares the table with what it should be and mends it. True when there was something to mend.
    pub fn repair(&mut self) -> Result<bool, NftError> {
        let (ownership, mut wanted) = (self.ownership(true), self.wanted());
        let Some(nft) = self.nft.as_mut().filter(|_| self.table) else { return Ok(false) };
        let snapshot = nft.snapshot()?;
        seed_counters(&self.last_counters, self.ids.layout(), &mut wanted);
        let changes = diff(wanted, &snapshot, ownership, |rule| nft.fingerprint(rule));
        if changes.is_empty() {
            return Ok(false);
        }
        nft.apply(&changes)?;
        self.status.drift += 1;
        self.unpublished = true;
        Ok(true)
    }

    /// `running`: the table is this process's already, if it is locked.
    pub(super) fn ownership(&self, running: bool) -> Ownership {
        match (self.config.kernel.lock_table && self.capabilities.nft_owner_persist, running) {
            (false, _) => Ownership::Shared,
            (true, false) => Ownership::Take,
            (true, true) => Ownership::Keep,
        }
    }
}

pub(super) fn mark_of(key: &Key) -> Option<u32> {
    Some(u32::from_ne_bytes(key.bytes().try_into().ok()?))
}
