//! Certificates that a CA issues by itself (ACME, RFC 8555), for routes with `certificates = "acme"`.
//!
//! One task asks the CA, one order after the other. What it gets it writes into the cache, where the routes have their
//! certificates from like from any other file ([`crate::tls`]): a certificate that is there after a restart is used without a
//! word to the CA. While the CA looks whose a name is, the workers of the stream path answer it (TLS-ALPN-01, RFC 8737),
//! on the route's own port, from what is [pending](Challenges).

mod account;
mod advice;
mod cache;
mod challenge;
mod error;
mod https;
mod order;
mod task;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use proxy_core::{
    config::{Acme, AcmeCertificate, Certificates, HmacKey, Route, hmac_key},
    renewal::Time,
    view,
};

pub use challenge::{Challenges, PROTOCOL};
pub use error::AcmeError;
pub use task::Handle;

use crate::tls::now;

/// Names that a warning names at most.
const NAMED: usize = 5;

/// What the routes want of the CA.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    pub acme: Option<Arc<Acme>>,
    /// Each name once, in their order.
    pub certificates: Vec<AcmeCertificate>,
}

impl Wanted {
    pub fn by<'a>(acme: Option<&Arc<Acme>>, routes: impl Iterator<Item = &'a Arc<Route>>) -> Self {
        let mut certificates: Vec<AcmeCertificate> = routes.flat_map(|route| names(route)).cloned().collect();
        certificates.sort_unstable();
        certificates.dedup();
        Self { acme: acme.cloned(), certificates }
    }
}

/// The names of a route whose certificates come from the CA.
pub fn names(route: &Route) -> &[AcmeCertificate] {
    match route.tls.as_ref().map(|tls| &tls.certificates) {
        Some(Certificates::Acme(certificates)) => certificates,
        Some(Certificates::Files(_)) | None => &[],
    }
}

/// Whether the files that `[acme]` names can be used.
pub fn check(acme: &Acme) -> Result<(), AcmeError> {
    https::trust(acme)?;
    external_key(acme).map(drop)
}

/// `None`: the account is bound to no other.
fn external_key(acme: &Acme) -> Result<Option<instant_acme::ExternalAccountKey>, AcmeError> {
    let Some(eab) = &acme.eab else { return Ok(None) };
    let key = match &eab.hmac_key {
        HmacKey::Given(key) => key.clone(),
        HmacKey::File(file) => {
            let text = std::fs::read_to_string(file).map_err(|error| AcmeError::file(file, error))?;
            hmac_key(&text).map_err(|why| AcmeError::Eab { file: file.clone(), why })?
        }
    };
    Ok(Some(instant_acme::ExternalAccountKey::new(eab.key_id.clone(), &key.0)))
}

/// How an order ended, for `shunt_acme_orders_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// The CA could not be talked to.
    Unreachable,
    /// The CA will not have this account.
    Account,
    /// The CA has had too many from us.
    RateLimited,
    /// The CA did not find the name to be ours.
    Challenge,
    /// The CA will not have this order.
    Refused,
    /// A file of ours, or what the CA has issued, cannot be used.
    Failed,
}

impl Outcome {
    pub const ALL: [Outcome; 7] =
        [Self::Ok, Self::Unreachable, Self::Account, Self::RateLimited, Self::Challenge, Self::Refused, Self::Failed];

    /// The value of the `result` label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unreachable => "unreachable",
            Self::Account => "account",
            Self::RateLimited => "rate_limited",
            Self::Challenge => "challenge",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// What others see of it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Told {
    pub challenges: Challenges,
    names: Arc<Mutex<BTreeMap<String, Standing>>>,
    orders: Arc<[AtomicU64; Outcome::ALL.len()]>,
}

/// How it stands with a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Standing {
    expires: Option<Time>,
    next: Time,
    /// Why the last order failed, and how that is mended.
    problem: Option<String>,
}

impl Told {
    /// Orders that ended so, ever.
    pub fn orders(&self, outcome: Outcome) -> u64 {
        self.orders[outcome as usize].load(Relaxed)
    }

    /// Some name is wanted, or was.
    pub fn is_used(&self) -> bool {
        !self.lock().is_empty() || self.orders.iter().any(|count| count.load(Relaxed) > 0)
    }

    pub fn views(&self) -> Vec<view::AcmeCertificate> {
        let now = now();
        let view = |(name, standing): (&String, &Standing)| view::AcmeCertificate {
            name: name.clone(),
            expires: standing.expires,
            next_order_seconds: standing.next.saturating_sub(now).max(0),
            problem: standing.problem.clone(),
        };
        self.lock().iter().map(view).collect()
    }

    /// Things an operator should know now, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let now = now();
        let names = self.lock();
        let mut failing =
            names.iter().filter_map(|(name, standing)| Some((name, standing, standing.problem.as_ref()?)));
        let told = failing.by_ref().take(NAMED).map(|(name, standing, problem)| {
            let again = standing.next.saturating_sub(now).max(0);
            let then = format!("{problem}; tried again in {again} s");
            match standing.expires.map(|expires| expires - now) {
                None => format!("\"{name}\" has no certificate yet: {then}"),
                Some(..=0) => format!("the certificate for \"{name}\" has expired and was not renewed: {then}"),
                Some(left) => {
                    format!("the certificate for \"{name}\", good for {} h, was not renewed: {then}", left / 3600)
                }
            }
        });
        let mut told: Vec<String> = told.collect();
        match failing.count() {
            0 => {}
            more => told.push(format!("{more} more names could not get a certificate: shunt status --json lists them")),
        }
        told
    }

    fn count(&self, outcome: Outcome) {
        self.orders[outcome as usize].fetch_add(1, Relaxed);
    }

    fn tell(&self, standings: BTreeMap<String, Standing>) {
        *self.lock() = standings;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Standing>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
