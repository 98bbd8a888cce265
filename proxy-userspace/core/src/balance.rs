//! Which backend gets which share: slot tables that the kernel indexes with a counter, a random number or a hash.
//!
//! The number of slots of a route is fixed by its configuration, so that a backend that goes down or comes back
//! changes elements only and never a rule.

mod chooser;
mod maglev;
mod weighted;

pub use chooser::{Asked, Chooser};
pub use maglev::maglev;
pub use weighted::{homes, round_robin};

use crate::{
    config::{Backend, Balance, Target},
    ruleset::Endpoint,
};

/// Seed of `jhash` over the client address; a constant, so that every node from the same file sends a client to the same backend.
pub const HASH_SEED: u32 = 0x5348_4e54;

/// Table sizes for Maglev: primes. At least 100 slots per backend keep the shares within 1 % (Eisenbud et al., NSDI 2016, §5.3).
const MAGLEV_SIZES: [u32; 7] = [251, 509, 1021, 2039, 4093, 8191, 16381];

/// Slots for names, whose number of addresses is not known beforehand.
const NAME_SLOTS: u32 = 1024;
const MAX_SEQUENCE: u32 = 4096;
const MIN_SEQUENCE: u32 = 32;

/// Number of slots of a route with these backends: 1–16,381.
pub fn slots(balance: Balance, backends: &[Backend]) -> u32 {
    match balance {
        Balance::RoundRobin | Balance::Random | Balance::LeastConnections => sequence_slots(backends),
        // At least 16 slots per backend, a power of two.
        Balance::SourceHash => (backends.len() as u32 * 16).next_power_of_two().clamp(256, 16_384),
        Balance::Maglev => {
            let wanted = backends.len() as u32 * 100;
            MAGLEV_SIZES.into_iter().find(|&size| size >= wanted).unwrap_or(MAGLEV_SIZES[6])
        }
    }
}

/// Which endpoint each slot goes to; empty when none is up.
pub fn fill(balance: Balance, endpoints: &[&Endpoint], slots: u32) -> Vec<usize> {
    let weight = |e: &&Endpoint| if e.up { e.weight } else { 0 };
    let weights: Vec<u16> = endpoints.iter().map(weight).collect();
    match balance {
        Balance::RoundRobin | Balance::Random | Balance::LeastConnections => round_robin(&weights, slots),
        Balance::SourceHash => {
            let all: Vec<u16> = endpoints.iter().map(|e| e.weight).collect();
            let up: Vec<bool> = endpoints.iter().map(|e| e.up).collect();
            homes(&all, &up, slots)
        }
        Balance::Maglev => {
            let names: Vec<String> =
                endpoints.iter().map(|e| format!("{}:{}", e.address, e.port.unwrap_or_default())).collect();
            let named: Vec<(&str, u16)> = names.iter().map(String::as_str).zip(weights).collect();
            maglev(&named, slots)
        }
    }
}

/// A multiple of the sum of the weights, so that with every backend up the shares are exact.
fn sequence_slots(backends: &[Backend]) -> u32 {
    if backends.iter().any(|b| matches!(b.target, Target::Name { .. })) {
        return NAME_SLOTS;
    }
    let divisor = backends.iter().map(|b| u32::from(b.weight)).fold(0, gcd).max(1);
    let sum: u32 = backends.iter().map(|b| u32::from(b.weight) / divisor).sum::<u32>().max(1);
    if sum > MAX_SEQUENCE { MAX_SEQUENCE } else { sum * MIN_SEQUENCE.div_ceil(sum) }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(weights: &[u16]) -> Vec<Backend> {
        let ip = |i: usize| std::net::IpAddr::from([10, 0, 0, i as u8]);
        let target = |i| Target::Address { ip: ip(i), port: Some(80) };
        weights.iter().enumerate().map(|(i, &weight)| Backend { target: target(i), weight }).collect()
    }

    #[test]
    fn the_slots_of_a_sequence_are_a_multiple_of_the_sum_of_the_weights() {
        assert_eq!(slots(Balance::RoundRobin, &backends(&[1, 1])), 32);
        assert_eq!(slots(Balance::RoundRobin, &backends(&[1, 2])), 33);
        assert_eq!(slots(Balance::RoundRobin, &backends(&[100, 200])), 33);
        assert_eq!(slots(Balance::RoundRobin, &backends(&[7, 256])), 263);
        assert_eq!(slots(Balance::RoundRobin, &backends(&[255; 40])), 40);
        assert_eq!(slots(Balance::RoundRobin, &backends(&[255, 256].repeat(30))), 4096);
    }

    #[test]
    fn a_maglev_table_has_a_hundred_slots_per_backend() {
        assert_eq!(slots(Balance::Maglev, &backends(&[1; 2])), 251);
        assert_eq!(slots(Balance::Maglev, &backends(&[1; 10])), 1021);
        assert_eq!(slots(Balance::Maglev, &backends(&[1; 200])), 16381);
    }
}
