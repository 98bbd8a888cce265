//! What a segment means for its flow: whose it is while our sockets are still there, how much was carried, and when it is over.

use proxy_abi::handoff::{HandoffEnd, HandoffEntry, closing, gate, outcome, seen};

use crate::tcp::{ACK, FIN, RST, SYN, Tcp};

/// How far a sequence number may be ahead of what was acknowledged: the largest window (RFC 7323 §2.3). What is farther is not the end's
/// own, and counts for nothing.
const WINDOW: u32 = 1 << 30;

/// The flow as one of its directions sees it.
#[derive(Debug)]
pub struct Flow<'a> {
    /// As it was when the packet came: one read for all decisions.
    pub gate: u32,
    pub closing: &'a mut u32,
    pub closed_ns: &'a mut u64,
    /// The end that sent the packet.
    pub this: &'a mut HandoffEnd,
    /// The end that it goes to.
    pub other: &'a HandoffEnd,
}

/// A segment and when it came.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    pub tcp: Tcp,
    /// Payload bytes.
    pub payload: u32,
    /// Segments that a super-packet is made of; 0 or 1 for an ordinary one.
    pub segments: u32,
    /// `CLOCK_MONOTONIC`.
    pub now_ns: u64,
    /// Interface it came on.
    pub ifindex: u32,
}

/// What becomes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is for our own socket.
    Stack(u32),
    /// An acknowledgement of what our own socket sent, or sent again: for it, and it is told of no more than it sent.
    Own {
        ack: u32,
    },
    Drop(u32),
    /// Both entries go, and the stack gets it.
    Replace,
    /// The other end gets a probe instead.
    Probe,
    /// Translated with this acknowledgement, and without SACK blocks when they are about our socket's bytes.
    Forward {
        ack: u32,
        /// The window begins so many bytes before that.
        raised: u32,
        without_sack: bool,
    },
}

/// Decides. While one end has not acknowledged all that our socket writes to it, our socket's packets must seem new to it: until
/// then it is not told that the other end acknowledged more than our socket has (RFC 5961 §5.2).
#[inline(always)]
pub fn judge(segment: &Segment, entry: &HandoffEntry, flow: &mut Flow<'_>) -> Fate {
    let tcp = &segment.tcp;
    if flow.gate == gate::CLOSED {
        return Fate::Stack(outcome::PENDING);
    }
    if tcp.has(SYN) {
        return syn(segment, flow);
    }
    let forward = Fate::Forward { ack: tcp.ack, raised: 0, without_sack: false };
    if !tcp.has(ACK) || flow.gate == gate::ALONE || tcp.has(RST) {
        return forward;
    }
    let (own_seq, was_drained) = (flow.this.own_seq, is_drained(flow.this));
    let beyond = tcp.ack.wrapping_sub(own_seq) as i32;
    // With its FIN the other end hears of a window at most, which is not too much.
    let of_fin = flow.other.seen & seen::FIN != 0 && tcp.ack.wrapping_sub(entry.dack) == flow.other.fin_end;
    if of_fin || is_drained(flow.other) && (beyond > 0 || beyond == 0 && was_drained) {
        forward
    } else if segment.payload == 0 && !tcp.has(FIN) {
        acknowledges(segment, entry, flow);
        Fate::Own { ack: if beyond > 0 { own_seq } else { tcp.ack } }
    } else {
        // The other end was told of everything up to here by our socket.
        Fate::Forward { ack: own_seq, raised: if beyond < 0 { beyond.unsigned_abs() } else { 0 }, without_sack: true }
    }
}

/// The end has acknowledged all that our socket writes to it.
#[inline(always)]
const fn is_drained(end: &HandoffEnd) -> bool {
    end.ack.wrapping_sub(end.own_seq) as i32 >= 0
}

#[inline(always)]
fn syn(segment: &Segment, flow: &Flow<'_>) -> Fate {
    if segment.tcp.has(ACK) {
        Fate::Drop(outcome::SYN_ACK)
    } else if *flow.closing & closing::OVER != 0 {
        Fate::Replace
    } else if segment.payload != 0 {
        // With Fast Open. The next SYN is sent without data.
        Fate::Drop(outcome::MALFORMED)
    } else {
        Fate::Probe
    }
}

/// Counts a segment that is sent on; whether it ended the flow. Before its translation: numbers are still this end's.
#[inline(always)]
pub fn record(segment: &Segment, entry: &HandoffEntry, flow: &mut Flow<'_>) -> bool {
    let Segment { tcp, payload, .. } = segment;
    let this = &mut *flow.this;
    this.packets = this.packets.wrapping_add(if segment.segments > 1 { u64::from(segment.segments) } else { 1 });
    this.last_seen_ns = segment.now_ns;
    this.ifindex = segment.ifindex;
    let acked = acknowledged(entry, this, flow.other, flow.gate);
    let end = tcp.seq.wrapping_add(*payload);
    let own = end.wrapping_sub(acked) <= WINDOW;
    let is_reset = tcp.has(RST) && (tcp.seq == acked || tcp.seq == next_seq(this));
    if tcp.has(RST) {
        return is_reset && over(flow, reset_by(entry), segment.now_ns, seen::RST);
    }
    let advance = end.wrapping_sub(this.end_seq as u32);
    // What comes after a FIN begins behind it, and carries nothing.
    if own && *payload > 0 && advance as i32 > 0 {
        this.end_seq = this.end_seq.wrapping_add(u64::from(advance));
    }
    if own && tcp.has(FIN) {
        this.fin_end = end.wrapping_add(1);
        this.seen |= seen::FIN;
        if flow.other.seen & seen::FIN == 0 {
            *flow.closing |= first(entry);
        }
    }
    if tcp.has(ACK) && !acknowledges(segment, entry, flow) {
        return false;
    }
    let both = flow.this.seen & flow.other.seen & seen::ACKED_FIN != 0;
    both && over(flow, closing::FINISHED, segment.now_ns, 0)
}

/// Takes the acknowledgement and the window, when it is of bytes that the other end sent.
#[inline(always)]
fn acknowledges(segment: &Segment, entry: &HandoffEntry, flow: &mut Flow<'_>) -> bool {
    let (ack, this) = (segment.tcp.ack, &mut *flow.this);
    let of_other = ack.wrapping_sub(entry.dack);
    if (next_seq(flow.other).wrapping_sub(of_other) as i32) < 0 {
        return false;
    }
    if this.seen & seen::ACK == 0 || ack.wrapping_sub(this.ack) as i32 >= 0 {
        this.ack = ack;
        this.window = segment.tcp.window;
        this.seen |= seen::ACK;
    }
    if flow.other.seen & seen::FIN != 0 && of_other == flow.other.fin_end {
        this.seen |= seen::ACKED_FIN;
    }
    true
}

/// The sequence number that this end sends next.
#[inline(always)]
pub const fn next_seq(end: &HandoffEnd) -> u32 {
    if end.seen & seen::FIN != 0 { end.fin_end } else { end.end_seq as u32 }
}

/// Up to where the other end, or our socket before it, acknowledged this end's bytes.
#[inline(always)]
const fn acknowledged(entry: &HandoffEntry, this: &HandoffEnd, other: &HandoffEnd, gate: u32) -> u32 {
    let drained = gate == gate::ALONE || is_drained(other);
    if drained && other.seen & seen::ACK != 0 { other.ack.wrapping_sub(entry.dseq) } else { this.first_seq }
}

/// What the other end has been told of its bytes: by this end, or by our socket before.
#[inline(always)]
pub const fn last_ack(this: &HandoffEnd) -> u32 {
    if is_drained(this) { this.ack } else { this.own_seq }
}

#[inline(always)]
fn over(flow: &mut Flow<'_>, why: u32, now_ns: u64, seen: u32) -> bool {
    let first = *flow.closing & closing::OVER == 0;
    flow.this.seen |= seen;
    if first {
        // A reset behind both ends is not how it ended.
        *flow.closing |= why;
        *flow.closed_ns = now_ns;
    }
    first
}

#[inline(always)]
const fn reset_by(entry: &HandoffEntry) -> u32 {
    if entry.direction == proxy_abi::handoff::FROM_CLIENT {
        closing::RESET_BY_CLIENT
    } else {
        closing::RESET_BY_BACKEND
    }
}

#[inline(always)]
const fn first(entry: &HandoffEntry) -> u32 {
    if entry.direction == proxy_abi::handoff::FROM_CLIENT { closing::CLIENT_FIRST } else { closing::BACKEND_FIRST }
}
