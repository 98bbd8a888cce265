//! What the owners know, put together: routes and backends from one, their numbers from the others.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use proxy_core::view;

use super::Api;
use crate::{
    control::{FlowState, RouteState},
    stream::{
        meter::{Meters, Reader, RouteTotals},
        rates::{Rate, Rates},
    },
};

/// The last snapshots of the owners, and the counters of the stream path.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub routes: Arc<RouteState>,
    pub flows: Arc<FlowState>,
    pub relayed: Reader,
    pub rates: Arc<Rates>,
}

impl Known {
    pub fn now(api: &Api) -> Self {
        let control = &api.control;
        Self {
            routes: control.route_state.borrow().clone(),
            flows: control.flow_state.borrow().clone(),
            relayed: control.relayed.clone(),
            rates: control.relayed_rates.borrow().clone(),
        }
    }

    /// What the stream path has counted, by the name of the route. `-`: connections that came to no route.
    pub fn totals(&self) -> HashMap<Arc<str>, (RouteTotals, Rate)> {
        let totals = |meters: &Arc<Meters>| {
            let rate = self.rates.get(&meters.id).copied().unwrap_or_default();
            (Arc::clone(&meters.name), (meters.totals(), rate))
        };
        self.relayed.meters.all().iter().map(totals).collect()
    }

    pub fn warnings(&self) -> impl Iterator<Item = String> {
        let owners = self.routes.warnings.iter().chain(&self.flows.warnings).cloned();
        owners.chain(self.relayed.warnings())
    }
}

pub(super) fn status(known: &Known, uptime: Duration) -> view::Status {
    let Known { routes, flows, .. } = known;
    let stats = || routes.routes.iter().filter_map(|route| flows.routes.get(&route.name));
    let relayed = known.totals();
    let engines = || relayed.values().flat_map(|(totals, _)| &totals.engines);
    let (active, total) = (stats().map(|s| s.connections_active), stats().map(|s| s.connections_total));
    view::Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: uptime.as_secs_f64(),
        config_file: routes.config_file.clone(),
        ready: routes.ready,
        routes: routes.routes.len(),
        connections_active: active.chain(engines().map(|(_, engine)| engine.active)).sum(),
        connections_total: total.chain(engines().map(|(_, engine)| engine.total)).sum(),
        reconcile: routes.reconcile.clone(),
        conntrack: flows.conntrack.clone(),
        handoff: known.relayed.handed.status().map(|handoff| {
            let mut results = BTreeMap::new();
            for (result, count) in relayed.values().flat_map(|(totals, _)| &totals.handovers) {
                *results.entry((*result).to_owned()).or_default() += count;
            }
            view::HandoffStatus { results, ..handoff }
        }),
        reloads_ok: routes.reloads_ok,
        reloads_failed: routes.reloads_failed,
        acme: known.relayed.acme.views(),
        warnings: known.warnings().collect(),
    }
}

pub(super) fn routes(known: &Known) -> Vec<view::Route> {
    let (flows, relayed) = (&known.flows, known.totals());
    let with_numbers = |route: &Arc<view::Route>| {
        let mut route = view::Route::clone(route);
        let relayed = relayed.get(route.name.as_str());
        let active = open(flows.backends.get(&route.name), relayed.map(|(totals, _)| totals));
        route.stats = flows.routes.get(&route.name).cloned().unwrap_or_default();
        if let Some((totals, rate)) = relayed {
            add(&mut route.stats, totals, rate);
        }
        for backend in &mut route.backends {
            backend.connections_active = backend_active(backend, &active);
        }
        route
    };
    known.routes.routes.iter().map(with_numbers).collect()
}

/// `backend` of a route, with its open connections.
pub(super) fn backend(known: &Known, route: &str, backend: view::Backend) -> view::Backend {
    let relayed = known.totals();
    let active = open(known.flows.backends.get(route), relayed.get(route).map(|(totals, _)| totals));
    view::Backend { connections_active: backend_active(&backend, &active), ..backend }
}

fn add(stats: &mut view::RouteStats, totals: &RouteTotals, rate: &Rate) {
    for (_, engine) in &totals.engines {
        stats.connections_active += engine.active;
        stats.connections_total += engine.total;
        stats.bytes_in += engine.bytes_in;
        stats.bytes_out += engine.bytes_out;
        for (reason, count) in &engine.terminations {
            *stats.terminations.entry(*reason).or_default() += count;
        }
    }
    stats.connections_rate += rate.connections;
    stats.bytes_in_rate += rate.bytes_in;
    stats.bytes_out_rate += rate.bytes_out;
}

/// Open connections by backend address, forwarded and relayed.
pub(super) fn open<'a>(
    forwarded: Option<&'a HashMap<SocketAddr, u64>>,
    relayed: Option<&RouteTotals>,
) -> Cow<'a, HashMap<SocketAddr, u64>> {
    let relayed = relayed.map(|totals| &totals.backends[..]).unwrap_or_default();
    let mut open = forwarded.map_or_else(Cow::default, Cow::Borrowed);
    if !relayed.is_empty() {
        let open = open.to_mut();
        relayed.iter().for_each(|(backend, count)| *open.entry(*backend).or_default() += count);
    }
    open
}

/// Both, the oldest first, at most `limit`; 0 = all.
pub(super) fn connections(
    forwarded: Vec<view::Connection>,
    mut relayed: Vec<view::Connection>,
    limit: usize,
) -> Vec<view::Connection> {
    if !relayed.is_empty() {
        relayed.extend(forwarded);
        relayed.sort_by(|a, b| b.age_seconds.total_cmp(&a.age_seconds));
        if limit > 0 {
            relayed.truncate(limit);
        }
        return relayed;
    }
    forwarded
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
