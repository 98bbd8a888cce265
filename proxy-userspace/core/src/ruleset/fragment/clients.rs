//! Networks of clients as disjoint ranges, the form interval sets take.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{Context, Family, family_of};
use crate::plan::SharedListen;

/// The ranges of `nets` that are of `family`, merged, ascending, disjoint.
pub fn ranges(nets: &[IpNet], family: Family) -> Vec<(IpAddr, IpAddr)> {
    let mut ranges: Vec<(u128, u128)> = nets.iter().filter(|n| family_of(n.addr()) == family).map(bounds).collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if first <= previous.1.saturating_add(1) => previous.1 = previous.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged.into_iter().map(|(first, last)| (address(first, family), address(last, family))).collect()
}

/// Which route serves which clients, as ranges: the longest prefix wins, then file order. Clients of no range have no route.
pub fn segments(shared: &SharedListen, family: Family, context: &Context<'_>) -> Vec<(IpAddr, IpAddr, u32)> {
    let mut prefixes = Vec::new();
    for member in &shared.members {
        let Some(mark) = context.marks.mark(&member.route) else { continue };
        let whole = IpNet::new_assert(unspecified(family), 0);
        let nets = if member.client.is_empty() { vec![whole] } else { member.client.clone() };
        prefixes.extend(nets.into_iter().filter(|n| family_of(n.addr()) == family).map(|net| (bounds(&net), mark)));
    }
    flatten(prefixes)
        .into_iter()
        .map(|((first, last), mark)| (address(first, family), address(last, family), mark))
        .collect()
}

/// Nested or disjoint ranges → disjoint ones, the innermost winning. Of equal ones the first wins.
fn flatten(mut prefixes: Vec<((u128, u128), u32)>) -> Vec<((u128, u128), u32)> {
    // Outer before inner; the sort is stable, so of equal ones the first stays first, and `dedup` keeps it.
    prefixes.sort_by_key(|&((first, last), _)| (first, std::cmp::Reverse(last)));
    prefixes.dedup_by_key(|&mut (range, _)| range);
    let mut out: Vec<((u128, u128), u32)> = Vec::new();
    let mut open: Vec<(u128, u32)> = Vec::new();
    let mut at = 0u128;
    let close = |open: &mut Vec<(u128, u32)>, at: &mut u128, before: Option<u128>, out: &mut Vec<_>| {
        while let Some(&(last, mark)) = open.last() {
            if before.is_some_and(|b| last >= b) {
                break;
            }
            open.pop();
            if *at <= last {
                push(out, *at, last, mark);
                *at = last.saturating_add(1);
            }
        }
    };
    for ((first, last), mark) in prefixes {
        close(&mut open, &mut at, Some(first), &mut out);
        if let Some(&(_, outer)) = open.last()
            && at < first
        {
            push(&mut out, at, first - 1, outer);
        }
        at = first;
        open.push((last, mark));
    }
    close(&mut open, &mut at, None, &mut out);
    out
}

fn push(out: &mut Vec<((u128, u128), u32)>, first: u128, last: u128, mark: u32) {
    match out.last_mut() {
        Some(((_, end), m)) if *m == mark && end.checked_add(1) == Some(first) => *end = last,
        _ => out.push(((first, last), mark)),
    }
}

fn bounds(net: &IpNet) -> (u128, u128) {
    (number(net.network()), number(net.broadcast()))
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

fn address(number: u128, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(number as u32).into(),
        Family::V6 => Ipv6Addr::from(number).into(),
    }
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn overlapping_and_adjacent_networks_are_merged() {
        let nets: Vec<IpNet> = ["10.0.0.0/25", "10.0.0.128/25", "10.0.0.7/32", "fd00::/8", "0.0.0.0/32"]
            .map(|n| n.parse().expect("valid"))
            .into();
        let ip = |s: &str| s.parse::<IpAddr>().expect("valid");
        assert_eq!(ranges(&nets, Family::V4), [(ip("0.0.0.0"), ip("0.0.0.0")), (ip("10.0.0.0"), ip("10.0.0.255")),]);
        assert_eq!(
            ranges(&["0.0.0.0/0".parse().expect("valid")], Family::V4),
            [(ip("0.0.0.0"), ip("255.255.255.255"))]
        );
    }

    proptest! {
        #[test]
        fn the_longest_prefix_wins(prefixes in prop::collection::vec((any::<u8>(), 0u8..=8), 0..12)) {
            // Prefixes over an 8-bit address space, against a look-up by hand.
            let ranges: Vec<((u128, u128), u32)> = prefixes.iter().enumerate().map(|(i, &(address, length))| {
                let size = 1u128 << (8 - length);
                let first = u128::from(address) / size * size;
                ((first, first + size - 1), i as u32)
            }).collect();
            let flat = flatten(ranges.clone());
            for pair in flat.windows(2) {
                prop_assert!(pair[0].0.1 < pair[1].0.0);
            }
            for client in 0..256u128 {
                let wanted = ranges.iter().enumerate()
                    .filter(|(_, ((first, last), _))| (*first..=*last).contains(&client))
                    .min_by_key(|(i, ((first, last), _))| (last - first, *i)).map(|(_, &(_, mark))| mark);
                let got = flat.iter().find(|((first, last), _)| (*first..=*last).contains(&client)).map(|&(_, mark)| mark);
                prop_assert_eq!(got, wanted);
            }
        }
    }
}
