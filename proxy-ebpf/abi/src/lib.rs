//! Map keys and values shared by the eBPF programs and the daemon, written once for both sides.
#![no_std]
#![forbid(unsafe_code)]

/// Version of every layout in this crate. The daemon compares it with the one a pinned map carries.
pub const ABI_VERSION: u32 = 1;
