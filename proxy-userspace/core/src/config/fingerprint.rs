//! Whether anything that concerns a route has changed, as one number.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::types::Route;

/// Of the route alone. [`DefaultHasher::new`] has fixed keys: the same in every process of one build.
pub(super) fn of_route(route: &Route) -> u64 {
    // Every field by name: one that is added must be decided on here.
    let Route {
        name,
        listen,
        protocol,
        matches,
        backends,
        balance,
        engine,
        source_address,
        allow,
        deny,
        keepalive,
        limits,
        timeouts,
        health,
        tls,
        backend_tls,
        proxy_protocol,
        fingerprint: _,
        own_fingerprint: _,
        shares_port_with: _,
    } = route;
    let mut hasher = DefaultHasher::new();
    (name, listen, protocol, matches, backends, balance, engine, source_address).hash(&mut hasher);
    (allow, deny, keepalive, limits, timeouts, health, tls, backend_tls, proxy_protocol).hash(&mut hasher);
    hasher.finish()
}

/// Of several fingerprints, in their order.
pub(super) fn of_all(fingerprints: impl Iterator<Item = u64>) -> u64 {
    let mut hasher = DefaultHasher::new();
    fingerprints.for_each(|fingerprint| hasher.write_u64(fingerprint));
    hasher.finish()
}
