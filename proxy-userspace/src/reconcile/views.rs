//! What others are shown of the routes.

use std::sync::Arc;

use proxy_core::{
    config::{Balance, Engine, Listen, ProxyVersion, RouteName, TlsMode},
    plan::RoutePlan,
    pool::Pool,
    view,
};

use super::{Reconciler, Served};
use crate::{kernel::nft::Nft, stream::Streams};

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
        engine: plan.engine.unwrap_or(Engine::Nft),
        balance: balance(route.balance).into(),
        state: view::RouteState::Active,
        mark,
        backends: pool.views(),
        stats: view::RouteStats::default(),
    }
}

impl<N: Nft, S: Streams> Reconciler<N, S> {
    /// Every route, in file order, and those that drain after them.
    pub fn route_views(&self) -> Vec<Arc<view::Route>> {
        let served = self.plan.routes().iter().filter_map(|r| self.served.get(&r.route.name));
        let mut views: Vec<Arc<view::Route>> = served.map(|s| Arc::clone(&s.view)).collect();
        views.extend(self.draining.iter().map(|(&id, drain)| {
            Arc::new(view::Route {
                name: drain.name.to_string(),
                protocol: String::new(),
                listen: Vec::new(),
                engine: drain.engine,
                balance: String::new(),
                state: view::RouteState::Draining,
                mark: if drain.carriers.kernel { self.mark(id) } else { 0 },
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

/// Where the bytes go, hop by hop.
fn path(served: &Served) -> Vec<String> {
    let view = &served.view;
    let backends: Vec<String> = view.backends.iter().filter(|b| b.up).map(|b| b.name.clone()).collect();
    let to = match backends.as_slice() {
        [] => None,
        [one] => Some(one.clone()),
        many => Some(format!("{} by {}", many.join(", "), view.balance)),
    };
    let dialled = format!("client dials {} ({})", view.listen.join(", "), view.protocol);
    if served.plan.is_relayed() {
        return [vec![dialled], relayed(served, to)].concat();
    }
    let source = match served.plan.condition() {
        None => "the backend sees this machine's address (masquerade)".to_owned(),
        Some(condition) => format!("the backend sees the client's address; {condition}"),
    };
    let to = to.unwrap_or_else(|| "refused with a reset: no backend is up".into());
    vec![
        dialled,
        format!("first packet: nftables table inet shunt marks the connection {:#010x}", view.mark),
        format!("destination becomes {to}"),
        source,
        "every further packet: conntrack translates it in the kernel; the daemon is not involved".into(),
    ]
}

/// … of a connection that the daemon accepts and dials.
fn relayed(served: &Served, to: Option<String>) -> Vec<String> {
    let route = &served.plan.route;
    let mut path = vec!["the daemon accepts the connection".to_owned()];
    path.extend(served.plan.many_ports());
    if !route.proxy_protocol.accept_from.is_empty() {
        path.push(
            "from the networks of proxy_protocol.accept_from: it reads the PROXY header and takes its client".into(),
        );
    }
    let terminates = route.tls.as_ref().is_some_and(|tls| tls.mode == TlsMode::Terminate);
    if terminates {
        path.push("it reads the ClientHello, and TLS with the client ends in it".into());
    } else if route.tls.is_some() || !route.matches.sni.is_empty() || !route.matches.alpn.is_empty() {
        path.push("it reads the ClientHello and passes it on as it came; TLS stays between client and backend".into());
    }
    match to {
        Some(to) => path.push(match served.plan.condition() {
            None => format!("it dials {to}; the backend sees this machine's address"),
            Some(condition) => format!("it dials {to} from the client's address; {condition}"),
        }),
        None => path.push("closed with a reset: no backend is up".into()),
    }
    if let Some(version) = route.proxy_protocol.send {
        let version = match version {
            ProxyVersion::V1 => "v1",
            ProxyVersion::V2 => "v2",
        };
        path.push(format!("it writes a PROXY header ({version}) that names the client"));
    }
    if route.backend_tls.is_some() {
        path.push("it begins TLS with the backend, whose certificate it checks".into());
    }
    if terminates || route.backend_tls.is_some() {
        path.push(
            "bytes: the daemon reads, deciphers or enciphers, and writes them; they are counted as plaintext".into(),
        );
        return path;
    }
    path.push(match served.view.engine {
        Engine::Sockmap => {
            "bytes: copied by the daemon at first; a connection that goes on has its sockets joined, and the kernel passes \
             the bytes on; the daemon relays while the reader is slow"
        }
        Engine::Handoff => {
            "bytes: copied by the daemon at first; then both connections are handed over to a program at the network \
             interfaces that translates one into the other, and the daemon is not involved any more"
        }
        Engine::Splice => {
            "bytes: copied by the daemon at first; a connection that carries much is moved in the kernel, from socket to \
             socket through a pipe"
        }
        _ => "bytes: the daemon reads them from one socket and writes them to the other",
    }.into());
    path
}
