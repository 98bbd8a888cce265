//! The router in front of owners that the tests play.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use axum::{
    body::Body,
    http::{Method, Request, StatusCode},
};
use http_body_util::BodyExt;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use proxy_core::{config::Engine, reason::Reason, view};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::{
    control::{AGE_BUCKETS, AgeHistogram, FlowCommand, FlowState, RouteCommand, RouteState},
    stream::{
        StreamCommand,
        meter::{Meters, Reader},
        rates::{Rate, Rates},
    },
};

pub(super) fn route_state() -> RouteState {
    let backend = |name: &str, up| view::Backend {
        name: name.to_owned(),
        addresses: vec![name.split(':').next().expect("address").parse().expect("address")],
        weight: 1,
        up,
        admin: view::BackendAdmin::Ready,
        reason: (!up).then(|| "connect refused".to_owned()),
        connections_active: 0,
    };
    let web = view::Route {
        name: "web".into(),
        protocol: "tcp".into(),
        listen: vec!["10.9.9.9:80".into()],
        engine: Engine::Nft,
        balance: "round-robin".into(),
        state: view::RouteState::Active,
        mark: 0x100,
        backends: vec![backend("10.0.0.1:80", true), backend("10.0.0.2:80", false)],
        stats: view::RouteStats::default(),
    };
    RouteState {
        ready: true,
        config_file: "/etc/shunt/shunt.toml".into(),
        routes: vec![Arc::new(web)],
        reconcile: view::ReconcileStatus { ok: 4, failed: 1, drift: 2, ..Default::default() },
        reloads_ok: 6,
        warnings: vec!["10.0.0.2:80 is down".into()],
        ..RouteState::default()
    }
}

pub(super) fn flow_state() -> FlowState {
    let stats = view::RouteStats {
        connections_active: 3,
        connections_total: 10,
        bytes_in: 1000,
        bytes_out: 2000,
        terminations: [(Reason::FinishedClientFirst, 7)].into(),
        ..Default::default()
    };
    let mut counts = [0; AGE_BUCKETS.len() + 1];
    (counts[0], counts[1], counts[10]) = (2, 3, 2);
    FlowState {
        routes: HashMap::from([("web".to_owned(), stats)]),
        backends: HashMap::from([("web".to_owned(), HashMap::from([("10.0.0.1:80".parse().expect("address"), 3)]))]),
        ages: HashMap::from([("web".to_owned(), AgeHistogram { counts, sum_seconds: 9.5 })]),
        conntrack: view::ConntrackStatus { entries: 12, max: 100, events_lost: 5, ..Default::default() },
        moving: Vec::new(),
        warnings: vec!["events were lost".into()],
    }
}

fn connection() -> view::Connection {
    view::Connection {
        id: "c1".into(),
        route: "web".into(),
        engine: Engine::Nft,
        protocol: "tcp".into(),
        client: "192.0.2.1:4711".parse().expect("address"),
        listen: "10.9.9.9:80".parse().expect("address"),
        backend: "10.0.0.1:80".parse().ok(),
        state: "established".into(),
        age_seconds: 1.0,
        idle_seconds: 0.5,
        expires_seconds: None,
        bytes_in: 1,
        bytes_out: 2,
        packets_in: 1,
        packets_out: 1,
        metered: true,
        not_handed_over: None,
    }
}

/// What the daemon has relayed: of the route that is forwarded now, and of none.
pub(super) fn relayed() -> (Reader, Rates) {
    let meters = |id: u32, name: &str| Meters {
        id,
        name: name.into(),
        workers: vec![Arc::default(), Arc::default()],
        backends: Default::default(),
    };
    let (web, none) = (meters(7, "web"), meters(0, "-"));
    for worker in &web.workers {
        let [copy, splice, ..] = &worker.engines;
        copy.began.add(3);
        copy.bytes_in.add(100);
        copy.terminations[Reason::ConnectRefused as usize].add(1);
        splice.promoted.add(2);
        splice.active.add(2);
        worker.connected(Duration::from_millis(3));
        worker.aged(Duration::from_millis(50));
    }
    none.workers[0].engines[0].began.add(4);
    none.workers[0].engines[0].terminations[Reason::NoRoute as usize].add(4);
    let open = Arc::new(AtomicU64::new(4));
    web.backends.write().expect("lock").push(("10.0.0.1:80".parse().expect("address"), open));
    let reader = Reader::default();
    reader.meters.put(Arc::new(web));
    reader.meters.put(Arc::new(none));
    let rate = Rate { connections: 1.5, bytes_in: 20.0, bytes_out: 0.0 };
    (reader, Rates::from([(7, rate)]))
}

fn relayed_connection() -> view::Connection {
    view::Connection {
        id: "s000000000000001".into(),
        engine: Engine::Splice,
        client: "192.0.2.2:4712".parse().expect("address"),
        age_seconds: 9.0,
        ..connection()
    }
}

fn answer_stream(command: StreamCommand) {
    match command {
        StreamCommand::Connections { filter, reply } => {
            let one = relayed_connection();
            let wanted = filter.id.as_ref().is_none_or(|id| *id == one.id)
                && filter.client_port.is_none_or(|port| port == one.client.port());
            reply.send(Ok(if wanted { vec![one] } else { Vec::new() })).expect("a listener");
        }
        StreamCommand::Refresh { reply } => reply.send(Ok(())).expect("a listener"),
        StreamCommand::Kill { id, reply } => {
            let one = relayed_connection();
            reply
                .send(Ok(view::Killed { id: id.to_string(), route: one.route, client: one.client }))
                .expect("a listener");
        }
    }
}

/// Owners that answer as the real ones would; nothing was relayed.
fn owners() -> Control {
    owners_of((Reader::default(), Rates::new()))
}

fn owners_of((relayed, rates): (Reader, Rates)) -> Control {
    let (routes, mut route_commands) = mpsc::channel(8);
    let (flows, mut flow_commands) = mpsc::channel(8);
    let (_, route_state) = watch::channel(Arc::new(route_state()));
    let (_, flow_state) = watch::channel(Arc::new(flow_state()));
    tokio::spawn(async move {
        while let Some(command) = route_commands.recv().await {
            answer_route(command);
        }
    });
    tokio::spawn(async move {
        while let Some(command) = flow_commands.recv().await {
            answer_flow(command);
        }
    });
    let (streams, mut stream_commands) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Some(command) = stream_commands.recv().await {
            answer_stream(command);
        }
    });
    let (_, relayed_rates) = watch::channel(Arc::new(rates));
    Control { routes, flows: Some(flows), streams, relayed, relayed_rates, route_state, flow_state }
}

fn answer_route(command: RouteCommand) {
    match command {
        RouteCommand::Reload { reply } => {
            let failure = view::Failure { error: "line 3: bad".into(), hint: Some("mend line 3".into()) };
            reply.send(Err(failure)).expect("a listener");
        }
        RouteCommand::SetBackend { route, backend, admin, reply } => {
            let mut found = route_state().routes[0].backends[0].clone();
            assert_eq!((route.as_str(), backend.as_str()), ("web", "10.0.0.1:80"));
            found.admin = admin;
            reply.send(Ok(found)).expect("a listener");
        }
        RouteCommand::Explain { route, reply } => {
            let explain = view::Explain {
                route,
                engine: Engine::Nft,
                because: "decided by the first packet".into(),
                refused: Vec::new(),
                path: vec!["client".into()],
                connection: None,
            };
            reply.send(Ok(explain)).expect("a listener");
        }
        RouteCommand::Ruleset { reply } => reply.send(Ok("table inet shunt {}".into())).expect("a listener"),
    }
}

fn answer_flow(command: FlowCommand) {
    match command {
        FlowCommand::Connections { filter, reply } => {
            let one = connection();
            let wanted = filter.id.as_ref().is_none_or(|id| *id == one.id)
                && filter.client.is_none_or(|client| client == one.client.ip())
                && filter.client_port.is_none_or(|port| port == one.client.port());
            reply.send(Ok(if wanted { vec![one] } else { Vec::new() })).expect("a listener");
        }
        FlowCommand::Kill { id, reply } => {
            let one = connection();
            reply.send(Ok(view::Killed { id, route: one.route, client: one.client })).expect("a listener");
        }
    }
}

async fn call(transport: Transport, method: Method, uri: &str, host: &str) -> (StatusCode, Value) {
    call_to(owners(), transport, method, uri, host).await
}

async fn call_to(control: Control, transport: Transport, method: Method, uri: &str, host: &str) -> (StatusCode, Value) {
    let router = router(Api::new(control), transport);
    let request = Request::builder().method(method).uri(uri).header("host", host).body(Body::empty()).expect("request");
    let response = TowerToHyperService::new(router).call(request).await.expect("infallible");
    let status = response.status();
    let bytes = response.into_body().collect().await.expect("body").to_bytes();
    let value =
        serde_json::from_slice(&bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into()));
    (status, value)
}

async fn get_unix(uri: &str) -> (StatusCode, Value) {
    call(Transport::Unix, Method::GET, uri, "localhost").await
}

async fn post_unix(uri: &str) -> (StatusCode, Value) {
    call(Transport::Unix, Method::POST, uri, "localhost").await
}

const TCP: Transport = Transport::Tcp { loopback: true };

#[tokio::test]
async fn status_puts_the_two_owners_together() {
    let (code, status) = get_unix("/v1/status").await;
    assert_eq!(code, StatusCode::OK);
    assert_eq!((&status["connections_active"], &status["connections_total"]), (&json!(3), &json!(10)));
    assert_eq!(status["warnings"], json!(["10.0.0.2:80 is down", "events were lost"]));
}

#[tokio::test]
async fn routes_carry_their_numbers_and_those_of_their_backends() {
    let (_, routes) = get_unix("/v1/routes").await;
    assert_eq!(routes[0]["bytes_out"], 2000);
    assert_eq!(routes[0]["backends"][0]["connections_active"], 3);
    assert_eq!(routes[0]["backends"][1]["connections_active"], 0);
}

#[tokio::test]
async fn changes_are_refused_over_tcp_and_taken_over_the_socket() {
    for uri in ["/v1/reload", "/v1/kill?id=c1", "/v1/backend?route=web&backend=10.0.0.1:80&state=drain"] {
        let (code, failure) = call(TCP, Method::POST, uri, "127.0.0.1:9900").await;
        assert_eq!(code, StatusCode::FORBIDDEN, "{uri}");
        assert!(failure["hint"].as_str().expect("hint").contains("Unix socket"));
    }
    let (code, backend) = post_unix("/v1/backend?route=web&backend=10.0.0.1:80&state=drain").await;
    assert_eq!((code, &backend["admin"]), (StatusCode::OK, &json!("drain")));
    let (code, killed) = post_unix("/v1/kill?id=c1").await;
    assert_eq!((code, &killed["route"]), (StatusCode::OK, &json!("web")));
}

#[tokio::test]
async fn changing_by_get_is_refused_too() {
    let (code, _) = get_unix("/v1/reload").await;
    assert_eq!(code, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn a_failed_reload_says_why() {
    let (code, failure) = post_unix("/v1/reload").await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(failure, json!({ "error": "line 3: bad", "hint": "mend line 3" }));
}

#[tokio::test]
async fn a_foreign_host_name_is_refused_on_loopback() {
    for (host, expected) in [
        ("evil.example:9900", StatusCode::FORBIDDEN),
        ("localhost:9900", StatusCode::OK),
        ("127.0.0.1:9900", StatusCode::OK),
        ("[::1]:9900", StatusCode::OK),
    ] {
        assert_eq!(call(TCP, Method::GET, "/v1/status", host).await.0, expected, "{host}");
    }
    let public = Transport::Tcp { loopback: false };
    assert_eq!(call(public, Method::GET, "/metrics", "shunt.monitoring:9900").await.0, StatusCode::OK);
}

#[tokio::test]
async fn explain_takes_a_route_a_connection_and_a_client() {
    for what in ["web", "c1", "192.0.2.1:4711"] {
        let (code, explained) = get_unix(&format!("/v1/explain?what={what}")).await;
        assert_eq!((code, &explained["route"]), (StatusCode::OK, &json!("web")), "{what}");
        assert_eq!(explained["connection"].is_null(), what == "web");
    }
    let (code, failure) = get_unix("/v1/explain?what=192.0.2.1:1").await;
    assert_eq!(code, StatusCode::NOT_FOUND);
    assert!(failure["error"].as_str().expect("error").contains("192.0.2.1:1"));
}

#[tokio::test]
async fn what_the_daemon_relays_is_in_every_view() {
    let (_, found) = get_unix("/v1/connections").await;
    let ids: Vec<_> = found.as_array().expect("list").iter().map(|one| one["id"].clone()).collect();
    assert_eq!(ids, [json!("s000000000000001"), json!("c1")], "the oldest first");
    assert_eq!(get_unix("/v1/connections?limit=1").await.1.as_array().map(Vec::len), Some(1));
    let (_, explained) = get_unix("/v1/explain?what=s000000000000001").await;
    assert_eq!(explained["connection"]["engine"], json!("splice"));
    let ask = |uri| call_to(owners_of(relayed()), Transport::Unix, Method::GET, uri, "shunt");
    let (_, routes) = ask("/v1/routes").await;
    let web = &routes[0];
    assert_eq!((&web["connections_active"], &web["connections_total"]), (&json!(3 + 4), &json!(10 + 6)));
    assert_eq!((&web["bytes_in"], &web["connections_rate"]), (&json!(1000 + 200), &json!(1.5)));
    assert_eq!(
        (&web["terminations"]["connect_refused"], &web["backends"][0]["connections_active"]),
        (&json!(2), &json!(7))
    );
    let (_, status) = ask("/v1/status").await;
    assert_eq!(status["connections_total"], json!(10 + 6 + 4));
}

#[tokio::test]
async fn a_kill_goes_to_who_has_the_connection() {
    for id in ["s000000000000001", "00000007a8aeb1a7"] {
        let (code, killed) = call(Transport::Unix, Method::POST, &format!("/v1/kill?id={id}"), "shunt").await;
        assert_eq!((code, &killed["id"]), (StatusCode::OK, &json!(id)));
        let client = if id.starts_with('s') { "192.0.2.2:4712" } else { "192.0.2.1:4711" };
        assert_eq!(killed["client"], json!(client));
    }
}

#[tokio::test]
async fn wrong_queries_are_json_failures_with_their_usage() {
    for uri in ["/v1/explain", "/v1/connections?client=nobody", "/v1/connections?limit=-1"] {
        let (code, failure) = get_unix(uri).await;
        assert_eq!(code, StatusCode::BAD_REQUEST, "{uri}");
        assert!(failure["hint"].as_str().expect("hint").starts_with("/v1/"), "{failure}");
    }
    assert_eq!(get_unix("/v1/connections?route=nowhere").await.0, StatusCode::NOT_FOUND);
    assert_eq!(get_unix("/nowhere").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn ready_follows_the_routes_and_health_the_owners() {
    assert_eq!(get_unix("/readyz").await.0, StatusCode::OK);
    assert_eq!(get_unix("/healthz").await.0, StatusCode::OK);
    let (routes, _) = mpsc::channel(1);
    let (flows, _) = mpsc::channel(1);
    let (_, route_state) = watch::channel(Arc::new(RouteState::default()));
    let (_, flow_state) = watch::channel(Arc::new(FlowState::default()));
    let (streams, _) = mpsc::channel(1);
    let (_, relayed_rates) = watch::channel(Arc::default());
    let relayed = Reader::default();
    let flows = Some(flows);
    let stopped = Api::new(Control { routes, flows, streams, relayed, relayed_rates, route_state, flow_state });
    for (uri, expected) in [("/readyz", 503), ("/healthz", 503), ("/v1/ruleset", 503), ("/v1/status", 200)] {
        let request = Request::get(uri).body(Body::empty()).expect("request");
        let service = TowerToHyperService::new(router(stopped.clone(), Transport::Unix));
        assert_eq!(service.call(request).await.expect("infallible").status(), expected, "{uri}");
    }
}

#[tokio::test]
async fn the_dashboard_loads_nothing_from_elsewhere() {
    let (code, page) = get_unix("/").await;
    let page = page.as_str().expect("text").to_owned();
    assert_eq!(code, StatusCode::OK);
    assert!(page.contains("/v1/status"));
    for outside in ["http://", "https://", "src=", "href="] {
        assert!(!page.contains(outside), "{outside}");
    }
}
