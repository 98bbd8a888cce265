//! What this process may do.

use std::fs;

use proxy_core::plan::Plan;

use super::Check;
use crate::kernel::capability::{Probe, privileges};

/// Ports below this need CAP_NET_BIND_SERVICE (`inet_csk_get_port`), unless the file says otherwise.
const UNPRIVILEGED: u16 = 1024;

/// Where the daemon itself listens.
pub(super) fn low_ports(plan: &Plan) -> Check {
    let check =
        Check::of("CAP_NET_BIND_SERVICE", "the daemon listens for the routes it relays, on low ports with it only");
    let first = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").ok();
    let first = first.and_then(|first| first.trim().parse().ok()).unwrap_or(UNPRIVILEGED);
    low_port(check, plan, first, privileges::effective().net_bind_service)
}

fn low_port(check: super::Unfound, plan: &Plan, first: u16, held: bool) -> Check {
    let relayed = plan.routes().iter().filter(|route| route.is_relayed());
    let low =
        relayed.flat_map(|route| route.sockets().map(|at| (at, &route.route.name))).find(|(at, _)| at.port() < first);
    match low {
        None => check.ok(format!("not needed: no relayed route listens below {first}")),
        Some(_) if held => check.ok("held"),
        Some((at, route)) => check.missing(
            format!("absent, and route \"{route}\" listens on {at}"),
            "run as root, or systemd: AmbientCapabilities=CAP_NET_ADMIN CAP_NET_BIND_SERVICE; containers: --cap-add \
             NET_BIND_SERVICE; or listen on higher ports",
        ),
    }
}

pub(super) fn checks(probe: &Probe) -> Vec<Check> {
    let held = privileges::effective();
    let net_admin =
        Check::of("CAP_NET_ADMIN", "programs nftables, reads conntrack, sets the kernel's network settings");
    let bpf = Check::of("CAP_BPF", "loads eBPF programs, which the engines handoff and sockmap need; nft does not");
    let raw = Check::of(
        "CAP_NET_RAW",
        "ends killed connections at once, and the engine handoff needs it; nft forwards without",
    );
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proxy_core::{capability::Capabilities, config::parse, plan::plan};

    use super::*;
    use crate::doctor::State;

    #[test]
    fn only_a_relayed_route_on_a_low_port_needs_the_privilege_to_bind_it() {
        let state = |engine: &str, port: u16, held: bool| {
            let text = format!(
                "[[route]]\nname = \"web\"\nengine = \"{engine}\"\nlisten = [\"10.0.0.1:{port}\"]\nbackends = [\"10.0.1.1:80\"]\n"
            );
            let config = parse(&text, Path::new("/t.toml")).expect("valid");
            low_port(Check::of("bind", ""), &plan(&config, &Capabilities::all()), 1024, held).state
        };
        assert_eq!(state("copy", 80, false), State::Missing);
        assert_eq!(state("copy", 80, true), State::Ok);
        assert_eq!(state("copy", 8080, false), State::Ok);
        assert_eq!(state("nft", 80, false), State::Ok);
    }
}
