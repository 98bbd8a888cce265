//! What a program made of a packet: indexes of the map `OUTCOMES`, whose values count packets.

/// A TCP or UDP packet, counted in its flow.
pub const COUNTED: u32 = 0;
/// Neither IPv4 nor IPv6.
pub const NOT_IP: u32 = 1;
/// IP, but the header after it is neither TCP nor UDP.
pub const OTHER_PROTOCOL: u32 = 2;
/// A fragment: without all its parts its payload cannot be told.
pub const FRAGMENT: u32 = 3;
/// The packet ends before its headers, or before the length they state.
pub const TRUNCATED: u32 = 4;
/// The headers contradict themselves.
pub const MALFORMED: u32 = 5;
/// The flow table is full.
pub const TABLE_FULL: u32 = 6;

/// Number of outcomes: the size of the map `OUTCOMES`.
pub const COUNT: u32 = 7;

/// The name of an outcome, as `doctor` prints it; `None` past [`COUNT`].
pub const fn name(outcome: u32) -> Option<&'static str> {
    match outcome {
        COUNTED => Some("counted"),
        NOT_IP => Some("not_ip"),
        OTHER_PROTOCOL => Some("other_protocol"),
        FRAGMENT => Some("fragment"),
        TRUNCATED => Some("truncated"),
        MALFORMED => Some("malformed"),
        TABLE_FULL => Some("table_full"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_a_name_and_nothing_beyond() {
        assert!((0..COUNT).all(|outcome| name(outcome).is_some()));
        assert_eq!(name(COUNT), None);
    }
}
