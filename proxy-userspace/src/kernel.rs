//! The only place of the daemon that talks to the kernel in its own tongue.

pub mod capability;
pub mod conntrack;
pub mod sysctl;
