//! A hierarchical timer wheel (Varghese & Lauck, "Hashed and Hierarchical Timing Wheels", SOSP 1987, scheme 7).
//!
//! One timer per key, set, moved and cleared in constant time: what a connection does between two of its deadlines costs
//! nothing here. Deadlines are rounded up to 16 ms; one further away than the wheel reaches (about three days) comes early, so
//! who is woken asks again whether its time has come.

use crate::session::Tick;

/// Milliseconds per step of the finest ring.
const STEP: u64 = 16;
const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
const RINGS: usize = 4;
const NONE: u32 = u32::MAX;

/// Timers by key, a small number the caller gives out again.
#[derive(Debug)]
pub struct Wheel {
    /// Heads of the lists, ring by ring.
    heads: [u32; RINGS * SLOTS],
    nodes: Vec<Node>,
    /// The step that has been reached.
    at: u64,
    armed: usize,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    next: u32,
    previous: u32,
    /// The step it is due in.
    due: u64,
    /// Index into `heads`; `NONE` when not armed.
    slot: u32,
}

const IDLE: Node = Node { next: NONE, previous: NONE, due: 0, slot: NONE };

impl Wheel {
    pub fn new(now: Tick) -> Self {
        Self { heads: [NONE; RINGS * SLOTS], nodes: Vec::new(), at: now.0 / STEP, armed: 0 }
    }

    /// Timers that are set.
    pub fn len(&self) -> usize {
        self.armed
    }

    pub fn is_empty(&self) -> bool {
        self.armed == 0
    }

    /// Sets the timer of `key`, or moves it.
    pub fn set(&mut self, key: u32, due: Tick) {
        self.clear(key);
        let index = key as usize;
        if index >= self.nodes.len() {
            self.nodes.resize(index + 1, IDLE);
        }
        self.nodes[index].due = due.0.div_ceil(STEP).max(self.at + 1);
        self.armed += 1;
        self.link(key);
    }

    /// When the timer of `key` will wake, if it is set: not after its deadline's step.
    pub fn due(&self, key: u32) -> Option<Tick> {
        self.nodes.get(key as usize).filter(|node| node.slot != NONE).map(|node| Tick(node.due * STEP))
    }

    pub fn clear(&mut self, key: u32) {
        let Some(node) = self.nodes.get(key as usize).copied().filter(|node| node.slot != NONE) else { return };
        match node.previous {
            NONE => self.heads[node.slot as usize] = node.next,
            previous => self.nodes[previous as usize].next = node.next,
        }
        if node.next != NONE {
            self.nodes[node.next as usize].previous = node.previous;
        }
        self.nodes[key as usize] = IDLE;
        self.armed -= 1;
    }

    /// Moves on to `now` and adds the keys whose time has come to `into`; their timers are cleared.
    pub fn advance(&mut self, now: Tick, into: &mut Vec<u32>) {
        let target = now.0 / STEP;
        if self.armed == 0 {
            self.at = self.at.max(target);
        }
        while self.at < target {
            self.at += 1;
            let rings = (1..RINGS as u32).take_while(|ring| self.at.is_multiple_of(1 << (BITS * ring))).count();
            for ring in (1..=rings).rev() {
                self.spread(ring);
            }
            self.expire(self.at as usize % SLOTS, into);
        }
    }

    /// When [`Self::advance`] should be called next: not after the first deadline, and seldom long before it.
    pub fn next(&self) -> Option<Tick> {
        if self.armed == 0 {
            return None;
        }
        // The rest of the finest ring, then the first moment a coarser slot is spread.
        let last = self.at | (SLOTS as u64 - 1);
        let due = (self.at + 1..=last).find(|step| self.heads[*step as usize % SLOTS] != NONE);
        Some(Tick(due.unwrap_or(last + 1) * STEP))
    }

    fn expire(&mut self, slot: usize, into: &mut Vec<u32>) {
        let mut key = std::mem::replace(&mut self.heads[slot], NONE);
        while key != NONE {
            let node = std::mem::replace(&mut self.nodes[key as usize], IDLE);
            self.armed -= 1;
            into.push(key);
            key = node.next;
        }
    }

    /// Brings the timers of a coarse slot into the finer rings.
    fn spread(&mut self, ring: usize) {
        let slot = ring * SLOTS + (self.at >> (BITS * ring as u32)) as usize % SLOTS;
        let mut key = std::mem::replace(&mut self.heads[slot], NONE);
        while key != NONE {
            let next = self.nodes[key as usize].next;
            self.link(key);
            key = next;
        }
    }

    fn link(&mut self, key: u32) {
        let away = self.nodes[key as usize].due.saturating_sub(self.at);
        let reach = |ring: usize| 1u64 << (BITS * (ring as u32 + 1));
        let ring = (0..RINGS).find(|ring| away < reach(*ring)).unwrap_or(RINGS - 1);
        // Beyond the last ring: woken when that one has turned.
        let due = self.nodes[key as usize].due.min(self.at + reach(ring) - 1);
        let slot = ring * SLOTS + (due >> (BITS * ring as u32)) as usize % SLOTS;
        let head = std::mem::replace(&mut self.heads[slot], key);
        if head != NONE {
            self.nodes[head as usize].previous = key;
        }
        self.nodes[key as usize] = Node { next: head, previous: NONE, due, slot: slot as u32 };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_timer_wakes_within_a_step_of_its_deadline_however_far_it_is() {
        for away in [1, 15, 16, 17, 1_000, 1_024, 65_536, 70_000, 4_194_304, 10_000_000, 200_000_000] {
            let start = 12_345;
            let (mut wheel, mut woken) = (Wheel::new(Tick(start)), Vec::new());
            wheel.set(3, Tick(start + away));
            wheel.advance(Tick(start + away - 1), &mut woken);
            assert!(woken.is_empty(), "{away} ms: too early");
            wheel.advance(Tick(start + away + STEP), &mut woken);
            assert_eq!(woken, [3], "{away} ms");
            assert!(wheel.is_empty());
        }
    }

    #[test]
    fn the_next_wake_up_is_never_late_and_a_long_wait_takes_few() {
        let (mut wheel, mut woken) = (Wheel::new(Tick(0)), Vec::new());
        wheel.set(0, Tick(14_400_000));
        let mut steps = 0;
        while let Some(next) = wheel.next() {
            assert!(next.0 <= 14_400_000 + STEP);
            wheel.advance(next, &mut woken);
            steps += 1;
        }
        assert_eq!(woken, [0]);
        // Four hours: once per turn of the finest ring, a second each.
        assert!(steps <= 14_400 + SLOTS, "{steps}");
    }

    proptest! {
        #[test]
        fn it_does_what_a_sorted_map_does(
            operations in prop::collection::vec((0u32..20, prop::option::of(0u64..300_000), 0u64..5_000), 1..200)
        ) {
            let (mut wheel, mut model, mut now) = (Wheel::new(Tick(0)), BTreeMap::new(), 0u64);
            for (key, due, wait) in operations {
                match due {
                    Some(away) => {
                        wheel.set(key, Tick(now + away));
                        model.insert(key, (now + away).div_ceil(STEP).max(now / STEP + 1));
                    }
                    None => {
                        wheel.clear(key);
                        model.remove(&key);
                    }
                }
                now += wait;
                let mut woken = Vec::new();
                wheel.advance(Tick(now), &mut woken);
                woken.sort_unstable();
                let mut expected: Vec<u32> = model.iter().filter(|(_, at)| **at <= now / STEP).map(|(k, _)| *k).collect();
                expected.sort_unstable();
                model.retain(|_, at| *at > now / STEP);
                prop_assert_eq!(woken, expected);
                prop_assert_eq!(wheel.len(), model.len());
            }
        }
    }
}
