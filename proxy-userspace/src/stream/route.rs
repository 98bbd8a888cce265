//! What a worker knows of a route, and of a listen address. Immutable: a change makes a new one.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use proxy_core::{
    balance::{Asked, Chooser},
    classify::Port,
    config::{self, Engine, Keepalive, SourceAddress},
    ruleset::Endpoint,
    session::Limits,
};

use rustls::pki_types::ServerName;

use super::{
    RouteSpec,
    admission::{Admission, Seat},
    flow::Counted,
    meter::Meters,
};
use crate::tls::{RouteTls, TlsError};

#[derive(Debug)]
pub struct Route {
    pub id: u32,
    pub config: Arc<config::Route>,
    pub engine: Engine,
    pub limits: Limits,
    /// `None`: it neither ends nor begins TLS.
    pub tls: Option<Arc<RouteTls>>,
    /// What backends are called whose address is known by a name.
    server_names: HashMap<IpAddr, ServerName<'static>>,
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
    pub address: SocketAddr,
    pub open: Arc<AtomicU64>,
    /// Nobody else could be asked instead.
    pub is_last: bool,
}

impl Route {
    /// `before`: the same route as it was. Reads the files of its TLS when that is new.
    pub fn new(spec: RouteSpec, before: Option<&Route>, workers: usize) -> Result<Self, TlsError> {
        let config = Arc::clone(&spec.plan.route);
        let tls = match before.and_then(|before| before.tls.as_ref()).filter(|tls| tls.is_of(&config)) {
            Some(tls) => Some(Arc::clone(tls)),
            None => RouteTls::load(&config)?.map(Arc::new),
        };
        let named = |(ip, name): &(IpAddr, String)| Some((*ip, ServerName::try_from(name.clone()).ok()?));
        let server_names = spec.names.iter().filter_map(named).collect();
        let meters = before
            .map_or_else(|| Arc::new(Meters::new(spec.id, config.name.as_str(), workers)), |b| Arc::clone(&b.meters));
        let open = open_by_backend(&meters, &spec);
        let named = config.backends.iter().any(|backend| backend.target.host().is_some());
        let families = [false, true].map(|v4| spec.endpoints.iter().any(|e| e.up && e.address.is_ipv4() == v4));
        Ok(Self {
            id: spec.id,
            tls,
            server_names,
            engine: spec.plan.engine.unwrap_or(Engine::Copy),
            limits: Limits::of(&config),
            both_families: named && families == [true; 2],
            chooser: Chooser::new(config.balance, spec.endpoints, &config.backends),
            open,
            admission: before.map(|b| Arc::clone(&b.admission)).unwrap_or_default(),
            meters,
            config,
        })
    }

    /// What the certificate of this backend must be for.
    pub fn server_name(&self, backend: IpAddr) -> Option<ServerName<'static>> {
        match self.config.backend_tls.as_ref()?.server_name.as_ref() {
            Some(name) => ServerName::try_from(name.clone()).ok(),
            None => Some(self.server_names.get(&backend).cloned().unwrap_or_else(|| ServerName::from(backend))),
        }
    }

    /// A backend for a connection that dialled `port`, none of `tried`.
    pub fn choose(&self, asked: Asked, port: u16, tried: &[SocketAddr]) -> Option<Chosen> {
        let active = |index: usize| self.open.get(index).map_or(0, |open| open.load(Relaxed));
        let endpoints = self.chooser.endpoints();
        let address = |e: &Endpoint| SocketAddr::new(e.address, e.port.unwrap_or(port));
        // By address: the endpoints may have changed since the first was tried.
        let tried: Vec<usize> = match tried {
            [] => Vec::new(),
            tried => (0..endpoints.len()).filter(|index| tried.contains(&address(&endpoints[*index]))).collect(),
        };
        let index = self.chooser.pick(asked, &active, &tried)?;
        let endpoint = endpoints.get(index)?;
        Some(Chosen {
            address: address(endpoint),
            open: Arc::clone(self.open.get(index)?),
            is_last: tried.len() + 1 >= endpoints.iter().filter(|e| e.up).count(),
        })
    }

    /// A place for a connection that an earlier daemon let in, whatever the limits say now.
    pub fn seat_of(&self, client: IpAddr) -> Seat {
        Seat { admission: Arc::clone(&self.admission), admitted: self.admission.enter_anyway(&self.config, client) }
    }

    /// One connection more for that backend, if it is one of the route's.
    pub fn count(&self, backend: SocketAddr) -> Option<Counted> {
        let is = |e: &Endpoint| e.address == backend.ip() && e.port.is_none_or(|port| port == backend.port());
        let index = self.chooser.endpoints().iter().position(is)?;
        self.open.get(index).map(|open| Counted::new(Arc::clone(open)))
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
