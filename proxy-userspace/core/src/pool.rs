//! The state of a route's backends: where they are, whether they take connections, and who said so.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    config::{Health, Route, Target},
    ruleset::Endpoint,
    view::{self, BackendAdmin},
};

/// The backends of one route, in file order.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    backends: Vec<Backend>,
    health: Option<Health>,
}

#[derive(Debug, Clone, PartialEq)]
struct Backend {
    target: Target,
    weight: u16,
    admin: BackendAdmin,
    hosts: Vec<Host>,
}

/// One address of a backend.
#[derive(Debug, Clone, PartialEq)]
struct Host {
    ip: IpAddr,
    up: bool,
    /// Checks in a row that contradict `up`.
    streak: u32,
    last_error: Option<Arc<str>>,
    /// Dials that failed lately, the oldest first; at most [`FAILURES`].
    failures: VecDeque<Instant>,
    ejected_until: Option<Instant>,
}

/// Without active checks: so many failed dials …
const FAILURES: usize = 3;
/// … within this time take a host out of use …
const WITHIN: Duration = Duration::from_secs(10);
/// … for this long, unless it is the last one.
const EJECTED: Duration = Duration::from_secs(10);

impl Host {
    /// New hosts take connections until a check says otherwise, as in HAProxy.
    fn new(ip: IpAddr) -> Self {
        Self { ip, up: true, streak: 0, last_error: None, failures: VecDeque::new(), ejected_until: None }
    }
}

/// What came of a health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    pub ip: IpAddr,
    /// `Err`: why it failed.
    pub result: Result<(), String>,
}

impl Pool {
    pub fn new(route: &Route) -> Self {
        Self::updated(route, None)
    }

    /// The pool of `route`, keeping what is known of the backends that stay.
    pub fn updated(route: &Route, previous: Option<&Pool>) -> Self {
        let known = |target: &Target| previous?.backends.iter().find(|b| b.target == *target);
        let backend = |b: &crate::config::Backend| match known(&b.target) {
            Some(old) => Backend { weight: b.weight, ..old.clone() },
            None => Backend {
                target: b.target.clone(),
                weight: b.weight,
                admin: BackendAdmin::Ready,
                hosts: match &b.target {
                    Target::Address { ip, .. } => vec![Host::new(*ip)],
                    Target::Name { .. } => Vec::new(),
                },
            },
        };
        let mut pool = Self { backends: route.backends.iter().map(backend).collect(), health: route.health };
        if previous.is_some_and(|p| p.health.is_some() != pool.health.is_some()) {
            // What the other kind of check found says nothing to this one.
            for host in pool.backends.iter_mut().flat_map(|b| &mut b.hosts) {
                *host = Host::new(host.ip);
            }
        }
        pool
    }

    /// Every address of every backend, and whether it takes new connections.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        let of = |b: &Backend| {
            let ready = b.admin == BackendAdmin::Ready;
            let (port, weight) = (b.target.port(), b.weight);
            let endpoint = move |h: &Host| Endpoint { address: h.ip, port, weight, up: ready && h.up };
            b.hosts.iter().map(endpoint).collect::<Vec<_>>()
        };
        self.backends.iter().flat_map(of).collect()
    }

    /// The addresses of backends that are given by name, and the name.
    pub fn names(&self) -> Vec<(IpAddr, String)> {
        let of = |b: &Backend| {
            let named = |host: &str| b.hosts.iter().map(|h| (h.ip, host.to_owned())).collect::<Vec<_>>();
            b.target.host().map(named).unwrap_or_default()
        };
        self.backends.iter().flat_map(of).collect()
    }

    /// A name's addresses are known now. True when that changes the endpoints.
    pub fn resolved(&mut self, name: &str, addresses: &[IpAddr]) -> bool {
        let mut sorted = addresses.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let mut changed = false;
        for backend in &mut self.backends {
            if !matches!(&backend.target, Target::Name { host, .. } if host == name) {
                continue;
            }
            if backend.hosts.iter().map(|h| h.ip).eq(sorted.iter().copied()) {
                continue;
            }
            let old = std::mem::take(&mut backend.hosts);
            let host = |&ip: &IpAddr| old.iter().find(|h| h.ip == ip).cloned().unwrap_or_else(|| Host::new(ip));
            backend.hosts = sorted.iter().map(host).collect();
            changed = true;
        }
        changed
    }

    /// A check of `target` has ended. True when the backend goes up or down by it.
    pub fn checked(&mut self, target: &Target, checked: &Checked) -> bool {
        let Some(health) = self.health else { return false };
        let mut changed = false;
        for backend in self.backends.iter_mut().filter(|b| b.target == *target) {
            for host in backend.hosts.iter_mut().filter(|h| h.ip == checked.ip) {
                host.last_error = checked.result.as_ref().err().map(|e| e.as_str().into());
                if checked.result.is_ok() == host.up {
                    host.streak = 0;
                    continue;
                }
                host.streak += 1;
                if host.streak >= if host.up { health.fall } else { health.rise } {
                    host.up = !host.up;
                    host.streak = 0;
                    changed = true;
                }
            }
        }
        changed
    }

    /// A connection to `ip` was refused or not answered. True when the host is out of use by it: only without active
    /// checks, and never the last one.
    pub fn dial_failed(&mut self, ip: IpAddr, port: u16, now: Instant) -> bool {
        if self.health.is_some() {
            return false;
        }
        let others = self.endpoints().iter().any(|e| e.up && (e.address != ip || e.port.is_some_and(|p| p != port)));
        let mut changed = false;
        for backend in self.backends.iter_mut().filter(|b| b.target.port().is_none_or(|p| p == port)) {
            for host in backend.hosts.iter_mut().filter(|h| h.ip == ip && h.up) {
                host.failures.push_back(now);
                host.failures.retain(|&at| now.saturating_duration_since(at) < WITHIN);
                if host.failures.len() >= FAILURES && others {
                    host.failures.clear();
                    host.up = false;
                    host.ejected_until = Some(now + EJECTED);
                    let seconds = EJECTED.as_secs();
                    host.last_error = Some(format!("{FAILURES} connections failed: not used for {seconds} s").into());
                    changed = true;
                }
                host.failures.truncate(FAILURES);
            }
        }
        changed
    }

    /// Takes hosts back whose time out of use is over. True when there was one.
    pub fn readmit(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for host in self.backends.iter_mut().flat_map(|b| &mut b.hosts) {
            if host.ejected_until.is_some_and(|until| until <= now) {
                *host = Host::new(host.ip);
                changed = true;
            }
        }
        changed
    }

    /// When [`Self::readmit`] has something to do.
    pub fn next_readmission(&self) -> Option<Instant> {
        self.backends.iter().flat_map(|b| &b.hosts).filter_map(|h| h.ejected_until).min()
    }

    /// An operator's word. `None`: no such backend. The name is the one in the configuration, or one of its addresses.
    pub fn set_admin(&mut self, name: &str, admin: BackendAdmin) -> Option<view::Backend> {
        let named = |b: &&mut Backend| b.target.to_string() == name || b.hosts.iter().any(|h| h.ip.to_string() == name);
        let backend = self.backends.iter_mut().find(named)?;
        backend.admin = admin;
        Some(backend.view())
    }

    /// What to check: each target with its present addresses.
    pub fn targets(&self) -> Vec<(Target, Vec<IpAddr>)> {
        self.backends.iter().map(|b| (b.target.clone(), b.hosts.iter().map(|h| h.ip).collect())).collect()
    }

    pub fn views(&self) -> Vec<view::Backend> {
        self.backends.iter().map(Backend::view).collect()
    }

    /// Backend names that an operator has set to something else than `ready`.
    pub fn set_aside(&self) -> Vec<(String, BackendAdmin)> {
        let aside = self.backends.iter().filter(|b| b.admin != BackendAdmin::Ready);
        aside.map(|b| (b.target.to_string(), b.admin)).collect()
    }
}

impl Backend {
    fn view(&self) -> view::Backend {
        let up = self.admin == BackendAdmin::Ready && self.hosts.iter().any(|h| h.up);
        let reason = match self.admin {
            BackendAdmin::Drain => Some("set to drain".into()),
            BackendAdmin::Down => Some("set to down".into()),
            BackendAdmin::Ready if self.hosts.is_empty() => Some("its name is not resolved".into()),
            BackendAdmin::Ready => self.hosts.iter().find_map(|h| h.last_error.as_deref().map(str::to_owned)),
        };
        view::Backend {
            name: self.target.to_string(),
            addresses: self.hosts.iter().map(|h| h.ip).collect(),
            weight: self.weight,
            up,
            admin: self.admin,
            reason,
            connections_active: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn pool(extra: &str) -> Pool {
        let text = format!(
            "[[route]]\nname = \"web\"\nlisten = [\"10.0.0.1:80\"]\nbackends = [\"10.0.1.1:80\", \"10.0.1.2:80\"]\n{extra}"
        );
        let config = crate::config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
        Pool::new(&config.routes[0])
    }

    fn up(pool: &Pool) -> Vec<bool> {
        pool.endpoints().iter().map(|e| e.up).collect()
    }

    fn check(pool: &mut Pool, good: bool) -> bool {
        let ip = [10, 0, 1, 1].into();
        let result = if good { Ok(()) } else { Err("refused".to_owned()) };
        pool.checked(&Target::Address { ip, port: Some(80) }, &Checked { ip, result })
    }

    #[test]
    fn a_backend_falls_after_fall_failures_and_rises_after_rise_successes() {
        let mut pool = pool("health = { check = \"tcp\", rise = 2, fall = 3 }\n");
        assert_eq!([check(&mut pool, false), check(&mut pool, false)], [false, false]);
        // A success in between: three in a row are wanted.
        assert!(!check(&mut pool, true));
        assert_eq!([false; 3].map(|good| check(&mut pool, good)), [false, false, true]);
        assert_eq!(up(&pool), [false, true]);
        assert_eq!(pool.views()[0].reason.as_deref(), Some("refused"));
        assert_eq!([true; 2].map(|good| check(&mut pool, good)), [false, true]);
        assert_eq!(up(&pool), [true, true]);
    }

    #[test]
    fn failed_dials_eject_a_host_for_a_while_but_never_the_last() {
        let (mut pool, now) = (pool(""), Instant::now());
        let fail = |pool: &mut Pool, host: u8, at: Duration| pool.dial_failed([10, 0, 1, host].into(), 80, now + at);
        let second = Duration::from_secs(1);
        // Three in half a minute are an accident.
        assert!(!(0..3).any(|n| fail(&mut pool, 1, n * 15 * second)));
        assert_eq!([60, 61, 62].map(|at| fail(&mut pool, 1, at * second)), [false, false, true]);
        assert_eq!(up(&pool), [false, true]);
        assert!(!(63..70).any(|at| fail(&mut pool, 2, at * second)), "the last one stays");
        assert_eq!(pool.next_readmission(), Some(now + 72 * second));
        assert!(!pool.readmit(now + 71 * second));
        assert!(pool.readmit(now + 72 * second));
        assert_eq!(up(&pool), [true, true]);
    }

    #[test]
    fn with_active_checks_failed_dials_decide_nothing() {
        let mut pool = pool("health = { check = \"tcp\" }\n");
        assert!(!(0..9).any(|_| pool.dial_failed([10, 0, 1, 1].into(), 80, Instant::now())));
    }

    #[test]
    fn an_operators_word_outlives_a_reload() {
        let mut before = pool("");
        assert!(before.set_admin("10.0.1.1:80", BackendAdmin::Drain).is_some());
        assert!(before.set_admin("10.0.1.9:80", BackendAdmin::Down).is_none());
        let text =
            "[[route]]\nname = \"web\"\nlisten = [\"10.0.0.1:81\"]\nbackends = [\"10.0.1.1:80\", \"10.0.1.3:80\"]\n";
        let config = crate::config::parse(text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
        let after = Pool::updated(&config.routes[0], Some(&before));
        assert_eq!(up(&after), [false, true]);
    }
}
