//! What the kernel and this process's privileges allow, as data: "this kernel has no flowtable" is a unit test.

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
    /// A chain of somebody else that filters forwarded packets, as the firewall's tool names it. Connections that are handed
    /// over do not pass it.
    pub forward_filter: Option<String>,
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
    /// No `bpf_redirect_neigh` (v5.10+).
    NoRedirect,
    /// The check that failed, in its own words.
    ProbeFailed(String),
    /// No route hands over: nobody has asked.
    NotAsked,
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
            forward_filter: None,
        }
    }
}
