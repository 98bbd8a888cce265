//! Other people's firewalls: chains that would drop what shunt forwards.

use std::io;

use super::Check;
use crate::kernel::firewall::{ForwardChain, forward_chains};

/// Chains that what is handed over does not pass. `wanted`: a route asks for the engine handoff.
pub(super) fn passed_by(filter: Option<&str>, wanted: bool) -> Option<Check> {
    let why = "connections that are handed over pass no chain of the firewall any more; what it says of their first packets holds";
    let check = Check::of("firewall and handoff", why);
    Some(match (filter, wanted) {
        (None, false) => return None,
        (None, true) => check.ok("no chain filters forwarded packets"),
        (Some(chain), false) => check.ok(format!("{chain} filters: engine = \"auto\" does not hand over")),
        (Some(chain), true) => check.warn(
            format!("{chain} filters, and does not see what is handed over"),
            "filter by deny = [...] in the route, or take engine = \"splice\"; a running connection ends with shunt kill",
        ),
    })
}

/// One check per foreign chain in the way, or one that says there is none.
pub(super) fn checks() -> Vec<Check> {
    let why = "forwarded packets pass every chain of the forward hook; one that drops them stops every nft route";
    let new = || Check::of("forward chains", why);
    let found = match forward_chains() {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return vec![new().warn("not known: asking needs CAP_NET_ADMIN", "run shunt doctor with CAP_NET_ADMIN")];
        }
        Err(error) => return vec![new().ok(format!("nf_tables does not answer ({error})"))],
    };
    let closed: Vec<_> = found.into_iter().filter(ForwardChain::is_in_the_way).collect();
    if closed.is_empty() {
        return vec![new().ok("none drops what shunt forwards")];
    }
    closed.into_iter().map(|chain| new().warn(format!("{}: {}", chain.name, chain.closes()), chain.mend)).collect()
}
