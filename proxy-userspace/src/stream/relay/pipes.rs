//! Pipes for `splice(2)`: two descriptors and up to 1 MiB of pages each, so a connection holds one only while bytes are in
//! it.

use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// Wanted size in bytes. Slots hold a fragment each, so a pipe of 64 KiB may be full at 23 KiB.
const SIZE: usize = 1 << 20;
/// Empty pipes kept for the next who needs one.
const KEPT: usize = 32;

#[derive(Debug)]
pub struct Pipe {
    pub read: OwnedFd,
    pub write: OwnedFd,
    /// Bytes to ask for at once.
    pub size: usize,
}

/// A pipe with bytes in it.
#[derive(Debug)]
pub struct Loaded {
    pub pipe: Pipe,
    pub bytes: usize,
}

#[derive(Debug)]
pub struct Pipes {
    spare: Vec<Pipe>,
    /// Pipes that exist, spare ones too.
    open: usize,
    max: usize,
}

impl Pipes {
    /// `max`: pipes of this worker at most.
    pub fn new(max: usize) -> Self {
        Self { spare: Vec::new(), open: 0, max }
    }

    /// `None` when there are no more to be had: the connection goes on in `copy`.
    pub fn take(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.spare.pop() {
            return Some(pipe);
        }
        if self.open >= self.max {
            return None;
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        self.open += 1;
        // Beyond `pipe-user-pages-soft` the kernel gives less.
        let size = fcntl_setpipe_size(&write, SIZE).unwrap_or(64 * 1024);
        Some(Pipe { read, write, size })
    }

    /// An empty pipe comes back.
    pub fn give_back(&mut self, pipe: Pipe) {
        if self.spare.len() < KEPT {
            self.spare.push(pipe);
        } else {
            self.open -= 1;
        }
    }

    /// One with bytes in it is of no use to others.
    pub fn forget(&mut self, loaded: Loaded) {
        drop(loaded);
        self.open -= 1;
    }
}
