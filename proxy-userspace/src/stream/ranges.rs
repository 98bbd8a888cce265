//! Which ports have sockets of their own, and which are led to one socket by `sk_lookup` ([`crate::kernel::lookup`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
};

use proxy_abi::lookup::{LEAVE, REFUSE};
use proxy_core::plan::PORTS_WITH_OWN_SOCKETS;

use crate::kernel::lookup::Block;

/// The ports of an address that the same routes share.
pub type Group = (IpAddr, Vec<u32>);

/// How the listen addresses are served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// Each with a socket per worker.
    pub own: BTreeSet<SocketAddr>,
    /// Each group of ports with a socket per worker.
    pub groups: BTreeMap<Group, Vec<RangeInclusive<u16>>>,
}

/// Where a group's sockets are bound, and their place in the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home {
    /// A free port of the loopback interface.
    pub address: SocketAddr,
    pub place: u32,
}

impl Layout {
    /// All with sockets of their own.
    pub fn own(listens: &BTreeMap<SocketAddr, Vec<u32>>) -> Self {
        Self { own: listens.keys().copied().collect(), groups: BTreeMap::new() }
    }

    /// Where the same routes have more than a handful of an address's ports, those share a socket; at most `most` groups.
    pub fn grouped(listens: &BTreeMap<SocketAddr, Vec<u32>>, most: usize) -> Self {
        let mut ports: BTreeMap<(IpAddr, &[u32]), Vec<u16>> = BTreeMap::new();
        for (address, routes) in listens {
            ports.entry((address.ip(), routes)).or_default().push(address.port());
        }
        let mut layout = Self::default();
        for ((ip, routes), ports) in ports {
            if ports.len() <= PORTS_WITH_OWN_SOCKETS || layout.groups.len() >= most {
                layout.own.extend(ports.into_iter().map(|port| SocketAddr::new(ip, port)));
            } else {
                layout.groups.insert((ip, routes.to_vec()), runs(&ports));
            }
        }
        layout
    }

    /// What the program is to be told.
    pub fn blocks(&self, homes: &BTreeMap<Group, Home>) -> BTreeMap<Block, u32> {
        let mut table = BTreeMap::new();
        for (shared, ranges) in &self.groups {
            let Some(home) = homes.get(shared) else { continue };
            let blocks = ranges.iter().flat_map(|range| aligned(shared.0, range));
            table.extend(blocks.map(|block| (block, home.place)));
        }
        // A socket of one address comes before a group of all addresses.
        for own in self.own.iter().filter(|own| self.everywhere(own).is_some()) {
            table.insert(whole(*own), LEAVE);
        }
        // Nobody dials a group by where it is bound.
        for home in homes.values() {
            let led = self.everywhere(&home.address).and_then(|shared| homes.get(shared));
            table.entry(whole(home.address)).or_insert(led.map_or(REFUSE, |home| home.place));
        }
        table
    }

    /// The group that has the port at all addresses.
    fn everywhere(&self, address: &SocketAddr) -> Option<&Group> {
        let any = any_like(address.ip());
        let has = |ranges: &[RangeInclusive<u16>]| ranges.iter().any(|range| range.contains(&address.port()));
        let found = self.groups.iter().find(|((ip, _), ranges)| *ip == any && has(ranges));
        found.map(|(shared, _)| shared)
    }
}

/// Whether a block has a port of one that is held already.
pub fn overlaps(held: &BTreeMap<Block, u32>, block: &Block) -> bool {
    let last = block.port | u16::MAX.checked_shr(u32::from(block.bits)).unwrap_or_default();
    let inside = Block { bits: 0, ..*block }..=Block { port: last, bits: 16, ..*block };
    let around = |bits: u8| {
        let mask = !u16::MAX.checked_shr(u32::from(bits)).unwrap_or_default();
        held.contains_key(&Block { port: block.port & mask, bits, ..*block })
    };
    held.range(inside).next().is_some() || (0..=block.bits).any(around)
}

fn any_like(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The loopback address of the family.
pub fn loopback_like(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

fn whole(address: SocketAddr) -> Block {
    Block { address: address.ip(), port: address.port(), bits: 16 }
}

/// Ascending ports as ranges.
fn runs(ports: &[u16]) -> Vec<RangeInclusive<u16>> {
    let breaks = ports.chunk_by(|one, next| one.checked_add(1) == Some(*next));
    breaks.filter_map(|run| Some(*run.first()?..=*run.last()?)).collect()
}

/// The fewest aligned blocks that make up a range.
fn aligned(address: IpAddr, range: &RangeInclusive<u16>) -> Vec<Block> {
    let (mut from, end) = (u32::from(*range.start()), u32::from(*range.end()) + 1);
    let mut blocks = Vec::new();
    while from < end {
        let fits = (end - from).ilog2();
        let size = if from == 0 { fits } else { from.trailing_zeros().min(fits) };
        blocks.push(Block { address, port: from as u16, bits: 16 - size as u8 });
        from += 1 << size;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ip: &str, ports: RangeInclusive<u16>, routes: &[u32]) -> Vec<(SocketAddr, Vec<u32>)> {
        let ip: IpAddr = ip.parse().expect("an address");
        ports.map(|port| (SocketAddr::new(ip, port), routes.to_vec())).collect()
    }

    fn homes(layout: &Layout) -> BTreeMap<Group, Home> {
        let home = |(place, shared): (u32, &Group)| {
            let address = SocketAddr::new(loopback_like(shared.0), 60_000 + place as u16);
            (shared.clone(), Home { address, place })
        };
        (0..).zip(layout.groups.keys()).map(home).collect()
    }

    /// As the program looks it up.
    fn led(table: &BTreeMap<Block, u32>, dialled: &str) -> Option<u32> {
        let dialled: SocketAddr = dialled.parse().expect("an address");
        let find = |address: IpAddr| {
            (0..=16u8).rev().find_map(|bits| {
                let mask = !u16::MAX.checked_shr(u32::from(bits)).unwrap_or_default();
                table.get(&Block { address, port: dialled.port() & mask, bits }).copied()
            })
        };
        find(dialled.ip()).or_else(|| find(any_like(dialled.ip())))
    }

    #[test]
    fn every_range_is_made_of_blocks_that_cover_it_exactly() {
        let ip = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        for (first, last) in [(1, 1), (1, 65_535), (1000, 50_999), (0, 65_535), (65_535, 65_535), (8, 15), (7, 16)] {
            let blocks = aligned(ip, &(first..=last));
            assert!(blocks.len() <= 30, "{blocks:?}");
            let mut covered = Vec::new();
            for block in &blocks {
                let size = 1u32 << (16 - block.bits);
                assert_eq!(u32::from(block.port) % size, 0);
                covered.extend(u32::from(block.port)..u32::from(block.port) + size);
            }
            assert_eq!(covered, (u32::from(first)..=u32::from(last)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_handful_of_ports_keep_their_sockets_and_more_share_one() {
        let listens = [at("10.0.0.1", 80..=95, &[1]), at("10.0.0.1", 1000..=50_999, &[2])].concat();
        let layout = Layout::grouped(&listens.into_iter().collect(), 8);
        assert_eq!((layout.own.len(), layout.groups.len()), (16, 1));
        let table = layout.blocks(&homes(&layout));
        assert_eq!(led(&table, "10.0.0.1:1000"), Some(0));
        assert_eq!(led(&table, "10.0.0.1:50999"), Some(0));
        for outside in ["10.0.0.1:999", "10.0.0.1:51000", "10.0.0.2:1000", "10.0.0.1:80"] {
            assert_eq!(led(&table, outside), None, "{outside}");
        }
    }

    #[test]
    fn a_port_with_other_routes_in_the_middle_keeps_its_own_socket() {
        let mut listens: BTreeMap<_, _> = at("10.0.0.1", 1000..=1999, &[1]).into_iter().collect();
        listens.extend(at("10.0.0.1", 1500..=1500, &[1, 2]));
        let layout = Layout::grouped(&listens, 8);
        let table = layout.blocks(&homes(&layout));
        assert_eq!(led(&table, "10.0.0.1:1499"), Some(0));
        assert_eq!(led(&table, "10.0.0.1:1500"), None);
        assert_eq!(led(&table, "10.0.0.1:1501"), Some(0));
        assert!(layout.own.contains(&"10.0.0.1:1500".parse().expect("an address")));
    }

    #[test]
    fn a_socket_of_one_address_comes_before_a_range_of_all() {
        let listens =
            [at("0.0.0.0", 1000..=1999, &[1]), at("10.0.0.1", 1500..=1500, &[2]), at("::", 1000..=1999, &[3])];
        let layout = Layout::grouped(&listens.concat().into_iter().collect(), 8);
        let table = layout.blocks(&homes(&layout));
        assert_eq!(led(&table, "10.0.0.1:1500"), Some(LEAVE));
        assert_eq!(led(&table, "10.0.0.2:1500"), Some(0));
        assert_eq!(led(&table, "[fd00::1]:1500"), Some(1));
    }

    #[test]
    fn where_a_group_is_bound_nobody_dials_it() {
        let layout = Layout::grouped(&at("10.0.0.1", 1000..=1999, &[1]).into_iter().collect(), 8);
        assert_eq!(led(&layout.blocks(&homes(&layout)), "127.0.0.1:60000"), Some(REFUSE));
        let layout = Layout::grouped(&at("0.0.0.0", 1000..=65_000, &[1]).into_iter().collect(), 8);
        assert_eq!(led(&layout.blocks(&homes(&layout)), "127.0.0.1:60000"), Some(0));
    }

    #[test]
    fn more_groups_than_places_keep_their_own_sockets() {
        let listens = [at("10.0.0.1", 1000..=1999, &[1]), at("10.0.0.2", 1000..=1999, &[1])].concat();
        let layout = Layout::grouped(&listens.into_iter().collect(), 1);
        assert_eq!((layout.groups.len(), layout.own.len()), (1, 1000));
    }

    #[test]
    fn blocks_that_share_a_port_are_seen() {
        let block = |port, bits| Block { address: Ipv4Addr::LOCALHOST.into(), port, bits };
        let held = BTreeMap::from([(block(1024, 8), 0), (block(5000, 16), 0)]);
        for shares in [
            block(1024, 8),
            block(1279, 16),
            block(0, 0),
            block(1024, 6),
            block(1040, 12),
            block(5000, 16),
            block(4096, 4),
        ] {
            assert!(overlaps(&held, &shares), "{shares:?}");
        }
        for apart in [block(1280, 8), block(1023, 16), block(5001, 16), block(768, 8)] {
            assert!(!overlaps(&held, &apart), "{apart:?}");
        }
    }
}
