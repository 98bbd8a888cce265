//! The nftables state shunt wants, as data: one `inet` table of static chains and dynamic elements.
//!
//! The same values are printed as an nft script ([`print`]) and encoded as netlink messages by the daemon, so what
//! `shunt plan --format nft` shows is what the kernel gets.

mod types;

pub use types::*;
