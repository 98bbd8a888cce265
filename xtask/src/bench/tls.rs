//! TLS that ends in the proxy, plain towards the backend: shunt beside HAProxy and nginx with the same certificates.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use comfy_table::{Cell as TableCell, Table};
use serde::Serialize;
use shunt_lab::{Lab, Running, Shunt, Talk, run};

use super::{
    measure::wrk_microseconds,
    paths,
    report::{new_table, right, value_text},
    results::Spread,
};

const HAPROXY: &str = include_str!("../../bench/peers/haproxy-tls.cfg");
const NGINX: &str = include_str!("../../bench/peers/nginx-tls.conf");
const SHUNT: &str = include_str!("../../bench/peers/shunt-tls.toml");

/// As the peers' configurations have them: by the kind of key.
const ECDSA: u16 = 8443;
pub const RSA: u16 = 8444;
/// Not plain HTTP behind it, but an echo.
pub const ECHO: u16 = 8445;
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
    pub more_is_better: bool,
    /// By proxy, over the rounds.
    pub peers: Vec<(&'static str, Spread)>,
}

pub const PEERS: [&str; 3] = ["shunt", "HAProxy", "nginx"];

/// What is measured, its unit, whether more of it is better, and the value.
pub type Sample = (&'static str, &'static str, bool, f64);
/// What one proxy has shown in one round.
pub type Taken = (&'static str, Vec<Sample>);

/// `rounds` times, each proxy in its turn.
pub fn measure(lab: &Lab, shunt: &Path, duration: Duration, rounds: u16) -> Result<Vec<Row>> {
    certificates(lab)?;
    let _pages = lab.nginx(lab.backend(1), PAGES, &[("1k", vec![b'x'; 1024]), ("big", vec![b'x'; BIG])])?;
    let mut taken: Vec<Taken> = Vec::new();
    for _ in 0..rounds {
        for peer in PEERS {
            let (pids, running) = start(peer, lab, shunt, 2)?;
            let samples = one(lab, &pids, duration).with_context(|| format!("TLS, {peer}"))?;
            running.stop()?;
            taken.push((peer, samples));
        }
    }
    Ok(rows(&taken))
}

/// One for each metric, over the rounds.
pub fn rows(taken: &[Taken]) -> Vec<Row> {
    let first = taken.first().map(|(_, samples)| samples.clone()).unwrap_or_default();
    let row = |(index, (metric, unit, more_is_better, _)): (usize, &Sample)| {
        let of = |peer: &'static str| {
            let values =
                taken.iter().filter(|(p, _)| *p == peer).filter_map(|(_, samples)| Some(samples.get(index)?.3));
            Some((peer, Spread::of(values)?))
        };
        let peers = PEERS.into_iter().filter_map(of).collect();
        Row { metric, unit, more_is_better: *more_is_better, peers }
    };
    first.iter().enumerate().map(row).collect()
}

/// As a table.
pub fn table(rows: &[Row]) -> Table {
    let mut table = new_table();
    table.set_header(["", "unit"].into_iter().chain(PEERS));
    for row in rows {
        let unit = if row.more_is_better { format!("{} ↑", row.unit) } else { format!("{} ↓", row.unit) };
        let values = row.peers.iter().map(|(_, spread)| right(value_text(*spread)));
        table.add_row([TableCell::new(row.metric), TableCell::new(unit)].into_iter().chain(values));
    }
    table
}

pub fn certificates(lab: &Lab) -> Result<()> {
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
pub enum Peer {
    Program(Running),
    Shunt(Box<Shunt>),
}

impl Peer {
    pub fn stop(self) -> Result<()> {
        match self {
            Self::Program(running) => drop(running),
            Self::Shunt(mut shunt) => drop(shunt.terminate(Duration::from_secs(40))?),
        }
        Ok(())
    }
}

/// With one worker it has one processor, too.
pub fn start(peer: &str, lab: &Lab, shunt: &Path, workers: u8) -> Result<(Vec<u32>, Peer)> {
    let dir = lab.dir().display().to_string();
    let processors = if workers == 1 { "0" } else { "0,1" };
    let config = match peer {
        "HAProxy" => HAPROXY,
        "nginx" => NGINX,
        _ => SHUNT,
    };
    let config = config.replace("@DIR@", &dir).replace("@WORKERS@", &workers.to_string());
    if peer == "shunt" {
        let shunt = Shunt::builder().binary(shunt).processors(processors).start(lab, &config)?;
        return Ok((vec![shunt.pid()?], Peer::Shunt(Box::new(shunt))));
    }
    let file = lab.dir().join(format!("{peer}-tls.conf"));
    fs::write(&file, config).context("write the peer's configuration")?;
    let file = file.to_str().context("path")?;
    let program: &[&str] = match peer {
        "HAProxy" => &["haproxy", "-db", "-f", file],
        _ => &["nginx", "-e", "stderr", "-p", &dir, "-c", file],
    };
    let running = lab.serve(lab.gateway(), peer, "taskset", &[&["-c", processors], program].concat(), ECDSA)?;
    Ok((paths::with_children(running.pid())?, Peer::Program(running)))
}

fn one(lab: &Lab, pids: &[u32], duration: Duration) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for (name, cpu, port, how) in [
        ("full handshakes, ECDSA P-256, TLS 1.3", "… the process itself", ECDSA, "-new -tls1_3"),
        ("full handshakes, RSA 2048, TLS 1.3", "… the process itself", RSA, "-new -tls1_3"),
        ("resumed handshakes, TLS 1.2", "… the process itself", ECDSA, "-reuse -tls1_2"),
    ] {
        let own = paths::cpu_seconds(pids)?;
        let count = handshakes(lab, port, how, false, duration)?;
        let own = paths::cpu_seconds(pids)? - own;
        samples.push((name, "/s", true, count / duration.as_secs_f64()));
        samples.push((cpu, "µs each", false, 1e6 * own / count.max(1.0)));
    }
    samples.extend(bulk(lab, pids, 1, duration)?);
    samples.extend(bulk(lab, pids, 8, duration)?);
    samples.extend(requests(lab, duration)?);
    samples.push(("per idle connection, process", "B", false, idle(lab, pids)?));
    Ok(samples)
}

/// So many downloads at once, cut when their time is over.
fn bulk(lab: &Lab, pids: &[u32], streams: usize, duration: Duration) -> Result<[Sample; 2]> {
    let (own, began) = (paths::cpu_seconds(pids)?, Instant::now());
    let reports = lab.client().sh(&format!(
        "for n in $(seq {streams}); do (curl -sk --max-time {} -o /dev/null -w '%{{size_download}}\\n' https://10.88.1.1:{ECDSA}/big || true) & done; wait",
        duration.as_secs().max(1)
    ))?;
    let (seconds, own) = (began.elapsed().as_secs_f64(), paths::cpu_seconds(pids)? - own);
    let sizes = reports.lines().map(|line| line.trim().parse::<f64>().with_context(|| format!("curl: {reports}")));
    let gigabytes = sizes.sum::<Result<f64>>()? / 1e9;
    let title = if streams == 1 { "bulk, 1 stream" } else { "bulk, 8 streams" };
    Ok([
        (title, "Gbit/s", true, gigabytes * 8.0 / seconds),
        ("… CPU per GB, the process itself", "s", false, own / gigabytes.max(1e-9)),
    ])
}

fn requests(lab: &Lab, duration: Duration) -> Result<[Sample; 3]> {
    let seconds = duration.as_secs().max(1);
    let mut wrk = lab.client().command("wrk");
    wrk.args(["-t1", "-c64", "--latency", &format!("-d{seconds}s")]).arg(format!("https://10.88.1.1:{ECDSA}/1k"));
    let report = run(&mut wrk)?;
    let field = |begin: &str| {
        let line = report.lines().find_map(|line| line.trim().strip_prefix(begin));
        line.map(str::trim).with_context(|| format!("wrk: no {begin} in {report}"))
    };
    ensure!(!report.contains("Socket errors"), "wrk: {report}");
    Ok([
        ("keep-alive requests, 64 conns", "/s", true, field("Requests/sec:")?.parse().context("wrk: Requests/sec")?),
        ("keep-alive request p50", "µs", false, wrk_microseconds(field("50%")?)?),
        ("keep-alive request p99", "µs", false, wrk_microseconds(field("99%")?)?),
    ])
}

/// Connections that have had an answer and are silent now.
fn idle(lab: &Lab, pids: &[u32]) -> Result<f64> {
    const HELD: usize = 2000;
    let before = paths::resident_bytes(pids)?;
    let mut command = lab.client().command("/usr/bin/python3");
    command.args(["-u", "-c", IDLE, &HELD.to_string(), &ECDSA.to_string()]);
    let mut client = Talk::start(command)?;
    let said = client.hear(Duration::from_secs(60))?;
    ensure!(said == "held", "the idle client said {said}");
    let grown = paths::resident_bytes(pids)?.saturating_sub(before);
    client.say_and_end("")?;
    Ok(grown as f64 / HELD as f64)
}

const IDLE: &str = r#"
import socket, ssl, sys
context = ssl._create_unverified_context()
held = []
for n in range(int(sys.argv[1])):
    stream = context.wrap_socket(socket.create_connection(("10.88.1.1", int(sys.argv[2]))), server_hostname="bench.example")
    stream.sendall(b"GET /1k HTTP/1.1\r\nHost: bench.example\r\n\r\n")
    answer = b""
    while answer.count(b"x") < 1024:
        answer += stream.recv(65536)
    held.append(stream)
print("held", flush=True)
sys.stdin.readline()
"#;

/// Handshakes that several clients have completed; `modest` ones leave the processors to whoever else wants them.
pub fn handshakes(lab: &Lab, port: u16, how: &str, modest: bool, duration: Duration) -> Result<f64> {
    let seconds = duration.as_secs().max(1);
    let nice = if modest { "nice -n 19 " } else { "" };
    let line = format!("{nice}openssl s_time -connect 10.88.1.1:{port} {how} -time {seconds}");
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
