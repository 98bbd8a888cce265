//! The TLS of one route: made of its files, and made again when they change.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use proxy_core::config::{
    AcmeCertificate, BackendTls, CertificateFiles, Certificates, Route, RouteName, Tls, TlsMode, TlsVersion,
};
use rustls::{
    ClientConfig, ConfigBuilder, RootCertStore, ServerConfig, SupportedProtocolVersion,
    client::{Resumption, WantsClientCert},
    crypto::aws_lc_rs::Ticketer,
    server::{NoServerSessionStorage, ProducesTickets, WebPkiClientVerifier},
    version,
};

use super::{Certificate, TlsError, certificate, provider, resolver::Resolver};

/// Sessions towards backends that are remembered for resumption.
const BACKEND_SESSIONS: usize = 1024;

/// Outlives changes of the route that do not concern TLS, and changes of its files.
#[derive(Debug)]
pub struct RouteTls {
    pub route: RouteName,
    terminate: Option<Tls>,
    backend: Option<BackendTls>,
    live: RwLock<Live>,
    seen: Mutex<Seen>,
}

/// What is in force.
#[derive(Debug, Clone)]
struct Live {
    server: Option<Arc<ServerConfig>>,
    client: Option<Arc<ClientConfig>>,
    certificates: Vec<Certificate>,
    /// The names that a CA has issued a certificate for.
    issued: HashSet<String>,
    tickets: Option<Tickets>,
    /// Why newer files are not in force.
    problem: Option<String>,
}

/// Tickets are this route's own: one of another route may stand for a client that was not asked for a certificate. Their
/// keys rotate by themselves, and the state is with the client.
#[derive(Debug, Clone)]
struct Tickets {
    producer: Arc<dyn ProducesTickets>,
    /// The authorities of clients that tickets stand for; after a change of them nobody is let in by an old ticket.
    client_ca: Option<Vec<u8>>,
}

/// The files as they were seen.
#[derive(Debug, Default)]
struct Seen {
    tried: Vec<Option<Stamp>>,
    /// They have changed since, and may be changing still.
    changing: Option<Vec<Option<Stamp>>>,
}

/// Tells whether a file is the same as before: also when another was renamed in its place, or a symbolic link on the way to
/// it leads elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What a look at the files has brought.
#[derive(Debug)]
pub enum Looked {
    Same,
    /// They have changed; what they are now is looked at when they have come to rest.
    Changing,
    Renewed,
    /// As it is told only once.
    Bad(TlsError),
}

impl RouteTls {
    /// `None`: the route neither ends nor begins TLS.
    pub fn load(route: &Route) -> Result<Option<Self>, TlsError> {
        let terminate = route.tls.as_ref().filter(|tls| tls.mode == TlsMode::Terminate).cloned();
        let backend = route.backend_tls.clone();
        if terminate.is_none() && backend.is_none() {
            return Ok(None);
        }
        let files = files(terminate.as_ref(), backend.as_ref());
        let tried = stamps(&files);
        let live = build(terminate.as_ref(), backend.as_ref(), None)?;
        let seen = Mutex::new(Seen { tried, changing: None });
        Ok(Some(Self { route: route.name.clone(), terminate, backend, live: RwLock::new(live), seen }))
    }

    /// Made of the same settings: it can go on.
    pub fn is_of(&self, route: &Route) -> bool {
        self.route == route.name
            && self.backend == route.backend_tls
            && self.terminate.as_ref() == route.tls.as_ref().filter(|tls| tls.mode == TlsMode::Terminate)
    }

    pub fn terminates(&self) -> bool {
        self.terminate.is_some()
    }

    /// Its certificates are issued while the daemon runs.
    pub fn is_by_acme(&self) -> bool {
        self.terminate.as_ref().is_some_and(|tls| matches!(tls.certificates, Certificates::Acme(_)))
    }

    /// The certificate for `name` has not been issued yet.
    pub fn lacks(&self, name: Option<&str>) -> bool {
        if !self.is_by_acme() {
            return false;
        }
        let issued = &self.live.read().unwrap_or_else(PoisonError::into_inner).issued;
        // Without a name any will do.
        name.map_or(issued.is_empty(), |name| !issued.contains(name))
    }

    pub fn encrypts_again(&self) -> bool {
        self.backend.is_some()
    }

    /// For a connection of a client. `None`: TLS does not end here.
    pub fn server(&self) -> Option<Arc<ServerConfig>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).server.clone()
    }

    /// For a connection to a backend. `None`: it is not encrypted.
    pub fn client(&self) -> Option<Arc<ClientConfig>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).client.clone()
    }

    pub fn certificates(&self) -> Vec<Certificate> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).certificates.clone()
    }

    /// Why the files as they are now are not in force.
    pub fn problem(&self) -> Option<String> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).problem.clone()
    }

    /// Looks whether the files are others, and takes them when they are sound. `at_once`: without waiting until a change
    /// of several files is complete.
    pub fn look(&self, at_once: bool) -> Looked {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamps(&files(self.terminate.as_ref(), self.backend.as_ref()));
        if now == seen.tried {
            seen.changing = None;
            return Looked::Same;
        }
        if !at_once && seen.changing.as_ref() != Some(&now) {
            seen.changing = Some(now);
            return Looked::Changing;
        }
        *seen = Seen { tried: now, changing: None };
        let before = self.live.read().unwrap_or_else(PoisonError::into_inner).clone();
        let built = build(self.terminate.as_ref(), self.backend.as_ref(), Some(&before));
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        match built {
            Ok(renewed) => {
                *live = renewed;
                Looked::Renewed
            }
            Err(error) => {
                live.problem = Some(error.to_string());
                Looked::Bad(error)
            }
        }
    }
}

fn build(terminate: Option<&Tls>, backend: Option<&BackendTls>, before: Option<&Live>) -> Result<Live, TlsError> {
    let mut live = Live {
        server: None,
        client: None,
        certificates: Vec::new(),
        issued: HashSet::new(),
        tickets: None,
        problem: None,
    };
    if let Some(tls) = terminate {
        live.certificates = match &tls.certificates {
            Certificates::Files(files) => files.iter().map(Certificate::load).collect::<Result<_, _>>()?,
            Certificates::Acme(wanted) => {
                let issued: Vec<_> = wanted.iter().filter_map(|one| Some((&one.name, issued(one, before)?))).collect();
                live.issued = issued.iter().map(|(name, _)| (*name).clone()).collect();
                issued.into_iter().map(|(_, certificate)| certificate).collect()
            }
        };
        let tickets = tickets(tls, before.and_then(|before| before.tickets.as_ref()))?;
        live.server = Some(Arc::new(server(tls, &live.certificates, &tickets)?));
        live.tickets = Some(tickets);
    }
    if let Some(tls) = backend {
        live.client = Some(Arc::new(client(tls)?));
    }
    Ok(live)
}

/// What the CA has issued. A file that is not there, or cannot be used, is no reason not to serve the others; what was
/// read of it before stays.
fn issued(wanted: &AcmeCertificate, before: Option<&Live>) -> Option<Certificate> {
    match Certificate::load_whole(&wanted.file) {
        Ok(certificate) => Some(certificate),
        Err(error) => {
            tracing::debug!(name = wanted.name, %error, "no certificate from the CA");
            before?.certificates.iter().find(|one| one.file == wanted.file).cloned()
        }
    }
}

fn tickets(tls: &Tls, before: Option<&Tickets>) -> Result<Tickets, TlsError> {
    let read = |file: &PathBuf| fs::read(file).map_err(|error| TlsError::Read { file: file.clone(), error });
    let client_ca = tls.client_ca.as_ref().map(read).transpose()?;
    match before.filter(|before| before.client_ca == client_ca) {
        Some(before) => Ok(before.clone()),
        None => Ok(Tickets { producer: Ticketer::new().map_err(TlsError::Settings)?, client_ca }),
    }
}

fn server(tls: &Tls, certificates: &[Certificate], tickets: &Tickets) -> Result<ServerConfig, TlsError> {
    let versions: &[&'static SupportedProtocolVersion] = match tls.min_version {
        TlsVersion::Tls12 => &[&version::TLS13, &version::TLS12],
        TlsVersion::Tls13 => &[&version::TLS13],
    };
    let builder =
        ServerConfig::builder_with_provider(provider()).with_protocol_versions(versions).map_err(TlsError::Settings)?;
    let builder = match &tls.client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let roots = Arc::new(certificate::authorities(file)?);
            let bad = |error| TlsError::Bad { file: file.clone(), why: format!("{error}") };
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build().map_err(bad)?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(Resolver::new(certificates)));
    config.alpn_protocols = tls.alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ticketer = Arc::clone(&tickets.producer);
    Ok(config)
}

fn client(tls: &BackendTls) -> Result<ClientConfig, TlsError> {
    let builder = client_builder(tls.ca.as_deref())?;
    let mut config = match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => {
            // Checked as a pair first: the builder would not say which file is wrong.
            Certificate::load(&CertificateFiles { cert: cert.clone(), key: key.clone() })?;
            let (chain, secret) = (certificate::chain(cert)?, certificate::key(key)?);
            builder.with_client_auth_cert(chain, secret).map_err(TlsError::Settings)?
        }
        _ => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::in_memory_sessions(BACKEND_SESSIONS);
    Ok(config)
}

pub(super) fn client_builder(ca: Option<&Path>) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, TlsError> {
    let roots: RootCertStore = match ca {
        Some(file) => certificate::authorities(file)?,
        None => certificate::system_authorities()?,
    };
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])
        .map_err(TlsError::Settings)?
        .with_root_certificates(roots))
}

fn files<'a>(terminate: Option<&'a Tls>, backend: Option<&'a BackendTls>) -> Vec<&'a Path> {
    let mut files: Vec<&Path> = match terminate.map(|tls| &tls.certificates) {
        Some(Certificates::Files(pairs)) => pairs.iter().flat_map(|pair| [&*pair.cert, &*pair.key]).collect(),
        Some(Certificates::Acme(wanted)) => wanted.iter().map(|one| &*one.file).collect(),
        None => Vec::new(),
    };
    files.extend(terminate.and_then(|tls| tls.client_ca.as_deref()));
    let of_backend = |tls: &'a BackendTls| [&tls.ca, &tls.cert, &tls.key].into_iter().flatten();
    files.extend(backend.into_iter().flat_map(of_backend).map(PathBuf::as_path));
    files
}

fn stamps(files: &[&Path]) -> Vec<Option<Stamp>> {
    let stamp = |file: &&Path| {
        let found = fs::metadata(file).ok()?;
        Some(Stamp {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    };
    files.iter().map(stamp).collect()
}
