//! The owner of the workers: starts them, brings changes to them, asks them, and stops them.

mod asked;
mod listening;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt, io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Instant,
};

use proxy_core::config::Engine;
use rustix::{
    event::{EventfdFlags, eventfd},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::sync::{mpsc, oneshot};

use super::{
    Change, Ended, Options, StreamCommand, StreamError, Streams, handed,
    handover::{self, HandoffEngine, SourcePorts},
    meter::{Meters, Reader, RouteMeter},
    ranges::{Group, Home},
    route::{Listen, Route},
    worker::{Applied, Command, Leaving, Shared, Worker},
};
use crate::{
    kernel::{
        grace::Grace,
        lookup::{Block, Lookup},
        memory,
        nft::TRANSPARENT_TABLE,
        return_path::{self, ReturnPath, SetUp},
        routing::Policy,
        sockmap::Sockmap,
    },
    tls::Watch,
};

/// Listen addresses and ports of all routes together, at most: each costs a descriptor and an epoll entry per worker.
pub const MAX_PORTS: usize = 16_384;
/// Descriptors kept for everything that is not a relayed connection.
const RESERVED: u64 = 512;
/// Of the rest, one in so many may be for pipes.
const PIPE_SHARE: u64 = 8;
/// Sockets that one worker joins at most; its maps are some 3 MB.
const JOINED: u32 = 16_384;
/// Pipes per worker at most.
const MAX_PIPES: u64 = 4096;

/// The running stream path.
#[derive(Debug)]
pub struct StreamPath {
    pub commands: mpsc::Sender<StreamCommand>,
    pub reader: Reader,
    workers: Vec<Handle>,
    /// Descriptors for listeners and for both ends of connections.
    for_sockets: u64,
    /// Also those that are gone and not forgotten: one that comes back goes on counting where it was.
    routes: HashMap<u32, Arc<Route>>,
    listens: BTreeMap<SocketAddr, Vec<u32>>,
    serving: Serving,
    /// `None`: not needed yet.
    lookup: Option<Result<Lookup, ()>>,
    certificates: Watch,
    lock_tables: bool,
    /// The workers have what sockets are joined with, or it could not be had.
    joins: bool,
    /// Workers that have yet to serve the last change.
    settling: Vec<oneshot::Receiver<()>>,
    /// Of what was handed over; `None`: nothing is.
    owner: Option<handed::Owner>,
    handing: Handing,
    /// From the first route with `source_address = "client"` on: what looks after its way back.
    return_path: Option<AbortOnDrop>,
}

/// The sockets that there are.
#[derive(Debug, Default)]
struct Serving {
    own: BTreeSet<SocketAddr>,
    groups: BTreeMap<Group, Home>,
    /// What leads to the groups.
    blocks: BTreeMap<Block, u32>,
}

#[derive(Debug)]
struct Handle {
    link: Link,
    thread: JoinHandle<()>,
}

/// How a worker is spoken to.
#[derive(Debug, Clone)]
struct Link {
    commands: std::sync::mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
}

impl Link {
    fn send(&self, command: Command) {
        // A failed send means that the worker has ended.
        if self.commands.send(command).is_ok() {
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// What the owner of handed-over connections is made of, at start or when it is needed first.
struct Handing {
    begin: handed::Begin,
    unrouted: Arc<Meters>,
    drained: mpsc::Sender<u32>,
    ended: mpsc::Sender<Vec<Ended>>,
    gauge: Arc<handed::Gauge>,
    /// For who asks, once there is one.
    commands: Arc<OnceLock<mpsc::UnboundedSender<handed::Command>>>,
}

/// A change whose sockets are bound.
#[derive(Debug)]
pub struct Prepared {
    routes: Vec<Arc<Route>>,
    gone: Vec<u32>,
    listening: Option<Listening>,
    return_path: Option<SetUp>,
    /// One for each worker, when they are needed first.
    maps: Vec<Sockmap>,
    /// When connections are to be handed over first.
    handoff: Option<BroughtUp>,
}

/// What connections are handed over with, for a change that may still fail: unless it is kept nothing of it is left.
#[derive(Debug)]
struct BroughtUp(Option<(handed::Begun, handed::Owner, HandoffEngine)>);

impl BroughtUp {
    fn keep(mut self) -> Option<(handed::Owner, HandoffEngine)> {
        let (begun, owner, engine) = self.0.take()?;
        begun.keep();
        Some((owner, engine))
    }
}

impl Drop for BroughtUp {
    fn drop(&mut self) {
        if let Some((begun, owner, engine)) = self.0.take() {
            drop(engine);
            // Its thread uses the table.
            owner.stop();
            drop(begun);
        }
    }
}

/// The listen addresses after a change, and what has to be done for it.
#[derive(Debug)]
struct Listening {
    listens: BTreeMap<SocketAddr, Vec<u32>>,
    serving: Serving,
    sockets: Vec<(SocketAddr, Sockets)>,
}

#[derive(Debug)]
enum Sockets {
    /// One for each worker.
    Open(Vec<OwnedFd>, Arc<Listen>),
    /// … for many ports, bound elsewhere.
    OpenGroup(Vec<OwnedFd>, Arc<Listen>),
    Update(Arc<Listen>),
    Close,
}

impl StreamPath {
    /// Starts the workers, inside a tokio runtime that answers [`StreamCommand`]s. Raises the limit on open files as far
    /// as it may.
    pub fn start(options: Options) -> Result<Self, StreamError> {
        let workers = options.workers.clamp(1, 255);
        let reader = Reader::default();
        let descriptors = raise_descriptors();
        let usable = descriptors.saturating_sub(RESERVED);
        let pipes = (usable / PIPE_SHARE / 2 / workers as u64).min(MAX_PIPES);
        let for_sockets = usable - pipes * 2 * workers as u64;
        reader.pressure.max.store(for_sockets / 2, Relaxed);
        let unrouted = Arc::new(Meters::new(0, "-", workers));
        reader.meters.put(Arc::clone(&unrouted));
        let handing = Handing {
            begin: options.begin_handoff,
            unrouted: Arc::clone(&unrouted),
            drained: options.drained.clone(),
            ended: options.ended.clone(),
            gauge: Arc::clone(&reader.handed),
            commands: Arc::default(),
        };
        let (owner, engine) = options.handoff.map(|store| handing.own(store)).transpose()?.unzip();
        let shared = Shared {
            open: Arc::new(AtomicU64::new(0)),
            pressure: Arc::clone(&reader.pressure),
            began: Instant::now(),
            failed_dials: options.failed_dials,
            drained: options.drained,
            ended: options.ended,
            handoff: engine,
            challenges: reader.acme.challenges.clone(),
        };
        let handles = (0..workers).map(|index| {
            let meter = Arc::clone(&unrouted.workers[index]);
            spawn(index as u8, shared.clone(), meter, pipes as usize)
        });
        let workers = handles.collect::<Result<Vec<Handle>, StreamError>>()?;
        let (commands, queue) = mpsc::channel(64);
        let links = workers.iter().map(|worker| worker.link.clone()).collect();
        owner.iter().for_each(|owner| handing.serve(owner));
        tokio::spawn(asked::answer(queue, links, Arc::clone(&handing.commands)));
        let certificates = Watch::start(reader.tls.clone());
        let certificates = certificates.map_err(|error| StreamError::Start { call: "clone", error })?;
        Ok(Self {
            commands,
            reader,
            workers,
            for_sockets,
            routes: HashMap::new(),
            listens: BTreeMap::new(),
            serving: Serving::default(),
            lookup: None,
            lock_tables: options.lock_tables,
            joins: false,
            owner,
            handing,
            settling: Vec::new(),
            return_path: None,
            certificates,
        })
    }

    /// To be told [`handed::Command::Adopt`] when every route of the configuration is served. `None`: nothing is handed over.
    pub fn adopter(&self) -> Option<mpsc::UnboundedSender<handed::Command>> {
        self.owner.as_ref().map(|owner| owner.commands.clone())
    }

    fn tell_owner(&self, command: handed::Command) {
        // A failed send means that it has ended.
        if let Some(owner) = &self.owner {
            let _ = owner.commands.send(command);
        }
    }

    /// The addresses whose routes are the same as before while what tells them apart has changed.
    fn told_apart_anew(&self, routes: &[Arc<Route>], asked: &[(SocketAddr, Vec<u32>)]) -> Vec<(SocketAddr, Vec<u32>)> {
        let differs = |route: &&Arc<Route>| {
            self.routes.get(&route.id).is_some_and(|before| !Arc::ptr_eq(&before.config, &route.config))
        };
        let changed: HashSet<u32> = routes.iter().filter(differs).map(|route| route.id).collect();
        if changed.is_empty() {
            return Vec::new();
        }
        let named: HashSet<SocketAddr> = asked.iter().map(|(address, _)| *address).collect();
        let affected = |(address, members): &(&SocketAddr, &Vec<u32>)| {
            !named.contains(address) && members.iter().any(|id| changed.contains(id))
        };
        self.listens.iter().filter(affected).map(|(address, members)| (*address, members.clone())).collect()
    }

    /// What the listeners take is not there for connections.
    fn share_descriptors(&self) {
        let listeners = ((self.serving.own.len() + self.serving.groups.len()) * self.workers.len()) as u64;
        self.reader.pressure.max.store(self.for_sockets.saturating_sub(listeners) / 2, Relaxed);
    }
}

/// Maps for each worker, or for none: where they cannot be had, splice and copy serve.
fn maps(workers: usize) -> Vec<Sockmap> {
    let loaded: Result<Vec<Sockmap>, _> = (0..workers).map(|_| Sockmap::load(JOINED)).collect();
    // The loader has read what the kernel says of its types, megabytes.
    memory::give_back();
    loaded.unwrap_or_else(|error| {
        tracing::warn!(%error, "no sockets can be joined: splice and copy serve instead");
        Vec::new()
    })
}

impl Streams for StreamPath {
    type Prepared = Prepared;

    fn prepare(&mut self, change: Change) -> Result<Prepared, StreamError> {
        let count = self.workers.len();
        let route = |spec: super::RouteSpec| {
            let (before, name) = (self.routes.get(&spec.id).map(Arc::clone), spec.plan.route.name.to_string());
            let made = Route::new(spec, before.as_deref(), count);
            made.map(Arc::new).map_err(|error| StreamError::Tls { route: name, error })
        };
        let routes: Vec<Arc<Route>> = change.routes.into_iter().map(route).collect::<Result<_, _>>()?;
        let fresh: HashMap<u32, &Arc<Route>> = routes.iter().map(|route| (route.id, route)).collect();
        let mut asked = change.ports;
        asked.extend(self.told_apart_anew(&routes, &asked));
        let listening = if asked.is_empty() { None } else { Some(self.listen(asked, &fresh)?) };
        let transparent = self.return_path.is_none() && routes.iter().any(|route| route.is_transparent());
        let return_path = transparent.then(|| ReturnPath::set_up(self.lock_tables)).transpose()?;
        let joins = !self.joins && routes.iter().any(|route| route.engine == Engine::Sockmap);
        let maps = if joins { maps(count) } else { Vec::new() };
        let hands_over = self.owner.is_none() && routes.iter().any(|route| route.engine == Engine::Handoff);
        let handoff = hands_over.then(|| self.handing.begin()).transpose()?;
        Ok(Prepared { routes, gone: change.gone, listening, return_path, maps, handoff })
    }

    fn commit(&mut self, prepared: Prepared) {
        let Prepared { routes, gone, listening, return_path: made, maps, handoff } = prepared;
        let owned = handoff.and_then(BroughtUp::keep);
        let begins = owned.is_some();
        if let Some((owner, engine)) = owned {
            self.handing.serve(&owner);
            self.owner = Some(owner);
            // Before the routes that need it.
            self.workers.iter().for_each(|worker| worker.link.send(Command::HandOver(Box::new(engine.clone()))));
            tracing::info!("connections can be handed over from now on");
        }
        for (worker, map) in self.workers.iter().zip(maps) {
            self.joins = true;
            worker.link.send(Command::Join(Box::new(map)));
        }
        if let Some(path) = made.and_then(SetUp::keep) {
            let Policy { priority, table, .. } = return_path::POLICY;
            tracing::info!(
                priority,
                table,
                "table inet {TRANSPARENT_TABLE}, a routing rule and a route lead what backends answer to clients here"
            );
            self.return_path = Some(AbortOnDrop(tokio::spawn(path.watch())));
        }
        let mut changes: Vec<Applied> = self.workers.iter().map(|_| Applied::default()).collect();
        for route in &routes {
            self.reader.meters.put(Arc::clone(&route.meters));
            self.reader.tls.put(route.id, route.tls.clone());
            changes.iter_mut().for_each(|change| change.routes.push(Arc::clone(route)));
        }
        if let Some(listening) = listening {
            self.begin_listening(listening, &mut changes);
        }
        self.share_descriptors();
        for id in gone {
            let leaving = Leaving::new(self.workers.len() + usize::from(self.owner.is_some()));
            self.reader.tls.put(id, None);
            changes.iter_mut().for_each(|change| change.gone.push((id, leaving.clone())));
            self.tell_owner(handed::Command::Gone(id, leaving));
        }
        self.tell_owner(handed::Command::Routes(routes.clone()));
        self.routes.extend(routes.into_iter().map(|route| (route.id, route)));
        if begins {
            // It has heard of no route before; and a start at which it could not be brought up may have left something to adopt.
            self.tell_owner(handed::Command::Routes(self.routes.values().cloned().collect()));
            self.tell_owner(handed::Command::Adopt);
        }
        self.settling.clear();
        for (worker, change) in self.workers.iter().zip(changes) {
            let (done, serves) = oneshot::channel();
            worker.link.send(Command::Apply(change, done));
            self.settling.push(serves);
        }
    }

    async fn settled(&mut self) {
        for serves in self.settling.drain(..) {
            // A worker that has ended serves nothing.
            let _ = serves.await;
        }
    }

    fn look_at_certificates(&mut self) {
        self.certificates.look();
    }

    fn forget(&mut self, id: u32) {
        self.routes.remove(&id);
        self.reader.meters.remove(id);
    }

    async fn stop(self) {
        let owner = self.owner;
        let threads: Vec<JoinHandle<()>> = self
            .workers
            .into_iter()
            .map(|worker| {
                worker.link.send(Command::Stop);
                worker.thread
            })
            .collect();
        let joined = tokio::task::spawn_blocking(move || {
            for thread in threads {
                // One that panicked has ended the process.
                let _ = thread.join();
            }
            // They may have handed something over with their last breath.
            owner.into_iter().for_each(handed::Owner::stop);
        });
        let _ = joined.await;
    }
}

/// A task that ends with its owner.
#[derive(Debug)]
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Handing {
    /// Starts the owner. The ports of what an earlier daemon has left are taken before anybody dials.
    fn own(&self, store: handed::Store) -> Result<(handed::Owner, HandoffEngine), StreamError> {
        let failed = |error| StreamError::Start { call: "clone", error };
        let ports = SourcePorts::default();
        let (sender, receiver) = handover::channel();
        let options = handed::Options {
            remnants: handed::Remnants::collect(&*store.table, &ports),
            store: Arc::clone(&store.table),
            handed: receiver,
            unrouted: Arc::clone(&self.unrouted),
            drained: self.drained.clone(),
            ended: self.ended.clone(),
            gauge: Arc::clone(&self.gauge),
        };
        let grace = Grace::start().map_err(failed)?;
        let engine =
            HandoffEngine { store: store.table, owner: sender, ports, grace, on: store.on, when: handover::when() };
        Ok((handed::Owner::spawn(options).map_err(failed)?, engine))
    }

    /// For a change that needs it first.
    fn begin(&self) -> Result<BroughtUp, StreamError> {
        let begun = (self.begin)()?;
        let (owner, engine) = self.own(begun.store.clone())?;
        Ok(BroughtUp(Some((begun, owner, engine))))
    }

    fn serve(&self, owner: &handed::Owner) {
        // There is one at most.
        let _ = self.commands.set(owner.commands.clone());
    }
}

impl fmt::Debug for Handing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handing").finish_non_exhaustive()
    }
}

fn spawn(index: u8, shared: Shared, unrouted: Arc<RouteMeter>, pipes: usize) -> Result<Handle, StreamError> {
    let failed = |call| move |error| StreamError::Start { call, error };
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let wake = Arc::new(wake.map_err(io::Error::from).map_err(failed("eventfd2"))?);
    let (commands, queue) = std::sync::mpsc::channel();
    let worker =
        Worker::new(index, shared, Arc::clone(&wake), queue, unrouted, pipes).map_err(failed("epoll_create1"))?;
    let thread = std::thread::Builder::new().name(format!("stream-{index}"));
    let run = move || {
        let _guard = Vital;
        worker.run();
    };
    let thread = thread.spawn(run).map_err(failed("clone"))?;
    Ok(Handle { link: Link { commands, wake }, thread })
}

/// A daemon without one of its workers would go on with a part of its connections lost and nobody told: it ends, and is
/// started again by who started it.
struct Vital;

impl Drop for Vital {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a worker of the stream path has panicked: a defect in shunt");
            std::process::abort();
        }
    }
}

/// The limit on open files of this process, raised to what is allowed; more than that where the privilege is there.
fn raise_descriptors() -> u64 {
    const WANTED: u64 = 1 << 20;
    let now = getrlimit(Resource::Nofile);
    let (current, hard) = (now.current.unwrap_or(WANTED), now.maximum.unwrap_or(WANTED));
    let raised = |to: u64, maximum: u64| {
        setrlimit(Resource::Nofile, Rlimit { current: Some(to), maximum: Some(maximum) }).is_ok().then_some(to)
    };
    if current >= WANTED {
        return current;
    }
    // Beyond the hard limit needs CAP_SYS_RESOURCE, and fs.nr_open to allow it.
    let beyond = if hard < WANTED { raised(WANTED, WANTED) } else { raised(WANTED, hard) };
    beyond.or_else(|| raised(hard, hard)).unwrap_or(current)
}
