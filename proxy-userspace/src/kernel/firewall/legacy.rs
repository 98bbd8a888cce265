//! iptables-legacy, whose tables nf_tables does not show.

use std::{fs, process::Command};

use super::ForwardChain;

/// The FORWARD chains of `iptables-legacy` and `ip6tables-legacy`, where those have a filter table in this namespace.
pub(super) fn read() -> Vec<ForwardChain> {
    [("/proc/net/ip_tables_names", "iptables-legacy"), ("/proc/net/ip6_tables_names", "ip6tables-legacy")]
        .into_iter()
        .filter(|(tables, _)| {
            fs::read_to_string(tables).is_ok_and(|tables| tables.lines().any(|table| table == "filter"))
        })
        .filter_map(|(_, program)| {
            // Asking only where the table is there: asking makes it.
            let listed = Command::new(program).args(["-S", "FORWARD"]).output().ok()?;
            Some(parse(program, &String::from_utf8_lossy(&listed.stdout)))
        })
        .collect()
}

fn parse(program: &str, rules: &str) -> ForwardChain {
    let drops_all = |rule: &str| {
        let words: Vec<_> = rule.split_whitespace().collect();
        matches!(words.as_slice(), ["-A", "FORWARD", "-j", "DROP" | "REJECT", ..])
    };
    ForwardChain {
        name: format!("{program} FORWARD"),
        filters: rules.lines().any(|rule| rule.trim() == "-P FORWARD DROP" || rule.starts_with("-A ")),
        policy_drops: rules.lines().any(|rule| rule.trim() == "-P FORWARD DROP"),
        last_rule_drops: rules.lines().next_back().is_some_and(drops_all),
        knows_dnat: rules.lines().any(|rule| rule.contains("DNAT") && rule.contains("-j ACCEPT")),
        mend: format!("{program} -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_last_rules_and_the_accepting_rule_are_seen() {
        let in_the_way = |rules: &str| parse("iptables-legacy", rules).is_in_the_way();
        assert!(in_the_way("-P FORWARD DROP\n"));
        assert!(in_the_way(
            "-P FORWARD ACCEPT\n-A FORWARD -i a -j ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-port-unreachable\n"
        ));
        assert!(!in_the_way("-P FORWARD ACCEPT\n-A FORWARD -i a -j DROP\n"));
        assert!(!in_the_way("-P FORWARD DROP\n-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n"));
        assert!(!in_the_way(""));
    }
}
