//! Two joined sockets: value of the map `CHANNELS`, one element per direction.
//!
//! Each half has one writer: the verdict of one socket runs under that socket's lock, and the daemon has one thread per
//! map. So neither needs a lock or an atomic operation; every field is a whole aligned word.

/// What [`Judged::fault`] says while all is well.
pub const NO_FAULT: u32 = 0;
/// Bytes that had come before could not be cut off: what follows would be wrong.
pub const FAULT_TRIM: u32 = 1;
/// Bytes are missing between two pieces.
pub const FAULT_GAP: u32 = 2;
/// More than [`Allowed::hard`] bytes were passed and not relayed.
pub const FAULT_OVERFLOW: u32 = 3;

/// Written by the verdict.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Judged {
    /// Bytes handed to the other socket.
    pub redirected: u64,
    /// Bytes left to the daemon, those that were read before the join and came again among them.
    pub passed: u64,
    /// When the last byte came: nanoseconds of `CLOCK_MONOTONIC`.
    pub last: u64,
    /// The [`Allowed::epoch`] in which the daemon has been told.
    pub told: u64,
    /// Bytes cut off because they had come before.
    pub trimmed: u64,
    /// TCP sequence number of the next byte; meaningless until `started`.
    pub next: u32,
    /// The first piece has come.
    pub started: u32,
    /// [`NO_FAULT`], or why nothing more may be moved.
    pub fault: u32,
    pub reserved: u32,
    pub reserved_too: u64,
}

/// Written by the daemon.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allowed {
    /// [`Judged::redirected`] may grow up to here.
    pub granted: u64,
    /// How many of [`Judged::passed`] have been dealt with.
    pub relayed: u64,
    /// The daemon wants to be told when so many bytes have been redirected …
    pub wake_at: u64,
    /// … or when something is passed, unless this is 0: once for each value.
    pub epoch: u64,
    /// Passed and not relayed at most.
    pub hard: u64,
    pub reserved: [u64; 3],
}

/// One direction. A cache line for each writer.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Channel {
    pub judged: Judged,
    pub allowed: Allowed,
}

const _: () = assert!(size_of::<Judged>() == 64);
const _: () = assert!(size_of::<Allowed>() == 64);
const _: () = assert!(size_of::<Channel>() == 128);
