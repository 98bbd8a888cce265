//! The difference between the ruleset shunt wants and the one the kernel holds, as the messages of one atomic batch.

mod assembly;
mod batch;
mod snapshot;
mod whole;

pub use assembly::{Assembly, Preview, Update, Updates, Whole};
pub use snapshot::*;
pub use whole::{Ownership, diff};

use std::sync::Arc;

use crate::ruleset::{Chain, Element, Key, Rule, SetSpec, TimeoutPolicy};

/// One message of a batch. The kernel takes all of a batch or nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Creates the table, or takes an orphaned one over.
    AddTable {
        lock: bool,
    },
    DeleteTable,
    AddTimeout {
        name: String,
        policy: TimeoutPolicy,
    },
    DeleteTimeout {
        name: String,
    },
    AddSet {
        name: String,
        spec: SetSpec,
    },
    DeleteSet {
        name: String,
    },
    AddElement {
        set: Arc<str>,
        spec: Arc<SetSpec>,
        key: Key,
        element: Element,
    },
    DeleteElement {
        set: Arc<str>,
        spec: Arc<SetSpec>,
        key: Key,
        last: Option<Key>,
    },
    /// The chain alone, without its rules: verdicts may name it from here on.
    AddChain {
        name: String,
        chain: Chain,
    },
    AddRules {
        chain: String,
        rules: Vec<Rule>,
    },
    /// Removes every rule of the chain.
    FlushChain {
        name: String,
    },
    DeleteChain {
        name: String,
    },
}

/// A batch, in an order the kernel accepts: what is named exists before it is named.
pub type Changes = Vec<Change>;
