//! Servers of our own for what no real program does on command: hold, reset, half-close, count to the byte.
//!
//! They run on threads of the test process with their sockets in a host's namespace, and end when dropped.

mod connection;
mod udp;

use std::{
    collections::HashMap,
    io,
    net::{Shutdown, SocketAddr, TcpListener},
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sys::socket;

pub use udp::UdpServer;

use crate::{
    dialog,
    host::Host,
    pattern::Digested,
    stream::{Accept, Stream},
    wait::wait_for,
};

/// What a [`TcpServer`] does with each connection.
#[derive(Debug, Clone)]
pub enum Behaviour {
    /// Sends back what comes, until the client finishes.
    Echo,
    /// Sends its name and a newline, then echoes.
    Tagged(String),
    /// Accepts and keeps the connection open in silence, reading nothing.
    Hold,
    /// Accepts, then resets.
    ResetAtOnce,
    /// Reads so many bytes, then resets.
    ResetAfter(usize),
    /// Reads to the end while it sends `bytes` of the pattern `seed`, then half-closes.
    Exchange { seed: u64, bytes: u64, start: Start },
    /// Reads once, answers with these bytes, closes: the shortest real connection. Served by four threads.
    Reply(Vec<u8>),
}

impl Behaviour {
    /// Reads to the end, then closes.
    pub fn sink() -> Self {
        Self::Exchange { seed: 0, bytes: 0, start: Start::AfterClientFinished }
    }
}

/// When [`Behaviour::Exchange`] begins to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    AtOnce,
    AfterClientFinished,
    /// Says the first so many bytes back and begins with the next byte; none of them counts as received.
    AfterSayingBack(usize),
}

/// A connection that has ended, as the server saw it.
#[derive(Debug, Clone)]
pub struct Record {
    /// Whom the server saw: the gateway, or the client itself.
    pub peer: SocketAddr,
    pub received: Digested,
    pub sent: u64,
    pub ended: Ended,
}

/// How a connection ended for the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The client's end of stream was read.
    ClientFinished,
    /// The server closed or reset it, as told.
    ByServer,
    /// Reading or writing failed: `ConnectionReset` is the client's RST.
    Failed(io::ErrorKind),
}

/// A TCP server in a host of the lab.
#[derive(Debug)]
pub struct TcpServer {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    acceptors: Vec<JoinHandle<()>>,
}

impl TcpServer {
    /// Listens on `port` of `host`, on all addresses of both families.
    pub fn start(host: &Host, port: u16, behaviour: Behaviour) -> Result<Self> {
        Self::start_on(host, SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port), behaviour)
    }

    /// Listens on one address of `host`.
    pub fn start_on(host: &Host, address: impl Into<SocketAddr>, behaviour: Behaviour) -> Result<Self> {
        Self::start_with(host, address.into(), behaviour, None)
    }

    /// As [`Self::start`], by TLS.
    pub fn start_tls(host: &Host, port: u16, behaviour: Behaviour, tls: Arc<dyn Accept>) -> Result<Self> {
        Self::start_with(host, SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port), behaviour, Some(tls))
    }

    fn start_with(
        host: &Host,
        address: SocketAddr,
        behaviour: Behaviour,
        tls: Option<Arc<dyn Accept>>,
    ) -> Result<Self> {
        let listener = Arc::new(host.listen(address).with_context(|| format!("listen {address} in {}", host.name()))?);
        let shared = Arc::new(Shared { behaviour, tls, ..Shared::default() });
        let threads = if matches!(shared.behaviour, Behaviour::Reply(_)) { 4 } else { 1 };
        let acceptors = (0..threads)
            .map(|_| {
                let (listener, shared) = (Arc::clone(&listener), Arc::clone(&shared));
                thread::spawn(move || accept(&listener, &shared))
            })
            .collect();
        Ok(Self { address: listener.local_addr()?, listener, shared, acceptors })
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.shared.open().len()
    }

    /// Bytes read so far, over all connections.
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// Connections that have ended, in the order of their ends. [`Behaviour::Hold`] and [`Behaviour::Reply`] keep none.
    pub fn records(&self) -> Vec<Record> {
        self.shared.records().clone()
    }

    /// Waits until `count` connections have ended, and gives their records.
    pub fn wait_records(&self, count: usize, within: Duration) -> Result<Vec<Record>> {
        wait_for(&format!("{count} connections ended at port {}", self.port()), within, || {
            let records = self.shared.records();
            (records.len() >= count).then(|| records.clone())
        })
    }

    /// Every open connection of [`Behaviour::Hold`] is gone without a word: [`dialog::vanish`]. How many they were.
    pub fn vanish_all(&self) -> Result<usize> {
        let mut open = self.shared.open();
        let count = open.len();
        open.drain().try_for_each(|(_, stream)| dialog::vanish(&stream))?;
        Ok(count)
    }

    /// Ends every open connection: with a RST, or with a FIN.
    pub fn end_all(&self, reset: bool) {
        for stream in self.shared.open().values() {
            if reset {
                let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
                // Linger acts on close, and the thread that serves it closes it once its read is woken.
                let _ = stream.shutdown(Shutdown::Read);
            } else {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        if matches!(self.shared.behaviour, Behaviour::Hold) {
            self.shared.open().clear();
        }
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        // On Linux, shutting a listening socket down wakes those who wait in accept.
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        self.end_all(false);
    }
}

#[derive(Debug)]
struct Shared {
    behaviour: Behaviour,
    /// How its connections become what clients speak.
    tls: Option<Arc<dyn Accept>>,
    accepted: AtomicU64,
    received: AtomicU64,
    open: Mutex<HashMap<u64, Stream>>,
    records: Mutex<Vec<Record>>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            behaviour: Behaviour::Echo,
            tls: None,
            accepted: AtomicU64::new(0),
            received: AtomicU64::new(0),
            open: Mutex::default(),
            records: Mutex::default(),
        }
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Stream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn records(&self) -> MutexGuard<'_, Vec<Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            // The client left before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let id = shared.accepted.fetch_add(1, Ordering::Relaxed);
        match &shared.behaviour {
            _ if shared.tls.is_some() => connection::serve_on_thread(id, stream, peer, shared),
            Behaviour::Hold => {
                shared.open().insert(id, stream.into());
            }
            Behaviour::Reply(answer) => connection::reply(&stream.into(), answer, &shared.received),
            _ => connection::serve_on_thread(id, stream, peer, shared),
        }
    }
}
