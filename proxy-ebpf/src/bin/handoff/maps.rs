//! The maps, each with its bound. All are pinned by the daemon; it sets the sizes of the first three.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_fib_lookup},
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use proxy_abi::handoff::{HandoffEntry, HandoffEvent, HandoffFlow, HandoffKey, LAYOUT, gate, outcome};
use proxy_translate::{OPTIONS, Options, icmp::Quoted, network::Network, segment::Write};

use crate::route::Leaves;

/// Directions by key. Memory is taken as flows come: the daemon inserts, the program only looks up and deletes.
#[map]
pub static ENTRIES: HashMap<HandoffKey, HandoffEntry> = HashMap::with_max_entries(128, BPF_F_NO_PREALLOC);

/// Flows by the index in their entries.
#[map]
pub static FLOWS: Array<HandoffFlow> = Array::with_max_entries(64, BPF_F_MMAPABLE);

/// Flows that ended.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(4096, 0);

/// Packets by outcome.
#[map]
static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(outcome::COUNT, 0);

/// `ABI[0]`: the [`LAYOUT`] of all this. The daemon writes it when it makes the maps, and compares it when it finds them.
#[map]
static ABI: Array<u32> = Array::with_max_entries(1, 0);

/// What is known of the packet at hand, and room for what helpers are asked: a program's stack has 512 bytes.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

#[repr(C)]
pub struct Scratch {
    pub network: Network,
    pub quoted: Quoted,
    pub key: HandoffKey,
    pub opposite: HandoffKey,
    /// A copy: functions of the program pass no pointers.
    pub entry: HandoffEntry,
    pub write: Write,
    pub options: Options,
    pub leaves: Leaves,
    pub question: bpf_fib_lookup,
}

/// What options are replaced by.
pub static NOPS: [u8; OPTIONS] = [1; OPTIONS];

/// The layout that this object was compiled with, for the daemon to see in the file.
#[unsafe(no_mangle)]
static LAYOUT_OF_OBJECT: u32 = LAYOUT;

/// Counts one packet in `OUTCOMES`; what is not an outcome is not counted.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(slot) = OUTCOMES.get_ptr_mut(index) {
        // SAFETY: a live element, of this CPU only; a classifier runs with bottom halves off, so nothing else writes it meanwhile.
        unsafe { *slot = (*slot).wrapping_add(1) };
    }
}

/// How packets of that key are translated.
#[inline(always)]
pub fn entry(key: &HandoffKey) -> Option<&'static HandoffEntry> {
    // SAFETY: nobody changes an entry; a deleted one stays until the program has returned (RCU), being without preallocation.
    unsafe { ENTRIES.get(key) }
}

/// The flow of an entry, and its gate.
#[inline(always)]
pub fn flow(entry: &HandoffEntry) -> Option<(*mut HandoffFlow, u32)> {
    let flow = FLOWS.get_ptr_mut(entry.flow)?;
    // SAFETY: a live element. Userspace changes the word at any time: read once, so that all of this packet follows one value.
    let gate = unsafe { (&raw const (*flow).gate).read_volatile() };
    (gate != gate::CLOSED).then_some((flow, gate))
}

/// This CPU's room.
#[inline(always)]
pub fn scratch() -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(0)
}

/// Tells userspace; counted when there is no room.
#[inline(always)]
pub fn send(write: impl FnOnce(&mut HandoffEvent)) {
    match EVENTS.reserve::<HandoffEvent>(0) {
        Some(mut event) => {
            // SAFETY: `write` sets every field of what is `repr(C)` without padding.
            write(unsafe { event.assume_init_mut() });
            event.submit(0);
        }
        None => count(outcome::EVENT_LOST),
    }
}
