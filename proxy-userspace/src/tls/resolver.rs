//! Which certificate a client gets: by the name it asks for, then by the kind of key it can check.

use std::{collections::HashMap, sync::Arc};

use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use super::Certificate;

/// The certificates of a route. RSA and ECDSA for one name stand side by side: the client's signature schemes decide,
/// in the order of the file.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// By what follows `*.`: one label is in front of it (RFC 9525 §6.3).
    wildcards: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// For a client that names no server, or one that no certificate is for: all of them, the first one first. Which
    /// route it is, the route's `match` has decided before.
    all: Vec<Arc<CertifiedKey>>,
}

impl Resolver {
    /// In the order of the file.
    pub fn new(certificates: &[Certificate]) -> Self {
        let mut resolver = Self::default();
        for certificate in certificates {
            for name in &certificate.names {
                let (map, name) = match name.strip_prefix("*.") {
                    Some(suffix) => (&mut resolver.wildcards, suffix),
                    None => (&mut resolver.exact, name.as_str()),
                };
                map.entry(name.to_owned()).or_default().push(Arc::clone(&certificate.key));
            }
            resolver.all.push(Arc::clone(&certificate.key));
        }
        resolver
    }

    /// `name` in lower case.
    fn candidates(&self, name: Option<&str>) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let exact = name.and_then(|name| self.exact.get(name));
        let wildcard = name.and_then(|name| self.wildcards.get(name.split_once('.')?.1));
        exact.into_iter().flatten().chain(wildcard.into_iter().flatten()).chain(&self.all)
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        let usable = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(hello.signature_schemes()).is_some();
        let name = name.as_deref();
        // Where the client can check none of them, rustls finds that there is nothing in common, and says so.
        self.candidates(name).find(usable).or_else(|| self.candidates(name).next()).cloned()
    }
}

#[cfg(test)]
impl Resolver {
    /// For tests: the first certificate for a name.
    pub fn first(&self, name: Option<&str>) -> Option<&Arc<CertifiedKey>> {
        self.candidates(name).next()
    }
}
