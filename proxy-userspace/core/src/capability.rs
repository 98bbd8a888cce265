//! What the kernel and this process's privileges allow, as data: "this kernel has no flowtable" is a unit test.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the daemon can use here. Filled by the daemon's probes; [`Capabilities::all`] stands for a full kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `CAP_NET_ADMIN` in the network namespace the daemon runs in.
    pub net_admin: bool,
    /// nf_tables with NAT, maps and `fib` in the `inet` family.
    pub nft_nat: bool,
    /// `ct count` (`nft_connlimit`).
    pub nft_connlimit: bool,
    /// `ct timeout` objects (`CONFIG_NF_CONNTRACK_TIMEOUT`).
    pub nft_ct_timeout: bool,
    /// `numgen` and `jhash` (`nft_numgen`, `nft_hash`).
    pub nft_balance: bool,
    /// `NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST` (v6.9+).
    pub nft_owner_persist: bool,
    /// `socket` (`nft_socket`), which finds the socket a packet is for.
    pub nft_socket: bool,
    /// `sk_lookup` programs (v5.9+), which lead many ports to one socket; need `CAP_BPF` too.
    pub sk_lookup: bool,
    /// Conntrack over netlink (`nf_conntrack_netlink`).
    pub conntrack_netlink: bool,
    /// IPv6 is there (`/proc/sys/net/ipv6`).
    pub ipv6: bool,
    /// Whether established connections can be handed over to the packet level.
    pub handoff: Handoff,
    /// A chain of somebody else's firewall that would have a say in what connections that are handed over send: they do not pass
    /// it.
    pub filter: Option<FilterChain>,
    pub sockmap: Sockmap,
}

/// What keeps the engine `handoff` from this kernel or process, if anything does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Handoff {
    /// The self-probe has passed.
    Works,
    NotPermitted,
    /// Neither tcx (v6.6+) nor clsact.
    NoTc,
    /// No BPF file system that may be written to.
    NoBpffs,
    /// The check that failed, in its own words.
    ProbeFailed(String),
    /// The probe has passed, and yet what the engine needs could not be made: what failed.
    NotBroughtUp(String),
    /// No route hands over: nobody has asked.
    NotAsked,
}

/// A base chain of somebody else's firewall, iptables' among them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterChain {
    /// With its family: `inet filter`; `iptables-legacy filter`.
    pub table: String,
    pub chain: String,
    pub hook: Hook,
    pub priority: i32,
}

/// Where netfilter sees packets that are received, sent or forwarded. What is handed over passes none of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    Ingress,
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl Hook {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        }
    }
}

impl fmt::Display for FilterChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, chain, hook, priority } = self;
        write!(f, "chain {chain} of table {table} (hook {}, priority {priority})", hook.as_str())
    }
}

/// Whether the kernel may be let to join sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sockmap {
    /// It has moved known bytes without harm.
    Trusted,
    /// Which check failed, and how.
    Refused(String),
}

impl Capabilities {
    /// A kernel and privileges that allow everything.
    pub const fn all() -> Self {
        Self {
            net_admin: true,
            nft_nat: true,
            nft_connlimit: true,
            nft_ct_timeout: true,
            nft_balance: true,
            nft_owner_persist: true,
            nft_socket: true,
            sk_lookup: true,
            conntrack_netlink: true,
            ipv6: true,
            sockmap: Sockmap::Trusted,
            handoff: Handoff::Works,
            filter: None,
        }
    }
}
