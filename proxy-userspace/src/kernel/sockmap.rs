//! The maps of the engine `sockmap` and the pairs of sockets in them. One set per worker, so that nothing is shared
//! between workers; all of it is gone with its last descriptor, and nothing is pinned.

mod channels;
mod known;

use std::{
    collections::VecDeque,
    fmt,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, HashMap, Map, MapData, MapError, RingBuf, SockHash},
    programs::SkSkb,
};
use proxy_abi::{ABI_VERSION, sockmap::Channel};
use rustix::{io::Errno, net::sockopt};

use channels::Channels;
pub use channels::{Line, Seen};
pub use known::known_bug;

use super::bpf::BpfError;

static OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../proxy-ebpf/objects/sockmap.bpf.o"));

const PROGRAM: &str = "shunt_sockmap";
/// An element that is there is not replaced.
const NEW: u64 = 1;

/// A loaded program with its maps.
pub struct Sockmap {
    /// The program stays attached as long as this lives.
    _program: Ebpf,
    peers: SockHash<MapData, u64>,
    armed: SockHash<MapData, u64>,
    indexes: HashMap<MapData, u64, u32>,
    abi: Array<MapData, u32>,
    calls: RingBuf<MapData>,
    channels: Channels,
    /// Indexes that nobody has, and since when: microseconds on the caller's clock.
    free: VecDeque<(u32, u64)>,
    window: u64,
}

/// A socket's place in the maps.
#[derive(Debug)]
pub struct Place {
    pub index: u32,
    cookie: u64,
    /// It is judged: never to be taken out while it lives, which loses what is queued.
    pub armed: bool,
}

/// A verdict that runs on another processor may still have an index that was given back; no longer than this.
const REST: u64 = 1_000_000;

impl Sockmap {
    /// `sockets`: joined at once at most, two for each connection.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`] without `CAP_BPF` and `CAP_NET_ADMIN`.
    pub fn load(sockets: u32) -> Result<Self, BpfError> {
        let mut loader = EbpfLoader::new();
        // Nothing in it depends on the layout of kernel types: their description, megabytes, need not be read.
        loader.btf(None);
        for map in ["PEERS", "ARMED", "INDEXES", "CHANNELS"] {
            loader.map_max_entries(map, sockets);
        }
        let mut object = loader.load(OBJECT).map_err(BpfError::from_load)?;
        let channels = channels::map(&object, sockets)?;
        let armed: SockHash<MapData, u64> = take(&mut object, "ARMED")?;
        let program = object.program_mut(PROGRAM).ok_or(BpfError::Missing { what: PROGRAM })?;
        let program: &mut SkSkb = program.try_into().map_err(BpfError::from_program)?;
        program.load().map_err(BpfError::from_program)?;
        program.attach(armed.fd()).map_err(BpfError::from_program)?;
        Ok(Self {
            peers: take(&mut object, "PEERS")?,
            indexes: take(&mut object, "INDEXES")?,
            abi: take(&mut object, "ABI")?,
            calls: take(&mut object, "CALLS")?,
            armed,
            channels,
            free: (0..sockets).map(|index| (index, 0)).collect(),
            window: largest_window(),
            _program: object,
        })
    }

    /// What the program said of itself when the first piece came; `None` before.
    pub fn abi_version(&self) -> Option<u32> {
        self.abi.get(&0, 0).ok().filter(|version| *version != 0)
    }

    /// Whether its maps are what this daemon takes them for.
    pub fn check_abi(&self) -> Result<(), BpfError> {
        match self.abi_version() {
            Some(ABI_VERSION) => Ok(()),
            version => Err(BpfError::AbiVersion { object: version.unwrap_or_default() }),
        }
    }

    /// Joined at once at most.
    pub fn sockets(&self) -> u32 {
        self.channels.count()
    }

    /// Joined now.
    pub fn joined(&self) -> u32 {
        self.channels.count() - u32::try_from(self.free.len()).unwrap_or_default()
    }

    /// Bytes that a socket takes from its peer at most before somebody reads them.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Both sockets become known to each other; nothing moves yet.
    pub fn introduce(&mut self, a: impl AsFd, b: impl AsFd, now: u64) -> Result<[Place; 2], Errno> {
        let cookies = [sockopt::socket_cookie(&a)?, sockopt::socket_cookie(&b)?];
        let two = self.two_indexes(now).ok_or(Errno::NOSPC)?;
        let places = [0, 1].map(|i| Place { index: two[i], cookie: cookies[i], armed: false });
        for (i, partner) in [b.as_fd(), a.as_fd()].into_iter().enumerate() {
            self.channels.line(two[i]).clear();
            let known = self.indexes.insert(cookies[i], two[i], NEW);
            let told = known.and_then(|()| self.peers.insert(cookies[i], partner.as_raw_fd(), NEW));
            if let Err(error) = told {
                self.leave(&places, now);
                return Err(errno(&error));
            }
        }
        Ok(places)
    }

    /// From here on what comes to the socket is judged.
    pub fn arm(&mut self, place: &mut Place, socket: impl AsFd) -> Result<(), Errno> {
        self.armed.insert(place.cookie, socket.as_fd().as_raw_fd(), NEW).map_err(|error| errno(&error))?;
        place.armed = true;
        Ok(())
    }

    /// Sockets that are about to be closed, or were never armed. Closing takes the others out of the maps.
    pub fn leave(&mut self, places: &[Place; 2], now: u64) {
        let armed = places.iter().any(|place| place.armed);
        for place in places {
            let _ = self.indexes.remove(&place.cookie);
            if !armed {
                let _ = self.peers.remove(&place.cookie);
            }
            self.free.push_back((place.index, now));
        }
    }

    pub fn line(&self, index: u32) -> Line<'_> {
        self.channels.line(index)
    }

    /// The channel that wants something; `None`: no more.
    pub fn next_call(&mut self) -> Option<u32> {
        let call = self.calls.next()?;
        Some(u32::from_ne_bytes(call.first_chunk().copied().unwrap_or([u8::MAX; 4])))
    }

    /// Readable when there is a call.
    pub fn calls(&self) -> BorrowedFd<'_> {
        self.calls.as_fd()
    }

    fn two_indexes(&mut self, now: u64) -> Option<[u32; 2]> {
        let rested = |(_, since): &(u32, u64)| *since == 0 || now.saturating_sub(*since) >= REST;
        if !(self.free.front().is_some_and(rested) && self.free.get(1).is_some_and(rested)) {
            return None;
        }
        Some([self.free.pop_front()?.0, self.free.pop_front()?.0])
    }
}

impl fmt::Debug for Sockmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockmap").field("free", &self.free.len()).finish_non_exhaustive()
    }
}

fn take<T: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, name: &'static str) -> Result<T, BpfError> {
    let map = object.take_map(name).ok_or(BpfError::Missing { what: name })?;
    T::try_from(map).map_err(|source| BpfError::Map { map: name, source })
}

/// The last of the three numbers of `tcp_rmem`.
fn largest_window() -> u64 {
    const USUAL: u64 = 6 << 20;
    let three = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").unwrap_or_default();
    three.split_whitespace().nth(2).and_then(|most| most.parse().ok()).unwrap_or(USUAL)
}

fn errno(error: &MapError) -> Errno {
    match error {
        MapError::SyscallError(error) => Errno::from_io_error(&error.io_error).unwrap_or(Errno::IO),
        _ => Errno::IO,
    }
}

const _: () = assert!(size_of::<Channel>() == 128);
