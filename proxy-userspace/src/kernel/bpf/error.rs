//! What can go wrong between the object and a kernel that runs it.

use std::{error::Error, io};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use proxy_abi::{
    ABI_VERSION,
    flow::{FlowCounters, FlowKey},
};

/// Why this kernel does not run our eBPF programs, or not rightly.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The kernel answered EPERM.
    #[error("eBPF is not permitted to this process")]
    NotPermitted(#[source] Box<dyn Error + Send + Sync>),
    /// The kernel answered ENOSYS to bpf(2).
    #[error("this kernel has no bpf(2) system call")]
    NoBpf(#[source] Box<dyn Error + Send + Sync>),
    /// The verifier refused the program; `log` is what it said.
    #[error("the kernel's verifier refused the program: {log}")]
    Verifier { source: io::Error, log: String },
    #[error("the eBPF object could not be loaded")]
    Load(#[source] Box<EbpfError>),
    #[error("the eBPF program could not be loaded or run")]
    Program(#[source] Box<ProgramError>),
    #[error("map {map} could not be read as the daemon knows it")]
    Map { map: &'static str, source: MapError },
    #[error("the eBPF object has no {what}")]
    Missing { what: &'static str },
    #[error("this process's network namespace cannot be opened: {0}")]
    Namespace(#[source] io::Error),
    #[error("the eBPF object has map layout {object}, this daemon {ABI_VERSION}")]
    AbiVersion { object: u32 },
    #[error("the program answered {verdict:#x} to the packet \"{packet}\", and should have left it alone")]
    Verdict { packet: &'static str, verdict: u32 },
    #[error("{sent} packets should have been counted as {outcome}, the program counted {counted}")]
    Miscounted { outcome: &'static str, sent: u64, counted: u64 },
    #[error("flow {key:?} should have {sent:?}, the program counted {counted:?}")]
    FlowCounters { key: Box<FlowKey>, sent: FlowCounters, counted: Option<FlowCounters> },
    #[error("the program counted a flow that no packet belongs to: {key:?}")]
    UnknownFlow { key: Box<FlowKey> },
}

impl BpfError {
    /// How to mend it, one line, as `shunt doctor` prints it.
    pub const fn mend(&self) -> &'static str {
        match self {
            Self::NotPermitted(_) => {
                "give the process CAP_BPF and CAP_NET_ADMIN; before Linux 5.11 raise RLIMIT_MEMLOCK too; a seccomp filter \
                 or a container runtime may also forbid bpf(2)"
            }
            Self::NoBpf(_) => "use a kernel with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_ACT",
            Self::Verifier { .. } | Self::Load(_) | Self::Program(_) => {
                "use a newer kernel; shunt serves these routes without eBPF meanwhile"
            }
            Self::Namespace(_) => "mount /proc",
            Self::Map { .. } | Self::Missing { .. } | Self::AbiVersion { .. } => {
                "build the daemon and proxy-ebpf/objects from the same sources: cargo xtask ebpf build"
            }
            Self::Verdict { .. } | Self::Miscounted { .. } | Self::FlowCounters { .. } | Self::UnknownFlow { .. } => {
                "do not use eBPF on this kernel, and report it with the output of uname -a"
            }
        }
    }

    pub(in crate::kernel) fn from_load(error: EbpfError) -> Self {
        match errno(&error) {
            Some(libc::EPERM) => Self::NotPermitted(Box::new(error)),
            Some(libc::ENOSYS) => Self::NoBpf(Box::new(error)),
            _ => Self::Load(Box::new(error)),
        }
    }

    /// EACCES is the verifier's own answer and comes with its log; only EPERM is about privileges.
    pub(in crate::kernel) fn from_program(error: ProgramError) -> Self {
        match (errno(&error), error) {
            (Some(libc::EPERM), error) => Self::NotPermitted(Box::new(error)),
            (Some(libc::ENOSYS), error) => Self::NoBpf(Box::new(error)),
            (_, ProgramError::LoadError { io_error, verifier_log }) => {
                Self::Verifier { source: io_error, log: verifier_log.to_string() }
            }
            (_, error) => Self::Program(Box::new(error)),
        }
    }
}

/// The system call's answer at the end of an error's chain.
fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(errno) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(errno);
        }
        cause = error.source();
    }
    None
}
