use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::resource::{UsageWho, getrusage};
use proxy_core::reason::Reason;

use super::*;
use crate::{
    admin::tests::{flow_state, relayed, route_state},
    control::{AgeHistogram, FlowState},
};

fn scraped(routes: RouteState, flows: FlowState) -> String {
    encode(Known { routes: Arc::new(routes), flows: Arc::new(flows), ..Known::default() }).expect("text")
}

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series));
    let line = line.unwrap_or_else(|| panic!("no series {series} in\n{text}"));
    line.rsplit_once(' ').expect("value").1.parse().expect("number")
}

#[test]
fn every_promised_name_is_there_with_its_value() {
    let text = scraped(route_state(), flow_state());
    for (series, expected) in [
        (r#"shunt_connections_active{route="web",engine="nft"}"#, 3.0),
        (r#"shunt_connections_total{route="web",engine="nft"}"#, 10.0),
        (r#"shunt_bytes_total{route="web",engine="nft",direction="in"}"#, 1000.0),
        (r#"shunt_bytes_total{route="web",engine="nft",direction="out"}"#, 2000.0),
        (r#"shunt_terminations_total{route="web",engine="nft",reason="finished_client_first"}"#, 7.0),
        (r#"shunt_connection_age_seconds_count{route="web"}"#, 7.0),
        (r#"shunt_connection_age_seconds_bucket{le="0.1",route="web"}"#, 5.0),
        (r#"shunt_connection_age_seconds_bucket{le="+Inf",route="web"}"#, 7.0),
        (r#"shunt_backend_up{route="web",backend="10.0.0.1:80"}"#, 1.0),
        (r#"shunt_backend_up{route="web",backend="10.0.0.2:80"}"#, 0.0),
        (r#"shunt_backend_connections_active{route="web",backend="10.0.0.1:80"}"#, 3.0),
        (r#"shunt_reconcile_total{result="ok"}"#, 4.0),
        (r#"shunt_reconcile_total{result="failed"}"#, 1.0),
        ("shunt_kernel_drift_total", 2.0),
        ("shunt_conntrack_events_lost_total", 5.0),
        (r#"shunt_config_reloads_total{result="ok"}"#, 6.0),
        (concat!("shunt_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
    ] {
        assert_eq!(value(&text, series), expected, "{series}");
    }
    assert!(text.ends_with("# EOF\n"));
    assert!(!text.contains("_total_total") && !text.contains("bytes_bytes"));
    assert!(!text.contains("shunt_connect_seconds"), "nft does not measure the time to connect");
}

#[test]
fn a_route_that_has_changed_its_engine_has_numbers_of_both_and_no_route_has_its_own() {
    let (routes, flows) = (Arc::new(route_state()), Arc::new(flow_state()));
    let (reader, rates) = relayed();
    let text = encode(Known { routes, flows, relayed: reader, rates: Arc::new(rates) }).expect("text");
    for (series, expected) in [
        (r#"shunt_connections_active{route="web",engine="nft"}"#, 3.0),
        (r#"shunt_connections_active{route="web",engine="copy"}"#, 0.0),
        (r#"shunt_connections_active{route="web",engine="splice"}"#, 4.0),
        (r#"shunt_connections_total{route="web",engine="copy"}"#, 6.0),
        (r#"shunt_connections_total{route="-",engine="copy"}"#, 4.0),
        (r#"shunt_promotions_total{route="web",engine="splice"}"#, 4.0),
        (r#"shunt_bytes_total{route="web",engine="copy",direction="in"}"#, 200.0),
        (r#"shunt_terminations_total{route="web",engine="copy",reason="connect_refused"}"#, 2.0),
        (r#"shunt_terminations_total{route="-",engine="copy",reason="no_route"}"#, 4.0),
        (r#"shunt_connect_seconds_bucket{le="0.002",route="web"}"#, 0.0),
        (r#"shunt_connect_seconds_bucket{le="0.005",route="web"}"#, 2.0),
        (r#"shunt_connect_seconds_sum{route="web"}"#, 0.006),
        (r#"shunt_connection_age_seconds_count{route="web"}"#, 9.0),
        (r#"shunt_backend_connections_active{route="web",backend="10.0.0.1:80"}"#, 7.0),
    ] {
        assert_eq!(value(&text, series), expected, "{series}");
    }
}

#[test]
fn types_and_units_are_declared_for_every_family() {
    let text = scraped(route_state(), flow_state());
    for line in [
        "# TYPE shunt_connections_active gauge",
        "# TYPE shunt_connections counter",
        "# TYPE shunt_bytes counter",
        "# UNIT shunt_bytes bytes",
        "# TYPE shunt_connection_age_seconds histogram",
        "# UNIT shunt_connection_age_seconds seconds",
        "# TYPE shunt_build info",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
}

#[test]
fn a_route_that_is_gone_leaves_no_series() {
    let gone = RouteState { routes: Vec::new(), ..route_state() };
    let text = scraped(gone, flow_state());
    assert!(!text.contains("web"), "{text}");
}

#[test]
fn a_route_without_connections_is_there_with_zeros() {
    let text = scraped(route_state(), FlowState::default());
    assert_eq!(value(&text, r#"shunt_connections_active{route="web",engine="nft"}"#), 0.0);
    assert_eq!(value(&text, r#"shunt_bytes_total{route="web",engine="nft",direction="in"}"#), 0.0);
}

/// Prints the cost; run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn cost_at_50_000_routes() {
    let template = view::Route::clone(&route_state().routes[0]);
    let (mut routes, mut flows) = (RouteState::default(), FlowState::default());
    for number in 0..50_000 {
        let name = format!("route-{number}");
        let mut stats = flow_state().routes.remove("web").expect("stats");
        stats.terminations.insert(Reason::ResetByClient, 1);
        flows.routes.insert(name.clone(), stats);
        flows.backends.insert(name.clone(), flow_state().backends.remove("web").expect("backends"));
        flows.ages.insert(name.clone(), AgeHistogram { counts: [1; AGE_BUCKETS.len() + 1], sum_seconds: 1.0 });
        routes.routes.push(Arc::new(view::Route { name, ..template.clone() }));
    }
    let without = Arc::new(FlowState { ages: HashMap::new(), ..flows.clone() });
    let (routes, flows) = (Arc::new(routes), Arc::new(flows));
    for (what, flows) in [("with ages", &flows), ("without", &without)].repeat(2) {
        let (began, spent) = (Instant::now(), cpu());
        let known = Known { routes: routes.clone(), flows: flows.clone(), ..Known::default() };
        let text = encode(known).expect("text");
        let (elapsed, spent) = (began.elapsed(), cpu() - spent);
        println!("{what}: {} lines, {} bytes, {elapsed:?}, CPU {spent:?}", text.lines().count(), text.len());
    }
}

/// CPU time of this thread, user and system.
fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("usage");
    let micros = [usage.user_time(), usage.system_time()].map(|time| time.tv_sec() * 1_000_000 + time.tv_usec());
    Duration::from_micros(micros.iter().sum::<i64>().unsigned_abs())
}
