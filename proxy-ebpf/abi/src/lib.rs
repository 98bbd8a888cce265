//! Map keys and values shared by the eBPF programs and the daemon, written once for both sides.
//!
//! Everything here is `#[repr(C)]`, without implicit padding, and made of integers and byte arrays: any bit pattern the
//! other side wrote is a valid value. Ports and addresses are in network byte order, as in the packet.
#![no_std]
#![deny(unsafe_code)]

pub mod flow;
pub mod handoff;
pub mod lookup;
pub mod outcome;
#[cfg(feature = "pod")]
#[expect(unsafe_code, reason = "Pod is a promise about layout that only the author of the type can make")]
mod pod;
pub mod sockmap;

/// Version of every layout in this crate. A program stamps it into the map `ABI`; the daemon compares it with its own
/// before it believes any other map, so raise it with every change of a type here.
pub const ABI_VERSION: u32 = 2;
