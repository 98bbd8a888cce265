//! A certificate with its chain and its key, from two files.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use proxy_core::{config::CertificateFiles, renewal::Validity};
use rustls::{
    InconsistentKeys, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use super::{
    TlsError,
    identity::{Identity, identity},
    provider,
};

/// A certificate as it is served.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub file: PathBuf,
    /// In lower case, also wildcards.
    pub names: Vec<String>,
    /// Seconds since the Unix epoch.
    pub begins: i64,
    pub expires: i64,
    pub(super) key: Arc<CertifiedKey>,
}

impl Certificate {
    pub fn load(files: &CertificateFiles) -> Result<Self, TlsError> {
        Self::of(files, chain(&files.cert)?, key(&files.key)?)
    }

    /// Key and chain from one file.
    pub fn load_whole(file: &Path) -> Result<Self, TlsError> {
        let pem = fs::read(file).map_err(|error| TlsError::Read { file: file.to_owned(), error })?;
        Self::from_pem(file, &pem)
    }

    /// `file`: where `pem` is from, or goes.
    pub fn from_pem(file: &Path, pem: &[u8]) -> Result<Self, TlsError> {
        let files = CertificateFiles { cert: file.to_owned(), key: file.to_owned() };
        let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| TlsError::pem(file, error))?;
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| no_key(file, error))?;
        Self::of(&files, chain, key)
    }

    /// The server's own.
    pub fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.key.cert.first()
    }

    /// From when to when.
    pub fn validity(&self) -> Validity {
        Validity { begins: self.begins, expires: self.expires }
    }

    fn of(
        files: &CertificateFiles,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, TlsError> {
        let bad = |file: &Path, why: String| TlsError::Bad { file: file.to_owned(), why };
        let Some(first) = chain.first() else { return Err(TlsError::NoCertificate { file: files.cert.clone() }) };
        let identity = identity(first).map_err(|why| bad(&files.cert, format!("certificate 1: {why}")))?;
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                TlsError::Mismatch { cert: files.cert.clone(), key: files.key.clone() }
            }
            rustls::Error::InvalidCertificate(why) => bad(&files.cert, format!("certificate 1: {why:?}")),
            error => bad(&files.key, error.to_string()),
        })?;
        let Identity { names, begins, expires } = identity;
        Ok(Self { file: files.cert.clone(), names, begins, expires, key: Arc::new(key) })
    }
}

pub(super) fn chain(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(file).map_err(|error| TlsError::pem(file, error))?;
    let chain = read.collect::<Result<Vec<_>, _>>().map_err(|error| TlsError::pem(file, error))?;
    if chain.is_empty() { Err(TlsError::NoCertificate { file: file.to_owned() }) } else { Ok(chain) }
}

pub(super) fn key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(file).map_err(|error| no_key(file, error))
}

fn no_key(file: &Path, error: rustls::pki_types::pem::Error) -> TlsError {
    match error {
        rustls::pki_types::pem::Error::NoItemsFound => TlsError::NoKey { file: file.to_owned() },
        error => TlsError::pem(file, error),
    }
}

/// The authorities in a file: every certificate in it must be one that can sign.
pub(super) fn authorities(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for (index, certificate) in chain(file)?.into_iter().enumerate() {
        let bad = |error| TlsError::Bad { file: file.to_owned(), why: format!("certificate {}: {error}", index + 1) };
        store.add(certificate).map_err(bad)?;
    }
    Ok(store)
}

/// The authorities this machine trusts.
pub(super) fn system_authorities() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(found.certs);
    if store.is_empty() {
        let why = found.errors.first().map_or_else(|| "none found".to_owned(), ToString::to_string);
        return Err(TlsError::NoAuthorities { why });
    }
    Ok(store)
}
