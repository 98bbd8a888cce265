//! The choice of a backend per connection, where the daemon dials.

use std::net::IpAddr;

use super::{fill, maglev::hash, slots};
use crate::{
    config::{Backend, Balance},
    ruleset::Endpoint,
};

/// Chooses among a route's endpoints; made anew when one of them changes. All of them are eligible whatever their family:
/// who dials need not keep the family of the client.
#[derive(Debug, Clone)]
pub struct Chooser {
    balance: Balance,
    endpoints: Vec<Endpoint>,
    /// Which endpoint each slot leads to, as in the kernel's tables; only those that are up. Empty with least-connections.
    slots: Vec<u32>,
}

/// What a choice depends on.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// As the PROXY header has it, where one was accepted.
    pub client: IpAddr,
    pub random: u64,
    /// One more for each connection of the route.
    pub sequence: u64,
}

impl Chooser {
    /// `backends`: as configured; they fix the number of slots, so that names that resolve anew move few clients.
    pub fn new(balance: Balance, endpoints: Vec<Endpoint>, backends: &[Backend]) -> Self {
        let slots = match balance {
            Balance::LeastConnections => Vec::new(),
            _ => {
                let all: Vec<&Endpoint> = endpoints.iter().collect();
                fill(balance, &all, slots(balance, backends)).into_iter().map(|index| index as u32).collect()
            }
        };
        Self { balance, endpoints, slots }
    }

    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The index of an endpoint that is up and not in `tried`. `active`: connections an endpoint has open. A hash sends a
    /// client to the same endpoint on every node with the same file, and after a failed dial to the same next one.
    pub fn pick(&self, asked: Asked, active: &dyn Fn(usize) -> u64, tried: &[usize]) -> Option<usize> {
        let start = match self.balance {
            Balance::RoundRobin => asked.sequence,
            Balance::Random => asked.random,
            Balance::SourceHash | Balance::Maglev => client_hash(asked.client),
            Balance::LeastConnections => return self.least(asked.sequence, active, tried),
        };
        let count = self.slots.len();
        let start = (start % (count.max(1) as u64)) as usize;
        let (before, after) = self.slots.split_at(start);
        let mut walk = after.iter().chain(before).map(|&index| index as usize);
        walk.find(|index| !tried.contains(index))
    }

    /// The fewest connections for its weight; those that are equal take turns.
    fn least(&self, sequence: u64, active: &dyn Fn(usize) -> u64, tried: &[usize]) -> Option<usize> {
        let count = self.endpoints.len();
        let start = (sequence % (count.max(1) as u64)) as usize;
        let eligible = |&index: &usize| {
            let Endpoint { up, weight, .. } = self.endpoints[index];
            up && weight > 0 && !tried.contains(&index)
        };
        let loads = (start..count).chain(0..start).filter(eligible).map(|index| (index, u128::from(active(index))));
        let weight = |index: usize| u128::from(self.endpoints[index].weight);
        let fewer = |best: (usize, u128), next: (usize, u128)| {
            if next.1 * weight(best.0) < best.1 * weight(next.0) { next } else { best }
        };
        loads.reduce(fewer).map(|(index, _)| index)
    }
}

/// Over the address alone: fixed for ever, as nodes of different versions must agree.
fn client_hash(client: IpAddr) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(ip) => hash(&ip.octets(), u64::from(super::HASH_SEED)),
        IpAddr::V6(ip) => hash(&ip.octets(), u64::from(super::HASH_SEED)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Target;

    const IDLE: &dyn Fn(usize) -> u64 = &|_| 0;

    fn chooser(balance: Balance, hosts: &[(u16, bool)]) -> Chooser {
        let ip = |n: usize| IpAddr::from([10, 0, 1, n as u8 + 1]);
        let endpoint =
            |(n, &(weight, up)): (usize, &(u16, bool))| Endpoint { address: ip(n), port: Some(80), weight, up };
        let backend = |(n, &(weight, _)): (usize, &(u16, bool))| Backend {
            target: Target::Address { ip: ip(n), port: Some(80) },
            weight,
        };
        let backends: Vec<Backend> = hosts.iter().enumerate().map(backend).collect();
        Chooser::new(balance, hosts.iter().enumerate().map(endpoint).collect(), &backends)
    }

    fn asked(n: u64) -> Asked {
        let client = IpAddr::from((n as u32).wrapping_mul(0x9e37_79b9).to_be_bytes());
        Asked { client, random: n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7, sequence: n }
    }

    fn shares(chooser: &Chooser, endpoints: usize) -> Vec<usize> {
        let mut shares = vec![0; endpoints];
        (0..6000).filter_map(|n| chooser.pick(asked(n), IDLE, &[])).for_each(|index| shares[index] += 1);
        shares
    }

    #[test]
    fn round_robin_takes_turns_by_weight() {
        let chooser = chooser(Balance::RoundRobin, &[(2, true), (1, true)]);
        let picks: Vec<_> = (0..6).filter_map(|n| chooser.pick(asked(n), IDLE, &[])).collect();
        assert_eq!(picks, [0, 1, 0, 0, 1, 0]);
    }

    #[test]
    fn every_way_of_choosing_keeps_to_the_weights_and_leaves_out_what_is_down() {
        for balance in [Balance::RoundRobin, Balance::Random, Balance::SourceHash, Balance::Maglev] {
            let found = shares(&chooser(balance, &[(1, true), (2, true), (3, false)]), 3);
            assert_eq!(found[2], 0, "{balance:?}");
            let part = found[0] as f64 / 6000.0;
            assert!((part - 0.333).abs() < 0.04, "{balance:?}: {found:?}");
        }
    }

    #[test]
    fn a_client_stays_with_its_backend_and_has_one_next() {
        for balance in [Balance::SourceHash, Balance::Maglev] {
            let chooser = chooser(balance, &[(1, true); 5]);
            for n in 0..100 {
                let first = chooser.pick(asked(n), IDLE, &[]).expect("one is up");
                let again = Asked { random: 3, sequence: 99, ..asked(n) };
                assert_eq!(chooser.pick(again, IDLE, &[]), Some(first));
                let next = chooser.pick(asked(n), IDLE, &[first]).expect("another is up");
                assert_ne!(next, first);
                assert_eq!(chooser.pick(again, IDLE, &[first]), Some(next));
            }
        }
    }

    #[test]
    fn the_hash_of_a_client_never_changes_between_versions() {
        assert_eq!(client_hash([192, 0, 2, 1].into()), client_hash("::ffff:192.0.2.1".parse().expect("valid")));
        assert_eq!(client_hash([192, 0, 2, 1].into()), 0x8cd299fe64ef9b21);
    }

    #[test]
    fn least_connections_are_counted_for_the_weight_and_equals_take_turns() {
        let chooser = chooser(Balance::LeastConnections, &[(1, true), (4, true), (9, false)]);
        assert_eq!(chooser.pick(asked(0), &|index| [1, 3, 0][index], &[]), Some(1));
        assert_eq!(chooser.pick(asked(0), &|index| [1, 5, 0][index], &[]), Some(0));
        assert_eq!([0, 1, 3].map(|n| chooser.pick(asked(n), IDLE, &[])), [Some(0), Some(1), Some(0)]);
        assert_eq!(chooser.pick(asked(0), IDLE, &[0]), Some(1));
    }

    #[test]
    fn when_all_are_tried_or_down_there_is_none() {
        for balance in
            [Balance::RoundRobin, Balance::Random, Balance::SourceHash, Balance::Maglev, Balance::LeastConnections]
        {
            assert_eq!(chooser(balance, &[(1, true), (1, true)]).pick(asked(1), IDLE, &[1, 0]), None);
            assert_eq!(chooser(balance, &[(1, false)]).pick(asked(1), IDLE, &[]), None);
            assert_eq!(chooser(balance, &[]).pick(asked(1), IDLE, &[]), None);
        }
    }
}
