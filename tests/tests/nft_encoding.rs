//! What the kernel shell says to nf_tables, held against what `nft` says and what the kernel then has.

#[path = "nft_encoding/batches.rs"]
mod batches;
#[path = "nft_encoding/everything.rs"]
mod everything;
#[path = "nft_encoding/random.rs"]
mod random;
#[path = "nft_encoding/support.rs"]
mod support;

use std::{collections::BTreeMap, net::IpAddr, time::Instant};

use batches::*;
use everything::*;
use nix::errno::Errno;
use proptest::prelude::*;
use proxy_core::{
    config::Protocol,
    diff::{Change, Snapshot},
    ruleset::*,
};
use proxy_userspace::kernel::nft::{KernelNft, MemoryNft, MonitorNews, Nft, NftError, NftMonitor};
use support::*;

#[test]
fn a_table_made_by_netlink_is_listed_exactly_as_the_same_table_loaded_by_nft() {
    let by_script = in_namespace(|| {
        nft_script(SCRIPT);
        listing()
    });
    let by_netlink = in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        nft.apply(&install(&everything(), false)).expect("the batch is taken");
        listing()
    });
    assert_eq!(by_netlink, by_script);
}

#[test]
fn a_snapshot_is_what_was_applied() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        nft.apply(&install(&everything(), true)).expect("the batch is taken");
        let snapshot = nft.snapshot().expect("a snapshot");
        assert_holds(&nft, &snapshot, &everything());
        let table = snapshot.table.expect("the table");
        assert!(table.locked == kernel_locks_tables() && !table.owned_by_other);
    });
}

#[test]
fn a_snapshot_of_a_table_loaded_by_nft_is_the_same() {
    in_namespace(|| {
        nft_script(SCRIPT);
        let mut nft = KernelNft::open().expect("a netlink socket");
        let snapshot = nft.snapshot().expect("a snapshot");
        assert_holds(&nft, &snapshot, &everything());
        assert!(!snapshot.table.expect("the table").locked);
    });
}

#[test]
fn without_a_table_the_snapshot_is_empty() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        assert_eq!(nft.snapshot().expect("a snapshot"), Snapshot::default());
    });
}

#[test]
fn a_rule_altered_by_hand_no_longer_has_the_fingerprint_of_the_wanted_one() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        nft.apply(&install(&everything(), false)).expect("the batch is taken");
        let wanted = chains();
        for (chain, other) in [
            ("pre", "fib daddr type local jump routed"),
            ("forward", "ct direction reply ct mark & 0xfffff000 @acct"),
            ("routed", "ct mark set ct mark & 0xfffff8ff | 0x00000200"),
            ("slots", "meta l4proto tcp dnat ip to ct mark . numgen inc mod 17 map @slot4"),
            ("guard", "update @rate4 { ip saddr limit rate over 301/minute burst 300 packets } return"),
            ("post", "ct mark @acct masquerade"),
            ("route", "ct mark set ip6 daddr . meta l4proto . th dport map @r6 goto slots"),
        ] {
            let handle = first_rule_handle(chain);
            run("nft", &["replace", "rule", "inet", "shunt", chain, "handle", &handle, other]);
            let snapshot = nft.snapshot().expect("a snapshot");
            let wanted: Vec<_> = wanted[chain].rules.iter().map(|rule| nft.fingerprint(rule)).collect();
            let actual = &snapshot.chains[chain].rules;
            assert!(!wanted.contains(&actual[0]), "{chain}: {:?}", actual[0]);
            assert_eq!(actual[1..], wanted[1..], "{chain}: only the altered rule differs");
        }
    });
}

#[test]
fn sets_shunt_would_never_make_have_no_spec() {
    in_namespace(|| {
        nft_script(
            "table inet shunt {
                set foreign { type ifname; }
                set timed { type mark; timeout 5s; }
                set sized { type mark; size 7; }
                set wide { type ipv4_addr . inet_service; flags interval; }
                map objects { type mark : counter; }
                set limited { type mark; quota over 5 bytes; }
                set ours { type mark; }
            }",
        );
        let snapshot = KernelNft::open().and_then(|mut nft| nft.snapshot()).expect("a snapshot");
        for (name, state) in &snapshot.sets {
            assert_eq!(state.spec.is_some(), name == "ours", "{name}: {:?}", state.spec);
        }
        assert_eq!(snapshot.sets.len(), 7);
    });
}

#[test]
fn a_batch_with_one_bad_change_leaves_nothing_and_names_the_culprit() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        nft.apply(&install(&everything(), false)).expect("the batch is taken");
        let before = nft.snapshot().expect("a snapshot");

        let spec = sets()["be4p"].spec.clone();
        let mut changes: Vec<Change> = (0..5000).map(|n| add_host(&spec, 0x10_0000 + n * 8, "10.1.0.1")).collect();
        // This mark is in the map with another value.
        changes.insert(3210, add_host(&spec, 0x800, "10.9.9.9"));
        let refused = &refusals(nft.apply(&changes))[0];
        assert_eq!(refused.change, Some(3210));
        assert!(matches!(refused.errno, Errno::EEXIST | Errno::EBUSY), "{refused}");
        assert!(refused.object.contains("0x00000800 of set be4p"), "{refused}");
        assert_eq!(nft.snapshot().expect("a snapshot"), before);

        let missing = Key::new(&[KeyPart::Mark(0x4000)]);
        let delete = Change::DeleteElement { set: "be4p".into(), spec: spec.clone().into(), key: missing, last: None };
        let rule = vec![is_in(&[MARK], "nowhere")];
        let changes = [
            add_host(&spec, 0x2000, "10.1.0.1"),
            delete,
            Change::AddRules { chain: "route".into(), rules: vec![vec![Statement::Accept], rule] },
            Change::DeleteChain { name: "nowhere".into() },
        ];
        let culprits: Vec<_> =
            refusals(nft.apply(&changes)).into_iter().map(|refusal| (refusal.change, refusal.errno)).collect();
        let wanted = [(Some(1), Errno::ENOENT), (Some(2), Errno::ENOENT), (Some(3), Errno::ENOENT)];
        assert_eq!(culprits, wanted);
        assert_eq!(nft.snapshot().expect("a snapshot"), before);
    });
}

#[test]
fn the_culprit_is_told_also_behind_ranges() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        nft.apply(&install(&everything(), false)).expect("the batch is taken");
        // The third range overlaps 1000-1999.
        let changes = [new_ports(10, 20), new_ports(22, 30), new_ports(1500, 2500), new_ports(3000, 3001)];
        assert_eq!(refusals(nft.apply(&changes))[0].change, Some(2));
    });
}

#[test]
fn elements_come_and_go_and_a_table_can_be_taken_down_piece_by_piece() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        let ruleset = everything();
        nft.apply(&install(&ruleset, true)).expect("the batch is taken");
        let spec = ruleset.sets["be4p"].spec.clone();
        let key = Key::new(&[KeyPart::Mark(0x800)]);
        let swap = [
            Change::DeleteElement { set: "be4p".into(), spec: spec.clone().into(), key: key.clone(), last: None },
            add_host(&spec, 0x800, "10.2.2.2"),
        ];
        nft.apply(&swap).expect("an element can be swapped in one batch");
        assert_eq!(nft.snapshot().expect("a snapshot").sets["be4p"].elements[&key].value, host("10.2.2.2"));

        let swap = [
            old_ports(1000, 1999),
            old_ports(60_000, 65_535),
            new_ports(1000, 2500),
            new_ports(2501, 2501),
            new_ports(60_000, 61_000),
            new_ports(61_001, 65_535),
        ];
        nft.apply(&swap).expect("ranges can be swapped in one batch");
        let snapshot = nft.snapshot().expect("a snapshot");
        let mut ranges: Vec<_> = snapshot.sets["ports"].elements.iter().map(|(key, it)| (key, &it.last)).collect();
        ranges.sort();
        let port = |port| Key::new(&[KeyPart::Port(port)]);
        let wanted = [(80, 80), (1000, 2500), (2501, 2501), (60_000, 61_000), (61_001, 65_535)];
        let wanted = wanted.map(|(first, last)| (port(first), Some(port(last))));
        assert_eq!(ranges, wanted.iter().map(|(first, last)| (first, last)).collect::<Vec<_>>());

        let ruleset = Ruleset { sets: ruleset.sets.into_iter().map(without_ranges).collect(), ..ruleset };
        nft.apply(&tear_down(&ruleset)).expect("everything can be deleted in one batch");
        let empty = Snapshot { table: nft.snapshot().expect("a snapshot").table, ..Snapshot::default() };
        assert_eq!(nft.snapshot().expect("a snapshot"), empty);
        nft.apply(&[Change::DeleteTable]).expect("the table can be deleted");
        assert_eq!(nft.snapshot().expect("a snapshot"), Snapshot::default());
    });
}

/// Ranges go with their set; the other elements are deleted one by one before.
fn without_ranges((name, mut set): (String, Set)) -> (String, Set) {
    set.elements.retain(|_, element| element.last.is_none());
    (name, set)
}

#[test]
fn a_locked_table_is_safe_from_others_and_outlives_its_owner() {
    if !kernel_locks_tables() {
        return;
    }
    in_namespace(|| {
        let mut owner = KernelNft::open().expect("a netlink socket");
        owner.apply(&install(&everything(), true)).expect("the batch is taken");

        let mut other = KernelNft::open().expect("a netlink socket");
        let spec = sets()["be4p"].spec.clone();
        let change = [add_host(&spec, 0x2000, "10.1.0.1")];
        assert_eq!(other.apply(&change), Err(NftError::OwnedByOther));
        assert_eq!(other.apply(&[Change::AddTable { lock: true }]), Err(NftError::OwnedByOther));
        assert!(other.snapshot().expect("a snapshot").table.expect("the table").owned_by_other);

        run("nft", &["flush", "ruleset"]);
        let snapshot = owner.snapshot().expect("a snapshot");
        assert_holds(&owner, &snapshot, &everything());

        drop(owner);
        let orphan = other.snapshot().expect("a snapshot");
        assert_holds(&other, &orphan, &everything());
        assert!(!orphan.table.expect("the table").owned_by_other);
        other.apply(&[Change::AddTable { lock: true }]).expect("an orphan can be adopted");
        other.apply(&change).expect("and changed");
        let table = other.snapshot().expect("a snapshot").table.expect("the table");
        assert!(table.locked && !table.owned_by_other);
    });
}

#[test]
fn a_table_that_was_never_locked_cannot_be_locked_later() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        nft.apply(&[Change::AddTable { lock: false }]).expect("the batch is taken");
        assert_eq!(nft.apply(&[Change::AddTable { lock: true }]), Err(NftError::CannotLock));
        nft.apply(&[Change::AddTable { lock: false }]).expect("adding it again changes nothing");
    });
}

#[test]
fn without_privileges_nothing_is_changed_and_the_error_says_so() {
    in_namespace(|| run_as_nobody("nobody_may_not_change_anything"));
}

#[test]
#[ignore = "runs as another user, by the test above"]
fn nobody_may_not_change_anything() {
    let mut nft = KernelNft::open().expect("a netlink socket");
    assert_eq!(nft.apply(&[Change::AddTable { lock: false }]), Err(NftError::NotPermitted));
    assert_eq!(nft.snapshot(), Err(NftError::NotPermitted));
}

#[test]
fn the_monitor_hears_of_foreign_hands_only() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        let mut monitor = NftMonitor::open(nft.port_id()).expect("a netlink socket");
        nft.apply(&install(&everything(), false)).expect("the batch is taken");
        assert_eq!(monitor.drain().expect("news"), MonitorNews::default());

        nft_script("add table inet other; add chain inet other c; add table ip shunt; add chain ip shunt c");
        assert_eq!(monitor.drain().expect("news"), MonitorNews::default());

        for command in [
            "add element inet shunt kill { 0x00000800 }",
            "delete element inet shunt kill { 0x00000800 }",
            "flush table inet shunt",
            "add rule inet shunt pre accept",
            "add set inet shunt foreign { type mark; }",
            "delete table inet shunt",
        ] {
            run("nft", &[command]);
            let news = monitor.drain().expect("news");
            assert!(news.foreign_change && !news.overrun, "{command}: {news:?}");
            assert_eq!(news.process.expect("who").0, "nft", "{command}");
        }
    });
}

#[test]
fn a_monitor_that_lost_messages_says_so() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        let mut monitor = NftMonitor::open(0x7fff_0001).expect("a netlink socket");
        let ruleset = everything();
        nft.apply(&install(&ruleset, false)).expect("the batch is taken");
        let spec = ruleset.sets["be4p"].spec.clone();
        let changes: Vec<_> = (0..100_000).map(|n| add_host(&spec, 0x10_0000 + n, "10.1.0.1")).collect();
        nft.apply(&changes).expect("the batch is taken");
        assert!(monitor.drain().expect("news").overrun);
        assert_eq!(monitor.drain().expect("news"), MonitorNews::default());
    });
}

#[test]
fn fifty_thousand_elements_go_in_and_come_back_in_one_batch_each() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        nft.apply(&install(&everything(), true)).expect("the batch is taken");
        let spec = sets()["r4"].spec.clone();
        let route = |n: u32| Change::AddElement {
            set: "r4".into(),
            spec: spec.clone().into(),
            key: Key::new(&[
                KeyPart::Address(IpAddr::from((0x0a01_0000 + n / 100).to_be_bytes())),
                KeyPart::Protocol(Protocol::Udp),
                KeyPart::Port(u16::try_from(n % 100).expect("less than 100")),
            ]),
            element: Element {
                counter: Counter { packets: u64::from(n), bytes: u64::from(n) * 100 },
                ..element(Value::Mark(0x10_0000 + n)).comment("some route")
            },
        };
        let changes: Vec<_> = (1..=50_000).map(route).collect();
        let before = nft.generation().expect("a number");
        nft.apply(&changes).expect("the batch is taken");
        assert_eq!(nft.generation().expect("a number"), before.wrapping_add(1), "one commit");

        let snapshot = nft.snapshot().expect("a snapshot");
        assert_eq!(snapshot.sets["r4"].elements.len(), 50_001);
        let counters = nft.counters("r4").expect("counters");
        assert_eq!(counters.len(), 50_001);
        let packets: u64 = counters.iter().map(|(_, counter)| counter.packets).sum();
        assert_eq!(packets, 3 + (1..=50_000u64).sum::<u64>());

        // Some of them, in more than one request.
        let asked: Vec<Key> = counters.iter().step_by(100).map(|(key, _)| key.clone()).collect();
        let some = nft.some_counters("r4", &asked).expect("some counters");
        assert!(some.len() == 501 && some.iter().all(|one| counters.contains(one)));
        let nobody = Key::from_kernel(&[0xff; 12]);
        let missing = nft.some_counters("r4", &[asked[0].clone(), nobody]);
        assert!(matches!(missing, Err(NftError::NotTold { errno: Errno::ENOENT, .. })), "{missing:?}");
    });
}

/// What a batch came to, without the words of it.
fn outcome(result: Result<(), NftError>) -> Result<(), Vec<Option<usize>>> {
    result.map_err(|error| match error {
        NftError::Refused(refusals) => refusals.into_iter().map(|refusal| refusal.change).collect(),
        NftError::CannotLock => vec![Some(0)],
        other => panic!("{other}"),
    })
}

#[test]
fn the_twin_in_memory_takes_and_refuses_what_the_kernel_does() {
    in_namespace(|| {
        let mut kernel = KernelNft::open().expect("a netlink socket");
        let mut memory = MemoryNft::new();
        for (index, batch) in batches().into_iter().enumerate() {
            let (by_kernel, by_memory) = (outcome(kernel.apply(&batch)), outcome(memory.apply(&batch)));
            assert_eq!(by_memory, by_kernel, "batch {index}: {:?}", batch.last());
            let ruleset = memory.ruleset().cloned();
            let snapshot = kernel.snapshot().expect("a snapshot");
            assert_eq!(snapshot.table, memory.snapshot().expect("a snapshot").table, "batch {index}");
            assert_holds(&kernel, &snapshot, &ruleset.unwrap_or_default());
        }
    });
}

/// 50,000 routes of five elements each.
fn many_routes() -> Vec<Change> {
    let sets = sets();
    let add = |set: &str, key: &[KeyPart], element| Change::AddElement {
        set: set.into(),
        spec: sets[set].spec.clone().into(),
        key: Key::new(key),
        element,
    };
    let route = |n: u32| {
        let mark = KeyPart::Mark(0x10_0000 + n * 8);
        let listen = KeyPart::Address(IpAddr::from((0x0a01_0000 + n / 100).to_be_bytes()));
        let port = KeyPart::Port(u16::try_from(n % 100).expect("less than 100"));
        let name = format!("route-{n}");
        [
            add("r4", &[listen, KeyPart::Protocol(Protocol::Tcp), port], element(Value::Mark(n)).comment(&name)),
            add("be4", &[mark], element(endpoint("10.0.0.1:80")).comment("backend")),
            add("acct", &[mark], element(Value::None)),
            add("lb", &[mark], element(Value::Goto("guard".into()))),
            add("slot4", &[mark, KeyPart::Slot(0)], element(endpoint("10.0.0.1:80"))),
        ]
    };
    let mut changes: Vec<_> = (1..=50_000).flat_map(route).collect();
    changes.sort_by(|one, other| set_name(one).cmp(set_name(other)));
    changes
}

fn set_name(change: &Change) -> &str {
    match change {
        Change::AddElement { set, .. } => set,
        other => panic!("{other:?}"),
    }
}

/// CPU time of this thread, the kernel's part included, ms.
fn cpu() -> i64 {
    use nix::sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    };
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("usage");
    usage.user_time().num_milliseconds() + usage.system_time().num_milliseconds()
}

/// The most memory of the process since the last call, KiB.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    std::fs::write("/proc/self/clear_refs", "5").expect("procfs");
    peak.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
#[ignore = "a measurement: run it alone, with --release --nocapture"]
fn what_a_quarter_of_a_million_elements_cost() {
    in_namespace(|| {
        let mut nft = KernelNft::open().expect("a netlink socket");
        nft.apply(&install(&everything(), true)).expect("the batch is taken");
        let changes = many_routes();
        peak_memory();
        let (mut clock, mut used) = (Instant::now(), cpu());
        let mut lap = |what: &str| {
            let (wall, busy) = (clock.elapsed().as_millis(), cpu() - used);
            println!("{what}: {wall} ms, CPU {busy} ms, memory at most {} MiB", peak_memory() / 1024);
            (clock, used) = (Instant::now(), cpu());
        };
        lap("nothing");
        nft.apply(&changes).expect("the batch is taken");
        lap("250,000 elements in");
        nft.apply(&[add_host(&sets()["be4p"].spec, 0x2000, "10.1.0.1")]).expect("the batch is taken");
        lap("one element more");
        nft.counters("r4").expect("counters");
        lap("50,000 counters, maybe of a table that still grows");
        nft.counters("r4").expect("counters");
        lap("50,000 counters of keys with comments");
        nft.counters("acct").expect("counters");
        lap("50,000 counters of bare marks");
        let elements: usize = nft.snapshot().expect("a snapshot").sets.values().map(|set| set.elements.len()).sum();
        lap(&format!("a snapshot of {elements} elements"));
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_sets_come_back_as_they_were_applied(sets in random::sets()) {
        let ruleset = Ruleset { sets, chains: BTreeMap::from([("target".into(), Chain { base: None, rules: vec![] })]), ..Ruleset::default() };
        in_namespace(move || {
            let mut nft = KernelNft::open().expect("a netlink socket");
            nft.apply(&install(&ruleset, true)).expect("the batch is taken");
            let snapshot = nft.snapshot().expect("a snapshot");
            assert_holds(&nft, &snapshot, &ruleset);
            nft.apply(&tear_down(&ruleset)).expect("everything can be deleted");
        });
    }
}
