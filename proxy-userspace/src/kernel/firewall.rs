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
