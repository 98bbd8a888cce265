//! The owner of the flow table: hears conntrack, counts, publishes, and ends flows on request.
//!
//! It lives on a thread of its own, so that a dump of a large table delays nobody else.

mod clock;
mod commands;
mod publish;
mod tracker;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use proxy_core::{
    config,
    conntrack::Traffic,
    flow::{MarkLayout, RouteInfo, RouteTable},
    reason::Reason,
};
use tokio::sync::{mpsc, watch};

pub use clock::Clock;

use crate::{
    access_log::AccessLog,
    control::{FlowCommand, FlowState},
    kernel::conntrack::{Conntrack, ConntrackError},
};

/// The daemon's [`Options::interval`].
pub const INTERVAL: Duration = Duration::from_secs(2);

/// How the tracker is set up.
#[derive(Debug)]
pub struct Options {
    pub layout: MarkLayout,
    /// From one dump to the next. Stretched so that dumps take at most a few percent of one core.
    pub interval: Duration,
    /// Records held at most; about 300 bytes each. `nf_conntrack_max` is enough for all that can exist.
    pub max_flows: usize,
    /// Shared with whoever fills [`proxy_core::flow::RouteInfo::drain_until`].
    pub clock: Clock,
    pub access_log: AccessLog,
    /// Told of TCP dials that came to nothing; dropped when the hearer is behind.
    pub failed_dials: mpsc::Sender<FailedDial>,
    /// Told the id of a draining route that has no active flow left.
    pub drained: mpsc::Sender<u32>,
}

/// A connection that its backend refused, or did not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedDial {
    pub route: Arc<str>,
    pub backend: SocketAddr,
}

/// What other owners tell the tracker.
#[derive(Debug)]
pub enum Input {
    /// The whole set of routes. To be sent before the ruleset can forward for a new one: flows of an unknown route are
    /// not counted. A draining route stays in it until reported as drained; one that is missing loses its flows.
    Routes(RouteTable),
    /// Routes to add or replace, under the same rules, and ids to forget.
    Change {
        routes: Vec<(u32, Arc<RouteInfo>)>,
        gone: Vec<u32>,
    },
    Counters(KernelCounters),
    DropUdp(DropUdp),
    /// The configuration's `log.access` has changed.
    AccessLog(config::AccessLog),
    Stop,
}

/// Totals as the ruleset's own counters have them, by route id; routes left out keep what they had.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelCounters {
    pub routes: HashMap<u32, RouteCounters>,
}

/// Ever since the route was made; only growing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteCounters {
    /// Every connection that came, also the refused ones.
    pub connections: u64,
    pub traffic_in: Traffic,
    pub traffic_out: Traffic,
    /// Refused before conntrack kept an entry.
    pub refused: Vec<(Reason, u64)>,
}

/// A UDP backend is gone: its flows must choose another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropUdp {
    pub route: u32,
    /// `None`: every port, where the backend keeps the port the client dialled.
    pub backends: Vec<(IpAddr, Option<u16>)>,
}

#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    #[error("cannot start the tracker's thread: {0}")]
    Thread(io::Error),
    #[error("cannot hear conntrack: {0}")]
    Conntrack(#[from] ConntrackError),
}

/// The running tracker.
#[derive(Debug)]
pub struct Tracker {
    pub commands: mpsc::Sender<FlowCommand>,
    pub inputs: mpsc::Sender<Input>,
    pub state: watch::Receiver<Arc<FlowState>>,
    thread: JoinHandle<()>,
}

impl Tracker {
    /// Starts the thread; `open` is called on it, inside its runtime, so the sockets belong to the network namespace of
    /// the caller. Blocks until the sockets are open.
    pub fn spawn<C: Conntrack>(
        options: Options,
        open: impl FnOnce() -> Result<C, ConntrackError> + Send + 'static,
    ) -> Result<Self, TrackError> {
        let (commands, command_queue) = mpsc::channel(64);
        let (inputs, input_queue) = mpsc::channel(64);
        let (publish, state) = watch::channel(Arc::default());
        let (opened, ready) = std::sync::mpsc::sync_channel(1);
        let run = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = opened.send(Err(TrackError::Thread(error)));
                    return;
                }
            };
            runtime.block_on(async move {
                match open() {
                    Ok(conntrack) => {
                        let _ = opened.send(Ok(()));
                        tracker::Task::new(options, conntrack, publish).run(command_queue, input_queue).await;
                    }
                    Err(error) => {
                        let _ = opened.send(Err(error.into()));
                    }
                }
            });
        };
        let thread = std::thread::Builder::new().name("track".into()).spawn(run).map_err(TrackError::Thread)?;
        match ready.recv() {
            Ok(result) => result?,
            Err(_) => return Err(TrackError::Thread(io::Error::other("it ended at once"))),
        }
        Ok(Self { commands, inputs, state, thread })
    }

    /// Writes what is still to be logged and ends the thread. Flows go on.
    pub async fn stop(self) {
        let Self { inputs, thread, .. } = self;
        // A failed send means that the thread has ended already.
        let _ = inputs.send(Input::Stop).await;
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
}
