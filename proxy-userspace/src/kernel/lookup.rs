//! One listening socket for many ports: the `sk_lookup` program (v5.9+) of this network namespace, and its maps.
//!
//! The link that attaches it is a descriptor of this process and pinned nowhere: with the daemon goes the program, and the ports
//! are as if nobody listened there, as with listening sockets.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{LpmTrie, Map, MapData, MapError, SockMap, lpm_trie::Key},
    programs::SkLookup,
};
use proxy_abi::lookup::ListenKey;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::bpf::BpfError;

/// Compiled by `cargo xtask ebpf build`.
static OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../proxy-ebpf/objects/lookup.bpf.o"));
const PROGRAM: &str = "shunt_lookup";
const RANGES: &str = "RANGES";
const LISTENERS: &str = "LISTENERS";

/// An address, and ports that agree in their first `bits` bits with `port`. Order: by address, then port, the wider block first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block {
    pub address: IpAddr,
    pub port: u16,
    /// At most 16.
    pub bits: u8,
}

impl Block {
    fn key(&self) -> Key<ListenKey> {
        let address = match self.address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let key = ListenKey { address, port_be: self.port.to_be_bytes() };
        Key::new(ListenKey::ADDRESS_BITS + u32::from(self.bits), key)
    }
}

/// The attached program and what it has been told.
pub struct Lookup {
    ranges: LpmTrie<MapData, ListenKey, u32>,
    listeners: SockMap<MapData>,
    held: BTreeMap<Block, u32>,
    /// The link is in it.
    #[cfg_attr(not(test), expect(dead_code, reason = "kept for the link"))]
    object: Ebpf,
}

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookup").field("held", &self.held).finish_non_exhaustive()
    }
}

impl Lookup {
    /// Attaches the program to the network namespace of the calling thread. It leads nothing anywhere yet.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`] without `CAP_BPF` and `CAP_NET_ADMIN`; the other variants say which step failed.
    pub fn attach() -> Result<Self, BpfError> {
        let mut object = load()?;
        let namespace = File::open("/proc/thread-self/ns/net").map_err(BpfError::Namespace)?;
        program(&mut object)?.attach(namespace).map_err(BpfError::from_program)?;
        let ranges = LpmTrie::try_from(take(&mut object, RANGES)?);
        let listeners = SockMap::try_from(take(&mut object, LISTENERS)?);
        Ok(Self {
            ranges: ranges.map_err(failed(RANGES))?,
            listeners: listeners.map_err(failed(LISTENERS))?,
            held: BTreeMap::new(),
            object,
        })
    }

    /// Connections that are led to `place` go to this listening socket, or to one of its group. It leaves its place when it is
    /// closed.
    pub fn put_listener(&mut self, place: u32, socket: &OwnedFd) -> Result<(), BpfError> {
        self.listeners.set(place, &socket.as_raw_fd(), 0).map_err(failed(LISTENERS))
    }

    /// Leads the ports of `block` to a place, or what else the constants of `proxy_abi::lookup` say.
    pub fn lead(&mut self, block: Block, to: u32) -> Result<(), BpfError> {
        if self.held.get(&block) != Some(&to) {
            self.ranges.insert(&block.key(), to, 0).map_err(failed(RANGES))?;
            self.held.insert(block, to);
        }
        Ok(())
    }

    /// Forgets everything that is not in `wanted`.
    pub fn keep_only(&mut self, wanted: &BTreeMap<Block, u32>) -> Result<(), BpfError> {
        let gone: Vec<Block> = self.held.keys().filter(|block| !wanted.contains_key(block)).copied().collect();
        for block in gone {
            match self.ranges.remove(&block.key()) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(failed(RANGES)(error)),
            }
            self.held.remove(&block);
        }
        Ok(())
    }
}

/// Whether this kernel takes the program from this process. Attaches nothing.
pub fn probe() -> Result<(), BpfError> {
    load().map(drop)
}

fn load() -> Result<Ebpf, BpfError> {
    // Before Linux 5.11 maps count against it; where it may not be raised, loading says so.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    let mut object = EbpfLoader::new().load(OBJECT).map_err(BpfError::from_load)?;
    program(&mut object)?.load().map_err(BpfError::from_program)?;
    Ok(object)
}

fn program(object: &mut Ebpf) -> Result<&mut SkLookup, BpfError> {
    let program = object.program_mut(PROGRAM).ok_or(BpfError::Missing { what: PROGRAM })?;
    program.try_into().map_err(BpfError::from_program)
}

fn take(object: &mut Ebpf, name: &'static str) -> Result<Map, BpfError> {
    object.take_map(name).ok_or(BpfError::Missing { what: name })
}

fn failed(map: &'static str) -> impl Fn(MapError) -> BpfError {
    move |source| BpfError::Map { map, source }
}

#[cfg(test)]
mod tests;
