//! What the owner of the flow table hears from the owner of the routes.

use std::{sync::Arc, time::Duration};

use proxy_core::{
    config::{Keepalive, Log, Route},
    conntrack::Traffic,
    flow::{RouteInfo, RouteTable},
    ruleset::Counter,
};
use tokio::sync::mpsc;

use super::{Counters, Effect};
use crate::track::{Clock, DropUdp, Input, KernelCounters, RouteCounters};

/// The owner of the flow table, as the owner of the routes sees it.
#[derive(Debug)]
pub struct Announcer {
    /// `None`: the kernel forwards nothing.
    inputs: Option<mpsc::Sender<Input>>,
    clock: Clock,
    /// The kernel ends idle flows by itself.
    kernel_timeouts: bool,
    routes: RouteTable,
}

/// What was told of some routes before they were announced.
#[derive(Debug, Default)]
pub struct Before {
    known: Vec<(u32, Arc<RouteInfo>)>,
    unknown: Vec<u32>,
}

impl Announcer {
    pub fn new(inputs: Option<mpsc::Sender<Input>>, clock: Clock, kernel_timeouts: bool) -> Self {
        Self { inputs, clock, kernel_timeouts, routes: RouteTable::new() }
    }

    /// Tells of routes that are about to be served: a flow of a route nobody knows would not be counted. What was told of
    /// them before is for [`Self::take_back`].
    pub async fn announce(&mut self, routes: &[(u32, Arc<Route>)]) -> Before {
        let mut before = Before::default();
        if routes.is_empty() {
            return before;
        }
        for (id, _) in routes {
            match self.routes.get(id) {
                Some(known) => before.known.push((*id, Arc::clone(known))),
                None => before.unknown.push(*id),
            }
        }
        let routes: Vec<_> = routes.iter().map(|(id, route)| (*id, Arc::new(self.info(route)))).collect();
        self.change(routes, Vec::new()).await;
        before
    }

    /// The kernel refused what was announced.
    pub async fn take_back(&mut self, before: Before) {
        if before.known.is_empty() && before.unknown.is_empty() {
            return;
        }
        self.change(before.known, before.unknown).await;
    }

    async fn change(&mut self, routes: Vec<(u32, Arc<RouteInfo>)>, gone: Vec<u32>) {
        self.routes.extend(routes.iter().map(|(id, info)| (*id, Arc::clone(info))));
        for id in &gone {
            self.routes.remove(id);
        }
        self.send(Input::Change { routes, gone }).await;
    }

    pub async fn forward(&mut self, effects: Vec<Effect>) {
        let (mut routes, mut gone) = (Vec::new(), Vec::new());
        for effect in effects {
            match effect {
                Effect::Drain { id, name, deadline } => {
                    let known = self.routes.get(&id).map(|info| RouteInfo::clone(info));
                    let mut info = known.unwrap_or_else(|| RouteInfo {
                        name: name.as_str().into(),
                        protocol: proxy_core::config::Protocol::Tcp,
                        idle: None,
                        idle_warning: None,
                        half_closed: None,
                        lifetime: None,
                        kernel_timeouts: self.kernel_timeouts,
                        drain_until: None,
                    });
                    info.drain_until = Some(self.clock.at(deadline));
                    routes.push((id, Arc::new(info)));
                }
                Effect::Forget { id } => gone.push(id),
                Effect::DropUdp { id, backends } => {
                    let backends = backends.into_iter().map(|ip| (ip, None)).collect();
                    self.send(Input::DropUdp(DropUdp { route: id, backends })).await;
                }
            }
        }
        if !routes.is_empty() || !gone.is_empty() {
            self.change(routes, gone).await;
        }
    }

    pub async fn counters(&self, counters: &[(u32, &Counters)]) {
        let traffic = |c: Counter| Traffic { packets: c.packets, bytes: c.bytes };
        let route = |c: &Counters| RouteCounters {
            connections: c.connections,
            traffic_in: traffic(c.inbound),
            traffic_out: traffic(c.outbound),
            refused: c.refused.clone(),
        };
        let routes = counters.iter().map(|(id, c)| (*id, route(c))).collect();
        self.send(Input::Counters(KernelCounters { routes })).await;
    }

    pub async fn access_log(&self, log: &Log) {
        self.send(Input::AccessLog(log.access)).await;
    }

    async fn send(&self, input: Input) {
        let Some(inputs) = &self.inputs else { return };
        if inputs.send(input).await.is_err() {
            tracing::error!("the flow table's owner has ended");
        }
    }

    fn info(&self, route: &Route) -> RouteInfo {
        let idle = match route.keepalive {
            Keepalive::Standard => route.timeouts.idle,
            Keepalive::Extended => route.timeouts.idle.map(|idle: Duration| idle.saturating_mul(6)),
            Keepalive::Immortal => None,
        };
        RouteInfo {
            name: route.name.as_str().into(),
            protocol: route.protocol,
            idle,
            idle_warning: (route.keepalive == Keepalive::Extended).then_some(route.timeouts.idle).flatten(),
            half_closed: route.timeouts.half_closed,
            lifetime: route.timeouts.lifetime,
            kernel_timeouts: self.kernel_timeouts,
            drain_until: None,
        }
    }
}
