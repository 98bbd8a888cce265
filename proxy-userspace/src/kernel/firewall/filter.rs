//! Whether a chain would have a say in what an established connection sends.
//!
//! A connection that shunt relays has passed `prerouting`, `input`, `output` and `postrouting` with its first packets, and goes on
//! passing them. A chain that accepts whatever belongs to an established connection loses nothing when these packets pass
//! it no more: it has said all that it says about them. Any other that does more than count does lose something: a rate
//! limit, or a list of addresses that grows. `forward` is another matter: relayed packets were never forwarded, so it has
//! not been asked about them at all, and whatever it refuses to anybody counts.

use proxy_core::capability::Hook;

/// What a rule does to a packet of an established connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// None: it counts, or logs, or accepts some.
    Nothing,
    /// It is not about such packets (`ct state invalid drop`).
    OthersOnly,
    AcceptsEstablished,
    /// … and refuses others.
    AcceptsEstablishedOnly,
    /// Nothing comes behind it.
    AcceptsAll,
    /// Anything else, also what is not understood here.
    Decides,
}

/// `effects`: of the chain's rules, in order.
pub fn filters(hook: Hook, policy_drops: bool, effects: impl IntoIterator<Item = Effect>) -> bool {
    let forwards = hook == Hook::Forward;
    for effect in effects {
        match effect {
            Effect::Nothing => {}
            Effect::OthersOnly | Effect::AcceptsEstablishedOnly if forwards => return true,
            Effect::OthersOnly => {}
            Effect::AcceptsEstablished if forwards => {}
            Effect::AcceptsEstablished | Effect::AcceptsEstablishedOnly | Effect::AcceptsAll => return false,
            Effect::Decides => return true,
        }
    }
    policy_drops
}

#[cfg(test)]
mod tests {
    use super::*;
    use Effect::{AcceptsAll, AcceptsEstablished, AcceptsEstablishedOnly, Decides, Nothing, OthersOnly};

    #[test]
    fn a_chain_that_has_said_all_about_established_connections_filters_them_no_more() {
        for hook in [Hook::Ingress, Hook::Prerouting, Hook::Input, Hook::Output, Hook::Postrouting] {
            assert!(!filters(hook, true, [Nothing, OthersOnly, AcceptsEstablished, Decides]), "{hook:?}");
            assert!(filters(hook, false, [Decides, AcceptsEstablished]), "{hook:?}: what stands before it counts");
            assert!(filters(hook, true, [Nothing]), "{hook:?}");
        }
    }

    #[test]
    fn a_chain_that_refuses_nothing_filters_nothing() {
        for hook in [Hook::Input, Hook::Forward] {
            assert!(!filters(hook, false, []) && !filters(hook, false, [Nothing, Nothing]), "{hook:?}");
            assert!(!filters(hook, true, [AcceptsAll, Decides]), "{hook:?}");
        }
    }

    #[test]
    fn what_forwarded_packets_are_refused_counts_whatever_established_ones_are_allowed() {
        assert!(filters(Hook::Forward, true, [AcceptsEstablished]));
        assert!(filters(Hook::Forward, false, [AcceptsEstablished, Decides]));
        assert!(filters(Hook::Forward, false, [OthersOnly]) && filters(Hook::Forward, false, [AcceptsEstablishedOnly]));
        assert!(!filters(Hook::Input, true, [AcceptsEstablishedOnly]));
        assert!(!filters(Hook::Forward, false, [AcceptsEstablished]));
    }
}
