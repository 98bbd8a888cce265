//! What this process may do.

use super::Check;
use crate::kernel::capability::{Probe, privileges};

pub(super) fn checks(probe: &Probe) -> Vec<Check> {
    let held = privileges::effective();
    let net_admin =
        Check::of("CAP_NET_ADMIN", "programs nftables, reads conntrack, sets the kernel's network settings");
    let bpf = Check::of("CAP_BPF", "loads eBPF programs, which the engines handoff and sockmap need; nft does not");
    let raw = Check::of("CAP_NET_RAW", "no engine of this build needs it");
    let not_needed = "absent; not needed by the nft engine";
    vec![
        if probe.net_admin {
            net_admin.ok("held; nothing more is needed for the nft engine")
        } else {
            net_admin.missing(
                "absent",
                "run as root, or: setpriv --ambient-caps +net_admin --inh-caps +net_admin shunt …; \
                 systemd: AmbientCapabilities=CAP_NET_ADMIN; containers: --cap-add NET_ADMIN",
            )
        },
        bpf.ok(if held.bpf || held.sys_admin { "held" } else { not_needed }),
        raw.ok(if held.net_raw { "held" } else { not_needed }),
    ]
}
