//! `FLOWS`, mapped into this process: flows are read and set without a system call.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use proxy_abi::handoff::{HandoffFlow, OWNER_BYTES, gate, seen};

use super::{Boundary, Gate, PassedOn, first_of};

/// The array, mapped. Every access is one to memory that the program, and other processes, may change at any time: by value, volatile.
#[derive(Debug)]
pub struct Flows {
    first: NonNull<HandoffFlow>,
    count: u32,
}

// SAFETY: the memory is shared with the kernel anyway; it is accessed by value only, never through references, and lives until drop.
unsafe impl Send for Flows {}
// SAFETY: as above.
unsafe impl Sync for Flows {}

impl Flows {
    /// Maps an array of `count` elements.
    pub fn map(array: BorrowedFd<'_>, count: u32) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let address = unsafe {
            libc::mmap(ptr::null_mut(), Self::bytes(count), protection, libc::MAP_SHARED, array.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let first = NonNull::new(address.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Self { first, count })
    }

    pub const fn count(&self) -> u32 {
        self.count
    }

    /// As it is now: fields of different moments, each of them whole.
    pub fn get(&self, gate: Gate) -> Option<HandoffFlow> {
        let flow = self.element(gate)?;
        // SAFETY: an aligned element of the mapping, of which every bit pattern is a value.
        Some(unsafe { flow.as_ptr().read_volatile() })
    }

    /// The id alone: 0 where there is no flow.
    pub fn id(&self, gate: Gate) -> u64 {
        // SAFETY: as in `get`.
        self.element(gate).map_or(0, |flow| unsafe { (&raw const (*flow.as_ptr()).id).read_volatile() })
    }

    /// Replaces it. Only where no program looks: its gate is closed, or it has no entries.
    pub fn set(&self, gate: Gate, value: HandoffFlow) {
        if let Some(flow) = self.element(gate) {
            // SAFETY: as in `get`.
            unsafe { flow.as_ptr().write_volatile(value) };
        }
    }

    pub fn set_owner(&self, gate: Gate, owner: [u8; OWNER_BYTES]) {
        if let Some(flow) = self.element(gate) {
            // SAFETY: as in `get`; the program does not touch these bytes.
            unsafe { (&raw mut (*flow.as_ptr()).owner).write_volatile(owner) };
        }
    }

    /// Writes the boundaries, then the word that makes them count.
    pub fn open(&self, gate: Gate, at: [Boundary; 2]) {
        if let Some(mut flow) = self.get(gate) {
            for (end, at) in flow.ends.iter_mut().zip(at) {
                at.write_to(end);
            }
            self.set(gate, flow);
            self.switch(gate, gate::OPEN);
        }
    }

    /// Raises the end's `end_seq` to what was passed on of it, if the program has not, and the other's boundary.
    pub fn passed_on(&self, gate: Gate, end: usize, what: PassedOn) {
        let (Some(flow), Some(now)) = (self.element(gate), self.get(gate)) else { return };
        let (this, other) = if end == 0 { (0, 1) } else { (1, 0) };
        let [first, second] = &now.ends;
        let (from, to) = if end == 0 { (first, second) } else { (second, first) };
        let bytes = u64::from(from.first_seq) + what.bytes;
        // SAFETY: aligned words of ends that exist, which live as long as `self`. The program writes `end_seq` plainly, and only ever
        // something larger: for what comes behind these bytes. It reads `own_seq`. Before it has seen a FIN it does not write `fin_end`.
        let (end_seq, own_seq, fin_end, bits, closing) = unsafe {
            let flow = flow.as_ptr();
            (
                AtomicU64::from_ptr(&raw mut (*flow).ends[this].end_seq),
                AtomicU32::from_ptr(&raw mut (*flow).ends[other].own_seq),
                AtomicU32::from_ptr(&raw mut (*flow).ends[this].fin_end),
                AtomicU32::from_ptr(&raw mut (*flow).ends[this].seen),
                AtomicU32::from_ptr(&raw mut (*flow).closing),
            )
        };
        let _ = end_seq.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now < bytes).then_some(bytes));
        own_seq.store(what.own_seq, Ordering::Release);
        if what.finished {
            fin_end.store(what.fin_end(from.first_seq), Ordering::Relaxed);
            bits.fetch_or(seen::FIN, Ordering::Release);
            closing.fetch_or(first_of(end, to), Ordering::Relaxed);
        }
    }

    /// The one word.
    pub fn switch(&self, gate: Gate, word: u32) {
        if let Some(flow) = self.element(gate) {
            // SAFETY: an aligned word of the mapping, which lives as long as `self`; other writers of it are atomic too.
            unsafe { AtomicU32::from_ptr(&raw mut (*flow.as_ptr()).gate) }.store(word, Ordering::Release);
        }
    }

    fn element(&self, gate: Gate) -> Option<NonNull<HandoffFlow>> {
        // SAFETY: an index below the number of elements of the mapping.
        (gate.0 < self.count).then(|| unsafe { self.first.add(gate.0 as usize) })
    }

    const fn bytes(count: u32) -> usize {
        // The kernel maps whole pages; mmap rounds up.
        count as usize * size_of::<HandoffFlow>()
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, unmapped once.
        unsafe { libc::munmap(self.first.as_ptr().cast(), Self::bytes(self.count)) };
    }
}
