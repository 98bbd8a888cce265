//! The kernel's interfaces, each behind a small type: the only place of the daemon with `unsafe` in it.

pub mod bpf;
pub mod capability;
pub mod conntrack;
pub mod fib;
pub mod firewall;
pub mod grace;
pub mod interfaces;
pub mod lookup;
pub mod memory;
pub mod netlink;
pub mod nft;
pub mod readable;
pub mod repair;
pub mod return_path;
pub mod routing;
pub mod schedule;
pub mod segment;
pub mod sockmap;
pub mod sysctl;
pub mod tcp;
