//! Which of the routes that share a listen address a connection belongs to.
//!
//! The most specific route wins: by server name (exact, then the longer wildcard, then none), then by ALPN (named, then
//! none), then by client (the longer prefix, then none), then by the order of the file. The work is a few hash look-ups
//! per label of the server name, however many routes there are.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use crate::config::{Certificates, Route};

/// The routes that share a listen address and what tells them apart.
#[derive(Debug)]
pub struct Port {
    /// Of each member.
    needs_hello: Vec<bool>,
    /// Without wildcard.
    exact: HashMap<Box<str>, Sni>,
    /// By what follows `*.`
    wildcards: HashMap<Box<str>, Sni>,
    alpn: HashMap<Box<[u8]>, Alpn>,
    takers: HashMap<Key, usize>,
    /// Lengths of the prefixes that occur, the longest first.
    prefixes: Prefixes,
    /// Networks whose clients may belong to a route that needs a ClientHello.
    readers: HashSet<Option<IpNet>>,
    accept_from: Vec<IpNet>,
    /// The first member that gets the certificate for a name from a CA, which comes here to see whose the name is.
    provers: HashMap<Box<str>, usize>,
}

/// What is known of the first bytes, after the PROXY header where there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First<'a> {
    Nothing,
    NotTls,
    /// `sni` in lower case.
    Hello {
        sni: Option<&'a str>,
        alpn: &'a [&'a [u8]],
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// An index into the members given to [`Port::new`].
    Route(usize),
    /// Not before the ClientHello is there, or is known not to come.
    NeedHello,
    NoRoute,
}

/// Stands for a name of a server; 0: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Sni(u32);

/// Stands for a protocol; 0: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Alpn(u32);

/// What a route asks for, taken apart: one server name, one protocol, one network. No two routes of a port ask for the same.
type Key = (Sni, Alpn, Option<IpNet>);

#[derive(Debug, Default)]
struct Prefixes {
    v4: Vec<u8>,
    v6: Vec<u8>,
}

impl Port {
    /// `members` in file order.
    pub fn new(members: &[Arc<Route>]) -> Self {
        let mut port = Self {
            needs_hello: members.iter().map(|route| needs_hello(route)).collect(),
            exact: HashMap::new(),
            wildcards: HashMap::new(),
            alpn: HashMap::new(),
            takers: HashMap::new(),
            prefixes: Prefixes::default(),
            readers: HashSet::new(),
            provers: HashMap::new(),
            accept_from: members.first().map(|r| r.proxy_protocol.accept_from.clone()).unwrap_or_default(),
        };
        for (index, route) in members.iter().enumerate() {
            port.add(index, route);
        }
        port.prefixes.sort();
        port
    }

    fn add(&mut self, index: usize, route: &Route) {
        let matches = &route.matches;
        let mut names: Vec<Sni> = Vec::with_capacity(matches.sni.len());
        for name in &matches.sni {
            let next = Sni((self.exact.len() + self.wildcards.len() + 1) as u32);
            let (map, name) = match name.strip_prefix("*.") {
                Some(suffix) => (&mut self.wildcards, suffix),
                None => (&mut self.exact, name.as_str()),
            };
            names.push(*map.entry(name.into()).or_insert(next));
        }
        let mut protocols: Vec<Alpn> = Vec::with_capacity(matches.alpn.len());
        for protocol in &matches.alpn {
            let next = Alpn(self.alpn.len() as u32 + 1);
            protocols.push(*self.alpn.entry(protocol.as_bytes().into()).or_insert(next));
        }
        let names = or(names, Sni(0));
        let protocols = or(protocols, Alpn(0));
        let clients = or(matches.client.iter().map(|net| Some(net.trunc())).collect(), None);
        if let Some(Certificates::Acme(certificates)) = route.tls.as_ref().map(|tls| &tls.certificates) {
            for certificate in certificates {
                self.provers.entry(certificate.name.as_str().into()).or_insert(index);
            }
            // Nobody knows where a CA looks from.
            self.readers.insert(None);
        }
        for client in clients {
            self.prefixes.note(client);
            if self.needs_hello[index] {
                self.readers.insert(client);
            }
            for &name in &names {
                for &protocol in &protocols {
                    self.takers.entry((name, protocol, client)).or_insert(index);
                }
            }
        }
    }

    /// `client`: as the PROXY header has it, where one was accepted.
    pub fn choose(&self, client: IpAddr, first: First<'_>) -> Decision {
        let client = client.to_canonical();
        let found = match first {
            First::Nothing if self.networks(client).any(|net| self.readers.contains(&net)) => {
                return Decision::NeedHello;
            }
            First::Nothing | First::NotTls => self.taker(client, Sni(0), &[Alpn(0)], true),
            First::Hello { sni, alpn } => self.reader(client, sni, alpn),
        };
        found.map_or(Decision::NoRoute, Decision::Route)
    }

    /// Networks whose connections must begin with a PROXY header: the same for every route here.
    pub fn accept_from(&self) -> &[IpNet] {
        &self.accept_from
    }

    /// The member that answers a CA for `name`, whatever else it or its clients are told apart by.
    pub fn prover(&self, name: &str) -> Option<usize> {
        self.provers.get(name).copied()
    }

    fn reader(&self, client: IpAddr, sni: Option<&str>, alpn: &[&[u8]]) -> Option<usize> {
        let mut offered: Vec<Alpn> = match self.alpn.is_empty() {
            true => Vec::new(),
            false => alpn.iter().filter_map(|protocol| self.alpn.get(*protocol).copied()).collect(),
        };
        // A long list must not make for long work.
        offered.sort_unstable_by_key(|alpn| alpn.0);
        offered.dedup();
        let exact = sni.and_then(|name| self.exact.get(name));
        let suffixes = sni.into_iter().flat_map(suffixes);
        let wildcards = suffixes.filter_map(|suffix| self.wildcards.get(suffix));
        let mut names = exact.into_iter().chain(wildcards).copied().chain([Sni(0)]);
        names.find_map(|name| {
            self.taker(client, name, &offered, false).or_else(|| self.taker(client, name, &[Alpn(0)], false))
        })
    }

    /// The route that asks for one of `alpn` and for the longest prefix.
    fn taker(&self, client: IpAddr, sni: Sni, alpn: &[Alpn], plain: bool) -> Option<usize> {
        let serves = |index: &usize| !(plain && self.needs_hello[*index]);
        self.networks(client).find_map(|net| {
            let of = |&alpn: &Alpn| self.takers.get(&(sni, alpn, net)).copied().filter(serves);
            alpn.iter().filter_map(of).min()
        })
    }

    /// The networks `client` is in and a route may ask for, the smallest first.
    fn networks(&self, client: IpAddr) -> impl Iterator<Item = Option<IpNet>> {
        let lengths = if client.is_ipv4() { &self.prefixes.v4 } else { &self.prefixes.v6 };
        let net = move |&length: &u8| IpNet::new(client, length).ok().map(|net| net.trunc());
        lengths.iter().map(net).chain([None])
    }
}

/// Whether the route can only serve what begins with a ClientHello.
fn needs_hello(route: &Route) -> bool {
    !route.matches.sni.is_empty() || !route.matches.alpn.is_empty() || route.tls.is_some()
}

fn or<T>(items: Vec<T>, any: T) -> Vec<T> {
    if items.is_empty() { vec![any] } else { items }
}

/// What `*` may be in front of, the longest first: it stands for one label or more.
fn suffixes(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').filter(|(at, _)| *at > 0).map(|(at, _)| &name[at + 1..])
}

impl Prefixes {
    fn note(&mut self, net: Option<IpNet>) {
        let Some(net) = net else { return };
        let lengths = if net.addr().is_ipv4() { &mut self.v4 } else { &mut self.v6 };
        if !lengths.contains(&net.prefix_len()) {
            lengths.push(net.prefix_len());
        }
    }

    fn sort(&mut self) {
        for lengths in [&mut self.v4, &mut self.v6] {
            lengths.sort_unstable_by(|a, b| b.cmp(a));
        }
    }
}

#[cfg(test)]
mod tests;
