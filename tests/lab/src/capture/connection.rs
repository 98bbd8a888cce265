//! One TCP connection as it passed on a link.

use std::{collections::HashMap, fmt, net::SocketAddr};

use crate::frame::{Segment, flag};

/// TTL of what a Linux sends itself. What was forwarded has less.
const OWN: u8 = 64;

/// What one end sent.
#[derive(Default)]
pub struct Direction {
    /// The stream, as far as it was seen without a gap.
    pub bytes: Vec<u8>,
    /// What came ahead of a gap: where it begins in the stream.
    ahead: Vec<(usize, Vec<u8>)>,
    first: Option<u32>,
    pub syns: u32,
    /// When the first FIN passed.
    pub fin: Option<u64>,
    pub rst: Option<u64>,
    /// When the first segment passed that some other machine sent, by its TTL.
    pub forwarded: Option<u64>,
    /// Ends of the stream that this machine itself said, by their TTL.
    pub own_ends: u32,
    /// When payload passed that had passed before.
    pub again: Vec<u64>,
    /// The last acknowledgement, as an offset into the other stream: of the machine itself, and of what it forwarded.
    acked: [Option<usize>; 2],
    /// Acknowledgements of less than one before that was of the other of these two.
    pub crossed: u32,
    pub seen: Seen,
}

/// What should never be seen.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Checksums of IP or TCP.
    pub unsound: u32,
    /// Payload that had other bytes when it passed before.
    pub other_bytes: u32,
    /// Payload or a FIN behind the FIN.
    pub behind_fin: u32,
    /// Acknowledgements of what the other end had not sent.
    pub ack_ahead: u32,
    /// Acknowledgements of less than one before from the same machine.
    pub ack_back: u32,
    /// A number far from the stream.
    pub astray: u32,
}

/// A connection: what its client sent, and what came back.
#[derive(Debug)]
pub struct Connection {
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub from_client: Direction,
    pub from_server: Direction,
}

/// The connections to that port, in the order of their first packets.
pub fn all<'a>(segments: impl Iterator<Item = (u64, Segment<'a>)>, port: u16) -> Vec<Connection> {
    let mut all: Vec<Connection> = Vec::new();
    let mut known: HashMap<(SocketAddr, SocketAddr), usize> = HashMap::new();
    for (at, segment) in segments {
        let is_client = segment.to.port() == port;
        if !is_client && segment.from.port() != port {
            continue;
        }
        let (client, server) = if is_client { (segment.from, segment.to) } else { (segment.to, segment.from) };
        let index = *known.entry((client, server)).or_insert_with(|| {
            all.push(Connection::new(client, server));
            all.len() - 1
        });
        all[index].take(at, &segment, is_client);
    }
    all
}

impl Connection {
    fn new(client: SocketAddr, server: SocketAddr) -> Self {
        Self { client, server, from_client: Direction::default(), from_server: Direction::default() }
    }

    /// Both have said their ends, and everything between is there.
    pub fn is_over(&self) -> bool {
        [&self.from_client, &self.from_server].iter().all(|way| way.fin.is_some() || way.rst.is_some())
    }

    fn take(&mut self, at: u64, segment: &Segment<'_>, is_client: bool) {
        let (this, other) = match is_client {
            true => (&mut self.from_client, &self.from_server),
            false => (&mut self.from_server, &self.from_client),
        };
        this.take(at, segment, other);
    }
}

impl fmt::Debug for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ahead: Option<usize> = self.ahead.iter().map(|(begin, _)| *begin).min();
        let mut shown = f.debug_struct("Direction");
        shown.field("bytes", &self.bytes.len()).field("ahead", &ahead).field("again", &self.again.len());
        shown.field("fin", &self.fin).field("rst", &self.rst).field("forwarded", &self.forwarded);
        shown.field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Direction {
    /// Everything that was sent was seen, without a gap.
    pub fn is_whole(&self) -> bool {
        self.ahead.is_empty()
    }

    fn take(&mut self, at: u64, segment: &Segment<'_>, other: &Self) {
        self.seen.unsound += u32::from(!segment.sound);
        if segment.hops < OWN {
            self.forwarded.get_or_insert(at);
        } else if segment.has(flag::FIN | flag::RST) {
            self.own_ends += 1;
        }
        if segment.has(flag::SYN) {
            self.syns += 1;
            self.first = Some(segment.seq.wrapping_add(1));
            return;
        }
        if segment.has(flag::RST) {
            self.rst.get_or_insert(at);
            return;
        }
        let Some(offset) = self.offset(segment.seq) else {
            self.seen.astray += 1;
            return;
        };
        self.bytes_at(at, offset, segment.payload);
        if segment.has(flag::FIN) {
            self.fin.get_or_insert(at);
        }
        if segment.has(flag::ACK) {
            self.acknowledges(segment.ack, segment.hops < OWN, other);
        }
    }

    /// Where a sequence number is in the stream: around where it is now.
    fn offset(&self, seq: u32) -> Option<usize> {
        const NEAR: i64 = 1 << 28;
        let here = self.bytes.len();
        let ahead = i64::from(seq.wrapping_sub(self.first?).wrapping_sub(here as u32).cast_signed());
        usize::try_from(here as i64 + ahead).ok().filter(|_| ahead.abs() < NEAR)
    }

    fn bytes_at(&mut self, at: u64, offset: usize, payload: &[u8]) {
        if payload.is_empty() {
            return;
        }
        let here = self.bytes.len();
        let known = here.saturating_sub(offset).min(payload.len());
        if known > 0 {
            self.again.push(at);
            self.seen.other_bytes += u32::from(self.bytes[offset..offset + known] != payload[..known]);
        }
        if offset > here {
            match self.ahead.iter().find(|(begin, bytes)| *begin == offset && bytes.len() >= payload.len()) {
                Some((_, bytes)) => {
                    self.again.push(at);
                    self.seen.other_bytes += u32::from(bytes[..payload.len()] != *payload);
                }
                None => self.ahead.push((offset, payload.to_vec())),
            }
            return;
        }
        self.seen.behind_fin += u32::from(self.fin.is_some() && known < payload.len() && self.ahead.is_empty());
        self.bytes.extend_from_slice(&payload[known..]);
        self.close_gaps();
    }

    fn close_gaps(&mut self) {
        while let Some(index) = self.ahead.iter().position(|(begin, _)| *begin <= self.bytes.len()) {
            let (begin, bytes) = self.ahead.swap_remove(index);
            let known = (self.bytes.len() - begin).min(bytes.len());
            self.seen.other_bytes += u32::from(self.bytes[begin..begin + known] != bytes[..known]);
            self.bytes.extend_from_slice(&bytes[known..]);
        }
    }

    fn acknowledges(&mut self, ack: u32, forwarded: bool, other: &Self) {
        let Some(offset) = other.offset(ack) else {
            self.seen.astray += 1;
            return;
        };
        let sent = other.ahead.iter().map(|(begin, bytes)| begin + bytes.len()).max().unwrap_or(0);
        let sent = sent.max(other.bytes.len()) + usize::from(other.fin.is_some());
        self.seen.ack_ahead += u32::from(offset > sent);
        let [same, beside] = [forwarded, !forwarded].map(|forwarded| self.acked[usize::from(forwarded)]);
        self.seen.ack_back += u32::from(same.is_some_and(|acked| offset < acked));
        self.crossed += u32::from(beside.is_some_and(|acked| offset < acked));
        self.acked[usize::from(forwarded)] = same.max(Some(offset));
    }
}
