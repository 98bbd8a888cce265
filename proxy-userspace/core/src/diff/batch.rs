//! The order of a batch: what is named exists before it is named, and is gone only after it is named no more.

use super::{Change, Changes};
use crate::ruleset::Chain;

#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The table itself.
    pub table: Vec<Change>,
    pub delete_elements: Vec<Change>,
    pub flush: Vec<Change>,
    pub delete_chains: Vec<Change>,
    pub delete_sets: Vec<Change>,
    pub delete_timeouts: Vec<Change>,
    /// Timeouts, sets and empty chains.
    pub add: Vec<Change>,
    pub rules: Vec<Change>,
    pub add_elements: Vec<Change>,
}

impl Batch {
    pub fn add_chain(&mut self, name: &str, chain: &Chain) {
        self.add.push(Change::AddChain { name: name.into(), chain: Chain { base: chain.base, rules: Vec::new() } });
        self.add_rules(name, chain);
    }

    pub fn replace_rules(&mut self, name: &str, chain: &Chain) {
        self.flush.push(Change::FlushChain { name: name.into() });
        self.add_rules(name, chain);
    }

    fn add_rules(&mut self, name: &str, chain: &Chain) {
        if !chain.rules.is_empty() {
            self.rules.push(Change::AddRules { chain: name.into(), rules: chain.rules.clone() });
        }
    }

    pub fn delete_chain(&mut self, name: &str) {
        self.flush.push(Change::FlushChain { name: name.into() });
        self.delete_chains.push(Change::DeleteChain { name: name.into() });
    }

    pub fn into_changes(self) -> Changes {
        let Self { table, delete_elements, flush, delete_chains, delete_sets, delete_timeouts, .. } = self;
        let Self { add, rules, add_elements, .. } = self;
        let before = [table, delete_elements, flush, delete_chains, delete_sets, delete_timeouts, add, rules];
        // New elements are by far the most: what comes before them is put in front of them, not they behind it.
        let before: Vec<Change> = before.into_iter().flatten().collect();
        let mut changes = add_elements;
        changes.splice(0..0, before);
        changes
    }
}
