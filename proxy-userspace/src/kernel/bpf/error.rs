//! What can go wrong between the object and a kernel that runs it.

use std::{error::Error, fs, io};

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
    #[error("the kernel's verifier refused the program: {}", verdict(log))]
    Verifier { source: io::Error, log: String },
    /// It might not have with that privilege: without, it also walks what a processor might speculate, and refuses what that might read
    /// and more, in older kernels more than in newer ones.
    #[error("this kernel's verifier refuses the program of a process without CAP_PERFMON: {}", verdict(log))]
    NoPerfmon { log: String },
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
            Self::NoPerfmon { .. } => "give the process CAP_PERFMON beside CAP_BPF and CAP_NET_ADMIN",
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
                let log = verifier_log.to_string();
                tracing::debug!(log, "the verifier");
                if lacks_perfmon() { Self::NoPerfmon { log } } else { Self::Verifier { source: io_error, log } }
            }
            (_, error) => Self::Program(Box::new(error)),
        }
    }
}

fn lacks_perfmon() -> bool {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    const CAP_PERFMON: u64 = 1 << 38;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(u64::MAX);
    effective & (CAP_SYS_ADMIN | CAP_PERFMON) == 0
}

/// The line of a verifier's log that says what it objects to: the last one before its statistics.
fn verdict(log: &str) -> &str {
    const STATISTICS: [&str; 3] = ["processed ", "verification time ", "stack depth "];
    let said = |line: &&str| !line.is_empty() && !STATISTICS.iter().any(|beginning| line.starts_with(beginning));
    log.lines().map(str::trim).rfind(said).unwrap_or("it does not say why")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_verifiers_long_log_the_line_is_told_that_says_why() {
        let log = "0: (bf) r6 = r1\n; \n463: (6b) *(u16 *)(r10 -18) = r1\nattempt to corrupt spilled pointer on stack\n\
                   verification time 15936 usec\nstack depth 104\nprocessed 240 insns (limit 1000000) max_states_per_insn 0\n";
        assert_eq!(verdict(log), "attempt to corrupt spilled pointer on stack");
        assert_eq!(verdict(""), "it does not say why");
    }
}
