//! What a valid configuration holds. Every value here has been parsed and is in range; `0` and absent limits are `None`.

use std::{fmt, net::IpAddr, num::NonZeroU32, path::PathBuf, sync::Arc, time::Duration};

use ipnet::IpNet;

use super::acme::Acme;

/// A whole, valid configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub admin: Admin,
    pub log: Log,
    pub kernel: Kernel,
    /// `None`: no section `[acme]`, and no route that needs one.
    pub acme: Option<Arc<Acme>>,
    /// In file order.
    pub routes: Vec<Arc<Route>>,
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// `None`: `"off"`.
    pub listen: Option<std::net::SocketAddr>,
    pub socket: PathBuf,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// A `tracing` filter directive, `info` by default.
    pub level: String,
    pub format: LogFormat,
    pub access: AccessLog,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Which ended connections get a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessLog {
    All,
    /// Those that did not end with `finished_*`.
    Errors,
    Off,
}

/// `[kernel]`: how shunt shares the kernel with others on the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// The bits of the conntrack mark that shunt may use: one contiguous run of 8 to 32 bits.
    pub mark_mask: MarkMask,
    /// Ask the kernel to refuse changes to shunt's table by others (v6.9+). `true` by default.
    pub lock_table: bool,
}

/// A contiguous run of at least 8 bits in a conntrack mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkMask(u32);

impl MarkMask {
    /// Bits 8–31: leaves the small numbers that other software likes to itself.
    pub const DEFAULT: MarkMask = MarkMask(0xffff_ff00);

    /// `None` unless `mask` is one contiguous run of 8 to 32 set bits.
    pub const fn new(mask: u32) -> Option<Self> {
        let run = if mask == 0 { 0 } else { mask >> mask.trailing_zeros() };
        if run.count_ones() >= 8 && (run as u64 + 1).is_power_of_two() { Some(Self(mask)) } else { None }
    }

    pub const fn bits(self) -> u32 {
        self.0
    }
}

/// One `[[route]]`, with `[defaults]` applied.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    pub name: RouteName,
    pub listen: Vec<Listen>,
    pub protocol: Protocol,
    pub matches: Match,
    pub backends: Vec<Backend>,
    pub balance: Balance,
    pub engine: EngineChoice,
    pub source_address: SourceAddress,
    pub allow: Vec<IpNet>,
    pub deny: Vec<IpNet>,
    pub keepalive: Keepalive,
    pub limits: Limits,
    pub timeouts: Timeouts,
    pub health: Option<Health>,
    pub tls: Option<Tls>,
    pub backend_tls: Option<BackendTls>,
    pub proxy_protocol: ProxyProtocol,
    /// Hash over all of the above and over the routes in `shares_port_with`. Equal in two configurations, and in two
    /// processes of one build, when nothing that concerns this route has changed.
    pub fingerprint: u64,
    /// … over all of the above alone: equal when the route itself is the same, whoever shares its ports.
    pub own_fingerprint: u64,
    /// Indices into [`Config::routes`], in file order, of the routes that claim a listen address, port and protocol of
    /// this one, or of another of them, itself included; empty when it has its ports to itself. They hold the same
    /// allocation: 50,000 names on port 443 are one list, not 50,000.
    pub shares_port_with: Arc<[usize]>,
}

/// `[a-z0-9-]{1,63}`
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteName(Arc<str>);

impl RouteName {
    /// `None` unless `name` is 1–63 of `a–z`, `0–9`, `-`.
    pub fn new(name: &str) -> Option<Self> {
        let valid = (1..=63).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        valid.then(|| Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RouteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a route listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Listen {
    /// `0.0.0.0` is every IPv4 address of this machine, `::` every IPv6 address (and no IPv4 one).
    pub address: IpAddr,
    pub ports: PortRange,
}

/// `first <= last`, both 1–65535.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    pub const fn is_single(self) -> bool {
        self.first == self.last
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// `match`: empty lists match everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Match {
    /// Lower-case; `*.example.com` matches one or more labels in front.
    pub sni: Vec<String>,
    pub alpn: Vec<String>,
    pub client: Vec<IpNet>,
}

impl Match {
    pub fn is_default(&self) -> bool {
        self.sni.is_empty() && self.alpn.is_empty() && self.client.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Backend {
    pub target: Target,
    /// 1–256; 1 by default. The share of new connections.
    pub weight: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// `None`: keep the port the client dialled.
    Address { ip: IpAddr, port: Option<u16> },
    /// Resolved at start, and again as its TTL ends. `None`: keep the port the client dialled.
    Name { host: String, port: Option<u16> },
}

impl Target {
    /// The name to resolve, if it is one.
    pub fn host(&self) -> Option<&str> {
        match self {
            Self::Address { .. } => None,
            Self::Name { host, .. } => Some(host),
        }
    }

    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Address { port, .. } | Self::Name { port, .. } => *port,
        }
    }
}

/// As written in the file; the `backend` label of every metric.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { ip, port: None } => write!(f, "{ip}"),
            Self::Address { ip, port: Some(port) } => std::net::SocketAddr::new(*ip, *port).fmt(f),
            Self::Name { host, port: None } => f.write_str(host),
            Self::Name { host, port: Some(port) } => write!(f, "{host}:{port}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Balance {
    RoundRobin,
    Random,
    SourceHash,
    Maglev,
    LeastConnections,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EngineChoice {
    Auto,
    Forced(Engine),
}

/// Who moves the bytes, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    Nft,
    Handoff,
    Sockmap,
    Splice,
    Copy,
}

impl Engine {
    pub const ALL: [Engine; 5] = [Engine::Nft, Engine::Handoff, Engine::Sockmap, Engine::Splice, Engine::Copy];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Handoff => "handoff",
            Self::Sockmap => "sockmap",
            Self::Splice => "splice",
            Self::Copy => "copy",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the backend sees as the client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceAddress {
    Gateway,
    Client,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Keepalive {
    Standard,
    /// Idle limit × 6.
    Extended,
    /// No idle limit.
    Immortal,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Limits {
    pub connections: Option<NonZeroU32>,
    pub connections_per_client: Option<NonZeroU32>,
    pub rate_per_client: Option<Rate>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rate {
    pub count: NonZeroU32,
    pub per: RateUnit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RateUnit {
    Second,
    Minute,
    Hour,
}

/// `None` is `"never"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timeouts {
    pub connect: Duration,
    pub initial_data: Duration,
    pub tls_handshake: Duration,
    pub idle: Option<Duration>,
    pub half_closed: Option<Duration>,
    pub lifetime: Option<Duration>,
    pub drain: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Health {
    pub check: HealthCheck,
    pub interval: Duration,
    pub timeout: Duration,
    /// Successes in a row until a backend is up; 1 or more.
    pub rise: u32,
    /// Failures in a row until a backend is down; 1 or more.
    pub fall: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HealthCheck {
    Tcp,
    Tls,
    Http,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tls {
    pub mode: TlsMode,
    pub certificates: Certificates,
    pub min_version: TlsVersion,
    pub alpn: Vec<String>,
    pub client_ca: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TlsMode {
    Passthrough,
    Terminate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TlsVersion {
    Tls12,
    Tls13,
}

/// Where the certificates of a route come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Certificates {
    /// In the order of the file; empty with [`TlsMode::Passthrough`].
    Files(Vec<CertificateFiles>),
    /// One for each name of `match.sni`, from the CA of `[acme]`.
    Acme(Vec<AcmeCertificate>),
}

/// A name that a certificate is got for, and where it is kept: the key and the chain in one file, which is not there
/// before the CA has issued the first one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AcmeCertificate {
    pub name: String,
    pub file: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CertificateFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BackendTls {
    pub ca: Option<PathBuf>,
    pub server_name: Option<String>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ProxyProtocol {
    pub accept_from: Vec<IpNet>,
    pub send: Option<ProxyVersion>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyVersion {
    V1,
    V2,
}
