//! Other people's firewalls: chains that are not shunt's. Looks only.

mod chain;
mod expression;
mod filter;
mod legacy;

use std::io;

use proxy_core::capability::{FilterChain, Hook};

/// A base chain of packets that is not shunt's. Those that see only the first packet of a connection (`type nat`) are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignChain {
    pub at: FilterChain,
    /// It may do something else than accept what connections send that it has let begin; in the hook `forward`, what any send.
    filters: bool,
    policy_drops: bool,
    /// Its last rule drops or rejects everything that came so far.
    last_rule_drops: bool,
    /// A rule looks at the DNAT bit of conntrack: taken for the accepting rule.
    knows_dnat: bool,
    /// The command that lets shunt's packets through.
    pub mend: String,
}

impl ForeignChain {
    /// It drops what the engine nft forwards.
    pub fn is_in_the_way(&self) -> bool {
        self.at.hook == Hook::Forward && (self.policy_drops || self.last_rule_drops) && !self.knows_dnat
    }

    pub fn closes(&self) -> &'static str {
        if self.policy_drops { "its policy is drop" } else { "its last rule drops everything" }
    }

    /// `ip filter FORWARD`
    pub fn name(&self) -> String {
        format!("{} {}", self.at.table, self.at.chain)
    }
}

/// Of the network namespace of this process, by hook and name.
pub fn foreign_chains() -> io::Result<Vec<ForeignChain>> {
    let mut chains = chain::read()?;
    chains.extend(legacy::read());
    chains.sort_by_key(|chain| (chain.at.hook, chain.name()));
    Ok(chains)
}

/// Those that would have a say in what connections that are handed over send. Unknown is as good as none: a process that may not
/// ask may not hand over either.
pub fn filters() -> Vec<FilterChain> {
    let chains = foreign_chains().unwrap_or_default();
    chains.into_iter().filter(|chain| chain.filters).map(|chain| chain.at).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        process::{Command, Stdio},
        thread,
    };

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// What filters behind these rules, in a network namespace of its own. Needs root, and `nft`.
    fn behind(rules: &str) -> Vec<String> {
        let rules = rules.to_owned();
        let asked = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft");
            nft.stdin.take().expect("stdin").write_all(rules.as_bytes()).expect("written");
            assert!(nft.wait().expect("nft").success(), "{rules}");
            filters().iter().map(ToString::to_string).collect()
        });
        asked.join().expect("a thread")
    }

    fn chain(hook: &str, rules: &str) -> String {
        format!("table inet other {{\nchain c {{\ntype filter hook {hook} priority 0; {rules}\n}}\n}}\n")
    }

    #[test]
    fn chains_that_surely_let_established_connections_through_filter_nothing() {
        for rules in [
            chain("forward", ""),
            chain("forward", "counter; log; tcp dport 25 accept"),
            chain("input", "policy drop; ct state established,related counter accept; tcp dport 443 accept"),
            chain("input", "policy drop; ct state established accept"),
            chain("input", "ct state invalid drop; iifname lo accept; ct state { established, related } accept; drop"),
            chain("input", "ct state vmap { established : accept, related : accept, invalid : drop }; drop"),
            chain("output", "ct state new tcp dport 25 drop"),
            "table ip n {\nchain p {\ntype nat hook prerouting priority -100; tcp dport 80 redirect to :81\n}\n}\n"
                .into(),
            "table inet n {\nchain loose {\ndrop\n}\n}\n".into(),
            chain("input", "policy drop").replace("inet other", "inet shunt"),
            chain("prerouting", "meta mark set 7").replace("inet other", "inet shunt_transparent"),
        ] {
            assert_eq!(behind(&rules), Vec::<String>::new(), "{rules}");
        }
    }

    #[test]
    fn chains_that_may_do_something_else_are_named() {
        for (rules, hook) in [
            (chain("forward", "policy drop;"), "forward"),
            (chain("forward", "ct state established accept; ct state invalid drop"), "forward"),
            (chain("forward", "ct state vmap { established : accept, invalid : drop }"), "forward"),
            (chain("input", "policy drop;"), "input"),
            (chain("input", "tcp dport 443 limit rate 5/second accept; ct state established accept"), "input"),
            (chain("input", "ip saddr 192.0.2.0/24 drop; ct state established accept"), "input"),
            (chain("input", "ct state != established accept; drop"), "input"),
            (chain("input", "ct state vmap { established : drop }"), "input"),
            (chain("input", "tcp dport vmap { 443 : accept, 80 : drop }"), "input"),
            (chain("prerouting", "meta mark set 7"), "prerouting"),
            (chain("output", "ct state established quota over 1 mbytes drop"), "output"),
        ] {
            assert_eq!(behind(&rules), [format!("chain c of table inet other (hook {hook}, priority 0)")], "{rules}");
        }
        let ingress = "table netdev n {\nchain i {\ntype filter hook ingress device lo priority -5; ip saddr 192.0.2.1 drop\n}\n}\n";
        assert_eq!(behind(ingress), ["chain i of table netdev n (hook ingress, priority -5)"]);
    }
}
