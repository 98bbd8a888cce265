//! The table and the program on this kernel. Capabilities belong to a thread, so each test takes its own away in a thread that ends with it.

use std::{ffi::CStr, path::Path};

use nix::sched::{CloneFlags, unshare};
use proxy_abi::flow::{Endpoint, IPV4};

use super::*;
use crate::kernel::bpf::tests::{effective, keep_only};

const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_BPF: u64 = 1 << 39;
const CAP_PERFMON: u64 = 1 << 38;

/// Whether this run may load programs; says so when not.
fn privileged() -> bool {
    let enough = effective() & (CAP_BPF | CAP_NET_ADMIN) == CAP_BPF | CAP_NET_ADMIN;
    if !enough {
        println!("skipped: needs CAP_BPF and CAP_NET_ADMIN");
    }
    enough
}

#[test]
fn cap_bpf_and_cap_net_admin_are_enough_for_the_self_probe_and_every_packet_comes_out_as_computed_here() {
    if !privileged() {
        return;
    }
    for keep in [CAP_BPF | CAP_NET_ADMIN, CAP_BPF | CAP_NET_ADMIN | CAP_PERFMON, u64::MAX] {
        let probe = move || {
            keep_only(keep);
            HandoffTable::self_probe()
        };
        let report =
            std::thread::spawn(probe).join().expect("the thread ends").unwrap_or_else(|e| panic!("{e}: {e:?}"));
        println!("{report:?}");
        assert!(report.packets > 200);
        // Of a million that the verifier walks at most; what a kernel that reports none of them (before 5.16) would say is not known.
        assert!(report.verified_instructions.is_none_or(|walked| walked < 50_000));
    }
}

/// A test that needs the kernel: on a thread with a network of its own and a BPF file system of its own, which go with the thread.
fn in_a_namespace(test: impl FnOnce(&Path) + Send) {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    if !privileged() || effective() & CAP_SYS_ADMIN == 0 {
        println!("skipped: needs CAP_SYS_ADMIN too, for namespaces");
        return;
    }
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces of its own");
        mount(c"none", c"/", c"none", libc::MS_REC | libc::MS_PRIVATE);
        mount(c"bpf", c"/sys/fs", c"bpf", 0);
        test(Path::new("/sys/fs/handoff"));
    };
    std::thread::scope(|scope| scope.spawn(inside).join().expect("the test"));
}

fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: libc::c_ulong) {
    // SAFETY: three strings that live during the call, and no data.
    let done = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
    assert_eq!(done, 0, "mount {target:?}: {}", std::io::Error::last_os_error());
}

const SIZES: Sizes = Sizes { flows: 2, events: 4096 };

fn new_flow(id: u64, port: u16) -> NewFlow {
    let end = |host, port: u16| Endpoint::v4([192, 0, 2, host], port.to_be_bytes());
    let (client, listen, source, backend) = (end(1, port), end(2, 443), end(3, port), end(4, 80));
    let there = HandoffEntry { source, destination: backend, ..HandoffEntry::default() };
    let back = HandoffEntry { source: listen, destination: client, ..HandoffEntry::default() };
    let entries = [(HandoffKey::new(client, listen, IPV4), there), (HandoffKey::new(backend, source, IPV4), back)];
    NewFlow { id, owner: [7; OWNER_BYTES], entries, interfaces: [0; 2] }
}

#[test]
fn a_daemon_that_comes_after_finds_the_flows_and_the_interfaces_and_nothing_is_left_at_the_end() {
    const LOOPBACK: u32 = 1;
    in_a_namespace(|folder| {
        let first = HandoffTable::open(folder, SIZES).expect("new maps");
        first.attach(LOOPBACK).expect("attached");
        first.attach(LOOPBACK).expect("attached already");
        let gate = first.insert(&new_flow(41, 1_000)).expect("room");
        first.open_gate(gate, [Boundary { own_seq: 5, first_seq: 6, acked: 5 }; 2]);
        drop(first);

        // Sizes are those of the maps that are there.
        let second = HandoffTable::open(folder, Sizes { flows: 64, events: 8192 }).expect("adopted");
        assert_eq!(second.attached(), [LOOPBACK]);
        assert_eq!(second.used(), (1, 2));
        let found = second.walk();
        assert_eq!((found[0].gate, found[0].flow.id, found[0].flow.gate), (gate, 41, proxy_abi::handoff::gate::OPEN));
        assert_eq!(found[0].flow.ends[1].own_seq, 5);
        second.detach(LOOPBACK).expect("detached");
        assert_eq!(second.attached(), [] as [u32; 0]);
        assert_eq!(second.remove(gate).map(|flow| flow.id), Some(41));
        assert_eq!(second.entry(&new_flow(41, 1_000).entries[1].0), None);
        drop(second);
        HandoffTable::remove_pins(folder).expect("removed");
        assert!(!folder.exists());
    });
}

/// What `tc` says in the namespace of this thread.
fn tc(arguments: &str) -> String {
    let output = std::process::Command::new("tc").args(arguments.split_whitespace()).output().expect("start tc");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn before_tcx_a_filter_is_attached_found_again_and_its_clsact_goes_with_the_last_filter_where_it_was_made_for_it() {
    const LOOPBACK: u32 = 1;
    in_a_namespace(|folder| {
        let other = folder.with_file_name("another-daemon");
        let mut loaded: Vec<_> = (0..3).map(|_| object::load(SIZES).expect("loaded")).collect();
        let mut attach = |nth: usize, folder: &Path| {
            links::attach_clsact(object::program(&mut loaded[nth]).expect("the program"), folder, LOOPBACK, "lo")
        };
        let filters = || tc("filter show dev lo ingress").matches("direct-action").count();
        let clsact = || tc("qdisc show dev lo").contains("clsact");
        for folder in [folder, &other] {
            object::make_folder(folder).expect("a folder");
        }
        attach(0, folder).expect("attached");
        assert_eq!((links::attached(folder), filters(), clsact()), (vec![LOOPBACK], 1, true));
        // A second daemon of this namespace does not take the place of the first.
        attach(1, &other).expect("attached beside it");
        assert_eq!(filters(), 2);
        links::detach(folder, LOOPBACK).expect("detached");
        assert_eq!((links::attached(folder), filters(), clsact()), (vec![], 1, true), "the other's is left alone");
        // The first again; it dies before it has left a note, and its next life takes over what it finds.
        attach(0, folder).expect("attached");
        links::detach(&other, LOOPBACK).expect("detached");
        std::fs::remove_dir(object::links_folder(folder).join("clsact-1")).expect("the note");
        attach(2, folder).expect("attached in its place");
        assert_eq!(filters(), 1);
        links::detach(folder, LOOPBACK).expect("detached");
        assert_eq!((filters(), clsact()), (0, true), "whose it was is not known any more");
        tc("qdisc del dev lo clsact");
        attach(1, folder).expect("attached");
        links::detach(folder, LOOPBACK).expect("detached");
        assert!(!clsact(), "made for the filter, and gone with it");
    });
}

#[test]
fn a_full_table_and_ports_that_are_taken_are_refused_and_leave_nothing_behind() {
    in_a_namespace(|folder| {
        let table = HandoffTable::open(folder, SIZES).expect("new maps");
        let gate = table.insert(&new_flow(1, 1)).expect("room");
        assert!(matches!(table.insert(&new_flow(2, 1)), Err(InsertError::Taken)));
        assert_eq!(table.entry(&new_flow(1, 1).entries[0].0).map(|entry| entry.flow), Some(gate.0));
        table.insert(&new_flow(3, 3)).expect("room for a second");
        assert!(matches!(table.insert(&new_flow(4, 4)), Err(InsertError::Full { capacity: 2 })));
        assert!(table.remove(gate).is_some());
        assert!(table.remove(gate).is_none());
        table.insert(&new_flow(5, 5)).expect("room again");
    });
}

#[test]
fn what_the_daemon_passes_on_itself_counts_with_its_fin_and_who_was_first() {
    let pass_on = |store: &dyn HandoffStore| {
        let gate = store.insert(&new_flow(1, 1)).expect("room");
        store.open_gate(gate, [Boundary { own_seq: 500, first_seq: u32::MAX - 9, acked: 400 }; 2]);
        store.passed_on(gate, 0, PassedOn { bytes: 30, own_seq: 530, finished: true });
        store.passed_on(gate, 1, PassedOn { bytes: 0, own_seq: 500, finished: true });
        let flow = store.flow(gate);
        let [client, backend] = &flow.ends;
        assert_eq!((client.bytes(), client.own_seq, backend.bytes(), backend.own_seq), (30, 500, 0, 530));
        assert_eq!((client.fin_end, backend.fin_end), (21, u32::MAX - 8), "the number after each FIN");
        assert_eq!((client.seen & seen::FIN, backend.seen & seen::FIN), (seen::FIN, seen::FIN));
        assert_eq!(flow.closing, closing::CLIENT_FIRST);
    };
    pass_on(&MemoryHandoffs::new(2).expect("a table"));
    in_a_namespace(|folder| pass_on(&HandoffTable::open(folder, SIZES).expect("new maps")));
}

#[test]
fn a_folder_that_is_not_in_a_bpf_file_system_is_refused_by_name() {
    let error = HandoffTable::open(Path::new("/tmp/shunt-no-bpffs"), SIZES).expect_err("no BPF file system");
    assert!(matches!(&error, HandoffError::NotBpffs(folder) if folder == Path::new("/tmp/shunt-no-bpffs")), "{error}");
}
