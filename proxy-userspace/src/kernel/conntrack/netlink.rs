//! [`Conntrack`] on the real kernel.

use std::{collections::VecDeque, fs, io};

use proxy_core::{
    conntrack::{Entry, Event},
    flow::EntryKey,
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Conntrack, ConntrackError, Drained, Hear, MarkFilter, Usage,
    nudge::Nudge,
    parse,
    socket::{Batch, EventSocket, RequestSocket},
    wire::{self, Messages, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, Requests, cta},
};

/// `IPS_DST_NAT`: every entry shunt forwards has it.
const DST_NAT: u32 = 1 << 5;
/// Requests in one datagram: if all fail, the answers fit a default receive buffer.
const CHUNK: usize = 64;
/// A dump that the table outran is asked for again so often.
const DUMP_TRIES: u32 = 3;
/// Event batches read by one drain: 65,536 events.
const DRAIN_BATCHES: usize = 512;
/// Datagrams of a dump, of some hundred entries each, from one look at the event socket to the next.
const DUMP_STRETCH: usize = 8;
/// Events held for the next drain at most: some 60 MB.
const MOST_HELD: usize = 262_144;

/// Two sockets in the network namespace of the thread that opened them.
#[derive(Debug)]
pub struct NetlinkConntrack {
    id_mask: u32,
    events: AsyncFd<EventSocket>,
    /// Events that came while a dump ran.
    held: VecDeque<Event>,
    asks: RequestSocket,
    nudge: Nudge,
    requests: Requests,
    sequence: u32,
}

impl NetlinkConntrack {
    /// `id_mask`: entries whose mark has none of these bits are ignored. `receive_buffer`: bytes for queued events.
    /// Must be called inside a tokio runtime with I/O enabled.
    pub fn open(id_mask: u32, receive_buffer: usize, hear: Hear) -> Result<Self, ConntrackError> {
        let socket = EventSocket::open(receive_buffer, hear, id_mask)?;
        // SAFETY: the socket owns its descriptor and yields the same one as long as it lives, which is as long as the
        // registration does.
        let events = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
            .map_err(|error| ConntrackError::Call { call: "epoll_ctl(EPOLL_CTL_ADD)", source: error.into() })?;
        Ok(Self {
            id_mask,
            events,
            held: VecDeque::new(),
            asks: RequestSocket::open()?,
            nudge: Nudge::open(),
            requests: Requests::default(),
            sequence: 0,
        })
    }

    /// Sets the seconds until each entry expires, if no packet comes.
    pub fn set_timeout(&mut self, keys: &[EntryKey], seconds: u32) -> Result<usize, ConntrackError> {
        self.change("set timeout", wire::CT_NEW, keys, |requests, _| requests.be32(cta::TIMEOUT, seconds))
    }

    /// One entry, if it is still there.
    fn get(&mut self, key: &EntryKey) -> Option<Entry> {
        let sequence = self.next_sequence();
        self.requests.clear();
        self.requests.start(wire::CT_GET, 0, sequence, wire::family(key));
        self.requests.original(key);
        self.requests.finish();
        self.asks.send(self.requests.bytes()).ok()?;
        // Exactly one answer comes: the entry, or an error.
        let answer = Messages(self.asks.receive().ok()?).find(|message| message.sequence == sequence)?;
        parse::entry(answer.payload, self.id_mask).filter(|entry| entry.id == key.id)
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn dump_once(&mut self, filter: MarkFilter, each: &mut dyn FnMut(&Entry)) -> Result<Complete, ConntrackError> {
        let sequence = self.next_sequence();
        self.requests.clear();
        self.requests.start(wire::CT_GET, NLM_F_DUMP, sequence, libc::AF_UNSPEC as u8);
        self.requests.be32(cta::MARK, filter.value);
        self.requests.be32(cta::MARK_MASK, filter.mask);
        self.requests.be32(cta::STATUS, DST_NAT);
        self.requests.be32(cta::STATUS_MASK, DST_NAT);
        self.requests.finish();
        self.asks.send(self.requests.bytes())?;
        let mut complete = Complete::Yes;
        let mut datagrams = 0usize;
        loop {
            datagrams += 1;
            if datagrams.is_multiple_of(DUMP_STRETCH) {
                self.hold()?;
            }
            let datagram = self.asks.receive()?;
            for message in Messages(datagram).filter(|message| message.sequence == sequence) {
                if message.flags & NLM_F_DUMP_INTR != 0 {
                    complete = Complete::Interrupted;
                }
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(complete),
                    libc::NLMSG_ERROR => return Err(refusal("dump", message.payload)),
                    _ => {
                        if let Some(entry) = parse::entry(message.payload, self.id_mask)
                            && entry.mark & filter.mask == filter.value
                        {
                            each(&entry);
                        }
                    }
                }
            }
        }
    }

    /// Takes what events there are off their socket, for the next drain. A dump of a full table may last for seconds on a
    /// busy machine, and itself makes the kernel tell of every expired entry it meets: more than a socket's buffer holds.
    fn hold(&mut self) -> Result<(), ConntrackError> {
        if self.held.len() < MOST_HELD {
            read_queued(self.events.get_mut(), self.id_mask, &mut |event| self.held.push_back(event))?;
        }
        Ok(())
    }

    /// One request per key; how many entries were found. Failures are always answered, so only the last of a datagram asks
    /// for an acknowledgement: in a flood, the answers would cost more than what they are about.
    fn change(
        &mut self,
        what: &'static str,
        kind: u16,
        keys: &[EntryKey],
        fill: impl Fn(&mut Requests, &EntryKey),
    ) -> Result<usize, ConntrackError> {
        let mut found = 0;
        let mut first_failure = None;
        for chunk in keys.chunks(CHUNK) {
            self.requests.clear();
            let first = self.sequence.wrapping_add(1);
            let last = self.sequence.wrapping_add(chunk.len() as u32);
            for key in chunk {
                let sequence = self.next_sequence();
                let flags = if sequence == last { NLM_F_ACK } else { 0 };
                self.requests.start(kind, flags, sequence, wire::family(key));
                self.requests.original(key);
                fill(&mut self.requests, key);
                self.requests.finish();
            }
            self.asks.send(self.requests.bytes())?;
            found += chunk.len();
            let mut answered = false;
            while !answered {
                let datagram = self.asks.receive()?;
                for message in Messages(datagram) {
                    // An answer to a request given up on earlier is none of ours.
                    if message.sequence.wrapping_sub(first) as usize >= chunk.len() {
                        continue;
                    }
                    answered |= message.sequence == last;
                    let error = error_number(message.payload);
                    found = found.saturating_sub(usize::from(error != Some(0)));
                    if !matches!(error, Some(0 | libc::ENOENT)) {
                        first_failure.get_or_insert_with(|| refusal(what, message.payload));
                    }
                }
            }
        }
        first_failure.map_or(Ok(found), Err)
    }
}

fn read_queued(socket: &mut EventSocket, id_mask: u32, each: &mut dyn FnMut(Event)) -> Result<Drained, ConntrackError> {
    for _ in 0..DRAIN_BATCHES {
        match socket.read()? {
            Batch::Empty => return Ok(Drained { more: false }),
            Batch::Overrun => each(Event::Lost),
            Batch::Read(read) => {
                let messages = socket.datagrams(read).flat_map(Messages);
                messages.filter_map(|message| parse::event(&message, id_mask)).for_each(&mut *each);
            }
        }
    }
    Ok(Drained { more: true })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Complete {
    Yes,
    /// The table changed in a way that may have hidden entries.
    Interrupted,
}

/// The positive errno in `struct nlmsgerr`; 0 is an acknowledgement.
fn error_number(payload: &[u8]) -> Option<i32> {
    payload.first_chunk::<4>().map(|bytes| i32::from_ne_bytes(*bytes).wrapping_neg())
}

fn refusal(what: &'static str, payload: &[u8]) -> ConntrackError {
    match error_number(payload) {
        Some(errno) => ConntrackError::Refused { what, source: io::Error::from_raw_os_error(errno) },
        None => ConntrackError::Truncated(what),
    }
}

impl Conntrack for NetlinkConntrack {
    async fn readable(&self) -> Result<(), ConntrackError> {
        let mut ready =
            self.events.readable().await.map_err(|source| ConntrackError::Call { call: "epoll_wait", source })?;
        // The caller drains to the end next, which is what re-arms an edge.
        ready.clear_ready();
        Ok(())
    }

    fn drain(&mut self, each: &mut dyn FnMut(&Event)) -> Result<Drained, ConntrackError> {
        self.held.drain(..).for_each(|event| each(&event));
        // What a flood has made it grow to is not kept.
        self.held.shrink_to(DRAIN_BATCHES);
        read_queued(self.events.get_mut(), self.id_mask, &mut |event| each(&event))
    }

    fn dump(&mut self, filter: MarkFilter, each: &mut dyn FnMut(&Entry)) -> Result<(), ConntrackError> {
        for _ in 0..DUMP_TRIES {
            if self.dump_once(filter, each)? == Complete::Yes {
                break;
            }
        }
        Ok(())
    }

    fn set_mark(&mut self, keys: &[EntryKey], value: u32, mask: u32) -> Result<usize, ConntrackError> {
        self.change("set mark", wire::CT_NEW, keys, |requests, _| {
            requests.be32(cta::MARK, value);
            requests.be32(cta::MARK_MASK, mask);
        })
    }

    fn delete(&mut self, keys: &[EntryKey]) -> Result<usize, ConntrackError> {
        self.change("delete", wire::CT_DELETE, keys, |requests, key| requests.be32(cta::ID, key.id))
    }

    fn nudge(&mut self, keys: &[EntryKey]) {
        for key in keys {
            if let Some(entry) = self.get(key) {
                self.nudge.both_ends(&entry);
            }
        }
    }

    fn usage(&self) -> Option<Usage> {
        usage()
    }
}

impl Hear {
    /// What is enough where the calling thread is.
    pub fn as_needed() -> Self {
        match fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_timestamp") {
            Ok(on) if on.trim() == "1" => Self::Ends,
            Ok(_) | Err(_) => Self::BeginningsAndEnds,
        }
    }
}

/// Entries and limit of the calling thread's network namespace. `None` where `/proc/sys` does not show them.
pub fn usage() -> Option<Usage> {
    let read = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("/proc/sys/net/netfilter/{name}")).ok()?.trim().parse().ok()
    };
    Some(Usage { entries: read("nf_conntrack_count")?, max: read("nf_conntrack_max")? })
}
