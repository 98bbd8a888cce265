use std::path::Path;

use super::*;
use crate::{
    capability::{FilterChain, Handoff, Hook, Sockmap},
    config::{Protocol, parse},
};

fn planned(text: &str, capabilities: &Capabilities) -> Plan {
    plan(&parse(text, Path::new("/test.toml")).unwrap_or_else(|problems| panic!("{problems}")), capabilities)
}

fn route(extra: &str) -> String {
    format!("[[route]]\nname = \"web\"\nlisten = [\"10.0.0.1:80\"]\nbackends = [\"10.0.1.1:80\"]\n{extra}\n")
}

/// Why nft does not serve the first route.
fn refusals(text: &str, capabilities: &Capabilities) -> Vec<Refusal> {
    let plan = planned(text, capabilities);
    plan.routes[0].refused.iter().filter(|(e, _)| *e == Engine::Nft).map(|(_, r)| r.clone()).collect()
}

#[test]
fn a_plain_route_is_served_by_nft() {
    let plan = planned(&route(""), &Capabilities::all());
    assert_eq!(plan.routes[0].engine, Some(Engine::Nft));
    assert!(plan.unserved().is_empty());
}

#[test]
fn what_must_read_or_write_the_stream_is_refused_with_the_key_that_says_so() {
    let cases = [
        (
            "match = { sni = [\"a.example\"] }\ntls = { mode = \"passthrough\" }",
            vec![Need::Sni, Need::TlsPassthroughCheck],
        ),
        ("proxy_protocol = { send = \"v1\" }", vec![Need::SendProxy]),
        ("proxy_protocol = { accept_from = [\"10.0.0.0/8\"] }", vec![Need::AcceptProxy]),
        ("balance = \"least-connections\"", vec![Need::LeastConnections]),
    ];
    for (extra, needs) in cases {
        let wanted: Vec<Refusal> = needs.into_iter().map(Refusal::NeedsStream).collect();
        assert_eq!(refusals(&route(extra), &Capabilities::all()), wanted, "{extra}");
    }
}

/// What `auto` comes to for the first route, and why splice does not serve it.
fn relayed(text: &str) -> (Option<Engine>, Vec<Refusal>) {
    let plan = planned(text, &Capabilities::all());
    let refused = plan.routes[0].refused.iter().filter(|(e, _)| *e == Engine::Splice).map(|(_, r)| r.clone()).collect();
    (plan.routes[0].engine, refused)
}

#[test]
fn what_nft_cannot_do_the_daemon_relays_and_says_so() {
    let text = route("proxy_protocol = { send = \"v1\" }");
    assert_eq!(relayed(&text), (Some(Engine::Splice), Vec::new()));
    let plan = planned(&text, &Capabilities::all());
    assert_eq!(plan.routes[0].because(), "proxy_protocol.send writes a header into the stream: the daemon relays");
    assert!(!plan.uses_nft());
    let forced = planned(&route("engine = \"copy\""), &Capabilities::all());
    assert_eq!(forced.routes[0].engine, Some(Engine::Copy));
    let unprivileged = Capabilities { net_admin: false, ..Capabilities::all() };
    assert_eq!(planned(&route(""), &unprivileged).routes[0].engine, Some(Engine::Splice));
}

#[test]
fn what_the_daemon_cannot_relay_is_refused_with_the_reason() {
    assert_eq!(relayed(&route("protocol = \"udp\"")).1, [Refusal::OnlyTcp]);
    let range = |last: u16| {
        format!("[[route]]\nname = \"web\"\nlisten = [\"10.0.0.1:2000-{last}\"]\nbackends = [\"10.0.1.1\"]\n")
    };
    let without = Capabilities { sk_lookup: false, ..Capabilities::all() };
    let against_copy = |last| {
        let plan = planned(&range(last), &without);
        let refused = plan.routes[0].refused.iter().filter(|(engine, _)| *engine == Engine::Copy);
        refused.map(|(_, refusal)| refusal.clone()).collect::<Vec<_>>()
    };
    assert_eq!(against_copy(3023), []);
    assert_eq!(against_copy(3024), [Refusal::TooManyPorts(1025)]);
    assert_eq!(relayed(&range(60_000)).1, [], "sk_lookup leads them to one socket");
}

#[test]
fn a_relayed_range_says_how_its_ports_are_served() {
    let text = |ports: &str| route("engine = \"splice\"").replace("10.0.0.1:80", &format!("10.0.0.1:{ports}"));
    let told = |ports: &str, sk_lookup| {
        let capabilities = Capabilities { sk_lookup, ..Capabilities::all() };
        planned(&text(ports), &capabilities).routes[0].many_ports()
    };
    assert_eq!(told("1000-1015", true), None, "a handful has its own sockets");
    assert!(told("1000-1016", true).is_some_and(|how| how.starts_with("17 ports are led to one socket")));
    assert!(told("1000-1016", false).is_some_and(|how| how.contains("lack sk_lookup")));
    assert_eq!(
        planned(&route("").replace(":80\"]\nb", ":80-8000\"]\nb"), &Capabilities::all()).routes[0].many_ports(),
        None
    );
}

#[test]
fn tls_is_ended_and_begun_only_where_the_daemon_has_the_bytes() {
    let ends = "tls = { mode = \"terminate\", certificates = [{ cert = \"c.pem\", key = \"k.pem\" }] }";
    let begins = "backend_tls = { ca = \"ca.pem\" }";
    for (extra, needs) in [
        (ends.to_owned(), vec![Need::TlsTermination]),
        (begins.to_owned(), vec![Need::BackendTls]),
        (format!("{ends}\n{begins}"), vec![Need::TlsTermination, Need::BackendTls]),
    ] {
        let refused: Vec<_> = needs.into_iter().map(Refusal::NeedsBytes).collect();
        assert_eq!(relayed(&route(&extra)), (Some(Engine::Copy), refused), "{extra}");
    }
    let forced = planned(&route(&format!("engine = \"splice\"\n{ends}")), &Capabilities::all());
    assert_eq!(
        forced.unserved()[0].to_string(),
        "route \"web\": no engine can serve it here: splice: tls.mode = \"terminate\" ends TLS in the daemon; this engine never \
         sees the bytes"
    );
}

#[test]
fn a_route_whose_backends_see_the_client_needs_transparent_sockets_only_where_the_daemon_dials() {
    let transparent = |extra: &str| route(&format!("source_address = \"client\"\n{extra}"));
    let balanced = transparent("balance = \"least-connections\"");
    assert_eq!(relayed(&balanced), (Some(Engine::Splice), Vec::new()));
    let told = planned(&balanced, &Capabilities::all()).routes[0].condition();
    assert!(told.is_some_and(|told| told.contains("must come back through this machine")), "{told:?}");
    let without = Capabilities { nft_socket: false, ..Capabilities::all() };
    assert_eq!(planned(&transparent(""), &without).routes[0].engine, Some(Engine::Nft));
    let splice = |text: &str, capabilities: &Capabilities| -> Vec<Refusal> {
        let refused = planned(text, capabilities).routes[0].refused.clone();
        refused.into_iter().filter(|(engine, _)| *engine == Engine::Splice).map(|(_, refusal)| refusal).collect()
    };
    assert_eq!(splice(&balanced, &without), [Refusal::Lacks(Capability::NftSocket)]);
    let unprivileged = Capabilities { net_admin: false, ..Capabilities::all() };
    assert_eq!(splice(&balanced, &unprivileged), [Refusal::Lacks(Capability::NetAdmin)]);
    let to_itself = balanced.replace("10.0.1.1:80", "127.0.0.1:80");
    assert_eq!(splice(&to_itself, &Capabilities::all()), [Refusal::ClientSourceToLoopback]);
}

#[test]
fn routes_that_hang_together_by_their_ports_go_the_same_way() {
    // a and c have no port in common, but both share one with b.
    let one = |name: &str, listen: &str, more: &str| {
        format!("[[route]]\nname = \"{name}\"\nlisten = {listen}\nbackends = [\"10.0.1.1:80\"]\n{more}\n")
    };
    let text = one("a", "[\"10.0.0.1:80\"]", "")
        + &one("b", "[\"10.0.0.1:80\", \"10.0.0.1:81\"]", "match.client = [\"10.9.0.0/16\"]")
        + &one("c", "[\"10.0.0.1:81\"]", "balance = \"least-connections\"")
        + &one("d", "[\"10.0.0.1:82\"]", "");
    let plan = planned(&text, &Capabilities::all());
    let engines: Vec<_> = plan.routes.iter().map(|r| r.engine).collect();
    assert_eq!(engines, [Some(Engine::Splice), Some(Engine::Splice), Some(Engine::Splice), Some(Engine::Nft)]);
    let c = RouteName::new("c").expect("valid");
    assert_eq!(refusals(&text, &Capabilities::all()), [Refusal::SharesPortWith(c)]);
    let forced = text.replacen("name = \"a\"\n", "name = \"a\"\nengine = \"nft\"\n", 1);
    assert_eq!(
        planned(&forced, &Capabilities::all()).unserved()[0].to_string(),
        "route \"a\": no engine can serve it here: nft: shares a port with route \"c\", which this engine does not serve"
    );
}

#[test]
fn a_plain_route_goes_where_its_neighbour_on_the_port_must_be_read() {
    let text = format!(
        "{}[[route]]\nname = \"shop\"\nlisten = [\"10.0.0.1:80\"]\nmatch = {{ sni = [\"a.example\"] }}\ntls = {{ mode = \"passthrough\" }}\nbackends = [\"10.0.1.2:80\"]\n",
        route("")
    );
    let shop = RouteName::new("shop").expect("valid");
    assert_eq!(refusals(&text, &Capabilities::all()), [Refusal::SharesPortWith(shop)]);
}

#[test]
fn what_the_kernel_lacks_rules_out_only_the_routes_that_need_it() {
    let without = |change: fn(&mut Capabilities)| {
        let mut capabilities = Capabilities::all();
        change(&mut capabilities);
        capabilities
    };
    let limited = route("limits = { connections = 5 }");
    let no_count = without(|c| c.nft_connlimit = false);
    assert_eq!(refusals(&limited, &no_count), [Refusal::Lacks(Capability::NftConnlimit)]);
    assert!(refusals(&route(""), &no_count).is_empty());
    let no_timeouts = without(|c| c.nft_ct_timeout = false);
    let impatient = route("timeouts = { connect = \"1s\" }");
    assert_eq!(refusals(&impatient, &no_timeouts), [Refusal::Lacks(Capability::NftCtTimeout)]);
    assert!(refusals(&route(""), &no_timeouts).is_empty());
    assert_eq!(refusals(&route(""), &without(|c| c.net_admin = false)), [Refusal::Lacks(Capability::NetAdmin)]);
}

#[test]
fn addresses_that_nat_cannot_bring_together_are_refused() {
    let with = |listen: &str, backend: &str| {
        format!("[[route]]\nname = \"web\"\nlisten = [\"{listen}\"]\nbackends = [\"{backend}\"]\n")
    };
    let all = Capabilities::all();
    let v6 = ruleset_family(6);
    assert_eq!(refusals(&with("[fd00::1]:80", "10.0.1.1:80"), &all), [Refusal::NoBackendOfFamily(v6)]);
    assert_eq!(refusals(&with("127.0.0.1:80", "10.0.1.1:80"), &all), [Refusal::LoopbackListen]);
    assert!(refusals(&with("127.0.0.1:80", "127.0.0.1:8080"), &all).is_empty());
    assert!(refusals(&with("[fd00::1]:80", "backend.example:80"), &all).is_empty());
}

fn ruleset_family(version: u8) -> crate::ruleset::Family {
    if version == 6 { crate::ruleset::Family::V6 } else { crate::ruleset::Family::V4 }
}

#[test]
fn a_forced_engine_that_cannot_serve_is_an_error_that_says_why() {
    let unserved = |extra: &str| {
        let plan = planned(&route(extra), &Capabilities::all());
        assert_eq!(plan.routes[0].engine, None, "{extra}");
        let [unserved] = &plan.unserved()[..] else { panic!("one route") };
        unserved.to_string()
    };
    assert_eq!(
        unserved("engine = \"splice\"\nprotocol = \"udp\""),
        "route \"web\": no engine can serve it here: splice: relays TCP only"
    );
    assert_eq!(
        unserved("engine = \"nft\"\nproxy_protocol.send = \"v1\""),
        "route \"web\": no engine can serve it here: nft: proxy_protocol.send writes a header into the stream"
    );
}

#[test]
fn a_replan_takes_over_what_has_not_changed() {
    let file = |middle: &str| {
        let one = |n: usize, port: usize, to: &str| {
            format!("[[route]]\nname = \"r{n}\"\nlisten = [\"10.0.0.1:{port}\"]\nbackends = [\"{to}\"]\n")
        };
        let text: String = (0..20).map(|n| one(n, 1000 + n, if n == 7 { middle } else { "10.0.1.1:80" })).collect();
        parse(&text, Path::new("/test.toml")).unwrap_or_else(|problems| panic!("{problems}"))
    };
    let all = Capabilities::all();
    let mut changing = plan(&file("10.0.1.1:80"), &all);
    let before = changing.clone();
    let change = replan(&file("10.0.1.2:80"), &all, &changing);
    assert_eq!((change.range.clone(), change.routes.len()), (7..8, 1));
    changing.put(change);
    let kept = before.routes.iter().zip(&changing.routes).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
    assert_eq!(kept, 19);
    assert_eq!(changing, plan(&file("10.0.1.2:80"), &all));
}

#[test]
fn udp_routes_have_udp_timeouts() {
    let silent = planned(&route("protocol = \"udp\""), &Capabilities::all());
    assert_eq!(crate::ruleset::timeout_policy(&silent.routes[0].route), crate::ruleset::TimeoutPolicy::UDP_STANDARD);
    let plan = planned(&route("protocol = \"udp\"\ntimeouts = { idle = \"90s\" }"), &Capabilities::all());
    assert_eq!(plan.routes[0].route.protocol, Protocol::Udp);
    assert_eq!(crate::ruleset::timeout_policy(&plan.routes[0].route), crate::ruleset::TimeoutPolicy::udp(90));
}

#[test]
fn sockets_are_joined_only_by_order_and_only_by_a_trusted_kernel() {
    let engine = |extra: &str, capabilities: &Capabilities| {
        let route = planned(&route(extra), capabilities).routes[0].clone();
        let against: Vec<String> =
            route.refused.iter().filter(|(e, _)| *e == Engine::Sockmap).map(|(_, r)| r.to_string()).collect();
        (route.engine, against.join("; "))
    };
    let forced = "engine = \"sockmap\"\nproxy_protocol = { send = \"v1\" }";
    assert_eq!(engine(forced, &Capabilities::all()), (Some(Engine::Sockmap), String::new()));
    let (chosen, why) = engine("proxy_protocol = { send = \"v1\" }", &Capabilities::all());
    assert!(chosen == Some(Engine::Splice) && why.contains("kernel thread (16 ms against 45 µs)"), "{chosen:?} {why}");
    let doubtful =
        Capabilities { sockmap: Sockmap::Refused("half-close: bytes are missing".into()), ..Capabilities::all() };
    let (chosen, why) = engine(forced, &doubtful);
    assert!(chosen.is_none() && why.contains("half-close"), "{chosen:?} {why}");
}

/// What the first route, forced to `handoff`, comes to, and why not.
fn handed(extra: &str, capabilities: &Capabilities) -> (Option<Engine>, Vec<Refusal>) {
    let plan = planned(&route(&format!("engine = \"handoff\"\n{extra}")), capabilities);
    let route = &plan.routes[0];
    (route.engine, route.refused.iter().map(|(_, refusal)| refusal.clone()).collect())
}

#[test]
fn a_route_that_asks_for_handoff_gets_it_where_both_ends_can_be_on_the_wire() {
    let all = Capabilities::all();
    for extra in ["", "balance = \"least-connections\"", "proxy_protocol = { send = \"v2\" }"] {
        assert_eq!(handed(extra, &all), (Some(Engine::Handoff), Vec::new()), "{extra}");
    }
    let ends = "tls = { mode = \"terminate\", certificates = [{ cert = \"c.pem\", key = \"k.pem\" }] }";
    let refused = |extra: &str| match handed(extra, &all) {
        (None, refused) => refused,
        (engine, _) => panic!("{extra}: {engine:?}"),
    };
    assert_eq!(refused(ends), [Refusal::NeedsBytes(Need::TlsTermination)]);
    assert_eq!(refused("protocol = \"udp\""), [Refusal::OnlyTcp]);
    assert_eq!(refused("source_address = \"client\""), [Refusal::ClientsPorts]);
    let to_itself = route("engine = \"handoff\"").replace("10.0.1.1:80", "127.0.0.1:80");
    let refused: Vec<_> = planned(&to_itself, &all).routes[0].refused.iter().map(|(_, r)| r.clone()).collect();
    assert_eq!(refused, [Refusal::StaysOnThisMachine]);
}

#[test]
fn a_kernel_that_cannot_hand_over_is_an_error_that_says_which_check_failed() {
    let broken = Capabilities { handoff: Handoff::ProbeFailed("SACK blocks".into()), ..Capabilities::all() };
    assert_eq!(
        planned(&route("engine = \"handoff\""), &broken).unserved()[0].to_string(),
        "route \"web\": no engine can serve it here: handoff: its self-probe failed on this kernel: SACK blocks"
    );
    let relayed = planned(&route("balance = \"least-connections\""), &broken);
    assert_eq!(relayed.routes[0].engine, Some(Engine::Splice));
}

#[test]
fn a_host_firewall_is_passed_by_only_where_the_configuration_says_so() {
    let chain = FilterChain { table: "ip filter".into(), chain: "FORWARD".into(), hook: Hook::Forward, priority: 0 };
    let filtered = Capabilities { filter: Some(chain.clone()), ..Capabilities::all() };
    assert_eq!(handed("", &filtered).0, Some(Engine::Handoff));
    let auto = planned(&route("balance = \"least-connections\""), &filtered);
    assert_eq!(auto.routes[0].engine, Some(Engine::Splice));
    let refused = auto.routes[0].refused.iter().filter(|(engine, _)| *engine == Engine::Handoff);
    let refused: Vec<_> = refused.map(|(_, refusal)| refusal.to_string()).collect();
    let why = "what is handed over would not be seen by chain FORWARD of table ip filter (hook forward, priority 0), which filters; \
               engine = \"handoff\" says that it may";
    assert_eq!(refused, [why]);
    // What the table forwards passes the chain.
    let forwarded = planned(&route(""), &filtered);
    assert!(!forwarded.routes[0].refused.iter().any(|(_, r)| matches!(r, Refusal::BypassesFirewall(_))));
}

#[test]
fn auto_takes_handoff_before_splice_where_the_machine_allows_it() {
    let all = Capabilities::all();
    let engine = |extra: &str, capabilities: &Capabilities| planned(&route(extra), capabilities).routes[0].engine;
    for reads in
        ["balance = \"least-connections\"", "proxy_protocol = { send = \"v2\" }", "match = { sni = [\"a.example\"] }"]
    {
        assert_eq!(engine(reads, &all), Some(Engine::Handoff), "{reads}");
        for missing in [Handoff::NotPermitted, Handoff::NoBpffs, Handoff::ProbeFailed("x".into()), Handoff::NotAsked] {
            let without = Capabilities { handoff: missing, ..all.clone() };
            assert_eq!(engine(reads, &without), Some(Engine::Splice), "{without:?}");
        }
    }
    assert_eq!(engine("", &all), Some(Engine::Nft));
    assert_eq!(engine("balance = \"least-connections\"\nsource_address = \"client\"", &all), Some(Engine::Splice));
}

#[test]
fn the_kernel_is_asked_where_its_answer_would_change_something() {
    let unasked = Capabilities { handoff: Handoff::NotAsked, ..Capabilities::all() };
    let awaits =
        |extra: &str, capabilities: &Capabilities| planned(&route(extra), capabilities).routes[0].awaits_handoff();
    assert!(awaits("balance = \"least-connections\"", &unasked) && awaits("engine = \"handoff\"", &unasked));
    let ends = "tls = { mode = \"terminate\", certificates = [{ cert = \"c.pem\", key = \"k.pem\" }] }";
    for not in [
        "",
        ends,
        "protocol = \"udp\"",
        "engine = \"splice\"",
        "balance = \"least-connections\"\nsource_address = \"client\"",
    ] {
        assert!(!awaits(not, &unasked), "{not}");
    }
    let chain = FilterChain { table: "ip filter".into(), chain: "INPUT".into(), hook: Hook::Input, priority: 0 };
    let filtered = Capabilities { filter: Some(chain), ..unasked.clone() };
    assert!(!awaits("balance = \"least-connections\"", &filtered), "the firewall has said no");
    let kept = planned(&route("balance = \"least-connections\""), &filtered);
    assert!(matches!(kept.routes[0].kept_by(), Some(Refusal::BypassesFirewall(_))), "and it is what people are told");
    let could = planned(&route("balance = \"least-connections\""), &filtered).routes[0].could_hand_over();
    assert!(could && !awaits("balance = \"least-connections\"", &Capabilities::all()));
}

#[test]
fn what_the_machine_allows_now_moves_routes_that_have_not_changed() {
    let text = route("balance = \"least-connections\"");
    let config = parse(&text, Path::new("/test.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    let without = Capabilities { handoff: Handoff::NoBpffs, ..Capabilities::all() };
    let mut changing = plan(&config, &without);
    assert!(replan(&config, &without, &changing).routes.is_empty());
    changing.put(replan(&config, &Capabilities::all(), &changing));
    assert_eq!(changing.routes[0].engine, Some(Engine::Handoff));
}
