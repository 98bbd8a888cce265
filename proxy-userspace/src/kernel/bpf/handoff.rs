//! Handed-over flows in the kernel: the maps of `handoff.bpf.o`, their pins, and the interfaces its program is attached to
//! (docs/handoff.md).
//!
//! The life of a flow here: [`HandoffStore::insert`] (armed: packets go to the stack) → [`HandoffStore::open_gate`] (committed: both
//! directions are translated, at once) → [`HandoffStore::leave`] (the sockets are about to go) → … the program sets
//! [`HandoffFlow::closing`] and sends one [`HandoffEvent`] … → [`HandoffStore::remove`].

mod error;
mod flows;
mod links;
mod memory;
mod object;
mod probe;
mod qdisc;
mod table;

use std::os::fd::BorrowedFd;

use proxy_abi::handoff::{
    FROM_BACKEND, FROM_CLIENT, HandoffEnd, HandoffEntry, HandoffEvent, HandoffFlow, HandoffKey, OWNER_BYTES, closing,
    seen,
};

pub use error::{HandoffError, InsertError};
pub use memory::MemoryHandoffs;
pub use probe::HandoffProbe;
pub use table::{HandoffTable, Sizes};

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of everything in the maps.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a place for the answer; this clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A flow's index in `FLOWS`, its own from [`HandoffStore::insert`] to [`HandoffStore::remove`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gate(pub u32);

/// A flow to be armed.
#[derive(Debug, Clone, Copy)]
pub struct NewFlow {
    /// Not 0. In [`HandoffFlow::id`] and every event.
    pub id: u64,
    /// In [`HandoffFlow::owner`]: what a daemon wants to find after a restart.
    pub owner: [u8; OWNER_BYTES],
    /// For packets from the client, for packets from the backend. `flow` and `direction` of the entries are filled in.
    pub entries: [(HandoffKey, HandoffEntry); 2],
    /// Where the client and the backend are expected, 0 = not known: [`proxy_abi::handoff::HandoffEnd::ifindex`].
    pub interfaces: [u32; 2],
}

/// What our socket to one end had written and received at commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boundary {
    /// The sequence number after the last byte that our socket will have written to this end, with those that wait to be.
    pub own_seq: u32,
    /// The sequence number of the next byte from this end that was not read.
    pub first_seq: u32,
    /// The sequence number up to which the end has acknowledged what our socket wrote.
    pub acked: u32,
}

/// What the daemon itself takes from one end to the other after commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassedOn {
    /// Payload since commit.
    pub bytes: u64,
    /// Behind all of that: the sequence number of our socket to the other end.
    pub own_seq: u32,
    /// The end's FIN came behind these bytes.
    pub finished: bool,
}

/// A flow that is in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    pub gate: Gate,
    /// As it was when it was looked at: the program goes on.
    pub flow: HandoffFlow,
}

/// The table of handed-over flows: [`HandoffTable`] in the kernel, [`MemoryHandoffs`] for tests. Shared by all workers.
pub trait HandoffStore: Send + Sync {
    /// Arms a flow: both entries are there, its gate is closed.
    ///
    /// # Errors
    /// [`InsertError::Full`], [`InsertError::Taken`] when a flow of the same addresses and ports is there (over or not:
    /// [`HandoffStore::entry`] says which), [`InsertError::Kernel`]. Nothing is left behind.
    fn insert(&self, flow: &NewFlow) -> Result<Gate, InsertError>;

    /// Commits: from now on both directions are translated. `at`: client and backend. One store of a word after those it depends on.
    fn open_gate(&self, gate: Gate, at: [Boundary; 2]);

    /// After commit the daemon itself passes on what is in its sockets: of that end (0: client, 1: backend), so much in all. It counts,
    /// and the other end may acknowledge it: to our socket. Call it before it is written.
    ///
    /// The program may write the word with [`seen::FIN`] at the same time, and win: the caller looks, and calls again.
    fn passed_on(&self, gate: Gate, end: usize, what: PassedOn);

    /// Says that both sockets are about to go: nothing is for the stack any more. Call it before they are closed.
    fn leave(&self, gate: Gate);

    /// Packets go to the stack again. Only right while nothing was translated, or after the flow is over.
    fn close_gate(&self, gate: Gate);

    /// The flow as it is now, without a system call; [`HandoffFlow::EMPTY`] where there is none.
    fn flow(&self, gate: Gate) -> HandoffFlow;

    /// Replaces [`HandoffFlow::owner`].
    fn set_owner(&self, gate: Gate, owner: [u8; OWNER_BYTES]);

    /// How packets of that key are translated.
    fn entry(&self, key: &HandoffKey) -> Option<HandoffEntry>;

    /// Takes the flow out, whatever its state: its last state, `None` when there was none. Packets that still come are for the stack.
    fn remove(&self, gate: Gate) -> Option<HandoffFlow>;

    /// Every flow in the table, in the order of gates. No system call: 100,000 are some milliseconds.
    fn walk(&self) -> Vec<Found>;

    /// How many flows there are, and how many there can be.
    fn used(&self) -> (u32, u32);

    /// The next event, `None` when there is none now. One reader.
    fn next_event(&self) -> Option<HandoffEvent>;

    /// Readable when there are events (level-triggered `poll`, or edge-triggered after [`HandoffStore::next_event`] said `None`).
    fn events_fd(&self) -> BorrowedFd<'_>;
}

impl PassedOn {
    /// The sequence number after the end's FIN.
    const fn fin_end(self, first_seq: u32) -> u32 {
        first_seq.wrapping_add(self.bytes as u32).wrapping_add(1)
    }
}

impl Boundary {
    /// Into the end's record, before the gate opens.
    fn write_to(self, end: &mut HandoffEnd) {
        end.own_seq = self.own_seq;
        end.first_seq = self.first_seq;
        end.end_seq = u64::from(self.first_seq);
        end.fin_end = self.first_seq;
        end.ack = self.acked;
    }
}

/// Which bit of `closing` a FIN of that end sets, when the other end is known to be so far.
const fn first_of(end: usize, other: &HandoffEnd) -> u32 {
    match (other.seen & seen::FIN, end) {
        (0, 0) => closing::CLIENT_FIRST,
        (0, _) => closing::BACKEND_FIRST,
        _ => 0,
    }
}

/// The flow's element and its entries, as they are inserted.
fn prepared(new: &NewFlow, gate: u32) -> (HandoffFlow, [(HandoffKey, HandoffEntry); 2]) {
    let [(from_client, there), (from_backend, back)] = new.entries;
    let mut flow = HandoffFlow { id: new.id, key: from_client, owner: new.owner, ..HandoffFlow::EMPTY };
    for (end, ifindex) in flow.ends.iter_mut().zip(new.interfaces) {
        end.ifindex = ifindex;
    }
    let there = HandoffEntry { flow: gate, direction: FROM_CLIENT, ..there };
    let back = HandoffEntry { flow: gate, direction: FROM_BACKEND, ..back };
    (flow, [(from_client, there), (from_backend, back)])
}

#[cfg(test)]
mod tests;
