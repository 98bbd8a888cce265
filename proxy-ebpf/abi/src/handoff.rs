//! Handed-over flows: keys and values of the maps of `handoff.bpf.o` (docs/handoff.md).
//!
//! A flow is two TCP connections, client to proxy and proxy to backend, and has two directions. The map `ENTRIES` says for each
//! direction how its packets are translated; nothing in it changes while it is there. What changes is in the flow's element of
//! the mmap-able array `FLOWS`: the gate, which userspace sets, and what the program saw.
//!
//! Sequence numbers are those of the connection that is named, in host byte order; arithmetic on them wraps (RFC 9293 §3.4).

pub mod outcome;

use crate::flow::Endpoint;

/// Version of every layout in this module. Pinned maps outlive the daemon: another version is not adopted.
pub const LAYOUT: u32 = 1;

/// Direction of packets from the client to the backend; index of [`HandoffFlow::ends`] for the client.
pub const FROM_CLIENT: u8 = 0;
/// Direction of packets from the backend to the client; index of [`HandoffFlow::ends`] for the backend.
pub const FROM_BACKEND: u8 = 1;

/// The values of [`HandoffFlow::gate`]. Userspace alone writes them.
pub mod gate {
    /// No flow, or one that is armed: packets go to the stack, where the two sockets are.
    pub const CLOSED: u32 = 0;
    /// Committed: packets are translated, and both sockets are still there. Acknowledgements up to [`super::HandoffEnd::own_seq`]
    /// belong to them.
    pub const OPEN: u32 = 1;
    /// The sockets are gone: no packet of this flow is for the stack.
    pub const ALONE: u32 = 2;
}

/// The bits of [`HandoffEntry::options`]. `IN` is what the packets of this direction may carry, `OUT` what the end they go to takes.
pub mod option {
    pub const TIMESTAMPS_IN: u8 = 1 << 0;
    pub const TIMESTAMPS_OUT: u8 = 1 << 1;
    pub const SACK_IN: u8 = 1 << 2;
    pub const SACK_OUT: u8 = 1 << 3;
    pub const ECN_IN: u8 = 1 << 4;
    pub const ECN_OUT: u8 = 1 << 5;
}

/// The bits of [`HandoffFlow::closing`]: why the flow is over, and who was first.
pub mod closing {
    /// Both ends sent FIN, and both FINs are acknowledged.
    pub const FINISHED: u32 = 1 << 0;
    /// The client sent a RST that its own sequence numbers allow.
    pub const RESET_BY_CLIENT: u32 = 1 << 1;
    /// As [`RESET_BY_CLIENT`], of the backend.
    pub const RESET_BY_BACKEND: u32 = 1 << 2;
    /// The client's FIN came before the backend's.
    pub const CLIENT_FIRST: u32 = 1 << 3;
    /// The backend's FIN came before the client's.
    pub const BACKEND_FIRST: u32 = 1 << 4;
    /// The same ports began a new connection after the end: the program deleted both entries.
    pub const REPLACED: u32 = 1 << 5;

    /// Any of these: the flow is over. [`CLIENT_FIRST`] and [`BACKEND_FIRST`] alone are a half-closed flow.
    pub const OVER: u32 = FINISHED | RESET_BY_CLIENT | RESET_BY_BACKEND | REPLACED;
}

/// The bits of [`HandoffEnd::seen`]: what the program saw in packets of this end.
pub mod seen {
    /// [`super::HandoffEnd::clock_offset`] is valid.
    pub const CLOCK: u32 = 1 << 1;
    /// FIN; [`super::HandoffEnd::fin_end`] is valid.
    pub const FIN: u32 = 1 << 2;
    /// This end acknowledged the FIN of the other one.
    pub const ACKED_FIN: u32 = 1 << 3;
    /// RST, with a sequence number of this end's own.
    pub const RST: u32 = 1 << 4;
    /// An acknowledgement: [`super::HandoffEnd::ack`] and `window` are of a packet.
    pub const ACK: u32 = 1 << 5;
}

/// Key of `ENTRIES`: the addresses and ports in packets of one direction, as they arrive.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct HandoffKey {
    pub source: Endpoint,
    /// Zero, as the kernel hashes every byte of a key. The program copies addresses by words, which must be aligned.
    pub padding: [u8; 6],
    pub destination: Endpoint,
    /// [`crate::flow::IPV4`] or [`crate::flow::IPV6`]; both directions of a flow have the same.
    pub ip_version: u8,
    /// Zero.
    pub reserved: [u8; 5],
}

impl HandoffKey {
    const EMPTY: Self = Self::new(Endpoint::v6([0; 16], [0; 2]), Endpoint::v6([0; 16], [0; 2]), 0);

    pub const fn new(source: Endpoint, destination: Endpoint, ip_version: u8) -> Self {
        Self { source, padding: [0; 6], destination, ip_version, reserved: [0; 5] }
    }

    /// The same from words of the packet in memory: addresses (IPv4 in the first word) and the two ports. The program has no bytes to
    /// spare: bytes on its stack are eight times as large.
    #[inline(always)]
    #[expect(unsafe_code, reason = "words are stored as words")]
    pub const fn of_words(source: [u32; 4], destination: [u32; 4], ports: u32, ip_version: u8) -> Self {
        let ([a, b, c, d], [s0, s1, s2, s3], [d0, d1, d2, d3]) = (ports.to_ne_bytes(), source, destination);
        let source_port = u32::from_ne_bytes([a, b, 0, 0]);
        let last = u32::from_ne_bytes([c, d, ip_version, 0]);
        let words = [s0, s1, s2, s3, source_port, 0, d0, d1, d2, d3, last, 0];
        // SAFETY: as many bytes, without padding, and every bit pattern is a value.
        unsafe { core::mem::transmute::<[u32; 12], Self>(words) }
    }
}

/// Value of `ENTRIES`: how packets of one direction become packets of the other connection. Written once.
///
/// "This connection" is the one the packets arrive on, "the other" the one they leave on.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HandoffEntry {
    /// Index of the flow's element of `FLOWS`.
    pub flow: u32,
    /// [`FROM_CLIENT`] or [`FROM_BACKEND`].
    pub direction: u8,
    /// Bits of [`option`].
    pub options: u8,
    /// Window scale of the sender of these packets, 0–14 (RFC 7323): its windows are in units of `1 << scale_in` bytes.
    pub scale_in: u8,
    /// Window scale that our socket announced on the other connection, 0–14.
    pub scale_out: u8,
    /// Added to the sequence number: `write_seq(other) + read_but_not_written − copied_seq(this)`.
    pub dseq: u32,
    /// Subtracted from the acknowledgement and SACK blocks: the `dseq` of the opposite direction.
    pub dack: u32,
    /// Timestamp clock of our socket on the other connection (`TCP_TIMESTAMP`), at [`HandoffEntry::clock_ns`]; in ticks.
    pub clock: u32,
    /// One tick of that clock, in nanoseconds: 1 000 000, or 1 000 with `tcp_usec_ts`. 0 counts as 1 000 000.
    pub clock_tick_ns: u32,
    /// When [`HandoffEntry::clock`] was read: `CLOCK_MONOTONIC`, in nanoseconds.
    pub clock_ns: u64,
    /// Source of the translated packet: our socket's address on the other connection.
    pub source: Endpoint,
    pub padding: [u8; 6],
    /// Destination of the translated packet: the other end.
    pub destination: Endpoint,
    pub reserved: [u8; 6],
}

impl HandoffEntry {
    /// The key under which the packets of the opposite direction are found.
    pub const fn opposite_key(&self, ip_version: u8) -> HandoffKey {
        HandoffKey::new(self.destination, self.source, ip_version)
    }
}

/// Bytes of a flow that belong to userspace: [`HandoffFlow::owner`].
pub const OWNER_BYTES: usize = 64;

/// Element of `FLOWS`: one handed-over flow. mmap-able: userspace reads and sets it without a system call.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandoffFlow {
    /// One of [`gate`]. The one word that switches both directions at once.
    pub gate: u32,
    /// Bits of [`closing`], set by the program.
    pub closing: u32,
    /// The flow's id in the daemon, 0 where there is no flow. Not touched by the program; in its events.
    pub id: u64,
    /// When the flow was over, 0 before: `CLOCK_MONOTONIC`, in nanoseconds.
    pub closed_ns: u64,
    /// Key of the client's packets: with it, both entries of a flow are found. Not touched by the program.
    pub key: HandoffKey,
    /// What the daemon wants to find again after a restart. Not touched by the program.
    pub owner: [u8; OWNER_BYTES],
    /// Client and backend: indexes [`FROM_CLIENT`], [`FROM_BACKEND`]. Each in a line of the cache that the other is not in: different
    /// CPUs write them.
    pub ends: [HandoffEnd; 2],
    pub reserved: [u8; 8],
}

/// What is known of one end of a flow; its sequence numbers are those of the connection to this end.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HandoffEnd {
    /// The byte after the last payload byte that this end sent, as a sequence number that does not wrap: its low 32 bits are on the
    /// wire. Begins as [`HandoffEnd::first_seq`]. Retransmissions do not raise it.
    pub end_seq: u64,
    /// Packets of this end that were translated, super-packets as the segments they are made of. Two CPUs at once may lose one.
    pub packets: u64,
    /// When the last packet of this end came, 0 = none since commit: `CLOCK_MONOTONIC`, in nanoseconds.
    pub last_seen_ns: u64,
    /// Bits of [`seen`].
    pub seen: u32,
    /// Behind the last byte that our socket writes to this end: what it acknowledges up to here is our socket's. Set by userspace, which
    /// raises it for what had slipped into our other socket.
    pub own_seq: u32,
    /// The first byte of this end that our socket had not read at commit: where [`HandoffEnd::end_seq`] begins. Set by userspace.
    pub first_seq: u32,
    /// The last acknowledgement of this end. Begins as what our socket knew at commit.
    pub ack: u32,
    /// Added to the timestamps of this end: its clock to the clock of our vanished socket on the other connection.
    pub clock_offset: u32,
    /// Sequence number after this end's FIN.
    pub fin_end: u32,
    /// Interface on which the last packet of this end came. Userspace sets it at arming to where it expects this end: that is where
    /// packets to it leave when the FIB may not be asked (`net.ipv4.conf.*.forwarding = 0`); 0 = not known.
    pub ifindex: u32,
    /// The last window of this end, as on the wire, unscaled.
    pub window: u16,
    pub reserved: [u8; 2],
}

impl HandoffEnd {
    /// Payload bytes of this end since commit, retransmissions not counted.
    pub const fn bytes(&self) -> u64 {
        self.end_seq.wrapping_sub(self.first_seq as u64)
    }
}

impl HandoffFlow {
    /// No flow.
    pub const EMPTY: Self = Self {
        gate: gate::CLOSED,
        closing: 0,
        id: 0,
        closed_ns: 0,
        key: HandoffKey::EMPTY,
        owner: [0; OWNER_BYTES],
        ends: [HandoffEnd::EMPTY; 2],
        reserved: [0; 8],
    };

    /// Whether the flow has ended, whatever lingers.
    pub const fn is_over(&self) -> bool {
        self.closing & closing::OVER != 0
    }
}

impl HandoffEnd {
    pub const EMPTY: Self = Self {
        end_seq: 0,
        packets: 0,
        last_seen_ns: 0,
        seen: 0,
        own_seq: 0,
        first_seq: 0,
        ack: 0,
        clock_offset: 0,
        fin_end: 0,
        ifindex: 0,
        window: 0,
        reserved: [0; 2],
    };
}

/// One event of the ring buffer `EVENTS`: a flow is over. One for each flow; a second one in rare races of two CPUs, or when a flow that
/// was over is [`closing::REPLACED`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandoffEvent {
    /// Index of the flow in `FLOWS`.
    pub flow: u32,
    /// [`HandoffFlow::closing`] at that moment.
    pub closing: u32,
    /// [`HandoffFlow::id`]: an index is used again, an id is not.
    pub id: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub at_ns: u64,
    /// [`HandoffEnd::bytes`] of client and backend.
    pub bytes: [u64; 2],
    /// [`HandoffEnd::packets`] of client and backend.
    pub packets: [u64; 2],
    /// [`HandoffEnd::seen`] of client and backend.
    pub seen: [u32; 2],
    /// Key of the packet that ended the flow.
    pub key: HandoffKey,
    /// Direction of that packet.
    pub direction: u8,
    pub reserved: [u8; 7],
}

const _: () = assert!(size_of::<HandoffKey>() == 48 && align_of::<HandoffKey>() == 8);
const _: () = assert!(size_of::<HandoffEntry>() == 80 && align_of::<HandoffEntry>() == 8);
const _: () = assert!(size_of::<HandoffEnd>() == 56 && align_of::<HandoffEnd>() == 8);
const _: () = assert!(size_of::<HandoffFlow>() == 256 && align_of::<HandoffFlow>() == 8);
const _: () = assert!(size_of::<HandoffEvent>() == 120 && align_of::<HandoffEvent>() == 8);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::IPV6;

    #[test]
    fn a_key_of_words_is_the_key_of_its_bytes() {
        let address = |first: u8| core::array::from_fn(|n| first + n as u8);
        let (source, destination) = (Endpoint::v6(address(1), [0x12, 0x34]), Endpoint::v6(address(101), [0x56, 0x78]));
        let words = |end: &Endpoint| {
            core::array::from_fn(|n| {
                u32::from_ne_bytes(core::array::from_fn(|byte| end.address.get(4 * n + byte).copied().unwrap_or(0)))
            })
        };
        let ports = u32::from_ne_bytes([0x12, 0x34, 0x56, 0x78]);
        let key = HandoffKey::of_words(words(&source), words(&destination), ports, IPV6);
        assert_eq!(key, HandoffKey::new(source, destination, IPV6));
    }
}
