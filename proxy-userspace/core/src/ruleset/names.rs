//! The names in the table. Each is a promise: operators read them in `nft list`, and a new daemon adopts by them.

/// Sets and maps keyed by what the client dialled.
pub const EXACT: [&str; 2] = ["exact4", "exact6"];
pub const SHARED: [&str; 2] = ["shared4", "shared6"];
pub const RANGES: [&str; 2] = ["ranges4", "ranges6"];
pub const ANY: [&str; 2] = ["any4", "any6"];
pub const SHARED_ANY: [&str; 2] = ["shared-any4", "shared-any6"];
pub const ANY_RANGES: [&str; 2] = ["any-ranges4", "any-ranges6"];

/// Sets and maps keyed by the route's mark.
pub const CONNECTIONS: &str = "connections";
pub const TRAFFIC_IN: &str = "traffic-in";
pub const TRAFFIC_OUT: &str = "traffic-out";
pub const TIMEOUTS: &str = "timeouts";
pub const POLICIES: &str = "policies";
pub const BALANCER: &str = "balancer";
pub const BACKEND: [&str; 2] = ["backend4", "backend6"];
pub const BACKEND_SAME_PORT: [&str; 2] = ["backend4-same-port", "backend6-same-port"];
pub const SLOTS: [&str; 2] = ["slots4", "slots6"];
pub const SLOTS_SAME_PORT: [&str; 2] = ["slots4-same-port", "slots6-same-port"];
pub const CLIENT_SOURCE: &str = "client-source";
pub const HAIRPIN: [&str; 2] = ["hairpin4", "hairpin6"];

/// Chains, and the sets that count per route what went through them: named after the reason.
pub const DENIED: &str = "denied";
pub const LIMIT_CONNECTIONS: &str = "limit-connections";
pub const LIMIT_PER_CLIENT: &str = "limit-per-client";
pub const LIMIT_RATE: &str = "limit-rate";
pub const NO_BACKEND: &str = "no-backend";
pub const NO_ROUTE: &str = "no-route";
/// Each refusal's chain and set, with the reason it stands for.
pub const REFUSALS: [(&str, crate::reason::Reason); 6] = [
    (DENIED, crate::reason::Reason::Denied),
    (LIMIT_CONNECTIONS, crate::reason::Reason::LimitConnections),
    (LIMIT_PER_CLIENT, crate::reason::Reason::LimitPerClient),
    (LIMIT_RATE, crate::reason::Reason::LimitRate),
    (NO_BACKEND, crate::reason::Reason::NoBackend),
    (NO_ROUTE, crate::reason::Reason::NoRoute),
];

/// The chain without rules for what the daemon's own sockets take.
pub const RELAYED: &str = "relayed";

/// `ct timeout` objects for routes with the standard limits.
pub const TCP_STANDARD: &str = "tcp-standard";
pub const UDP_STANDARD: &str = "udp-standard";
