//! One TCP segment, from arrival to what is sent on.

use proxy_abi::handoff::{HandoffEnd, HandoffEntry, option, outcome};

use crate::{
    Packet, checksum,
    flow::{self, Fate, Flow, Segment},
    network::{self, Change, Network},
    options::{self, Work},
    tcp::{self, Tcp},
};

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Untouched, to the stack.
    Stack(u32),
    Drop(u32),
    /// Untouched, to the stack, once both entries are deleted.
    Replace,
    /// Translated: out, to the destination that it names now. `ended`: this packet ended the flow.
    Send {
        outcome: u32,
        ended: bool,
    },
}

/// What the kernel knows of a packet besides its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    pub now_ns: u64,
    /// Segments of a super-packet.
    pub segments: u32,
    pub ifindex: u32,
}

/// What is written into a segment that is sent on.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    /// As it came.
    header: tcp::Header,
    new: tcp::New,
    /// Bytes of its options.
    options: usize,
    mode: usize,
    now_ns: u64,
    /// This packet ended the flow.
    pub ended: bool,
}

/// What is to be written into a segment.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// It is sent on.
    Forward(Write),
    /// It is for our own socket, with these numbers.
    Own { seq: u32, ack: u32 },
}

impl Write {
    #[inline(always)]
    pub const fn outcome(&self) -> u32 {
        if self.mode == options::BLANK { outcome::PROBED } else { outcome::TRANSLATED }
    }

    /// Bytes of the TCP header.
    #[inline(always)]
    pub const fn tcp_bytes(&self) -> u32 {
        (tcp::HEADER + self.options) as u32
    }
}

/// Translates a segment whose IP header at `network_at` said `network`, and whose TCP header is `header`.
pub fn translate<P: Packet>(
    packet: &mut P,
    (network_at, network): (usize, &Network),
    header: &tcp::Header,
    entry: &HandoffEntry,
    flow: &mut Flow<'_>,
    context: Context,
) -> Verdict {
    let write = match decide(network, header, entry, flow, context) {
        Ok(Step::Forward(write)) => write,
        Ok(Step::Own { seq, ack }) => {
            return match write_own(packet, network.transport, header, (seq, ack)) {
                Some(()) => Verdict::Stack(outcome::OWN_ACK),
                None => Verdict::Drop(outcome::NOT_WRITABLE),
            };
        }
        Err(verdict) => return verdict,
    };
    let written = write_options(packet, network, entry, &write, flow.this, flow.other)
        .and_then(|of_options| write_headers(packet, (network_at, network), entry, &write, of_options));
    match written {
        Some(()) => Verdict::Send { outcome: write.outcome(), ended: write.ended },
        None => Verdict::Drop(outcome::NOT_WRITABLE),
    }
}

/// What becomes of a segment, and what it says of its flow; `Err` when nothing is to be written.
#[inline(always)]
pub fn decide(
    network: &Network,
    header: &tcp::Header,
    entry: &HandoffEntry,
    flow: &mut Flow<'_>,
    context: Context,
) -> Result<Step, Verdict> {
    let tcp = Tcp::of(header);
    let options = acceptable(network, &tcp, flow)?;
    let segment = Segment {
        tcp,
        payload: (network.length - tcp.header_bytes) as u32,
        segments: context.segments,
        now_ns: context.now_ns,
        ifindex: context.ifindex,
    };
    let (new, mode, ended) = match flow::judge(&segment, entry, flow) {
        Fate::Stack(outcome) => return Err(Verdict::Stack(outcome)),
        Fate::Own { ack } => return Ok(own(tcp.seq, ack, flow.other.own_seq.wrapping_sub(entry.dseq))),
        Fate::Drop(outcome) => return Err(Verdict::Drop(outcome)),
        Fate::Replace => return Err(Verdict::Replace),
        Fate::Probe => (probe(entry, flow), options::BLANK, false),
        Fate::Forward { ack, raised, without_sack } => {
            let ended = flow::record(&segment, entry, flow);
            let mode = if without_sack { options::WITHOUT_SACK } else { options::TRANSLATE };
            (forward(&tcp, (ack, raised), entry), mode, ended)
        }
    };
    Ok(Step::Forward(Write { header: *header, new, options, mode, now_ns: context.now_ns, ended }))
}

/// An acknowledgement for our own socket, which has received everything before `rcv_nxt`: it would not believe one with a sequence
/// number far beyond. One beyond may be a FIN that it has received.
#[inline(always)]
const fn own(seq: u32, ack: u32, rcv_nxt: u32) -> Step {
    Step::Own { seq: if seq.wrapping_sub(rcv_nxt) as i32 > 1 { rcv_nxt } else { seq }, ack }
}

/// Writes the numbers of a segment that is for our own socket.
#[inline(always)]
pub fn write_own<P: Packet>(packet: &mut P, at: usize, header: &tcp::Header, (seq, ack): (u32, u32)) -> Option<()> {
    let mut new = *header;
    (new[1], new[2]) = (seq.to_be(), ack.to_be());
    let difference = checksum::difference(checksum::sum(header), checksum::sum(&new));
    packet.store(at, &new)?;
    packet.adjust_checksum(at + tcp::CHECKSUM, 0, difference)
}

/// Writes the options: the difference for the checksum.
#[inline(always)]
pub fn write_options<P: Packet>(
    packet: &mut P,
    network: &Network,
    entry: &HandoffEntry,
    write: &Write,
    this: &mut HandoffEnd,
    other: &HandoffEnd,
) -> Option<u32> {
    let work = Work { entry, tcp: Tcp::of(&write.header), mode: write.mode, now_ns: write.now_ns };
    options::translate(packet, network.transport + tcp::HEADER, write.options, work, this, other)
}

/// Writes both headers and the checksum.
#[inline(always)]
pub fn write_headers<P: Packet>(
    packet: &mut P,
    (network_at, network): (usize, &Network),
    entry: &HandoffEntry,
    write: &Write,
    of_options: u32,
) -> Option<()> {
    let mut header = write.header;
    let of_header = tcp::rewrite(&mut header, entry, write.new);
    packet.store(network.transport, &header)?;
    let change = Change {
        source: Some(&entry.source),
        destination: &entry.destination,
        clear_ecn: write.new.clear_ecn,
        forwarded: true,
    };
    let pseudo = network::rewrite(packet, network.version, network_at, change)?;
    packet.adjust_checksum(network.transport + tcp::CHECKSUM, pseudo, checksum::add(of_header, of_options))
}

/// Whether it can be translated at all; the bytes of its options.
#[inline(always)]
fn acceptable(network: &Network, tcp: &Tcp, flow: &Flow<'_>) -> Result<usize, Verdict> {
    if flow.gate == proxy_abi::handoff::gate::CLOSED {
        Err(Verdict::Stack(outcome::PENDING))
    } else if network.fragment {
        Err(Verdict::Drop(outcome::FRAGMENT))
    } else if network.has_options {
        Err(Verdict::Drop(outcome::IP_OPTIONS))
    } else if tcp.header_bytes < tcp::HEADER || tcp.header_bytes > network.length {
        Err(Verdict::Drop(outcome::MALFORMED))
    } else if network.hops <= 1 {
        Err(Verdict::Drop(outcome::TTL_EXPIRED))
    } else {
        Ok(tcp.header_bytes - tcp::HEADER)
    }
}

#[inline(always)]
const fn forward(tcp: &Tcp, (ack, raised): (u32, u32), entry: &HandoffEntry) -> tcp::New {
    tcp::New {
        seq: tcp.seq.wrapping_add(entry.dseq),
        ack: if tcp.has(tcp::ACK) { ack.wrapping_sub(entry.dack) } else { tcp.ack },
        flags: tcp.flags,
        window: tcp::window(tcp.window, raised, entry),
        clear_ecn: clears_ecn(entry),
    }
}

/// A keep-alive probe (RFC 9293 §3.8.4) to the other end instead of a SYN of this one: if this end knows nothing of the connection
/// any more, the answer will make it say so (RFC 5961 §4).
#[inline(always)]
const fn probe(entry: &HandoffEntry, flow: &Flow<'_>) -> tcp::New {
    tcp::New {
        seq: flow::next_seq(flow.this).wrapping_sub(1).wrapping_add(entry.dseq),
        ack: flow::last_ack(flow.this).wrapping_sub(entry.dack),
        flags: tcp::ACK,
        window: tcp::window(flow.this.window, 0, entry),
        clear_ecn: true,
    }
}

/// Congestion is signalled end to end only where both connections agreed to it.
#[inline(always)]
const fn clears_ecn(entry: &HandoffEntry) -> bool {
    let both = option::ECN_IN | option::ECN_OUT;
    entry.options & both != both
}
