//! What the kernel holds, as read from it.

use std::collections::{BTreeMap, HashMap};

use crate::ruleset::{Base, Counter, Key, SetSpec, TimeoutPolicy, Value};

/// Everything in shunt's table, or `table: None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    pub table: Option<TableState>,
    pub timeouts: BTreeMap<String, TimeoutPolicy>,
    pub sets: BTreeMap<String, SetState>,
    pub chains: BTreeMap<String, ChainState>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableState {
    /// Locked by a daemon, living or dead: an orphan can be taken over.
    pub locked: bool,
    /// A live process other than the reader owns the table.
    pub owned_by_other: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct SetState {
    /// `None`: a set shunt would never make (a key, a type or a flag it does not use).
    pub spec: Option<SetSpec>,
    pub elements: HashMap<Key, ElementState>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ElementState {
    pub last: Option<Key>,
    pub value: Value,
    pub comment: Option<Box<str>>,
    pub counter: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainState {
    pub base: Option<Base>,
    /// One per rule, in order; comparable with [`Fingerprint`]s of wanted rules made by the same kernel shell.
    pub rules: Vec<Fingerprint>,
}

/// A rule in a form in which two are equal exactly when they do the same: live state (counters) left out.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub String);
