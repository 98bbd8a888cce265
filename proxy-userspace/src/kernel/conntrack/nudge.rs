//! Makes the ends of a cut flow speak, so that they hear at once that it is cut.
//!
//! A silent end learns of a reset only when it sends something. A SYN inside an established connection makes either end
//! answer with a challenge ACK (RFC 9293 §3.10.7.4, RFC 5961 §4); the ruleset answers that ACK with a reset whose numbers
//! are right, because they come from the ACK itself. Conntrack lets such a SYN pass and translates it without changing
//! its own state (`TCP_CONNTRACK_IGNORE` in `nf_conntrack_tcp_packet`).

use proxy_core::conntrack::{Entry, Tuple};

use crate::kernel::segment::{ACK, SYN, Segment, Sender};

/// Without `CAP_NET_RAW` a cut flow hears of its end with its next packet.
#[derive(Debug)]
pub struct Nudge(Sender);

impl Nudge {
    pub fn open() -> Self {
        Self(Sender::open())
    }

    /// Sends both ends something to answer. Lost packets are not missed: the next packet of either end does as well.
    pub fn both_ends(&self, entry: &Entry) {
        self.send(entry.original, SYN);
        self.send(entry.reply, SYN | ACK);
    }

    /// Sequence and acknowledgement number zero: a challenge is due whatever they are, and conntrack must not take a
    /// SYN-ACK for the answer to the SYN.
    fn send(&self, Tuple { source, destination }: Tuple, flags: u8) {
        self.0.send(source, destination, Segment { flags, ..Segment::default() });
    }
}
