//! The clock of the packet level: milliseconds since the machine was started, the same for every daemon that runs on it.

use std::time::{Duration, Instant};

use proxy_core::session::Tick;
use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC`, which is what `Instant` is made of too: copies agree.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin: Instant,
    /// Milliseconds on the kernel's clock at `origin`.
    at: u64,
}

impl Clock {
    pub fn start() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        let since = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
        Self { origin: Instant::now(), at: since.as_millis() as u64 }
    }

    pub fn now(&self) -> Tick {
        self.tick(Instant::now())
    }

    pub fn tick(&self, instant: Instant) -> Tick {
        match instant.checked_duration_since(self.origin) {
            Some(later) => Tick(self.at).after(later),
            None => Tick(self.at.saturating_sub(self.origin.duration_since(instant).as_millis() as u64)),
        }
    }

    pub fn instant(&self, tick: Tick) -> Instant {
        self.origin + tick.since(Tick(self.at))
    }
}

/// What the program writes: nanoseconds; 0 is never.
pub fn tick_of(nanoseconds: u64) -> Tick {
    Tick(nanoseconds / 1_000_000)
}
