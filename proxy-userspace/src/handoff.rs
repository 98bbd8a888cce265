//! The engine `handoff` from outside: where its maps are pinned, the interfaces its program is on,
//! and taking all of it away again.

use std::{
    collections::BTreeSet,
    fs,
    ops::RangeInclusive,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::{AccessFlags, SysconfVar, faccessat, sysconf},
};
use proxy_core::{handed::route_hash, plan::Plan};
use tokio::{io::unix::AsyncFd, task::AbortHandle};

use crate::{
    kernel::{
        bpf::handoff::{HandoffError, HandoffStore, HandoffTable, Sizes},
        interfaces::{InterfaceError, Interfaces},
        memory,
        segment::Sender,
    },
    stream::{
        StreamError,
        handed::{Begun, Resets, Store, ends_of},
        handover::OnInterfaces,
    },
};

/// Bytes that are taken at once for a connection that may come.
const AT_ONCE: u64 = 256;
/// One in so many bytes of the machine's memory may be taken so: 131,072 connections from 8 GiB on.
const SHARE: u64 = 256;
const FLOWS: RangeInclusive<u64> = 1 << 12..=1 << 17;

/// For maps that are new.
fn sizes() -> Sizes {
    let asked = |what| sysconf(what).ok().flatten().and_then(|answer| u64::try_from(answer).ok()).unwrap_or_default();
    let memory = asked(SysconfVar::_PHYS_PAGES) * asked(SysconfVar::PAGE_SIZE);
    let flows = (memory / SHARE / AT_ONCE).clamp(*FLOWS.start(), *FLOWS.end());
    // A power of two, rounded down.
    Sizes { flows: 1 << flows.ilog2(), events: 1 << 20 }
}

/// Where systemd mounts it.
const BPF_FS: &str = "/sys/fs/bpf";

/// Where the daemon with this admin socket pins what outlives it: in a BPF file system that is mounted in `bpf` beside the
/// socket, where there is one, else in `/sys/fs/bpf`. A folder per network namespace and socket.
pub fn folder(socket: &Path) -> PathBuf {
    let beside = socket.with_file_name("bpf");
    let base = if is_bpf_fs(&beside) { beside } else { PathBuf::from(BPF_FS) };
    let namespace = fs::metadata("/proc/thread-self/ns/net").map_or(0, |namespace| namespace.ino());
    base.join(format!("shunt-{namespace}-{:08x}", route_hash(&socket.to_string_lossy()) as u32))
}

fn is_bpf_fs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// Whether there is a BPF file system for it in which this process may make, or change, its folder.
pub fn can_pin(socket: &Path) -> bool {
    let folder = folder(socket);
    let existing = if folder.exists() { folder.as_path() } else { folder.parent().unwrap_or(&folder) };
    is_bpf_fs(existing) && faccessat(AT_FDCWD, existing, AccessFlags::W_OK, AtFlags::AT_EACCESS).is_ok()
}

/// [`begin`], where a route hands over or a daemon before this one has left connections.
pub fn begin_where_needed(plan: &Plan, socket: &Path) -> Result<Option<Begun>, StreamError> {
    let needed = folder(socket).exists() || plan.routes().iter().any(|route| route.hands_over());
    needed.then(|| begin(socket)).transpose()
}

/// Makes the table, or takes over what a daemon before this one has left, and puts the program on every interface: for good, or for as
/// long as a start or a change is tried. What was there before stays in any case. Inside a tokio runtime.
pub fn begin(socket: &Path) -> Result<Begun, StreamError> {
    let folder = folder(socket);
    let was_there = folder.exists();
    let table = HandoffTable::open(&folder, sizes()).map(Arc::new);
    // The loader has read what the kernel says of its types, megabytes.
    memory::give_back();
    let followed = table.map_err(StreamError::from).and_then(|table| Ok(follow(table)?));
    let take_away = move || {
        if was_there {
            return;
        }
        if let Err(error) = HandoffTable::remove_pins(&folder) {
            tracing::warn!(%error, "left behind; `shunt cleanup` removes it");
        }
    };
    match followed {
        Ok((store, follower)) => Ok(Begun::new(store, move || {
            follower.abort();
            take_away();
        })),
        Err(error) => {
            take_away();
            Err(error)
        }
    }
}

fn follow(table: Arc<HandoffTable>) -> Result<(Store, AbortHandle), InterfaceError> {
    let on = OnInterfaces::default();
    let follower = tokio::spawn(Attached::new(Arc::clone(&table), on.clone())?.follow());
    Ok((Store { table, on: Some(on) }, follower.abort_handle()))
}

/// Keeps the program on every interface that connections between other machines can come from.
#[derive(Debug)]
struct Attached {
    table: Arc<HandoffTable>,
    /// As workers are told.
    on: OnInterfaces,
    interfaces: AsyncFd<Interfaces>,
    /// Tried, whether the kernel took the program or not.
    known: BTreeSet<u32>,
}

impl Attached {
    /// To those there are, inside a tokio runtime: before the first connection is handed over.
    fn new(table: Arc<HandoffTable>, on: OnInterfaces) -> Result<Self, InterfaceError> {
        let interfaces = Interfaces::open()?.into_async()?;
        let mut attached = Self { table, on, interfaces, known: BTreeSet::new() };
        attached.look()?;
        Ok(attached)
    }

    /// Follows new ones for as long as the task runs.
    async fn follow(mut self) {
        loop {
            match self.interfaces.readable_mut().await {
                Ok(mut guard) => {
                    let news = guard.get_inner_mut().drain();
                    guard.clear_ready();
                    if let Err(error) = news.and_then(|()| self.look()) {
                        tracing::error!(%error, "interfaces cannot be followed");
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "interfaces cannot be awaited");
                    return;
                }
            }
        }
    }

    fn look(&mut self) -> Result<(), InterfaceError> {
        let found = self.interfaces.get_mut().find()?;
        // An interface that goes takes the program with it, and its number may come again: what is left of it says nothing.
        for gone in self.table.attached().into_iter().filter(|interface| !found.all.contains(interface)) {
            if let Err(error) = self.table.detach(gone) {
                tracing::warn!(%error, "the pin of an interface that is gone stays");
            }
        }
        for &interface in found.entrances.difference(&self.known) {
            match self.table.attach(interface) {
                Ok(()) => tracing::debug!(interface, "connections can be handed over on this interface"),
                Err(error) => tracing::warn!(%error, "connections over this interface stay in the daemon"),
            }
        }
        self.known = found.entrances;
        self.on.set(self.table.attached().into_iter().collect());
        Ok(())
    }
}

/// Ends every handed-over connection with resets and takes program and maps away: what was done, one line.
pub fn remove(socket: &Path) -> Result<Option<String>, HandoffError> {
    let folder = folder(socket);
    if !folder.exists() {
        return Ok(None);
    }
    let ended = match HandoffTable::open(&folder, sizes()) {
        Ok(table) => end_all(&table),
        // Another version's: its flows end with their next packets.
        Err(HandoffError::Layout { .. }) => 0,
        Err(error) => return Err(error),
    };
    HandoffTable::remove_pins(&folder)?;
    Ok(Some(format!("deleted the table of handed-over connections; {ended} were reset")))
}

fn end_all(table: &HandoffTable) -> usize {
    let resets = Resets::new(Sender::open());
    let mut ended = 0;
    for found in table.walk() {
        if let Some(ends) = ends_of(table, &found.flow.key).filter(|_| !found.flow.is_over()) {
            resets.send(table, &found.flow, &ends);
            ended += 1;
        }
        table.remove(found.gate);
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemons_with_other_sockets_have_other_folders() {
        let of = |socket: &str| folder(Path::new(socket));
        assert_eq!(of("/run/shunt/admin.sock"), of("/run/shunt/admin.sock"));
        assert_ne!(of("/run/shunt/admin.sock"), of("/run/other/admin.sock"));
        assert!(of("/run/shunt/admin.sock").starts_with(BPF_FS));
    }
}
