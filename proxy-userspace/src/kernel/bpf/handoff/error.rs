//! What can go wrong with the table of handed-over flows.

use std::{io, path::PathBuf};

use proxy_abi::handoff::LAYOUT;

use crate::kernel::bpf::BpfError;

/// Why a flow is not in the table.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    #[error("the table of handed-over flows is full ({capacity})")]
    Full { capacity: u32 },
    #[error("a flow of the same addresses and ports is in the table")]
    Taken,
    #[error("bpf(BPF_MAP_UPDATE_ELEM) on the table of handed-over flows")]
    Kernel(#[source] io::Error),
}

/// Why there is no table, or no program on an interface.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("{} is not in a BPF file system", .0.display())]
    NotBpffs(PathBuf),
    #[error("{call} {}", path.display())]
    Pin { call: &'static str, path: PathBuf, source: io::Error },
    #[error("mmap of the map FLOWS")]
    Memory(#[source] io::Error),
    /// Pins of another version of shunt: its flows live on in them and are not understood here.
    #[error("the pins in {} have layout {pinned}, this daemon {LAYOUT}", folder.display())]
    Layout { folder: PathBuf, pinned: u32 },
    #[error("interface {ifindex}: {call}")]
    Interface { ifindex: u32, call: &'static str, source: io::Error },
    /// The program reads an Ethernet header.
    #[error("interface {ifindex} has no Ethernet headers (type {kind})")]
    NotEthernet { ifindex: u32, kind: u32 },
    /// Neither tcx nor clsact took the program.
    #[error("interface {ifindex}: the kernel did not attach the program: {why}")]
    Attach { ifindex: u32, why: String },
    /// The self-probe: the program made something else of a packet than it should.
    #[error("probe packet \"{packet}\": {what}")]
    Probe { packet: String, what: String },
}

impl HandoffError {
    /// How to mend it, one line, as `shunt doctor` prints it.
    pub const fn mend(&self) -> &'static str {
        match self {
            Self::Bpf(error) => error.mend(),
            Self::NotBpffs(_) => "mount -t bpf bpf /sys/fs/bpf",
            Self::Pin { .. } => "give the daemon the right to write there; a container needs the host's /sys/fs/bpf",
            Self::Memory(_) => "use a kernel of 5.5 or later, and allow the daemon the memory",
            Self::Layout { .. } => "let the flows of the other version end, or end them: shunt cleanup",
            Self::Interface { .. } => "the interface went away, or the process lacks CAP_NET_ADMIN",
            Self::NotEthernet { .. } => "flows over this interface are served without handoff",
            Self::Attach { .. } => "use a kernel with CONFIG_NET_CLS_ACT and CONFIG_NET_SCH_INGRESS, or 6.6 and later",
            Self::Probe { .. } => "do not use handoff on this kernel, and report it with the output of uname -a",
        }
    }
}
