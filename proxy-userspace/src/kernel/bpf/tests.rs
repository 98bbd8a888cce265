//! The probe, with and without the privileges it needs.
//!
//! Capabilities belong to a thread, so each test takes its own away in a thread that ends with it.

use std::{fs, thread};

use super::*;

const CAP_NET_ADMIN: u32 = 12;
const CAP_BPF: u32 = 39;
const PROBE: u64 = 1 << CAP_NET_ADMIN | 1 << CAP_BPF;

/// The effective capabilities of this thread.
pub(super) fn effective() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("CapEff");
    u64::from_str_radix(line.trim(), 16).expect("a hexadecimal set")
}

/// Takes every capability from this thread that is not in `keep`.
pub(super) fn keep_only(keep: u64) {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let set = effective() & keep;
    let header = Header { version: VERSION_3, pid: 0 };
    // Low and high words, each as effective, permitted, inheritable.
    let data: [[u32; 3]; 2] = [[set as u32, set as u32, 0], [(set >> 32) as u32, (set >> 32) as u32, 0]];
    // SAFETY: capset(2), version 3: a header and two sets of three words, all alive during the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    assert_eq!(result, 0, "capset: {}", std::io::Error::last_os_error());
    assert_eq!(effective(), set);
}

fn probe_with_only(keep: u64) -> Result<ProbeReport, BpfError> {
    let probe = move || {
        keep_only(keep);
        self_probe()
    };
    thread::spawn(probe).join().expect("the thread ends")
}

#[test]
fn the_embedded_object_has_the_program_and_maps_of_this_abi() {
    let object = aya_obj::Object::parse(OBJECT).expect("an eBPF object");
    assert!(object.programs.contains_key(PROGRAM));
    assert_eq!(object.license.to_bytes(), b"GPL");
    let layout = |name: &str| {
        let map = object.maps.get(name).unwrap_or_else(|| panic!("no map {name}"));
        (map.key_size() as usize, map.value_size() as usize)
    };
    assert_eq!(layout("ABI"), (4, size_of_val(&ABI_VERSION)));
    assert_eq!(layout("OUTCOMES"), (4, size_of::<u64>()));
    assert_eq!(layout("FLOWS"), (size_of::<FlowKey>(), size_of::<FlowCounters>()));
    assert_eq!(object.maps["OUTCOMES"].max_entries(), outcome::COUNT);
}

#[test]
fn without_privileges_the_probe_says_not_permitted() {
    let error = probe_with_only(0).expect_err("no capability at all");
    assert!(matches!(error, BpfError::NotPermitted(_)), "{error:?}");
}

/// An unprivileged run of the tests checks the refusal instead: either way something is promised.
#[test]
fn cap_bpf_and_cap_net_admin_are_enough_to_count_every_packet_exactly() {
    if effective() & PROBE != PROBE {
        let result = probe_with_only(PROBE);
        assert!(matches!(result, Err(BpfError::NotPermitted(_))), "{result:?}");
        return;
    }
    let jit = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").expect("readable");
    // The verifier is stricter with these two than with all: without CAP_PERFMON it guards against speculation.
    for keep in [PROBE, u64::MAX] {
        let report = probe_with_only(keep).expect("this kernel runs the program");
        assert_eq!(report.abi_version, ABI_VERSION);
        assert_eq!(report.packets, packet::all().len());
        assert_eq!(report.jitted(), jit.trim() != "0", "{report}");
        println!("{report}; {report:?}");
    }
}

#[test]
fn cap_bpf_without_cap_net_admin_is_not_permitted() {
    let error = probe_with_only(1 << CAP_BPF).expect_err("classifiers need CAP_NET_ADMIN");
    assert!(matches!(error, BpfError::NotPermitted(_)), "{error:?}");
}

#[test]
fn the_packets_cover_every_outcome_but_a_full_table() {
    let seen: std::collections::BTreeSet<u32> = packet::all().iter().map(|packet| packet.expected.outcome()).collect();
    assert_eq!(seen, (0..outcome::TABLE_FULL).collect());
}
