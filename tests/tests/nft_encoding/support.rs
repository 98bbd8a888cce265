//! A namespace per test, short ways to write sets down, and what "the kernel holds it" means.

use std::{
    collections::BTreeMap,
    env,
    os::unix::process::CommandExt,
    panic,
    process::{Command, Stdio},
    thread,
};

use nix::sched::{CloneFlags, unshare};
use proxy_core::{
    diff::{Change, ElementState, Snapshot},
    ruleset::*,
};
use proxy_userspace::kernel::nft::{Nft, NftError, Refusal};
pub use shunt_tests::kernel_locks_tables;

/// Runs `test` on a thread of its own in a network namespace that ends with it.
pub fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            test()
        });
        thread.join()
    });
    result.unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// What the program printed; it inherits the thread's namespace.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().expect("the program runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

pub fn nft_script(script: &str) {
    let file = tempfile::NamedTempFile::new().expect("a scratch file");
    std::fs::write(file.path(), script).expect("a scratch file");
    run("nft", &["-f", file.path().to_str().expect("a path")]);
}

pub fn listing() -> String {
    run("nft", &["list", "table", "inet", "shunt"])
}

pub fn first_rule_handle(chain: &str) -> String {
    let listing = run("nft", &["-a", "list", "chain", "inet", "shunt", chain]);
    let rule = listing.lines().filter(|line| line.contains("# handle")).nth(1).expect("a rule");
    rule.rsplit("# handle ").next().expect("a handle").trim().to_owned()
}

/// Runs one ignored test of this binary as a user without privileges, in the thread's namespace.
pub fn run_as_nobody(test: &str) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let copy = folder.path().join("test");
    std::fs::copy(env::current_exe().expect("this binary"), &copy).expect("a copy that everybody may run");
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), everybody).expect("permissions");
    let output = Command::new(copy).args(["--exact", "--ignored", test]).uid(65534).gid(65534).output();
    let output = output.expect("the copy runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

pub fn hash(key: &[Field], data: Option<Data>) -> Set {
    let spec = SetSpec { key: key.to_vec(), data, kind: SetKind::Hash, counter: false };
    Set { spec, elements: BTreeMap::new() }
}

pub fn interval(key: Field, data: Option<Data>) -> Set {
    let mut set = hash(&[key], data);
    set.spec.kind = SetKind::Interval;
    set
}

pub fn dynamic(key: Field, size: u32, timeout_seconds: Option<u32>) -> Set {
    let mut set = hash(&[key], None);
    set.spec.kind = SetKind::Dynamic { size, timeout_seconds };
    set
}

pub fn element(value: Value) -> Element {
    Element { last: None, value, comment: None, counter: Counter::default() }
}

pub trait SetExt {
    fn counted(self) -> Self;
    fn with(self, key: &[KeyPart], element: Element) -> Self;
    fn range(self, first: KeyPart, last: KeyPart, element: Element) -> Self;
}

impl SetExt for Set {
    fn counted(mut self) -> Self {
        self.spec.counter = true;
        self
    }

    fn with(mut self, key: &[KeyPart], element: Element) -> Self {
        self.elements.insert(Key::new(key), element);
        self
    }

    fn range(self, first: KeyPart, last: KeyPart, element: Element) -> Self {
        self.with(&[first], Element { last: Some(Key::new(&[last])), ..element })
    }
}

pub trait ElementExt {
    fn comment(self, comment: &str) -> Self;
    fn counter(self, packets: u64, bytes: u64) -> Self;
}

impl ElementExt for Element {
    fn comment(self, comment: &str) -> Self {
        Self { comment: Some(comment.into()), ..self }
    }

    fn counter(self, packets: u64, bytes: u64) -> Self {
        Self { counter: Counter { packets, bytes }, ..self }
    }
}

/// One element more in a map `mark : ipv4_addr`.
pub fn add_host(spec: &SetSpec, mark: u32, host: &str) -> Change {
    Change::AddElement {
        set: "be4p".into(),
        spec: spec.clone().into(),
        key: Key::new(&[KeyPart::Mark(mark)]),
        element: element(Value::Address(host.parse().expect("an address"))),
    }
}

/// A range more or less in a set of ports.
pub fn new_ports(first: u16, last: u16) -> Change {
    let (key, last) = (Key::new(&[KeyPart::Port(first)]), Some(Key::new(&[KeyPart::Port(last)])));
    let element = Element { last, ..element(Value::None) };
    Change::AddElement { set: "ports".into(), spec: interval(Field::Port, None).spec.into(), key, element }
}

pub fn old_ports(first: u16, last: u16) -> Change {
    let (key, last) = (Key::new(&[KeyPart::Port(first)]), Some(Key::new(&[KeyPart::Port(last)])));
    Change::DeleteElement { set: "ports".into(), spec: interval(Field::Port, None).spec.into(), key, last }
}

/// Everything of a ruleset, into an empty or missing table; locked where the kernel can.
pub fn install(ruleset: &Ruleset, lock: bool) -> Vec<Change> {
    let mut changes = vec![Change::AddTable { lock: lock && kernel_locks_tables() }];
    for (name, policy) in &ruleset.timeouts {
        changes.push(Change::AddTimeout { name: name.clone(), policy: *policy });
    }
    for (name, chain) in &ruleset.chains {
        changes.push(Change::AddChain { name: name.clone(), chain: chain.clone() });
    }
    for (name, set) in &ruleset.sets {
        changes.push(Change::AddSet { name: name.clone(), spec: set.spec.clone() });
    }
    for (name, set) in &ruleset.sets {
        changes.extend(set.elements.iter().map(|(key, element)| Change::AddElement {
            set: name.as_str().into(),
            spec: set.spec.clone().into(),
            key: key.clone(),
            element: element.clone(),
        }));
    }
    for (name, chain) in &ruleset.chains {
        changes.push(Change::AddRules { chain: name.clone(), rules: chain.rules.clone() });
    }
    changes
}

/// Deletes every part of it, the table excepted.
pub fn tear_down(ruleset: &Ruleset) -> Vec<Change> {
    let flush = ruleset.chains.keys().map(|name| Change::FlushChain { name: name.clone() });
    let elements = ruleset.sets.iter().flat_map(|(name, set)| {
        set.elements.iter().map(|(key, element)| Change::DeleteElement {
            set: name.as_str().into(),
            spec: set.spec.clone().into(),
            key: key.clone(),
            last: element.last.clone(),
        })
    });
    let sets = ruleset.sets.keys().map(|name| Change::DeleteSet { name: name.clone() });
    let chains = ruleset.chains.keys().map(|name| Change::DeleteChain { name: name.clone() });
    let timeouts = ruleset.timeouts.keys().map(|name| Change::DeleteTimeout { name: name.clone() });
    flush.chain(elements).chain(sets).chain(chains).chain(timeouts).collect()
}

/// The snapshot has all of the ruleset and nothing else.
pub fn assert_holds(nft: &impl Nft, snapshot: &Snapshot, ruleset: &Ruleset) {
    assert_eq!(snapshot.timeouts, ruleset.timeouts);
    assert!(snapshot.sets.keys().eq(ruleset.sets.keys()), "{:?}", snapshot.sets.keys());
    for (name, set) in &ruleset.sets {
        let state = &snapshot.sets[name];
        assert_eq!(state.spec.as_ref(), Some(&set.spec), "set {name}");
        assert_eq!(state.elements.len(), set.elements.len(), "set {name}: {:?}", state.elements);
        for (key, element) in &set.elements {
            let wanted = ElementState {
                last: element.last.clone(),
                value: element.value.clone(),
                comment: element.comment.clone(),
                counter: element.counter,
            };
            assert_eq!(state.elements.get(key), Some(&wanted), "set {name}, {key:?}");
        }
    }
    assert!(snapshot.chains.keys().eq(ruleset.chains.keys()), "{:?}", snapshot.chains.keys());
    for (name, chain) in &ruleset.chains {
        let state = &snapshot.chains[name];
        assert_eq!(state.base, chain.base, "chain {name}");
        let wanted: Vec<_> = chain.rules.iter().map(|rule| nft.fingerprint(rule)).collect();
        assert_eq!(state.rules, wanted, "chain {name}");
    }
}

pub fn refusals(result: Result<(), NftError>) -> Vec<Refusal> {
    match result {
        Err(NftError::Refused(refusals)) => refusals,
        other => panic!("not refused: {other:?}"),
    }
}
