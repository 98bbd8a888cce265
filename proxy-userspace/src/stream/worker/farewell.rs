//! Sockets whose peer has been told why this is the end, and may still be writing.
//!
//! What comes for a closed socket is answered with a reset (RFC 1122 §4.2.2.13), and a peer that meets it while it writes does
//! not read any more why. So only our direction is closed; what still comes is thrown away for a moment.

use std::{collections::VecDeque, os::fd::OwnedFd, sync::atomic::Ordering::Relaxed};

use rustix::{
    io::Errno,
    net::{RecvFlags, Shutdown, recv, shutdown},
};

use super::Worker;
use crate::stream::{flow::Flow, socket::Socket};

/// Whoever has not read it by then, in microseconds, does not want to.
const LONGEST: u64 = 2_000_000;
/// … and who has sent so many bytes meanwhile does not look.
const MOST: usize = 1 << 20;
/// Looked at so often, in microseconds.
const PAUSE: u64 = 20_000;
/// At a time; then the oldest goes.
const TOGETHER: usize = 1024;

/// Those of a worker, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Farewells {
    all: VecDeque<Farewell>,
    look_at: u64,
}

#[derive(Debug)]
struct Farewell {
    fd: OwnedFd,
    until: u64,
    /// Bytes that are still read.
    left: usize,
}

impl Farewells {
    /// When something is to be done, on the worker's clock.
    pub(super) fn due(&self) -> Option<u64> {
        (!self.all.is_empty()).then_some(self.look_at)
    }
}

impl Worker {
    /// Closes what the flow leaves, at once or when the peer has had the time to read our last words.
    pub(super) fn part_from(&mut self, flow: Flow) {
        for socket in [Some(flow.client), flow.backend].into_iter().flatten().filter(|socket| socket.told) {
            self.bid_farewell(socket);
        }
    }

    fn bid_farewell(&mut self, socket: Socket) {
        if shutdown(&socket.fd, Shutdown::Write).is_err() {
            return;
        }
        let mut farewell = Farewell { fd: socket.fd, until: self.micros + LONGEST, left: MOST };
        if farewell.is_over(self.stores.buffers.scratch()) {
            return;
        }
        self.poll.remove(&farewell.fd);
        if self.farewells.all.len() >= TOGETHER && self.farewells.all.pop_front().is_some() {
            self.shared.open.fetch_sub(1, Relaxed);
        }
        if self.farewells.all.is_empty() {
            self.farewells.look_at = self.micros + PAUSE;
        }
        self.shared.open.fetch_add(1, Relaxed);
        self.farewells.all.push_back(farewell);
    }

    pub(super) fn look_after_farewells(&mut self) {
        let now = self.micros;
        if self.farewells.due().is_none_or(|due| due > now) {
            return;
        }
        let (scratch, before) = (self.stores.buffers.scratch(), self.farewells.all.len());
        self.farewells.all.retain_mut(|one| one.until > now && !one.is_over(scratch));
        self.shared.open.fetch_sub((before - self.farewells.all.len()) as u64, Relaxed);
        self.farewells.look_at = now + PAUSE;
    }
}

impl Farewell {
    /// Throws away what has come. True when nothing more will come, or too much has.
    fn is_over(&mut self, scratch: &mut [u8]) -> bool {
        while self.left > 0 {
            // Of a stream `MSG_TRUNC` copies nothing (tcp(7)).
            match recv(&self.fd, &mut *scratch, RecvFlags::TRUNC | RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return true,
                Ok((_, read)) => self.left = self.left.saturating_sub(read),
                Err(Errno::AGAIN) => return false,
                Err(Errno::INTR) => {}
                Err(_) => return true,
            }
        }
        true
    }
}
