//! The table as the sum of a skeleton and one fragment per route, changed a few fragments at a time.
//!
//! Fragments are not kept: whoever has the routes makes them again when they are needed. For 50,000 routes they would be
//! some 60 MB.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
};

use super::{Change, Changes, batch::Batch};
use crate::ruleset::{Element, Fragment, Key, Member, Ruleset, Set, names};

/// What the daemon has put into the kernel.
#[derive(Debug, Clone, Default)]
pub struct Assembly {
    skeleton: Ruleset,
    /// How many fragments name each thing.
    uses: HashMap<Name, u32>,
}

/// The change of one route: what it adds to the skeleton now, and then.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// As it was committed.
    pub old: Fragment,
    pub new: Fragment,
}

/// By route id. A fragment that is empty is that of a route which is not there.
pub type Updates = BTreeMap<u32, Update>;

/// A thing that several fragments may name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Name {
    Timeout(String),
    Set(String),
    Chain(String),
    Element(String, Key),
}

/// Sets whose elements several routes may have in common. Elements of all other sets belong to one route.
fn is_shared(set: &str) -> bool {
    names::RANGES.contains(&set) || names::ANY_RANGES.contains(&set) || names::HAIRPIN.contains(&set)
}

impl Assembly {
    pub fn new(skeleton: Ruleset) -> Self {
        Self { skeleton, ..Self::default() }
    }

    /// The whole table, for a comparison with the kernel or to be printed; to be given the fragments of all routes.
    pub fn whole(&self) -> Whole {
        Whole::of(self.skeleton.clone())
    }

    /// The batch that brings the kernel from this assembly to the one with `updates`. Changes nothing here: see [`Self::commit`].
    pub fn changes(&self, updates: &Updates) -> Changes {
        let mut batch = Batch::default();
        let mut uses: HashMap<Name, i64> = HashMap::new();
        for Update { old, new } in updates.values() {
            for (fragment, step) in [(old, -1), (new, 1)] {
                for name in shared_names(fragment) {
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
        for Update { old, new } in updates.values() {
            self.step(old, new, &fate, &mut done, &mut batch);
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
        fn index(fragment: &Fragment) -> HashMap<(&str, &Key), &Member> {
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
    pub fn commit(&mut self, updates: &Updates) {
        for Update { old, new } in updates.values() {
            self.add(new);
            for name in shared_names(old) {
                if let Some(count) = self.uses.get_mut(&name) {
                    *count -= 1;
                    if *count == 0 {
                        self.uses.remove(&name);
                    }
                }
            }
        }
    }

    /// Takes one more route over.
    pub fn add(&mut self, fragment: &Fragment) {
        for name in shared_names(fragment) {
            *self.uses.entry(name).or_default() += 1;
        }
    }
}

/// A skeleton and fragments on their way to a [`Ruleset`].
#[derive(Debug)]
pub struct Whole {
    ruleset: Ruleset,
    /// Sorted at the end: a map that grows in random order costs several times as much.
    elements: HashMap<Cow<'static, str>, Vec<(Key, Element)>>,
}

impl Whole {
    fn of(skeleton: Ruleset) -> Self {
        Self { ruleset: skeleton, elements: HashMap::new() }
    }

    pub fn add(&mut self, fragment: Fragment) {
        self.ruleset.timeouts.extend(fragment.timeouts);
        self.ruleset.chains.extend(fragment.chains);
        for (name, spec) in fragment.sets {
            self.ruleset.sets.entry(name).or_insert_with(|| Set { spec, elements: BTreeMap::new() });
        }
        for Member { set, key, element } in fragment.elements {
            self.elements.entry(set).or_default().push((key, element));
        }
    }

    pub fn finish(self) -> Ruleset {
        let Self { mut ruleset, elements } = self;
        for (name, elements) in elements {
            if let Some(set) = ruleset.sets.get_mut(&*name) {
                set.elements.append(&mut elements.into_iter().collect());
            }
        }
        ruleset
    }
}

/// A table that is only looked at.
#[derive(Debug)]
pub struct Preview {
    pub skeleton: Ruleset,
    pub fragments: Vec<Fragment>,
}

impl Preview {
    pub fn ruleset(&self) -> Ruleset {
        self.onto(self.skeleton.clone())
    }

    /// What the routes add to the skeleton: a script of this, loaded after one of the skeleton, makes the same table.
    pub fn additions(&self) -> Ruleset {
        let mut ruleset = Ruleset::default();
        for member in self.fragments.iter().flat_map(|f| &f.elements) {
            if let Some(set) = self.skeleton.sets.get(&*member.set) {
                ruleset.sets.insert(member.set.to_string(), set.clone());
            }
        }
        self.onto(ruleset)
    }

    fn onto(&self, skeleton: Ruleset) -> Ruleset {
        let mut whole = Whole::of(skeleton);
        self.fragments.iter().cloned().for_each(|fragment| whole.add(fragment));
        whole.finish()
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
