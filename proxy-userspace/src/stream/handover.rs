//! Connections that leave the stream path for the packet level: what goes with one, and to whom.
//!
//! A worker commits a handover only when it holds a place in the channel, so a connection whose sockets have vanished always
//! has an owner. While the channel is full connections go on being relayed, and are tried again.

mod paths;
mod ports;

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_core::{
    handoff::{Handover, When},
    reason::Reason,
    session::{Limits, Tick},
};
use tokio::sync::mpsc;

pub use self::paths::{OnInterfaces, Paths};
pub use self::ports::{RESERVED, SourcePort, SourcePorts};
use super::{
    StreamId,
    meter::{Meters, RouteMeter},
};
pub use super::{admission::Seat, flow::Counted};
use crate::kernel::{
    bpf::handoff::{Gate, HandoffStore},
    grace::{Grace, Ticket},
};

/// Connections that may wait for their owner.
pub const WAITING: usize = 4096;

/// Where workers send what they have handed over, and where its owner receives it.
pub fn channel() -> (mpsc::Sender<HandedOver>, mpsc::Receiver<HandedOver>) {
    mpsc::channel(WAITING)
}

/// What workers hand over with. Cheap to clone.
#[derive(Clone)]
pub struct HandoffEngine {
    pub store: Arc<dyn HandoffStore>,
    pub owner: mpsc::Sender<HandedOver>,
    pub ports: SourcePorts,
    pub grace: Arc<Grace>,
    pub on: Option<OnInterfaces>,
    pub when: When,
}

/// When a connection is handed over: docs/handoff.md has the reasons.
pub const WHEN: When = When { bytes: 256 << 10, age: Duration::from_millis(100) };

/// [`WHEN`], or what a measurement asks for: `SHUNT_MEASURE_HANDOVER="MILLISECONDS BYTES"`.
pub fn when() -> When {
    let asked = std::env::var("SHUNT_MEASURE_HANDOVER").ok();
    let asked = asked.as_deref().and_then(|asked| asked.split_once(' '));
    let asked = asked.and_then(|(age, bytes)| Some((age.parse().ok()?, bytes.parse().ok()?)));
    let Some((age, bytes)) = asked else { return WHEN };
    tracing::warn!(age, bytes, "connections are handed over when a measurement wants it");
    When { bytes, age: Duration::from_millis(age) }
}

impl HandoffEngine {
    /// For one worker. Sockets of its own: opened with the engine, so that what a daemon holds does not depend on what has happened.
    pub fn paths(&self) -> Option<Paths> {
        self.on.clone().and_then(Paths::open)
    }
}

impl fmt::Debug for HandoffEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandoffEngine").field("used", &self.store.used()).finish_non_exhaustive()
    }
}

/// A relayed connection that is to be handed over: how far it is, and what it holds for it.
#[derive(Debug)]
pub struct Handing {
    pub protocol: Handover,
    /// When the backend answered.
    pub connected: Tick,
    pub port: Option<SourcePort>,
    /// Segments that came out of order to client's and backend's socket when last it was sure that none is out of order any more.
    pub in_order: [u32; 2],
    pub stage: Stage,
}

/// What there is of it outside its sockets.
#[derive(Debug, Default)]
pub enum Stage {
    #[default]
    Relayed,
    /// Its entries are in the table, the gate is closed.
    Armed(Armed),
    /// The gate is open.
    Committed(Committed),
}

impl Handing {
    pub fn gate(&self) -> Option<Gate> {
        match &self.stage {
            Stage::Relayed => None,
            Stage::Armed(armed) => Some(armed.gate),
            Stage::Committed(committed) => Some(committed.armed.gate),
        }
    }

    pub fn committed(&mut self) -> Option<&mut Committed> {
        match &mut self.stage {
            Stage::Relayed | Stage::Armed(_) => None,
            Stage::Committed(committed) => Some(committed),
        }
    }

    pub fn is_committed(&self) -> bool {
        matches!(self.stage, Stage::Committed(_))
    }
}

/// Everything that a commit needs of others: from here on it cannot fail.
#[derive(Debug)]
pub struct Armed {
    pub gate: Gate,
    pub ends: Ends,
    /// Its place with the owner.
    pub place: mpsc::OwnedPermit<HandedOver>,
}

#[derive(Debug)]
pub struct Committed {
    pub armed: Armed,
    /// Payload relayed before: up, down.
    pub relayed: [u64; 2],
    /// The next byte that our sockets to client and backend would write.
    pub written: [u32; 2],
    /// No packet is for the sockets any more since it was taken.
    pub ticket: Option<Ticket>,
    pub look_at: Tick,
    /// Until then; the next wait is longer.
    pub patience: Duration,
    /// It was to end meanwhile.
    pub cut: Option<Reason>,
}

/// A connection whose two ends talk to each other through the eBPF program: it has no socket and no descriptor here any
/// more. Whoever receives it owns its entries and its end, and tells of it as of a relayed connection.
///
/// The worker has taken it out of its own counters: `active` of the engine it came from, the connections of the route at that
/// worker, the descriptors in use. The owner adds it to [`HandedOver::meter`]: `promoted` and `active`, then bytes and the
/// end. A route that is gone may have its id given again when neither worker nor owner has a connection of it left.
#[derive(Debug)]
pub struct HandedOver {
    /// The one it has had since it was accepted.
    pub id: StreamId,
    pub route_id: u32,
    pub route: Arc<str>,
    /// For tables and logs: as the PROXY header has it, where one was accepted.
    pub client: SocketAddr,
    pub ends: Ends,
    /// The gate that both of its entries have; it is open.
    pub gate: u32,
    /// Payload relayed from the client before the entries began to count (their first sequence numbers) …
    pub bytes_in: u64,
    /// … and from the backend. The whole is this and what the entries counted.
    pub bytes_out: u64,
    /// Payload relayed after that, up and down: the entries count it with the first packet that comes behind it.
    pub passed_on: [u64; 2],
    pub accepted: Instant,
    /// When bytes were last relayed.
    pub active: Instant,
    pub limits: Limits,
    /// It was to end while its sockets were vanishing: end it at once, for this reason.
    pub cut: Option<Reason>,
    /// All counters of its route.
    pub meters: Arc<Meters>,
    pub held: Held,
}

/// The addresses in the packets of a connection that is handed over; its two entries are keyed by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ends {
    /// Where the client's packets come from: the proxy before us, where there is one.
    pub client: SocketAddr,
    /// Where they go to.
    pub listen: SocketAddr,
    /// Our address and port towards the backend.
    pub source: SocketAddr,
    pub backend: SocketAddr,
}

/// What a connection holds as long as it lives. Dropped when it has ended; the port only after its linger time.
#[derive(Debug)]
pub struct Held {
    /// Its place under the route's limits.
    pub seat: Option<Seat>,
    /// One of its backend's connections.
    pub counted: Option<Counted>,
    pub port: SourcePort,
}

impl HandedOver {
    /// The owner's own counters of the route: nobody else writes them.
    pub fn meter(&self) -> Option<&Arc<RouteMeter>> {
        self.meters.of_owner()
    }

    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.accepted)
    }
}
