//! nftables chains of the forward hook, also those that `iptables-nft` keeps.

use std::io;

use proxy_core::ruleset::TABLE;

use super::ForwardChain;
use crate::kernel::capability::netlink::{Message, SUBSYS_NFTABLES, attributes, be32, dump, text};

/// Reads the network namespace of this process.
pub(super) fn read() -> io::Result<Vec<ForwardChain>> {
    let request = Message::new(SUBSYS_NFTABLES, libc::NFT_MSG_GETCHAIN as u8, libc::AF_UNSPEC as u8, libc::NLM_F_DUMP);
    let mut found = Vec::new();
    for (family, chain) in dump(request)? {
        let Some(chain) = Chain::parse(family, &chain) else { continue };
        let rules = Message::new(SUBSYS_NFTABLES, libc::NFT_MSG_GETRULE as u8, family, libc::NLM_F_DUMP);
        // NFTA_RULE_TABLE, _CHAIN
        let rules: Vec<_> = dump(rules.string(1, &chain.table).string(2, &chain.name))?;
        let rules: Vec<_> = rules.iter().map(|(_, rule)| expressions(rule)).collect();
        found.push(chain.with_rules(&rules));
    }
    Ok(found)
}

#[derive(Debug, PartialEq, Eq)]
struct Chain {
    family: &'static str,
    table: String,
    name: String,
    policy_drops: bool,
}

impl Chain {
    /// `None`: not a foreign base chain that filters forwarded IP packets.
    fn parse(family: u8, bytes: &[u8]) -> Option<Self> {
        let family = match i32::from(family) {
            libc::NFPROTO_IPV4 => "ip",
            libc::NFPROTO_IPV6 => "ip6",
            libc::NFPROTO_INET => "inet",
            _ => return None,
        };
        // NFTA_CHAIN_TABLE, _NAME, _HOOK { _HOOKNUM }, _POLICY
        let value = |wanted| attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let hook = attributes(value(4)?).find(|(kind, _)| *kind == 1).and_then(|(_, value)| be32(value))?;
        let (table, name) = (text(value(1)?), text(value(3)?));
        let ours = family == "inet" && table == TABLE;
        let policy_drops = value(5).and_then(be32) == Some(libc::NF_DROP as u32);
        (hook == libc::NF_INET_FORWARD as u32 && !ours).then_some(Self { family, table, name, policy_drops })
    }

    fn with_rules(self, rules: &[Vec<Expression>]) -> ForwardChain {
        let drops_all = |rule: &Vec<Expression>| {
            rule.contains(&Expression::Drop)
                && !rule.contains(&Expression::Other)
                && !rule.contains(&Expression::DnatStatus)
        };
        let decides = |rule: &Vec<Expression>| rule.iter().any(|expression| *expression != Expression::Neutral);
        ForwardChain {
            filters: self.policy_drops || rules.iter().any(decides),
            policy_drops: self.policy_drops,
            last_rule_drops: rules.last().is_some_and(drops_all),
            knows_dnat: rules.iter().flatten().any(|expression| *expression == Expression::DnatStatus),
            mend: format!("nft insert rule {} {} {} ct status dnat accept", self.family, self.table, self.name),
            name: format!("{} {} {}", self.family, self.table, self.name),
        }
    }
}

/// As much of an expression as the question needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expression {
    /// Drops or rejects.
    Drop,
    /// Reads `ct status`.
    DnatStatus,
    /// Changes nothing: a counter, a log line.
    Neutral,
    Other,
}

/// The expressions of a rule: NFTA_RULE_EXPRESSIONS { NFTA_LIST_ELEM { NFTA_EXPR_NAME, NFTA_EXPR_DATA } }
fn expressions(rule: &[u8]) -> Vec<Expression> {
    let list = attributes(rule).find(|(kind, _)| *kind == 4).map_or(&[][..], |(_, list)| list);
    attributes(list)
        .map(|(_, element)| {
            let value = |wanted| attributes(element).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
            classify(&value(1).map(text).unwrap_or_default(), value(2).unwrap_or_default())
        })
        .collect()
}

fn classify(name: &str, data: &[u8]) -> Expression {
    const NFT_CT_STATUS: u32 = 2;
    let value = |wanted| attributes(data).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    match name {
        "counter" | "log" => Expression::Neutral,
        "reject" => Expression::Drop,
        // NFTA_CT_KEY
        "ct" if value(2).and_then(be32) == Some(NFT_CT_STATUS) => Expression::DnatStatus,
        // NFTA_IMMEDIATE_DATA { NFTA_DATA_VERDICT { NFTA_VERDICT_CODE } }
        "immediate" => {
            let verdict =
                value(2).and_then(|data| attributes(data).find(|(kind, _)| *kind == 2)).map(|(_, value)| value);
            let code =
                verdict.and_then(|verdict| attributes(verdict).find(|(kind, _)| *kind == 1)).map(|(_, code)| code);
            if code.and_then(be32) == Some(libc::NF_DROP as u32) { Expression::Drop } else { Expression::Other }
        }
        // NFTA_TARGET_NAME: what iptables-nft could not translate.
        "target" if value(1).map(text).is_some_and(|target| target == "REJECT" || target == "DROP") => Expression::Drop,
        _ => Expression::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain() -> Chain {
        Chain { family: "ip", table: "filter".into(), name: "FORWARD".into(), policy_drops: false }
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
