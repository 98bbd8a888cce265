//! Everything that talks to the kernel; the only module with `unsafe`.

pub mod bpf;
