//! TLS clients and servers that end a direction, stall, or read while they write: what programs do not do on command.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use anyhow::{Context, Result};
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
    SupportedProtocolVersion,
    client::Resumption,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    version,
};

use crate::{
    pki::Pki,
    stream::{Accept, Session, Stream},
    topology::Lab,
};

/// The name that the lab's clients ask for.
pub const NAME: &str = "web.example";

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Versions {
    Only12,
    Only13,
    Both,
}

/// A client's settings: whom it believes, what it speaks, and the pair with which it says who it is.
pub fn client_config(pki: &Pki, versions: Versions, identity: Option<(&Pki, &str)>) -> Result<ClientConfig> {
    let versions: &[&'static SupportedProtocolVersion] = match versions {
        Versions::Only12 => &[&version::TLS12],
        Versions::Only13 => &[&version::TLS13],
        Versions::Both => &[&version::TLS13, &version::TLS12],
    };
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.file("ca.pem")).context("ca.pem")?)?;
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(versions)?
        .with_root_certificates(roots);
    Ok(match identity {
        None => builder.with_no_client_auth(),
        Some((pki, stem)) => {
            let (chain, key) = pair(pki, stem)?;
            builder.with_client_auth_cert(chain, key)?
        }
    })
}

/// The same without session tickets: each handshake is a full one.
pub fn without_resumption(mut config: ClientConfig) -> ClientConfig {
    config.resumption = Resumption::disabled();
    config
}

/// A server's settings: the pair `stem`.
pub fn server_config(pki: &Pki, stem: &str) -> Result<ServerConfig> {
    let (chain, key) = pair(pki, stem)?;
    Ok(ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?)
}

fn pair(pki: &Pki, stem: &str) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_file_iter(pki.file(&format!("{stem}.pem")))?.collect::<Result<_, _>>()?;
    Ok((chain, PrivateKeyDer::from_pem_file(pki.file(&format!("{stem}.key")))?))
}

/// Certificates of a lab, and settings that go with them.
#[derive(Debug)]
pub struct Material {
    pub pki: Pki,
    pub client: Arc<ClientConfig>,
    pub acceptor: Arc<Acceptor>,
}

impl Material {
    /// Connects from the lab's client and shakes hands.
    pub fn connect(&self, lab: &Lab, to: impl Into<SocketAddr>) -> io::Result<Stream> {
        connect(&self.client, NAME, lab.client().connect(to)?)
    }
}

/// Where a lab keeps its [`Material`].
#[derive(Debug, Default)]
pub(crate) struct OfLab(Mutex<Option<Arc<Material>>>);

impl OfLab {
    pub fn of(&self, lab: &Lab) -> Result<Arc<Material>> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(material) = &*made {
            return Ok(Arc::clone(material));
        }
        let pki = Pki::new(lab)?;
        pki.issue("web", "ec", NAME)?;
        let client = Arc::new(client_config(&pki, Versions::Both, None)?);
        let acceptor = Arc::new(Acceptor(Arc::new(server_config(&pki, "web")?)));
        Ok(Arc::clone(made.insert(Arc::new(Material { pki, client, acceptor }))))
    }
}

/// Shakes hands as a client that asks for `name`.
pub fn connect(config: &Arc<ClientConfig>, name: &str, mut tcp: TcpStream) -> io::Result<Stream> {
    let opening = Opening::new(config, name)?;
    tcp.write_all(&opening.hello)?;
    opening.go_on(tcp)
}

/// A client before it has said anything.
#[derive(Debug)]
pub struct Opening {
    connection: ClientConnection,
    /// Its ClientHello, in records.
    pub hello: Vec<u8>,
}

impl Opening {
    pub fn new(config: &Arc<ClientConfig>, name: &str) -> io::Result<Self> {
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        let mut connection = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
        let mut hello = Vec::new();
        while connection.wants_write() {
            connection.write_tls(&mut hello)?;
        }
        Ok(Self { connection, hello })
    }

    /// The rest of the handshake on `tcp`, on which the hello was written.
    pub fn go_on(self, tcp: TcpStream) -> io::Result<Stream> {
        shake_hands(self.connection.into(), tcp)
    }
}

/// Accepts TLS with the lab's own certificate.
#[derive(Debug, Clone)]
pub struct Acceptor(pub Arc<ServerConfig>);

impl Accept for Acceptor {
    fn accept(&self, tcp: TcpStream) -> io::Result<Stream> {
        let connection = ServerConnection::new(Arc::clone(&self.0)).map_err(io::Error::other)?;
        shake_hands(connection.into(), tcp)
    }
}

fn shake_hands(mut connection: Connection, tcp: TcpStream) -> io::Result<Stream> {
    while connection.is_handshaking() {
        connection.complete_io(&mut &tcp)?;
    }
    // Tickets.
    while connection.wants_write() {
        connection.write_tls(&mut &tcp)?;
    }
    Ok(Stream::secured(tcp, Arc::new(Tls::new(connection))))
}

/// One end of TLS that may be read and written at the same time.
#[derive(Debug)]
struct Tls {
    state: Mutex<State>,
    /// Records go out in the order they were sealed.
    writing: Mutex<()>,
    finished: AtomicBool,
}

#[derive(Debug)]
struct State {
    connection: Connection,
    /// Ciphertext that was read and not yet taken.
    incoming: Vec<u8>,
    taken: usize,
}

impl Tls {
    fn new(connection: Connection) -> Self {
        let state = Mutex::new(State { connection, incoming: Vec::new(), taken: 0 });
        Self { state, writing: Mutex::default(), finished: AtomicBool::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `say` has made the connection want to write.
    fn tell<T>(&self, mut tcp: &TcpStream, say: impl FnOnce(&mut Connection) -> io::Result<T>) -> io::Result<T> {
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut records, mut state) = (Vec::new(), self.state());
        let said = say(&mut state.connection)?;
        while state.connection.wants_write() {
            state.connection.write_tls(&mut records)?;
        }
        drop(state);
        tcp.write_all(&records)?;
        Ok(said)
    }
}

impl State {
    /// `None`: more ciphertext is needed.
    fn plaintext(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.connection.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome.map(Some),
            }
            let mut rest = self.incoming.get(self.taken..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(None);
            }
            self.taken += self.connection.read_tls(&mut rest)?;
            self.connection.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

impl Session for Tls {
    fn read(&self, mut tcp: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
        let mut buffer = vec![0; 32 * 1024];
        loop {
            if let Some(read) = self.state().plaintext(into)? {
                return Ok(read);
            }
            // Without the lock: another thread may write meanwhile.
            let read = tcp.read(&mut buffer)?;
            let mut state = self.state();
            if read == 0 {
                state.connection.read_tls(&mut io::empty())?;
            }
            (state.incoming, state.taken) = (buffer[..read].to_vec(), 0);
        }
    }

    fn write(&self, tcp: &TcpStream, from: &[u8]) -> io::Result<usize> {
        self.tell(tcp, |connection| connection.writer().write(from))
    }

    fn peer_certificate(&self) -> Option<Vec<u8>> {
        self.state().connection.peer_certificates().and_then(|chain| Some(chain.first()?.to_vec()))
    }

    fn finish(&self, tcp: &TcpStream) -> io::Result<()> {
        // Whoever is in the middle of a record has more to say.
        let idle = self.writing.try_lock().is_ok();
        if !idle || self.finished.swap(true, Relaxed) {
            return Ok(());
        }
        self.tell(tcp, |connection| {
            connection.send_close_notify();
            Ok(())
        })
    }
}
