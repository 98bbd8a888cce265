//! The whole table against what the kernel holds: at start, after somebody else's hand, and to verify.

use std::{collections::BTreeMap, sync::Arc};

use super::{Change, Changes, Fingerprint, SetState, Snapshot, batch::Batch};
use crate::ruleset::{Chain, Element, Rule, Ruleset, Set, SetKind};

/// Who may change the table beside shunt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// Anybody.
    Shared,
    /// Nobody: the table is to be locked, and taken over if a daemon before left it locked.
    Take,
    /// Nobody, and this process has it already.
    Keep,
}

/// The batch that makes the kernel's table equal to `wanted`; empty when it is. Counters the kernel has are kept.
///
/// `fingerprint` must be the one of the shell that read `actual`.
pub fn diff(
    wanted: Ruleset,
    actual: &Snapshot,
    ownership: Ownership,
    fingerprint: impl Fn(&Rule) -> Fingerprint,
) -> Changes {
    let lock = ownership != Ownership::Shared;
    let Some(table) = actual.table else { return create(Vec::new(), wanted, lock, None) };
    // A lock can be taken over, but not put on a table, nor taken off it (`nf_tables_updtable`, v6.9).
    let take_over = (table.locked && ownership != Ownership::Keep).then_some(Change::AddTable { lock: true });
    if table.locked != lock || needs_replacement(&wanted, actual) {
        return create(take_over.into_iter().chain([Change::DeleteTable]).collect(), wanted, lock, Some(actual));
    }
    let mut batch = Batch { table: take_over.into_iter().collect(), ..Batch::default() };
    for (name, policy) in &wanted.timeouts {
        if !actual.timeouts.contains_key(name) {
            batch.add.push(Change::AddTimeout { name: name.clone(), policy: *policy });
        }
    }
    for name in actual.timeouts.keys().filter(|name| !wanted.timeouts.contains_key(*name)) {
        batch.delete_timeouts.push(Change::DeleteTimeout { name: name.clone() });
    }
    for name in actual.sets.keys().filter(|name| !wanted.sets.contains_key(*name)) {
        batch.delete_sets.push(Change::DeleteSet { name: name.clone() });
    }
    chains(&wanted.chains, actual, &fingerprint, &mut batch);
    for (name, set) in wanted.sets {
        match actual.sets.get(&name) {
            None => add_set(name, set, None, &mut batch),
            Some(state) => elements(&name, set, state, &mut batch),
        }
    }
    batch.into_changes()
}

/// A set or base chain of the wrong shape cannot be changed in place, nor a timeout that rules use.
fn needs_replacement(wanted: &Ruleset, actual: &Snapshot) -> bool {
    let set = |(name, set): (&String, &Set)| {
        actual.sets.get(name).is_some_and(|state: &SetState| state.spec.as_ref() != Some(&set.spec))
    };
    let chain = |(name, chain): (&String, &Chain)| actual.chains.get(name).is_some_and(|c| c.base != chain.base);
    let timeout = |(name, policy)| actual.timeouts.get(name).is_some_and(|p| p != policy);
    wanted.sets.iter().any(set) || wanted.chains.iter().any(chain) || wanted.timeouts.iter().any(timeout)
}

/// The whole table from nothing, after `before`; its counters go on from those of `previous`.
fn create(mut before: Vec<Change>, wanted: Ruleset, lock: bool, previous: Option<&Snapshot>) -> Changes {
    before.push(Change::AddTable { lock });
    let elements = wanted.sets.values().map(|set| set.elements.len()).sum();
    let mut batch = Batch { table: before, add_elements: Vec::with_capacity(elements), ..Batch::default() };
    for (name, policy) in wanted.timeouts {
        batch.add.push(Change::AddTimeout { name, policy });
    }
    for (name, set) in wanted.sets {
        let old = previous.and_then(|p| p.sets.get(&name));
        add_set(name, set, old, &mut batch);
    }
    for (name, chain) in &wanted.chains {
        batch.add_chain(name, chain);
    }
    batch.into_changes()
}

fn add_set(name: String, set: Set, previous: Option<&SetState>, batch: &mut Batch) {
    let Set { spec, elements } = set;
    let (set, shared) = (Arc::<str>::from(name.as_str()), Arc::new(spec.clone()));
    batch.add.push(Change::AddSet { name, spec });
    batch.add_elements.extend(elements.into_iter().map(|(key, mut element)| {
        if let Some(old) = previous.and_then(|p| p.elements.get(&key)) {
            element.counter = old.counter;
        }
        Change::AddElement { set: Arc::clone(&set), spec: Arc::clone(&shared), key, element }
    }));
}

fn elements(name: &str, set: Set, state: &SetState, batch: &mut Batch) {
    if matches!(set.spec.kind, SetKind::Dynamic { .. }) {
        return;
    }
    let Set { spec, elements } = set;
    let (set, spec) = (Arc::<str>::from(name), Arc::new(spec));
    for (key, old) in &state.elements {
        if !elements.get(key).is_some_and(|e| same_element(e, old)) {
            let (set, spec) = (Arc::clone(&set), Arc::clone(&spec));
            batch.delete_elements.push(Change::DeleteElement { set, spec, key: key.clone(), last: old.last.clone() });
        }
    }
    for (key, mut element) in elements {
        let old = state.elements.get(&key);
        if old.is_some_and(|old| same_element(&element, old)) {
            continue;
        }
        if let Some(old) = old {
            element.counter = old.counter;
        }
        batch.add_elements.push(Change::AddElement { set: Arc::clone(&set), spec: Arc::clone(&spec), key, element });
    }
}

fn same_element(wanted: &Element, actual: &super::ElementState) -> bool {
    wanted.value == actual.value && wanted.comment == actual.comment && wanted.last == actual.last
}

fn chains(
    wanted: &BTreeMap<String, Chain>,
    actual: &Snapshot,
    fingerprint: &impl Fn(&Rule) -> Fingerprint,
    batch: &mut Batch,
) {
    for (name, chain) in wanted {
        match actual.chains.get(name) {
            None => batch.add_chain(name, chain),
            Some(state) if chain.rules.iter().map(fingerprint).ne(state.rules.iter().cloned()) => {
                batch.replace_rules(name, chain);
            }
            Some(_) => {}
        }
    }
    for name in actual.chains.keys().filter(|name| !wanted.contains_key(*name)) {
        batch.delete_chain(name);
    }
}
