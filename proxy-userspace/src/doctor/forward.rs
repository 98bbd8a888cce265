//! Other people's firewalls: chains that would drop what shunt forwards.

mod chain;
mod legacy;

use std::io;

pub(super) use chain::ForwardChain;

use super::Check;

/// One check per foreign chain in the way, or one that says there is none.
pub(super) fn checks() -> Vec<Check> {
    let why = "forwarded packets pass every chain of the forward hook; one that drops them stops every nft route";
    let new = || Check::of("forward chains", why);
    let found = match chain::read() {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return vec![new().warn("not known: asking needs CAP_NET_ADMIN", "run shunt doctor with CAP_NET_ADMIN")];
        }
        Err(error) => return vec![new().ok(format!("nf_tables does not answer ({error})"))],
    };
    let mut closed: Vec<_> = found.into_iter().chain(legacy::read()).filter(ForwardChain::is_in_the_way).collect();
    closed.sort_by(|one, other| one.name.cmp(&other.name));
    if closed.is_empty() {
        return vec![new().ok("none drops what shunt forwards")];
    }
    closed.into_iter().map(|chain| new().warn(format!("{}: {}", chain.name, chain.closes()), chain.mend)).collect()
}
