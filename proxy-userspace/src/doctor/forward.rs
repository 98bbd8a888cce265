//! Other people's firewalls: chains that would drop what shunt forwards, or that would not see what it hands over.

use std::io;

use proxy_core::{
    capability::{FilterChain, Hook},
    plan::Plan,
};

use super::Check;
use crate::kernel::firewall::{ForeignChain, foreign_chains};

/// Chains that what is handed over does not pass, one check for each; or one that says there is none, where `plan` hands over.
pub(super) fn passed_by(filters: &[FilterChain], plan: Option<&Plan>) -> Vec<Check> {
    let why = "connections that are handed over pass no chain of the firewall any more; what it says of their first packets holds";
    let new = || Check::of("firewall and handoff", why);
    let routes = || plan.iter().flat_map(|plan| plan.routes());
    let hands_over = routes().any(|route| route.hands_over());
    let withheld = routes().any(|route| !route.hands_over() && route.could_hand_over());
    if filters.is_empty() {
        return hands_over.then(|| new().ok("no chain has a say in established connections")).into_iter().collect();
    }
    let passes =
        "filter by deny = [...] in the route, or take engine = \"splice\"; a running connection ends with shunt kill";
    let say = |chain: &FilterChain| match (hands_over, withheld) {
        (true, _) => new().warn(format!("{chain} filters, and does not see what is handed over"), passes),
        (false, true) => new().warn(format!("{chain} filters: engine = \"auto\" does not hand over"), mend(chain)),
        (false, false) => new().ok(format!("{chain} filters: engine = \"auto\" does not hand over")),
    };
    filters.iter().map(say).collect()
}

fn mend(chain: &FilterChain) -> String {
    let may = "engine = \"handoff\" in the route says that its connections may pass it by";
    match chain.hook {
        Hook::Forward => may.into(),
        Hook::Ingress | Hook::Prerouting | Hook::Input | Hook::Output | Hook::Postrouting => {
            format!("{may}; or begin the chain with `ct state established accept`, and reload shunt")
        }
    }
}

/// One check per foreign chain in the way, or one that says there is none.
pub(super) fn checks() -> Vec<Check> {
    let why = "forwarded packets pass every chain of the forward hook; one that drops them stops every nft route";
    let new = || Check::of("forward chains", why);
    let found = match foreign_chains() {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return vec![new().warn("not known: asking needs CAP_NET_ADMIN", "run shunt doctor with CAP_NET_ADMIN")];
        }
        Err(error) => return vec![new().ok(format!("nf_tables does not answer ({error})"))],
    };
    let closed: Vec<_> = found.into_iter().filter(ForeignChain::is_in_the_way).collect();
    if closed.is_empty() {
        return vec![new().ok("none drops what shunt forwards")];
    }
    closed.into_iter().map(|chain| new().warn(format!("{}: {}", chain.name(), chain.closes()), chain.mend)).collect()
}
