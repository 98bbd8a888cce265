//! Backend names: resolved at start, and again as the TTL of the answer runs out.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use hickory_resolver::TokioResolver;
use tokio::{sync::mpsc, task::JoinHandle, time::sleep};

/// A TTL shorter than this is treated as this: a resolver is not to be asked in a loop.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(3600);
/// After a failure, growing to [`RETRY_LONGEST`].
const RETRY: Duration = Duration::from_secs(1);
const RETRY_LONGEST: Duration = Duration::from_secs(30);

/// A name and what it resolves to, or why it does not. Addresses known before stay in use when it does not.
#[derive(Debug)]
pub struct Resolved {
    pub host: String,
    pub result: Result<Vec<IpAddr>, String>,
}

/// The names being kept up to date.
#[derive(Debug)]
pub struct Names {
    answers: mpsc::Sender<Resolved>,
    running: HashMap<String, JoinHandle<()>>,
}

impl Names {
    pub fn new(answers: mpsc::Sender<Resolved>) -> Self {
        Self { answers, running: HashMap::new() }
    }

    /// Keeps exactly these names up to date from now on.
    pub fn watch<'a>(&mut self, hosts: impl Iterator<Item = &'a str>) {
        let wanted: std::collections::HashSet<&str> = hosts.collect();
        self.running.retain(|host, task| {
            let keep = wanted.contains(host.as_str());
            if !keep {
                task.abort();
            }
            keep
        });
        for host in wanted {
            if !self.running.contains_key(host) {
                let task = tokio::spawn(resolve_for_ever(host.to_owned(), self.answers.clone()));
                self.running.insert(host.to_owned(), task);
            }
        }
    }
}

async fn resolve_for_ever(host: String, answers: mpsc::Sender<Resolved>) {
    let mut retry = RETRY;
    loop {
        let (result, pause) = match look_up(&host).await {
            Ok((addresses, valid_for)) => {
                retry = RETRY;
                (Ok(addresses), valid_for.clamp(SHORTEST, LONGEST))
            }
            Err(error) => {
                let pause = retry;
                retry = (retry * 2).min(RETRY_LONGEST);
                (Err(error), pause)
            }
        };
        if answers.send(Resolved { host: host.clone(), result }).await.is_err() {
            return;
        }
        sleep(pause).await;
    }
}

/// The system's configuration (`/etc/resolv.conf`, `/etc/hosts`) is read each time: it may have changed.
async fn look_up(host: &str) -> Result<(Vec<IpAddr>, Duration), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let resolver = TokioResolver::builder_tokio().map_err(|e| text(&e))?.build().map_err(|e| text(&e))?;
    let answer = resolver.lookup_ip(host).await.map_err(|e| text(&e))?;
    let valid_for = answer.valid_until().saturating_duration_since(Instant::now());
    let addresses: Vec<IpAddr> = answer.iter().collect();
    if addresses.is_empty() { Err("the name has no address".into()) } else { Ok((addresses, valid_for)) }
}
