//! The owner of what has been handed over: connections that live in the packet level and have no socket here.
//!
//! It lives on a thread of its own. Nobody tells it of a byte: the program tells of ends, counters are read now and then, and a
//! timer wheel says when a connection might have been idle for too long. What limits and ends a connection is the session it
//! had as a relayed one; the flow stays one record with the id it has had since it was accepted.

mod adopt;
mod clock;
mod ends;
mod owner;
mod probing;
mod table;
mod task;

#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use proxy_core::view;
use tokio::sync::{mpsc, oneshot};

pub use adopt::Remnants;
pub use ends::{Resets, ends_of};

use super::{
    Ended, StreamError, StreamId,
    handover::{HandedOver, OnInterfaces},
    meter::Meters,
    route::Route,
    worker::Leaving,
};
use crate::{
    control::ConnectionFilter,
    kernel::{bpf::handoff::HandoffStore, conntrack::forget::Forgetter, segment::Sender},
};

/// What the owner is asked.
#[derive(Debug)]
pub enum Command {
    /// Routes that are served, new or changed.
    Routes(Vec<Arc<Route>>),
    /// A route that is gone: what it has is cut when its `timeouts.drain` has passed.
    Gone(u32, Leaving),
    /// Every route of the configuration has been told: what is left of an earlier daemon can be adopted.
    Adopt,
    /// Reads the counters, unless that was done a moment ago.
    Refresh(oneshot::Sender<()>),
    List(ConnectionFilter, oneshot::Sender<Vec<view::Connection>>),
    /// Answers `None` when there is no such connection.
    Kill(StreamId, oneshot::Sender<Option<(Arc<str>, SocketAddr)>>),
    /// The daemon goes, connections go on.
    Stop,
}

/// The table of handed-over flows, as it goes from who opened it to those who use it.
#[derive(Clone)]
pub struct Store {
    pub table: Arc<dyn HandoffStore>,
    /// Where its program is. `None`: a table without a kernel, for which every way is the same.
    pub on: Option<OnInterfaces>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("used", &self.table.used()).field("on", &self.on).finish()
    }
}

/// Brings the table up while the daemon runs, when a change needs it first.
pub type Begin = Box<dyn Fn() -> Result<Begun, StreamError> + Send>;

/// A table that was brought up for a change which may still fail: unless it is kept, it is taken away again.
pub struct Begun {
    pub store: Store,
    undo: Option<Box<dyn FnOnce() + Send>>,
}

impl Begun {
    pub fn new(store: Store, undo: impl FnOnce() + Send + 'static) -> Self {
        Self { store, undo: Some(Box::new(undo)) }
    }

    pub fn keep(mut self) {
        self.undo = None;
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            undo();
        }
    }
}

/// What the owner is given.
pub struct Options {
    pub store: Arc<dyn HandoffStore>,
    /// What workers hand over.
    pub handed: mpsc::Receiver<HandedOver>,
    /// Left by an earlier daemon.
    pub remnants: Remnants,
    /// Counts those of no route.
    pub unrouted: Arc<Meters>,
    pub drained: mpsc::Sender<u32>,
    pub ended: mpsc::Sender<Vec<Ended>>,
    pub gauge: Arc<Gauge>,
}

/// What others see of the owner at any time.
#[derive(Debug, Default)]
pub struct Gauge {
    /// Flows in the table, those that linger included, and how many there can be; 0 where nothing can be handed over.
    pub used: AtomicU64,
    pub max: AtomicU64,
    /// Living ones.
    pub open: AtomicU64,
    /// Taken over from an earlier daemon.
    pub adopted: AtomicU64,
    /// Lines of the access log that its writer was too slow for.
    pub unlogged: AtomicU64,
}

/// The running owner.
#[derive(Debug)]
pub struct Owner {
    pub commands: mpsc::UnboundedSender<Command>,
    gauge: Arc<Gauge>,
    thread: JoinHandle<()>,
}

impl Owner {
    /// Starts the thread, in the network namespace of the caller.
    pub fn spawn(options: Options) -> io::Result<Self> {
        let (commands, queue) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let resets = Resets::new(Sender::open());
        // Where conntrack does not answer nothing is tracked.
        let forgetter = Forgetter::open().ok();
        let gauge = Arc::clone(&options.gauge);
        let run = move || runtime.block_on(task::Task::new(options, resets, forgetter).run(queue));
        let thread = std::thread::Builder::new().name("handed".into()).spawn(run)?;
        Ok(Self { commands, gauge, thread })
    }

    /// Writes what is still to be told. Connections go on without the daemon.
    pub fn stop(self) {
        // A failed send means that the thread has ended.
        let _ = self.commands.send(Command::Stop);
        let _ = self.thread.join();
        // There is no table any more.
        self.gauge.max.store(0, Relaxed);
    }
}

impl Gauge {
    pub fn status(&self) -> Option<view::HandoffStatus> {
        let max = self.max.load(Relaxed);
        (max > 0).then(|| view::HandoffStatus {
            connections: self.open.load(Relaxed),
            entries: self.used.load(Relaxed),
            max,
            adopted: self.adopted.load(Relaxed),
            results: Default::default(),
        })
    }
}

impl fmt::Debug for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Begun").field("store", &self.store).finish_non_exhaustive()
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("handed::Options").finish_non_exhaustive()
    }
}
