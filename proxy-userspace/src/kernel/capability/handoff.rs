//! Whether connections can be handed over to the packet level here.

use std::path::Path;

use proxy_core::capability::Handoff;

use crate::{
    handoff::can_pin,
    kernel::{
        bpf::{
            BpfError,
            handoff::{HandoffError, HandoffTable},
        },
        segment::Sender,
    },
};

const TRIES: usize = 3;

/// Has the program verified, and runs it on packets made for it. Nothing is attached or pinned. `socket`: of the daemon that would
/// pin it.
pub fn ask(socket: &Path) -> Handoff {
    // Resets to both ends need CAP_NET_RAW.
    if !Sender::open().is_open() {
        return Handoff::NotPermitted;
    }
    if !can_pin(socket) {
        return Handoff::NoBpffs;
    }
    // A busy machine lets the clock go on between a packet and what is expected of it.
    let mut probed = HandoffTable::self_probe();
    for _ in 1..TRIES {
        if !matches!(probed, Err(HandoffError::Probe { .. })) {
            break;
        }
        probed = HandoffTable::self_probe();
    }
    match probed {
        Ok(_) => Handoff::Works,
        Err(HandoffError::Bpf(BpfError::NotPermitted(_))) => Handoff::NotPermitted,
        Err(HandoffError::Attach { .. }) => Handoff::NoTc,
        Err(error) => Handoff::ProbeFailed(error.to_string()),
    }
}
