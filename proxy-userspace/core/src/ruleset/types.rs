//! The vocabulary of the ruleset: exactly the sets and statements shunt uses, each with one nft spelling and one netlink
//! form. Marks are host-endian in the kernel, addresses and ports big-endian; every field of a concatenation is padded
//! to four bytes (`nft_set_ext`, v4.1+).

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use crate::config::{Protocol, RateUnit};

/// A whole table of the `inet` family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    pub timeouts: BTreeMap<String, TimeoutPolicy>,
    pub sets: BTreeMap<String, Set>,
    pub chains: BTreeMap<String, Chain>,
}

/// The table's name.
pub const TABLE: &str = "shunt";

/// A `ct timeout` object, seconds. `l3proto inet`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TimeoutPolicy {
    Tcp { syn_sent: u32, established: u32, fin_wait: u32, close_wait: u32, last_ack: u32, time_wait: u32, close: u32 },
    Udp { unreplied: u32, replied: u32 },
}

/// A named set, map or verdict map, with what shunt wants in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    pub spec: SetSpec,
    /// Always empty for [`SetKind::Dynamic`]: the packet path fills those.
    pub elements: BTreeMap<Key, Element>,
}

/// What cannot change without making the set anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetSpec {
    pub key: Vec<Field>,
    pub data: Option<Data>,
    pub kind: SetKind,
    /// `counter`: each element counts the packets and bytes that matched it.
    pub counter: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetKind {
    /// Exact keys: a hash table.
    Hash,
    /// `flags interval`, one field: elements are disjoint ranges.
    Interval,
    /// `flags dynamic` or `flags dynamic,timeout`: filled by [`Statement::Update`].
    Dynamic { size: u32, timeout_seconds: Option<u32> },
}

/// One field of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `mark`, 4 bytes, host-endian.
    Mark,
    /// `ipv4_addr`
    Ipv4,
    /// `ipv6_addr`
    Ipv6,
    /// `inet_proto`, 1 byte.
    Protocol,
    /// `inet_service`, 2 bytes.
    Port,
    /// `typeof numgen inc mod 2`, 4 bytes, host-endian: a slot number. A set with this field is declared with `typeof`.
    Slot,
}

/// What a map yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    Mark,
    Verdict,
    Ipv4,
    Ipv6,
    /// `ipv4_addr . inet_service`
    Ipv4Port,
    /// `ipv6_addr . inet_service`
    Ipv6Port,
}

/// A key in the kernel's own form: fields in order, each padded with zeros to a multiple of four bytes.
/// For [`SetKind::Interval`] it is the first key of the range.
///
/// Held in place, without an allocation: 50,000 routes have a quarter of a million of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    bytes: [u8; Self::LONGEST],
    length: u8,
}

impl Key {
    /// Two IPv6 addresses (`hairpin6`).
    const LONGEST: usize = 32;

    pub fn new(fields: &[KeyPart]) -> Self {
        let mut key = Self { bytes: [0; Self::LONGEST], length: 0 };
        for field in fields {
            match field {
                KeyPart::Mark(value) | KeyPart::Slot(value) => key.extend(&value.to_ne_bytes()),
                KeyPart::Address(IpAddr::V4(ip)) => key.extend(&ip.octets()),
                KeyPart::Address(IpAddr::V6(ip)) => key.extend(&ip.octets()),
                KeyPart::Protocol(protocol) => key.extend(&[protocol.number()]),
                KeyPart::Port(port) => key.extend(&port.to_be_bytes()),
            }
        }
        key
    }

    /// A key as read from the kernel. None of shunt's sets has a longer one than fits; of a longer one the beginning is kept.
    pub fn from_kernel(bytes: &[u8]) -> Self {
        let mut key = Self { bytes: [0; Self::LONGEST], length: 0 };
        key.extend(bytes);
        key
    }

    /// Pads to a multiple of four.
    fn extend(&mut self, bytes: &[u8]) {
        let free = self.bytes.get_mut(usize::from(self.length)..).unwrap_or_default();
        let taken = bytes.len().min(free.len());
        free[..taken].copy_from_slice(&bytes[..taken]);
        self.length += taken.next_multiple_of(4) as u8;
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyPart {
    Mark(u32),
    Slot(u32),
    Address(IpAddr),
    Protocol(Protocol),
    Port(u16),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// The last key of the range, for [`SetKind::Interval`]; `None` elsewhere.
    pub last: Option<Key>,
    pub value: Value,
    /// At most 127 bytes (`NFTNL_UDATA_COMMENT_MAXLEN`).
    pub comment: Option<Box<str>>,
    /// What the element's counter starts with when it is added. Ignored by comparisons with the kernel.
    pub counter: Counter,
}

/// What a counter holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    pub packets: u64,
    /// Bytes from the IP header on, as `skb->len` has them at the hook.
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A member of a plain set.
    None,
    Mark(u32),
    Address(IpAddr),
    Endpoint(SocketAddr),
    Goto(Box<str>),
    Jump(Box<str>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

/// Where a base chain hangs. The policy is always `accept`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    pub kind: ChainKind,
    pub hook: Hook,
    pub priority: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    Nat,
    Filter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

pub type Rule = Vec<Statement>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

/// What a rule's key is made of, in the order of the key's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// `ct mark`, or `ct mark & MASK`.
    Mark {
        mask: Option<u32>,
    },
    /// `ip saddr` / `ip6 saddr`
    SourceAddress(Family),
    /// `ip daddr` / `ip6 daddr`
    DestinationAddress(Family),
    /// `meta l4proto`
    Protocol,
    /// `th dport`
    DestinationPort,
    /// `numgen inc mod N` / `numgen random mod N`
    Sequence {
        modulus: u32,
    },
    Random {
        modulus: u32,
    },
    /// `jhash ip saddr mod N seed S` (`nft_jhash_eval`: jhash of the address, then `reciprocal_scale`).
    SourceHash {
        family: Family,
        modulus: u32,
        seed: u32,
    },
}

/// One match or action of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Statement {
    /// `meta l4proto tcp`
    IsProtocol(Protocol),
    /// `meta nfproto ipv4`
    IsFamily(Family),
    /// `tcp flags & (MASK) == VALUE`, or `!=`. Implies `meta l4proto tcp`.
    TcpFlags {
        mask: u8,
        value: u8,
        equal: bool,
    },
    /// `fib daddr type local`, or `!= local`.
    DestinationIsLocal(bool),
    /// `ip daddr 127.0.0.0/8`, `ip6 daddr ::1`: a whole prefix of the destination.
    DestinationIn(ipnet::IpNet),
    /// `ct direction original` (client → backend) or `reply`.
    Direction(Direction),
    /// `ct mark & MASK == VALUE`, or `!=`.
    MarkIs {
        mask: u32,
        value: u32,
        equal: bool,
    },
    /// `ct status dnat`
    IsDnatted,
    /// `KEY @SET`, or `KEY != @SET`. Where the set has counters the element counts.
    In {
        key: Vec<Load>,
        set: String,
        negate: bool,
    },
    /// `ct mark set KEY map @MAP`; ends the rule when the key is not in the map.
    SetMarkFrom {
        key: Vec<Load>,
        map: String,
    },
    /// `ct mark set ct mark & KEEP | BITS`
    SetMarkBits {
        keep: u32,
        bits: u32,
    },
    /// `ct mark set MARK`
    SetMark(u32),
    /// `iif != "lo"`
    NotFromLoopback,
    /// `ct event set new,destroy…`: a set of [`events`].
    SetEvents(u32),
    /// `ct timeout set "NAME"`
    SetTimeout(String),
    /// `dnat ip to KEY map @MAP`, with or without a port in the map's data. Follows [`Statement::IsProtocol`] when with a port.
    Dnat {
        family: Family,
        key: Vec<Load>,
        map: String,
        port: bool,
    },
    /// `masquerade`
    Masquerade,
    /// `KEY vmap @MAP`; the rule goes on when the key is not in the map.
    VerdictMap {
        key: Vec<Load>,
        map: String,
    },
    /// `ct count over N`
    CountOver(u32),
    /// `add @SET { KEY ct count over N }` or `update @SET { KEY limit rate over … }`: true when the limit is passed.
    Update {
        set: String,
        key: Load,
        over: Over,
    },
    /// `reject with tcp reset`
    RejectReset,
    /// `reject with icmpx type port-unreachable`
    RejectUnreachable,
    Jump(String),
    Goto(String),
    Return,
    Accept,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// `ct count over N`
    Connections(u32),
    /// `limit rate over COUNT/UNIT burst BURST packets`
    Rate { count: u32, per: RateUnit, burst: u32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Client → backend.
    Original,
    /// Backend → client.
    Reply,
}

/// Bits of `ct event set`: `1 << IPCT_*` (`enum ip_conntrack_events`).
pub mod events {
    pub const NEW: u32 = 1 << 0;
    pub const DESTROY: u32 = 1 << 2;
    pub const MARK: u32 = 1 << 7;
}

/// TCP header flags (RFC 9293 §3.1).
pub mod tcp_flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
}
