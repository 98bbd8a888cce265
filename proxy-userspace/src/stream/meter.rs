//! Counters of the stream path. Each worker writes its own set and nobody else's, so a count is a load and a store without
//! a locked bus; readers add the sets up.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use proxy_core::{
    config::Engine,
    flow::{AGE_BUCKETS, AgeHistogram},
    handoff::Failure,
    reason::Reason,
};

use super::handed::Gauge;
use crate::{acme, tls};

/// Upper bounds in seconds of `shunt_connect_seconds`.
pub const CONNECT_BUCKETS: [f64; 10] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0, 5.0, 30.0];

/// The engines that count here, in the order of their slots.
pub const ENGINES: [Engine; 4] = [Engine::Copy, Engine::Splice, Engine::Sockmap, Engine::Handoff];

/// A number that one thread writes and others read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// By the writer only.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// By the writer only.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How a TLS handshake ended, for `shunt_tls_handshakes_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shaken {
    Full,
    /// With a session of before: without certificates.
    Resumed,
    Timeout,
    /// The other side went away.
    Closed,
    /// The other side sent an alert, for instance because it does not trust the certificate.
    Alert,
    /// A client certificate is asked for, and none came.
    NoCertificate,
    BadCertificate,
    /// No version, cipher or protocol in common.
    Incompatible,
    /// What came was not TLS as it should be.
    Failed,
}

impl Shaken {
    pub const ALL: [Shaken; 9] = [
        Self::Full,
        Self::Resumed,
        Self::Timeout,
        Self::Closed,
        Self::Alert,
        Self::NoCertificate,
        Self::BadCertificate,
        Self::Incompatible,
        Self::Failed,
    ];

    /// The value of the `result` label: with a client, and with a backend.
    pub const fn labels(self) -> [&'static str; 2] {
        match self {
            Self::Full => ["full", "backend_full"],
            Self::Resumed => ["resumed", "backend_resumed"],
            Self::Timeout => ["timeout", "backend_timeout"],
            Self::Closed => ["closed", "backend_closed"],
            Self::Alert => ["alert", "backend_alert"],
            Self::NoCertificate => ["no_certificate", "backend_no_certificate"],
            Self::BadCertificate => ["bad_certificate", "backend_bad_certificate"],
            Self::Incompatible => ["incompatible", "backend_incompatible"],
            Self::Failed => ["failed", "backend_failed"],
        }
    }
}

/// TLS of one route: the client's side, and the backend's.
#[derive(Debug, Default)]
pub struct TlsMeter {
    /// Indexed by `Shaken as usize`.
    pub handshakes: [Counter; Shaken::ALL.len()],
    /// Streams that ended without `close_notify`.
    pub truncated: Counter,
}

/// What one worker has counted of one route.
#[derive(Debug, Default)]
pub struct RouteMeter {
    /// In the order of [`ENGINES`].
    pub engines: [EngineMeter; ENGINES.len()],
    /// Time from the first SYN to the connection, with all attempts; the last bucket is `+Inf`.
    pub connect: [Counter; CONNECT_BUCKETS.len() + 1],
    pub connect_micros: Counter,
    pub ages: [Counter; AGE_BUCKETS.len() + 1],
    pub age_micros: Counter,
    /// With the client, and with the backend.
    pub tls: [TlsMeter; 2],
    pub handed_over: Counter,
    /// Attempts that came to nothing, indexed by `Failure as usize`.
    pub not_handed_over: [Counter; Failure::ALL.len()],
}

/// … by one engine. A connection is begun in the engine it starts with, active in the one it has and ended in the one it
/// ends with, so that over all engines `began` is `active` plus all terminations.
#[derive(Debug, Default)]
pub struct EngineMeter {
    /// Every connection that came, also the refused ones.
    pub began: Counter,
    /// Connections moved to this engine while they live.
    pub promoted: Counter,
    pub active: Counter,
    pub bytes_in: Counter,
    pub bytes_out: Counter,
    /// Indexed by `Reason as usize`.
    pub terminations: [Counter; Reason::ALL.len()],
}

/// All workers' counters of one route.
#[derive(Debug)]
pub struct Meters {
    pub id: u32,
    pub name: Arc<str>,
    /// One per worker, and the last for the owner of what has been handed over.
    pub workers: Vec<Arc<RouteMeter>>,
    /// Open connections by backend, over all workers.
    pub backends: RwLock<Vec<(SocketAddr, Arc<AtomicU64>)>>,
}

/// What all workers have counted of one route by one engine.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineTotals {
    pub active: u64,
    /// Every connection that began with this engine, also the refused ones.
    pub total: u64,
    /// Connections that came to this engine from another while they live.
    pub promoted: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Zeros left out.
    pub terminations: Vec<(Reason, u64)>,
}

/// … of one route by all engines.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RouteTotals {
    pub engines: Vec<(Engine, EngineTotals)>,
    pub connect: [u64; CONNECT_BUCKETS.len() + 1],
    pub connect_seconds: f64,
    pub ages: AgeHistogram,
    pub backends: Vec<(SocketAddr, u64)>,
    /// By the `result` label; zeros left out.
    pub handshakes: Vec<(&'static str, u64)>,
    /// Streams that ended without `close_notify`: of clients, and of backends.
    pub truncated: [u64; 2],
    /// Connections that were handed over, and attempts that were not to be, by the `result` label; zeros left out.
    pub handovers: Vec<(&'static str, u64)>,
}

impl RouteMeter {
    pub fn connected(&self, took: Duration) {
        bucket(&self.connect, &CONNECT_BUCKETS, took).add(1);
        self.connect_micros.add(took.as_micros() as u64);
    }

    pub fn aged(&self, age: Duration) {
        bucket(&self.ages, &AGE_BUCKETS, age).add(1);
        self.age_micros.add(age.as_micros() as u64);
    }
}

fn bucket<'a>(counters: &'a [Counter], bounds: &[f64], value: Duration) -> &'a Counter {
    let seconds = value.as_secs_f64();
    &counters[bounds.iter().position(|bound| seconds <= *bound).unwrap_or(bounds.len())]
}

impl Meters {
    pub fn new(id: u32, name: &str, workers: usize) -> Self {
        let workers = (0..=workers).map(|_| Arc::new(RouteMeter::default())).collect();
        Self { id, name: name.into(), workers, backends: RwLock::default() }
    }

    /// Written by the owner of what has been handed over, and by nobody else.
    pub fn of_owner(&self) -> Option<&Arc<RouteMeter>> {
        self.workers.last()
    }

    /// Counted so far. Exact for each number; the numbers are not of one instant.
    pub fn totals(&self) -> RouteTotals {
        let sum = |of: &dyn Fn(&RouteMeter) -> u64| self.workers.iter().map(|w| of(w)).fold(0, u64::wrapping_add);
        let engine = |(slot, engine): (usize, &Engine)| {
            let of = |counter: &dyn Fn(&EngineMeter) -> u64| sum(&|w| counter(&w.engines[slot]));
            let count = |reason: &Reason| (*reason, of(&|e| e.terminations[*reason as usize].get()));
            let terminations: Vec<_> = Reason::ALL.iter().map(count).filter(|(_, n)| *n > 0).collect();
            let totals = EngineTotals {
                active: of(&|e| e.active.get()),
                total: of(&|e| e.began.get()),
                promoted: of(&|e| e.promoted.get()),
                bytes_in: of(&|e| e.bytes_in.get()),
                bytes_out: of(&|e| e.bytes_out.get()),
                terminations,
            };
            (*engine, totals)
        };
        let engines = ENGINES.iter().enumerate().map(engine).filter(|(_, t)| t.total + t.promoted > 0).collect();
        let backends = self.backends.read().map(|b| b.iter().map(|(a, n)| (*a, n.load(Relaxed))).collect());
        RouteTotals {
            engines,
            connect: std::array::from_fn(|i| sum(&|w| w.connect[i].get())),
            connect_seconds: sum(&|w| w.connect_micros.get()) as f64 / 1e6,
            ages: AgeHistogram {
                counts: std::array::from_fn(|i| sum(&|w| w.ages[i].get())),
                sum_seconds: sum(&|w| w.age_micros.get()) as f64 / 1e6,
            },
            backends: backends.unwrap_or_default(),
            handshakes: self.handshakes(),
            handovers: self.handovers(),
            truncated: std::array::from_fn(|side| sum(&|w| w.tls[side].truncated.get())),
        }
    }

    fn handovers(&self) -> Vec<(&'static str, u64)> {
        let sum = |of: &dyn Fn(&RouteMeter) -> u64| self.workers.iter().map(|w| of(w)).fold(0, u64::wrapping_add);
        let failed = Failure::ALL.iter().map(|why| (why.label(), sum(&|w| w.not_handed_over[*why as usize].get())));
        let done = std::iter::once(("done", sum(&|w| w.handed_over.get())));
        done.chain(failed).filter(|(_, n)| *n > 0).collect()
    }

    fn handshakes(&self) -> Vec<(&'static str, u64)> {
        let count = |side: usize, shaken: Shaken| {
            let of = |w: &Arc<RouteMeter>| w.tls[side].handshakes[shaken as usize].get();
            (shaken.labels()[side], self.workers.iter().map(of).fold(0, u64::wrapping_add))
        };
        let both = [0, 1].into_iter().flat_map(|side| Shaken::ALL.map(|shaken| count(side, shaken)));
        both.filter(|(_, n)| *n > 0).collect()
    }
}

/// Where readers find the counters of every route that is served or drains.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<RwLock<BTreeMap<u32, Arc<Meters>>>>);

impl Registry {
    /// By id.
    pub fn all(&self) -> Vec<Arc<Meters>> {
        self.0.read().map(|all| all.values().cloned().collect()).unwrap_or_default()
    }

    pub fn get(&self, id: u32) -> Option<Arc<Meters>> {
        self.0.read().ok()?.get(&id).cloned()
    }

    pub fn put(&self, meters: Arc<Meters>) {
        if let Ok(mut all) = self.0.write() {
            all.insert(meters.id, meters);
        }
    }

    pub fn remove(&self, id: u32) {
        if let Ok(mut all) = self.0.write() {
            all.remove(&id);
        }
    }
}

/// How near the stream path is to what its file descriptors allow.
#[derive(Debug, Default)]
pub struct Pressure {
    /// Connections open at most, computed from the limit on open files; 0 before the start.
    pub max: AtomicU64,
    /// Refused because of it, ever.
    pub refused: AtomicU64,
    /// Lines of the access log that its writer was too slow for.
    pub unlogged: AtomicU64,
    /// Joined connections that were ended because too much waited in the kernel: for one of them, and for all.
    pub overflowed: [AtomicU64; 2],
}

/// What others may read at any time. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Reader {
    pub meters: Registry,
    pub pressure: Arc<Pressure>,
    pub handed: Arc<Gauge>,
    pub tls: tls::Registry,
    pub acme: acme::Told,
}

impl Reader {
    /// Things an operator should know now, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let (max, refused) = (self.pressure.max.load(Relaxed), self.pressure.refused.load(Relaxed));
        let full = format!(
            "{refused} connections were refused: the limit on open files allows {max} relayed connections (LimitNOFILE= of \
             the service, or ulimit -n)"
        );
        let unlogged = self.pressure.unlogged.load(Relaxed);
        let slow = format!("{unlogged} lines of the access log were lost: its reader is too slow");
        (refused > 0)
            .then_some(full)
            .into_iter()
            .chain((unlogged > 0).then_some(slow))
            .chain(self.tls.warnings())
            .chain(self.acme.warnings())
            .collect()
    }
}
