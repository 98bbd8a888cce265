//! Taking the measurements of one path in one round.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use shunt_lab::{Lab, kernel, load, run, wait_until};

use super::{
    metric::{Group, Metric},
    paths::{RunningPath, cpu_seconds, resident_bytes},
    services::{self, Services},
};

/// Connections held open to see what one costs.
pub const IDLE: usize = 5000;

/// Threads of the connection load: enough to keep two cores busy while some wait for an answer.
pub const CONNECTION_THREADS: usize = 8;

pub type Sample = (Metric, f64);

/// What one round needs.
#[derive(Debug)]
pub struct Round<'a> {
    pub lab: &'a Lab,
    pub services: &'a Services,
    pub path: &'a RunningPath,
    /// Of each single measurement.
    pub duration: Duration,
}

impl Round<'_> {
    pub fn measure(&self, group: Group) -> Result<Vec<Sample>> {
        // Each begins with an empty conntrack table; otherwise the table's limit would be part of the result.
        kernel::conntrack_flush(self.lab.gateway())?;
        let mut samples = match group {
            Group::Bulk => self.bulk(),
            Group::Connections => self.connections(),
            Group::Requests => self.requests(),
            Group::PingPong => self.ping_pong(),
            Group::Memory => self.memory(),
        }?;
        if self.path.pids()?.is_empty() {
            samples.retain(|(metric, _)| !metric.is_of_the_process());
        }
        Ok(samples)
    }

    fn to(&self, port: u16) -> SocketAddr {
        (self.path.target, port).into()
    }

    fn bulk(&self) -> Result<Vec<Sample>> {
        let pids = self.path.pids()?;
        let (busy, own) = (kernel::busy_seconds()?, cpu_seconds(&pids)?);
        let (one, bytes) = self.iperf3("")?;
        let (busy, own) = (kernel::busy_seconds()? - busy, cpu_seconds(&pids)? - own);
        let gigabytes = bytes / 1e9;
        Ok(vec![
            (Metric::Bulk1, one),
            (Metric::CpuPerGb, busy / gigabytes),
            (Metric::OwnCpuPerGb, own / gigabytes),
            (Metric::Bulk8, self.iperf3("-P 8")?.0),
            (Metric::BulkReverse, self.iperf3("-R")?.0),
        ])
    }

    /// Gigabits per second, and bytes received.
    fn iperf3(&self, extra: &str) -> Result<(f64, f64)> {
        let seconds = self.duration.as_secs().max(1);
        let report = self.lab.iperf3_client(self.to(services::BULK), &format!("-t {seconds} {extra}"))?;
        let received = &report["end"]["sum_received"];
        let number = |key: &str| received[key].as_f64().with_context(|| format!("iperf3: no sum_received.{key}"));
        Ok((number("bits_per_second")? / 1e9, number("bytes")?))
    }

    fn connections(&self) -> Result<Vec<Sample>> {
        let pids = self.path.pids()?;
        let load = load::NewConnections {
            from: self.lab.client_addresses(),
            to: self.path.target,
            ports: services::SHORT,
            each: load::Each::Answered,
            threads: CONNECTION_THREADS,
            rate: None,
            duration: self.duration,
        };
        let (ends, own) = (kernel::own_cpu_seconds()?, cpu_seconds(&pids)?);
        let report = load::new_connections(self.lab.client(), &load)?;
        let (ends, own) = (kernel::own_cpu_seconds()? - ends, cpu_seconds(&pids)? - own);
        let failed = report.failure.as_deref().unwrap_or_default();
        ensure!(report.failed == 0, "{}: {} connections failed, first {failed}", self.path.kind, report.failed);
        Ok(vec![
            (Metric::NewConnections, report.per_second()),
            (Metric::NewConnectionsP99, report.latencies.value_at_quantile(0.99) as f64 / 1e3),
            (Metric::OwnCpuNewConnections, 100.0 * own / report.seconds),
            // Client and server are threads of this program, and what the kernel does for a packet it mostly does in the
            // thread that sent it. Unlike the rate it hardly depends on what else the machine does.
            (Metric::CpuNewConnection, 1e6 * (ends + own) / report.made.max(1) as f64),
        ])
    }

    fn requests(&self) -> Result<Vec<Sample>> {
        let seconds = self.duration.as_secs().max(1);
        let pids = self.path.pids()?;
        let (busy, own) = (kernel::busy_seconds()?, cpu_seconds(&pids)?);
        let mut command = self.lab.client().command("wrk");
        command.args(["-t1", "-c64", "--latency", &format!("-d{seconds}s")]);
        let report = run(command.arg(format!("http://{}:{}/1k", self.path.target, services::HTTP)))?;
        let field = |begin: &str| {
            let line = report.lines().find_map(|line| line.trim().strip_prefix(begin));
            line.map(str::trim).with_context(|| format!("wrk: no {begin} in {report}"))
        };
        ensure!(!report.contains("Socket errors"), "wrk on {}: {report}", self.path.kind);
        let (busy, own) = (kernel::busy_seconds()? - busy, cpu_seconds(&pids)? - own);
        let rate: f64 = field("Requests/sec:")?.parse().context("wrk: Requests/sec")?;
        let hundred_thousands = rate * seconds as f64 / 1e5;
        Ok(vec![
            (Metric::Requests, rate),
            (Metric::CpuRequests, busy / hundred_thousands),
            (Metric::OwnCpuRequests, own / hundred_thousands),
            (Metric::RequestsP50, wrk_microseconds(field("50%")?)?),
            (Metric::RequestsP99, wrk_microseconds(field("99%")?)?),
        ])
    }

    fn ping_pong(&self) -> Result<Vec<Sample>> {
        let pids = self.path.pids()?;
        let (busy, own) = (kernel::busy_seconds()?, cpu_seconds(&pids)?);
        let latencies = load::ping_pong(self.lab.client(), self.to(services::ECHO), self.duration)?;
        let (busy, own) = (kernel::busy_seconds()? - busy, cpu_seconds(&pids)? - own);
        let hundred_thousands = latencies.len() as f64 / 1e5;
        Ok(vec![
            (Metric::PingPong, latencies.value_at_quantile(0.5) as f64 / 1e3),
            (Metric::CpuPingPong, busy / hundred_thousands),
            (Metric::OwnCpuPingPong, own / hundred_thousands),
        ])
    }

    fn memory(&self) -> Result<Vec<Sample>> {
        let pids = self.path.pids()?;
        let (resident, slab) = (resident_bytes(&pids)?, slab_total()?);
        let idle = load::idle(self.lab.client(), self.to(services::HOLD), IDLE)?;
        let held = || self.services.hold.open() >= IDLE;
        wait_until("all idle connections reach the backend", Duration::from_secs(10), held)?;
        let grown = (resident_bytes(&pids)?.saturating_sub(resident), slab_total()?.saturating_sub(slab));
        drop(idle);
        self.services.hold.end_all(true);
        let per_connection = |bytes: u64| bytes as f64 / IDLE as f64;
        Ok(vec![
            (Metric::Resident, resident as f64 / 1e6),
            (Metric::UserPerConnection, per_connection(grown.0)),
            (Metric::KernelPerConnection, per_connection(grown.1)),
        ])
    }
}

/// `1.23ms` → 1230.
pub fn wrk_microseconds(text: &str) -> Result<f64> {
    let digits = text.find(|c: char| c.is_alphabetic()).with_context(|| format!("wrk: {text}"))?;
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => anyhow::bail!("wrk: unit of {text}"),
    };
    Ok(number.parse::<f64>().with_context(|| format!("wrk: {text}"))? * factor)
}

/// Bytes in all slab caches of the machine: sockets, conntrack entries and what hangs on them.
fn slab_total() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let kilobytes: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("Slab:")?.split_whitespace().next()?.parse().ok())
        .context("Slab in /proc/meminfo")?;
    Ok(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_times_are_read_in_every_unit() -> Result<()> {
        assert_eq!(wrk_microseconds("812.00us")?, 812.0);
        assert_eq!(wrk_microseconds("1.25ms")?, 1250.0);
        assert_eq!(wrk_microseconds("2.00s")?, 2_000_000.0);
        assert!(wrk_microseconds("2.00").is_err());
        Ok(())
    }
}
