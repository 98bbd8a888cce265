//! What others are shown of the routes.

use std::sync::Arc;

use proxy_core::{
    config::{Balance, Listen, RouteName},
    plan::RoutePlan,
    pool::Pool,
    view,
};

use super::{Reconciler, Served};
use crate::kernel::nft::Nft;

/// `address:port` or `address:first-last`.
pub fn listen(listen: &Listen) -> String {
    let address = std::net::SocketAddr::new(listen.address, listen.ports.first);
    if listen.ports.is_single() { address.to_string() } else { format!("{address}-{}", listen.ports.last) }
}

pub fn balance(balance: Balance) -> &'static str {
    match balance {
        Balance::RoundRobin => "round-robin",
        Balance::Random => "random",
        Balance::SourceHash => "source-hash",
        Balance::Maglev => "maglev",
        Balance::LeastConnections => "least-connections",
    }
}

pub(super) fn route(plan: &RoutePlan, pool: &Pool, mark: u32) -> view::Route {
    let route = &plan.route;
    view::Route {
        name: route.name.to_string(),
        protocol: route.protocol.as_str().into(),
        listen: route.listen.iter().map(listen).collect(),
        engine: plan.engine.unwrap_or(proxy_core::config::Engine::Nft),
        balance: balance(route.balance).into(),
        state: view::RouteState::Active,
        mark,
        backends: pool.views(),
        stats: view::RouteStats::default(),
    }
}

impl<N: Nft> Reconciler<N> {
    /// Every route, in file order, and those that drain after them.
    pub fn route_views(&self) -> Vec<Arc<view::Route>> {
        let served = self.plan.routes().iter().filter_map(|r| self.served.get(&r.route.name));
        let mut views: Vec<Arc<view::Route>> = served.map(|s| Arc::clone(&s.view)).collect();
        views.extend(self.draining.iter().map(|(&id, drain)| {
            Arc::new(view::Route {
                name: drain.name.to_string(),
                protocol: String::new(),
                listen: Vec::new(),
                engine: proxy_core::config::Engine::Nft,
                balance: String::new(),
                state: view::RouteState::Draining,
                mark: self.mark(id),
                backends: Vec::new(),
                stats: view::RouteStats::default(),
            })
        }));
        views
    }

    pub fn status(&self) -> &view::ReconcileStatus {
        &self.status
    }

    /// The table as it should be, as a script.
    pub fn script(&self) -> String {
        proxy_core::ruleset::print(&self.wanted())
    }

    pub fn explain(&self, name: &str) -> Option<view::Explain> {
        let served = self.served.get(&RouteName::new(name)?)?;
        let refused = |(engine, refusal): &(_, proxy_core::plan::Refusal)| view::Refused {
            engine: *engine,
            reason: refusal.to_string(),
        };
        Some(view::Explain {
            route: name.into(),
            engine: served.view.engine,
            because: served.plan.because(),
            refused: served.plan.refused.iter().map(refused).collect(),
            path: path(served),
            connection: None,
        })
    }
}

/// Where the bytes of a kernel-forwarded route go, hop by hop.
fn path(served: &Served) -> Vec<String> {
    let view = &served.view;
    let backends: Vec<String> = view.backends.iter().filter(|b| b.up).map(|b| b.name.clone()).collect();
    let to = match backends.as_slice() {
        [] => "refused with a reset: no backend is up".into(),
        [one] => one.clone(),
        many => format!("{} by {}", many.join(", "), view.balance),
    };
    let source = match served.plan.route.source_address {
        proxy_core::config::SourceAddress::Gateway => "the backend sees this machine's address (masquerade)",
        proxy_core::config::SourceAddress::Client => "the backend sees the client's address",
    };
    vec![
        format!("client dials {} ({})", view.listen.join(", "), view.protocol),
        format!("first packet: nftables table inet shunt marks the connection {:#010x}", view.mark),
        format!("destination becomes {to}"),
        source.into(),
        "every further packet: conntrack translates it in the kernel; the daemon is not involved".into(),
    ]
}
