//! The table and the program on this kernel. Capabilities belong to a thread, so each test takes its own away in a thread that ends with it.

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
    // The verifier is stricter with these two than with all: without CAP_PERFMON it guards against speculation.
    for keep in [CAP_BPF | CAP_NET_ADMIN | CAP_PERFMON, u64::MAX] {
        let probe = move || {
            keep_only(keep);
            HandoffTable::self_probe()
        };
        let report =
            std::thread::spawn(probe).join().expect("the thread ends").unwrap_or_else(|e| panic!("{e}: {e:?}"));
        println!("{report:?}");
        assert!(report.packets > 200);
    }
}
