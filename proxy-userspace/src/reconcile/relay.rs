//! What the stream path is asked for: the routes it serves, and who shares which address.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use proxy_core::plan::RoutePlan;

use super::{Ids, Served};
use crate::stream::{Change, RouteSpec};

/// The routes behind each address and port the daemon listens on, in file order. One port each: ranges that overlap in part
/// are then nothing special.
#[derive(Debug, Default)]
pub(super) struct Sockets(HashMap<SocketAddr, Vec<u32>>);

impl Sockets {
    /// What changes when `new` comes in the place of `old`. Every route that shares an address with one of them is among
    /// them: its fingerprint covers those it shares its ports with.
    pub fn changes(&self, old: &[Arc<RoutePlan>], new: &[Arc<RoutePlan>], ids: &Ids) -> Vec<(SocketAddr, Vec<u32>)> {
        let mut after: BTreeMap<SocketAddr, Vec<u32>> = BTreeMap::new();
        for plan in old.iter().filter(|plan| plan.is_relayed()) {
            after.extend(plan.sockets().map(|socket| (socket, Vec::new())));
        }
        for plan in new.iter().filter(|plan| plan.is_relayed()) {
            let Some(id) = ids.id(&plan.route.name) else { continue };
            plan.sockets().for_each(|socket| after.entry(socket).or_default().push(id));
        }
        let nobody = Vec::new();
        after.into_iter().filter(|(socket, routes)| self.0.get(socket).unwrap_or(&nobody) != routes).collect()
    }

    pub fn take_over(&mut self, changes: Vec<(SocketAddr, Vec<u32>)>) {
        for (socket, routes) in changes {
            match routes.is_empty() {
                true => drop(self.0.remove(&socket)),
                false => drop(self.0.insert(socket, routes)),
            }
        }
    }
}

pub(super) fn spec(served: &Served) -> RouteSpec {
    RouteSpec {
        id: served.id,
        plan: Arc::clone(&served.plan),
        endpoints: served.pool.endpoints(),
        names: served.pool.names(),
    }
}

/// Nothing to ask for.
pub(super) fn is_empty(change: &Change) -> bool {
    change.routes.is_empty() && change.gone.is_empty() && change.ports.is_empty()
}
