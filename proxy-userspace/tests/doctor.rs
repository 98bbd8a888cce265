//! `shunt doctor` in front of other people's firewalls. Needs root; every test works in a network namespace of its own.

use std::process::Command;

/// Runs the shell commands of `prepare` and then `shunt doctor --json`, in a fresh network namespace.
fn doctor_after(prepare: &str) -> serde_json::Value {
    let script = format!("set -e; {prepare}\nexec {} doctor --json", env!("CARGO_BIN_EXE_shunt"));
    let output = Command::new("unshare").args(["-n", "sh", "-c", &script]).output().expect("unshare needs root");
    let said = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
}

fn forward_chains(report: &serde_json::Value) -> Vec<&serde_json::Value> {
    report["checks"].as_array().expect("checks").iter().filter(|check| check["name"] == "forward chains").collect()
}

const DOCKER: &str =
    "nft 'add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }';";
const FIREWALLD: &str = "nft 'add table inet firewalld
    add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; }
    add rule inet firewalld filter_FORWARD ct state established accept
    add rule inet firewalld filter_FORWARD counter reject with icmpx type admin-prohibited';";
const OPEN: &str = "nft 'add table inet other
    add chain inet other f { type filter hook forward priority 0; }
    add rule inet other f tcp dport 25 drop
    add chain inet other i { type filter hook input priority 0; policy drop; }';";

#[test]
fn a_chain_that_drops_is_found_and_its_mend_mends_it() {
    for (prepare, name) in [(DOCKER, "ip filter FORWARD"), (FIREWALLD, "inet firewalld filter_FORWARD")] {
        let report = doctor_after(prepare);
        let [check] = forward_chains(&report)[..] else { panic!("one check: {report:#}") };
        assert_eq!(check["state"], "warn", "{check:#}");
        assert!(check["found"].as_str().expect("found").starts_with(name), "{check:#}");
        let mend = check["mend"][0].as_str().expect("mend");
        let mended = doctor_after(&format!("{prepare} {mend};"));
        let [check] = forward_chains(&mended)[..] else { panic!("one check: {mended:#}") };
        assert_eq!(check["state"], "ok", "after `{mend}`: {check:#}");
    }
}

#[test]
fn chains_that_let_others_through_are_no_matter() {
    let report = doctor_after(OPEN);
    let [check] = forward_chains(&report)[..] else { panic!("one check: {report:#}") };
    assert_eq!(check["state"], "ok", "{check:#}");
}

#[test]
fn looking_changes_nothing() {
    let script = format!(
        "nft list ruleset > /dev/null; before=$(cat /proc/sys/net/ipv4/ip_forward); {} doctor > /dev/null;
         test -z \"$(nft list ruleset)\" && test \"$(cat /proc/sys/net/ipv4/ip_forward)\" = \"$before\"",
        env!("CARGO_BIN_EXE_shunt")
    );
    let status = Command::new("unshare").args(["-n", "sh", "-c", &script]).status().expect("unshare needs root");
    assert!(status.success());
}
