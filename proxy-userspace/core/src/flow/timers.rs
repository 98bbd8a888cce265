//! When a flow must be cut by the daemon.
//!
//! Every dump passes all active flows anyway, so only what falls due before the next one needs a timer: the heap holds
//! those and nothing else, however many flows have a limit hours away.

use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

use super::{
    record::{FlowId, Now, Record, State},
    route::RouteInfo,
};
use crate::reason::Reason;

#[derive(Debug, Default)]
pub(super) struct Timers {
    due: BinaryHeap<Reverse<(Duration, FlowId)>>,
    /// Deadlines after this are left to a later dump.
    horizon: Duration,
}

impl Timers {
    /// A new pass over all active flows begins; the next one is expected before `horizon`.
    pub(super) fn restart(&mut self, horizon: Duration) {
        self.due.clear();
        self.horizon = horizon;
    }

    pub(super) fn watch(&mut self, record: &Record, route: &RouteInfo) {
        if let Some((at, _)) = deadline(record, route).filter(|(at, _)| *at <= self.horizon) {
            self.due.push(Reverse((at, record.id)));
        }
    }

    /// The next flow whose time has come. The caller asks [`deadline`] again: it may have moved.
    pub(super) fn pop(&mut self, now: Now) -> Option<FlowId> {
        let Reverse((at, _)) = self.due.peek()?;
        if *at > now.mono {
            return None;
        }
        self.due.pop().map(|Reverse((_, id))| id)
    }

    pub(super) fn next(&self) -> Option<Duration> {
        self.due.peek().map(|Reverse((at, _))| *at)
    }
}

/// When the daemon must cut this flow, and why. Limits that the kernel enforces are not here.
pub(super) fn deadline(record: &Record, route: &RouteInfo) -> Option<(Duration, Reason)> {
    let quiet = |limit: Option<Duration>| limit.filter(|_| !route.kernel_timeouts).map(|l| record.last_activity + l);
    let silence = match record.state {
        State::Established => quiet(route.idle).map(|at| (at, Reason::IdleTimeout)),
        State::HalfClosed { .. } => quiet(route.half_closed).map(|at| (at, Reason::HalfClosedTimeout)),
        // The kernel's own timeout for an unanswered SYN ends a dial.
        State::Dialing => None,
        State::Closing { .. } => return None,
    };
    let lifetime = route.lifetime.map(|limit| (record.start + limit, Reason::LifetimeExceeded));
    [lifetime, silence].into_iter().flatten().min_by_key(|(at, _)| *at)
}
