//! What the handoff program made of a packet: indexes of the map `OUTCOMES`, whose values count packets.

macro_rules! outcomes {
    ($($(#[$doc:meta])* $constant:ident = $index:literal, $name:literal;)*) => {
        $($(#[$doc])* pub const $constant: u32 = $index;)*

        /// The name of an outcome, as `doctor` and the metrics print it; `None` past [`COUNT`].
        pub const fn name(outcome: u32) -> Option<&'static str> {
            match outcome {
                $($index => Some($name),)*
                _ => None,
            }
        }
    };
}

outcomes! {
    /// Not TCP over IP, or of no flow: to the stack.
    NOT_OURS = 0, "not_ours";
    /// Of a flow whose gate is closed: to the stack.
    PENDING = 1, "pending";
    /// Translated and sent on.
    TRANSLATED = 2, "translated";
    /// An acknowledgement of what our own socket wrote: to the stack, where that socket still is.
    OWN_ACK = 3, "own_ack";
    /// Translated, but the next hop's address is not known yet: the neighbour layer resolves it and sends.
    NEIGHBOUR = 4, "neighbour";
    /// Translated and sent where packets of the other end come from: forwarding is off, the FIB may not be asked.
    BY_LAST_INTERFACE = 5, "by_last_interface";
    /// A SYN on a flow that is over: its entries are deleted, the SYN goes to the stack.
    REPLACED = 6, "replaced";
    /// A SYN on a live flow: the other end gets a keep-alive probe instead (RFC 5961).
    PROBED = 7, "probed";
    /// An ICMP error about a translated packet, translated and sent on to the end whose packet it was.
    ICMP_TRANSLATED = 8, "icmp_translated";
    /// An ICMP error about a packet that our own socket sent: to the stack.
    ICMP_OWN = 9, "icmp_own";
    /// Dropped: a fragment of a flow's packet. Its sequence number cannot be told from the rest.
    FRAGMENT = 10, "fragment";
    /// Dropped: IP options.
    IP_OPTIONS = 11, "ip_options";
    /// Dropped: a TTL or hop limit of 1 or 0.
    TTL_EXPIRED = 12, "ttl_expired";
    /// Dropped: headers that contradict themselves, or a packet that ends before they do.
    MALFORMED = 13, "malformed";
    /// Dropped: SYN and ACK on a flow that is established.
    SYN_ACK = 14, "syn_ack";
    /// Dropped: the FIB has no way to the other end.
    NO_ROUTE = 15, "no_route";
    /// Dropped: larger than the MTU of the way to the other end, and not answered.
    TOO_BIG = 16, "too_big";
    /// Larger than the MTU of the way to the other end: its sender was told so.
    TOLD_TOO_BIG = 17, "told_too_big";
    /// Dropped: a helper of the kernel refused to change the packet.
    NOT_WRITABLE = 18, "not_writable";
    /// The ring buffer was full: an end of a flow was not told. Its element of `FLOWS` says it.
    EVENT_LOST = 19, "event_lost";
}

/// Number of outcomes: the size of the map `OUTCOMES`.
pub const COUNT: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_a_name_and_nothing_beyond() {
        assert!((0..COUNT).all(|outcome| name(outcome).is_some()));
        assert_eq!(name(COUNT), None);
    }
}
