//! What shunt keeps in the conntrack mark: the route's id, and how the connection ended so far.

use crate::config::MarkMask;

/// How a connection stands, in the lowest three bits of shunt's part of the mark. The ruleset writes them as FIN and
/// RST packets pass, so the kernel remembers the end of a connection also while no daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum End {
    Open = 0,
    /// The client's FIN has passed.
    ClientFinished = 1,
    /// The backend's FIN has passed.
    BackendFinished = 2,
    /// Written by the daemon: the ruleset answers every later packet with a reset. The entry goes within a second.
    Cut = 3,
    FinishedClientFirst = 4,
    FinishedBackendFirst = 5,
    ResetByClient = 6,
    ResetByBackend = 7,
}

impl End {
    /// In the order of their numbers.
    pub const ALL: [End; 8] = [
        End::Open,
        End::ClientFinished,
        End::BackendFinished,
        End::Cut,
        End::FinishedClientFirst,
        End::FinishedBackendFirst,
        End::ResetByClient,
        End::ResetByBackend,
    ];

    /// Bits of the end number: three.
    const BITS: u32 = 3;
}

/// Where route id and end bits lie inside the configured [`MarkMask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkLayout {
    mask: u32,
}

impl MarkLayout {
    pub const fn new(mask: MarkMask) -> Self {
        Self { mask: mask.bits() }
    }

    const fn shift(self) -> u32 {
        self.mask.trailing_zeros()
    }

    /// Every bit that is shunt's.
    pub const fn mask(self) -> u32 {
        self.mask
    }

    /// The bits of the end number.
    pub const fn end_mask(self) -> u32 {
        ((1 << End::BITS) - 1) << self.shift()
    }

    /// The bit that is set in what has ended and clear in what lives: the kernel can compare bits of the mark with one
    /// value, so one pass over its table finds the living among many that linger.
    pub const fn over_mask(self) -> u32 {
        self.end_bits(End::FinishedClientFirst)
    }

    /// The bits of the route's id.
    pub const fn id_mask(self) -> u32 {
        self.mask & !self.end_mask()
    }

    /// The mark of route `id` with the end bits clear ([`End::Open`]). `None` for 0 and for an id that does not fit.
    pub const fn route_mark(self, id: u32) -> Option<u32> {
        if id == 0 || id > self.max_route_id() { None } else { Some(id << (self.shift() + End::BITS)) }
    }

    pub const fn max_route_id(self) -> u32 {
        self.id_mask() >> (self.shift() + End::BITS)
    }

    /// `None` when the connection is not shunt's.
    pub const fn route_id(self, mark: u32) -> Option<u32> {
        match (mark & self.id_mask()) >> (self.shift() + End::BITS) {
            0 => None,
            id => Some(id),
        }
    }

    pub const fn end(self, mark: u32) -> End {
        End::ALL[((mark & self.end_mask()) >> self.shift()) as usize]
    }

    pub const fn end_bits(self, end: End) -> u32 {
        (end as u32) << self.shift()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_default_mask_leaves_the_low_byte_to_others() {
        let layout = MarkLayout::new(MarkMask::DEFAULT);
        assert_eq!(layout.end_mask(), 0x700);
        assert_eq!(layout.id_mask(), 0xffff_f800);
        assert_eq!(layout.route_mark(1), Some(0x800));
        assert_eq!(layout.route_mark(0), None);
        assert_eq!(layout.route_mark(1 << 21), None);
        assert_eq!(layout.end(0x0000_0bff), End::Cut);
    }

    #[test]
    fn one_bit_tells_what_has_ended_from_what_lives_or_is_being_cut() {
        let layout = MarkLayout::new(MarkMask::DEFAULT);
        let over = |end: &End| layout.end_bits(*end) & layout.over_mask() != 0;
        let alive: Vec<End> = End::ALL.into_iter().filter(|end| !over(end)).collect();
        assert_eq!(alive, [End::Open, End::ClientFinished, End::BackendFinished, End::Cut]);
    }

    proptest! {
        #[test]
        fn a_mark_keeps_id_and_end_apart(start in 0u32..=24, extra in 0u32..=24, id in 1u32.., end in 0usize..8, other: u32) {
            let bits = 8 + extra.min(24 - start);
            let mask = (u64::from(u32::MAX) >> (32 - bits) << start) as u32;
            let layout = MarkLayout::new(MarkMask::new(mask).expect("contiguous"));
            let id = 1 + id % layout.max_route_id();
            let mark = layout.route_mark(id).expect("fits") | layout.end_bits(End::ALL[end]) | (other & !mask);
            prop_assert_eq!(layout.route_id(mark), Some(id));
            prop_assert_eq!(layout.end(mark), End::ALL[end]);
            prop_assert_eq!(layout.route_id(other & !layout.id_mask()), None);
            prop_assert_eq!(layout.route_mark(layout.max_route_id() + 1), None);
        }
    }
}
