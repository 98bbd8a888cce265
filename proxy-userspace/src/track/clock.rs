//! Both clocks, as the flow table wants them.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proxy_core::flow::Now;

/// Where the monotonic scale stands at the daemon's start: flows older than the daemon have a place before it.
const START: Duration = Duration::from_secs(1 << 30);

/// Cheap to copy; copies agree.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started: Instant,
}

impl Clock {
    pub fn start() -> Self {
        Self { started: Instant::now() }
    }

    pub fn now(&self) -> Now {
        Now {
            mono: self.at(Instant::now()),
            // A wall clock before 1970 is a clock not set yet.
            wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        }
    }

    /// A point in time on the flow table's scale.
    pub fn at(&self, instant: Instant) -> Duration {
        START + instant.saturating_duration_since(self.started)
    }

    pub fn instant(&self, at: Duration) -> Instant {
        self.started + at.saturating_sub(START)
    }
}
