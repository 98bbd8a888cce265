//! The table without a kernel, for tests of those who use it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use proxy_abi::handoff::{HandoffEntry, HandoffEvent, HandoffFlow, HandoffKey, OWNER_BYTES, gate, seen};
use rustix::event::{EventfdFlags, eventfd};

use super::{Boundary, Found, Gate, HandoffStore, InsertError, NewFlow, PassedOn, first_of, prepared};

/// A table in memory. A test plays the program: [`MemoryHandoffs::change`] and [`MemoryHandoffs::send`].
pub struct MemoryHandoffs {
    capacity: u32,
    state: Mutex<State>,
    ready: OwnedFd,
}

#[derive(Default)]
struct State {
    entries: HashMap<HandoffKey, HandoffEntry>,
    flows: BTreeMap<u32, HandoffFlow>,
    events: VecDeque<HandoffEvent>,
    next: u32,
}

impl MemoryHandoffs {
    /// # Errors
    /// Without descriptors left.
    pub fn new(capacity: u32) -> io::Result<Self> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { capacity, state: Mutex::default(), ready })
    }

    /// What the program would write into the flow.
    pub fn change(&self, gate: Gate, change: impl FnOnce(&mut HandoffFlow)) {
        if let Some(flow) = self.state().flows.get_mut(&gate.0) {
            change(flow);
        }
    }

    /// What the program would send.
    pub fn send(&self, event: HandoffEvent) {
        self.state().events.push_back(event);
        let _ = rustix::io::write(&self.ready, &1u64.to_ne_bytes());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HandoffStore for MemoryHandoffs {
    fn insert(&self, new: &NewFlow) -> Result<Gate, InsertError> {
        let mut state = self.state();
        if state.flows.len() >= self.capacity as usize {
            return Err(InsertError::Full { capacity: self.capacity });
        }
        if new.entries.iter().any(|(key, _)| state.entries.contains_key(key)) {
            return Err(InsertError::Taken);
        }
        let gate = (0..self.capacity).map(|n| (state.next + n) % self.capacity).find(|n| !state.flows.contains_key(n));
        let gate = gate.ok_or(InsertError::Full { capacity: self.capacity })?;
        state.next = gate + 1;
        let (flow, entries) = prepared(new, gate);
        state.entries.extend(entries);
        state.flows.insert(gate, flow);
        Ok(Gate(gate))
    }

    fn open_gate(&self, gate: Gate, at: [Boundary; 2]) {
        self.change(gate, |flow| {
            for (end, at) in flow.ends.iter_mut().zip(at) {
                at.write_to(end);
            }
            flow.gate = gate::OPEN;
        });
    }

    fn passed_on(&self, gate: Gate, end: usize, what: PassedOn) {
        self.change(gate, |flow| {
            let [client, backend] = &mut flow.ends;
            let (this, other) = if end == 0 { (client, backend) } else { (backend, client) };
            this.end_seq = this.end_seq.max(u64::from(this.first_seq) + what.bytes);
            other.own_seq = what.own_seq;
            if what.finished {
                this.fin_end = what.fin_end(this.first_seq);
                this.seen |= seen::FIN;
                flow.closing |= first_of(end, other);
            }
        });
    }

    fn leave(&self, gate: Gate) {
        self.change(gate, |flow| flow.gate = gate::ALONE);
    }

    fn close_gate(&self, gate: Gate) {
        self.change(gate, |flow| flow.gate = gate::CLOSED);
    }

    fn flow(&self, gate: Gate) -> HandoffFlow {
        self.state().flows.get(&gate.0).copied().unwrap_or(HandoffFlow::EMPTY)
    }

    fn set_owner(&self, gate: Gate, owner: [u8; OWNER_BYTES]) {
        self.change(gate, |flow| flow.owner = owner);
    }

    fn entry(&self, key: &HandoffKey) -> Option<HandoffEntry> {
        self.state().entries.get(key).copied()
    }

    fn remove(&self, gate: Gate) -> Option<HandoffFlow> {
        let mut state = self.state();
        state.entries.retain(|_, entry| entry.flow != gate.0);
        state.flows.remove(&gate.0)
    }

    fn walk(&self) -> Vec<Found> {
        self.state().flows.iter().map(|(gate, flow)| Found { gate: Gate(*gate), flow: *flow }).collect()
    }

    fn used(&self) -> (u32, u32) {
        (u32::try_from(self.state().flows.len()).unwrap_or(u32::MAX), self.capacity)
    }

    fn next_event(&self) -> Option<HandoffEvent> {
        let mut state = self.state();
        let event = state.events.pop_front();
        if event.is_none() {
            let _ = rustix::io::read(&self.ready, &mut [0u8; 8]);
        }
        event
    }

    fn events_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

impl fmt::Debug for MemoryHandoffs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryHandoffs").field("used", &self.used()).finish()
    }
}
