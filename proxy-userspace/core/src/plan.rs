//! Which engine serves each route, and why not a cheaper one: pure, from the configuration and what the kernel allows.

mod preview;
mod refusal;

use std::{collections::HashMap, net::SocketAddr, ops::Range, sync::Arc};

use ipnet::IpNet;

pub use refusal::{Capability, MAX_STREAM_PORTS, Need, Refusal};

use crate::{
    capability::Capabilities,
    config::{Config, Engine, EngineChoice, Listen, Route, RouteName, SourceAddress},
};

/// An address's ports that the same routes share have a socket each up to so many; more are led to one socket, where `sk_lookup`
/// can.
pub const PORTS_WITH_OWN_SOCKETS: usize = 16;

/// One entry per route, in file order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    routes: Vec<Arc<RoutePlan>>,
    /// Of each route, close together: what a reload looks at.
    fingerprints: Vec<u64>,
    /// What it was planned with; `None`: nothing is planned yet.
    capabilities: Option<Capabilities>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct RoutePlan {
    pub route: Arc<Route>,
    /// `None`: no engine of this build can serve the route here.
    pub engine: Option<Engine>,
    /// Engines ruled out, in order of preference, with every reason.
    pub refused: Vec<(Engine, Refusal)>,
    /// The listen addresses this route has for itself.
    pub own_listens: Vec<Listen>,
    /// The ones it shares with other routes and is the first of: it carries them.
    pub shared_listens: Vec<SharedListen>,
    /// `ct timeout` objects can be used.
    pub ct_timeouts: bool,
    /// Many ports can be led to one socket.
    pub sk_lookup: bool,
}

/// One listen address, and the routes that share it.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedListen {
    pub listen: Listen,
    /// In file order.
    pub members: Vec<SharedBy>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct SharedBy {
    pub route: RouteName,
    /// Empty: every client (the port's default route).
    pub client: Vec<IpNet>,
}

/// A route that nothing in this build can serve.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("route \"{route}\": no engine can serve it here: {}", listed(.refused))]
pub struct Unserved {
    pub route: RouteName,
    pub refused: Vec<(Engine, Refusal)>,
}

fn listed(refused: &[(Engine, Refusal)]) -> String {
    refused.iter().map(|(engine, refusal)| format!("{engine}: {refusal}")).collect::<Vec<_>>().join("; ")
}

impl Plan {
    /// The routes without an engine; empty for a plan that can be carried out.
    pub fn unserved(&self) -> Vec<Unserved> {
        unserved(&self.routes)
    }

    /// Whether a route is forwarded by the kernel: nftables and conntrack are for those alone.
    pub fn uses_nft(&self) -> bool {
        self.routes.iter().any(|r| r.engine == Some(Engine::Nft))
    }

    /// In file order.
    pub fn routes(&self) -> &[Arc<RoutePlan>] {
        &self.routes
    }

    /// The routes that `replan` takes away.
    pub fn replaced(&self, replan: &Replan) -> &[Arc<RoutePlan>] {
        &self.routes[replan.range.clone()]
    }

    pub fn put(&mut self, replan: Replan) {
        self.fingerprints.splice(replan.range.clone(), replan.routes.iter().map(|r| r.route.fingerprint));
        self.routes.splice(replan.range, replan.routes);
        self.capabilities = Some(replan.capabilities);
    }
}

impl RoutePlan {
    /// The daemon listens, dials and relays; with `handoff` until it hands over.
    pub fn is_relayed(&self) -> bool {
        match self.engine {
            Some(Engine::Handoff | Engine::Sockmap | Engine::Splice | Engine::Copy) => true,
            Some(Engine::Nft) | None => false,
        }
    }

    /// Established connections leave the daemon for the packet level.
    pub fn hands_over(&self) -> bool {
        self.engine == Some(Engine::Handoff)
    }

    /// Nothing of the route itself keeps its connections from being handed over: what this machine allows decides.
    pub fn could_hand_over(&self) -> bool {
        let of_machine = |r: &Refusal| matches!(r, Refusal::CannotHandOver(_) | Refusal::BypassesFirewall(_));
        self.hands_over() || self.only_against_handoff(of_machine)
    }

    /// They would be, were it not for what the kernel says, or because nobody has asked it.
    pub fn awaits_handoff(&self) -> bool {
        self.only_against_handoff(|refusal| matches!(refusal, Refusal::CannotHandOver(_)))
    }

    /// What of this machine keeps connections that could be handed over in the daemon.
    pub fn kept_by(&self) -> Option<&Refusal> {
        let kept = self.could_hand_over() && !self.hands_over();
        self.refused.iter().find(|(engine, _)| kept && *engine == Engine::Handoff).map(|(_, refusal)| refusal)
    }

    fn only_against_handoff(&self, of_kind: fn(&Refusal) -> bool) -> bool {
        let against = || self.refused.iter().filter(|(engine, _)| *engine == Engine::Handoff);
        self.engine != Some(Engine::Nft) && against().next().is_some() && against().all(|(_, refusal)| of_kind(refusal))
    }

    /// The daemon dials its backends from the client's address.
    pub fn is_transparent(&self) -> bool {
        self.is_relayed() && self.route.source_address == SourceAddress::Client
    }

    /// What it needs of the network around this machine.
    pub fn condition(&self) -> Option<&'static str> {
        (self.engine.is_some() && self.route.source_address == SourceAddress::Client).then_some(
            "source_address = \"client\": what the backends send to clients must come back through this machine",
        )
    }

    /// How the daemon listens on many ports, and why so. `None`: it does not.
    pub fn many_ports(&self) -> Option<String> {
        let count = |listen: &Listen| usize::from(listen.ports.last - listen.ports.first) + 1;
        let many: usize = self.route.listen.iter().map(count).filter(|&ports| ports > PORTS_WITH_OWN_SOCKETS).sum();
        (self.is_relayed() && many > 0).then(|| match self.sk_lookup {
            true => format!("{many} ports are led to one socket per worker (sk_lookup)"),
            false => format!(
                "{many} ports have a socket each per worker: the kernel or the privileges lack sk_lookup (Linux 5.9, CAP_BPF)"
            ),
        })
    }

    /// Every address and port it listens on, as addresses of sockets.
    pub fn sockets(&self) -> impl Iterator<Item = SocketAddr> {
        let ports = |&Listen { address, ports }: &Listen| {
            (ports.first..=ports.last).map(move |port| SocketAddr::new(address, port))
        };
        self.route.listen.iter().flat_map(ports)
    }

    /// Why this engine, in one sentence.
    pub fn because(&self) -> String {
        match (self.engine, self.route.engine) {
            (None, _) => "no engine of this build can serve it".into(),
            (Some(engine), EngineChoice::Forced(_)) => format!("the configuration says engine = \"{engine}\""),
            (Some(Engine::Nft), EngineChoice::Auto) => {
                "the first packet decides: address, port and client are all this route looks at".into()
            }
            (Some(Engine::Handoff), EngineChoice::Auto) => match self.refused.first() {
                Some((_, refusal)) => format!("{refusal}: the daemon begins, and hands over to the kernel"),
                None => format!("{} is the cheapest engine that can serve it", Engine::Handoff),
            },
            (Some(engine), EngineChoice::Auto) => match self.refused.first() {
                Some((_, refusal)) => format!("{refusal}: the daemon relays"),
                None => format!("{engine} is the cheapest engine that can serve it"),
            },
        }
    }
}

/// Plans every route.
pub fn plan(config: &Config, capabilities: &Capabilities) -> Plan {
    let mut plan = Plan::default();
    plan.put(replan(config, capabilities, &plan));
    plan
}

/// A part of a plan and what comes in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Replan {
    /// Places of the plan before.
    pub range: Range<usize>,
    pub routes: Vec<Arc<RoutePlan>>,
    capabilities: Capabilities,
}

/// The part of `previous` that `config` changes: from the first to the last route that is not the same at the same place. Most
/// reloads change one route of many, and cost as much as that one. With other capabilities than before it is all of them.
pub fn replan(config: &Config, capabilities: &Capabilities, previous: &Plan) -> Replan {
    let (old, new) = (&previous.fingerprints[..], &config.routes[..]);
    let same = previous.capabilities.as_ref() == Some(capabilities);
    let most = if same { old.len() } else { 0 };
    let head = old.iter().zip(new).take(most).take_while(|(a, b)| **a == b.fingerprint).count();
    let rest = old[head..].iter().rev().zip(new[head..].iter().rev()).take(most);
    let tail = rest.take_while(|(a, b)| **a == b.fingerprint).count();
    let mut ports = Ports::default();
    let routes = (head..new.len() - tail).map(|index| Arc::new(plan_route(config, index, capabilities, &mut ports)));
    Replan { range: head..old.len() - tail, routes: routes.collect(), capabilities: capabilities.clone() }
}

impl Replan {
    /// The routes without an engine; empty for a plan that can be carried out.
    pub fn unserved(&self) -> Vec<Unserved> {
        unserved(&self.routes)
    }
}

fn unserved(routes: &[Arc<RoutePlan>]) -> Vec<Unserved> {
    let broken = routes.iter().filter(|r| r.engine.is_none());
    broken.map(|r| Unserved { route: r.route.name.clone(), refused: r.refused.clone() }).collect()
}

fn plan_route(config: &Config, index: usize, capabilities: &Capabilities, ports: &mut Ports) -> RoutePlan {
    let route = &config.routes[index];
    let port = ports.of(config, route, capabilities);
    let refused = refusal::refusals(route, port, capabilities);
    let can = |engine| !refused.iter().any(|&(e, _)| e == engine);
    let engine = match route.engine {
        EngineChoice::Auto => Engine::ALL.into_iter().find(|&e| can(e)),
        EngineChoice::Forced(engine) => can(engine).then_some(engine),
    };
    let refused = match route.engine {
        EngineChoice::Auto => refused,
        EngineChoice::Forced(forced) => refused.into_iter().filter(|&(e, _)| e == forced).collect(),
    };
    let (own_listens, shared_listens) = listens(config, index, port);
    RoutePlan {
        route: Arc::clone(route),
        engine,
        refused,
        own_listens,
        shared_listens,
        ct_timeouts: capabilities.nft_ct_timeout,
        sk_lookup: capabilities.sk_lookup,
    }
}

/// What the routes that share a port have in common, found out once for all of them.
#[derive(Debug, Default)]
struct Ports(HashMap<*const usize, Port>);

#[derive(Debug, Default)]
struct Port {
    /// One of them that the engine nft does not serve.
    relayed: Option<RouteName>,
    /// One of them listens on a range.
    has_range: bool,
    /// Who listens where, in file order.
    listeners: HashMap<Listen, Vec<usize>>,
}

impl Ports {
    fn of(&mut self, config: &Config, route: &Route, capabilities: &Capabilities) -> &Port {
        let members = &route.shares_port_with;
        self.0.entry(members.as_ptr()).or_insert_with(|| {
            let mut port = Port::default();
            for &index in members.iter() {
                let member = &config.routes[index];
                if port.relayed.is_none() && refusal::is_for_stream(member, capabilities) {
                    port.relayed = Some(member.name.clone());
                }
                for &listen in &member.listen {
                    port.has_range |= !listen.ports.is_single();
                    port.listeners.entry(listen).or_default().push(index);
                }
            }
            port
        })
    }
}

fn listens(config: &Config, index: usize, port: &Port) -> (Vec<Listen>, Vec<SharedListen>) {
    let route = &config.routes[index];
    let (mut own, mut shared) = (Vec::new(), Vec::new());
    for &listen in &route.listen {
        let alone = [index];
        let members = port.listeners.get(&listen).map_or(&alone[..], Vec::as_slice);
        if members.len() == 1 && route.matches.client.is_empty() {
            own.push(listen);
        } else if members.first() == Some(&index) {
            let by = |&i: &usize| SharedBy {
                route: config.routes[i].name.clone(),
                client: config.routes[i].matches.client.clone(),
            };
            shared.push(SharedListen { listen, members: members.iter().map(by).collect() });
        }
    }
    (own, shared)
}

#[cfg(test)]
mod tests;
