//! `/metrics`: the last snapshots of the owners, written out at every scrape. Nothing is kept between scrapes, so a route
//! that is gone leaves no series behind. The format is OpenMetrics text 1.0.

mod process;

use std::{fmt, sync::Arc};

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
use proxy_core::view;

use super::{Api, api, merge};
use crate::control::{AGE_BUCKETS, FlowState, RouteState};

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) async fn scrape(State(api): State<Api>) -> Response {
    let (routes, flows) = api::snapshots(&api);
    // Some 100 ms at 50,000 routes: not on the daemon's only thread.
    match tokio::task::spawn_blocking(move || encode(routes, flows)).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Ok(Err(error)) => api::internal(&error.to_string()),
        Err(error) => api::internal(&error.to_string()),
    }
}

pub(super) fn encode(routes: Arc<RouteState>, flows: Arc<FlowState>) -> Result<String, fmt::Error> {
    let mut text = String::with_capacity(16 * 1024 + routes.routes.len() * 1024);
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Snapshots { routes, flows }));
    registry.register_collector(Box::new(process::Process));
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Snapshots {
    routes: Arc<RouteState>,
    flows: Arc<FlowState>,
}

impl Collector for Snapshots {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        self.connections(&mut encoder)?;
        self.bytes(&mut encoder)?;
        self.terminations(&mut encoder)?;
        self.ages(&mut encoder)?;
        self.backends(&mut encoder)?;
        self.daemon(&mut encoder)?;
        self.conntrack(&mut encoder)
    }
}

type Labels<'a, const N: usize> = [(&'a str, &'a str); N];

impl Snapshots {
    /// Every route with its numbers; zero for one that has had no connection yet.
    fn measured(&self) -> impl Iterator<Item = (&view::Route, Option<&view::RouteStats>)> {
        self.routes.routes.iter().map(|route| (&**route, self.flows.routes.get(&route.name)))
    }

    fn connections(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let help = "Connections open now.";
        let mut metric = encoder.encode_descriptor("shunt_connections_active", help, None, MetricType::Gauge)?;
        for (route, stats) in self.measured() {
            gauge(metric.encode_family(&of(route))?, stats.map_or(0, |stats| stats.connections_active))?;
        }
        let help = "Connections that came, also the refused ones.";
        let mut metric = encoder.encode_descriptor("shunt_connections", help, None, MetricType::Counter)?;
        for (route, stats) in self.measured() {
            counter(metric.encode_family(&of(route))?, stats.map_or(0, |stats| stats.connections_total))?;
        }
        Ok(())
    }

    fn bytes(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let help =
            "Bytes carried: in is client to backend, out is backend to client. Engine nft counts whole IP packets.";
        let mut metric = encoder.encode_descriptor("shunt", help, Some(&Unit::Bytes), MetricType::Counter)?;
        for (route, stats) in self.measured() {
            let (bytes_in, bytes_out) = stats.map_or((0, 0), |stats| (stats.bytes_in, stats.bytes_out));
            for (direction, bytes) in [("in", bytes_in), ("out", bytes_out)] {
                let labels: Labels<3> =
                    [("route", &route.name), ("engine", route.engine.as_str()), ("direction", direction)];
                counter(metric.encode_family(&labels)?, bytes)?;
            }
        }
        Ok(())
    }

    fn terminations(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let help = "Connections that ended, by the one reason each has; internal_error is a defect in shunt.";
        let mut metric = encoder.encode_descriptor("shunt_terminations", help, None, MetricType::Counter)?;
        for (route, stats) in self.measured() {
            for (reason, count) in stats.into_iter().flat_map(|stats| &stats.terminations) {
                let labels: Labels<3> =
                    [("route", &route.name), ("engine", route.engine.as_str()), ("reason", reason.label())];
                counter(metric.encode_family(&labels)?, *count)?;
            }
        }
        Ok(())
    }

    fn ages(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let help = "Age of the connections that ended.";
        let unit = Some(&Unit::Seconds);
        let mut metric = encoder.encode_descriptor("shunt_connection_age", help, unit, MetricType::Histogram)?;
        for (route, _) in self.measured() {
            let Some(ages) = self.flows.ages.get(&route.name) else { continue };
            let bounds = AGE_BUCKETS.into_iter().chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(ages.counts).collect();
            let labels: Labels<1> = [("route", &route.name)];
            let mut metric = metric.encode_family(&labels)?;
            metric.encode_histogram::<NoLabels>(ages.sum_seconds, ages.counts.iter().sum(), &buckets, None)?;
        }
        Ok(())
    }

    fn backends(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let help = "1 when the backend takes new connections.";
        let mut metric = encoder.encode_descriptor("shunt_backend_up", help, None, MetricType::Gauge)?;
        for route in &self.routes.routes {
            for backend in &route.backends {
                gauge(metric.encode_family(&backend_of(route, backend))?, u64::from(backend.up))?;
            }
        }
        let help = "Connections open now, by backend.";
        let mut metric =
            encoder.encode_descriptor("shunt_backend_connections_active", help, None, MetricType::Gauge)?;
        for route in &self.routes.routes {
            let active = self.flows.backends.get(&route.name);
            for backend in &route.backends {
                let count = active.map_or(0, |active| merge::backend_active(backend, active));
                gauge(metric.encode_family(&backend_of(route, backend))?, count)?;
            }
        }
        Ok(())
    }

    fn daemon(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let RouteState { ready, reconcile, reloads_ok, reloads_failed, routes, .. } = &*self.routes;
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
        let warnings = self.routes.warnings.len() + self.flows.warnings.len();
        single_gauge(encoder, "shunt_warnings", "Warnings that shunt status shows.", warnings as u64)?;
        let mut info = encoder.encode_descriptor("shunt_build", "The running build.", None, MetricType::Info)?;
        let labels: Labels<1> = [("version", env!("CARGO_PKG_VERSION"))];
        info.encode_info(&labels)
    }

    fn conntrack(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let view::ConntrackStatus { entries, max, events, events_lost, dumps, last_dump_ms } = self.flows.conntrack;
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

fn of(route: &view::Route) -> Labels<'_, 2> {
    [("route", &route.name), ("engine", route.engine.as_str())]
}

fn backend_of<'a>(route: &'a view::Route, backend: &'a view::Backend) -> Labels<'a, 2> {
    [("route", &route.name), ("backend", &backend.name)]
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
