//! A network that delays, reorders and loses.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    time::{Duration, Instant},
};

use super::{Carry, Ends, Way};

const ARP: [u8; 2] = [0x08, 0x06];

/// What happens to the n-th frame of a way is a matter of the seed alone.
#[derive(Debug)]
pub struct Weather {
    delay: Duration,
    jitter: Duration,
    per_mille: u64,
    random: [u64; 2],
    taken: u64,
    under_way: BinaryHeap<Reverse<Late>>,
}

/// By the moment it arrives, then as it came.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Late {
    due: Instant,
    nth: u64,
    to_gateway: bool,
    frame: Vec<u8>,
}

impl Weather {
    /// Every frame is late by `delay` and up to `jitter`, which lets later ones overtake it; `per_mille` of a thousand are lost.
    pub fn new(delay: Duration, jitter: Duration, per_mille: u64, seed: u64) -> Self {
        // xorshift stays at zero for ever.
        let random = [seed | 1 << 63, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 62];
        Self { delay, jitter, per_mille, random, taken: 0, under_way: BinaryHeap::new() }
    }

    fn random(&mut self, way: Way) -> u64 {
        let state = &mut self.random[way as usize];
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state >> 8
    }
}

impl Carry for Weather {
    fn take(&mut self, way: Way, frame: Vec<u8>, _ends: &Ends) {
        let lost = self.random(way) % 1000 < self.per_mille;
        let share = self.random(way) % 1000;
        // A second's silence because nobody knows an address is not what is asked for.
        if lost && frame.get(12..14) != Some(&ARP) {
            return;
        }
        self.taken += 1;
        let due = Instant::now() + self.delay + self.jitter * share as u32 / 1000;
        self.under_way.push(Reverse(Late { due, nth: self.taken, to_gateway: way == Way::ToGateway, frame }));
    }

    fn tick(&mut self, ends: &Ends) {
        let now = Instant::now();
        while self.under_way.peek().is_some_and(|Reverse(late)| late.due <= now) {
            if let Some(Reverse(late)) = self.under_way.pop() {
                ends.put(if late.to_gateway { Way::ToGateway } else { Way::FromGateway }, &late.frame);
            }
        }
    }

    fn due(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse(late)| late.due)
    }
}
