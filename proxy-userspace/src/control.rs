//! How the rooms of the daemon talk to each other: command channels to the owner of a thing, snapshots from it.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

pub use proxy_core::flow::{AGE_BUCKETS, AgeHistogram};
use proxy_core::view;
use tokio::sync::{mpsc, oneshot, watch};

use crate::stream::{StreamCommand, meter::Reader, rates::Rates};

/// What the admin API and the CLI can reach. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Control {
    /// The owner of the routes and of the table.
    pub routes: mpsc::Sender<RouteCommand>,
    /// The owner of the flow table. `None`: the kernel forwards nothing.
    pub flows: Option<mpsc::Sender<FlowCommand>>,
    /// The stream path, for what the daemon relays.
    pub streams: mpsc::Sender<StreamCommand>,
    /// Its counters.
    pub relayed: Reader,
    /// How fast they grow.
    pub relayed_rates: watch::Receiver<Arc<Rates>>,
    /// Published by the owner of the routes after every change.
    pub route_state: watch::Receiver<Arc<RouteState>>,
    /// Published by the owner of the flow table once per reporting interval.
    pub flow_state: watch::Receiver<Arc<FlowState>>,
}

pub type Reply<T> = oneshot::Sender<Result<T, view::Failure>>;

#[derive(Debug)]
pub enum RouteCommand {
    /// Read the file again; all or nothing.
    Reload {
        reply: Reply<view::Reload>,
    },
    SetBackend {
        route: String,
        backend: String,
        admin: view::BackendAdmin,
        reply: Reply<view::Backend>,
    },
    /// `route`: its name. The connection, if any, is filled in by the asker.
    Explain {
        route: String,
        reply: Reply<view::Explain>,
    },
    /// The ruleset as the daemon believes it to be, as an nft script.
    Ruleset {
        reply: Reply<String>,
    },
}

#[derive(Debug)]
pub enum FlowCommand {
    /// Read afresh from the kernel.
    Connections {
        filter: ConnectionFilter,
        reply: Reply<Vec<view::Connection>>,
    },
    Kill {
        id: String,
        reply: Reply<view::Killed>,
    },
}

#[derive(Debug, Clone, Default)]
pub struct ConnectionFilter {
    pub route: Option<String>,
    pub client: Option<IpAddr>,
    pub id: Option<String>,
    /// `client:port`
    pub client_port: Option<u16>,
    /// At most so many; 0 = all.
    pub limit: usize,
}

/// Everything the owner of the routes knows that others show. `view::Route::stats` and
/// `view::Backend::connections_active` are zero here: [`FlowState`] has them, and the stream path's [`Reader`].
#[derive(Debug, Clone, Default)]
pub struct RouteState {
    pub ready: bool,
    pub config_file: String,
    pub routes: Vec<Arc<view::Route>>,
    pub reconcile: view::ReconcileStatus,
    pub reloads_ok: u64,
    pub reloads_failed: u64,
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Default)]
pub struct FlowState {
    /// By route name; a route that never had anything to count is absent.
    pub routes: HashMap<String, view::RouteStats>,
    /// By route name, then backend address and port.
    pub backends: HashMap<String, HashMap<std::net::SocketAddr, u64>>,
    /// Ages at the end of the connections that ended, seconds: bucket counts per route for
    /// `shunt_connection_age_seconds`, bounds in [`AGE_BUCKETS`], the last one is `+Inf`.
    pub ages: HashMap<String, AgeHistogram>,
    pub conntrack: view::ConntrackStatus,
    pub warnings: Vec<String>,
    /// Ids of the routes that have a connection, or of which something has changed lately.
    pub moving: Vec<u32>,
}
