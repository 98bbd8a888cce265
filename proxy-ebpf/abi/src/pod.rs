//! [`aya::Pod`] for the types that live in maps.

use crate::{
    flow::{Endpoint, FlowCounters, FlowKey, Traffic},
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
