//! What an established connection notices of a flood of full handshakes: shunt beside HAProxy and nginx.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use shunt_lab::{Lab, run};

use super::tls::{self, ECHO, PEERS, RSA, Row, Sample, Taken};

/// Connections that are talked on, one after the other: each belongs to one worker.
const CONNECTIONS: u32 = 6;
/// The flood is at its height by then.
const BEGIN: Duration = Duration::from_secs(1);

/// `rounds` times, each proxy in its turn, with one worker and with two; without a flood and with one right after it.
pub fn measure(lab: &Lab, shunt: &Path, duration: Duration, rounds: u16) -> Result<Vec<Row>> {
    tls::certificates(lab)?;
    let mut rows = Vec::new();
    for workers in [1, 2] {
        let mut taken: Vec<Taken> = Vec::new();
        for _ in 0..rounds {
            for peer in PEERS {
                let (_, running) = tls::start(peer, lab, shunt, workers)?;
                let samples =
                    one(lab, workers, duration).with_context(|| format!("flood, {peer}, {workers} workers"))?;
                running.stop()?;
                taken.push((peer, samples));
            }
        }
        rows.extend(tls::rows(&taken));
    }
    Ok(rows)
}

fn one(lab: &Lab, workers: u8, duration: Duration) -> Result<Vec<Sample>> {
    let titles = match workers {
        1 => ["one worker: p50 without", "p99 without", "p50 with", "p99 with", "p99 with ÷ without", "of the flood"],
        _ => ["two workers: p50 without", "p99 without", "p50 with", "p99 with", "p99 with ÷ without", "of the flood"],
    };
    let quiet = ping_pong(lab, duration)?;
    let (flooded, rate) = thread::scope(|scope| {
        let flood = scope.spawn(|| tls::handshakes(lab, RSA, "-new -tls1_3", true, duration + 2 * BEGIN));
        thread::sleep(BEGIN);
        let flooded = ping_pong(lab, duration);
        let rate = flood.join().expect("no panic");
        Ok::<_, anyhow::Error>((flooded?, rate? / (duration + 2 * BEGIN).as_secs_f64()))
    })?;
    let values = [quiet[0], quiet[1], flooded[0], flooded[1], flooded[1] / quiet[1], rate];
    let units = [("µs", false), ("µs", false), ("µs", false), ("µs", false), ("×", false), ("/s", true)];
    let samples = titles.into_iter().zip(units).zip(values);
    Ok(samples.map(|((title, (unit, more_is_better)), value)| (title, unit, more_is_better, value)).collect())
}

/// Median and 99th percentile in microseconds.
fn ping_pong(lab: &Lab, duration: Duration) -> Result<[f64; 2]> {
    let mut command = lab.client().command("/usr/bin/python3");
    let each = duration.as_secs_f64() / f64::from(CONNECTIONS);
    command.args(["-c", PING_PONG, &CONNECTIONS.to_string(), &ECHO.to_string(), &each.to_string()]);
    let said = run(&mut command)?;
    let mut numbers = said.split_whitespace().map(str::parse::<f64>);
    let mut next = || numbers.next().with_context(|| said.clone())?.with_context(|| said.clone());
    Ok([next()?, next()?])
}

const PING_PONG: &str = r#"
import gc, socket, ssl, sys, time
connections, port, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
context = ssl._create_unverified_context()
streams = []
for _ in range(connections):
    tcp = socket.create_connection(("10.88.1.1", port))
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    streams.append(context.wrap_socket(tcp, server_hostname="bench.example"))
gc.disable()
took, now, message = [], time.perf_counter_ns, b"x" * 64
for stream in streams:
    until = now() + int(seconds * 1e9)
    while (begin := now()) < until:
        stream.sendall(message)
        left = 64
        while left:
            left -= len(stream.recv(left))
        took.append(now() - begin)
took.sort()
print(took[len(took) // 2] / 1e3, took[len(took) * 99 // 100] / 1e3)
"#;
