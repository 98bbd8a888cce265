use std::net::SocketAddr;

use proxy_core::{config::Engine, reason::Reason};

use super::*;

/// What a pipe gets: without styles.
fn plain(text: &str) -> String {
    anstream::adapter::strip_str(text).to_string()
}

fn backend_named(name: &str, up: bool, admin: view::BackendAdmin) -> view::Backend {
    view::Backend {
        name: name.to_owned(),
        addresses: vec![[10, 0, 0, 1].into()],
        weight: 2,
        up,
        admin,
        reason: (!up).then(|| "connect: refused".to_owned()),
        connections_active: 1500,
    }
}

fn web() -> view::Route {
    view::Route {
        name: "web".into(),
        protocol: "tcp".into(),
        listen: vec!["10.9.9.9:80".into(), "[fd00::9]:80".into()],
        engine: Engine::Nft,
        balance: "round-robin".into(),
        state: view::RouteState::Active,
        mark: 0x100,
        backends: vec![
            backend_named("10.0.0.1:80", true, view::BackendAdmin::Ready),
            backend_named("10.0.0.2:80", false, view::BackendAdmin::Ready),
        ],
        stats: view::RouteStats {
            connections_active: 1234,
            connections_total: 98_765,
            bytes_in: 3 << 20,
            bytes_out: 5 << 30,
            connections_rate: 0.5,
            bytes_in_rate: 2048.0,
            bytes_out_rate: 1e9,
            terminations: [(Reason::FinishedClientFirst, 12), (Reason::IdleTimeout, 1)].into(),
            oldest_seconds: 3700.0,
            ..Default::default()
        },
    }
}

fn connection(client: &str, metered: bool) -> view::Connection {
    let address = |text: &str| text.parse::<SocketAddr>().expect("address");
    view::Connection {
        id: "7f3a".into(),
        route: "web".into(),
        engine: Engine::Nft,
        protocol: "tcp".into(),
        client: address(client),
        listen: address("10.9.9.9:80"),
        backend: Some(address("10.0.0.1:80")),
        state: "established".into(),
        age_seconds: 75.0,
        idle_seconds: 0.25,
        expires_seconds: Some(14_400.0),
        bytes_in: 10,
        bytes_out: 2048,
        packets_in: 1,
        packets_out: 2,
        metered,
        not_handed_over: None,
    }
}

#[test]
fn routes_are_aligned_and_in_readable_units() {
    let second = view::Route { name: "a-longer-name".into(), listen: vec!["1.2.3.4:5".into()], ..web() };
    let text = plain(&routes(&[web(), second]));
    let expected = "\
ROUTE          LISTENS ON          ENGINE  OPEN  TOTAL  NEW/S         IN        OUT   UP  STATE
web            10.9.9.9:80/tcp +1  nft     1.2k  98.8k    0.5  2.0 KiB/s  954 MiB/s  1/2  active
a-longer-name  1.2.3.4:5/tcp       nft     1.2k  98.8k    0.5  2.0 KiB/s  954 MiB/s  1/2  active
";
    assert_eq!(text, expected);
}

#[test]
fn styles_never_move_a_column() {
    let styled = routes(&[web()]);
    assert!(styled.contains('\u{1b}'), "styled for terminals");
    assert!(plain(&styled).lines().all(|line| line.trim_end() == line));
}

#[test]
fn a_connection_without_accounting_shows_no_false_bytes() {
    let text = plain(&connections(&[connection("[2001:db8::1]:4711", true), connection("192.0.2.1:9", false)]));
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[1].contains("[2001:db8::1]:4711/tcp") && lines[1].ends_with("10 B  2.0 KiB"), "{text}");
    assert!(lines[1].contains("1m15s") && lines[1].contains("4h0m"), "{text}");
    assert!(lines[2].ends_with("?        ?"), "{text}");
}

#[test]
fn one_route_shows_its_backends_and_why_connections_ended() {
    let text = plain(&route(&web()));
    for part in [
        "10.9.9.9:80, [fd00::9]:80 (tcp)",
        "finished_client_first 12, idle_timeout 1",
        "connect: refused",
        "oldest 1h1m",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    assert!(text.lines().all(|line| line.trim_end() == line), "{text}");
    let drained = plain(&backend(&backend_named("10.0.0.1:80", true, view::BackendAdmin::Drain)));
    assert!(drained.contains("drain"), "{drained}");
}

#[test]
fn status_says_every_warning() {
    let status = view::Status {
        version: "0.1.0".into(),
        pid: 7,
        uptime_seconds: 61.0,
        config_file: "/etc/shunt/shunt.toml".into(),
        ready: false,
        routes: 2,
        connections_active: 3,
        connections_total: 4,
        reconcile: view::ReconcileStatus { last_error: Some("EPERM".into()), ..Default::default() },
        conntrack: view::ConntrackStatus { entries: 90, max: 100, events_lost: 5, ..Default::default() },
        handoff: Some(view::HandoffStatus {
            connections: 7,
            entries: 9,
            max: 131_072,
            adopted: 2,
            results: [("done".to_owned(), 9), ("no_port".to_owned(), 3)].into(),
        }),
        reloads_ok: 1,
        reloads_failed: 2,
        acme: Vec::new(),
        warnings: vec!["conntrack is nearly full".into(), "events were lost".into()],
    };
    let text = plain(&super::status(&status));
    for part in [
        "not ready",
        "EPERM",
        "90 of 100",
        "7 open, 9 of 131",
        "no_port 3",
        "5 lost",
        "3 reloads, 2 failed",
        "nearly full",
        "events were lost",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

#[test]
fn an_explanation_has_every_refusal_and_every_hop() {
    let explained = view::Explain {
        route: "web".into(),
        engine: Engine::Nft,
        because: "decided by the first packet".into(),
        refused: vec![view::Refused { engine: Engine::Splice, reason: "not in this build".into() }],
        path: vec!["client".into(), "gateway".into(), "backend".into()],
        connection: Some(connection("192.0.2.1:9", false)),
    };
    let text = plain(&explain(&explained));
    for part in ["nft: decided by the first packet", "splice: not in this build", "gateway", "not known"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

#[test]
fn a_reload_of_thousands_of_routes_stays_readable() {
    let names: Vec<_> = (0..5000).map(|number| format!("r{number}")).collect();
    let text = reload(&view::Reload {
        added: names,
        changed: vec![],
        removed: vec![],
        unchanged: 1,
        apply_ms: 2.0,
        changes: 5,
    });
    assert!(text.lines().count() < 30 && text.contains("and 4980 more"), "{text}");
}
