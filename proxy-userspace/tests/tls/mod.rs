//! An authority, a stream path with one route, clients and backends that speak TLS.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use proxy_core::{
    capability::Capabilities,
    config::{self, Engine},
    plan::plan,
    reason::Reason,
    ruleset::Endpoint,
};
use proxy_userspace::stream::{Change, Ended, Options, RouteSpec, StreamPath, Streams, meter::RouteTotals};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    SupportedProtocolVersion,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::sync::mpsc;

pub const SOON: Duration = Duration::from_secs(5);

pub fn pattern(length: u32) -> Vec<u8> {
    (0..length).map(|i| (i * 7 % 251) as u8).collect()
}

pub struct Files {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Signs certificates, and has a folder for them.
pub struct Authority {
    folder: PathBuf,
    pub file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("shunt-stream-tls-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let file = folder.join("ca.pem");
        fs::write(&file, params.self_signed(&key).expect("signed").pem()).expect("written");
        Self { folder, file, issuer: Issuer::new(params, key) }
    }

    /// Written over what was there.
    pub fn issue(&self, stem: &str, names: &[&str]) -> Files {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, stem);
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("signed");
        let files =
            Files { cert: self.folder.join(format!("{stem}.pem")), key: self.folder.join(format!("{stem}.key")) };
        fs::write(&files.cert, cert.pem()).expect("written");
        fs::write(&files.key, key.serialize_pem()).expect("written");
        files
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&self.file).expect("a certificate")).expect("an authority");
        roots
    }

    pub fn client(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        identity: Option<&Files>,
        alpn: &[&[u8]],
    ) -> Arc<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(self.roots());
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(files) => {
                let (chain, key) = pair(files);
                builder.with_client_auth_cert(chain, key).expect("a pair")
            }
        };
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(config)
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.folder));
    }
}

fn pair(files: &Files) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = CertificateDer::pem_file_iter(&files.cert).expect("a file").collect::<Result<_, _>>();
    (chain.expect("certificates"), PrivateKeyDer::from_pem_file(&files.key).expect("a key"))
}

pub struct Client(StreamOwned<ClientConnection, TcpStream>);

impl std::ops::Deref for Client {
    type Target = StreamOwned<ClientConnection, TcpStream>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl std::ops::DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Client {
    pub fn connection(&self) -> &ClientConnection {
        &self.0.conn
    }

    /// Sends and reads at once, then says the end and reads it.
    pub fn echo(&mut self, data: &[u8]) -> Vec<u8> {
        let mut back = Vec::with_capacity(data.len());
        // Less than what fits on the way.
        for chunk in data.chunks(200_000) {
            self.write_all(chunk).expect("written");
            let from = back.len();
            back.resize(from + chunk.len(), 0);
            self.read_exact(&mut back[from..]).expect("read");
        }
        self.conn.send_close_notify();
        self.flush().expect("flushed");
        self.read_to_end(&mut back).expect("close_notify");
        back
    }
}

/// A stream path with one route.
pub struct Served {
    runtime: tokio::runtime::Runtime,
    pub path: StreamPath,
    ended: mpsc::Receiver<Vec<Ended>>,
    listen: SocketAddr,
}

impl Served {
    pub fn new(backends: &[SocketAddr], extra: &str) -> Self {
        let listen = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
        Self::try_new(listen, backends, extra).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn try_new(listen: SocketAddr, backends: &[SocketAddr], extra: &str) -> Result<Self, String> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (ended_tx, ended) = mpsc::channel(1024);
        let options = Options {
            workers: 2,
            failed_dials: mpsc::channel(16).0,
            drained: mpsc::channel(16).0,
            ended: ended_tx,
            lock_tables: false,
            handoff: None,
            begin_handoff: Box::new(|| panic!("no route of these hands over")),
        };
        let mut path = runtime.block_on(async { StreamPath::start(options) }).expect("it starts");
        let list: Vec<String> = backends.iter().map(|b| format!("\"{b}\"")).collect();
        let text =
            format!("[[route]]\nname = \"web\"\nlisten = [\"{listen}\"]\nbackends = [{}]\n{extra}\n", list.join(", "));
        let config = config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
        let planned = plan(&config, &Capabilities::all());
        assert_eq!(planned.routes()[0].engine, Some(Engine::Copy));
        let endpoint = |b: &SocketAddr| Endpoint { address: b.ip(), port: Some(b.port()), weight: 1, up: true };
        let spec = RouteSpec {
            id: 7,
            plan: planned.routes()[0].clone(),
            endpoints: backends.iter().map(endpoint).collect(),
            names: Vec::new(),
        };
        let change = Change { ports: vec![(listen, vec![7])], routes: vec![spec], gone: Vec::new() };
        let prepared = path.prepare(change).map_err(|error| error.to_string())?;
        path.commit(prepared);
        Ok(Self { runtime, path, ended, listen })
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.listen).expect("it accepts");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        stream
    }

    pub fn tls(&self, authority: &Authority, name: &str, versions: &[&'static SupportedProtocolVersion]) -> Client {
        self.tls_with(authority.client(versions, None, &[]), name)
    }

    pub fn tls_with(&self, config: Arc<ClientConfig>, name: &str) -> Client {
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        Client(StreamOwned::new(ClientConnection::new(config, name).expect("a client"), self.connect()))
    }

    pub fn totals(&self) -> RouteTotals {
        self.path.reader.meters.get(7).expect("its meters").totals()
    }

    /// The next connection that ends for `reason`.
    pub fn ended(&mut self, reason: Reason) -> Ended {
        let ended = &mut self.ended;
        let mut others = Vec::new();
        let next = async {
            while let Some(batch) = ended.recv().await {
                if let Some(found) = batch.iter().find(|ended| ended.reason == reason) {
                    return Some(found.clone());
                }
                others.extend(batch.iter().map(|ended| ended.reason));
            }
            None
        };
        let found = self.runtime.block_on(async { tokio::time::timeout(SOON, next).await });
        found.ok().flatten().unwrap_or_else(|| panic!("no connection ended for {reason}, but for {others:?}"))
    }
}

pub fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || echo(stream));
        }
    });
    address
}

fn echo(mut stream: impl Read + Write) {
    let mut buffer = vec![0; 65536];
    while let Ok(n) = stream.read(&mut buffer) {
        if n == 0 || stream.write_all(&buffer[..n]).is_err() || stream.flush().is_err() {
            break;
        }
    }
}

/// What a backend knows of its last connection: the protocol, and whether it had a certificate.
type Told = (Option<Vec<u8>>, bool);

/// Echoes; asks for a client certificate but does not insist.
pub struct TlsBackend {
    pub address: SocketAddr,
    last: Arc<Mutex<Option<Told>>>,
}

impl TlsBackend {
    pub fn start(authority: &Authority, files: &Files, alpn: &[&[u8]]) -> Self {
        let (chain, key) = pair(files);
        let provider = Arc::new(default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(authority.roots()), provider.clone())
            .allow_unauthenticated()
            .build()
            .expect("a verifier");
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .expect("a pair");
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let (config, last) = (Arc::new(config), Arc::new(Mutex::new(None)));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let backend = Self { address: listener.local_addr().expect("an address"), last: Arc::clone(&last) };
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (config, last) = (config.clone(), last.clone());
                thread::spawn(move || {
                    let mut connection = ServerConnection::new(config).expect("a server");
                    while connection.is_handshaking() {
                        if connection.complete_io(&mut stream).is_err() {
                            return;
                        }
                    }
                    let told =
                        (connection.alpn_protocol().map(<[u8]>::to_vec), connection.peer_certificates().is_some());
                    *last.lock().expect("no panic") = Some(told);
                    let mut stream = StreamOwned::new(connection, stream);
                    echo(&mut stream);
                    stream.conn.send_close_notify();
                    let _ = stream.flush();
                });
            }
        });
        backend
    }

    pub fn told(&self) -> Option<Told> {
        self.last.lock().expect("no panic").clone()
    }
}
