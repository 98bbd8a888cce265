//! From listen addresses to sockets.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::Arc,
};

use proxy_abi::lookup::{MAX_BLOCKS, MAX_LISTENERS};

use super::{Listening, MAX_PORTS, Serving, Sockets, StreamPath};
use crate::{
    kernel::lookup::Lookup,
    stream::{
        StreamError,
        ranges::{Group, Home, Layout, loopback_like, overlaps},
        route::{Listen, Route},
        socket,
        worker::{Applied, PortChange},
    },
};

/// Groups change as a whole: those that come are there before those that go have gone.
const MAX_GROUPS: usize = MAX_LISTENERS as usize / 2;

/// The routes of the change, by id.
type Fresh<'a> = HashMap<u32, &'a Arc<Route>>;

/// What to do about each socket of a change, and what tells its connections apart: made once for ports with the same routes.
struct Work<'a> {
    fresh: &'a Fresh<'a>,
    known: &'a HashMap<u32, Arc<Route>>,
    shared: Option<(Vec<u32>, Arc<Listen>)>,
    sockets: Vec<(SocketAddr, Sockets)>,
}

impl Work<'_> {
    fn route(&self, id: &u32) -> Option<&Arc<Route>> {
        self.fresh.get(id).copied().or_else(|| self.known.get(id))
    }

    fn name(&self, ids: &[u32]) -> String {
        ids.first().and_then(|id| self.route(id)).map_or_else(String::new, |route| route.config.name.to_string())
    }

    fn listen(&mut self, ids: &[u32]) -> Arc<Listen> {
        if let Some((_, listen)) = self.shared.as_ref().filter(|(of, _)| of == ids) {
            return Arc::clone(listen);
        }
        let members: Vec<&Arc<Route>> = ids.iter().filter_map(|id| self.route(id)).collect();
        let listen = Arc::new(Listen::new(&members));
        self.shared = Some((ids.to_vec(), Arc::clone(&listen)));
        listen
    }

    fn refused(&self, address: SocketAddr, ids: &[u32]) -> impl Fn(io::Error) -> StreamError {
        let route = self.name(ids);
        move |error| StreamError::Listen { address, route: route.clone(), error }
    }
}

impl StreamPath {
    /// Binds what `asked` wants and is not there yet. `asked`: addresses whose routes change, or what tells those apart.
    pub(super) fn listen(
        &mut self,
        asked: Vec<(SocketAddr, Vec<u32>)>,
        fresh: &Fresh<'_>,
    ) -> Result<Listening, StreamError> {
        let mut listens = self.listens.clone();
        let changed: BTreeSet<SocketAddr> = asked.iter().map(|(address, _)| *address).collect();
        let known = |id: &u32| fresh.contains_key(id) || self.routes.contains_key(id);
        for (address, ids) in asked {
            match ids.iter().any(known) {
                true => listens.insert(address, ids),
                false => listens.remove(&address),
            };
        }
        let layout = self.layout(&listens);
        let mut work = Work { fresh, known: &self.routes, shared: None, sockets: Vec::new() };
        self.room_for(&layout, &listens, &work)?;
        let fits = self.listen_apart(&layout, &listens, &changed, &mut work)?;
        let (groups, opened) = self.listen_together(&layout, &fits, &changed, &mut work)?;
        let blocks = layout.blocks(&groups);
        if blocks.len() > MAX_BLOCKS as usize / 2 {
            let route = work.name(layout.groups.keys().next().map_or(&[], |(_, ids)| ids));
            return Err(StreamError::TooManyPorts { route, ports: listens.len(), max: MAX_PORTS });
        }
        let sockets = work.sockets;
        for (address, sockets) in &sockets {
            let (Sockets::Open(fds, listen) | Sockets::OpenGroup(fds, listen)) = sockets else { continue };
            let of = Work { fresh, known: &self.routes, shared: None, sockets: Vec::new() };
            let refused = of.refused(*address, &listen.members);
            fds.iter().try_for_each(socket::start_listening).map_err(refused)?;
        }
        let serving = Serving { own: layout.own, groups, blocks };
        if let Some(Ok(lookup)) = &mut self.lookup {
            lead_early(lookup, &self.serving, &serving, &sockets, &opened).map_err(StreamError::Lookup)?;
        }
        Ok(Listening { listens, serving, sockets })
    }

    /// Serves it. From here on nothing is refused to us but memory.
    pub(super) fn begin_listening(&mut self, listening: Listening, changes: &mut [Applied]) {
        let Listening { listens, serving, sockets } = listening;
        if let Some(Ok(lookup)) = &mut self.lookup {
            // What is wanted comes before what is not goes: a port that stays is led somewhere all the time.
            let led = serving.blocks.iter().try_for_each(|(block, to)| lookup.lead(*block, *to));
            if let Err(error) = led.and_then(|()| lookup.keep_only(&serving.blocks)) {
                tracing::error!(%error, "a range of ports is not led to where it should be");
            }
        }
        (self.listens, self.serving) = (listens, serving);
        for (address, sockets) in sockets {
            let mut tell = |change: &dyn Fn() -> PortChange| {
                changes.iter_mut().for_each(|applied| applied.ports.push((address, change())));
            };
            match sockets {
                Sockets::Update(listen) => tell(&|| PortChange::Update(Arc::clone(&listen))),
                Sockets::Close => tell(&|| PortChange::Close),
                Sockets::Open(fds, listen) => {
                    for (change, fd) in changes.iter_mut().zip(fds) {
                        change.ports.push((address, PortChange::Open(fd, Arc::clone(&listen))));
                    }
                }
                Sockets::OpenGroup(fds, listen) => {
                    for (change, fd) in changes.iter_mut().zip(fds) {
                        change.ports.push((address, PortChange::OpenGroup(fd, Arc::clone(&listen))));
                    }
                }
            }
        }
    }

    /// Groups where they are worth it and can be.
    fn layout(&mut self, listens: &BTreeMap<SocketAddr, Vec<u32>>) -> Layout {
        let layout = Layout::grouped(listens, MAX_GROUPS);
        if layout.groups.is_empty() {
            return layout;
        }
        let attach = || {
            Lookup::attach().map_err(|error| {
                tracing::info!(%error, "no sk_lookup: every port of a range has its own socket");
            })
        };
        match self.lookup.get_or_insert_with(attach) {
            Ok(_) => layout,
            Err(()) => Layout::own(listens),
        }
    }

    /// Whether there may be so many sockets. Half of the descriptors stay for connections.
    fn room_for(
        &self,
        layout: &Layout,
        listens: &BTreeMap<SocketAddr, Vec<u32>>,
        work: &Work<'_>,
    ) -> Result<(), StreamError> {
        let max = MAX_PORTS.min(self.for_sockets as usize / 2 / self.workers.len());
        if layout.own.len() + layout.groups.len() <= max {
            return Ok(());
        }
        // Who comes last, unless all were there before.
        let new = layout.own.iter().rfind(|address| !self.serving.own.contains(address)).or(layout.own.last());
        let ids = new.and_then(|address| listens.get(address)).map_or(&[][..], Vec::as_slice);
        let ports =
            layout.own.iter().filter(|address| listens.get(address).is_some_and(|of| of.first() == ids.first()));
        Err(StreamError::TooManyPorts { route: work.name(ids), ports: ports.count(), max })
    }

    /// Ports with sockets of their own. Returns the ports that are new to us, for the others to look at.
    fn listen_apart(
        &self,
        layout: &Layout,
        listens: &BTreeMap<SocketAddr, Vec<u32>>,
        changed: &BTreeSet<SocketAddr>,
        work: &mut Work<'_>,
    ) -> Result<Ours, StreamError> {
        let mut ours = Ours(self.listens.keys().map(SocketAddr::port).collect());
        ours.0.extend(self.serving.groups.values().map(|home| home.address.port()));
        for address in &layout.own {
            let ids = listens.get(address).map_or(&[][..], Vec::as_slice);
            if self.serving.own.contains(address) {
                if changed.contains(address) {
                    let listen = work.listen(ids);
                    work.sockets.push((*address, Sockets::Update(listen)));
                }
                continue;
            }
            let bound = || {
                // Beside a socket of our own for all addresses, the kernel would say that it is taken.
                if !ours.0.contains(&address.port()) {
                    socket::is_free(*address)?;
                }
                (0..self.workers.len()).map(|_| socket::listener(*address)).collect::<io::Result<Vec<_>>>()
            };
            let sockets = bound().map_err(work.refused(*address, ids))?;
            let listen = work.listen(ids);
            work.sockets.push((*address, Sockets::Open(sockets, listen)));
        }
        for address in self.serving.own.difference(&layout.own) {
            work.sockets.push((*address, Sockets::Close));
        }
        Ok(ours)
    }

    /// Groups of ports. Returns all of them, and those that are new.
    fn listen_together(
        &self,
        layout: &Layout,
        ours: &Ours,
        changed: &BTreeSet<SocketAddr>,
        work: &mut Work<'_>,
    ) -> Result<(BTreeMap<Group, Home>, Vec<Home>), StreamError> {
        let mut groups: BTreeMap<Group, Home> = BTreeMap::new();
        let mut opened = Vec::new();
        let taken: BTreeSet<u32> = self.serving.groups.values().map(|home| home.place).collect();
        let mut places = (0..MAX_LISTENERS).filter(|place| !taken.contains(place));
        // Asked once, when somebody must know.
        let mut listened: Option<BTreeSet<u16>> = None;
        for (shared, ranges) in &layout.groups {
            let (ip, ids) = shared;
            let anyone = SocketAddr::new(*ip, *ranges.first().map_or(&0, |range| range.start()));
            for port in ranges.iter().flat_map(Clone::clone).filter(|port| !ours.0.contains(port)) {
                let address = SocketAddr::new(*ip, port);
                let foreign = match &mut listened {
                    Some(known) => known,
                    unknown => unknown.insert(socket::listened_ports().map_err(work.refused(address, ids))?),
                };
                // Which of its addresses would be in the way, `bind` knows best.
                if foreign.contains(&port) {
                    socket::is_free(address).map_err(work.refused(address, ids))?;
                }
            }
            if let Some(home) = self.serving.groups.get(shared) {
                groups.insert(shared.clone(), *home);
                if changed.iter().any(|address| address.ip() == *ip) {
                    let listen = work.listen(ids);
                    work.sockets.push((home.address, Sockets::Update(listen)));
                }
                continue;
            }
            let (address, sockets) = self.bind_home(shared).map_err(work.refused(anyone, ids))?;
            let Some(place) = places.next() else { continue };
            let home = Home { address, place };
            let listen = work.listen(ids);
            work.sockets.push((address, Sockets::OpenGroup(sockets, listen)));
            groups.insert(shared.clone(), home);
            opened.push(home);
        }
        for (_, home) in self.serving.groups.iter().filter(|(shared, _)| !groups.contains_key(*shared)) {
            work.sockets.push((home.address, Sockets::Close));
        }
        Ok((groups, opened))
    }

    /// A group's sockets, on a free port of the loopback interface: bound to one of the ports that they serve, they would keep it
    /// when it is to be given up.
    fn bind_home(&self, (ip, _): &Group) -> io::Result<(SocketAddr, Vec<OwnedFd>)> {
        let first = socket::listener(SocketAddr::new(loopback_like(*ip), 0))?;
        let address = socket::local_address(&first).ok_or_else(|| io::Error::other("getsockname"))?;
        let others = (1..self.workers.len()).map(|_| socket::listener(address));
        Ok((address, [Ok(first)].into_iter().chain(others).collect::<io::Result<_>>()?))
    }
}

/// Ports that we listen on already, at whatever address.
struct Ours(BTreeSet<u16>);

/// Before the change is certain, what is new is led to its sockets, where it waits; what is led elsewhere until now stays there.
fn lead_early(
    lookup: &mut Lookup,
    before: &Serving,
    after: &Serving,
    sockets: &[(SocketAddr, Sockets)],
    opened: &[Home],
) -> Result<(), crate::kernel::bpf::BpfError> {
    // A change that was taken back may have left something.
    lookup.keep_only(&before.blocks)?;
    for home in opened {
        let of = sockets.iter().find_map(|(address, sockets)| match sockets {
            Sockets::OpenGroup(fds, _) if *address == home.address => fds.first(),
            _ => None,
        });
        if let Some(fd) = of {
            lookup.put_listener(home.place, fd)?;
        }
    }
    let is_new = |(block, _): &(&_, &u32)| !overlaps(&before.blocks, block);
    after.blocks.iter().filter(is_new).try_for_each(|(block, to)| lookup.lead(*block, *to))
}
