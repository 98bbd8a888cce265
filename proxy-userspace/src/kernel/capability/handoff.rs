//! Whether connections can be handed over to the packet level here.

use proxy_core::capability::Handoff;

use crate::kernel::{
    bpf::{
        BpfError,
        handoff::{HandoffError, HandoffTable},
    },
    segment::Sender,
};

/// Runs the program on packets made for it: some milliseconds. Nothing is attached or pinned.
pub fn ask() -> Handoff {
    // Resets to both ends need CAP_NET_RAW.
    if !Sender::open().is_open() {
        return Handoff::NotPermitted;
    }
    match HandoffTable::self_probe() {
        Ok(_) => Handoff::Works,
        Err(HandoffError::Bpf(BpfError::NotPermitted(_))) => Handoff::NotPermitted,
        Err(HandoffError::Attach { .. }) => Handoff::NoTc,
        Err(error) => Handoff::ProbeFailed(error.to_string()),
    }
}
