//! One relayed connection, as its worker holds it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use proxy_core::{
    flow::Side,
    reason::Reason,
    session::{Session, Tick},
    sniff::hello::{Hello, HelloReader},
    sniff::proxy::Header,
};
use rustls::ServerConfig;

use super::{
    admission::Admitted,
    handover::{Handing, SourcePort},
    poll::{NUMBER_MASK, Source},
    relay::{Means, Way, secured::Secured, sockmap::Joined},
    route::Listen,
    socket::Socket,
};

#[derive(Debug)]
pub struct Flow {
    /// Never given twice by this worker.
    pub number: u64,
    /// Index into the worker's routes.
    pub slot: usize,
    pub session: Session,
    pub client: Socket,
    /// While dialling: the one asked last.
    pub backend: Option<Socket>,
    /// Client to backend.
    pub up: Way,
    /// Backend to client.
    pub down: Way,
    pub means: Means,
    /// TLS that begins or ends here.
    pub tls: Option<Box<Secured>>,
    /// The kernel passes its bytes on.
    pub joined: Option<Box<Joined>>,
    /// Turns in which it has carried something, as far as that counts for being joined.
    pub turns: u8,
    pub client_address: SocketAddr,
    /// What the client dialled.
    pub listen: SocketAddr,
    pub backend_address: Option<SocketAddr>,
    /// Until bytes are relayed.
    pub early: Option<Box<Early>>,
    pub admitted: Option<Admitted>,
    pub counted: Option<Counted>,
    /// On its way out of the daemon, or kept here.
    pub handover: Option<Box<Handing>>,
    /// Its turn was over before its bytes were: it is in the worker's queue.
    pub queued: bool,
    /// Microseconds on the worker's clock when it was accepted.
    pub accepted: u64,
    /// … and when the first dial began.
    pub dialed: u64,
    /// The worker's round in which a backend was last asked, or one of two has won.
    pub asked_in: u64,
}

// An idle connection is this and its two sockets in the kernel.
const _: () = assert!(size_of::<Flow>() <= 456);

/// What is only needed until a backend has answered.
#[derive(Debug)]
pub struct Early {
    /// `None` once the route is known.
    pub listen: Option<Arc<Listen>>,
    /// Everything the client has sent so far, without its PROXY header.
    pub received: Vec<u8>,
    pub header: Option<Header>,
    pub header_expected: bool,
    pub reader: HelloReader,
    pub hello: Option<Hello>,
    /// The client is a CA that looks whose the name is, and gets to see this.
    pub challenge: Option<Arc<ServerConfig>>,
    /// Endpoints of the route that have been dialled.
    pub tried: Vec<SocketAddr>,
    /// Why the last of them was not reached.
    pub failure: Reason,
    /// When the next backend is asked beside the present one; `None`: there is no other.
    pub attempt_until: Option<Tick>,
    /// The one before, which has not answered yet and still may.
    pub rival: Option<Dialled>,
    /// Of the one asked last.
    pub port: Option<SourcePort>,
}

/// A backend that is being connected to.
#[derive(Debug)]
pub struct Dialled {
    pub socket: Socket,
    pub address: SocketAddr,
    pub counted: Counted,
    pub port: Option<SourcePort>,
}

/// One connection more for a backend, as long as it lives.
#[derive(Debug)]
pub struct Counted(Arc<AtomicU64>);

impl Counted {
    pub fn new(open: Arc<AtomicU64>) -> Self {
        open.fetch_add(1, Relaxed);
        Self(open)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Flow {
    pub fn source(&self, key: u32, side: Side) -> Source {
        Source::Flow { key, number: (self.number & NUMBER_MASK) as u32, side }
    }

    pub fn socket(&mut self, side: Side) -> Option<&mut Socket> {
        match side {
            Side::Client => Some(&mut self.client),
            Side::Backend => self.backend.as_mut(),
        }
    }
}

/// The flows of a worker, by keys that are given again.
#[derive(Debug, Default)]
pub struct Flows {
    // Boxed, so that memory follows the number of flows and a key costs eight bytes.
    all: Vec<Option<Box<Flow>>>,
    free: Vec<u32>,
    open: usize,
}

impl Flows {
    pub fn open(&self) -> usize {
        self.open
    }

    /// A key for a flow that is about to be put.
    pub fn reserve(&mut self) -> u32 {
        self.open += 1;
        self.free.pop().unwrap_or_else(|| {
            self.all.push(None);
            (self.all.len() - 1) as u32
        })
    }

    pub fn take(&mut self, key: u32) -> Option<Box<Flow>> {
        self.all.get_mut(key as usize)?.take()
    }

    pub fn put(&mut self, key: u32, flow: Box<Flow>) {
        if let Some(place) = self.all.get_mut(key as usize) {
            *place = Some(flow);
        }
    }

    /// The key is free again.
    pub fn release(&mut self, key: u32) {
        self.open -= 1;
        self.free.push(key);
        if self.open == 0 {
            *self = Self::default();
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Flow)> {
        self.all.iter().enumerate().filter_map(|(key, flow)| Some((key as u32, flow.as_deref()?)))
    }
}
