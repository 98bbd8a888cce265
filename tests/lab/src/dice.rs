//! Choices at random that a failing test can make again.

/// xorshift64*, from a seed.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        dice.roll(1);
        dice.roll(1);
        dice
    }

    /// 0 up to, not including, `sides`.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        // The lowest bits are the least random.
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % sides
    }

    pub fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }

    /// Up to `most`; small ones are as likely as large ones.
    pub fn size(&mut self, most: u64) -> u64 {
        let digits = self.roll(u64::from(most.ilog2()) + 1);
        self.roll(1 << digits)
    }
}
