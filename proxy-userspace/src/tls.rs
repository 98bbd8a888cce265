//! TLS of routes: certificates and keys from files, what they become for rustls, and what changes while the daemon runs.
//!
//! Everything that can be wrong with a file is found when a route is prepared, before anything is touched. Later a file
//! that is wrong changes nothing: what was read before stays, and it is said.
//!
//! Keys are never written to the log: errors name files, and rustls tells nothing of a key.

mod certificate;
mod identity;
mod resolver;
mod route;
mod watch;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use rustls::{
    ClientConfig,
    crypto::{CryptoProvider, aws_lc_rs},
};

pub use certificate::Certificate;
pub use identity::common_name;
pub use route::RouteTls;
pub use watch::{Registry, Watch};

/// A certificate is warned of when it is valid for no longer than this.
pub const EXPIRES_SOON: i64 = 14 * 24 * 3600;

/// aws-lc-rs, which offers X25519MLKEM768 first.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));
    Arc::clone(&PROVIDER)
}

/// What is wrong with a file, or with two that do not belong together.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{}: {error}", file.display())]
    Read { file: PathBuf, error: io::Error },
    #[error("{}: {why}", file.display())]
    Pem { file: PathBuf, why: String },
    #[error("{}: no certificate in it", file.display())]
    NoCertificate { file: PathBuf },
    #[error("{}: no private key in it", file.display())]
    NoKey { file: PathBuf },
    #[error("{}: {why}", file.display())]
    Bad { file: PathBuf, why: String },
    #[error("{} is not the key of the first certificate in {}", key.display(), cert.display())]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error("backend_tls without a ca needs the system's authorities, and there are none: {why}")]
    NoAuthorities { why: String },
    #[error("{0}")]
    Settings(rustls::Error),
}

impl TlsError {
    /// One line of how to mend it.
    pub fn mend(&self) -> String {
        match self {
            Self::Read { error, .. } if error.kind() == io::ErrorKind::PermissionDenied => {
                "let the user that shunt runs as read the file".into()
            }
            Self::Read { .. } => "name a file that is there; relative paths begin at the configuration file".into(),
            Self::Pem { .. } | Self::NoCertificate { .. } | Self::Bad { .. } => {
                "a PEM file is needed: the server's certificate first, then those of its issuers".into()
            }
            Self::NoKey { .. } => "a PEM file with an unencrypted key is needed: PRIVATE KEY, RSA or EC".into(),
            Self::Mismatch { key, .. } => {
                format!(
                    "openssl pkey -in {} -pubout shows the public key that the certificate must have",
                    key.display()
                )
            }
            Self::NoAuthorities { .. } => "install ca-certificates, or name a file with backend_tls.ca".into(),
            Self::Settings(_) => "`shunt doctor` looks at every certificate".into(),
        }
    }

    fn pem(file: &Path, error: rustls::pki_types::pem::Error) -> Self {
        use rustls::pki_types::pem::Error;
        let file = file.to_owned();
        match error {
            Error::Io(error) => Self::Read { file, error },
            error => Self::Pem { file, why: format!("not PEM: {error}") },
        }
    }
}

/// For a client that verifies servers by the authorities in `ca`, or by those of the system.
pub fn client_trusting(ca: Option<&Path>) -> Result<ClientConfig, TlsError> {
    Ok(route::client_builder(ca)?.with_no_client_auth())
}

/// For what needs to be spread, not secret.
pub fn random() -> u64 {
    let mut bytes = [0; 8];
    // Without, things come together that need not: nothing worse.
    let _ = provider().secure_random.fill(&mut bytes);
    u64::from_ne_bytes(bytes)
}

/// Seconds since the Unix epoch.
pub fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
