//! The maps, each with its bound.

use aya_ebpf::{
    macros::map,
    maps::{LpmTrie, SockMap},
};
use proxy_abi::lookup::{ListenKey, MAX_BLOCKS, MAX_LISTENERS};

/// What is listened on, as blocks of ports; the value is a place in [`LISTENERS`], or one of `proxy_abi::lookup`.
#[map]
pub static RANGES: LpmTrie<ListenKey, u32> = LpmTrie::with_max_entries(MAX_BLOCKS, 0);

/// One socket of each group of listening sockets; the kernel deals connections out among its group (`SO_REUSEPORT`).
#[map]
pub static LISTENERS: SockMap = SockMap::with_max_entries(MAX_LISTENERS, 0);
