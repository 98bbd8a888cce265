//! Which routes listen on the same ports, and which of them could not be told apart there.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    fingerprint,
    route::MATCH_COMBINATIONS,
    source::{Source, quoted},
    types::{Listen, Match, PortRange, Protocol, Route},
};

/// The most pairs of routes whose port ranges overlap without being equal. Routes on equal ports are not limited.
const OVERLAPPING_PAIRS: usize = 1 << 20;

/// One address and its ports, claimed by one route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim {
    pub protocol: Protocol,
    pub listen: Listen,
    /// Index among the routes.
    pub route: usize,
    /// Index in its `listen`.
    pub item: usize,
    /// In the file.
    pub offset: usize,
}

/// The claims of one address, protocol and port range.
struct Spot {
    claims: std::ops::Range<usize>,
    /// Spots of the same address whose ports overlap this one's.
    neighbours: Vec<usize>,
}

/// What a [`Match`] asks for, taken apart: one server name, one protocol, one network. Two routes on one port that ask
/// for the same could not be told apart.
type Atom<'a> = (&'a str, &'a str, Option<IpNet>);

/// What needs no second line.
#[derive(Default)]
struct Reported {
    /// The earlier and the later route.
    pairs: HashSet<(usize, usize)>,
    /// A route and the index in its `listen`.
    claims: HashSet<(usize, usize)>,
}

pub(super) struct Overlaps<'a> {
    source: &'a Source<'a>,
    routes: &'a [Route],
    /// As they are shown, with the line each begins in.
    labels: &'a [(String, usize)],
    /// Sorted, so that those of one spot stand together in the order of the file.
    claims: Vec<Claim>,
    spots: Vec<Spot>,
}

impl<'a> Overlaps<'a> {
    pub fn find(
        source: &'a Source<'a>,
        routes: &'a [Route],
        labels: &'a [(String, usize)],
        mut claims: Vec<Claim>,
    ) -> Self {
        claims.sort_unstable();
        let mut spots: Vec<Spot> = Vec::new();
        let mut start = 0;
        for equal in claims.chunk_by(|a, b| (a.protocol, a.listen) == (b.protocol, b.listen)) {
            spots.push(Spot { claims: start..start + equal.len(), neighbours: Vec::new() });
            start += equal.len();
        }
        let mut overlaps = Self { source, routes, labels, claims, spots };
        overlaps.find_neighbours();
        overlaps
    }

    fn claims_of(&self, spot: usize) -> &[Claim] {
        self.spots.get(spot).and_then(|spot| self.claims.get(spot.claims.clone())).unwrap_or_default()
    }

    /// A sweep over each address's ranges in the order of their first port; those that still reach are `open`.
    fn find_neighbours(&mut self) {
        let mut open: Vec<(usize, Claim)> = Vec::new();
        let mut pairs = 0;
        for here in 0..self.spots.len() {
            let Some(&claim) = self.claims_of(here).first() else { continue };
            let key = |claim: &Claim| (claim.protocol, claim.listen.address);
            open.retain(|(_, other)| key(other) == key(&claim) && other.listen.ports.last >= claim.listen.ports.first);
            for (there, _) in &open {
                pairs += self.claims_of(here).len() * self.claims_of(*there).len();
                self.spots[here].neighbours.push(*there);
                self.spots[*there].neighbours.push(here);
            }
            if pairs > OVERLAPPING_PAIRS {
                let message = format!(
                    "more than {OVERLAPPING_PAIRS} pairs of routes listen on port ranges that overlap; use equal ranges, or fewer"
                );
                self.reject(&claim, message);
                return;
            }
            open.push((here, claim));
        }
    }

    /// Reports every route that could not be told apart from one before it.
    pub fn report_conflicts(&self) {
        let mut reported = Reported::default();
        let mut atoms: HashMap<usize, HashMap<Atom<'_>, &Claim>> = HashMap::new();
        for here in 0..self.spots.len() {
            let Some(spot) = self.spots.get(here) else { continue };
            if spot.claims.len() == 1 && spot.neighbours.is_empty() {
                continue;
            }
            let mut own: HashMap<Atom<'_>, &Claim> = HashMap::new();
            for claim in self.claims_of(here) {
                for atom in self.atoms(claim) {
                    let first = *own.entry(atom).or_insert(claim);
                    if first.route != claim.route {
                        self.report(first, claim, atom, &mut reported);
                    }
                }
            }
            for there in spot.neighbours.iter().filter(|there| **there < here) {
                let Some(theirs) = atoms.get(there) else { continue };
                let (small, large) = if own.len() < theirs.len() { (&own, theirs) } else { (theirs, &own) };
                let mut pairs: Vec<_> =
                    small.iter().filter_map(|(atom, a)| Some((*a, *large.get(atom)?, *atom))).collect();
                pairs.sort_unstable_by_key(|(a, b, atom)| (a.offset.max(b.offset), *atom));
                for (a, b, atom) in pairs {
                    self.report(a, b, atom, &mut reported);
                }
            }
            if !spot.neighbours.is_empty() {
                atoms.insert(here, own);
            }
        }
    }

    fn atoms(&self, claim: &Claim) -> impl Iterator<Item = Atom<'a>> + use<'a> {
        static EVERYTHING: Match = Match { sni: Vec::new(), alpn: Vec::new(), client: Vec::new() };
        let matches = self.routes.get(claim.route).map_or(&EVERYTHING, |route| &route.matches);
        let sni = or_any(matches.sni.iter().map(|name| name.as_str()).collect(), "");
        let alpn = or_any(matches.alpn.iter().map(|name| name.as_str()).collect(), "");
        let client = or_any(matches.client.iter().map(|network| Some(*network)).collect(), None);
        let all = sni.into_iter().flat_map(move |sni| {
            let client = client.clone();
            alpn.clone()
                .into_iter()
                .flat_map(move |alpn| client.clone().into_iter().map(move |client| (sni, alpn, client)))
        });
        all.take(MATCH_COMBINATIONS)
    }

    /// One line per listen address of the later route, and one per pair of routes.
    fn report(&self, a: &Claim, b: &Claim, atom: Atom<'_>, reported: &mut Reported) {
        let (first, later) = if (a.route, a.item) < (b.route, b.item) { (a, b) } else { (b, a) };
        if first.route == later.route {
            let message = format!("{} overlaps listen[{}], {}", spot_name(later), first.item, spot_name(first));
            return self.reject(later, message);
        }
        if reported.claims.contains(&(later.route, later.item)) || !reported.pairs.insert((first.route, later.route)) {
            return;
        }
        reported.claims.insert((later.route, later.item));
        let Some((label, line)) = self.labels.get(first.route) else { return };
        let how = match later.listen == first.listen {
            true => format!("{} is claimed by {label} (line {line}) too", spot_name(later)),
            false => format!("{} overlaps {} of {label} (line {line})", spot_name(later), spot_name(first)),
        };
        let why = match atom_name(atom) {
            None => "neither has a match; give one of them a match, or another port".to_owned(),
            Some(atom) => format!("both match {atom}; give one of them another match, or another port"),
        };
        self.reject(later, format!("{how}, and {why}"));
    }

    /// Reports routes on one port that do not agree who sends a PROXY header: it comes before anything that could tell
    /// them apart.
    pub fn report_headers(&self) {
        let mut reported = HashSet::new();
        for (here, spot) in self.spots.iter().enumerate() {
            let Some(first) = self.claims_of(here).first() else { continue };
            let others = spot
                .neighbours
                .iter()
                .filter(|there| **there < here)
                .filter_map(|there| self.claims_of(*there).first());
            for claim in self.claims_of(here).iter().chain(others) {
                let (a, b) = if first.route < claim.route { (first, claim) } else { (claim, first) };
                if self.senders(a) != self.senders(b) && reported.insert((a.route, b.route)) {
                    let Some((label, line)) = self.labels.get(a.route) else { continue };
                    let message = format!(
                        "{} is shared with {label} (line {line}), whose proxy_protocol.accept_from is another: the PROXY \
                         header comes before what tells the two apart; give both the same, or another port",
                        spot_name(b)
                    );
                    self.reject(b, message);
                }
            }
        }
    }

    fn senders(&self, claim: &Claim) -> HashSet<IpNet> {
        let route = self.routes.get(claim.route);
        route.map(|route| route.proxy_protocol.accept_from.iter().copied().collect()).unwrap_or_default()
    }

    /// Reports a listen address that takes the port of `[admin] listen` away.
    pub fn report_admin(&self, admin: SocketAddr) {
        for claim in &self.claims {
            let Listen { address, ports } = claim.listen;
            let same_address = address == admin.ip()
                || ((address.is_unspecified() || admin.ip().is_unspecified()) && address.is_ipv4() == admin.is_ipv4());
            if claim.protocol == Protocol::Tcp && same_address && (ports.first..=ports.last).contains(&admin.port()) {
                self.reject(
                    claim,
                    format!("{} takes admin.listen, {admin}, away; give one of them another port", spot_name(claim)),
                );
            }
        }
    }

    fn reject(&self, claim: &Claim, message: String) {
        let label = self.labels.get(claim.route).map_or("route", |(label, _)| label);
        self.source.report(claim.offset, format!("{label}: listen[{}]", claim.item), message);
    }

    /// For each route the value of [`Route::shares_port_with`], of [`Route::fingerprint`] and of [`Route::own_fingerprint`].
    pub fn shared(&self) -> Vec<(Arc<[usize]>, u64, u64)> {
        let own: Vec<u64> = self.routes.iter().map(fingerprint::of_route).collect();
        let mut all: Vec<_> = own.iter().map(|own| (Arc::default(), *own, *own)).collect();
        for sharers in self.sharers() {
            let theirs = fingerprint::of_all(sharers.iter().filter_map(|route| own.get(*route)).copied());
            for &route in sharers.iter() {
                if let Some((group, fingerprint, own)) = all.get_mut(route) {
                    *group = Arc::clone(&sharers);
                    *fingerprint = fingerprint::of_all([*own, theirs].into_iter());
                }
            }
        }
        all
    }

    /// The routes that hang together by ports they share, directly or by a third one, each group in the order of the file.
    fn sharers(&self) -> Vec<Arc<[usize]>> {
        let mut spots_of: Vec<Vec<usize>> = vec![Vec::new(); self.routes.len()];
        for (index, spot) in self.spots.iter().enumerate() {
            for claim in self.claims.get(spot.claims.clone()).unwrap_or_default() {
                if let Some(spots) = spots_of.get_mut(claim.route) {
                    spots.push(index);
                }
            }
        }
        let mut seen = vec![false; self.spots.len()];
        let mut groups = Vec::new();
        for start in 0..self.spots.len() {
            let (mut routes, mut next) = (Vec::new(), vec![start]);
            while let Some(here) = next.pop() {
                if seen.get_mut(here).is_none_or(|seen| std::mem::replace(seen, true)) {
                    continue;
                }
                next.extend(self.spots.get(here).into_iter().flat_map(|spot| &spot.neighbours));
                for claim in self.claims_of(here) {
                    routes.push(claim.route);
                    next.append(&mut spots_of.get_mut(claim.route).map(std::mem::take).unwrap_or_default());
                }
            }
            routes.sort_unstable();
            routes.dedup();
            if routes.len() > 1 {
                groups.push(routes.into());
            }
        }
        groups
    }
}

fn or_any<T>(items: Vec<T>, any: T) -> Vec<T> {
    if items.is_empty() { vec![any] } else { items }
}

/// `None`: everything.
fn atom_name((sni, alpn, client): Atom<'_>) -> Option<String> {
    let mut parts = Vec::new();
    if !sni.is_empty() {
        parts.push(format!("sni {}", quoted(sni)));
    }
    if !alpn.is_empty() {
        parts.push(format!("alpn {}", quoted(alpn)));
    }
    parts.extend(client.map(|client| format!("client {client}")));
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// `0.0.0.0:443/tcp`, `[::]:30000-30999/udp`
fn spot_name(claim: &Claim) -> String {
    let PortRange { first, last } = claim.listen.ports;
    let range = if first == last { String::new() } else { format!("-{last}") };
    let address = match claim.listen.address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    format!("{address}:{first}{range}/{}", claim.protocol.as_str())
}
