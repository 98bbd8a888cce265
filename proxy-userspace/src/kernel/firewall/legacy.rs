//! iptables-legacy, whose tables nf_tables does not show.

use std::{fs, process::Command};

use proxy_core::capability::{FilterChain, Hook};

use super::{
    ForeignChain,
    filter::{Effect, filters},
};

/// Its chains, and their priorities in each table (`NF_IP_PRI_*`). Those of `nat` see only first packets.
const CHAINS: [(&str, Hook); 5] = [
    ("PREROUTING", Hook::Prerouting),
    ("INPUT", Hook::Input),
    ("FORWARD", Hook::Forward),
    ("OUTPUT", Hook::Output),
    ("POSTROUTING", Hook::Postrouting),
];
const TABLES: [(&str, i32); 4] = [("raw", -300), ("mangle", -150), ("filter", 0), ("security", 50)];

/// The chains of `iptables-legacy` and `ip6tables-legacy`, in the tables that those have in this namespace.
pub(super) fn read() -> Vec<ForeignChain> {
    let programs =
        [("/proc/net/ip_tables_names", "iptables-legacy"), ("/proc/net/ip6_tables_names", "ip6tables-legacy")];
    let mut found = Vec::new();
    for (names, program) in programs {
        let names = fs::read_to_string(names).unwrap_or_default();
        // Asking only where the table is there: asking makes it.
        for (table, priority) in TABLES.into_iter().filter(|(table, _)| names.lines().any(|line| line == *table)) {
            let listed = Command::new(program).args(["-t", table, "-S"]).output().ok();
            let rules = listed.filter(|listed| listed.status.success());
            let rules = rules.map(|listed| String::from_utf8_lossy(&listed.stdout).into_owned());
            found.extend(chains(program, table, priority, rules.as_deref()));
        }
    }
    found
}

/// `rules`: `None` where they cannot be read.
fn chains(program: &str, table: &str, priority: i32, rules: Option<&str>) -> Vec<ForeignChain> {
    let parse = |(chain, hook): (&str, Hook)| {
        let at = FilterChain { table: format!("{program} {table}"), chain: chain.into(), hook, priority };
        match rules {
            Some(rules) => {
                rules.lines().any(|line| line.starts_with(&format!("-P {chain} "))).then(|| parse(at, rules))
            }
            // It may filter, then.
            None => (chain == "INPUT" || chain == "FORWARD").then(|| ForeignChain { filters: true, ..parse(at, "") }),
        }
    };
    CHAINS.into_iter().filter_map(parse).collect()
}

fn parse(at: FilterChain, rules: &str) -> ForeignChain {
    let program = at.table.split(' ').next().unwrap_or_default();
    let policy_drops = rules.lines().any(|rule| rule.trim() == format!("-P {} DROP", at.chain));
    let own: Vec<Vec<&str>> = rules
        .lines()
        .map(|rule| rule.split_whitespace().collect::<Vec<_>>())
        .filter_map(|words| (words.starts_with(&["-A", &at.chain])).then(|| words[2..].to_vec()))
        .collect();
    let drops_all = |rule: &Vec<&str>| matches!(rule.as_slice(), ["-j", "DROP" | "REJECT", ..]);
    let lets_dnat = |rule: &Vec<&str>| rule.contains(&"DNAT") && rule.ends_with(&["-j", "ACCEPT"]);
    ForeignChain {
        filters: filters(at.hook, policy_drops, own.iter().map(|rule| effect(rule))),
        policy_drops,
        last_rule_drops: own.last().is_some_and(drops_all),
        knows_dnat: own.iter().any(lets_dnat),
        mend: format!("{program} -I {} -m conntrack --ctstate DNAT -j ACCEPT", at.chain),
        at,
    }
}

/// As [`super::expression::effect`], of the words behind the chain's name.
fn effect(rule: &[&str]) -> Effect {
    let established = |states: &str| states.split(',').any(|state| state == "ESTABLISHED");
    match rule {
        ["-j", "ACCEPT"] => Effect::AcceptsAll,
        ["-m", "conntrack", "--ctstate", states, "-j", "ACCEPT"]
        | ["-m", "state", "--state", states, "-j", "ACCEPT"]
            if established(states) =>
        {
            Effect::AcceptsEstablished
        }
        // Rate limits and lists that grow by looking are no mere looks.
        [matches @ .., "-j", "ACCEPT"]
            if !matches.iter().any(|word| ["limit", "hashlimit", "recent", "quota"].contains(word)) =>
        {
            Effect::Nothing
        }
        ["-m", "conntrack", "--ctstate", states, "-j", ..] | ["-m", "state", "--state", states, "-j", ..]
            if !established(states) =>
        {
            Effect::OthersOnly
        }
        [.., "-j", "LOG" | "NFLOG"] => Effect::Nothing,
        rule if !rule.iter().any(|word| ["-j", "-g"].contains(word)) => Effect::Nothing,
        _ => Effect::Decides,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: &str, rules: &str) -> ForeignChain {
        let found = chains("iptables-legacy", "filter", 0, Some(rules));
        found.into_iter().find(|chain| chain.at.chain == name).expect("a chain of that name")
    }

    #[test]
    fn policies_last_rules_and_the_accepting_rule_are_seen() {
        let in_the_way = |rules: &str| chain("FORWARD", rules).is_in_the_way();
        assert!(in_the_way("-P FORWARD DROP\n"));
        assert!(in_the_way(
            "-P FORWARD ACCEPT\n-A FORWARD -i a -j ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-port-unreachable\n"
        ));
        assert!(!in_the_way("-P FORWARD ACCEPT\n-A FORWARD -i a -j DROP\n"));
        assert!(!in_the_way("-P FORWARD DROP\n-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n"));
    }

    #[test]
    fn a_chain_filters_unless_it_accepts_what_is_established_first() {
        let of_input = |rules: &str| chain("INPUT", &format!("-P INPUT DROP\n{rules}")).filters;
        assert!(of_input(""));
        assert!(!of_input("-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A INPUT -j LOG\n"));
        assert!(!of_input(
            "-A INPUT -i lo -j ACCEPT\n-A INPUT -m conntrack --ctstate INVALID -j DROP\n-A INPUT -m state --state ESTABLISHED -j ACCEPT\n"
        ));
        assert!(of_input("-A INPUT -j f2b-sshd\n-A INPUT -m state --state ESTABLISHED -j ACCEPT\n"));
        let of_forward = |rules: &str| chain("FORWARD", rules).filters;
        assert!(of_forward("-P FORWARD DROP\n-A FORWARD -m state --state ESTABLISHED -j ACCEPT\n"));
        assert!(!of_forward("-P FORWARD ACCEPT\n"));
    }

    #[test]
    fn a_table_that_cannot_be_read_is_taken_for_a_filter() {
        let found = chains("iptables-legacy", "filter", 0, None);
        assert!(!found.is_empty() && found.iter().all(|chain| chain.filters && !chain.is_in_the_way()), "{found:?}");
    }
}
