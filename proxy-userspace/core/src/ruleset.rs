//! The nftables state shunt wants, as data: one `inet` table of static chains and dynamic elements.
//!
//! The same values are printed as an nft script ([`print()`]) and encoded as netlink messages by the daemon, so what
//! `shunt plan --format nft` shows is what the kernel gets.

mod fragment;
pub mod names;
mod print;
mod skeleton;
mod types;

pub use fragment::{Context, Endpoint, FOREVER, Fragment, Marks, Member, draining, fragment, passing, timeout_policy};
pub use print::print;
pub use skeleton::skeleton;
pub use types::*;
