//! The map `CHANNELS` as memory of this process (`BPF_F_MMAPABLE`, v5.5+): counters are read without a system call.

use std::{
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd},
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use aya::{
    Ebpf,
    maps::{Map, MapError},
};
use proxy_abi::sockmap::{Allowed, Channel, Judged};

use crate::kernel::bpf::BpfError;

pub struct Channels {
    first: NonNull<Channel>,
    count: u32,
}

// SAFETY: the memory is shared with the kernel anyhow; every access is one aligned atomic word.
unsafe impl Send for Channels {}

/// Maps the whole of it; the mapping holds the map.
pub fn map(object: &Ebpf, count: u32) -> Result<Channels, BpfError> {
    const NAME: &str = "CHANNELS";
    let Some(Map::Array(data)) = object.map(NAME) else { return Err(BpfError::Missing { what: NAME }) };
    let failed = |source| BpfError::Map { map: NAME, source };
    let info = data.info().map_err(failed)?;
    if (info.value_size() as usize, info.max_entries()) != (size_of::<Channel>(), count) {
        let (size, expected) = (info.value_size() as usize, size_of::<Channel>());
        return Err(failed(MapError::InvalidValueSize { size, expected }));
    }
    let length = count as usize * size_of::<Channel>();
    // SAFETY: a new mapping of a map of that size; nothing else of this process is there.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            data.fd().as_fd().as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(failed(MapError::IoError(std::io::Error::last_os_error())));
    }
    let first = NonNull::new(address.cast()).ok_or(BpfError::Missing { what: NAME })?;
    Ok(Channels { first, count })
}

impl Channels {
    pub fn count(&self) -> u32 {
        self.count
    }

    /// An index beyond the map is its last: it comes from the kernel.
    pub fn line(&self, index: u32) -> Line<'_> {
        let index = index.min(self.count.saturating_sub(1));
        // SAFETY: within the mapping, which holds `count` channels and at least one.
        let channel = unsafe { self.first.add(index as usize) };
        Line { channel, _of: PhantomData }
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`, and no `Line` outlives `self`.
        unsafe { libc::munmap(self.first.as_ptr().cast(), self.count as usize * size_of::<Channel>()) };
    }
}

/// One channel: what the kernel has counted, and what it may do.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a> {
    channel: NonNull<Channel>,
    _of: PhantomData<&'a Channels>,
}

/// What of [`Judged`] the daemon reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    pub redirected: u64,
    pub passed: u64,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub last: u64,
    pub trimmed: u64,
    pub fault: u32,
}

macro_rules! word {
    ($line:expr, $half:ident . $field:ident, $atomic:ty) => {{
        // SAFETY: an aligned word of a live mapping; both sides only ever store whole words.
        unsafe { <$atomic>::from_ptr(&raw mut (*$line.channel.as_ptr()).$half.$field) }
    }};
}

impl Line<'_> {
    /// For a new pair of sockets: nothing is granted, and nobody is called.
    pub fn clear(self) {
        // SAFETY: a channel of the mapping. No socket has its index yet.
        unsafe { self.channel.write(Channel { judged: Judged::default(), allowed: Allowed::default() }) };
    }

    /// `passed` first: when it is more than was dealt with, `redirected` stands still.
    pub fn seen(self) -> Seen {
        let passed = word!(self, judged.passed, AtomicU64).load(Acquire);
        Seen {
            passed,
            redirected: word!(self, judged.redirected, AtomicU64).load(Acquire),
            last: word!(self, judged.last, AtomicU64).load(Relaxed),
            trimmed: word!(self, judged.trimmed, AtomicU64).load(Relaxed),
            fault: word!(self, judged.fault, AtomicU32).load(Relaxed),
        }
    }

    pub fn set_hard(self, bytes: u64) {
        word!(self, allowed.hard, AtomicU64).store(bytes, Relaxed);
    }

    /// What was passed has been written to the partner, up to here.
    pub fn set_relayed(self, bytes: u64) {
        word!(self, allowed.relayed, AtomicU64).store(bytes, Release);
    }

    /// Up to where the kernel may redirect, and when it is to call; `epoch` 0: never.
    pub fn allow(self, granted: u64, wake_at: u64, epoch: u64) {
        word!(self, allowed.wake_at, AtomicU64).store(wake_at, Release);
        word!(self, allowed.granted, AtomicU64).store(granted, Release);
        word!(self, allowed.epoch, AtomicU64).store(epoch, Release);
    }
}
