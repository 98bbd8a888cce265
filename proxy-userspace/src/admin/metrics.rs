//! `/metrics`: the last snapshots of the owners, written out at every scrape. Nothing is kept between scrapes, so a route
//! that is gone leaves no series behind. The format is OpenMetrics text 1.0.

mod handoff;
mod process;

use std::{fmt, sync::atomic::Ordering::Relaxed};

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, LabelSetEncoder, MetricEncoder, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use proxy_core::{config::Engine, view};

use super::{
    Api, api,
    merge::{self, Known},
};
use crate::{
    acme::Outcome,
    control::{AGE_BUCKETS, AgeHistogram, RouteState},
    stream::{
        meter::{CONNECT_BUCKETS, EngineTotals, RouteTotals},
        rates::Rate,
    },
};

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) async fn scrape(State(api): State<Api>) -> Response {
    api::refresh(&api).await;
    let known = Known::now(&api);
    // 50,000 routes with traffic are 500,000 lines and some 160 ms, with ages 1.1 million and 280 ms: not on the daemon's
    // only thread.
    match tokio::task::spawn_blocking(move || encode(known)).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Ok(Err(error)) => api::internal(&error.to_string()),
        Err(error) => api::internal(&error.to_string()),
    }
}

pub(super) fn encode(known: Known) -> Result<String, fmt::Error> {
    let mut text = String::with_capacity(16 * 1024 + known.routes.routes.len() * 2048);
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Snapshots(known)));
    registry.register_collector(Box::new(process::Process));
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Snapshots(Known);

impl Collector for Snapshots {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let mut relayed = self.0.totals();
        let routes = &self.0.routes.routes;
        let mut measured: Vec<_> =
            routes.iter().map(|route| self.measured(route, relayed.remove(route.name.as_str()))).collect();
        measured.extend(relayed.remove(NO_ROUTE).map(|(totals, _)| unrouted(totals)));
        connections(&mut encoder, &measured)?;
        bytes(&mut encoder, &measured)?;
        terminations(&mut encoder, &measured)?;
        promotions(&mut encoder, &measured)?;
        connect(&mut encoder, &measured)?;
        ages(&mut encoder, &measured)?;
        backends(&mut encoder, &measured)?;
        handoff::attempts(&mut encoder, &measured)?;
        handoff::table(&mut encoder, &self.0.relayed.handed)?;
        tls(&mut encoder, &measured)?;
        self.certificates(&mut encoder)?;
        self.overflows(&mut encoder)?;
        self.orders(&mut encoder)?;
        self.daemon(&mut encoder)?;
        self.conntrack(&mut encoder)
    }
}

type Labels<'a, const N: usize> = [(&'a str, &'a str); N];

/// The route of connections that came to none: refused before one was found.
const NO_ROUTE: &str = "-";

/// The numbers of a route, copied together once: going back to the snapshots for every family would be a cache miss for
/// every line, and most of the time of a scrape.
#[derive(Debug)]
struct Measured {
    name: String,
    /// A route that has changed its engine has numbers of both.
    engines: Vec<(&'static str, EngineTotals)>,
    ages: Option<AgeHistogram>,
    /// Of connections that the daemon dialled.
    connect: Option<([u64; CONNECT_BUCKETS.len() + 1], f64)>,
    /// Name, up, connections open.
    backends: Vec<(String, bool, u64)>,
    /// TLS handshakes by result.
    handshakes: Vec<(&'static str, u64)>,
    /// Streams of clients and of backends that ended without `close_notify`.
    truncated: [u64; 2],
    /// Connections handed over, and attempts that came to nothing, by result.
    handovers: Vec<(&'static str, u64)>,
}

/// A route by one engine.
struct ByEngine<'a> {
    name: &'a str,
    engine: &'static str,
    totals: &'a EngineTotals,
}

impl ByEngine<'_> {
    fn labels(&self) -> Labels<'_, 2> {
        [("route", self.name), ("engine", self.engine)]
    }

    fn labels_and<'a>(&'a self, name: &'a str, value: &'a str) -> Labels<'a, 3> {
        [("route", self.name), ("engine", self.engine), (name, value)]
    }
}

impl Measured {
    fn engines(&self) -> impl Iterator<Item = ByEngine<'_>> {
        self.engines.iter().map(|(engine, totals)| ByEngine { name: &self.name, engine, totals })
    }

    fn backend<'a>(&'a self, name: &'a str) -> Labels<'a, 2> {
        [("route", &self.name), ("backend", name)]
    }
}

fn unrouted(totals: RouteTotals) -> Measured {
    let engines = totals.engines.into_iter().map(|(engine, totals)| (engine.as_str(), totals)).collect();
    Measured {
        name: NO_ROUTE.to_owned(),
        engines,
        ages: None,
        connect: None,
        backends: Vec::new(),
        handshakes: Vec::new(),
        truncated: [0; 2],
        handovers: Vec::new(),
    }
}

fn forwarded(stats: &view::RouteStats) -> EngineTotals {
    EngineTotals {
        active: stats.connections_active,
        total: stats.connections_total,
        promoted: 0,
        bytes_in: stats.bytes_in,
        bytes_out: stats.bytes_out,
        terminations: stats.terminations.iter().map(|(reason, count)| (*reason, *count)).collect(),
    }
}

impl Snapshots {
    fn measured(&self, route: &view::Route, relayed: Option<(RouteTotals, Rate)>) -> Measured {
        let (flows, relayed) = (&self.0.flows, relayed.map(|(totals, _)| totals));
        let active = merge::open(flows.backends.get(&route.name), relayed.as_ref());
        let backend =
            |backend: &view::Backend| (backend.name.clone(), backend.up, merge::backend_active(backend, &active));
        let backends = route.backends.iter().map(backend).collect();
        let mut engines: Vec<_> =
            flows.routes.get(&route.name).map(|stats| (Engine::Nft.as_str(), forwarded(stats))).into_iter().collect();
        let mut ages = flows.ages.get(&route.name).copied();
        let (mut connect, mut handshakes, mut truncated, mut handovers) = (None, Vec::new(), [0; 2], Vec::new());
        if let Some(totals) = relayed {
            (handshakes, truncated, handovers) = (totals.handshakes, totals.truncated, totals.handovers);
            ages = with(ages, totals.ages);
            connect =
                Some((totals.connect, totals.connect_seconds)).filter(|(counts, _)| counts.iter().any(|n| *n > 0));
            engines.extend(totals.engines.into_iter().map(|(engine, totals)| (engine.as_str(), totals)));
        }
        if engines.iter().all(|(engine, _)| *engine != route.engine.as_str()) {
            // Zeros for a route that has had no connection yet.
            engines.push((route.engine.as_str(), EngineTotals::default()));
        }
        Measured { name: route.name.clone(), engines, ages, connect, backends, handshakes, truncated, handovers }
    }

    fn daemon(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let RouteState { ready, reconcile, reloads_ok, reloads_failed, routes, .. } = &*self.0.routes;
        let by_result = |encoder: &mut DescriptorEncoder, name, help, ok, failed| {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (result, count) in [("ok", ok), ("failed", failed)] {
                let labels: Labels<1> = [("result", result)];
                counter(metric.encode_family(&labels)?, count)?;
            }
            Ok(())
        };
        let help = "Changes brought into the kernel.";
        by_result(encoder, "shunt_reconcile", help, reconcile.ok, reconcile.failed)?;
        let help = "Reloads of the configuration.";
        by_result(encoder, "shunt_config_reloads", help, *reloads_ok, *reloads_failed)?;
        let help = "Times somebody else changed shunt's table and it was repaired.";
        single_counter(encoder, "shunt_kernel_drift", help, reconcile.drift)?;
        single_gauge(encoder, "shunt_ready", "1 when the ruleset is in the kernel.", u64::from(*ready))?;
        single_gauge(encoder, "shunt_routes", "Routes, also those that drain.", routes.len() as u64)?;
        let warnings = self.0.warnings().count();
        single_gauge(encoder, "shunt_warnings", "Warnings that shunt status shows.", warnings as u64)?;
        let mut info = encoder.encode_descriptor("shunt_build", "The running build.", None, MetricType::Info)?;
        let labels: Labels<1> = [("version", env!("CARGO_PKG_VERSION"))];
        info.encode_info(&labels)
    }

    /// Only where sockets are joined: everywhere else it means nothing.
    fn overflows(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        if self.0.routes.routes.iter().all(|route| route.engine != Engine::Sockmap) {
            return Ok(());
        }
        let help = "Joined connections that were ended because more waited in the kernel than their windows allow.";
        let mut metric = encoder.encode_descriptor("shunt_sockmap_overflows", help, None, MetricType::Counter)?;
        for (bound, count) in ["connection", "worker"].into_iter().zip(&self.0.relayed.pressure.overflowed) {
            let labels: Labels<1> = [("bound", bound)];
            counter(metric.encode_family(&labels)?, count.load(Relaxed))?;
        }
        Ok(())
    }

    fn certificates(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let tls = &self.0.relayed.tls;
        let expiries = tls.expiries();
        if expiries.is_empty() {
            return Ok(());
        }
        let help = "When a certificate expires, in seconds since the Unix epoch; by its file.";
        let (name, unit) = ("shunt_tls_certificate_expiry", Some(&Unit::Seconds));
        let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for (file, expires) in &expiries {
            let labels: Labels<1> = [("name", file)];
            gauge(metric.encode_family(&labels)?, u64::try_from(*expires).unwrap_or_default())?;
        }
        let help = "Changes of certificate files while the daemon runs, by route; failed: the old ones stay.";
        let mut metric = encoder.encode_descriptor("shunt_tls_certificate_reloads", help, None, MetricType::Counter)?;
        let (ok, failed) = tls.reloads();
        for (result, count) in [("ok", ok), ("failed", failed)] {
            let labels: Labels<1> = [("result", result)];
            counter(metric.encode_family(&labels)?, count)?;
        }
        Ok(())
    }

    fn orders(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let acme = &self.0.relayed.acme;
        if !acme.is_used() {
            return Ok(());
        }
        let help = "Orders for certificates at the ACME CA that ended, by how; all but ok are tried again.";
        let mut metric = encoder.encode_descriptor("shunt_acme_orders", help, None, MetricType::Counter)?;
        for outcome in Outcome::ALL {
            let labels: Labels<1> = [("result", outcome.label())];
            counter(metric.encode_family(&labels)?, acme.orders(outcome))?;
        }
        Ok(())
    }

    fn conntrack(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let view::ConntrackStatus { entries, max, events, events_lost, dumps, last_dump_ms } = self.0.flows.conntrack;
        single_gauge(encoder, "shunt_conntrack_entries", "Entries in the namespace's conntrack table.", entries)?;
        single_gauge(encoder, "shunt_conntrack_max", "Entries the conntrack table can hold.", max)?;
        single_counter(encoder, "shunt_conntrack_events", "Conntrack events read.", events)?;
        let help = "Times the event socket ran over; a dump made the numbers right again.";
        single_counter(encoder, "shunt_conntrack_events_lost", help, events_lost)?;
        single_counter(encoder, "shunt_conntrack_dumps", "Reads of the whole conntrack table.", dumps)?;
        let help = "Time the last read of the whole conntrack table took.";
        let unit = Some(&Unit::Seconds);
        let metric = encoder.encode_descriptor("shunt_conntrack_last_dump", help, unit, MetricType::Gauge)?;
        ConstGauge::new(last_dump_ms / 1000.0).encode(metric)
    }
}

fn with(known: Option<AgeHistogram>, more: AgeHistogram) -> Option<AgeHistogram> {
    if more.counts.iter().all(|count| *count == 0) {
        return known;
    }
    let known = known.unwrap_or_default();
    let counts = std::array::from_fn(|i| known.counts[i] + more.counts[i]);
    Some(AgeHistogram { counts, sum_seconds: known.sum_seconds + more.sum_seconds })
}

fn connections(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    let help = "Connections open now.";
    let mut metric = encoder.encode_descriptor("shunt_connections_active", help, None, MetricType::Gauge)?;
    for one in measured.iter().flat_map(Measured::engines) {
        gauge(metric.encode_family(&one.labels())?, one.totals.active)?;
    }
    let help = "Connections that came, also the refused ones, by the engine they began with.";
    let mut metric = encoder.encode_descriptor("shunt_connections", help, None, MetricType::Counter)?;
    for one in measured.iter().flat_map(Measured::engines) {
        counter(metric.encode_family(&one.labels())?, one.totals.total)?;
    }
    Ok(())
}

fn promotions(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    let help = "Connections that came to this engine from another one while they lived.";
    let mut metric = encoder.encode_descriptor("shunt_promotions", help, None, MetricType::Counter)?;
    for one in measured.iter().flat_map(Measured::engines).filter(|one| one.totals.promoted > 0) {
        counter(metric.encode_family(&one.labels())?, one.totals.promoted)?;
    }
    Ok(())
}

fn bytes(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    let help = "Bytes carried: in is client to backend, out is backend to client. Engine nft counts whole IP packets, the \
                others what they relayed of the stream.";
    let mut metric = encoder.encode_descriptor("shunt", help, Some(&Unit::Bytes), MetricType::Counter)?;
    for one in measured.iter().flat_map(Measured::engines) {
        for (direction, bytes) in [("in", one.totals.bytes_in), ("out", one.totals.bytes_out)] {
            counter(metric.encode_family(&one.labels_and("direction", direction))?, bytes)?;
        }
    }
    Ok(())
}

fn terminations(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    let help = "Connections that ended, by the one reason each has; internal_error is a defect in shunt.";
    let mut metric = encoder.encode_descriptor("shunt_terminations", help, None, MetricType::Counter)?;
    for one in measured.iter().flat_map(Measured::engines) {
        for (reason, count) in &one.totals.terminations {
            counter(metric.encode_family(&one.labels_and("reason", reason.label()))?, *count)?;
        }
    }
    Ok(())
}

fn connect(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    if measured.iter().all(|one| one.connect.is_none()) {
        return Ok(());
    }
    let help = "Time it took to reach a backend, with all attempts; of connections that the daemon dials.";
    let unit = Some(&Unit::Seconds);
    let mut metric = encoder.encode_descriptor("shunt_connect", help, unit, MetricType::Histogram)?;
    for one in measured {
        let Some((counts, sum)) = &one.connect else { continue };
        let buckets: Vec<_> = CONNECT_BUCKETS.into_iter().chain([f64::INFINITY]).zip(*counts).collect();
        let labels: Labels<1> = [("route", &one.name)];
        let mut metric = metric.encode_family(&labels)?;
        metric.encode_histogram::<NoLabels>(*sum, counts.iter().sum(), &buckets, None)?;
    }
    Ok(())
}

fn ages(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    let help = "Age of the connections that ended.";
    let unit = Some(&Unit::Seconds);
    let mut metric = encoder.encode_descriptor("shunt_connection_age", help, unit, MetricType::Histogram)?;
    for one in measured {
        let Some(ages) = &one.ages else { continue };
        let bounds = AGE_BUCKETS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(ages.counts).collect();
        let labels: Labels<1> = [("route", &one.name)];
        let mut metric = metric.encode_family(&labels)?;
        metric.encode_histogram::<NoLabels>(ages.sum_seconds, ages.counts.iter().sum(), &buckets, None)?;
    }
    Ok(())
}

fn backends(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    let help = "1 when the backend takes new connections.";
    let mut metric = encoder.encode_descriptor("shunt_backend_up", help, None, MetricType::Gauge)?;
    for one in measured {
        for (name, up, _) in &one.backends {
            gauge(metric.encode_family(&one.backend(name))?, u64::from(*up))?;
        }
    }
    let help = "Connections open now, by backend.";
    let mut metric = encoder.encode_descriptor("shunt_backend_connections_active", help, None, MetricType::Gauge)?;
    for one in measured {
        for (name, _, open) in &one.backends {
            gauge(metric.encode_family(&one.backend(name))?, *open)?;
        }
    }
    Ok(())
}

fn tls(encoder: &mut DescriptorEncoder, measured: &[Measured]) -> fmt::Result {
    let shaken = |one: &&Measured| !one.handshakes.is_empty();
    if measured.iter().filter(shaken).count() == 0 {
        return Ok(());
    }
    let help = "TLS handshakes that ended, with clients and (backend_) with backends.";
    let mut metric = encoder.encode_descriptor("shunt_tls_handshakes", help, None, MetricType::Counter)?;
    for one in measured.iter().filter(shaken) {
        for (result, count) in &one.handshakes {
            let labels: Labels<2> = [("route", &one.name), ("result", result)];
            counter(metric.encode_family(&labels)?, *count)?;
        }
    }
    let help = "Streams that ended without close_notify, so that nobody knows whether something is missing.";
    let mut metric = encoder.encode_descriptor("shunt_tls_truncated", help, None, MetricType::Counter)?;
    for one in measured.iter().filter(shaken) {
        for (side, count) in ["client", "backend"].into_iter().zip(one.truncated) {
            let labels: Labels<2> = [("route", &one.name), ("side", side)];
            counter(metric.encode_family(&labels)?, count)?;
        }
    }
    Ok(())
}

fn single_counter(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: u64) -> fmt::Result {
    counter(encoder.encode_descriptor(name, help, None, MetricType::Counter)?, value)
}

fn single_gauge(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: u64) -> fmt::Result {
    gauge(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?, value)
}

/// `_total` is added to the name by the library.
fn counter(metric: MetricEncoder, value: u64) -> fmt::Result {
    ConstCounter::new(value).encode(metric)
}

fn gauge(metric: MetricEncoder, value: u64) -> fmt::Result {
    ConstGauge::new(value).encode(metric)
}

/// The label set of exemplars, of which there are none.
#[derive(Debug)]
struct NoLabels;

impl prometheus_client::encoding::EncodeLabelSet for NoLabels {
    fn encode(&self, _: &mut LabelSetEncoder) -> fmt::Result {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
