//! What the JSON API answers and the CLI shows: one set of names for every engine.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{config::Engine, reason::Reason};

/// Milliseconds as the views have them: three decimals, none of them noise.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

/// `GET /v1/status`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_seconds: f64,
    pub config_file: String,
    /// False until the first ruleset is in the kernel, and again while stopping.
    pub ready: bool,
    pub routes: usize,
    pub connections_active: u64,
    pub connections_total: u64,
    pub reconcile: ReconcileStatus,
    pub conntrack: ConntrackStatus,
    /// `None`: nothing can be handed over to the packet level here.
    pub handoff: Option<HandoffStatus>,
    pub reloads_ok: u64,
    pub reloads_failed: u64,
    /// The names whose certificates come from a CA, in their order.
    #[serde(default)]
    pub acme: Vec<AcmeCertificate>,
    /// Things an operator should know now, one sentence each; empty when all is well.
    pub warnings: Vec<String>,
}

/// A name whose certificate comes from the CA of `[acme]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AcmeCertificate {
    pub name: String,
    /// Seconds since the Unix epoch; `None`: none has been issued yet.
    pub expires: Option<i64>,
    /// Until the next order: the first, the renewal, or another attempt.
    pub next_order_seconds: i64,
    /// Why the last order failed, and how that is mended.
    pub problem: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReconcileStatus {
    pub ok: u64,
    pub failed: u64,
    /// Times somebody else changed shunt's table and it was repaired.
    pub drift: u64,
    /// Milliseconds from the end of parsing to applied, of the last change.
    pub last_apply_ms: f64,
    pub last_changes: usize,
    pub last_error: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConntrackStatus {
    pub entries: u64,
    pub max: u64,
    pub events: u64,
    pub events_lost: u64,
    pub dumps: u64,
    pub last_dump_ms: f64,
}

/// The table of the engine `handoff`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HandoffStatus {
    /// Living ones.
    pub connections: u64,
    /// Taken places in the table, those of ended connections that linger included.
    pub entries: u64,
    pub max: u64,
    /// Taken over from an earlier daemon.
    pub adopted: u64,
    /// Attempts to hand connections over: `done`, or what kept one in the daemon.
    pub results: BTreeMap<String, u64>,
}

/// One of `GET /v1/routes`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Route {
    pub name: String,
    pub protocol: String,
    pub listen: Vec<String>,
    pub engine: Engine,
    pub balance: String,
    /// `active`, or `draining` once the configuration no longer has it.
    pub state: RouteState,
    /// The mark of its connections in conntrack, end bits clear; 0 when the kernel has none of them.
    pub mark: u32,
    pub backends: Vec<Backend>,
    #[serde(flatten)]
    pub stats: RouteStats,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteState {
    Active,
    Draining,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Backend {
    /// As written in the configuration; the `backend` label.
    pub name: String,
    /// What it resolves to now.
    pub addresses: Vec<IpAddr>,
    pub weight: u16,
    /// Takes new connections.
    pub up: bool,
    pub admin: BackendAdmin,
    /// Why it is down, or the last failed check.
    pub reason: Option<String>,
    pub connections_active: u64,
}

/// What an operator set with `shunt backend`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendAdmin {
    #[default]
    Ready,
    /// No new connections; those it has go on.
    Drain,
    /// No new connections; UDP flows move to another backend at once.
    Down,
}

/// Counters of one route.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RouteStats {
    pub connections_active: u64,
    /// Every connection that came, also the refused ones.
    pub connections_total: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Of what the kernel forwards; a relayed stream has no packets.
    pub packets_in: u64,
    pub packets_out: u64,
    /// Per second, over the last reporting interval.
    pub connections_rate: f64,
    pub bytes_in_rate: f64,
    pub bytes_out_rate: f64,
    pub terminations: BTreeMap<Reason, u64>,
    /// Seconds since the oldest live connection that the kernel forwards began.
    pub oldest_seconds: f64,
}

/// One of `GET /v1/connections?route=&client=&limit=`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    pub id: String,
    pub route: String,
    pub engine: Engine,
    pub protocol: String,
    pub client: SocketAddr,
    /// What the client dialled.
    pub listen: SocketAddr,
    /// `None`: not chosen yet.
    pub backend: Option<SocketAddr>,
    /// `dialing`, `established`, `half_closed`, `closing`; where the daemon relays also what it does before it dials.
    pub state: String,
    pub age_seconds: f64,
    pub idle_seconds: f64,
    /// Seconds until a timeout of its present state ends it, if nothing comes.
    pub expires_seconds: Option<f64>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub packets_in: u64,
    pub packets_out: u64,
    /// False when the flow began before `nf_conntrack_acct` was on: its bytes are not known.
    pub metered: bool,
    /// On a route that hands connections over, while the daemon still has this one: why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_handed_over: Option<String>,
}

/// `POST /v1/reload`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reload {
    pub added: Vec<String>,
    pub changed: Vec<String>,
    pub removed: Vec<String>,
    pub unchanged: usize,
    pub apply_ms: f64,
    /// Messages in the batch.
    pub changes: usize,
}

/// `POST /v1/kill?id=`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Killed {
    pub id: String,
    pub route: String,
    pub client: SocketAddr,
}

/// `GET /v1/explain?what=`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explain {
    pub route: String,
    pub engine: Engine,
    /// Why this engine: one sentence.
    pub because: String,
    /// Engines ruled out, each with its reason.
    pub refused: Vec<Refused>,
    /// Where the bytes go, hop by hop, one line each.
    pub path: Vec<String>,
    /// Set when a connection was asked about.
    pub connection: Option<Connection>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub engine: Engine,
    pub reason: String,
}

/// Every failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong: one line, or one per problem of a configuration.
    pub error: String,
    /// How to mend it, one line.
    pub hint: Option<String>,
}
