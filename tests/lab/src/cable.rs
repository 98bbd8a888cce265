//! A link whose frames pass through our hands: delayed, reordered, lost, or held back until it is their moment. Needs no netem.
//!
//! Both ends are TAP devices, each in the namespace of its host. What a host sends is read here, and what is put here arrives there
//! before [`Ends::put`] returns: ingress programs, and mostly the stack too, are done with it.

mod tap;
mod weather;

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use weather::Weather;

use self::tap::Tap;
use crate::host::Host;

/// Which way a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the client or backend.
    ToGateway,
    FromGateway,
}

/// What becomes of the frames.
pub trait Carry: Send {
    /// A frame has come. Whoever wants it to arrive puts it, now or at a [`Self::tick`].
    fn take(&mut self, way: Way, frame: Vec<u8>, ends: &Ends);

    /// After frames have come, and when it is due.
    fn tick(&mut self, _ends: &Ends) {}

    /// When [`Self::tick`] wants to be called next; in the past: all the time.
    fn due(&self) -> Option<Instant> {
        None
    }
}

/// Everything arrives at once.
struct Plain;

impl Carry for Plain {
    fn take(&mut self, way: Way, frame: Vec<u8>, ends: &Ends) {
        ends.put(way, &frame);
    }
}

/// Both ends of a cable.
#[derive(Debug)]
pub struct Ends {
    gateway: Tap,
    host: Tap,
}

impl Ends {
    /// The frame arrives. Like a wire, it does not tell whether anybody took it.
    pub fn put(&self, way: Way, frame: &[u8]) {
        let to = match way {
            Way::ToGateway => &self.gateway,
            Way::FromGateway => &self.host,
        };
        // Refused where the device is down.
        let _ = to.write(frame);
    }
}

/// A link between the gateway and another host, which goes when it is dropped.
pub struct Cable {
    carrier: Arc<Mutex<Box<dyn Carry>>>,
    /// Its other end hangs up when this one is closed.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Cable {
    /// Makes `gateway_device` on the gateway and `eth0` on the host, both down.
    pub(crate) fn lay(gateway: &Host, gateway_device: &str, host: &Host) -> Result<Self> {
        let ends = Ends { gateway: Tap::open(gateway, gateway_device)?, host: Tap::open(host, "eth0")? };
        let carrier: Arc<Mutex<Box<dyn Carry>>> = Arc::new(Mutex::new(Box::new(Plain)));
        let (stop, stopped) = UnixStream::pair().context("socketpair")?;
        let shared = Arc::clone(&carrier);
        let thread = thread::spawn(move || run(&ends, &stopped, &shared));
        Ok(Self { carrier, stop: Some(stop), thread: Some(thread) })
    }

    /// From the next frame on. What the one before still had is lost.
    pub fn carry(&self, carrier: impl Carry + 'static) {
        *lock(&self.carrier) = Box::new(carrier);
    }

    /// As it was in the beginning.
    pub fn carry_all(&self) {
        self.carry(Plain);
    }
}

impl std::fmt::Debug for Cable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cable").finish_non_exhaustive()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(ends: &Ends, stopped: &UnixStream, carrier: &Mutex<Box<dyn Carry>>) {
    let mut due = None;
    loop {
        let mut ready = [&ends.gateway, &ends.host].map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN)).to_vec();
        ready.push(PollFd::new(stopped.as_fd(), PollFlags::POLLIN));
        // Interrupted, or out of time: both are a look at what is there.
        let _ = poll(&mut ready, until(due));
        if ready[2].any().unwrap_or(true) {
            return;
        }
        let mut carrier = lock(carrier);
        for (tap, way) in [(&ends.gateway, Way::FromGateway), (&ends.host, Way::ToGateway)] {
            // As many as fit into a queue: the other way has its turn too.
            for _ in 0..64 {
                let Some(frame) = tap.read() else { break };
                carrier.take(way, frame, ends);
            }
        }
        carrier.tick(ends);
        due = carrier.due();
    }
}

/// `poll` counts in milliseconds: below one it does not wait, as a frame that is to be late by 200 µs shall not be by 1 ms.
fn until(due: Option<Instant>) -> PollTimeout {
    let left = due.map(|due| due.saturating_duration_since(Instant::now()));
    left.map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
