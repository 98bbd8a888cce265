//! The probe of the kernel, on the real one. Needs root; every test works in a network namespace of its own.

use nix::sched::{CloneFlags, unshare};
use proxy_userspace::kernel::{
    capability::probe_details,
    sysctl::{Restored, Routes, Settings, Sysctl, needed, restore},
};

/// Runs `body` in a fresh network namespace, on a thread that ends with it.
fn in_namespace<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare(CLONE_NEWNET) needs root");
        body()
    })
    .join()
    .expect("the test's thread")
}

fn listing() -> String {
    let output = std::process::Command::new("nft").args(["list", "ruleset"]).output().expect("nft");
    assert!(output.status.success());
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn the_probe_finds_what_this_kernel_has_and_leaves_nothing() {
    let (probe, after) = in_namespace(|| (probe_details(), listing()));
    let nft = probe.nft.clone().expect("facts");
    assert!(probe.net_admin && probe.scratch_namespace, "{probe:?}");
    assert!(nft.forwards(), "{nft:?}");
    assert!(nft.numgen && nft.hash && nft.connlimit && nft.ct_timeout && nft.owner_persist, "{nft:?}");
    assert_eq!(probe.conntrack_netlink, Some(true));
    assert_eq!(after, "");
}

/// The lines of the kernel's own configuration, where it tells them.
fn kernel_config() -> Option<String> {
    let output = std::process::Command::new("zcat").arg("/proc/config.gz").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn the_probe_agrees_with_the_kernels_configuration() {
    let Some(config) = kernel_config() else {
        println!("skipped: this kernel has no /proc/config.gz");
        return;
    };
    let nft = in_namespace(probe_details).nft.expect("facts");
    for (option, found) in [
        ("CONFIG_NFT_NAT", nft.nat && nft.nat_chain),
        ("CONFIG_NFT_MASQ", nft.masquerade),
        ("CONFIG_NFT_FIB_INET", nft.fib),
        ("CONFIG_NFT_CT", nft.ct),
        ("CONFIG_NFT_LIMIT", nft.limit),
        ("CONFIG_NFT_NUMGEN", nft.numgen),
        ("CONFIG_NFT_HASH", nft.hash),
        ("CONFIG_NFT_CONNLIMIT", nft.connlimit),
        ("CONFIG_NF_CONNTRACK_TIMEOUT", nft.ct_timeout),
        ("CONFIG_NF_FLOW_TABLE_INET", nft.flowtable),
    ] {
        let value = config.lines().find_map(|line| line.strip_prefix(option)?.strip_prefix('='));
        // A module (=m) may be missing on disk: either answer is right.
        if value != Some("m") {
            assert_eq!(found, value == Some("y"), "{option}");
        }
    }
}

/// `shunt doctor --json` as an ordinary user in a fresh network namespace, with the given capabilities.
fn doctor(capabilities: &str) -> (Option<i32>, serde_json::Value) {
    let output = std::process::Command::new("unshare")
        .args(["-n", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"])
        .args([format!("--inh-caps={capabilities}"), format!("--ambient-caps={capabilities}")])
        .arg(format!("--bounding-set={capabilities}"))
        .args([env!("CARGO_BIN_EXE_shunt"), "doctor", "--json"])
        .output()
        .expect("unshare, setpriv");
    (output.status.code(), serde_json::from_slice(&output.stdout).expect("JSON"))
}

fn state<'a>(checks: &'a serde_json::Value, name: &str) -> &'a str {
    let check = checks["checks"].as_array().expect("checks").iter().find(|check| check["name"] == name);
    check.unwrap_or_else(|| panic!("no check {name}: {checks}"))["state"].as_str().expect("state")
}

#[test]
fn with_net_admin_alone_the_nft_engine_can_run() {
    let (code, checks) = doctor("-all,+net_admin");
    assert_eq!(state(&checks, "CAP_NET_ADMIN"), "ok", "{checks:#}");
    assert_eq!(state(&checks, "nf_tables"), "ok", "{checks:#}");
    assert_eq!(state(&checks, "table ownership"), "ok", "{checks:#}");
    assert_eq!(state(&checks, "conntrack"), "ok", "{checks:#}");
    assert_eq!(code, Some(0), "{checks:#}");
}

#[test]
fn without_privileges_doctor_says_what_is_missing_and_exits_4() {
    let (code, checks) = doctor("-all");
    assert_eq!(state(&checks, "CAP_NET_ADMIN"), "missing", "{checks:#}");
    assert_eq!(code, Some(4), "{checks:#}");
}

#[test]
fn settings_are_changed_in_this_namespace_and_put_back_with_those_that_followed() {
    let record = std::env::temp_dir().join(format!("shunt-restore-{}", std::process::id())).join("restore.json");
    let path = record.clone();
    in_namespace(move || {
        let settings = Settings::default();
        let read = |name: &str| settings.read(&Sysctl::new(name)).expect("setting");
        const ALL: [&str; 5] = [
            "net/ipv4/ip_forward",
            "net/ipv4/conf/lo/forwarding",
            "net/ipv6/conf/all/forwarding",
            "net/ipv6/conf/lo/forwarding",
            "net/netfilter/nf_conntrack_acct",
        ];
        for name in ALL {
            settings.write(&Sysctl::new(name), "0").expect("off");
        }
        // One interface forwarded before: undoing must not take that away.
        settings.write(&Sysctl::new("net/ipv4/conf/lo/forwarding"), "1").expect("on");
        let before = ALL.map(read);

        let applied = settings
            .apply(&needed(Routes { ipv4: true, ipv6: true, relayed: true, handed: false }), &path)
            .expect("apply");
        assert_eq!(applied.changed.len(), 5, "{applied:?}");
        assert_eq!(ALL.map(read), ["1"; 5]);
        let restored = restore(&settings, &path).expect("restore");
        assert!(restored.iter().all(|one| matches!(one, Restored::PutBack { .. })), "{restored:?}");
        assert_eq!(ALL.map(read), before);
    });
    std::fs::remove_dir(record.parent().expect("folder")).expect("the record is gone");
}
