//! One `[[route]]`.

use std::sync::Arc;

use super::{
    acme::{Acme, Known},
    address,
    overlap::Claim,
    reader::{Field, Section},
    sections::{Defaults, limits, timeouts},
    source::quoted,
    tls,
    types::{Backend, Health, Listen, Match, Protocol, ProxyProtocol, Route, RouteName, TlsMode},
};

/// The most (server name, protocol, client network) combinations that one `match` may stand for.
pub(super) const MATCH_COMBINATIONS: usize = 65_536;

const NEEDS_TCP: &str = "needs protocol = \"tcp\"; this route is udp";

/// Reads a route and pushes what it claims. Its fingerprint and the routes it shares a port with are left empty.
///
/// `None` only when a problem has been reported; a route may be returned in spite of problems, so that it can still be
/// compared with the others.
pub(super) fn route(
    section: &Section<'_>,
    index: usize,
    defaults: &Defaults,
    acme: Known<&Acme>,
    claims: &mut Vec<Claim>,
) -> Option<Route> {
    let name = section.given("name").and_then(|field| name(&field));
    let known = section.source.count();
    let protocol = section.value("protocol", Field::choice)?;
    let matches = matches(&section.child("match")?, protocol)?;
    let certain = section.source.count() == known;
    let claimed = claims.len();
    let base = match protocol {
        Protocol::Tcp => &defaults.timeouts,
        Protocol::Udp => &defaults.udp_timeouts,
    };
    let listen = listen(section, index, protocol, claims);
    if !certain {
        // A mistyped match must not also be reported as the match of another route.
        claims.truncate(claimed);
    }
    let tls = section.given("tls").and_then(|field| tls::tls(&field.section()?, acme, &matches.sni));
    let route = Route {
        name: name.or_else(|| RouteName::new("unnamed"))?,
        listen,
        protocol,
        matches,
        backends: backends(section),
        balance: section.value_or("balance", defaults.balance, Field::choice)?,
        engine: section.value_or("engine", defaults.engine, Field::choice)?,
        source_address: section.value("source_address", Field::choice)?,
        allow: section.value("allow", networks)?,
        deny: section.value("deny", networks)?,
        keepalive: section.value_or("keepalive", defaults.keepalive, Field::choice)?,
        limits: limits(&section.child("limits")?, Some(&defaults.limits))?,
        timeouts: timeouts(&section.child("timeouts")?, Some(base))?,
        health: section.given("health").and_then(|field| health(&field.section()?)),
        tls,
        backend_tls: section.given("backend_tls").and_then(|field| tls::backend_tls(&field.section()?)),
        proxy_protocol: proxy_protocol(&section.child("proxy_protocol")?)?,
        fingerprint: 0,
        own_fingerprint: 0,
        shares_port_with: Arc::default(),
    };
    check_together(section, &route);
    Some(route)
}

fn name(field: &Field<'_>) -> Option<RouteName> {
    field.parse(|text| {
        RouteName::new(text)
            .ok_or_else(|| format!("{} is not a route name; 1 to 63 of a–z, 0–9 and - are allowed", quoted(text)))
    })
}

fn listen(section: &Section<'_>, index: usize, protocol: Protocol, claims: &mut Vec<Claim>) -> Vec<Listen> {
    let Some(field) = section.given("listen") else {
        return Vec::new();
    };
    if field.is_empty_list() {
        field.reject("[] is empty; at least one address:port is required".to_owned());
    }
    let mut item = 0;
    let read = |field: &Field<'_>| {
        let here = item;
        item += 1;
        let listen = field.parse(address::listen)?;
        claims.push(Claim { protocol, listen, route: index, item: here, offset: field.offset });
        Some(listen)
    };
    field.unique_list(read, |listen| *listen).unwrap_or_default()
}

fn backends(section: &Section<'_>) -> Vec<Backend> {
    let Some(field) = section.given("backends") else {
        return Vec::new();
    };
    if field.is_empty_list() {
        field.reject("[] is empty; at least one backend is required".to_owned());
    }
    field.unique_list(backend, |backend| backend.target.clone()).unwrap_or_default()
}

fn backend(field: &Field<'_>) -> Option<Backend> {
    if !field.is_table() {
        return Some(Backend { target: field.parse(address::target)?, weight: 1 });
    }
    let section = field.section()?;
    let target = section.given("address").and_then(|field| field.parse(address::target));
    let weight = section.value("weight", |field| field.integer().and_then(|weight| u16::try_from(weight).ok()));
    Some(Backend { target: target?, weight: weight? })
}

fn networks(field: &Field<'_>) -> Option<Vec<ipnet::IpNet>> {
    field.unique_list(|item| item.parse(address::network), |network| *network)
}

fn names(field: &Field<'_>, parse: fn(&str) -> Result<String, String>) -> Option<Vec<String>> {
    field.unique_list(|item| item.parse(parse), Clone::clone)
}

fn matches(section: &Section<'_>, protocol: Protocol) -> Option<Match> {
    for key in ["sni", "alpn"] {
        if protocol == Protocol::Udp && section.given(key).is_some() {
            section.reject_key(key, NEEDS_TCP.to_owned());
        }
    }
    let sni = section.value("sni", |field| names(field, address::sni));
    let alpn = section.value("alpn", |field| names(field, address::alpn));
    let client = section.value("client", networks);
    Some(Match { sni: sni?, alpn: alpn?, client: client? })
}

fn health(section: &Section<'_>) -> Option<Health> {
    let check = section.value("check", Field::choice);
    let interval = section.value("interval", Field::duration);
    let timeout = section.value("timeout", Field::duration);
    let rise = section.value("rise", Field::integer);
    let fall = section.value("fall", Field::integer);
    Some(Health { check: check?, interval: interval?, timeout: timeout?, rise: rise?, fall: fall? })
}

fn proxy_protocol(section: &Section<'_>) -> Option<ProxyProtocol> {
    let accept_from = section.value("accept_from", networks);
    let send = section.given("send").and_then(|field| field.choice());
    Some(ProxyProtocol { accept_from: accept_from?, send })
}

/// What can only be wrong about several keys together.
fn check_together(section: &Section<'_>, route: &Route) {
    if route.protocol == Protocol::Udp {
        needs_tcp(section);
    }
    let Match { sni, alpn, client } = &route.matches;
    let combinations =
        [sni.len(), alpn.len(), client.len()].iter().fold(1usize, |all, n| all.saturating_mul((*n).max(1)));
    if combinations > MATCH_COMBINATIONS {
        let message = format!(
            "{} sni × {} alpn × {} client are {combinations} combinations; at most {MATCH_COMBINATIONS} are allowed in one route",
            sni.len(),
            alpn.len(),
            client.len()
        );
        section.reject_key("match", message);
    }
    let terminates = route.tls.as_ref().is_some_and(|tls| tls.mode == TlsMode::Terminate);
    if route.backend_tls.is_some() && !terminates {
        if route.tls.is_some() {
            section.reject_key(
                "backend_tls",
                "TLS is passed through to the backend already; it needs tls.mode = \"terminate\"".to_owned(),
            );
        } else if !sni.is_empty() || !alpn.is_empty() {
            section.reject_key(
                "backend_tls",
                "a route that matches by sni or alpn passes TLS through unless tls.mode = \"terminate\"".to_owned(),
            );
        }
    }
    if route.health.is_some() {
        check_health_port(section, route);
    }
}

fn needs_tcp(section: &Section<'_>) {
    for key in ["tls", "backend_tls", "proxy_protocol"] {
        if section.given(key).is_some() {
            section.reject_key(key, NEEDS_TCP.to_owned());
        }
    }
}

/// A check needs a port: the backend's own, or the only one the route listens on.
fn check_health_port(section: &Section<'_>, route: &Route) {
    let mut ports = route.listen.iter().map(|listen| listen.ports);
    let first = ports.next();
    if first.is_none_or(|first| first.is_single() && ports.all(|ports| ports == first)) {
        return;
    }
    if let Some(backend) = route.backends.iter().find(|backend| backend.target.port().is_none()) {
        section.reject_key("health", format!(
            "backend \"{}\" has no port to check, and the route listens on more than one; give the backend a port or leave health away",
            backend.target
        ));
    }
}
