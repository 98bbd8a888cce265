//! Load of our own, for what the usual tools do not measure.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::{setsockopt, sockopt::IpBindAddressNoPort},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{host::Host, wait::patiently};

/// Longer than any healthy connect in a lab; a lost SYN is sent again after one second.
const PATIENCE: Duration = Duration::from_secs(5);

/// Nanoseconds, three significant digits.
pub type Latencies = Histogram<u64>;

/// Ahead of its rate by less than this a thread goes on: a sleep costs as much as half a connection.
const AHEAD: Duration = Duration::from_millis(2);

/// What becomes of each of [`NewConnections`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Each {
    /// One request and one answer: connect, send, read to the end, close. The server must close first.
    Answered,
    /// Connect, reset: four packets, for more connections than both ends could talk on.
    Reset,
}

/// New connections, one after the other on each thread.
#[derive(Debug, Clone)]
pub struct NewConnections {
    /// Source addresses, used in turn: one of them has ports for some 60,000 connections a minute.
    pub from: Vec<Ipv4Addr>,
    pub to: Ipv4Addr,
    /// Target ports, used in turn.
    pub ports: Range<u16>,
    pub each: Each,
    pub threads: usize,
    /// Connections per second over all threads; `None` = as many as possible.
    pub rate: Option<u32>,
    pub duration: Duration,
}

/// What came of [`NewConnections`].
#[derive(Debug, Clone)]
pub struct NewConnectionsReport {
    /// Connections that came to what they should.
    pub made: u64,
    pub failed: u64,
    /// What the first failure was.
    pub failure: Option<String>,
    pub seconds: f64,
    /// From connect to the end.
    pub latencies: Latencies,
}

impl NewConnectionsReport {
    pub fn per_second(&self) -> f64 {
        self.made as f64 / self.seconds
    }
}

/// Runs the load from `client`, against [`crate::scripted::Behaviour::Reply`].
pub fn new_connections(client: &Host, load: &NewConnections) -> Result<NewConnectionsReport> {
    let begin = Instant::now();
    let parts: Vec<Result<NewConnectionsReport>> = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..load.threads).map(|n| scope.spawn(move || client.run(|| one_thread(load, n, begin)))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a load thread panicked")))
            .collect()
    });
    let mut sum = empty_report()?;
    for part in parts {
        let part = part?;
        sum.made += part.made;
        sum.failed += part.failed;
        sum.failure = sum.failure.or(part.failure);
        sum.latencies.add(part.latencies)?;
    }
    sum.seconds = begin.elapsed().as_secs_f64();
    Ok(sum)
}

fn empty_report() -> Result<NewConnectionsReport> {
    Ok(NewConnectionsReport { made: 0, failed: 0, failure: None, seconds: 0.0, latencies: Histogram::new(3)? })
}

fn one_thread(load: &NewConnections, number: usize, begin: Instant) -> Result<NewConnectionsReport> {
    let mut report = empty_report()?;
    let pause = load.rate.map(|rate| Duration::from_secs(1) * load.threads as u32 / rate);
    let (addresses, ports) = (load.from.len(), load.ports.len());
    // Threads start at different addresses and take every address and port in turn.
    let mut turn = number;
    let mut due = begin;
    while begin.elapsed() < load.duration {
        if let Some(pause) = pause {
            due += pause;
            let ahead = due.saturating_duration_since(Instant::now());
            if ahead > AHEAD {
                thread::sleep(ahead);
            }
        }
        let to = SocketAddr::from((load.to, load.ports.start + (turn / addresses % ports) as u16));
        let start = Instant::now();
        match one_connection(load.from[turn % addresses], to, load.each) {
            Ok(()) => {
                report.made += 1;
                report.latencies.record(start.elapsed().as_nanos() as u64)?;
            }
            Err(error) => {
                report.failed += 1;
                report.failure.get_or_insert_with(|| format!("{to}: {error}"));
            }
        }
        turn += 1;
    }
    Ok(report)
}

fn one_connection(from: Ipv4Addr, to: SocketAddr, each: Each) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    // The port is chosen at connect, when the target is known: otherwise ports run out 60,000 connections earlier.
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    if each == Each::Reset {
        socket.set_linger(Some(Duration::ZERO))?;
        return socket.connect(&to.into());
    }
    socket.set_read_timeout(Some(patiently(PATIENCE)))?;
    socket.set_write_timeout(Some(patiently(PATIENCE)))?;
    socket.connect(&to.into())?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"?")?;
    let mut answer = [0; 256];
    let mut got = 0;
    loop {
        match stream.read(&mut answer)? {
            0 if got == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            0 => return Ok(()),
            n => got += n,
        }
    }
}

/// Round trips of 64 bytes on one connection to an echo server.
pub fn ping_pong(client: &Host, to: SocketAddr, duration: Duration) -> Result<Latencies> {
    let mut stream = client.connect(to).with_context(|| format!("connect {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patiently(PATIENCE)))?;
    ping_pong_on(&mut stream, duration)
}

/// … on a connection that is there.
pub fn ping_pong_on(stream: &mut (impl Read + Write), duration: Duration) -> Result<Latencies> {
    let mut latencies = Histogram::new(3)?;
    let mut message = [7; 64];
    let begin = Instant::now();
    while begin.elapsed() < duration {
        let start = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        latencies.record(start.elapsed().as_nanos() as u64)?;
    }
    Ok(latencies)
}

/// Times `count` connects, one after the other, each closed at once; the targets are taken in turn.
pub fn connect_latency(client: &Host, to: &[SocketAddr], count: usize) -> Result<Latencies> {
    ensure!(!to.is_empty(), "connect_latency needs a target");
    client.run(|| {
        let mut latencies = Histogram::new(3)?;
        for n in 0..count {
            let target = &to[n % to.len()];
            let start = Instant::now();
            let stream =
                TcpStream::connect_timeout(target, patiently(PATIENCE)).with_context(|| format!("connect {target}"))?;
            latencies.record(start.elapsed().as_nanos() as u64)?;
            drop(stream);
        }
        Ok(latencies)
    })
}

/// Opens `count` connections and keeps them.
pub fn idle(client: &Host, to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    client.run(|| {
        (0..count)
            .map(|n| {
                TcpStream::connect_timeout(&to, patiently(PATIENCE))
                    .with_context(|| format!("idle connection {n} to {to}"))
            })
            .collect()
    })
}

/// Lets this process, and the programs it starts, open at least `count` descriptors.
///
/// # Errors
/// When the hard limit is lower and may not be raised.
pub fn allow_descriptors(count: u64) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("getrlimit(RLIMIT_NOFILE)")?;
    if soft >= count {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, count, hard.max(count))
        .with_context(|| format!("setrlimit(RLIMIT_NOFILE, {count}): the hard limit is {hard}"))
}
