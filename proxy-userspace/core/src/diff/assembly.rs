//! The table as the sum of a skeleton and one fragment per route, changed a few fragments at a time.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Change, Changes, batch::Batch};
use crate::ruleset::{Fragment, Member, Ruleset, Set, names};

/// What the daemon has put into the kernel, by route id.
#[derive(Debug, Clone, Default)]
pub struct Assembly {
    skeleton: Ruleset,
    fragments: HashMap<u32, Fragment>,
    /// How many fragments name each thing.
    uses: HashMap<Name, u32>,
}

/// New fragments by route id; `None` removes the route.
pub type Updates = BTreeMap<u32, Option<Fragment>>;

/// A thing that several fragments may name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Name {
    Timeout(String),
    Set(String),
    Chain(String),
    Element(String, crate::ruleset::Key),
}

/// Sets whose elements several routes may have in common. Elements of all other sets belong to one route.
fn is_shared(set: &str) -> bool {
    names::RANGES.contains(&set) || names::ANY_RANGES.contains(&set) || names::HAIRPIN.contains(&set)
}

impl Assembly {
    pub fn new(skeleton: Ruleset) -> Self {
        Self { skeleton, ..Self::default() }
    }

    pub fn fragment(&self, id: u32) -> Option<&Fragment> {
        self.fragments.get(&id)
    }

    /// The whole table, for a comparison with the kernel or to be printed.
    pub fn ruleset(&self) -> Ruleset {
        let mut ruleset = self.skeleton.clone();
        self.add_fragments(&mut ruleset);
        ruleset
    }

    /// What the routes add to the skeleton: a script of this, loaded after one of the skeleton, makes the same table.
    pub fn additions(&self) -> Ruleset {
        let mut ruleset = Ruleset::default();
        for member in self.fragments.values().flat_map(|f| &f.elements) {
            if let Some(set) = self.skeleton.sets.get(&*member.set) {
                ruleset.sets.insert(member.set.to_string(), set.clone());
            }
        }
        self.add_fragments(&mut ruleset);
        ruleset
    }

    fn add_fragments(&self, ruleset: &mut Ruleset) {
        for fragment in self.fragments.values() {
            ruleset.timeouts.extend(fragment.timeouts.iter().cloned());
            ruleset.chains.extend(fragment.chains.iter().cloned());
            for (name, spec) in &fragment.sets {
                let set = || Set { spec: spec.clone(), elements: BTreeMap::new() };
                ruleset.sets.entry(name.clone()).or_insert_with(set);
            }
        }
        for member in self.fragments.values().flat_map(|f| &f.elements) {
            if let Some(set) = ruleset.sets.get_mut(&*member.set) {
                set.elements.insert(member.key.clone(), member.element.clone());
            }
        }
    }

    /// The batch that brings the kernel from this assembly to the one with `updates`. Changes nothing here: see [`Self::commit`].
    pub fn changes(&self, updates: &Updates) -> Changes {
        let mut batch = Batch::default();
        let mut uses: HashMap<Name, i64> = HashMap::new();
        for (id, new) in updates {
            for (fragment, step) in [(self.fragments.get(id), -1), (new.as_ref(), 1)] {
                for name in fragment.into_iter().flat_map(shared_names) {
                    *uses.entry(name).or_default() += step;
                }
            }
        }
        let before = |name: &Name| i64::from(self.uses.get(name).copied().unwrap_or(0));
        let fate = |name: Name| match (before(&name) > 0, before(&name) + uses.get(&name).copied().unwrap_or(0) > 0) {
            (false, true) => Fate::Appears,
            (true, false) => Fate::Goes,
            _ => Fate::Stays,
        };
        let mut done = HashSet::new();
        let empty = Fragment::default();
        for (id, new) in updates {
            let old = self.fragments.get(id).unwrap_or(&empty);
            self.step(old, new.as_ref().unwrap_or(&empty), &fate, &mut done, &mut batch);
        }
        batch.into_changes()
    }

    fn step(
        &self,
        old: &Fragment,
        new: &Fragment,
        fate: &impl Fn(Name) -> Fate,
        done: &mut HashSet<Name>,
        batch: &mut Batch,
    ) {
        let mut first = |name: &Name| done.insert(name.clone());
        for (name, policy) in new.timeouts.iter().chain(&old.timeouts) {
            let thing = Name::Timeout(name.clone());
            match fate(thing.clone()) {
                Fate::Appears if first(&thing) => {
                    batch.add.push(Change::AddTimeout { name: name.clone(), policy: *policy })
                }
                Fate::Goes if first(&thing) => batch.delete_timeouts.push(Change::DeleteTimeout { name: name.clone() }),
                _ => {}
            }
        }
        let mut remade = false;
        for (name, spec) in new.sets.iter().chain(&old.sets) {
            let thing = Name::Set(name.clone());
            let differs = old.sets.iter().any(|(n, s)| n == name && s != spec);
            match fate(thing.clone()) {
                Fate::Appears if first(&thing) => {
                    batch.add.push(Change::AddSet { name: name.clone(), spec: spec.clone() })
                }
                Fate::Goes if first(&thing) => batch.delete_sets.push(Change::DeleteSet { name: name.clone() }),
                Fate::Stays if differs && first(&thing) => {
                    remade = true;
                    batch.delete_sets.push(Change::DeleteSet { name: name.clone() });
                    batch.add.push(Change::AddSet { name: name.clone(), spec: spec.clone() });
                }
                _ => {}
            }
        }
        for (name, chain) in new.chains.iter().chain(&old.chains) {
            let thing = Name::Chain(name.clone());
            let differs = old.chains.iter().any(|(n, c)| n == name && c != chain) || remade;
            match fate(thing.clone()) {
                Fate::Appears if first(&thing) => batch.add_chain(name, chain),
                Fate::Goes if first(&thing) => batch.delete_chain(name),
                Fate::Stays if differs && first(&thing) => batch.replace_rules(name, chain),
                _ => {}
            }
        }
        self.elements(old, new, fate, done, batch);
    }

    fn elements(
        &self,
        old: &Fragment,
        new: &Fragment,
        fate: &impl Fn(Name) -> Fate,
        done: &mut HashSet<Name>,
        batch: &mut Batch,
    ) {
        fn index(fragment: &Fragment) -> HashMap<(&str, &crate::ruleset::Key), &Member> {
            fragment.elements.iter().map(|m| ((&*m.set, &m.key), m)).collect()
        }
        let (before, after) = (index(old), index(new));
        for member in &old.elements {
            let same = after.get(&(&*member.set, &member.key)).is_some_and(|m| m.element == member.element);
            let goes = if is_shared(&member.set) {
                let name = Name::Element(member.set.to_string(), member.key.clone());
                fate(name.clone()) == Fate::Goes && done.insert(name)
            } else {
                !same
            };
            if goes && let Some(spec) = self.spec(&member.set, old) {
                batch.delete_elements.push(Change::DeleteElement {
                    set: (&*member.set).into(),
                    spec: spec.clone().into(),
                    key: member.key.clone(),
                    last: member.element.last.clone(),
                });
            }
        }
        for member in &new.elements {
            let same = before.get(&(&*member.set, &member.key)).is_some_and(|m| m.element == member.element);
            let appears = if is_shared(&member.set) {
                let name = Name::Element(member.set.to_string(), member.key.clone());
                fate(name.clone()) == Fate::Appears && done.insert(name)
            } else {
                !same
            };
            if appears && let Some(spec) = self.spec(&member.set, new) {
                batch.add_elements.push(Change::AddElement {
                    set: (&*member.set).into(),
                    spec: spec.clone().into(),
                    key: member.key.clone(),
                    element: member.element.clone(),
                });
            }
        }
    }

    fn spec<'a>(&'a self, set: &str, fragment: &'a Fragment) -> Option<&'a crate::ruleset::SetSpec> {
        let own = fragment.sets.iter().find(|(name, _)| name == set).map(|(_, spec)| spec);
        own.or_else(|| self.skeleton.sets.get(set).map(|s| &s.spec))
    }

    /// Takes `updates` over, once the kernel has taken their changes.
    pub fn commit(&mut self, updates: Updates) {
        for (id, new) in updates {
            let old = match new {
                Some(fragment) => {
                    for name in shared_names(&fragment) {
                        *self.uses.entry(name).or_default() += 1;
                    }
                    self.fragments.insert(id, fragment)
                }
                None => self.fragments.remove(&id),
            };
            for name in old.iter().flat_map(shared_names) {
                if let Some(count) = self.uses.get_mut(&name) {
                    *count -= 1;
                    if *count == 0 {
                        self.uses.remove(&name);
                    }
                }
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Appears,
    Goes,
    Stays,
}

fn shared_names(fragment: &Fragment) -> impl Iterator<Item = Name> + '_ {
    let timeouts = fragment.timeouts.iter().map(|(name, _)| Name::Timeout(name.clone()));
    let sets = fragment.sets.iter().map(|(name, _)| Name::Set(name.clone()));
    let chains = fragment.chains.iter().map(|(name, _)| Name::Chain(name.clone()));
    let elements = fragment.elements.iter().filter(|m| is_shared(&m.set));
    timeouts.chain(sets).chain(chains).chain(elements.map(|m| Name::Element(m.set.to_string(), m.key.clone())))
}
