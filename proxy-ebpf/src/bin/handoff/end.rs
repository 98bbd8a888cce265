//! The end of a flow: userspace is told once.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use proxy_abi::handoff::{HandoffEntry, HandoffFlow, closing};

use crate::maps::{self, Scratch};

/// The packet whose key is in the scratch ended the flow.
#[inline(never)]
pub fn ended(scratch: *mut Scratch, entry: &HandoffEntry, flow: *mut HandoffFlow) {
    // SAFETY: this CPU's scratch, and a live element of which each field is an aligned word of its own.
    let (key, flow) = unsafe { (&(*scratch).key, &*flow) };
    let [client, backend] = &flow.ends;
    maps::send(|event| {
        event.flow = entry.flow;
        event.closing = flow.closing;
        event.id = flow.id;
        // SAFETY: helper without pointers.
        event.at_ns = unsafe { bpf_ktime_get_ns() };
        event.bytes = [client.bytes(), backend.bytes()];
        event.packets = [client.packets, backend.packets];
        event.seen = [client.seen, backend.seen];
        event.key = *key;
        event.direction = entry.direction;
        event.reserved = [0; 7];
    });
}

/// The ports of a flow that is over began a new connection: the entries go, before the stack answers.
#[inline(never)]
pub fn replaced(scratch: *mut Scratch, entry: &HandoffEntry, flow: *mut HandoffFlow) {
    // SAFETY: this CPU's scratch, and an aligned word of a live element.
    let (key, opposite) = unsafe {
        (*flow).closing |= closing::REPLACED;
        (*scratch).opposite = entry.opposite_key((*scratch).key.ip_version);
        (&(*scratch).key, &(*scratch).opposite)
    };
    ended(scratch, entry, flow);
    // Not there any more: another CPU, or userspace, was first.
    let _ = maps::ENTRIES.remove(opposite);
    let _ = maps::ENTRIES.remove(key);
}
