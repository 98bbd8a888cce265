//! What the owner knows: its flows by their place in the packet level, and its routes.

use std::{collections::HashMap, sync::Arc};

use proxy_core::{
    config::Engine,
    handed::Handed,
    session::{Limits, Tick},
};

use super::probing::Asked;
use crate::{
    kernel::bpf::handoff::Gate,
    stream::{
        StreamId,
        handover::{Counted, Ends, Seat, SourcePort},
        meter::{ENGINES, EngineMeter, Meters},
        route::Route,
        worker::Leaving,
    },
};

/// A connection that has no socket.
#[derive(Debug)]
pub struct Flow {
    pub id: StreamId,
    pub route: u32,
    pub client: std::net::SocketAddr,
    pub ends: Ends,
    pub handed: Handed,
    /// When the last packet had come at the last look, and how it stood then: with the same again, nothing is new.
    pub stamp: (u64, u32),
    /// Client and backend.
    pub asked: [Asked; 2],
    pub meters: Arc<Meters>,
    /// Its place under the route's limits, and one of its backend's connections.
    #[expect(dead_code, reason = "held: given back when it is dropped")]
    pub held: (Option<Seat>, Option<Counted>),
    /// Until it has lingered. `None`: an earlier daemon's, from a range that is no longer reserved.
    pub port: Option<SourcePort>,
}

// A hundred thousand of them are ordinary.
const _: () = assert!(size_of::<Flow>() <= 448);

/// A route, as far as its handed-over flows go.
#[derive(Debug)]
pub struct Served {
    pub name: Arc<str>,
    pub limits: Limits,
    pub drain: std::time::Duration,
    pub open: usize,
    pub leaving: Option<Departure>,
    /// `None`: only known from a flow that came before it.
    pub route: Option<Arc<Route>>,
}

/// A route that is gone.
#[derive(Debug)]
pub struct Departure {
    /// What is left is cut then.
    pub until: Tick,
    /// `None`: of flows whose route nobody has configured any more.
    pub leaving: Option<Leaving>,
}

/// Flows that have ended: their entries still answer what is sent again, and their ports rest.
#[derive(Debug)]
pub struct Lingering {
    pub until: Tick,
    /// `None`: its entries are gone already.
    pub gate: Option<Gate>,
    #[expect(dead_code, reason = "held: it is given back when this is dropped")]
    pub port: Option<SourcePort>,
}

#[derive(Debug, Default)]
pub struct Flows {
    // Boxed, so that memory follows the number of flows: gates are given out up to the size of the map.
    by_gate: Vec<Option<Box<Flow>>>,
    by_id: HashMap<StreamId, Gate>,
}

impl Flow {
    /// Where its route's counters of this engine are.
    pub fn meter(&self) -> Option<&EngineMeter> {
        let slot = ENGINES.iter().position(|engine| *engine == Engine::Handoff)?;
        self.meters.of_owner()?.engines.get(slot)
    }
}

impl Flows {
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn insert(&mut self, gate: Gate, flow: Flow) {
        let index = gate.0 as usize;
        if index >= self.by_gate.len() {
            self.by_gate.resize_with(index + 1, || None);
        }
        self.by_id.insert(flow.id, gate);
        self.by_gate[index] = Some(Box::new(flow));
    }

    pub fn take(&mut self, gate: Gate) -> Option<Box<Flow>> {
        let flow = self.by_gate.get_mut(gate.0 as usize)?.take()?;
        self.by_id.remove(&flow.id);
        if self.by_id.is_empty() {
            *self = Self::default();
        }
        Some(flow)
    }

    pub fn get(&self, gate: Gate) -> Option<&Flow> {
        self.by_gate.get(gate.0 as usize)?.as_deref()
    }

    pub fn get_mut(&mut self, gate: Gate) -> Option<&mut Flow> {
        self.by_gate.get_mut(gate.0 as usize)?.as_deref_mut()
    }

    pub fn find(&self, id: StreamId) -> Option<Gate> {
        self.by_id.get(&id).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Gate, &Flow)> {
        self.by_gate.iter().enumerate().filter_map(|(index, flow)| Some((Gate(index as u32), flow.as_deref()?)))
    }

    pub fn gates(&self) -> Vec<Gate> {
        self.iter().map(|(gate, _)| gate).collect()
    }
}
