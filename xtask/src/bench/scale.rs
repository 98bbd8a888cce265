//! shunt with few and with very many routes.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use comfy_table::Table;
use serde::Serialize;
use shunt_lab::{
    GATEWAY, Lab, Shunt, kernel, load,
    scripted::{Behaviour, TcpServer},
    wait_for,
};

use super::{
    paths,
    report::{new_table, number_text, right},
    services,
};
use crate::{stop, ui};

const ROUTES: [usize; 4] = [10, 1000, 10_000, 50_000];
const FIRST_PORT: u16 = 10_000;
/// Where the many routes lead.
const BACKEND_PORT: u16 = 7020;
const CONNECTS: usize = 4000;
const RELOADS: usize = 5;
/// The rate at which the daemon's own cost is stated.
const RATE: u32 = 20_000;
/// For so long: reset connections leave conntrack after ten seconds, so ends come in while others begin.
const LOAD: Duration = Duration::from_secs(15);

/// One number of routes.
#[derive(Debug, Clone, Serialize)]
pub struct ScaleRow {
    pub routes: usize,
    pub connect_p50_us: f64,
    pub connect_p99_us: f64,
    /// First install, from the end of parsing to applied.
    pub install_ms: f64,
    /// From start to ready, by the clock.
    pub ready_ms: f64,
    /// CPU the daemon has used when it is ready.
    pub start_cpu_ms: f64,
    pub resident_mb: f64,
    /// One route of them changed: from the end of parsing to applied, median.
    pub reload_apply_ms: f64,
    /// The same by the clock of one who runs `shunt reload`.
    pub reload_command_ms: f64,
    pub load: LoadRow,
}

/// New connections at a fixed rate, and what the daemon makes of them.
#[derive(Debug, Clone, Serialize)]
pub struct LoadRow {
    pub asked_per_second: u32,
    pub made_per_second: f64,
    pub made: u64,
    pub failed: u64,
    /// Percent of one core.
    pub daemon_cpu_percent: f64,
    /// What the route's counter had grown by when it stood still.
    pub counted: u64,
    /// What its ends had grown by, whatever the reason.
    pub ended: u64,
}

impl ScaleRow {
    pub fn table(rows: &[Self]) -> Table {
        let mut table = new_table();
        let header = ["routes", "connect p50", "p99", "install", "start to ready", "CPU until ready", "memory"];
        let more = ["one changed", "`shunt reload`", "new conns", "daemon CPU", "made = counted = ended"];
        table.set_header(header.into_iter().chain(more));
        for row in rows {
            let load = &row.load;
            let right_or_not = if load.made == load.counted && load.made == load.ended {
                "yes".to_owned()
            } else {
                format!("{} / {} / {}", load.made, load.counted, load.ended)
            };
            table.add_row(
                [
                    row.routes.to_string(),
                    format!("{} µs", number_text(row.connect_p50_us)),
                    format!("{} µs", number_text(row.connect_p99_us)),
                    format!("{} ms", number_text(row.install_ms)),
                    format!("{} ms", number_text(row.ready_ms)),
                    format!("{} ms", number_text(row.start_cpu_ms)),
                    format!("{} MB", number_text(row.resident_mb)),
                    format!("{} ms", number_text(row.reload_apply_ms)),
                    format!("{} ms", number_text(row.reload_command_ms)),
                    format!("{} /s", number_text(load.made_per_second)),
                    format!("{} %", number_text(load.daemon_cpu_percent)),
                    right_or_not,
                ]
                .map(right),
            );
        }
        table
    }
}

/// Measures every number of routes, one after the other.
pub fn measure(lab: &Lab, binary: &Path, quick: bool) -> Result<Vec<ScaleRow>> {
    let _server = TcpServer::start(lab.backend(1), BACKEND_PORT, Behaviour::Reply(Vec::new()))?;
    let (counts, load) = if quick { (&ROUTES[..2], LOAD / 5) } else { (&ROUTES[..], LOAD) };
    let mut rows = Vec::new();
    for routes in counts {
        stop::check()?;
        ui::step(&format!("scale: {routes} routes"));
        rows.push(one(lab, binary, *routes, load).with_context(|| format!("{routes} routes"))?);
    }
    Ok(rows)
}

fn one(lab: &Lab, binary: &Path, routes: usize, load: Duration) -> Result<ScaleRow> {
    let begin = Instant::now();
    let mut shunt = Shunt::builder().binary(binary).start(lab, &config(routes, None))?;
    let ready = begin.elapsed();
    let pid = shunt.pid()?;
    let (start_cpu, resident) = (kernel::cpu_seconds(pid)?, kernel::resident_bytes(pid)?);
    let status = shunt.cli_json(&["status"])?;
    let install_ms = status["reconcile"]["last_apply_ms"].as_f64().context("status: reconcile.last_apply_ms")?;

    let latencies = load::connect_latency(lab.client(), &targets(routes), CONNECTS)?;
    let (reload_apply_ms, reload_command_ms) = reload(&shunt, routes)?;
    let load = under_load(lab, &shunt, load)?;

    shunt.terminate(Duration::from_secs(60))?;
    shunt_lab::run(&mut shunt.command(&["cleanup"]))?;
    kernel::conntrack_flush(lab.gateway())?;
    let microseconds = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e3;
    Ok(ScaleRow {
        routes,
        connect_p50_us: microseconds(0.5),
        connect_p99_us: microseconds(0.99),
        install_ms,
        ready_ms: milliseconds(ready),
        start_cpu_ms: start_cpu * 1e3,
        resident_mb: resident as f64 / 1e6,
        reload_apply_ms,
        reload_command_ms,
        load,
    })
}

/// The routes of the benchmark and `routes` more, one port each. `changed`: the middle one leads to this port.
fn config(routes: usize, changed: Option<u16>) -> String {
    let mut text = paths::SHUNT.to_owned();
    let backend = Ipv4Addr::new(10, 88, 2, 2);
    for n in 0..routes {
        let port = usize::from(FIRST_PORT) + n;
        let to = changed.filter(|_| n == routes / 2).unwrap_or(BACKEND_PORT);
        let _ = write!(
            text,
            "\n[[route]]\nname = \"r{n}\"\nlisten = [\"{GATEWAY}:{port}\"]\nbackends = [\"{backend}:{to}\"]\n"
        );
    }
    text
}

/// Sixteen routes, spread over all.
fn targets(routes: usize) -> Vec<SocketAddr> {
    let port = |n: usize| FIRST_PORT + (n * (routes - 1) / 15) as u16;
    (0..16).map(|n| (GATEWAY, port(n)).into()).collect()
}

/// Median of what the daemon says and of what the clock says.
fn reload(shunt: &Shunt, routes: usize) -> Result<(f64, f64)> {
    let (mut applied, mut commanded) = (Vec::new(), Vec::new());
    for n in 0..RELOADS {
        shunt.write_config(&config(routes, Some(BACKEND_PORT + 1 + n as u16)))?;
        let begin = Instant::now();
        let answer = shunt.cli_json(&["reload"])?;
        commanded.push(milliseconds(begin.elapsed()));
        anyhow::ensure!(answer["changed"].as_array().is_some_and(|c| c.len() == 1), "reload of one change: {answer}");
        applied.push(answer["apply_ms"].as_f64().with_context(|| format!("reload: {answer}"))?);
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Ok((median(&mut applied), median(&mut commanded)))
}

fn under_load(lab: &Lab, shunt: &Shunt, duration: Duration) -> Result<LoadRow> {
    kernel::conntrack_flush(lab.gateway())?;
    let pid = shunt.pid()?;
    let (before, cpu) = (Numbers::read(shunt)?, kernel::cpu_seconds(pid)?);
    let load = load::NewConnections {
        from: lab.client_addresses(),
        to: GATEWAY,
        ports: services::SHORT,
        each: load::Each::Reset,
        threads: 8,
        rate: Some(RATE),
        duration,
    };
    let report = load::new_connections(lab.client(), &load)?;
    let cpu = kernel::cpu_seconds(pid)? - cpu;
    // Counts come with the next reporting interval, which is long with many routes; a wrong count is a result, not an error.
    let grown = |now: Numbers| (now.total - before.total, now.ended - before.ended);
    let settled = wait_for("every connection is counted", Duration::from_secs(20), || {
        let now = Numbers::read(shunt).ok().filter(|now| now.active == 0)?;
        Some(grown(now)).filter(|(counted, ended)| *counted >= report.made && *ended >= report.made)
    });
    let (counted, ended) = settled.or_else(|_| Numbers::read(shunt).map(grown))?;
    Ok(LoadRow {
        asked_per_second: RATE,
        made_per_second: report.per_second(),
        made: report.made,
        failed: report.failed,
        daemon_cpu_percent: 100.0 * cpu / report.seconds,
        counted,
        ended,
    })
}

/// What `shunt routes` says of the route under load.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    total: u64,
    active: u64,
    ended: u64,
}

impl Numbers {
    fn read(shunt: &Shunt) -> Result<Self> {
        let route = shunt.route("short")?;
        let number = |key: &str| route[key].as_u64().with_context(|| format!("no {key}: {route}"));
        let ends = route["terminations"].as_object().with_context(|| format!("no terminations: {route}"))?;
        let ended = ends.values().filter_map(serde_json::Value::as_u64).sum();
        Ok(Self { total: number("connections_total")?, active: number("connections_active")?, ended })
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_number_of_routes_has_ports_enough() {
        let last = targets(ROUTES[ROUTES.len() - 1]);
        assert_eq!(last.last().map(SocketAddr::port), Some(59_999));
    }
}
