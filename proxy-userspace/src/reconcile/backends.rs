//! Backends that come and go: what checks, dials, names and operators say of them, brought into the kernel.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use proxy_core::{
    config::{Protocol, RouteName, Target},
    diff::{Update, Updates},
    pool::{Checked, Pool},
    view::{self, BackendAdmin},
};

use super::{Effect, ReconcileError, Reconciler, Served, relay};
use crate::{
    kernel::nft::Nft,
    stream::{self, Streams},
};

impl<N: Nft, S: Streams> Reconciler<N, S> {
    /// A health check of a route's backend has ended.
    pub fn checked(
        &mut self,
        route: &RouteName,
        target: &Target,
        checked: &Checked,
    ) -> Result<Vec<Effect>, ReconcileError> {
        self.change_pools(std::slice::from_ref(route), |pool| pool.checked(target, checked))
    }

    /// A connection of a route was refused by its backend, or not answered.
    pub fn dial_failed(
        &mut self,
        route: &RouteName,
        backend: SocketAddr,
        now: Instant,
    ) -> Result<Vec<Effect>, ReconcileError> {
        let effects =
            self.change_pools(std::slice::from_ref(route), |pool| pool.dial_failed(backend.ip(), backend.port(), now))?;
        if self.served.get(route).is_some_and(|s| s.pool.next_readmission().is_some()) {
            self.ejecting.insert(route.clone());
        }
        Ok(effects)
    }

    /// Takes hosts back that were out of use for failed dials.
    pub fn readmit(&mut self, now: Instant) -> Result<Vec<Effect>, ReconcileError> {
        let due = |name: &&RouteName| {
            self.served.get(*name).and_then(|s| s.pool.next_readmission()).is_none_or(|until| until <= now)
        };
        let routes: Vec<RouteName> = self.ejecting.iter().filter(due).cloned().collect();
        let effects = self.change_pools(&routes, |pool| pool.readmit(now))?;
        self.ejecting.retain(|route| !routes.contains(route));
        Ok(effects)
    }

    /// A name's addresses have changed.
    pub fn resolved(&mut self, host: &str, addresses: &[IpAddr]) -> Result<Vec<Effect>, ReconcileError> {
        let routes = self.routes_with_name(host);
        self.change_pools(&routes, |pool| pool.resolved(host, addresses))
    }

    /// An operator's word. `None`: no such route or backend.
    pub fn set_backend(
        &mut self,
        route: &str,
        backend: &str,
        admin: BackendAdmin,
    ) -> Result<Option<(view::Backend, Vec<Effect>)>, ReconcileError> {
        let Some(name) = RouteName::new(route).filter(|name| self.served.contains_key(name)) else { return Ok(None) };
        let mut view = None;
        let effects = self.change_pools(&[name], |pool| {
            view = pool.set_admin(backend, admin);
            view.is_some()
        })?;
        Ok(view.map(|view| (view, effects)))
    }

    /// Changes pools and, where that changes which backends take connections, the kernel; on an error both stay as they were.
    fn change_pools(
        &mut self,
        routes: &[RouteName],
        mut change: impl FnMut(&mut Pool) -> bool,
    ) -> Result<Vec<Effect>, ReconcileError> {
        let (mut updates, mut asked) = (Updates::new(), stream::Change::default());
        let (mut changed, mut effects) = (Vec::new(), Vec::new());
        for name in routes {
            let Some(served) = self.served.get(name) else { continue };
            let mut pool = served.pool.clone();
            let moved = change(&mut pool);
            if pool == served.pool {
                continue;
            }
            if moved {
                effects.extend(dropped_udp(served, &pool));
            }
            let down = !pool.endpoints().iter().any(|e| e.up);
            let counts_no_backend = served.counts_no_backend || down;
            let made = self.make(served.id, &served.plan, pool, counts_no_backend, served.carriers);
            if moved && made.plan.is_relayed() {
                asked.routes.push(relay::spec(&made));
            } else if moved {
                updates.insert(made.id, Update { old: self.fragment(served), new: self.fragment(&made) });
            }
            changed.push(made);
        }
        if !updates.is_empty() || !asked.routes.is_empty() {
            self.apply(&updates, asked, false)?;
        }
        self.unpublished |= !changed.is_empty();
        for made in changed {
            self.served.insert(made.plan.route.name.clone(), made);
        }
        Ok(effects)
    }

    /// What to check of a route: each backend with its present addresses.
    pub fn targets(&self, route: &RouteName) -> Vec<(Target, Vec<IpAddr>)> {
        self.served.get(route).map(|s| s.pool.targets()).unwrap_or_default()
    }

    pub fn backend_is_up(&self, route: &RouteName, target: &Target) -> Option<bool> {
        let name = target.to_string();
        let backends = &self.served.get(route)?.view.backends;
        backends.iter().find(|b| b.name == name).map(|b| b.up)
    }

    /// The routes that have a backend of this name.
    pub fn routes_with_name(&self, host: &str) -> Vec<RouteName> {
        let uses = |s: &&Served| s.plan.route.backends.iter().any(|b| b.target.host() == Some(host));
        self.served.values().filter(uses).map(|s| s.plan.route.name.clone()).collect()
    }
}

/// The backends of a UDP route that took packets before and do not any more.
fn dropped_udp(served: &Served, pool: &Pool) -> Option<Effect> {
    if served.plan.route.protocol != Protocol::Udp {
        return None;
    }
    let up = |pool: &Pool| -> HashSet<IpAddr> { pool.endpoints().iter().filter(|e| e.up).map(|e| e.address).collect() };
    let mut backends: Vec<IpAddr> = up(&served.pool).difference(&up(pool)).copied().collect();
    // An operator's drain lets flows go on.
    let drains = pool.views().into_iter().filter(|b| b.admin == BackendAdmin::Drain).flat_map(|b| b.addresses);
    let drains: HashSet<IpAddr> = drains.collect();
    backends.retain(|ip| !drains.contains(ip));
    (!backends.is_empty()).then_some(Effect::DropUdp { id: served.id, backends })
}
