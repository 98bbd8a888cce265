//! What a worker knows of a route, and of a listen address. Immutable: a change makes a new one.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use proxy_core::{
    balance::{Asked, Chooser},
    classify::Port,
    config::{self, Engine, Keepalive, SourceAddress},
    session::Limits,
};

use super::{
    RouteSpec,
    admission::Admission,
    meter::{Meters, RouteMeter},
};

#[derive(Debug)]
pub struct Route {
    pub id: u32,
    pub config: Arc<config::Route>,
    pub engine: Engine,
    pub limits: Limits,
    /// It has a name with addresses of both families.
    pub both_families: bool,
    chooser: Chooser,
    /// Of each endpoint of the chooser.
    open: Vec<Arc<AtomicU64>>,
    /// Shared with the route as it was before a change.
    pub admission: Arc<Admission>,
    pub meters: Arc<Meters>,
}

/// A chosen backend.
#[derive(Debug)]
pub struct Chosen {
    /// Among the route's endpoints.
    pub index: usize,
    pub address: SocketAddr,
    pub open: Arc<AtomicU64>,
    /// Nobody else could be asked instead.
    pub is_last: bool,
}

impl Route {
    /// `before`: the same route as it was.
    pub fn new(spec: RouteSpec, before: Option<&Route>, workers: usize) -> Self {
        let config = Arc::clone(&spec.plan.route);
        let meters = before.map_or_else(|| Arc::new(meters(spec.id, &config, workers)), |b| Arc::clone(&b.meters));
        let open = open_by_backend(&meters, &spec);
        let named = config.backends.iter().any(|backend| backend.target.host().is_some());
        let families = [false, true].map(|v4| spec.endpoints.iter().any(|e| e.up && e.address.is_ipv4() == v4));
        Self {
            id: spec.id,
            engine: spec.plan.engine.unwrap_or(Engine::Copy),
            limits: Limits::of(&config),
            both_families: named && families == [true; 2],
            chooser: Chooser::new(config.balance, spec.endpoints, &config.backends),
            open,
            admission: before.map(|b| Arc::clone(&b.admission)).unwrap_or_default(),
            meters,
            config,
        }
    }

    /// A backend for a connection that dialled `port`, none of `tried`.
    pub fn choose(&self, asked: Asked, port: u16, tried: &[usize]) -> Option<Chosen> {
        let active = |index: usize| self.open.get(index).map_or(0, |open| open.load(Relaxed));
        let index = self.chooser.pick(asked, &active, tried)?;
        let endpoint = self.chooser.endpoints().get(index)?;
        Some(Chosen {
            index,
            address: SocketAddr::new(endpoint.address, endpoint.port.unwrap_or(port)),
            open: Arc::clone(self.open.get(index)?),
            is_last: tried.len() + 1 >= self.chooser.endpoints().iter().filter(|e| e.up).count(),
        })
    }

    /// Backends see the client's address.
    pub fn is_transparent(&self) -> bool {
        self.config.source_address == SourceAddress::Client
    }

    /// Vanished peers are only noticed by probes where no idle limit ends the connection.
    pub fn probes_peers(&self) -> bool {
        self.config.keepalive == Keepalive::Immortal || self.limits.idle.is_none()
    }
}

fn meters(id: u32, route: &config::Route, workers: usize) -> Meters {
    Meters {
        id,
        name: route.name.as_str().into(),
        workers: (0..workers).map(|_| Arc::new(RouteMeter::default())).collect(),
        backends: RwLock::default(),
    }
}

/// The counters of open connections of each endpoint: those of backends that stay go on; those that are gone are shown until
/// their last connection has ended.
fn open_by_backend(meters: &Meters, spec: &RouteSpec) -> Vec<Arc<AtomicU64>> {
    let mut known = meters.backends.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let address = |ip: IpAddr, port: Option<u16>| SocketAddr::new(ip, port.unwrap_or(0));
    let wanted: Vec<SocketAddr> = spec.endpoints.iter().map(|e| address(e.address, e.port)).collect();
    known.retain(|(backend, open)| wanted.contains(backend) || open.load(Relaxed) > 0);
    let mut of = |backend: SocketAddr| match known.iter().find(|(one, _)| *one == backend) {
        Some((_, open)) => Arc::clone(open),
        None => {
            let open = Arc::new(AtomicU64::new(0));
            known.push((backend, Arc::clone(&open)));
            open
        }
    };
    wanted.into_iter().map(&mut of).collect()
}

/// The routes behind a listen address.
#[derive(Debug)]
pub struct Listen {
    pub port: Port,
    /// By the indices of [`Port`].
    pub members: Vec<u32>,
}

impl Listen {
    pub fn new(members: &[&Arc<Route>]) -> Self {
        let configs: Vec<Arc<config::Route>> = members.iter().map(|route| Arc::clone(&route.config)).collect();
        Self { port: Port::new(&configs), members: members.iter().map(|route| route.id).collect() }
    }
}
