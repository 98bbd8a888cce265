use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::config::{Match, parse};

const DEFAULTS: &str = "listen = [\"10.0.0.1:443\"]\nbackends = [\"10.0.1.1:443\"]\n";

fn routes(bodies: &[String]) -> Vec<Arc<Route>> {
    let route = |(n, body): (usize, &String)| format!("[[route]]\nname = \"r{n}\"\n{DEFAULTS}{body}\n");
    let text: String = bodies.iter().enumerate().map(route).collect();
    parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}\n{text}")).routes
}

fn port(bodies: &[&str]) -> Port {
    Port::new(&routes(&bodies.iter().map(|b| (*b).to_owned()).collect::<Vec<_>>()))
}

fn client(text: &str) -> IpAddr {
    text.parse().expect("valid")
}

fn hello<'a>(sni: &'a str, alpn: &'a [&'a [u8]]) -> First<'a> {
    First::Hello { sni: Some(sni), alpn }
}

const SOMEONE: &str = "192.0.2.1";

#[test]
fn the_most_specific_server_name_wins_whatever_the_order_of_the_file() {
    let port = port(&[
        "",
        "match.sni = [\"*.example.com\"]",
        "match.sni = [\"*.shop.example.com\"]",
        "match.sni = [\"a.shop.example.com\"]",
    ]);
    let choose = |sni: &str| port.choose(client(SOMEONE), hello(sni, &[]));
    assert_eq!(choose("a.shop.example.com"), Decision::Route(3));
    assert_eq!(choose("b.shop.example.com"), Decision::Route(2));
    assert_eq!(choose("x.y.shop.example.com"), Decision::Route(2));
    assert_eq!(choose("shop.example.com"), Decision::Route(1), "a wildcard stands for one label or more");
    assert_eq!(choose("example.com"), Decision::Route(0));
    assert_eq!(choose("aexample.com"), Decision::Route(0));
    assert_eq!(port.choose(client(SOMEONE), First::Hello { sni: None, alpn: &[] }), Decision::Route(0));
}

#[test]
fn alpn_counts_more_than_the_client_and_less_than_the_name() {
    let port = port(&[
        "match = { sni = [\"a.example\"], client = [\"192.0.2.0/24\"] }",
        "match = { sni = [\"a.example\"], alpn = [\"h2\"] }",
        "match = { alpn = [\"h2\"], client = [\"192.0.2.1\"] }",
    ]);
    let at = |sni, alpn: &[&[u8]]| port.choose(client(SOMEONE), First::Hello { sni: Some(sni), alpn });
    assert_eq!(at("a.example", &[b"http/1.1", b"h2"]), Decision::Route(1));
    assert_eq!(at("a.example", &[b"http/1.1"]), Decision::Route(0));
    assert_eq!(at("b.example", &[b"h2"]), Decision::Route(2));
    assert_eq!(at("b.example", &[]), Decision::NoRoute);
}

#[test]
fn a_name_whose_route_is_not_for_this_client_leaves_it_to_the_next_best() {
    let port = port(&["match = { sni = [\"a.b\"], client = [\"10.0.0.0/8\"] }", "match.sni = [\"*.b\"]"]);
    assert_eq!(port.choose(client("10.1.1.1"), hello("a.b", &[])), Decision::Route(0));
    assert_eq!(port.choose(client(SOMEONE), hello("a.b", &[])), Decision::Route(1));
}

#[test]
fn the_first_bytes_are_waited_for_only_when_a_route_for_this_client_reads_them() {
    let port = port(&["match = { sni = [\"a.b\"], client = [\"10.0.0.0/8\"] }", ""]);
    assert_eq!(port.choose(client("10.1.1.1"), First::Nothing), Decision::NeedHello);
    assert_eq!(port.choose(client("::ffff:10.1.1.1"), First::Nothing), Decision::NeedHello);
    assert_eq!(port.choose(client(SOMEONE), First::Nothing), Decision::Route(1));
    assert_eq!(port.choose(client("10.1.1.1"), First::NotTls), Decision::Route(1));
}

#[test]
fn what_is_not_tls_goes_to_no_route_that_passes_tls_on() {
    let tls = "tls = { mode = \"passthrough\" }";
    let alone = port(&[tls]);
    assert_eq!(alone.choose(client(SOMEONE), First::Nothing), Decision::NeedHello);
    assert_eq!(alone.choose(client(SOMEONE), First::NotTls), Decision::NoRoute);
    assert_eq!(alone.choose(client(SOMEONE), hello("x", &[])), Decision::Route(0));
    let shared = port(&[
        "match.client = [\"10.0.0.0/8\"]",
        "match.client = [\"10.1.0.0/16\"]\ntls = { mode = \"passthrough\" }",
    ]);
    assert_eq!(shared.choose(client("10.1.1.1"), First::NotTls), Decision::Route(0));
    assert_eq!(shared.choose(client("10.1.1.1"), hello("x", &[])), Decision::Route(1));
    assert_eq!(shared.choose(client(SOMEONE), First::Nothing), Decision::NoRoute);
}

#[test]
fn fifty_thousand_names_cost_no_more_than_a_few() {
    let bodies: Vec<String> = (0..50_000).map(|n| format!("match.sni = [\"n{n}.example\"]")).collect();
    let port = Port::new(&routes(&bodies));
    let began = std::time::Instant::now();
    for n in 0..50_000 {
        assert_eq!(port.choose(client(SOMEONE), hello(&format!("n{n}.example"), &[])), Decision::Route(n));
    }
    assert!(began.elapsed().as_secs() < 5, "{:?}: a look-up is linear", began.elapsed());
}

/// The rules as one would tell them: every member in turn, the best by its rank.
fn naive(members: &[Arc<Route>], client: IpAddr, first: First<'_>) -> Decision {
    let prefix = |route: &Route| match route.matches.client.is_empty() {
        true => Some(-1),
        false => route.matches.client.iter().filter(|n| n.contains(&client)).map(|n| i32::from(n.prefix_len())).max(),
    };
    let reads = |r: &Route| !r.matches.sni.is_empty() || !r.matches.alpn.is_empty() || r.tls.is_some();
    if first == First::Nothing && members.iter().any(|r| prefix(r).is_some() && reads(r)) {
        return Decision::NeedHello;
    }
    let rank = |route: &Route| {
        let First::Hello { sni, alpn } = first else {
            return if reads(route) { None } else { Some((0, 0, prefix(route)?)) };
        };
        let name = |pattern: &String| match pattern.strip_prefix('*') {
            Some(suffix) => sni?.strip_suffix(suffix).filter(|l| !l.is_empty()).map(|_| suffix.len()),
            None => (sni? == pattern).then_some(usize::MAX),
        };
        let matches = &route.matches;
        let by_name = if matches.sni.is_empty() { 0 } else { matches.sni.iter().filter_map(name).max()? };
        let offered = matches.alpn.iter().any(|a| alpn.contains(&a.as_bytes()));
        let by_alpn = if matches.alpn.is_empty() { 0 } else { offered.then_some(1)? };
        Some((by_name, by_alpn, prefix(route)?))
    };
    let ranked = members.iter().enumerate().filter_map(|(index, route)| Some((rank(route)?, std::cmp::Reverse(index))));
    ranked.max().map_or(Decision::NoRoute, |(_, index)| Decision::Route(index.0))
}

/// Others are no valid configuration.
fn can_be_told_apart(route: &Route, taken: &mut HashSet<(String, String, Option<IpNet>)>) -> bool {
    let Match { sni, alpn, client } = route.matches.clone();
    let mut asked = Vec::new();
    for name in or(sni, String::new()) {
        for protocol in or(alpn.clone(), String::new()) {
            let nets = or(client.iter().copied().map(Some).collect(), None);
            asked.extend(nets.into_iter().map(|net| (name.clone(), protocol.clone(), net)));
        }
    }
    let apart = asked.iter().all(|atom| !taken.contains(atom));
    taken.extend(asked.into_iter().filter(|_| apart));
    apart
}

const NAMES: [&str; 6] = ["a.b.c", "b.c", "x.b.c", "y.x.b.c", "c", "d.c"];
const PATTERNS: [&str; 6] = ["a.b.c", "*.b.c", "*.c", "b.c", "*.x.b.c", "d.c"];
const ALPN: [&str; 3] = ["h2", "http/1.1", "imap"];
const NETS: [&str; 5] = ["10.0.0.0/8", "10.1.0.0/16", "10.1.1.1/32", "fd00::/8", "fd00:1::/32"];
const CLIENTS: [&str; 5] = ["10.1.1.1", "10.1.2.3", "10.9.9.9", "192.0.2.1", "fd00:1::1"];

fn some_of(items: &'static [&'static str], most: usize) -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(items.to_vec(), 0..=most)
}

prop_compose! {
    fn body()(sni in some_of(&PATTERNS, 2), alpn in some_of(&ALPN, 2), client in some_of(&NETS, 2), tls in any::<bool>()) -> String {
        let list = |key: &str, items: &[&str]| match items.is_empty() {
            true => String::new(),
            false => format!("match.{key} = {items:?}\n"),
        };
        let tls = if tls || !sni.is_empty() || !alpn.is_empty() { "tls = { mode = \"passthrough\" }\n" } else { "" };
        [list("sni", &sni), list("alpn", &alpn), list("client", &client), tls.to_owned()].concat()
    }
}

proptest! {
    #[test]
    fn it_chooses_as_the_rules_read(bodies in prop::collection::vec(body(), 1..8)) {
        let mut taken = HashSet::new();
        let each = bodies.iter().flat_map(|body| routes(std::slice::from_ref(body)));
        let members: Vec<Arc<Route>> = each.filter(|route| can_be_told_apart(route, &mut taken)).collect();
        let port = Port::new(&members);
        for who in CLIENTS.map(client) {
            for first in [First::Nothing, First::NotTls] {
                prop_assert_eq!(port.choose(who, first), naive(&members, who, first));
            }
            for sni in NAMES.map(Some).into_iter().chain([None]) {
                for alpn in [&[][..], &[&b"h2"[..]], &[&b"imap"[..], b"h2", b"else"]] {
                    let first = First::Hello { sni, alpn };
                    prop_assert_eq!(port.choose(who, first), naive(&members, who, first), "{} {:?}", who, first);
                }
            }
        }
    }
}

#[test]
fn a_ca_finds_the_route_whose_name_it_looks_at_wherever_it_looks_from() {
    let route = |name: &str, lines: &str| format!("[[route]]\nname = \"{name}\"\n{DEFAULTS}{lines}\n");
    let by_acme = "tls = { mode = \"terminate\", certificates = \"acme\" }";
    let text = [
        "[acme]\ndirectory = \"https://ca.example/\"\n".to_owned(),
        route("plain", ""),
        route("h2", &format!("match = {{ sni = [\"a.example\"], alpn = [\"h2\"] }}\n{by_acme}")),
        route(
            "inside",
            &format!("match = {{ sni = [\"a.example\", \"b.example\"], client = [\"10.0.0.0/8\"] }}\n{by_acme}"),
        ),
        route("files", "match.sni = [\"c.example\"]\ntls.mode = \"passthrough\""),
    ];
    let routes = parse(&text.concat(), Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}")).routes;
    let port = Port::new(&routes);
    assert_eq!(port.prover("a.example"), Some(1));
    assert_eq!(port.prover("b.example"), Some(2));
    assert_eq!(port.prover("c.example"), None, "its backend answers, if anybody");
    // Not a client of any of them: but what it says is read.
    assert_eq!(port.choose(client(SOMEONE), First::Nothing), Decision::NeedHello);
    assert_eq!(port.choose(client(SOMEONE), First::NotTls), Decision::Route(0));
    let without = Port::new(&routes[..1]);
    assert_eq!(without.choose(client(SOMEONE), First::Nothing), Decision::Route(0));
}
