//! Active health checks: one task per backend address, each telling the owner of the routes what it saw.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use proxy_core::{
    config::{Health, HealthCheck, Route, RouteName, Target},
    pool::Checked,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinHandle,
    time::{MissedTickBehavior, interval_at, timeout},
};

mod tls;

/// What a check found.
#[derive(Debug)]
pub struct Report {
    pub route: RouteName,
    pub target: Target,
    pub checked: Checked,
}

/// The running checks.
#[derive(Debug)]
pub struct Checks {
    reports: mpsc::Sender<Report>,
    running: HashMap<Subject, Running>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Subject {
    route: RouteName,
    target: Target,
    ip: IpAddr,
}

#[derive(Debug)]
struct Running {
    health: Health,
    port: u16,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Checks {
    pub fn new(reports: mpsc::Sender<Report>) -> Self {
        Self { reports, running: HashMap::new() }
    }

    /// Starts, restarts and ends checks of a route so that they are those of `targets`.
    pub fn watch(&mut self, route: &Arc<Route>, targets: &[(Target, Vec<IpAddr>)]) {
        let mut wanted = HashMap::new();
        if let Some(health) = route.health {
            for (target, ips) in targets {
                // A backend that keeps the dialled port is checked on the first port of the route.
                let port = target.port().or_else(|| route.listen.first().map(|l| l.ports.first));
                for (&ip, port) in ips.iter().zip(std::iter::repeat(port.unwrap_or_default())) {
                    let subject = Subject { route: route.name.clone(), target: target.clone(), ip };
                    wanted.insert(subject, (health, port));
                }
            }
        }
        self.running.retain(|subject, running| {
            subject.route != route.name || wanted.get(subject) == Some(&(running.health, running.port))
        });
        for (subject, (health, port)) in wanted {
            let reports = self.reports.clone();
            self.running.entry(subject.clone()).or_insert_with(|| {
                let task = tokio::spawn(check_for_ever(subject, health, port, reports));
                Running { health, port, task }
            });
        }
    }

    /// Ends the checks of a route that is gone.
    pub fn forget(&mut self, route: &RouteName) {
        self.running.retain(|subject, _| subject.route != *route);
    }
}

async fn check_for_ever(subject: Subject, health: Health, port: u16, reports: mpsc::Sender<Report>) {
    let to = SocketAddr::new(subject.ip, port);
    // Spread over the interval, the same way each time: a thousand checks do not start in one instant.
    let offset = health.interval.mul_f64(f64::from(spread(to)) / 256.0);
    let mut ticks = interval_at(tokio::time::Instant::now() + offset, health.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let result = check(health.check, to, health.timeout).await;
        let checked = Checked { ip: subject.ip, result: result.map_err(|e| format!("{to}: {e}")) };
        let report = Report { route: subject.route.clone(), target: subject.target.clone(), checked };
        if reports.send(report).await.is_err() {
            return;
        }
    }
}

fn spread(to: SocketAddr) -> u8 {
    let octets = match to.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    octets.into_iter().chain(to.port().to_be_bytes()).fold(7u8, |h, b| h.wrapping_mul(31).wrapping_add(b))
}

/// One check, within `limit`.
pub async fn check(kind: HealthCheck, to: SocketAddr, limit: Duration) -> io::Result<()> {
    let attempt = async {
        let stream = TcpStream::connect(to).await?;
        match kind {
            HealthCheck::Tcp => {
                // Close with a reset: no TIME_WAIT is left behind by a check every other second.
                nix::sys::socket::setsockopt(
                    &stream,
                    nix::sys::socket::sockopt::Linger,
                    &libc::linger { l_onoff: 1, l_linger: 0 },
                )?;
                Ok(())
            }
            HealthCheck::Http => http(stream).await,
            HealthCheck::Tls => tls::handshake(stream, to.ip()).await,
        }
    };
    match timeout(limit, attempt).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"))),
    }
}

/// `GET / HTTP/1.0`: 2xx and 3xx are good. The body is not read.
async fn http(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
    let mut line = [0u8; 12];
    stream.read_exact(&mut line).await?;
    match &line {
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', _, b' ', b'2' | b'3', _, _] => Ok(()),
        other => {
            let status = String::from_utf8_lossy(other).into_owned();
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("answered {status:?} to GET /")))
        }
    }
}
