//! Other people's firewalls: chains of the forward hook that are not shunt's. Looks only.

mod chain;
mod legacy;

use std::io;

/// A base chain of the forward hook that is not shunt's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardChain {
    /// `ip filter FORWARD`
    pub name: String,
    /// It decides about packets, not only counts them.
    pub filters: bool,
    policy_drops: bool,
    /// Its last rule drops or rejects everything that came so far.
    last_rule_drops: bool,
    /// A rule looks at the DNAT bit of conntrack: taken for the accepting rule.
    knows_dnat: bool,
    /// The command that lets shunt's packets through.
    pub mend: String,
}

impl ForwardChain {
    /// It drops what the engine nft forwards.
    pub fn is_in_the_way(&self) -> bool {
        (self.policy_drops || self.last_rule_drops) && !self.knows_dnat
    }

    pub fn closes(&self) -> &'static str {
        if self.policy_drops { "its policy is drop" } else { "its last rule drops everything" }
    }
}

/// Of the network namespace of this process, by name.
pub fn forward_chains() -> io::Result<Vec<ForwardChain>> {
    let mut chains = chain::read()?;
    chains.extend(legacy::read());
    chains.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(chains)
}
