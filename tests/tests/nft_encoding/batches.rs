//! A story of batches, some of which the kernel takes and some of which it refuses.

use proxy_core::{diff::Change, ruleset::*};

use crate::{everything::*, support::*};

/// Batches that are refused and taken, on top of [`everything`], each on what the ones before left.
pub fn batches() -> Vec<Vec<Change>> {
    let (sets, chains) = (sets(), chains());
    let spec = |set: &str| sets[set].spec.clone();
    let mark = |mark| Key::new(&[KeyPart::Mark(mark)]);
    let add = |set: &str, key, element| Change::AddElement { set: set.into(), spec: spec(set).into(), key, element };
    let delete = |set: &str, key| Change::DeleteElement { set: set.into(), spec: spec(set).into(), key, last: None };
    let goto = |name: &str| element(Value::Goto(name.into()));
    let chain = |name: &str, base| Change::AddChain { name: name.into(), chain: Chain { base, rules: vec![] } };
    let rule = |chain: &str, statement| Change::AddRules { chain: chain.into(), rules: vec![vec![statement]] };
    vec![
        install(&everything(), true),
        vec![Change::AddTable { lock: true }],
        // The same value again, another value, a missing one.
        vec![add_host(&spec("be4p"), 0x800, "10.0.0.1")],
        vec![add_host(&spec("be4p"), 0x800, "10.0.0.2"), add_host(&spec("be4p"), 0x900, "10.0.0.2")],
        vec![delete("be4p", mark(0x900))],
        vec![delete("be4p", mark(0x800)), add_host(&spec("be4p"), 0x800, "10.0.0.2")],
        vec![delete("be4p", mark(0x800)), delete("be4p", mark(0x800))],
        // Ranges: the same again, inside, around, over the border, beside.
        vec![new_ports(1000, 1999)],
        vec![new_ports(1100, 1200)],
        vec![new_ports(900, 2100)],
        vec![new_ports(1999, 2000)],
        vec![new_ports(999, 1000)],
        vec![new_ports(2000, 2000), new_ports(998, 999)],
        vec![old_ports(60_000, 65_535)],
        vec![old_ports(1000, 1500)],
        // Sets, made again as they are or otherwise.
        vec![Change::AddSet { name: "be4p".into(), spec: spec("be4p") }],
        vec![Change::AddSet { name: "be4p".into(), spec: spec("be6p") }],
        vec![Change::DeleteSet { name: "be4p".into() }],
        vec![Change::DeleteSet { name: "nowhere".into() }],
        // Chains and what names them.
        vec![chain("guard", None)],
        vec![chain("pre", chains["pre"].base)],
        vec![chain("pre", chains["output"].base)],
        vec![add("lb", mark(0x2000), goto("nowhere"))],
        vec![rule("guard", Statement::Jump("nowhere".into()))],
        vec![rule("nowhere", Statement::Accept)],
        vec![rule("guard", is_in(&[MARK], "be4p"))],
        vec![rule("guard", Statement::VerdictMap { key: vec![MARK], map: "kill".into() })],
        vec![rule("guard", Statement::SetTimeout("nowhere".into()))],
        vec![Change::FlushChain { name: "nowhere".into() }],
        vec![Change::DeleteChain { name: "guard".into() }],
        vec![Change::DeleteChain { name: "route".into() }],
        vec![Change::DeleteTimeout { name: "tcp-short".into() }],
        vec![Change::FlushChain { name: "routed".into() }, Change::DeleteTimeout { name: "tcp-short".into() }],
        vec![chain("new", None), add("lb", mark(0x2000), goto("new")), rule("new", Statement::Return)],
        vec![delete("lb", mark(0x2000)), Change::DeleteChain { name: "new".into() }],
        vec![Change::DeleteTable],
        vec![Change::DeleteTable],
        vec![Change::AddSet { name: "be4p".into(), spec: spec("be4p") }],
        vec![Change::AddTable { lock: false }],
        vec![Change::AddTable { lock: true }],
    ]
}
