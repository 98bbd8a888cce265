//! Asks the kernel what it can do here, without changing anything that others could see.
//!
//! The nftables questions go out as one batch that the kernel must refuse as a whole, because it holds expressions
//! without their attributes: one it has is refused with `EINVAL`, one it lacks with `ENOENT` (`nft_expr_type_get`,
//! v6.18). It is sent from a thread in a network namespace of its own where that is allowed (CAP_SYS_ADMIN), and
//! otherwise, with CAP_NET_ADMIN alone, in the daemon's: nothing in the batch gets far enough to register a hook.
//! The kernel may load its nf_tables modules on the way.

pub mod ebpf;
pub(crate) mod handoff;
pub(crate) mod netlink;
mod nft;
pub mod privileges;

use std::{io, path::Path};

use super::firewall;
pub use nft::NftFacts;
use nix::sched::{CloneFlags, unshare};
use proxy_core::{
    capability::{Capabilities, FilterChain, Handoff, Sockmap},
    config::Config,
    plan::plan,
};

use super::{bpf::BpfError, lookup};

/// What the kernel answered, in more detail than a plan needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The kernel lets this process configure the network namespace it runs in.
    pub net_admin: bool,
    /// The kernel has nf_tables. `None`: not allowed to ask.
    pub nf_tables: Option<bool>,
    /// `None`: not allowed to ask, or there is no nf_tables.
    pub nft: Option<NftFacts>,
    /// `None`: not allowed to ask.
    pub conntrack_netlink: Option<bool>,
    /// `None`: not allowed to ask.
    pub sk_lookup: Option<bool>,
    pub ipv6: bool,
    pub handoff: Handoff,
    /// Foreign chains that would have a say in what is handed over.
    pub filters: Vec<FilterChain>,
    /// The batch went to a network namespace of its own.
    pub scratch_namespace: bool,
}

/// What the daemon can use here. What could not be asked for want of privilege counts as there; `net_admin` is false then.
/// Whether connections can be handed over is only asked for routes that would: it takes the kernel a while to say.
pub fn probe(config: &Config, sockmap: Sockmap) -> Capabilities {
    let mut capabilities = Capabilities { sockmap, ..probe_details().capabilities() };
    if plan(config, &capabilities).routes().iter().any(|route| route.awaits_handoff()) {
        capabilities.handoff = handoff::ask(&config.admin.socket);
    }
    capabilities
}

/// Asks everything; some milliseconds, more when modules must be loaded.
pub fn probe_details() -> Probe {
    let generation = netlink::ask(netlink::get_generation());
    let (net_admin, nf_tables) = match generation {
        Ok(_) => (true, Some(true)),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => (false, None),
        Err(error) => {
            tracing::debug!(%error, "nf_tables does not answer");
            (privileges::effective().net_admin, Some(false))
        }
    };
    let conntrack_netlink = match netlink::ask(netlink::get_conntrack_count()) {
        Ok(_) => Some(true),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
        Err(_) => Some(false),
    };
    let (nft, scratch_namespace) = if nf_tables == Some(true) { ask_nft() } else { (None, false) };
    let ipv6 = Path::new("/proc/sys/net/ipv6").exists();
    let sk_lookup = match lookup::probe() {
        Ok(()) => Some(true),
        Err(BpfError::NotPermitted(_)) => None,
        Err(error) => {
            tracing::debug!(%error, "no sk_lookup");
            Some(false)
        }
    };
    Probe {
        net_admin,
        nf_tables,
        nft,
        conntrack_netlink,
        sk_lookup,
        ipv6,
        handoff: Handoff::NotAsked,
        filters: firewall::filters(),
        scratch_namespace,
    }
}

fn ask_nft() -> (Option<NftFacts>, bool) {
    // A thread of its own: unshare(2) moves only the thread that calls it, and the namespace ends with the thread.
    let asked = std::thread::spawn(|| {
        let scratch = unshare(CloneFlags::CLONE_NEWNET).is_ok();
        (nft::ask(), scratch)
    })
    .join()
    .unwrap_or_else(|_| (Err(io::Error::other("the probe's thread panicked")), false));
    match asked {
        (Ok(facts), scratch) => (Some(facts), scratch),
        (Err(error), scratch) => {
            tracing::debug!(%error, "the nf_tables probe failed");
            (None, scratch)
        }
    }
}

impl Probe {
    pub fn capabilities(&self) -> Capabilities {
        let missing = self.nf_tables == Some(false);
        let has = |fact: fn(&NftFacts) -> bool| self.nft.as_ref().map_or(!missing, fact);
        Capabilities {
            net_admin: self.net_admin,
            nft_nat: has(NftFacts::forwards),
            nft_connlimit: has(|nft| nft.connlimit),
            nft_ct_timeout: has(|nft| nft.ct_timeout),
            nft_balance: has(|nft| nft.numgen && nft.hash),
            nft_owner_persist: has(|nft| nft.owner_persist),
            nft_socket: has(|nft| nft.socket),
            sk_lookup: self.sk_lookup.unwrap_or(!self.net_admin),
            conntrack_netlink: self.conntrack_netlink.unwrap_or(true),
            ipv6: self.ipv6,
            // Its own probe asks: `stream::trust_in_sockmap`.
            sockmap: Sockmap::Refused("not asked".into()),
            handoff: self.handoff.clone(),
            filter: self.filters.first().cloned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unprivileged() -> Probe {
        Probe {
            net_admin: false,
            nf_tables: None,
            nft: None,
            conntrack_netlink: None,
            sk_lookup: None,
            ipv6: true,
            handoff: Handoff::NotPermitted,
            filters: Vec::new(),
            scratch_namespace: false,
        }
    }

    #[test]
    fn what_may_not_be_asked_counts_as_there_but_the_privilege_is_missing() {
        let sockmap = Sockmap::Refused("not asked".into());
        let expected =
            Capabilities { net_admin: false, handoff: Handoff::NotPermitted, sockmap, ..Capabilities::all() };
        assert_eq!(unprivileged().capabilities(), expected);
    }

    #[test]
    fn a_kernel_without_nf_tables_has_none_of_its_features() {
        let probe = Probe { net_admin: true, nf_tables: Some(false), conntrack_netlink: Some(false), ..unprivileged() };
        let capabilities = probe.capabilities();
        assert!(capabilities.net_admin && !capabilities.nft_nat && !capabilities.nft_owner_persist);
        assert!(!capabilities.conntrack_netlink);
    }
}
