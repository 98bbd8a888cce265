//! Whether the packets of a connection come by the program with the addresses that its sockets know.

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError, RwLock},
};

use proxy_core::handoff::{Both, Failure};

use super::Ends;
use crate::kernel::{
    conntrack::forget::Forgetter,
    fib::{Fib, Way},
};

/// The interfaces that the program is on, by number. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct OnInterfaces(Arc<RwLock<BTreeSet<u32>>>);

impl OnInterfaces {
    pub fn set(&self, interfaces: BTreeSet<u32>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = interfaces;
    }

    pub fn has(&self, interface: u32) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&interface)
    }
}

/// What a worker asks the kernel of each connection before it hands it over: three short questions.
#[derive(Debug)]
pub struct Paths {
    fib: Fib,
    /// `None`: nothing is tracked here, and nothing translated.
    conntrack: Option<Forgetter>,
    on: OnInterfaces,
}

impl Paths {
    /// `None` where the kernel does not answer.
    pub fn open(on: OnInterfaces) -> Option<Self> {
        Some(Self { fib: Fib::open().ok()?, conntrack: Forgetter::open().ok(), on })
    }

    /// The interfaces where client and backend are.
    pub fn fit(&mut self, ends: &Ends) -> Result<Both<u32>, Failure> {
        let ours = [(ends.listen, ends.client), (ends.source, ends.backend)];
        let mut interfaces = [0; 2];
        for (interface, (own, peer)) in interfaces.iter_mut().zip(ours) {
            *interface = match self.fib.way_to(peer.ip()) {
                Some(Way::Through(interface)) if self.on.has(interface) => interface,
                Some(Way::Through(_)) => return Err(Failure::Interface),
                Some(Way::Here) => return Err(Failure::OnThisMachine),
                None => return Err(Failure::Kernel),
            };
            if self.conntrack.as_mut().and_then(|conntrack| conntrack.is_translated(own, peer)) == Some(true) {
                return Err(Failure::Translated);
            }
        }
        Ok(interfaces)
    }
}
