//! What the table knows and counts per route.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use super::record::SpreadHash;
use crate::{config::Protocol, conntrack::Traffic, reason::Reason};

/// The routes the kernel forwards for, by id: replaces the one before. A route stays in it while it drains.
pub type RouteTable = HashMap<u32, Arc<RouteInfo>>;

/// What the table must know of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteInfo {
    pub name: Arc<str>,
    pub protocol: Protocol,
    /// Effective limits, keepalive applied. `None`: never.
    pub idle: Option<Duration>,
    /// A warning is due after so long without a byte.
    pub idle_warning: Option<Duration>,
    pub half_closed: Option<Duration>,
    pub lifetime: Option<Duration>,
    /// The kernel itself ends idle flows (`ct timeout`). When false the table does, as exactly as dumps allow.
    pub kernel_timeouts: bool,
    /// Set while the route drains: what is left is cut then. On the clock of [`super::Now::mono`].
    pub drain_until: Option<Duration>,
}

/// Upper bounds in seconds of [`AgeHistogram`].
pub const AGE_BUCKETS: [f64; 10] = [0.01, 0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 28800.0, 86400.0];

/// Ages at the end of the connections that ended; the last bucket is `+Inf`. Not cumulative.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AgeHistogram {
    pub counts: [u64; AGE_BUCKETS.len() + 1],
    pub sum_seconds: f64,
}

impl AgeHistogram {
    pub fn observe(&mut self, age: Duration) {
        let seconds = age.as_secs_f64();
        let bucket = AGE_BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(AGE_BUCKETS.len());
        self.counts[bucket] += 1;
        self.sum_seconds += seconds;
    }
}

/// What the records of one route add up to.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteTally {
    pub info: Arc<RouteInfo>,
    pub active: u64,
    /// Records ever: `active` plus [`Self::terminated_in_all`].
    pub seen: u64,
    /// Most of fifty thousand routes have none.
    pub(super) past: Option<Box<Past>>,
    /// Active connections by backend; no zeros.
    pub backends: HashMap<SocketAddr, u64>,
    /// All records, ended ones too, as of the last dump.
    pub traffic_in: Traffic,
    pub traffic_out: Traffic,
    /// Start of the oldest active connection, as of the last dump.
    pub oldest: Option<Duration>,
    pub(super) oldest_building: Option<Duration>,
    /// Changed since [`super::FlowTable::take_changed`].
    pub(super) changed: bool,
    /// Records, lingering ones too.
    pub(super) records: u64,
}

/// The connections of a route that have ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Past {
    /// Indexed by `Reason as usize`.
    terminations: [u64; Reason::ALL.len()],
    ages: AgeHistogram,
}

impl RouteTally {
    pub(super) fn new(info: Arc<RouteInfo>) -> Self {
        Self {
            info,
            active: 0,
            seen: 0,
            past: None,
            backends: HashMap::new(),
            traffic_in: Traffic::default(),
            traffic_out: Traffic::default(),
            oldest: None,
            oldest_building: None,
            changed: true,
            records: 0,
        }
    }

    pub fn terminated(&self, reason: Reason) -> u64 {
        self.past.as_ref().map_or(0, |past| past.terminations[reason as usize])
    }

    pub fn terminated_in_all(&self) -> u64 {
        self.past.as_ref().map_or(0, |past| past.terminations.iter().sum())
    }

    /// `None` as long as no connection has ended.
    pub fn ages(&self) -> Option<&AgeHistogram> {
        self.past.as_ref().map(|past| &past.ages)
    }

    pub(super) fn was(&mut self, age: Duration) {
        self.past.get_or_insert_default().ages.observe(age);
    }

    pub(super) fn began(&mut self, backend: SocketAddr) {
        self.seen += 1;
        self.active += 1;
        self.records += 1;
        *self.backends.entry(backend).or_default() += 1;
    }

    pub(super) fn ended(&mut self, backend: SocketAddr, reason: Reason) {
        self.active = self.active.saturating_sub(1);
        self.past.get_or_insert_default().terminations[reason as usize] += 1;
        if let Some(count) = self.backends.get_mut(&backend) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.backends.remove(&backend);
            }
        }
        if self.active == 0 {
            self.oldest = None;
        }
    }
}

pub(super) type Tallies = HashMap<u32, RouteTally, SpreadHash>;
