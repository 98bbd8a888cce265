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

/// How `shunt plan` would serve a route that reads first bytes, and why not by `handoff`, behind these rules.
fn planned_behind(rules: &str) -> (String, String) {
    let route = "[[route]]\nname = \"web\"\nlisten = [\"0.0.0.0:443\"]\nbackends = [\"10.0.0.2:443\"]\nmatch.sni = [\"a.example\"]\n";
    let file = std::env::temp_dir().join(format!("shunt-plan-{}-{:p}.toml", std::process::id(), rules.as_ptr()));
    std::fs::write(&file, route).expect("a file");
    let shunt = env!("CARGO_BIN_EXE_shunt");
    let script = format!("set -e; printf '%s' \"$1\" | nft -f -; exec {shunt} plan {} --format json", file.display());
    let output =
        Command::new("unshare").args(["-n", "sh", "-c", &script, "sh", rules]).output().expect("unshare needs root");
    std::fs::remove_file(&file).expect("the file");
    let said = String::from_utf8_lossy(&output.stderr);
    let plan: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    let route = &plan["routes"][0];
    let refused = route["refused"].as_array().expect("refused").iter().filter(|one| one["engine"] == "handoff");
    let reasons: Vec<_> = refused.filter_map(|one| one["reason"].as_str()).collect();
    (route["engine"].as_str().unwrap_or_default().to_owned(), reasons.join("; "))
}

#[test]
fn auto_hands_over_where_no_chain_has_a_say_in_established_connections() {
    let chain = |hook: &str, rules: &str| {
        format!("table inet other {{ chain c {{ type filter hook {hook} priority 0; {rules}\n}}\n}}")
    };
    for allowed in [
        chain("forward", ""),
        chain("forward", "counter; log; tcp dport 25 accept"),
        chain("input", "policy drop; ct state established,related accept; tcp dport 443 accept"),
        chain(
            "input",
            "policy drop; ct state invalid drop; iifname lo accept; ct state { established, related } accept",
        ),
        chain("input", "policy drop; ct state vmap { established : accept, related : accept, invalid : drop }; drop"),
        chain("output", "policy drop; ct state != { established, related } drop; accept")
            .replace("ct state != { established, related } drop", "ct state new drop"),
        "table ip n { chain p { type nat hook prerouting priority -100; tcp dport 80 redirect to :81; }\n}".to_owned(),
        "table inet n { chain loose { drop; }\n}".to_owned(),
    ] {
        let (engine, why) = planned_behind(&allowed);
        assert_eq!(engine, "handoff", "{allowed}: {why}");
    }
    for (filter, named) in [
        (chain("forward", "policy drop; "), "chain c of table inet other (hook forward, priority 0)"),
        (chain("forward", "ct state established accept; ct state invalid drop"), "hook forward"),
        (chain("input", "policy drop; "), "hook input"),
        (chain("input", "tcp dport 443 limit rate 5/second accept; ct state established accept"), "hook input"),
        (chain("input", "ip saddr 192.0.2.0/24 drop; ct state established accept"), "hook input"),
        (chain("input", "ct state vmap { established : drop }"), "hook input"),
        (chain("prerouting", "meta mark set 7"), "hook prerouting"),
        (chain("output", "ct state established quota over 1 mbytes drop"), "hook output"),
        (
            "table netdev n { chain i { type filter hook ingress device lo priority -5; ip saddr 192.0.2.1 drop; }\n}"
                .to_owned(),
            "chain i of table netdev n (hook ingress, priority -5)",
        ),
    ] {
        let (engine, why) = planned_behind(&filter);
        assert!(engine == "splice" && why.contains(named), "{filter}: {engine}, {why}");
    }
}
