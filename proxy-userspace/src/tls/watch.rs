//! Looks at the files of every route with TLS now and then.
//!
//! `stat` sees every way of change alike: writing, renaming, Kubernetes' switch of a directory behind a symbolic link,
//! network file systems. inotify sees none of the last two without a watch on every directory on the way.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use super::{EXPIRES_SOON, RouteTls, now, route::Looked};

/// From one look to the next. A change is taken when two looks have found the same: a pair is written file by file.
const INTERVAL: Duration = Duration::from_secs(1);
/// Looking takes at most one part in so many of a core: fifty thousand routes are looked at less often.
const SHARE: u32 = 100;

/// The routes with TLS, by id, and how their renewals went. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    routes: Mutex<BTreeMap<u32, Arc<RouteTls>>>,
    renewed: AtomicU64,
    refused: AtomicU64,
}

impl Registry {
    pub fn put(&self, id: u32, tls: Option<Arc<RouteTls>>) {
        let mut routes = self.0.routes.lock().unwrap_or_else(PoisonError::into_inner);
        match tls {
            Some(tls) => drop(routes.insert(id, tls)),
            None => drop(routes.remove(&id)),
        }
    }

    pub fn all(&self) -> Vec<Arc<RouteTls>> {
        self.0.routes.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Certificates taken while the daemon runs, and refused ones.
    pub fn reloads(&self) -> (u64, u64) {
        (self.0.renewed.load(Relaxed), self.0.refused.load(Relaxed))
    }

    /// By file; two routes may have the same. The second is seconds since the Unix epoch.
    pub fn expiries(&self) -> BTreeMap<String, i64> {
        self.expiries_of(|_| true)
    }

    fn expiries_of(&self, wanted: impl Fn(&RouteTls) -> bool) -> BTreeMap<String, i64> {
        let all = self.all().into_iter().filter(|tls| wanted(tls)).flat_map(|tls| tls.certificates());
        all.map(|certificate| (certificate.file.display().to_string(), certificate.expires)).collect()
    }

    /// Things an operator should know now, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let bad = |tls: &Arc<RouteTls>| {
            tls.problem().map(|problem| {
                format!("route \"{}\": its certificates were not reloaded, the old ones stay: {problem}", tls.route)
            })
        };
        let mut warnings: Vec<String> = self.all().iter().filter_map(bad).collect();
        let now = now();
        // Those that a CA issues are renewed, or it is said why not ([`crate::acme`]).
        let looked_after = self.expiries_of(|tls| !tls.is_by_acme());
        warnings.extend(looked_after.into_iter().filter(|(_, at)| at - now <= EXPIRES_SOON).map(|(file, at)| {
            match at - now {
                ..=0 => format!("{file}: the certificate has expired"),
                left => format!("{file}: the certificate expires in {} days", left / 86_400),
            }
        }));
        warnings
    }

    /// The CA has issued something: it is taken at once, being complete.
    pub fn look_at_issued(&self) {
        self.all().iter().filter(|tls| tls.is_by_acme()).for_each(|tls| self.look_at(tls, true));
    }

    fn look(&self, at_once: bool) {
        self.all().iter().for_each(|tls| self.look_at(tls, at_once));
    }

    fn look_at(&self, tls: &RouteTls, at_once: bool) {
        match tls.look(at_once) {
            Looked::Same | Looked::Changing => {}
            Looked::Renewed => {
                self.0.renewed.fetch_add(1, Relaxed);
                tracing::info!(route = %tls.route, "certificates reloaded");
            }
            Looked::Bad(error) => {
                self.0.refused.fetch_add(1, Relaxed);
                tracing::error!(route = %tls.route, %error, mend = error.mend(), "certificates not reloaded: the old ones stay");
            }
        }
    }
}

/// Looks as long as it lives.
#[derive(Debug)]
pub struct Watch(mpsc::Sender<()>);

impl Watch {
    pub fn start(registry: Registry) -> std::io::Result<Self> {
        let (now, asked) = mpsc::channel();
        std::thread::Builder::new().name("certificates".into()).spawn(move || {
            let mut rest = INTERVAL;
            loop {
                let asked = asked.recv_timeout(rest);
                let began = Instant::now();
                match asked {
                    Ok(()) => registry.look(true),
                    Err(RecvTimeoutError::Timeout) => registry.look(false),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                rest = INTERVAL.max(began.elapsed() * SHARE);
            }
        })?;
        Ok(Self(now))
    }

    /// Looks now, and takes what is there.
    pub fn look(&self) {
        // It ends only with this.
        let _ = self.0.send(());
    }
}
