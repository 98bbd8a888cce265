//! What two owners know, put together: routes and backends from one, their numbers from the other.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use proxy_core::view;

use crate::control::{FlowState, RouteState};

pub(super) fn status(routes: &RouteState, flows: &FlowState, uptime: Duration) -> view::Status {
    let stats = || routes.routes.iter().filter_map(|route| flows.routes.get(&route.name));
    view::Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: uptime.as_secs_f64(),
        config_file: routes.config_file.clone(),
        ready: routes.ready,
        routes: routes.routes.len(),
        connections_active: stats().map(|stats| stats.connections_active).sum(),
        connections_total: stats().map(|stats| stats.connections_total).sum(),
        reconcile: routes.reconcile.clone(),
        conntrack: flows.conntrack.clone(),
        reloads_ok: routes.reloads_ok,
        reloads_failed: routes.reloads_failed,
        warnings: routes.warnings.iter().chain(&flows.warnings).cloned().collect(),
    }
}

pub(super) fn routes(routes: &RouteState, flows: &FlowState) -> Vec<view::Route> {
    let nothing = HashMap::new();
    let with_numbers = |route: &Arc<view::Route>| {
        let active = flows.backends.get(&route.name).unwrap_or(&nothing);
        let mut route = view::Route::clone(route);
        route.stats = flows.routes.get(&route.name).cloned().unwrap_or_default();
        for backend in &mut route.backends {
            backend.connections_active = backend_active(backend, active);
        }
        route
    };
    routes.routes.iter().map(with_numbers).collect()
}

/// Live connections to any of the backend's addresses, on its port where it has one.
pub(super) fn backend_active(backend: &view::Backend, active: &HashMap<SocketAddr, u64>) -> u64 {
    match port(&backend.name) {
        Some(port) => backend.addresses.iter().filter_map(|address| active.get(&SocketAddr::new(*address, port))).sum(),
        None => active.iter().filter(|(at, _)| backend.addresses.contains(&at.ip())).map(|(_, count)| count).sum(),
    }
}

/// The port in a backend's name (`Display` of [`proxy_core::config::Target`]).
fn port(name: &str) -> Option<u16> {
    if name.parse::<std::net::IpAddr>().is_ok() {
        return None;
    }
    name.rsplit_once(':')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_of_a_backend_is_found_in_every_spelling() {
        assert_eq!(port("10.0.0.1:80"), Some(80));
        assert_eq!(port("[fd00::1]:81"), Some(81));
        assert_eq!(port("db.internal:82"), Some(82));
        assert_eq!((port("10.0.0.1"), port("fd00::80"), port("db.internal")), (None, None, None));
    }
}
