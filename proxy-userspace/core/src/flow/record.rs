//! One connection.

use std::{
    fmt,
    hash::{BuildHasherDefault, Hasher},
    net::{IpAddr, SocketAddr},
    num::{NonZeroU16, NonZeroU64},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use super::{route::RouteInfo, timers::deadline};
use crate::{
    config::Protocol,
    conntrack::{Entry, Traffic, Tuple},
    reason::Reason,
};

/// Both clocks, read once per batch of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Monotonic. Its origin lies well before the daemon's start, so that flows older than the daemon have a place.
    pub mono: Duration,
    /// Since the Unix epoch.
    pub wall: Duration,
}

impl Now {
    /// The same clocks at an earlier moment, told in nanoseconds since the epoch.
    pub(super) fn back_to(self, wall_ns: Option<u64>) -> Self {
        let ago = wall_ns.map_or(Duration::ZERO, |ns| self.wall.saturating_sub(Duration::from_nanos(ns)));
        Self { mono: self.mono.saturating_sub(ago), wall: self.wall.saturating_sub(ago) }
    }
}

/// Names a connection while conntrack keeps it: `CTA_ID` and a hash of the client's tuple. The same after a restart
/// of the daemon. The kernel may give it again to a later connection of the same client address and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId(u64);

impl FlowId {
    pub fn of(entry: &Entry) -> Self {
        Self::new(entry.id, entry.protocol, &entry.original)
    }

    pub fn new(conntrack_id: u32, protocol: Protocol, original: &Tuple) -> Self {
        let mut hash = Fnv::default();
        hash.byte(protocol.number());
        for end in [original.source, original.destination] {
            match end.ip() {
                IpAddr::V4(ip) => ip.octets().into_iter().for_each(|b| hash.byte(b)),
                IpAddr::V6(ip) => ip.octets().into_iter().for_each(|b| hash.byte(b)),
            }
            end.port().to_be_bytes().into_iter().for_each(|b| hash.byte(b));
        }
        Self(u64::from(conntrack_id) << 32 | u64::from(hash.0))
    }

    /// `CTA_ID`
    pub const fn conntrack_id(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Sixteen hexadecimal digits.
impl fmt::Display for FlowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a connection id is sixteen hexadecimal digits")]
pub struct BadFlowId;

impl FromStr for FlowId {
    type Err = BadFlowId;

    fn from_str(text: &str) -> Result<Self, BadFlowId> {
        if text.len() != 16 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BadFlowId);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| BadFlowId)
    }
}

/// FNV-1a, 32 bits: fixed for ever, because ids outlive the process.
struct Fnv(u32);

impl Default for Fnv {
    fn default() -> Self {
        Self(0x811c_9dc5)
    }
}

impl Fnv {
    fn byte(&mut self, byte: u8) {
        self.0 = (self.0 ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
}

/// For keys that are well spread already: `CTA_ID` is a keyed hash of the kernel's own (`nf_ct_get_id`), route ids are
/// ours. One multiplication, because the table hashes once per event.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

pub(super) type SpreadHash = BuildHasherDefault<Spread>;

/// What ctnetlink needs to find one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EntryKey {
    pub protocol: Protocol,
    pub original: Tuple,
    /// `CTA_ID`
    pub id: u32,
}

impl From<&Entry> for EntryKey {
    fn from(entry: &Entry) -> Self {
        Self { protocol: entry.protocol, original: entry.original, id: entry.id }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    Client,
    Backend,
}

impl Side {
    pub const fn other(self) -> Self {
        match self {
            Self::Client => Self::Backend,
            Self::Backend => Self::Client,
        }
    }
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// TCP, and the handshake is not known to be over.
    Dialing,
    Established,
    /// `first` has sent its FIN.
    HalfClosed {
        first: Side,
    },
    /// Ended and counted; conntrack still holds the entry. Not active.
    Closing {
        reason: Reason,
        /// [`Now::mono`]
        ended: Duration,
        /// Its [`Ended`] has gone out.
        reported: bool,
    },
}

impl State {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dialing => "dialing",
            Self::Established => "established",
            Self::HalfClosed { .. } => "half_closed",
            Self::Closing { .. } => "closing",
        }
    }

    pub const fn is_active(self) -> bool {
        !matches!(self, Self::Closing { .. })
    }
}

/// One connection of one route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub id: FlowId,
    pub route: u32,
    pub protocol: Protocol,
    pub client: SocketAddr,
    pub listen: SocketAddr,
    pub backend: SocketAddr,
    /// [`Now::mono`] of the first packet, or of the moment shunt first saw the connection.
    pub start: Duration,
    /// The kernel told the start; otherwise it is when the connection was first seen, until the kernel tells.
    pub(super) start_told: bool,
    /// [`Now::mono`] of the last dump that saw new packets.
    pub last_activity: Duration,
    /// The dump before that one: no packet is known to have come later.
    pub(super) silent_since: Duration,
    /// Client → backend, as of the last dump.
    pub traffic_in: Traffic,
    /// Backend → client, as of the last dump.
    pub traffic_out: Traffic,
    /// False when conntrack keeps no counters for this entry.
    pub metered: bool,
    pub state: State,
    /// When the kernel lets the entry go if no packet comes, as of the last dump.
    pub(super) expires: Option<Duration>,
    /// The last full dump that had the entry.
    pub(super) generation: u32,
    /// The dump that added it, by the low bits of its number, before its `New` was heard: that event may still be on its way.
    pub(super) adopted_by: Option<NonZeroU16>,
    /// The kernel's clock at a moment when it was there, nanoseconds since the epoch: at its beginning, which dumps tell, or
    /// at its end. What begins later under its id is another connection.
    pub(super) seen_ns: Option<NonZeroU64>,
    /// It has been warned of this silence.
    pub(super) warned: bool,
    /// It had ended when the first dump came upon it. If that was after the event socket was opened, its end is still told.
    pub(super) over_before: bool,
}

impl Record {
    pub(super) fn new(entry: &Entry, route: u32, now: Now) -> Self {
        Self {
            id: FlowId::of(entry),
            route,
            protocol: entry.protocol,
            client: entry.client(),
            listen: entry.listen(),
            backend: entry.backend(),
            start: now.back_to(entry.started_ns).mono,
            start_told: entry.started_ns.is_some(),
            last_activity: now.mono,
            silent_since: now.mono,
            traffic_in: Traffic::default(),
            traffic_out: Traffic::default(),
            metered: true,
            state: match entry.protocol {
                Protocol::Tcp => State::Dialing,
                Protocol::Udp => State::Established,
            },
            expires: None,
            generation: 0,
            adopted_by: None,
            seen_ns: entry.started_ns.and_then(NonZeroU64::new),
            warned: false,
            over_before: false,
        }
    }

    pub fn key(&self) -> EntryKey {
        EntryKey {
            protocol: self.protocol,
            original: Tuple { source: self.client, destination: self.listen },
            id: self.id.conntrack_id(),
        }
    }

    /// Takes the start over from the entry, where the kernel remembers it.
    pub(super) fn begin_as(&mut self, entry: &Entry, now: Now) {
        let Some(ns) = entry.started_ns else { return };
        let told = now.back_to(Some(ns)).mono;
        // Told again it is finer than the moment its event was read; further off, the wall clock was set meanwhile.
        if !self.start_told || told.abs_diff(self.start) < Duration::from_secs(1) {
            self.start = told;
        }
        self.start_told = true;
    }

    /// Time until something ends it, or lets go of it once it has ended, if no packet comes.
    pub fn expires_in(&self, route: &RouteInfo, now: Now) -> Option<Duration> {
        let cut = deadline(self, route).map(|(at, _)| at);
        [self.expires, cut].into_iter().flatten().min().map(|at| at.saturating_sub(now.mono))
    }

    /// Whether the kernel's times say that `entry` is another connection under the same id: the one of this record is gone,
    /// and nobody has told.
    pub(super) fn began_before(&self, entry: &Entry) -> bool {
        self.seen_ns.zip(entry.started_ns).is_some_and(|(seen, began)| seen.get() < began)
    }

    /// Whether `entry` counts less than this record: it is another connection under the same id.
    pub(super) fn is_ahead_of(&self, entry: &Entry) -> bool {
        let behind = |known: Traffic, told: Option<Traffic>| told.is_some_and(|t| t.packets < known.packets);
        behind(self.traffic_in, entry.traffic_in) || behind(self.traffic_out, entry.traffic_out)
    }
}

/// A connection that has ended, with its final numbers: one line of the access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    pub id: FlowId,
    /// The route's name.
    pub route: Arc<str>,
    pub protocol: Protocol,
    pub client: SocketAddr,
    pub listen: SocketAddr,
    pub backend: SocketAddr,
    pub reason: Reason,
    /// When it ended, since the Unix epoch.
    pub at: Duration,
    pub duration: Duration,
    pub traffic_in: Traffic,
    pub traffic_out: Traffic,
    /// False: the traffic is not known.
    pub metered: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple() -> Tuple {
        Tuple {
            source: "10.0.0.1:40000".parse().expect("address"),
            destination: "10.0.0.2:80".parse().expect("address"),
        }
    }

    #[test]
    fn an_id_is_the_same_in_every_process() {
        assert_eq!(FlowId::new(0xdead_beef, Protocol::Tcp, &tuple()).to_string(), "deadbeef01f5c250");
    }

    #[test]
    fn an_id_reads_back_from_its_text() {
        let id = FlowId::new(7, Protocol::Udp, &tuple());
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("+000000000000000".parse::<FlowId>(), Err(BadFlowId));
        assert_eq!("12".parse::<FlowId>(), Err(BadFlowId));
    }

    #[test]
    fn a_full_table_of_records_stays_under_a_hundred_megabytes() {
        // One allocation (16 bytes of malloc's own) per record; the index doubles at 7/8 full, a key, a box and a byte each.
        let records = 262_144 * (size_of::<Record>() + 16);
        let index = 524_288 * (size_of::<(FlowId, Box<Record>)>() + 1);
        assert!(records + index < 80_000_000, "{}", records + index);
    }
}
