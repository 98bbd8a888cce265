//! What a CA that looks whose a name is gets to see (TLS-ALPN-01, RFC 8737).

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use proxy_core::sniff::hello::Hello;
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version,
};

use super::AcmeError;
use crate::tls::provider;

/// The one protocol that the CA offers.
pub const PROTOCOL: &[u8] = b"acme-tls/1";

/// The names that a CA is looking at, and what it is shown. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Challenges(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Nearly always zero: then no hello waits for the lock.
    count: AtomicUsize,
    pending: RwLock<HashMap<String, Arc<ServerConfig>>>,
}

impl Challenges {
    /// What to answer with. `None`: not a CA that looks at a name now; the hello is served like any other.
    pub fn answer(&self, hello: &Hello) -> Option<Arc<ServerConfig>> {
        if self.0.count.load(Relaxed) == 0 || !hello.alpn.iter().eq([PROTOCOL]) {
            return None;
        }
        let pending = self.0.pending.read().unwrap_or_else(PoisonError::into_inner);
        pending.get(hello.sni.as_deref()?).cloned()
    }

    /// `digest`: of the key authorization. The answer is there as long as what is returned.
    pub(super) fn prepare(&self, name: &str, digest: &[u8]) -> Result<Prepared, AcmeError> {
        let config = shown(name, digest).and_then(config).map_err(AcmeError::Challenge)?;
        self.change(|pending| drop(pending.insert(name.to_owned(), Arc::new(config))));
        Ok(Prepared { challenges: self.clone(), name: name.to_owned() })
    }

    fn change(&self, change: impl FnOnce(&mut HashMap<String, Arc<ServerConfig>>)) {
        let mut pending = self.0.pending.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut pending);
        self.0.count.store(pending.len(), Relaxed);
    }
}

#[derive(Debug)]
pub(super) struct Prepared {
    challenges: Challenges,
    name: String,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.challenges.change(|pending| drop(pending.remove(&self.name)));
    }
}

/// RFC 8737 §3: a self-signed certificate for the name alone, with the digest in a critical extension.
fn shown(name: &str, digest: &[u8]) -> Result<CertifiedKey, String> {
    let told = |error: rcgen::Error| error.to_string();
    let mut params = CertificateParams::new([name.to_owned()]).map_err(told)?;
    params.distinguished_name = DistinguishedName::new();
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
    let key = KeyPair::generate().map_err(told)?;
    let certificate = params.self_signed(&key).map_err(told)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let key = provider().key_provider.load_private_key(key).map_err(|error| error.to_string())?;
    // Not compared: rustls will not read a certificate with a critical extension that it does not know.
    Ok(CertifiedKey::new(vec![certificate.der().clone()], key))
}

fn config(shown: CertifiedKey) -> Result<ServerConfig, String> {
    let builder = ServerConfig::builder_with_provider(provider());
    let builder = builder.with_protocol_versions(&[&version::TLS13, &version::TLS12]);
    let builder = builder.map_err(|error| error.to_string())?.with_no_client_auth();
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // It comes once and says nothing.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

#[cfg(test)]
mod tests;
