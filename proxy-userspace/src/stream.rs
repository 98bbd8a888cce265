//! The stream path: connections that the daemon itself accepts, classifies, dials and relays (engines `copy` and `splice`).
//!
//! One worker thread per core owns its connections whole: their sockets, buffers, timers and counters. Nothing on the way
//! of a byte is shared between workers. What others see of them are counters ([`meter`]) and answers to commands
//! ([`Streams`] changes, [`StreamCommand`] asks).

mod admission;
pub mod ended;
mod flow;
pub mod handed;
pub mod handover;
pub mod memory;
pub mod meter;
mod path;
mod poll;
mod ranges;
pub mod rates;
mod relay;
mod route;
mod socket;
mod worker;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use proxy_core::{plan::RoutePlan, ruleset::Endpoint, view};
use tokio::sync::mpsc;

pub use ended::{Ended, StreamId};
pub use path::{MAX_PORTS, StreamPath};
pub use relay::sockmap::trust_in_sockmap;

use crate::{
    control::{ConnectionFilter, Reply},
    kernel::{
        bpf::{BpfError, handoff::HandoffError},
        interfaces::InterfaceError,
        return_path::ReturnPathError,
    },
    tls::TlsError,
    track::FailedDial,
};

/// What the owner of the routes asks of the stream path: make it so, or leave everything as it is.
pub trait Streams {
    /// A change whose sockets are bound but not yet accepted from; dropping it takes it back.
    type Prepared;

    /// Everything that can fail: binds the listen addresses that are new. Nothing that runs is touched.
    fn prepare(&mut self, change: Change) -> Result<Self::Prepared, StreamError>;

    /// Serves the change. Connections of routes that stay are not touched; they keep the backend they have and take the
    /// timeouts of the new settings.
    fn commit(&mut self, prepared: Self::Prepared);

    /// Resolves when every worker serves what was committed last: who is told so finds nobody at an address that is gone.
    fn settled(&mut self) -> impl Future<Output = ()> + Send;

    /// Looks at the certificates of every route now.
    fn look_at_certificates(&mut self);

    /// The owner of the routes has forgotten a route that was gone: so are its counters.
    fn forget(&mut self, id: u32);

    /// Accepts what waits, then stops listening everywhere and lets every route drain for its own `timeouts.drain`.
    /// Resolves when no connection is left.
    fn stop(self) -> impl Future<Output = ()> + Send;
}

/// Routes and listen addresses that change; what is not named stays.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// Added, or replaced: also when only the state of the backends has changed.
    pub routes: Vec<RouteSpec>,
    /// By id: no listen address leads there any more. What it has open is ended when its `timeouts.drain` has passed;
    /// [`Options::drained`] is told when nothing is left.
    pub gone: Vec<u32>,
    /// The routes that share an address and port, in file order, after the change; empty: nobody listens there any more.
    pub ports: Vec<(SocketAddr, Vec<u32>)>,
}

/// A route as the stream path serves it.
#[derive(Debug, Clone)]
pub struct RouteSpec {
    /// The id it has in `reconcile`; not 0.
    pub id: u32,
    pub plan: Arc<RoutePlan>,
    /// Every address of every backend.
    pub endpoints: Vec<Endpoint>,
    /// Names of backends, by the addresses they have; needed where `backend_tls` checks them.
    pub names: Vec<(IpAddr, String)>,
}

/// How the stream path is set up.
pub struct Options {
    /// One per core is best.
    pub workers: usize,
    /// Told of dials that came to nothing; dropped when the hearer is behind.
    pub failed_dials: mpsc::Sender<FailedDial>,
    /// Told the id of a route that is gone when its last connection has ended.
    pub drained: mpsc::Sender<u32>,
    /// What it puts into nftables is for this process alone to change.
    pub lock_tables: bool,
    /// Told of connections that have ended, in batches.
    pub ended: mpsc::Sender<Vec<Ended>>,
    /// Where connections are handed over to; `None`: all of them stay in the daemon, until a route needs it.
    pub handoff: Option<handed::Store>,
    /// … and how it is brought up then.
    pub begin_handoff: handed::Begin,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("stream::Options").field("workers", &self.workers).finish_non_exhaustive()
    }
}

/// What asks for connections.
#[derive(Debug)]
pub enum StreamCommand {
    Connections {
        filter: ConnectionFilter,
        reply: Reply<Vec<view::Connection>>,
    },
    Kill {
        id: StreamId,
        reply: Reply<view::Killed>,
    },
    /// Has the counters of what was handed over read, unless that was done a moment ago.
    Refresh {
        reply: Reply<()>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("cannot listen on {address} (route \"{route}\"): {error}")]
    Listen { address: SocketAddr, route: String, error: io::Error },
    #[error("route \"{route}\": {error}")]
    Tls { route: String, error: TlsError },
    #[error(
        "route \"{route}\" listens on {ports} ports; the stream path serves at most {max} in all where each has its own socket"
    )]
    TooManyPorts { route: String, ports: usize, max: usize },
    #[error("cannot start the stream path: {call}: {error}")]
    Start { call: &'static str, error: io::Error },
    #[error("a range of ports cannot be led to its sockets: {0}")]
    Lookup(#[source] BpfError),
    #[error(transparent)]
    ReturnPath(#[from] ReturnPathError),
    #[error("connections cannot be handed over: {0}")]
    Handoff(#[from] HandoffError),
    #[error("connections cannot be handed over: {0}")]
    Interfaces(#[from] InterfaceError),
}

impl StreamError {
    /// What connections are handed over with could not be had.
    pub fn is_of_handoff(&self) -> bool {
        matches!(self, Self::Handoff(_) | Self::Interfaces(_))
    }

    /// One line of how to mend it.
    pub fn mend(&self) -> Option<String> {
        match self {
            Self::Listen { error, address, .. } => Some(match error.kind() {
                io::ErrorKind::AddrInUse => format!("`ss -ltnp 'sport = :{}'` shows who listens there", address.port()),
                io::ErrorKind::PermissionDenied => {
                    "ports below 1024 need CAP_NET_BIND_SERVICE: AmbientCapabilities=CAP_NET_ADMIN CAP_NET_BIND_SERVICE"
                        .into()
                }
                _ => return None,
            }),
            Self::TooManyPorts { .. } => {
                Some(
                    "give the daemon CAP_BPF, with which a range takes one socket (Linux 5.9); or listen on fewer ports; or let \
                     the kernel forward the range (engine = \"nft\")"
                        .into(),
                )
            }
            Self::Tls { error, .. } => Some(error.mend()),
            Self::Lookup(error) => Some(error.mend().into()),
            Self::Start { .. } | Self::Interfaces(_) => None,
            Self::ReturnPath(error) => error.mend(),
            Self::Handoff(error) => Some(error.mend().into()),
        }
    }

    /// The exit code of a daemon that ends with it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Listen { error, .. } if error.kind() == io::ErrorKind::PermissionDenied => 4,
            Self::Listen { .. }
            | Self::Tls { .. }
            | Self::TooManyPorts { .. }
            | Self::Lookup(_)
            | Self::Start { .. } => 1,
            Self::Interfaces(_) => 1,
            Self::ReturnPath(error) => error.exit_code(),
            Self::Handoff(_) => 4,
        }
    }
}

/// How long a stopping daemon waits beyond the longest `timeouts.drain`.
pub const STOP_GRACE: Duration = Duration::from_secs(1);
