//! New connections.

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use proxy_core::{
    flow::Side,
    reason::Reason,
    session::{Event, Session},
};
use rustix::{
    io::Errno,
    net::{SocketFlags, acceptfrom_with},
};

use super::{NO_ROUTE, Worker};
use crate::stream::{
    flow::{Early, Flow},
    poll::Source,
    relay::{Means, Way},
    route::Listen,
    socket::{Socket, local_address},
};

/// Connections accepted before others have their turn.
const TOGETHER: usize = 32;
/// After the process has run out of descriptors or memory, nothing is accepted for so long, in microseconds.
const BREATHER: u64 = 100_000;

/// A listening socket, and where its connections go.
#[derive(Debug)]
pub struct Listener {
    pub fd: OwnedFd,
    pub address: SocketAddr,
    pub listen: Arc<Listen>,
    /// Many ports are led to it by `sk_lookup`: only an accepted socket knows which was dialled.
    pub is_group: bool,
    /// Clients have been told of no larger segments since a backend took no larger ones.
    pub segment: Option<u16>,
}

impl Worker {
    /// True when more may wait.
    pub(super) fn accept(&mut self, index: usize) -> bool {
        for _ in 0..TOGETHER {
            let Some(Some(listener)) = self.listeners.get(index) else { return false };
            let accepted = acceptfrom_with(&listener.fd, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC);
            let listen = Arc::clone(&listener.listen);
            let address = listener.address;
            let fixed = !listener.is_group && !address.ip().is_unspecified();
            match accepted {
                Ok((fd, peer)) => {
                    let Some(peer) = peer.and_then(|peer| SocketAddr::try_from(peer).ok()) else { continue };
                    let dialled = if fixed { None } else { local_address(&fd) };
                    self.welcome(fd, peer, dialled.unwrap_or(address), listen);
                }
                Err(Errno::AGAIN) => return false,
                Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    tracing::warn!(%errno, %address, "accept4: nothing is accepted for a moment");
                    self.pause();
                    return false;
                }
                // The connection is gone already, or the network said something of it (accept(2), "Error handling").
                Err(_) => {}
            }
        }
        true
    }

    /// Asked again at once, the kernel would say the same.
    fn pause(&mut self) {
        self.accept_at = Some(self.micros + BREATHER);
        for listener in self.listeners.iter().flatten() {
            self.poll.remove(&listener.fd);
        }
    }

    /// Ends the pause when it is over.
    pub(super) fn resume(&mut self) {
        if self.accept_at.is_none_or(|at| at > self.micros) {
            return;
        }
        self.accept_at = None;
        for (index, listener) in self.listeners.iter().enumerate() {
            if let Some(listener) = listener {
                self.hear(index, listener);
            }
        }
    }

    fn welcome(&mut self, fd: OwnedFd, peer: SocketAddr, dialled: SocketAddr, listen: Arc<Listen>) {
        let pressure = &self.shared.pressure;
        if self.shared.open.fetch_add(1, Relaxed) >= pressure.max.load(Relaxed) {
            self.shared.open.fetch_sub(1, Relaxed);
            pressure.refused.fetch_add(1, Relaxed);
            self.slots[NO_ROUTE].meter.engines[0].began.add(1);
            self.slots[NO_ROUTE].meter.engines[0].terminations[Reason::LimitConnections as usize].add(1);
            Socket::new(fd).reset_on_close();
            return;
        }
        let slot = match listen.members[..] {
            [only] => self.by_id.get(&only).copied().unwrap_or(NO_ROUTE),
            _ => NO_ROUTE,
        };
        let key = self.flows.reserve();
        self.next_number += 1;
        let header_expected = listen.port.accept_from().iter().any(|net| net.contains(&peer.ip().to_canonical()));
        let early = Early { listen: Some(listen), header_expected, ..Early::default() };
        let now = self.now();
        let flow = Flow {
            number: self.next_number,
            slot: NO_ROUTE,
            session: Session::accepted(self.initial_data(slot, &early), now),
            client: Socket::new(fd),
            backend: None,
            up: Way::default(),
            down: Way::default(),
            means: Means::Copy,
            joined: None,
            turns: 0,
            tls: None,
            client_address: peer,
            listen: dialled,
            backend_address: None,
            early: Some(Box::new(early)),
            admitted: None,
            counted: None,
            handover: None,
            queued: false,
            accepted: self.micros,
            dialed: 0,
            asked_in: 0,
        };
        self.begin(key, Box::new(flow), slot);
    }

    fn begin(&mut self, key: u32, flow: Box<Flow>, slot: usize) {
        self.flows.put(key, flow);
        self.with(key, |worker, flow| {
            worker.slots[NO_ROUTE].open += 1;
            worker.slots[NO_ROUTE].meter.engines[0].active.add(1);
            worker.assign(flow, slot);
            if let Err(errno) = worker.poll.add_flow(&flow.client, flow.source(key, Side::Client)) {
                tracing::error!(%errno, "epoll_ctl(EPOLL_CTL_ADD)");
                return worker.step(key, flow, Event::Cut(Reason::InternalError));
            }
            let fate = worker.classify(key, flow);
            if flow.early.as_ref().is_some_and(|early| early.listen.is_some()) {
                worker.arm(key, flow);
            }
            fate
        });
    }

    /// How long the first bytes may take: the route's limit, or the longest of those it may become.
    fn initial_data(&self, slot: usize, early: &Early) -> std::time::Duration {
        let members = early.listen.iter().flat_map(|listen| &listen.members);
        let limits = members.filter_map(|id| self.by_id.get(id)).map(|slot| self.slots[*slot].limits.initial_data);
        match slot {
            NO_ROUTE => limits.max().unwrap_or_default(),
            slot => self.slots[slot].limits.initial_data,
        }
    }

    pub(super) fn listen_on(&mut self, listener: Listener) {
        let index = self.listeners.iter().position(Option::is_none).unwrap_or_else(|| {
            self.listeners.push(None);
            self.listeners.len() - 1
        });
        // In a pause it waits with the others.
        if self.accept_at.is_none() {
            self.hear(index, &listener);
        }
        self.listeners[index] = Some(listener);
    }

    fn hear(&self, index: usize, listener: &Listener) {
        if let Err(errno) = self.poll.add_level(&listener.fd, Source::Listener(index as u32)) {
            tracing::error!(%errno, address = %listener.address, "epoll_ctl(EPOLL_CTL_ADD)");
        }
    }

    /// What waits to be accepted is accepted; then nobody listens there any more.
    pub(super) fn stop_listening(&mut self, index: usize) {
        while self.accept(index) {}
        if let Some(listener) = self.listeners.get_mut(index).and_then(Option::take) {
            self.poll.remove(&listener.fd);
        }
    }

    pub(super) fn listeners_at(&self, address: SocketAddr) -> Vec<usize> {
        let there = |one: &Option<Listener>| one.as_ref().is_some_and(|listener| listener.address == address);
        (0..self.listeners.len()).filter(|index| there(&self.listeners[*index])).collect()
    }

    pub(super) fn replace_listen(&mut self, address: SocketAddr, listen: &Arc<Listen>) {
        for index in self.listeners_at(address) {
            if let Some(Some(listener)) = self.listeners.get_mut(index) {
                listener.listen = Arc::clone(listen);
            }
        }
    }
}
