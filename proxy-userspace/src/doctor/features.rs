//! What the kernel was built with.

use proxy_core::{
    capability::{Handoff, Sockmap},
    plan::MAX_STREAM_PORTS,
};

use super::Check;
use crate::kernel::{
    bpf::{BpfError, ProbeReport},
    capability::{NftFacts, Probe, ebpf::Feature},
    lookup,
};

const NOT_ASKED: &str = "not known: asking needs CAP_NET_ADMIN";
const RUN_AS_ROOT: &str = "run shunt doctor with CAP_NET_ADMIN";

pub(super) fn checks(probe: &Probe) -> Vec<Check> {
    let mut checks = vec![nf_tables(probe)];
    if let Some(nft) = &probe.nft {
        checks.extend(optional(nft));
    }
    checks.push(conntrack(probe));
    checks.push(port_ranges(probe));
    let ipv6 = Check::of("IPv6", "routes that listen on IPv6 addresses");
    checks.push(ipv6.either(
        probe.ipv6,
        "there",
        "switched off",
        "boot without ipv6.disable=1, if such routes are wanted",
    ));
    checks
}

fn nf_tables(probe: &Probe) -> Check {
    let check = Check::of("nf_tables", "the nft engine is made of it: NAT, maps, fib, conntrack in the inet family");
    let modules = "modprobe -a nf_tables nft_chain_nat nft_nat nft_masq nft_fib_inet nft_reject_inet nft_ct nft_limit";
    match (probe.nf_tables, &probe.nft) {
        (None, _) => check.warn(NOT_ASKED, RUN_AS_ROOT),
        (Some(false), _) => check.missing("the kernel has none", modules),
        (Some(true), None) => {
            check.missing("it does not answer as expected", "look at dmesg; report it with shunt's version")
        }
        (Some(true), Some(facts)) if facts.forwards() => {
            check.ok("NAT, masquerade, fib, reject, limit in the inet family")
        }
        (Some(true), Some(facts)) => check.missing(
            format!("the kernel lacks {}", facts.missing().join(", ")),
            format!("{modules}; or a kernel built with those"),
        ),
    }
}

fn optional(nft: &NftFacts) -> Vec<Check> {
    let limits =
        Check::of("connection limits", "limits.connections and limits.connections_per_client in the nft engine");
    let balance = Check::of("balancing", "routes with several backends in the nft engine");
    let timeouts = Check::of("idle timeouts", "timeouts.idle and timeouts.half_closed as the kernel's own, per route");
    let socket = Check::of("transparent sockets", "source_address = \"client\" where the daemon dials (splice, copy)");
    let owner = Check::of("table ownership", "keeps others, and nft flush ruleset, from touching shunt's table");
    let flowtable = Check::of("flowtable", "a faster path for established flows; not used by this build");
    vec![
        limits.either(nft.connlimit, "there", "absent (CONFIG_NFT_CONNLIMIT)", "modprobe nft_connlimit"),
        balance.either(
            nft.numgen && nft.hash,
            "there",
            "absent (CONFIG_NFT_NUMGEN, CONFIG_NFT_HASH)",
            "modprobe -a nft_numgen nft_hash",
        ),
        timeouts.either(
            nft.ct_timeout,
            "there",
            "absent (CONFIG_NF_CONNTRACK_TIMEOUT)",
            "a kernel built with CONFIG_NF_CONNTRACK_TIMEOUT",
        ),
        socket.either(nft.socket, "there", "absent (CONFIG_NFT_SOCKET)", "modprobe nft_socket"),
        owner.either(
            nft.owner_persist,
            "there",
            "absent (since Linux 6.9): shunt watches for foreign changes and repairs them",
            "nothing needs to be done; a newer kernel adds the protection",
        ),
        flowtable.ok(if nft.flowtable { "there" } else { "absent" }),
    ]
}

fn port_ranges(probe: &Probe) -> Check {
    let check =
        Check::of("port ranges", "one socket per worker for all ports of a relayed route, instead of one per port");
    let without = "give the process CAP_BPF and CAP_NET_ADMIN, on Linux 5.9 or newer; an old one may want CAP_PERFMON too, and before \
                   5.11 LimitMEMLOCK=infinity; or listen on few ports";
    match probe.sk_lookup {
        Some(true) => check.ok("sk_lookup leads them to one socket"),
        Some(false) => {
            let why = lookup::probe().err().map_or(String::new(), |error| format!(" ({error})"));
            check.warn(format!("no sk_lookup{why}: a socket per port, at most {MAX_STREAM_PORTS} per route"), without)
        }
        None => check.warn("eBPF is not permitted to this process", without),
    }
}

fn conntrack(probe: &Probe) -> Check {
    let check = Check::of("conntrack", "where the numbers of every forwarded connection come from");
    match probe.conntrack_netlink {
        None => check.warn(NOT_ASKED, RUN_AS_ROOT),
        Some(true) => check.ok("answers over netlink"),
        Some(false) => check.missing("does not answer over netlink", "modprobe nf_conntrack_netlink"),
    }
}

/// shunt's own object: verified by this kernel, run on packets, and its counters read.
pub(super) fn own_object(probe: Result<ProbeReport, BpfError>) -> Check {
    let check = Check::of("eBPF self-probe", "the engines that read the stream will run programs of this object");
    match probe {
        Ok(report) if report.jitted_bytes == 0 => check.warn(
            format!("{} packets counted right, but programs are interpreted", report.packets),
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Ok(report) => check.ok(format!("{} packets counted right, ABI {}", report.packets, report.abi_version)),
        Err(error) => check.warn(error.to_string(), format!("{}; the nft engine does without", error.mend())),
    }
}

/// The engine `sockmap` is used where this says so, and a route asks for it.
pub(super) fn sockmap(trust: &Sockmap) -> Check {
    let check = Check::of("sockmap self-probe", "routes with engine = \"sockmap\": known bytes through joined sockets");
    match trust {
        Sockmap::Trusted => check.ok("all bytes came whole, in order and with their ends"),
        Sockmap::Refused(what) => {
            check.warn(what.clone(), "run with CAP_BPF and CAP_NET_ADMIN on a newer kernel; splice and copy do without")
        }
    }
}

/// Whether connections can be handed over to the packet level.
pub(super) fn handoff(found: &Handoff) -> Check {
    let check = Check::of("handoff", "the engine handoff: relayed connections at the cost of forwarded ones");
    let mend = match found {
        Handoff::Works => return check.ok("the self-probe has passed"),
        Handoff::NotAsked => return check.ok("not asked"),
        Handoff::NotPermitted => {
            "run with CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW, before Linux 5.11 with LimitMEMLOCK=infinity too; splice serves these \
             routes meanwhile"
        }
        Handoff::NoTc => "use a newer kernel; splice serves these routes meanwhile",
        Handoff::NoBpffs => {
            "mount -t bpf bpf /sys/fs/bpf, and let the process write there; splice serves these routes meanwhile"
        }
        Handoff::NotBroughtUp(_) => "see the daemon's log; splice serves these routes meanwhile",
        Handoff::ProbeFailed(_) => "report it with the output of uname -a; splice serves these routes meanwhile",
    };
    check.warn(found.to_string(), mend)
}

/// All eBPF features in one line: they are there together or not at all.
pub(super) fn ebpf(features: &[Feature]) -> Check {
    let check = Check::of("eBPF", "the engines handoff and sockmap; the nft engine works without");
    let names = |wanted: fn(&Result<bool, String>) -> bool| {
        let found: Vec<_> = features.iter().filter(|one| wanted(&one.supported)).map(|one| one.name).collect();
        found.join(", ")
    };
    let absent = names(|supported| *supported == Ok(false));
    let problem = features.iter().find_map(|one| one.supported.as_ref().err());
    match problem {
        Some(problem) => check.warn(format!("not known: {problem}"), "run shunt doctor with CAP_BPF, or as root"),
        None if absent.is_empty() => check.ok(names(|supported| *supported == Ok(true))),
        None => check
            .warn(format!("absent: {absent}"), "a kernel built with CONFIG_BPF_SYSCALL and CONFIG_BPF_STREAM_PARSER"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    fn feature(name: &'static str, supported: Result<bool, String>) -> Feature {
        Feature { name, supported }
    }

    #[test]
    fn ebpf_is_never_required() {
        let absent = ebpf(&[feature("program sk_skb", Ok(false)), feature("map ringbuf", Ok(true))]);
        assert_eq!((absent.state, absent.found.as_str()), (State::Warn, "absent: program sk_skb"));
        let unknown = ebpf(&[feature("program sk_skb", Err("bpf_prog_load: EPERM".into()))]);
        assert_eq!(unknown.state, State::Warn);
        assert_eq!(ebpf(&[feature("map ringbuf", Ok(true))]).state, State::Ok);
    }

    #[test]
    fn a_kernel_without_nf_tables_cannot_run_the_engine() {
        let probe = Probe {
            net_admin: true,
            nf_tables: Some(false),
            nft: None,
            conntrack_netlink: Some(false),
            sk_lookup: None,
            ipv6: false,
            handoff: Handoff::NotPermitted,
            filters: Vec::new(),
            scratch_namespace: false,
        };
        let states: Vec<_> = checks(&probe).into_iter().map(|check| (check.name, check.state)).collect();
        assert!(states.contains(&("nf_tables".to_owned(), State::Missing)), "{states:?}");
        assert!(states.contains(&("conntrack".to_owned(), State::Missing)), "{states:?}");
        assert!(states.contains(&("IPv6".to_owned(), State::Warn)), "{states:?}");
    }
}
