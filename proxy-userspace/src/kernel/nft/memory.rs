//! nf_tables in memory, with the kernel's rules, for tests of what is built on it.

use nix::errno::Errno;
use proxy_core::{
    diff::{ChainState, Change, ElementState, Fingerprint, SetState, Snapshot, TableState},
    ruleset::{Chain, Counter, Element, Key, Rule, Ruleset, Set, SetKind, SetSpec, Statement, Value},
};

use super::{Nft, NftError, Refusal, batch::Batch, error::describe};

/// Whose table it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Never locked.
    Nobody,
    Us,
    /// Locked once, by a process that is gone.
    Orphan,
    /// Locked by a process that lives.
    Other,
}

/// The twin of [`KernelNft`](super::KernelNft) without a kernel.
#[derive(Debug, Clone, Default)]
pub struct MemoryNft {
    table: Option<(Owner, Ruleset)>,
    generation: u32,
    next_failure: Option<NftError>,
}

impl MemoryNft {
    pub fn new() -> Self {
        Self::default()
    }

    /// What the table holds.
    pub fn ruleset(&self) -> Option<&Ruleset> {
        self.table.as_ref().map(|(_, ruleset)| ruleset)
    }

    /// Gives the table to somebody else, or leaves it an orphan as the end of its owner does.
    pub fn set_owner(&mut self, owner: Owner) {
        if let Some((current, _)) = &mut self.table {
            *current = owner;
        }
    }

    /// Lets the next batch fail with that error and change nothing.
    pub fn fail_next(&mut self, error: NftError) {
        self.next_failure = Some(error);
    }

    /// Changes the table as a foreign hand does.
    pub fn tamper(&mut self, change: impl FnOnce(&mut Ruleset)) {
        if let Some((_, ruleset)) = &mut self.table {
            change(ruleset);
        }
        self.generation = self.generation.wrapping_add(1);
    }

    /// Deletes the table as a foreign hand does.
    pub fn lose_table(&mut self) {
        self.table = None;
        self.generation = self.generation.wrapping_add(1);
    }

    /// Lets packets pass: adds to the counter of an element that has one.
    pub fn count(&mut self, set: &str, key: &Key, more: Counter) {
        let set = self.table.as_mut().and_then(|(_, ruleset)| ruleset.sets.get_mut(set));
        if let Some(element) = set.filter(|set| set.spec.counter).and_then(|set| set.elements.get_mut(key)) {
            element.counter.packets = element.counter.packets.wrapping_add(more.packets);
            element.counter.bytes = element.counter.bytes.wrapping_add(more.bytes);
        }
    }
}

impl Nft for MemoryNft {
    fn snapshot(&mut self) -> Result<Snapshot, NftError> {
        Ok(self.table.as_ref().map_or_else(Snapshot::default, |(owner, ruleset)| snapshot(*owner, ruleset)))
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), NftError> {
        if let Some(error) = self.next_failure.take() {
            return Err(error);
        }
        if changes.is_empty() {
            return Ok(());
        }
        // What cannot be said to the kernel is refused here in the same words.
        Batch::encode(changes, 0)?;
        let mut table = self.table.clone();
        let refusals: Vec<Refusal> = changes
            .iter()
            .enumerate()
            .filter_map(|(index, change)| {
                let errno = one_change(&mut table, change).err()?;
                Some(Refusal { change: Some(index), object: describe(change), errno, text: None })
            })
            .collect();
        if !refusals.is_empty() {
            return Err(NftError::from_refusals(refusals, changes));
        }
        self.table = table;
        self.generation = self.generation.wrapping_add(1);
        Ok(())
    }

    fn fingerprint(&self, rule: &Rule) -> Fingerprint {
        fingerprint(rule)
    }

    fn generation(&mut self) -> Result<u32, NftError> {
        Ok(self.generation)
    }

    fn counters(&mut self, set: &str) -> Result<Vec<(Key, Counter)>, NftError> {
        let missing = NftError::NotTold { what: "a set", errno: Errno::ENOENT };
        let set = self.ruleset().and_then(|ruleset| ruleset.sets.get(set)).ok_or(missing)?;
        Ok(set.elements.iter().map(|(key, element)| (key.clone(), element.counter)).collect())
    }

    fn some_counters(&mut self, set: &str, keys: &[Key]) -> Result<Vec<(Key, Counter)>, NftError> {
        let missing = || NftError::NotTold { what: "elements of a set", errno: Errno::ENOENT };
        let set = self.ruleset().and_then(|ruleset| ruleset.sets.get(set)).ok_or_else(missing)?;
        let one = |key: &Key| Ok((key.clone(), set.elements.get(key).ok_or_else(missing)?.counter));
        keys.iter().map(one).collect()
    }
}

fn fingerprint(rule: &Rule) -> Fingerprint {
    Fingerprint(format!("{rule:?}"))
}

fn snapshot(owner: Owner, ruleset: &Ruleset) -> Snapshot {
    let table = TableState { locked: matches!(owner, Owner::Us | Owner::Other), owned_by_other: owner == Owner::Other };
    let element = |(key, element): (&Key, &Element)| {
        let Element { last, value, comment, counter } = element.clone();
        (key.clone(), ElementState { last, value, comment, counter })
    };
    let sets = ruleset.sets.iter().map(|(name, set)| {
        let elements = set.elements.iter().map(element).collect();
        (name.clone(), SetState { spec: Some(set.spec.clone()), elements })
    });
    let chains = ruleset.chains.iter().map(|(name, chain)| {
        (name.clone(), ChainState { base: chain.base, rules: chain.rules.iter().map(fingerprint).collect() })
    });
    Snapshot { table: Some(table), timeouts: ruleset.timeouts.clone(), sets: sets.collect(), chains: chains.collect() }
}

fn one_change(table: &mut Option<(Owner, Ruleset)>, change: &Change) -> Result<(), Errno> {
    if matches!(table, Some((Owner::Other, _))) {
        return Err(Errno::EPERM);
    }
    match change {
        Change::AddTable { lock } => return add_table(table, *lock),
        Change::DeleteTable => return table.take().map(drop).ok_or(Errno::ENOENT),
        _ => {}
    }
    let ruleset = table.as_mut().map(|(_, ruleset)| ruleset).ok_or(Errno::ENOENT)?;
    match change {
        Change::AddTable { .. } | Change::DeleteTable => Ok(()),
        Change::AddTimeout { name, policy } => {
            ruleset.timeouts.insert(name.clone(), *policy);
            Ok(())
        }
        Change::DeleteTimeout { name } => {
            unused(rules(ruleset).flatten().any(|it| matches!(it, Statement::SetTimeout(used) if used == name)))?;
            ruleset.timeouts.remove(name).map(drop).ok_or(Errno::ENOENT)
        }
        Change::AddSet { name, spec } => add_set(ruleset, name, spec),
        Change::DeleteSet { name } => {
            unused(rules(ruleset).flatten().any(|it| set_of(it).is_some_and(|(used, _)| used == name)))?;
            ruleset.sets.remove(name).map(drop).ok_or(Errno::ENOENT)
        }
        Change::AddElement { set, key, element, .. } => add_element(ruleset, set, key, element),
        Change::DeleteElement { set, key, last, .. } => {
            let set = ruleset.sets.get_mut(&**set).ok_or(Errno::ENOENT)?;
            match set.elements.get(key) {
                Some(element) if element.last == *last => set.elements.remove(key).map(drop).ok_or(Errno::ENOENT),
                _ => Err(Errno::ENOENT),
            }
        }
        Change::AddChain { name, chain } => add_chain(ruleset, name, chain),
        Change::AddRules { chain, rules } => add_rules(ruleset, chain, rules),
        Change::FlushChain { name } => {
            ruleset.chains.get_mut(name).ok_or(Errno::ENOENT)?.rules.clear();
            Ok(())
        }
        Change::DeleteChain { name } => delete_chain(ruleset, name),
    }
}

fn unused(used: bool) -> Result<(), Errno> {
    if used { Err(Errno::EBUSY) } else { Ok(()) }
}

fn rules(ruleset: &Ruleset) -> impl Iterator<Item = &Rule> {
    ruleset.chains.values().flat_map(|chain| &chain.rules)
}

fn add_table(table: &mut Option<(Owner, Ruleset)>, lock: bool) -> Result<(), Errno> {
    match table {
        None => *table = Some((if lock { Owner::Us } else { Owner::Nobody }, Ruleset::default())),
        Some((Owner::Nobody, _)) if lock => return Err(Errno::EOPNOTSUPP),
        Some((owner @ Owner::Orphan, _)) if lock => *owner = Owner::Us,
        Some(_) => {}
    }
    Ok(())
}

fn add_set(ruleset: &mut Ruleset, name: &str, spec: &SetSpec) -> Result<(), Errno> {
    match ruleset.sets.get(name) {
        Some(set) if set.spec != *spec => Err(Errno::EEXIST),
        Some(_) => Ok(()),
        None => {
            let set = Set { spec: spec.clone(), elements: Default::default() };
            ruleset.sets.insert(name.to_owned(), set);
            Ok(())
        }
    }
}

/// An element that is there with the same value is left as it is, counter and comment too. Stricter than the kernel in one
/// thing: that takes a range over one without an end, which it cannot tell from two that touch (`nft_rbtree_insert`).
fn add_element(ruleset: &mut Ruleset, set: &str, key: &Key, wanted: &Element) -> Result<(), Errno> {
    if let Value::Goto(chain) | Value::Jump(chain) = &wanted.value
        && !ruleset.chains.contains_key(&**chain)
    {
        return Err(Errno::ENOENT);
    }
    let set = ruleset.sets.get_mut(set).ok_or(Errno::ENOENT)?;
    if let Some(existing) = set.elements.get(key) {
        let same = existing.value == wanted.value && existing.last == wanted.last;
        return if same { Ok(()) } else { Err(Errno::EEXIST) };
    }
    let overlaps =
        |(first, other): (&Key, &Element)| Some(first) <= wanted.last.as_ref() && other.last.as_ref() >= Some(key);
    if set.spec.kind == SetKind::Interval && set.elements.iter().any(overlaps) {
        return Err(Errno::EEXIST);
    }
    let counter = if set.spec.counter { wanted.counter } else { Counter::default() };
    set.elements.insert(key.clone(), Element { counter, ..wanted.clone() });
    Ok(())
}

fn add_chain(ruleset: &mut Ruleset, name: &str, chain: &Chain) -> Result<(), Errno> {
    match ruleset.chains.get(name) {
        Some(existing) if chain.base.is_some() && existing.base != chain.base => Err(Errno::EEXIST),
        Some(_) => Ok(()),
        None => {
            ruleset.chains.insert(name.to_owned(), Chain { base: chain.base, rules: Vec::new() });
            Ok(())
        }
    }
}

fn add_rules(ruleset: &mut Ruleset, chain: &str, rules: &[Rule]) -> Result<(), Errno> {
    for statement in rules.iter().flatten() {
        if let Some((name, map)) = set_of(statement) {
            let set = ruleset.sets.get(name).ok_or(Errno::ENOENT)?;
            if map && set.spec.data.is_none() {
                return Err(Errno::EINVAL);
            }
        }
        let exists = match statement {
            Statement::Jump(name) | Statement::Goto(name) => ruleset.chains.contains_key(name),
            Statement::SetTimeout(name) => ruleset.timeouts.contains_key(name),
            _ => true,
        };
        if !exists {
            return Err(Errno::ENOENT);
        }
    }
    ruleset.chains.get_mut(chain).ok_or(Errno::ENOENT)?.rules.extend(rules.iter().cloned());
    Ok(())
}

/// A chain takes its own rules with it.
fn delete_chain(ruleset: &mut Ruleset, name: &str) -> Result<(), Errno> {
    let others = ruleset.chains.iter().filter(|(other, _)| *other != name);
    let in_rules = others.flat_map(|(_, chain)| &chain.rules).flatten().any(|statement| match statement {
        Statement::Jump(used) | Statement::Goto(used) => used == name,
        _ => false,
    });
    let elements = ruleset.sets.values().flat_map(|set| set.elements.values());
    let in_elements = elements.into_iter().any(|element| match &element.value {
        Value::Goto(used) | Value::Jump(used) => **used == *name,
        Value::None | Value::Mark(_) | Value::Address(_) | Value::Endpoint(_) => false,
    });
    unused(in_rules || in_elements)?;
    ruleset.chains.remove(name).map(drop).ok_or(Errno::ENOENT)
}

/// The set a statement looks into, and whether it must be a map.
fn set_of(statement: &Statement) -> Option<(&str, bool)> {
    match statement {
        Statement::In { set, .. } | Statement::Update { set, .. } => Some((set, false)),
        Statement::SetMarkFrom { map, .. } | Statement::Dnat { map, .. } | Statement::VerdictMap { map, .. } => {
            Some((map, true))
        }
        Statement::IsProtocol(_)
        | Statement::IsFamily(_)
        | Statement::TcpFlags { .. }
        | Statement::DestinationIsLocal(_)
        | Statement::DestinationIn(_)
        | Statement::Direction(_)
        | Statement::MarkIs { .. }
        | Statement::IsDnatted
        | Statement::SetMarkBits { .. }
        | Statement::SetEvents(_)
        | Statement::SetTimeout(_)
        | Statement::Masquerade
        | Statement::CountOver(_)
        | Statement::RejectReset
        | Statement::RejectUnreachable
        | Statement::Jump(_)
        | Statement::Goto(_)
        | Statement::Return
        | Statement::SetMark(_)
        | Statement::NotFromLoopback
        | Statement::Accept => None,
    }
}
