//! The order of a batch: what is named exists before it is named, and is gone only after it is named no more.

use super::{Change, Changes};
use crate::ruleset::Chain;

#[derive(Debug, Default)]
pub(super) struct Batch {
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
        let Self { delete_elements, flush, delete_chains, delete_sets, delete_timeouts, add, rules, add_elements } =
            self;
        let parts = [delete_elements, flush, delete_chains, delete_sets, delete_timeouts, add, rules, add_elements];
        let mut changes = Vec::with_capacity(parts.iter().map(Vec::len).sum());
        for mut part in parts {
            changes.append(&mut part);
        }
        changes
    }
}
