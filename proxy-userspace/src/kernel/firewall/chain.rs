//! nftables chains that see packets, also those that `iptables-nft` keeps.

use std::io;

use proxy_core::{
    capability::{FilterChain, Hook},
    ruleset::TABLE,
};

use super::{
    ForeignChain,
    expression::{Elements, Expression, effect, elements, expressions},
    filter::filters,
};
use crate::kernel::{
    capability::netlink::{Message, SUBSYS_NFTABLES, attributes, be32, dump, text},
    nft::TRANSPARENT_TABLE,
};

/// Reads the network namespace of this process.
pub(super) fn read() -> io::Result<Vec<ForeignChain>> {
    let question = |message: i32, family| Message::new(SUBSYS_NFTABLES, message as u8, family, libc::NLM_F_DUMP);
    let mut found = Vec::new();
    for (family, chain) in dump(question(libc::NFT_MSG_GETCHAIN, libc::AF_UNSPEC as u8))? {
        let Some(chain) = Chain::parse(family, &chain) else { continue };
        // NFTA_RULE_TABLE, _CHAIN
        let rules = question(libc::NFT_MSG_GETRULE, family).string(1, &chain.table).string(2, &chain.name);
        // One that somebody can change says nothing of tomorrow.
        let anonymous = |name: &str| -> Option<Elements> {
            // NFTA_SET_ELEM_LIST_TABLE, _SET
            let asked = question(libc::NFT_MSG_GETSETELEM, family).string(1, &chain.table).string(2, name);
            let answers = name.starts_with("__").then(|| dump(asked))?.ok()?;
            Some(answers.iter().flat_map(|(_, answer)| elements(answer)).collect())
        };
        let rules: Vec<_> = dump(rules)?.iter().map(|(_, rule)| expressions(rule, anonymous)).collect();
        found.push(chain.with_rules(&rules));
    }
    Ok(found)
}

#[derive(Debug, PartialEq, Eq)]
struct Chain {
    family: &'static str,
    table: String,
    name: String,
    hook: Hook,
    priority: i32,
    policy_drops: bool,
}

impl Chain {
    /// `None`: not a foreign base chain that sees the IP packets of a connection.
    fn parse(family: u8, bytes: &[u8]) -> Option<Self> {
        let family = match i32::from(family) {
            libc::NFPROTO_IPV4 => "ip",
            libc::NFPROTO_IPV6 => "ip6",
            libc::NFPROTO_INET => "inet",
            libc::NFPROTO_NETDEV => "netdev",
            _ => return None,
        };
        // NFTA_CHAIN_TABLE, _NAME, _HOOK { _HOOKNUM, _PRIORITY }, _POLICY, _TYPE
        let value = |wanted| attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let hook = |wanted| {
            let found = attributes(value(4)?).find(|(kind, _)| *kind == wanted);
            found.and_then(|(_, value)| be32(value))
        };
        let (table, name) = (text(value(1)?), text(value(3)?));
        let ours = family == "inet" && (table == TABLE || table == TRANSPARENT_TABLE);
        let first_packets_only = value(7).map(text).is_some_and(|kind| kind == "nat");
        let policy_drops = value(5).and_then(be32) == Some(libc::NF_DROP as u32);
        let priority = i32::from_be_bytes(hook(2).unwrap_or_default().to_be_bytes());
        let hook = hook_of(family, hook(1)?)?;
        (!ours && !first_packets_only).then_some(Self { family, table, name, hook, priority, policy_drops })
    }

    fn with_rules(self, rules: &[Vec<Expression>]) -> ForeignChain {
        let drops_all = |rule: &Vec<Expression>| {
            rule.contains(&Expression::Drop)
                && rule.iter().all(|expression| matches!(expression, Expression::Drop | Expression::Neutral))
        };
        let Self { family, table, name, hook, priority, policy_drops } = self;
        ForeignChain {
            filters: filters(hook, policy_drops, rules.iter().map(|rule| effect(rule))),
            policy_drops,
            last_rule_drops: rules.last().is_some_and(drops_all),
            knows_dnat: rules.iter().flatten().any(|expression| *expression == Expression::DnatStatus),
            mend: format!("nft insert rule {family} {table} {name} ct status dnat accept"),
            at: FilterChain { table: format!("{family} {table}"), chain: name, hook, priority },
        }
    }
}

/// `None`: what is handed over passes it as before (`egress`).
fn hook_of(family: &str, number: u32) -> Option<Hook> {
    if family == "netdev" {
        return (number == 0).then_some(Hook::Ingress);
    }
    Some(match i32::try_from(number).ok()? {
        libc::NF_INET_PRE_ROUTING => Hook::Prerouting,
        libc::NF_INET_LOCAL_IN => Hook::Input,
        libc::NF_INET_FORWARD => Hook::Forward,
        libc::NF_INET_LOCAL_OUT => Hook::Output,
        libc::NF_INET_POST_ROUTING => Hook::Postrouting,
        NF_INET_INGRESS => Hook::Ingress,
        _ => return None,
    })
}

/// `linux/netfilter.h`, v5.10+
const NF_INET_INGRESS: i32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn chain() -> Chain {
        let (family, table, name) = ("ip", "filter".into(), "FORWARD".into());
        Chain { family, table, name, hook: Hook::Forward, priority: 0, policy_drops: false }
    }

    #[test]
    fn a_dropping_policy_or_last_rule_is_in_the_way_until_dnat_is_let_through() {
        use Expression::{DnatStatus, Drop, Neutral, Other};
        let policy = Chain { policy_drops: true, ..chain() };
        assert!(policy.with_rules(&[vec![Other]]).is_in_the_way());
        assert!(chain().with_rules(&[vec![Other], vec![Neutral, Drop]]).is_in_the_way());
        assert!(
            !chain().with_rules(&[vec![Neutral, Drop], vec![Other, Drop]]).is_in_the_way(),
            "a condition stands before it"
        );
        assert!(!chain().with_rules(&[vec![DnatStatus, Other], vec![Drop]]).is_in_the_way());
        assert!(!chain().with_rules(&[]).is_in_the_way());
        let elsewhere = Chain { policy_drops: true, hook: Hook::Input, ..chain() };
        assert!(!elsewhere.with_rules(&[]).is_in_the_way(), "what is forwarded does not pass it");
    }

    #[test]
    fn a_chain_that_only_counts_filters_nothing() {
        use Expression::{Neutral, Other};
        assert!(!chain().with_rules(&[vec![Neutral]]).filters && !chain().with_rules(&[]).filters);
        assert!(chain().with_rules(&[vec![Neutral], vec![Other]]).filters);
        assert!(Chain { policy_drops: true, ..chain() }.with_rules(&[]).filters);
    }

    #[test]
    fn the_mend_is_a_command_for_that_very_chain() {
        assert_eq!(chain().with_rules(&[]).mend, "nft insert rule ip filter FORWARD ct status dnat accept");
    }
}
