//! The stream path without a kernel, for tests of `reconcile`.

use std::{collections::BTreeMap, net::SocketAddr};

use super::{Change, RouteSpec, StreamError, Streams};

/// Holds what it was told.
#[derive(Debug, Default)]
pub struct MemoryStreams {
    pub routes: BTreeMap<u32, RouteSpec>,
    pub gone: Vec<u32>,
    pub ports: BTreeMap<SocketAddr, Vec<u32>>,
    /// The next change is refused with it.
    pub fail_next: Option<StreamError>,
}

impl Streams for MemoryStreams {
    type Prepared = Change;

    fn prepare(&mut self, change: Change) -> Result<Change, StreamError> {
        match self.fail_next.take() {
            Some(error) => Err(error),
            None => Ok(change),
        }
    }

    fn commit(&mut self, change: Change) {
        for route in change.routes {
            self.routes.insert(route.id, route);
        }
        for id in change.gone {
            self.routes.remove(&id);
            self.gone.push(id);
        }
        for (listen, routes) in change.ports {
            match routes.is_empty() {
                true => drop(self.ports.remove(&listen)),
                false => drop(self.ports.insert(listen, routes)),
            }
        }
    }

    async fn settled(&mut self) {}

    fn look_at_certificates(&mut self) {}

    fn forget(&mut self, id: u32) {
        self.gone.retain(|gone| *gone != id);
    }

    async fn stop(self) {}
}
