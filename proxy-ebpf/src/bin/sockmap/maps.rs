//! The maps, each with its bound. Each worker of the daemon has a set of its own and says how large.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, RingBuf, SockHash},
};
use proxy_abi::{ABI_VERSION, sockmap::Channel};

/// `ABI[0]`: the [`ABI_VERSION`] that the program was compiled with, from the first piece of a stream on.
#[map]
static ABI: Array<u32> = Array::with_max_entries(1, 0);

/// By the cookie of a socket: its partner. Without a program, so that being in it changes nothing for a socket.
#[map]
pub static PEERS: SockHash<u64> = SockHash::with_max_entries(64, 0);

/// By its cookie: a socket whose pieces are judged. The program is attached to this map; a socket comes here last.
#[map]
static ARMED: SockHash<u64> = SockHash::with_max_entries(64, 0);

/// By the cookie of a socket: the index of its channel.
#[map]
pub static INDEXES: HashMap<u64, u32> = HashMap::with_max_entries(64, BPF_F_NO_PREALLOC);

/// What is counted and allowed, by index. The daemon reads and writes it without a system call.
#[map]
pub static CHANNELS: Array<Channel> = Array::with_max_entries(64, BPF_F_MMAPABLE);

/// Indexes of channels that want the daemon.
#[map]
pub static CALLS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

/// Says in `ABI` what this object was compiled with.
#[inline(always)]
pub fn stamp_abi() {
    if let Some(slot) = ABI.get_ptr_mut(0) {
        // SAFETY: the kernel returned a live element of this type, and an aligned store of 4 bytes is whole: every
        // writer writes the same.
        unsafe { *slot = ABI_VERSION };
    }
}
