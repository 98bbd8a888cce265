//! The task that keeps the certificates: one order at a time, each when it is due.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use proxy_core::{
    config::AcmeCertificate,
    renewal::{Advice, Renewals, Scope, Step, Time, Validity},
};
use tokio::{sync::watch, task::JoinHandle, time::sleep};

use super::{AcmeError, Outcome, Standing, Told, Wanted, advice, https::Https, order};
use crate::tls::{Certificate, Registry, TlsError, now, random};

/// It looks at the clock so often: a machine that was asleep, or whose clock was wrong, is not late by more.
const LONGEST_SLEEP: Duration = Duration::from_secs(600);

/// The running task. It ends with this.
#[derive(Debug)]
pub struct Handle {
    wanted: watch::Sender<Wanted>,
    task: JoinHandle<()>,
}

impl Handle {
    /// `routes`: told when there is a new certificate.
    pub fn start(told: Told, routes: Registry) -> Self {
        let (sender, wanted) = watch::channel(Wanted::default());
        let (now, found, renewals) = Default::default();
        let task = Task { wanted, told, routes, now, found, renewals };
        Self { wanted: sender, task: tokio::spawn(task.run()) }
    }

    pub fn want(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|now| {
            let differs = *now != wanted;
            *now = wanted;
            differs
        });
    }

    /// Nothing is ordered any more; an order under way is given up.
    pub fn stop(&self) {
        self.task.abort();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Task {
    wanted: watch::Receiver<Wanted>,
    told: Told,
    routes: Registry,
    /// What is wanted now.
    now: Wanted,
    /// What is known of each name.
    found: HashMap<String, Found>,
    renewals: Renewals,
}

#[derive(Debug, Default)]
struct Found {
    expires: Option<Time>,
    problem: Option<String>,
}

impl Task {
    async fn run(mut self) {
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            self.take_up(wanted).await;
            self.tell();
            let next = self.renewals.next(now()).map(|(name, step, at)| (name.to_owned(), step, wait(at)));
            let rest = next.as_ref().map_or(LONGEST_SLEEP, |(_, _, rest)| (*rest).min(LONGEST_SLEEP));
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                () = sleep(rest) => match next {
                    Some((name, Step::Order, due)) if due == rest => self.attempt(&name).await,
                    Some((name, Step::Advice, due)) if due == rest => self.ask(&name).await,
                    // Something far off, or nothing: the clock is looked at again.
                    Some(_) | None => {}
                },
            }
        }
    }

    /// Certificates of names that are new here are looked for in the cache: those that are there are used.
    async fn take_up(&mut self, wanted: Wanted) {
        if wanted == self.now {
            return;
        }
        if wanted.acme != self.now.acme {
            // Another CA, or what kept this one from answering has changed.
            (self.renewals, self.found) = Default::default();
        }
        self.renewals.want(wanted.certificates.iter().map(|one| one.name.clone()));
        let names: HashSet<&str> = wanted.certificates.iter().map(|one| one.name.as_str()).collect();
        self.found.retain(|name, _| names.contains(name.as_str()));
        let fresh: Vec<AcmeCertificate> =
            wanted.certificates.iter().filter(|one| !self.found.contains_key(&one.name)).cloned().collect();
        self.now = wanted;
        let looked = tokio::task::spawn_blocking(|| fresh.into_iter().map(adopt).collect::<Vec<_>>()).await;
        for (name, found) in looked.unwrap_or_default() {
            if let Some(validity) = found {
                tracing::info!(
                    name,
                    expires_in_hours = (validity.expires - now()) / 3600,
                    "certificate found in acme.cache"
                );
                self.renewals.found(&name, validity, now(), random());
            }
            let expires = found.map(|validity| validity.expires);
            self.found.insert(name, Found { expires, problem: None });
        }
    }

    async fn attempt(&mut self, name: &str) {
        let Some(acme) = self.now.acme.clone() else { return };
        let Some(wanted) = self.now.certificates.iter().find(|one| one.name == name).cloned() else { return };
        let (result, wish) = match Https::new(&acme) {
            Ok(https) => (order::place(&acme, &wanted, &https, &self.told.challenges).await, https.wish()),
            Err(error) => (Err(error), None),
        };
        match result {
            Ok(validity) => self.issued(name, validity).await,
            Err(error) => self.failed(name, &error, wish),
        }
    }

    async fn ask(&mut self, name: &str) {
        let Some(acme) = self.now.acme.clone() else { return };
        let Some(wanted) = self.now.certificates.iter().find(|one| one.name == name) else { return };
        let advice = match Https::new(&acme) {
            Ok(https) => advice::ask(&acme, &wanted.file, &https).await,
            Err(_) => Advice::NotHeard,
        };
        self.renewals.advised(name, advice, now(), random());
    }

    async fn issued(&mut self, name: &str, validity: Validity) {
        self.renewals.issued(name, validity, now(), random());
        self.told.count(Outcome::Ok);
        let next = self.renewals.at(name).unwrap_or_default();
        let (expires_in, renewed_in) = ((validity.expires - now()) / 3600, (next - now()) / 3600);
        tracing::info!(name, expires_in_hours = expires_in, renewed_in_hours = renewed_in, "certificate issued");
        self.found.insert(name.to_owned(), Found { expires: Some(validity.expires), problem: None });
        let routes = self.routes.clone();
        if tokio::task::spawn_blocking(move || routes.look_at_issued()).await.is_err() {
            tracing::error!(name, "the routes were not told: they look by themselves within two seconds");
        }
    }

    fn failed(&mut self, name: &str, error: &AcmeError, wish: Option<Time>) {
        self.told.count(error.outcome());
        self.renewals.failed(name, error.scope(), wish, now(), random());
        let mend = error.mend();
        let again_in = self.renewals.at(name).unwrap_or_default() - now();
        let held_up = match error.scope() {
            Scope::Authority => self.renewals.names().count(),
            Scope::Name => 1,
        };
        tracing::error!(name, names = held_up, %error, mend, again_in_seconds = again_in, "no certificate from the CA");
        let problem = format!("{error} ({mend})");
        self.found.entry(name.to_owned()).or_default().problem = Some(problem);
    }

    fn tell(&self) {
        let standing = |name: &str| {
            let found = self.found.get(name);
            Standing {
                expires: found.and_then(|found| found.expires),
                next: self.renewals.at(name).unwrap_or_default(),
                problem: found.and_then(|found| found.problem.clone()),
            }
        };
        let standings: BTreeMap<_, _> = self.renewals.names().map(|name| (name.to_owned(), standing(name))).collect();
        self.told.tell(standings);
    }
}

/// What the cache has for a name, if it can be used.
fn adopt(wanted: AcmeCertificate) -> (String, Option<Validity>) {
    let AcmeCertificate { name, file } = wanted;
    let found = match Certificate::load_whole(&file) {
        Ok(certificate) => Some(certificate.validity()).filter(|validity| validity.expires > now()),
        Err(TlsError::Read { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(%error, "not a certificate: another one is got");
            None
        }
    };
    (name, found)
}

fn wait(until: Time) -> Duration {
    Duration::from_secs(u64::try_from(until.saturating_sub(now())).unwrap_or_default())
}
