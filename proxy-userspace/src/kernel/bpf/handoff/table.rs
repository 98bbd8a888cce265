//! The table in the kernel.

use std::{
    collections::VecDeque,
    fmt, fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError, PerCpuArray, RingBuf},
};
use proxy_abi::handoff::{HandoffEntry, HandoffEvent, HandoffFlow, HandoffKey, OWNER_BYTES, gate, outcome};

use super::{
    Boundary, Found, Gate, HandoffError, HandoffProbe, HandoffStore, InsertError, NewFlow, PassedOn, flows::Flows,
    links, object, prepared, probe,
};
use crate::kernel::bpf::BpfError;

/// `BPF_NOEXIST`.
const ONLY_NEW: u64 = 1;

/// How large the maps are. Pinned ones keep the sizes that they were made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Flows at most, 1–1 000 000. Each takes 256 bytes at once, and some 500 more while it is there.
    pub flows: u32,
    /// Bytes of the ring buffer, a power of two of at least a page. An event takes 120.
    pub events: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { flows: 65_536, events: 256 * 1024 }
    }
}

/// The table in the kernel, and the program. Its maps and links are pinned in one folder of a BPF file system: they outlive every process.
pub struct HandoffTable {
    folder: PathBuf,
    flows: Flows,
    entries: Mutex<HashMap<MapData, HandoffKey, HandoffEntry>>,
    /// Gates without a flow. The one that was given back longest ago is used first: a program that still runs on another CPU with an entry
    /// of its last flow has long returned.
    free: Mutex<VecDeque<u32>>,
    events: Mutex<RingBuf<MapData>>,
    events_fd: OwnedFd,
    outcomes: PerCpuArray<MapData, u64>,
    object: Mutex<Ebpf>,
}

impl HandoffTable {
    /// Adopts what is pinned in `folder`, with its flows, when its layout is ours; else makes and pins it. The program is loaded anew, and
    /// replaces the old one on every interface that it is attached to. `folder` is made, inside a mounted BPF file system.
    ///
    /// # Errors
    /// [`HandoffError::NotBpffs`], [`HandoffError::Layout`], [`HandoffError::Bpf`], [`HandoffError::Pin`].
    pub fn open(folder: &Path, sizes: Sizes) -> Result<Self, HandoffError> {
        object::make_folder(folder)?;
        let (mut object, sizes) = object::load_pinned(folder, sizes)?;
        let flows = object::map_flows(&mut object, sizes.flows)?;
        let events: MapData = MapData::from_pin(folder.join("EVENTS")).map_err(map_error("EVENTS"))?;
        let events_fd = events.fd().as_fd().try_clone_to_owned();
        let events_fd =
            events_fd.map_err(|source| HandoffError::Pin { call: "dup", path: folder.join("EVENTS"), source })?;
        let free = (0..flows.count()).filter(|gate| flows.id(Gate(*gate)) == 0).collect();
        let table = Self {
            folder: folder.to_owned(),
            entries: Mutex::new(object::take(&mut object, "ENTRIES")?),
            events: Mutex::new(object::take(&mut object, "EVENTS")?),
            outcomes: object::take(&mut object, "OUTCOMES")?,
            free: Mutex::new(free),
            flows,
            events_fd,
            object: Mutex::new(object),
        };
        links::adopt(object::program(&mut lock(&table.object))?, folder)?;
        Ok(table)
    }

    /// Attaches the program to packets that come in on an interface of this network namespace. Already attached: nothing changes.
    ///
    /// # Errors
    /// [`HandoffError::NotEthernet`], [`HandoffError::Attach`], [`HandoffError::Interface`], [`HandoffError::Pin`].
    pub fn attach(&self, ifindex: u32) -> Result<(), HandoffError> {
        links::attach(object::program(&mut lock(&self.object))?, &self.folder, ifindex)
    }

    /// Detaches it. Not attached, or the interface is gone: nothing to do.
    ///
    /// # Errors
    /// [`HandoffError::Pin`], [`HandoffError::Interface`].
    pub fn detach(&self, ifindex: u32) -> Result<(), HandoffError> {
        let _program = lock(&self.object);
        links::detach(&self.folder, ifindex)
    }

    /// Interfaces that it is attached to, in order, also by an earlier daemon.
    pub fn attached(&self) -> Vec<u32> {
        links::attached(&self.folder)
    }

    /// Packets by outcome since the maps were made: name and number, all of [`proxy_abi::handoff::outcome`], summed over CPUs.
    ///
    /// # Errors
    /// [`HandoffError::Bpf`].
    pub fn outcomes(&self) -> Result<Vec<(&'static str, u64)>, HandoffError> {
        let mut all = Vec::new();
        for index in 0..outcome::COUNT {
            let per_cpu = self.outcomes.get(&index, 0).map_err(map_error("OUTCOMES"))?;
            all.push((outcome::name(index).unwrap_or("unknown"), per_cpu.iter().sum()));
        }
        Ok(all)
    }

    /// Detaches everything and removes every pin in `folder`, whatever its layout: flows in it end unanswered, so end them before. No
    /// such folder: nothing to do.
    ///
    /// # Errors
    /// [`HandoffError::Pin`].
    pub fn remove_pins(folder: &Path) -> Result<(), HandoffError> {
        for ifindex in links::attached(folder) {
            links::detach(folder, ifindex)?;
        }
        object::remove_maps(folder)?;
        for path in [object::links_folder(folder), folder.to_owned()] {
            match fs::remove_dir(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(HandoffError::Pin { call: "rmdir", path, source }),
            }
        }
        Ok(())
    }

    /// Whether this kernel runs the program rightly: every kind of packet through `BPF_PROG_TEST_RUN`, compared with the translation computed
    /// here. Nothing is attached or pinned.
    ///
    /// # Errors
    /// [`HandoffError::Bpf`], [`HandoffError::Probe`].
    pub fn self_probe() -> Result<HandoffProbe, HandoffError> {
        probe::run()
    }

    /// Deletes an entry, if it is still that flow's.
    fn delete(&self, entries: &mut HashMap<MapData, HandoffKey, HandoffEntry>, key: &HandoffKey, gate: Gate) {
        if entries.get(key, 0).is_ok_and(|entry| entry.flow == gate.0) {
            // Gone meanwhile: the program deletes entries too.
            let _ = entries.remove(key);
        }
    }
}

impl HandoffStore for HandoffTable {
    fn insert(&self, new: &NewFlow) -> Result<Gate, InsertError> {
        let capacity = self.flows.count();
        let gate = lock(&self.free).pop_front().ok_or(InsertError::Full { capacity })?;
        let (flow, entries) = prepared(new, gate);
        self.flows.set(Gate(gate), flow);
        let mut map = lock(&self.entries);
        let inserted = entries.iter().enumerate().try_for_each(|(done, (key, entry))| {
            map.insert(key, entry, ONLY_NEW).map_err(|error| {
                for (key, _) in entries.iter().take(done) {
                    let _ = map.remove(key);
                }
                insert_error(error, capacity)
            })
        });
        drop(map);
        match inserted {
            Ok(()) => Ok(Gate(gate)),
            Err(error) => {
                self.flows.set(Gate(gate), HandoffFlow::EMPTY);
                lock(&self.free).push_back(gate);
                Err(error)
            }
        }
    }

    fn open_gate(&self, gate: Gate, at: [Boundary; 2]) {
        self.flows.open(gate, at);
    }

    fn passed_on(&self, gate: Gate, end: usize, what: PassedOn) {
        self.flows.passed_on(gate, end, what);
    }

    fn leave(&self, gate: Gate) {
        self.flows.switch(gate, gate::ALONE);
    }

    fn close_gate(&self, gate: Gate) {
        self.flows.switch(gate, gate::CLOSED);
    }

    fn flow(&self, gate: Gate) -> HandoffFlow {
        self.flows.get(gate).unwrap_or(HandoffFlow::EMPTY)
    }

    fn set_owner(&self, gate: Gate, owner: [u8; OWNER_BYTES]) {
        self.flows.set_owner(gate, owner);
    }

    fn entry(&self, key: &HandoffKey) -> Option<HandoffEntry> {
        lock(&self.entries).get(key, 0).ok()
    }

    fn remove(&self, gate: Gate) -> Option<HandoffFlow> {
        let mut entries = lock(&self.entries);
        let flow = self.flows.get(gate).filter(|flow| flow.id != 0)?;
        self.flows.switch(gate, gate::CLOSED);
        if let Ok(entry) = entries.get(&flow.key, 0)
            && entry.flow == gate.0
        {
            self.delete(&mut entries, &entry.opposite_key(flow.key.ip_version), gate);
            self.delete(&mut entries, &flow.key, gate);
        }
        let last = self.flow(gate);
        self.flows.set(gate, HandoffFlow::EMPTY);
        lock(&self.free).push_back(gate.0);
        Some(last)
    }

    fn walk(&self) -> Vec<Found> {
        let gates = (0..self.flows.count()).map(Gate).filter(|gate| self.flows.id(*gate) != 0);
        gates.map(|gate| Found { gate, flow: self.flow(gate) }).filter(|found| found.flow.id != 0).collect()
    }

    fn used(&self) -> (u32, u32) {
        let free = u32::try_from(lock(&self.free).len()).unwrap_or(u32::MAX);
        (self.flows.count().saturating_sub(free), self.flows.count())
    }

    fn next_event(&self) -> Option<HandoffEvent> {
        let mut events = lock(&self.events);
        loop {
            let item = events.next()?;
            // Whatever has another size is none of ours.
            if item.len() == size_of::<HandoffEvent>() {
                // SAFETY: as many bytes as the type has, of which every bit pattern is a value; perhaps not aligned.
                return Some(unsafe { item.as_ptr().cast::<HandoffEvent>().read_unaligned() });
            }
        }
    }

    fn events_fd(&self) -> BorrowedFd<'_> {
        self.events_fd.as_fd()
    }
}

impl fmt::Debug for HandoffTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandoffTable").field("folder", &self.folder).field("used", &self.used()).finish()
    }
}

fn insert_error(error: MapError, capacity: u32) -> InsertError {
    match error {
        MapError::SyscallError(error) => match error.io_error.raw_os_error() {
            Some(libc::EEXIST) => InsertError::Taken,
            Some(libc::E2BIG) => InsertError::Full { capacity },
            _ => InsertError::Kernel(error.io_error),
        },
        other => InsertError::Kernel(io::Error::other(other)),
    }
}

fn map_error(map: &'static str) -> impl Fn(MapError) -> BpfError {
    move |source| BpfError::Map { map, source }
}

/// A panic elsewhere leaves the maps as whole as the kernel keeps them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
