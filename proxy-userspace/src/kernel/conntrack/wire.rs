//! Netlink's own layout: headers and attributes (`linux/netlink.h`, `linux/netfilter/nfnetlink_conntrack.h`).

use std::net::IpAddr;

use proxy_core::{conntrack::Tuple, flow::EntryKey};

pub const NLMSG_HEADER: usize = 16;
pub const NFGENMSG: usize = 4;

/// `IPCTNL_MSG_CT_*` with the subsystem in the high byte.
pub const CT_NEW: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8;
pub const CT_GET: u16 = CT_NEW | 1;
pub const CT_DELETE: u16 = CT_NEW | 2;

pub const NLM_F_REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub const NLM_F_ACK: u16 = libc::NLM_F_ACK as u16;
pub const NLM_F_DUMP: u16 = libc::NLM_F_DUMP as u16;
/// Of an event: the entry is new, not changed.
pub const NLM_F_CREATE: u16 = libc::NLM_F_CREATE as u16;
/// The table changed while it was dumped.
pub const NLM_F_DUMP_INTR: u16 = 0x10;

/// `CTA_*`
pub mod cta {
    pub const TUPLE_ORIG: u16 = 1;
    pub const TUPLE_REPLY: u16 = 2;
    pub const STATUS: u16 = 3;
    pub const PROTOINFO: u16 = 4;
    pub const TIMEOUT: u16 = 7;
    pub const MARK: u16 = 8;
    pub const COUNTERS_ORIG: u16 = 9;
    pub const COUNTERS_REPLY: u16 = 10;
    pub const ID: u16 = 12;
    pub const TIMESTAMP: u16 = 20;
    pub const MARK_MASK: u16 = 21;
    pub const STATUS_MASK: u16 = 26;
    pub const TIMESTAMP_EVENT: u16 = 27;

    pub const TUPLE_IP: u16 = 1;
    pub const TUPLE_PROTO: u16 = 2;
    pub const IP_V4_SRC: u16 = 1;
    pub const IP_V4_DST: u16 = 2;
    pub const IP_V6_SRC: u16 = 3;
    pub const IP_V6_DST: u16 = 4;
    pub const PROTO_NUM: u16 = 1;
    pub const PROTO_SRC_PORT: u16 = 2;
    pub const PROTO_DST_PORT: u16 = 3;

    pub const PROTOINFO_TCP: u16 = 1;
    pub const PROTOINFO_TCP_STATE: u16 = 1;
    pub const COUNTERS_PACKETS: u16 = 1;
    pub const COUNTERS_BYTES: u16 = 2;
    pub const TIMESTAMP_START: u16 = 1;
    pub const TIMESTAMP_STOP: u16 = 2;
}

const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// `struct nlmsghdr`, and what follows it.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// Splits a datagram into messages; ends at the first that does not fit.
#[derive(Debug, Clone)]
pub struct Messages<'a>(pub &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let header = self.0.first_chunk::<NLMSG_HEADER>()?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let payload = self.0.get(NLMSG_HEADER..length)?;
        let message = Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            payload,
        };
        self.0 = self.0.get(align(length)..).unwrap_or_default();
        Some(message)
    }
}

/// Walks attributes; ends at the first that does not fit.
#[derive(Debug, Clone)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    #[inline]
    fn next(&mut self) -> Option<(u16, &'a [u8])> {
        let header = self.0.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let payload = self.0.get(4..length)?;
        self.0 = self.0.get(align(length)..).unwrap_or_default();
        Some((kind, payload))
    }
}

const fn align(length: usize) -> usize {
    (length + 3) & !3
}

/// Builds requests one behind the other in one buffer.
#[derive(Debug, Default)]
pub struct Requests {
    bytes: Vec<u8>,
    started: usize,
}

impl Requests {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Begins a message; [`Requests::finish`] ends it.
    pub fn start(&mut self, kind: u16, flags: u16, sequence: u32, family: u8) {
        self.started = self.bytes.len();
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend(sequence.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        // struct nfgenmsg: family, version 0, resource 0.
        self.bytes.extend([family, 0, 0, 0]);
    }

    pub fn finish(&mut self) {
        let length = (self.bytes.len() - self.started) as u32;
        self.bytes[self.started..self.started + 4].copy_from_slice(&length.to_ne_bytes());
    }

    pub fn attribute(&mut self, kind: u16, payload: &[u8]) {
        let start = self.open(kind);
        self.bytes.extend(payload);
        self.close(start);
    }

    pub fn be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// `CTA_TUPLE_ORIG`
    pub fn original(&mut self, key: &EntryKey) {
        let Tuple { source, destination } = key.original;
        let tuple = self.open(cta::TUPLE_ORIG | NESTED);
        let ip = self.open(cta::TUPLE_IP | NESTED);
        self.address(source.ip(), cta::IP_V4_SRC, cta::IP_V6_SRC);
        self.address(destination.ip(), cta::IP_V4_DST, cta::IP_V6_DST);
        self.close(ip);
        let proto = self.open(cta::TUPLE_PROTO | NESTED);
        self.attribute(cta::PROTO_NUM, &[key.protocol.number()]);
        self.attribute(cta::PROTO_SRC_PORT, &source.port().to_be_bytes());
        self.attribute(cta::PROTO_DST_PORT, &destination.port().to_be_bytes());
        self.close(proto);
        self.close(tuple);
    }

    fn address(&mut self, ip: IpAddr, v4: u16, v6: u16) {
        match ip {
            IpAddr::V4(ip) => self.attribute(v4, &ip.octets()),
            IpAddr::V6(ip) => self.attribute(v6, &ip.octets()),
        }
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend([0, 0]);
        self.bytes.extend(kind.to_ne_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(align(self.bytes.len()), 0);
    }
}

/// The address family of a tuple, for `struct nfgenmsg`.
pub fn family(key: &EntryKey) -> u8 {
    match key.original.source.ip() {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}
