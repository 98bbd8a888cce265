//! What an earlier daemon has left in the packet level: connections that live, and those it was about to hand over.

use std::sync::Arc;

use proxy_abi::handoff::{HandoffFlow, gate};
use proxy_core::{
    handed::{Handed, Record, route_hash},
    session::{Session, Tick},
};

use super::{
    clock::tick_of,
    ends::{ends_of, look},
    owner::{NO_ROUTE, Owner},
    probing::Asked,
    table::Flow,
};
use crate::{
    kernel::bpf::handoff::{Found, Gate, HandoffStore},
    stream::{
        StreamId,
        handover::{Ends, SourcePort, SourcePorts},
        meter::Meters,
        route::Route,
    },
};

/// Found at start; their source ports are taken from then on, before the first backend is dialled.
#[derive(Debug, Default)]
pub struct Remnants(Vec<Remnant>);

#[derive(Debug)]
struct Remnant {
    gate: Gate,
    flow: HandoffFlow,
    ends: Ends,
    record: Option<Record>,
    port: Option<SourcePort>,
}

impl Remnants {
    /// Before the workers are started. What ended and was told of is taken away.
    pub fn collect(store: &dyn HandoffStore, ports: &SourcePorts) -> Self {
        let mut remnants = Vec::new();
        for Found { gate, flow } in store.walk() {
            let record = Record::decode(&flow.owner);
            match ends_of(store, &flow.key) {
                Some(ends) if !flow.is_over() || record.is_some() => {
                    let port = ports.adopt(ends.backend, ends.source.port());
                    remnants.push(Remnant { gate, flow, ends, record, port });
                }
                Some(_) | None => drop(store.remove(gate)),
            }
        }
        Self(remnants)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Remnant {
    /// Its sockets vanished before the daemon did: nobody has noticed anything. Otherwise the kernel has closed them in the middle
    /// of it, and both ends are better told.
    fn lives_on(&self) -> bool {
        self.flow.gate == gate::ALONE
    }

    fn id(&self) -> StreamId {
        StreamId::from_bits(self.flow.id)
    }
}

impl Owner {
    /// Goes on with them, each in its route; those of routes that are not there any more are drained. How many were taken
    /// over, and how many were cut because they had been handed over only in part.
    pub fn adopt(&mut self, remnants: Remnants, unrouted: &Arc<Meters>) -> (usize, usize) {
        let (mut adopted, mut cut) = (0, 0);
        for remnant in remnants.0 {
            if remnant.lives_on() {
                self.take_over(remnant, unrouted);
                adopted += 1;
            } else {
                self.resets.send(&*self.store, &remnant.flow, &remnant.ends);
                self.store.remove(remnant.gate);
                cut += 1;
            }
        }
        (adopted, cut)
    }

    fn take_over(&mut self, remnant: Remnant, unrouted: &Arc<Meters>) {
        let seen = look(&remnant.flow);
        let now = self.clock.now();
        let (client, began, relayed) = match remnant.record {
            Some(record) => (record.client, Tick(record.began).min(now), record.relayed),
            None => (remnant.ends.client, tick_of(remnant.flow.ends[0].last_seen_ns).min(now), [0; 2]),
        };
        let session = Session::established(began, seen.last.max(began).min(now));
        let named = |route: &&Arc<Route>| {
            remnant.record.is_some_and(|record| route_hash(route.config.name.as_str()) == record.route)
        };
        let route = self.routes.values().filter_map(|served| served.route.as_ref()).find(named).cloned();
        if route.is_none() {
            self.no_route();
        }
        let id = route.as_ref().map_or(NO_ROUTE, |route| route.id);
        let Some(served) = self.routes.get_mut(&id) else { return };
        served.open += 1;
        let mut flow = Flow {
            id: remnant.id(),
            route: id,
            client,
            ends: remnant.ends,
            handed: Handed::new(session, relayed, [0; 2]),
            stamp: (0, 0),
            asked: [Asked::since(session.last_activity()); 2],
            meters: route.as_ref().map_or_else(|| Arc::clone(unrouted), |route| Arc::clone(&route.meters)),
            held: (
                route.as_ref().map(|route| route.seat_of(client.ip())),
                route.as_ref().and_then(|route| route.count(remnant.ends.backend)),
            ),
            port: remnant.port,
        };
        // What it carried before is in its own numbers, and in the counters of the daemon that is gone.
        let (_, action) = flow.handed.look(seen, &served.limits, now);
        if let Some(meter) = flow.meter() {
            meter.began.add(1);
            meter.active.add(1);
        }
        self.flows.insert(remnant.gate, flow);
        self.act(remnant.gate, action, true);
    }
}
