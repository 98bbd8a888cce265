//! Everything that talks to the kernel.

pub mod capability;
pub mod sysctl;
