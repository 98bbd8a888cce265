//! Connections of routes with `engine = "sockmap"`: joined when it is worth it, looked at when the kernel calls.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use proxy_core::{
    flow::Side,
    reason::Reason,
    session::{State, Tick},
};
use rustix::{
    io::Errno,
    time::{ClockId, clock_gettime},
};

use super::{Fate, Worker};
use crate::{
    kernel::sockmap::Sockmap,
    stream::{
        flow::Flow,
        poll::Source,
        relay::{
            Broken, Means, Moved, Waiting,
            sockmap::{Interest, Joined, Stop},
        },
    },
};

/// A connection is joined after so many turns: a short one never pays the thirty system calls that it takes.
const WORTH: u8 = 16;
/// Not joined, and not tried again.
const NEVER: u8 = u8::MAX;
/// Looks that follow each other at once, …
const AT_ONCE: u32 = 4;
/// … and those that follow a little later; then they follow much later.
const SOON: u32 = 64;
const LITTLE: u64 = 1000;
const MUCH: Duration = Duration::from_millis(50);
/// From one count of all joined connections to the next, in microseconds: what readers see is so old.
const COUNTED_EVERY: u64 = 1_000_000;
/// Bytes of all joined connections of a worker that may wait beyond what their windows allow. Then the one with most is ended, until
/// the rest fits.
const BEYOND: u64 = 64 << 20;

/// What a worker remembers of its joined connections.
#[derive(Debug, Default)]
pub(super) struct Joins {
    open: usize,
    /// Keys of flows, by index of a channel.
    by_index: Vec<u32>,
    /// Flows to be looked at soon.
    soon: Vec<u32>,
    soon_at: Option<u64>,
    count_at: Option<u64>,
    /// `CLOCK_MONOTONIC` in nanoseconds at the worker's time 0.
    origin: u64,
}

impl Joins {
    /// When something is to be done, on the worker's clock.
    pub(super) fn due(&self) -> Option<u64> {
        [self.soon_at, self.count_at].into_iter().flatten().min()
    }
}

impl Worker {
    /// From here on connections can be joined.
    pub(super) fn take_maps(&mut self, map: Sockmap) {
        if let Err(errno) = self.poll.add_level(map.calls(), Source::Calls) {
            tracing::warn!(%errno, "no sockets can be joined: splice and copy serve instead");
            return;
        }
        let now = clock_gettime(ClockId::Monotonic);
        let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        self.joins.origin = now - self.shared.began.elapsed().as_nanos() as u64;
        self.joins.by_index = vec![u32::MAX; map.sockets() as usize];
        self.stores.sockmap = Some(map);
    }

    /// Called when the connection has carried something.
    pub(super) fn join_when_worth_it(&mut self, key: u32, flow: &mut Flow) {
        if flow.turns < WORTH {
            flow.turns += 1;
            return;
        }
        let (Some(map), Some(backend)) = (&mut self.stores.sockmap, &flow.backend) else {
            return self.splice_when_worth_it(flow);
        };
        let ended = [&flow.client, backend].iter().any(|s| s.finished || s.hung_up || s.failed || s.urgent);
        let whole = matches!(flow.session.state(), State::Established { .. }) && !flow.up.ended && !flow.down.ended;
        if flow.turns == NEVER || !whole || ended {
            return self.splice_when_worth_it(flow);
        }
        if [&flow.up, &flow.down].iter().any(|way| !matches!(way.waiting, Waiting::Nothing)) {
            // Its reader is slow: it would only be passed to the daemon again.
            return;
        }
        match Joined::new(map, &flow.client, backend, self.micros) {
            Ok(joined) => {
                for index in joined.indexes() {
                    if let Some(place) = self.joins.by_index.get_mut(index as usize) {
                        *place = key;
                    }
                }
                flow.joined = Some(Box::new(joined));
                self.joins.open += 1;
                self.joins.count_at.get_or_insert(self.micros + COUNTED_EVERY);
                self.promote(flow, Means::Sockmap);
                if !flow.queued {
                    flow.queued = true;
                    self.queue.push_back(key);
                }
            }
            Err(Errno::AGAIN) => {}
            Err(errno) => {
                tracing::debug!(%errno, client = %flow.client_address, "not joined");
                flow.turns = NEVER;
            }
        }
    }

    /// One turn of a joined connection, or why it must end.
    #[expect(clippy::type_complexity, reason = "as the pumps of the other engines answer")]
    pub(super) fn turn_joined(
        &mut self,
        key: u32,
        flow: &mut Flow,
    ) -> Result<(Result<Moved, Broken>, Result<Moved, Broken>), Reason> {
        let (Some(joined), Some(backend)) = (&mut flow.joined, &mut flow.backend) else {
            return Err(Reason::InternalError);
        };
        let turn = joined.turn(&mut flow.client, backend, (&mut flow.up, &mut flow.down), &mut self.stores);
        let turn = match turn {
            Ok(turn) => turn,
            Err(Stop::Broken(broken)) => return Ok((Err(broken), Ok(Moved::default()))),
            Err(Stop::Overflow) => {
                self.shared.pressure.overflowed[0].fetch_add(1, Relaxed);
                return Err(Reason::Killed);
            }
            Err(Stop::Fault(fault)) => {
                tracing::error!(fault, client = %flow.client_address, "the kernel's count of a joined connection is wrong");
                return Err(Reason::InternalError);
            }
        };
        let looks = joined.looked(turn.look && turn.up.bytes + turn.down.bytes == 0);
        let (mut up, down) = (turn.up, turn.down);
        match turn.look {
            true if looks < AT_ONCE => up.again = true,
            true if looks < SOON => {
                self.joins.soon.push(key);
                self.joins.soon_at.get_or_insert(self.micros + LITTLE);
            }
            true => joined.look_at = Some(Tick(self.micros / 1000).after(MUCH)),
            false => {}
        }
        let wanted = joined.interests(&flow.up, &flow.down);
        let watched = std::mem::replace(&mut joined.watched, wanted);
        for (side, was, is) in [(Side::Client, watched[0], wanted[0]), (Side::Backend, watched[1], wanted[1])] {
            if was != is {
                self.watch(key, flow, side, is);
            }
        }
        if turn.look && looks >= SOON {
            self.arm(key, flow);
        }
        Ok((Ok(up), Ok(down)))
    }

    fn watch(&self, key: u32, flow: &mut Flow, side: Side, interest: Interest) {
        let source = flow.source(key, side);
        if let Some(socket) = flow.socket(side)
            && let Err(errno) = self.poll.change_flow(&socket.fd, source, interest)
        {
            tracing::error!(%errno, "epoll_ctl");
        }
    }

    /// The kernel wants something for one or more of them.
    pub(super) fn called(&mut self) {
        while let Some(index) = self.stores.sockmap.as_mut().and_then(Sockmap::next_call) {
            let Some(&key) = self.joins.by_index.get(index as usize) else { continue };
            self.look(key, Some(index));
        }
    }

    pub(super) fn look_again(&mut self) {
        if self.joins.soon_at.is_some_and(|at| at <= self.micros) {
            self.joins.soon_at = None;
            for key in std::mem::take(&mut self.joins.soon) {
                self.look(key, None);
            }
        }
        if self.joins.count_at.is_some_and(|at| at <= self.micros) {
            self.count_all();
            self.joins.count_at = (self.joins.open > 0).then_some(self.micros + COUNTED_EVERY);
        }
    }

    /// `index`: only if it is of this flow.
    fn look(&mut self, key: u32, index: Option<u32>) {
        self.with(key, |worker, flow| {
            let Some(joined) = &flow.joined else { return Fate::Lives };
            match index {
                Some(index) if !joined.indexes().contains(&index) => Fate::Lives,
                Some(_) | None => worker.relay(key, flow),
            }
        });
    }

    /// Brings the counters of all joined connections up to date, and ends the worst when all hold too much.
    pub(super) fn count_all(&mut self) {
        let Some(map) = self.stores.sockmap.as_ref().filter(|_| self.joins.open > 0) else { return };
        // Most connections are idle: they cost a look at what the kernel counts, and nothing more.
        let moved = |flow: &Flow| flow.joined.as_ref().is_some_and(|joined| !joined.is_counted(map));
        let keys: Vec<u32> = self.flows.iter().filter(|(_, flow)| moved(flow)).map(|(key, _)| key).collect();
        let (mut all, mut worst) = (0, (0, None));
        for key in keys {
            self.with(key, |worker, flow| {
                let held = worker.take_count(flow);
                all += held;
                worst = worst.max((held, Some(key)));
                Fate::Lives
            });
        }
        if let (true, Some(key)) = (all > BEYOND, worst.1) {
            self.shared.pressure.overflowed[1].fetch_add(1, Relaxed);
            self.with(key, |worker, flow| worker.step(key, flow, proxy_core::session::Event::Cut(Reason::Killed)));
            self.joins.count_at = Some(self.micros + LITTLE);
        }
    }

    /// Counts what the kernel has moved of a connection. The bytes it holds.
    pub(super) fn take_count(&mut self, flow: &mut Flow) -> u64 {
        let (Some(joined), Some(map)) = (&mut flow.joined, &self.stores.sockmap) else { return 0 };
        let before = (flow.up.bytes, flow.down.bytes);
        let (last, held) = joined.count(map, &mut flow.up, &mut flow.down);
        let (bytes_in, bytes_out) = (flow.up.bytes - before.0, flow.down.bytes - before.1);
        let moved = Tick(last.saturating_sub(self.joins.origin) / 1_000_000);
        if moved > flow.session.last_activity() {
            flow.session.moved(moved);
        }
        let meter = &self.slots[flow.slot].meter.engines[super::meter_slot(flow.means)];
        meter.bytes_in.add(bytes_in);
        meter.bytes_out.add(bytes_out);
        held
    }

    /// The sockets are closed next.
    pub(super) fn unjoin(&mut self, flow: &mut Flow) {
        if let (Some(joined), Some(map)) = (&flow.joined, &mut self.stores.sockmap) {
            joined.leave(map, self.micros);
            self.joins.open -= 1;
        }
    }
}
