//! TLS that ends in the proxy, plain towards the backend: shunt beside HAProxy and nginx with the same certificates.

use std::{fmt::Write as _, fs, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use serde::Serialize;
use shunt_lab::{Lab, Running, Shunt, kernel, run};

use super::paths;

const HAPROXY: &str = include_str!("../../bench/peers/haproxy-tls.cfg");
const NGINX: &str = include_str!("../../bench/peers/nginx-tls.conf");
const SHUNT: &str = include_str!("../../bench/peers/shunt-tls.toml");

/// As the peers' configurations have them: by the kind of key.
const ECDSA: u16 = 8443;
const RSA: u16 = 8444;
/// Plain HTTP behind them.
const PAGES: u16 = 8080;
/// Bytes of the page that bulk is measured with.
const BIG: usize = 512 << 20;
/// Clients that shake hands at the same time.
const CLIENTS: usize = 3;

#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub metric: &'static str,
    pub unit: &'static str,
    /// By proxy: the median over the rounds.
    pub values: Vec<(&'static str, f64)>,
}

const PEERS: [&str; 3] = ["shunt", "HAProxy", "nginx"];

type Sample = (&'static str, &'static str, f64);

/// `rounds` times, each proxy in its turn.
pub fn measure(lab: &Lab, shunt: &Path, duration: Duration, rounds: u16) -> Result<Vec<Row>> {
    certificates(lab)?;
    let _pages = lab.nginx(lab.backend(1), PAGES, &[("1k", vec![b'x'; 1024]), ("big", vec![b'x'; BIG])])?;
    let mut taken: Vec<(&'static str, Vec<Sample>)> = Vec::new();
    for _ in 0..rounds {
        for peer in PEERS {
            let (pids, running) = start(peer, lab, shunt)?;
            let samples = one(lab, &pids, duration).with_context(|| format!("TLS, {peer}"))?;
            running.stop()?;
            taken.push((peer, samples));
        }
    }
    let first = taken.first().map(|(_, samples)| samples.clone()).unwrap_or_default();
    let row = |(index, (metric, unit, _)): (usize, &Sample)| {
        let of = |peer: &'static str| {
            let mut values: Vec<f64> =
                taken.iter().filter(|(p, _)| *p == peer).filter_map(|(_, s)| Some(s.get(index)?.2)).collect();
            values.sort_by(f64::total_cmp);
            (peer, values.get(values.len() / 2).copied().unwrap_or_default())
        };
        Row { metric, unit, values: PEERS.map(of).to_vec() }
    };
    Ok(first.iter().enumerate().map(row).collect())
}

/// As a table.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::from("TLS ended in the proxy\n");
    for row in rows {
        let _ = write!(text, "{:<44}", format!("{}, {}", row.metric, row.unit));
        for (peer, value) in &row.values {
            let _ = write!(text, "  {peer} {value:>9.2}");
        }
        text.push('\n');
    }
    text
}

fn certificates(lab: &Lab) -> Result<()> {
    for (stem, key) in [("ecdsa", "ec -pkeyopt ec_paramgen_curve:prime256v1"), ("rsa", "rsa:2048")] {
        lab.gateway().sh(&format!(
            "cd {} && openssl req -x509 -newkey {key} -nodes -days 1 -subj /CN=bench.example \
             -addext subjectAltName=DNS:bench.example -out {stem}.pem -keyout {stem}.key && cat {stem}.pem {stem}.key > {stem}.both",
            lab.dir().display()
        ))?;
    }
    Ok(())
}

/// A proxy at work.
#[derive(Debug)]
enum Peer {
    Program(Running),
    Shunt(Box<Shunt>),
}

impl Peer {
    fn stop(self) -> Result<()> {
        match self {
            Self::Program(running) => drop(running),
            Self::Shunt(mut shunt) => drop(shunt.terminate(Duration::from_secs(40))?),
        }
        Ok(())
    }
}

fn start(peer: &str, lab: &Lab, shunt: &Path) -> Result<(Vec<u32>, Peer)> {
    let dir = lab.dir().display().to_string();
    let config = match peer {
        "HAProxy" => HAPROXY,
        "nginx" => NGINX,
        _ => SHUNT,
    };
    let config = config.replace("@DIR@", &dir);
    if peer == "shunt" {
        let shunt = Shunt::builder().binary(shunt).start(lab, &config)?;
        return Ok((vec![shunt.pid()?], Peer::Shunt(Box::new(shunt))));
    }
    let file = lab.dir().join(format!("{peer}-tls.conf"));
    fs::write(&file, config).context("write the peer's configuration")?;
    let file = file.to_str().context("path")?;
    let running = match peer {
        "HAProxy" => lab.serve(lab.gateway(), "haproxy", "haproxy", &["-db", "-f", file], ECDSA)?,
        _ => lab.serve(lab.gateway(), "nginx-tls", "nginx", &["-e", "stderr", "-p", &dir, "-c", file], ECDSA)?,
    };
    Ok((paths::with_children(running.pid())?, Peer::Program(running)))
}

fn one(lab: &Lab, pids: &[u32], duration: Duration) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for (name, cpu, port, how) in [
        ("full handshakes, ECDSA P-256, TLS 1.3", "  CPU of the proxy", ECDSA, "-new -tls1_3"),
        ("full handshakes, RSA 2048, TLS 1.3", "  CPU of the proxy", RSA, "-new -tls1_3"),
        ("resumed handshakes, TLS 1.2", "  CPU of the proxy", ECDSA, "-reuse -tls1_2"),
    ] {
        let own = paths::cpu_seconds(pids)?;
        let count = handshakes(lab, port, how, duration)?;
        let own = paths::cpu_seconds(pids)? - own;
        samples.push((name, "/s", count / duration.as_secs_f64()));
        samples.push((cpu, "µs per handshake", 1e6 * own / count.max(1.0)));
    }
    let gigabytes = BIG as f64 / 1e9;
    let (own, busy) = (paths::cpu_seconds(pids)?, kernel::busy_seconds()?);
    let speed: f64 = lab
        .client()
        .sh(&format!("curl -sk --max-time 120 -o /dev/null -w '%{{speed_download}}' https://10.88.1.1:{ECDSA}/big"))?
        .trim()
        .parse()
        .context("curl: speed_download")?;
    samples.push(("bulk, backend to client, 1 stream", "Gbit/s", speed * 8.0 / 1e9));
    samples.push(("  CPU of the proxy", "s per GB", (paths::cpu_seconds(pids)? - own) / gigabytes));
    samples.push(("  CPU of all", "s per GB", (kernel::busy_seconds()? - busy) / gigabytes));
    let seconds = duration.as_secs().max(1);
    let mut wrk = lab.client().command("wrk");
    wrk.args(["-t1", "-c64", &format!("-d{seconds}s")]).arg(format!("https://10.88.1.1:{ECDSA}/1k"));
    let report = run(&mut wrk)?;
    let line = report.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    let rate = line.and_then(|rate| rate.trim().parse().ok()).with_context(|| format!("wrk: {report}"))?;
    samples.push(("keep-alive requests, 64 conns", "/s", rate));
    Ok(samples)
}

/// Handshakes that several clients have completed.
fn handshakes(lab: &Lab, port: u16, how: &str, duration: Duration) -> Result<f64> {
    let seconds = duration.as_secs().max(1);
    let line = format!("openssl s_time -connect 10.88.1.1:{port} {how} -time {seconds}");
    let reports: Vec<Result<String>> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| lab.client().sh(&line))).collect();
        clients.into_iter().map(|client| client.join().expect("no panic")).collect()
    });
    let mut all = 0.0;
    for report in reports {
        let report = report?;
        // `1234 connections in 5 real seconds, 0 bytes read per connection`
        let line = report.lines().find(|line| line.contains("real seconds")).context("openssl s_time")?;
        all += line.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).context("openssl s_time")?;
    }
    Ok(all)
}
