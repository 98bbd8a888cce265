//! [`aya::Pod`] for the types that live in maps.

use crate::{
    flow::{Endpoint, FlowCounters, FlowKey, Traffic},
    handoff::{HandoffEnd, HandoffEntry, HandoffEvent, HandoffFlow, HandoffKey},
    lookup::ListenKey,
    sockmap::Channel,
};

// SAFETY: `repr(C)`, bytes only: no padding, every bit pattern valid, no pointers.
unsafe impl aya::Pod for Endpoint {}
// SAFETY: as `Endpoint`; 18 + 18 + 1 + 1 + 2 bytes of alignment 1 leave no padding.
unsafe impl aya::Pod for FlowKey {}
// SAFETY: `repr(C)`, two u64: no padding, every bit pattern valid, no pointers.
unsafe impl aya::Pod for Traffic {}
// SAFETY: `repr(C)`, two `Traffic`: no padding, every bit pattern valid, no pointers.
unsafe impl aya::Pod for FlowCounters {}
// SAFETY: `repr(C)`, 16 + 2 bytes of alignment 1: no padding, every bit pattern valid.
unsafe impl aya::Pod for ListenKey {}
// SAFETY: `repr(C)`, integers only, 64 + 64 bytes without padding, every bit pattern valid, no pointers.
unsafe impl aya::Pod for Channel {}
// SAFETY: `repr(C)`, bytes only: 18 + 6 + 18 + 1 + 5 = 48, a multiple of its alignment.
unsafe impl aya::Pod for HandoffKey {}
// SAFETY: `repr(C)`, integers and bytes: 4 + 4 × 1 + 4 × 4 + 8 + 2 × (18 + 6) = 80, no padding.
unsafe impl aya::Pod for HandoffEntry {}
// SAFETY: `repr(C)`, integers and bytes: 3 × 8 + 7 × 4 + 2 + 2 = 56, no padding.
unsafe impl aya::Pod for HandoffEnd {}
// SAFETY: `repr(C)`, integers and bytes: 2 × 4 + 2 × 8 + 48 + 64 + 2 × 56 + 8 = 256, no padding.
unsafe impl aya::Pod for HandoffFlow {}
// SAFETY: `repr(C)`, integers and bytes: 2 × 4 + 2 × 8 + 4 × 8 + 2 × 4 + 48 + 8 = 120, no padding.
unsafe impl aya::Pod for HandoffEvent {}
