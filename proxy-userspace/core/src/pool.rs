//! The state of a route's backends: where they are, whether they take connections, and who said so.

use std::{net::IpAddr, sync::Arc};

use crate::{
    config::{Health, Route, Target},
    ruleset::Endpoint,
    view::{self, BackendAdmin},
};

/// The backends of one route, in file order.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    backends: Vec<Backend>,
    health: Option<Health>,
}

#[derive(Debug, Clone, PartialEq)]
struct Backend {
    target: Target,
    weight: u16,
    admin: BackendAdmin,
    hosts: Vec<Host>,
}

/// One address of a backend.
#[derive(Debug, Clone, PartialEq)]
struct Host {
    ip: IpAddr,
    up: bool,
    /// Checks in a row that contradict `up`.
    streak: u32,
    last_error: Option<Arc<str>>,
}

impl Host {
    /// New hosts take connections until a check says otherwise, as in HAProxy.
    fn new(ip: IpAddr) -> Self {
        Self { ip, up: true, streak: 0, last_error: None }
    }
}

/// What came of a health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    pub ip: IpAddr,
    /// `Err`: why it failed.
    pub result: Result<(), String>,
}

impl Pool {
    pub fn new(route: &Route) -> Self {
        Self::updated(route, None)
    }

    /// The pool of `route`, keeping what is known of the backends that stay.
    pub fn updated(route: &Route, previous: Option<&Pool>) -> Self {
        let known = |target: &Target| previous?.backends.iter().find(|b| b.target == *target);
        let backend = |b: &crate::config::Backend| match known(&b.target) {
            Some(old) => Backend { weight: b.weight, ..old.clone() },
            None => Backend {
                target: b.target.clone(),
                weight: b.weight,
                admin: BackendAdmin::Ready,
                hosts: match &b.target {
                    Target::Address { ip, .. } => vec![Host::new(*ip)],
                    Target::Name { .. } => Vec::new(),
                },
            },
        };
        let mut pool = Self { backends: route.backends.iter().map(backend).collect(), health: route.health };
        if pool.health.is_none() {
            for host in pool.backends.iter_mut().flat_map(|b| &mut b.hosts) {
                *host = Host::new(host.ip);
            }
        }
        pool
    }

    /// Every address of every backend, and whether it takes new connections.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        let of = |b: &Backend| {
            let ready = b.admin == BackendAdmin::Ready;
            let (port, weight) = (b.target.port(), b.weight);
            let endpoint = move |h: &Host| Endpoint { address: h.ip, port, weight, up: ready && h.up };
            b.hosts.iter().map(endpoint).collect::<Vec<_>>()
        };
        self.backends.iter().flat_map(of).collect()
    }

    /// A name's addresses are known now. True when that changes the endpoints.
    pub fn resolved(&mut self, name: &str, addresses: &[IpAddr]) -> bool {
        let mut sorted = addresses.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let mut changed = false;
        for backend in &mut self.backends {
            if !matches!(&backend.target, Target::Name { host, .. } if host == name) {
                continue;
            }
            if backend.hosts.iter().map(|h| h.ip).eq(sorted.iter().copied()) {
                continue;
            }
            let old = std::mem::take(&mut backend.hosts);
            let host = |&ip: &IpAddr| old.iter().find(|h| h.ip == ip).cloned().unwrap_or_else(|| Host::new(ip));
            backend.hosts = sorted.iter().map(host).collect();
            changed = true;
        }
        changed
    }

    /// A check of `target` has ended. True when the backend goes up or down by it.
    pub fn checked(&mut self, target: &Target, checked: &Checked) -> bool {
        let Some(health) = self.health else { return false };
        let mut changed = false;
        for backend in self.backends.iter_mut().filter(|b| b.target == *target) {
            for host in backend.hosts.iter_mut().filter(|h| h.ip == checked.ip) {
                host.last_error = checked.result.as_ref().err().map(|e| e.as_str().into());
                if checked.result.is_ok() == host.up {
                    host.streak = 0;
                    continue;
                }
                host.streak += 1;
                if host.streak >= if host.up { health.fall } else { health.rise } {
                    host.up = !host.up;
                    host.streak = 0;
                    changed = true;
                }
            }
        }
        changed
    }

    /// An operator's word. `None`: no such backend. The name is the one in the configuration, or one of its addresses.
    pub fn set_admin(&mut self, name: &str, admin: BackendAdmin) -> Option<view::Backend> {
        let named = |b: &&mut Backend| b.target.to_string() == name || b.hosts.iter().any(|h| h.ip.to_string() == name);
        let backend = self.backends.iter_mut().find(named)?;
        backend.admin = admin;
        Some(backend.view())
    }

    /// What to check: each target with its present addresses.
    pub fn targets(&self) -> Vec<(Target, Vec<IpAddr>)> {
        self.backends.iter().map(|b| (b.target.clone(), b.hosts.iter().map(|h| h.ip).collect())).collect()
    }

    pub fn views(&self) -> Vec<view::Backend> {
        self.backends.iter().map(Backend::view).collect()
    }

    /// Backend names that an operator has set to something else than `ready`.
    pub fn set_aside(&self) -> Vec<(String, BackendAdmin)> {
        let aside = self.backends.iter().filter(|b| b.admin != BackendAdmin::Ready);
        aside.map(|b| (b.target.to_string(), b.admin)).collect()
    }
}

impl Backend {
    fn view(&self) -> view::Backend {
        let up = self.admin == BackendAdmin::Ready && self.hosts.iter().any(|h| h.up);
        let reason = match self.admin {
            BackendAdmin::Drain => Some("set to drain".into()),
            BackendAdmin::Down => Some("set to down".into()),
            BackendAdmin::Ready if self.hosts.is_empty() => Some("its name is not resolved".into()),
            BackendAdmin::Ready => self.hosts.iter().find_map(|h| h.last_error.as_deref().map(str::to_owned)),
        };
        view::Backend {
            name: self.target.to_string(),
            addresses: self.hosts.iter().map(|h| h.ip).collect(),
            weight: self.weight,
            up,
            admin: self.admin,
            reason,
            connections_active: 0,
        }
    }
}
