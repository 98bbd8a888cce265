//! The maps, each with its bound.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    macros::map,
    maps::{Array, PerCpuArray, PerCpuHashMap},
};
use proxy_abi::{
    ABI_VERSION,
    flow::{FlowCounters, FlowKey},
    outcome,
};

/// `ABI[0]`: the [`ABI_VERSION`] that the program was compiled with, from its first run on.
#[map]
static ABI: Array<u32> = Array::with_max_entries(1, 0);

/// Counters by flow. The daemon may set another size before it loads the object.
#[map]
static FLOWS: PerCpuHashMap<FlowKey, FlowCounters> = PerCpuHashMap::with_max_entries(64, 0);

/// Packets by outcome.
#[map]
static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(outcome::COUNT, 0);

/// What a new flow begins with. In read-only data, not made on the stack: that would be a call of `memset`, whose loop over
/// the stack the verifier refuses to a process without `CAP_PERFMON`.
static NO_TRAFFIC: FlowCounters = FlowCounters::ZERO;

/// Says in `ABI` what this object was compiled with.
#[inline(always)]
pub fn stamp_abi() {
    if let Some(slot) = ABI.get_ptr_mut(0) {
        // SAFETY: the kernel returned a live element of this type, and an aligned store of 4 bytes is whole: every
        // writer writes the same.
        unsafe { *slot = ABI_VERSION };
    }
}

/// Counts one packet in `OUTCOMES`; what is not an outcome is not counted.
#[inline(always)]
pub fn count_outcome(index: u32) {
    if let Some(slot) = OUTCOMES.get_ptr_mut(index) {
        // SAFETY: a live element, of this CPU only; a classifier runs with bottom halves off, so nothing else
        // writes it meanwhile.
        unsafe { *slot = (*slot).wrapping_add(1) };
    }
}

/// This CPU's counters of a flow, made when they are not there; `None` when the table is full.
#[inline(always)]
pub fn flow_counters(key: &FlowKey) -> Option<&'static mut FlowCounters> {
    let counters = match FLOWS.get_ptr_mut(key) {
        Some(counters) => counters,
        None => {
            #[expect(clippy::needless_borrows_for_generic_args, reason = "by value it would be copied to the stack")]
            // Another CPU may have been first: then this fails, and the second look-up finds its element.
            let _ = FLOWS.insert(key, &NO_TRAFFIC, u64::from(BPF_NOEXIST));
            FLOWS.get_ptr_mut(key)?
        }
    };
    // SAFETY: a live element, of this CPU only; a classifier runs with bottom halves off, and its caller uses the
    // reference once, so there is no second one.
    Some(unsafe { &mut *counters })
}
