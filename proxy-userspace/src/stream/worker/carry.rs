//! Bytes both ways, and the end.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use proxy_core::{
    config::Engine,
    flow::Side,
    reason::Reason,
    session::{Event, How},
};

use super::{Fate, NO_ROUTE, UNTOLD, Worker, engine_of, meter_slot, wall};
use crate::stream::{
    Ended,
    flow::Flow,
    meter::Shaken,
    relay::{Broken, Means, Waiting, Way},
    socket::Socket,
};

/// A flow of a `splice` route begins in `copy`, which is better for little, and is moved when it has carried so many bytes.
const PROMOTE_AFTER: u64 = 4 << 20;

impl Worker {
    /// Passes on what can be passed on, in both directions.
    pub(super) fn relay(&mut self, key: u32, flow: &mut Flow) -> Fate {
        if flow.is_handed_over() {
            return self.look_after(key, flow);
        }
        let Some(backend) = flow.backend.as_mut() else {
            return self.step(key, flow, Event::Cut(Reason::InternalError));
        };
        let before = (flow.up.bytes, flow.down.bytes);
        let (up, down) = match (&flow.tls, &flow.joined) {
            (Some(_), _) => self.pump_secured(flow),
            (None, Some(_)) => match self.turn_joined(key, flow) {
                Ok(moved) => moved,
                Err(reason) => return self.step(key, flow, Event::Cut(reason)),
            },
            (None, None) => {
                let up = flow.up.pump(flow.means, &mut flow.client, backend, &mut self.stores);
                // Also when the backend takes no more: its last words may be there.
                let down = match up {
                    Err(Broken::From) => Ok(Default::default()),
                    Ok(_) | Err(Broken::To) => flow.down.pump(flow.means, backend, &mut flow.client, &mut self.stores),
                };
                (up, down)
            }
        };
        self.count(key, flow, before);
        let (up, down) = match (up, down) {
            (Ok(up), Ok(down)) => (up, down),
            (Err(Broken::From), _) | (_, Err(Broken::To)) => return self.step(key, flow, Event::Reset(Side::Client)),
            (Err(Broken::To), _) | (_, Err(Broken::From)) => return self.step(key, flow, Event::Reset(Side::Backend)),
        };
        // Before a reset counts: one behind both ends, as of a peer that closes without reading `close_notify`, ends nothing.
        for (side, moved) in [(Side::Client, up), (Side::Backend, down)] {
            if moved.finished && self.step(key, flow, Event::Finished { side, silent: false }) == Fate::Over {
                return Fate::Over;
            }
        }
        // Also where nobody reads or writes any more, as behind a FIN or a stalled reader.
        let failed = |side, socket: &Socket| (socket.failed && !up.again && !down.again).then_some(side);
        let backend = flow.backend.as_ref().and_then(|backend| failed(Side::Backend, backend));
        if let Some(side) = failed(Side::Client, &flow.client).or(backend) {
            return self.step(key, flow, Event::Reset(side));
        }
        if (up.again || down.again) && !flow.queued {
            flow.queued = true;
            self.queue.push_back(key);
        }
        self.hand_over(key, flow)
    }

    fn count(&mut self, key: u32, flow: &mut Flow, (up, down): (u64, u64)) {
        let (bytes_in, bytes_out) = (flow.up.bytes - up, flow.down.bytes - down);
        if bytes_in + bytes_out == 0 {
            return;
        }
        flow.session.moved(self.now());
        let slot = &self.slots[flow.slot];
        let meter = &slot.meter.engines[meter_slot(flow.means)];
        meter.bytes_in.add(bytes_in);
        meter.bytes_out.add(bytes_out);
        match (slot.engine, flow.means) {
            (Engine::Sockmap, Means::Copy | Means::Splice) => self.join_when_worth_it(key, flow),
            (Engine::Splice | Engine::Handoff, Means::Copy) => self.splice_when_worth_it(flow),
            (Engine::Sockmap, Means::Sockmap)
            | (Engine::Splice | Engine::Handoff, Means::Splice | Means::Sockmap)
            | (Engine::Copy | Engine::Nft, _) => {}
        }
    }

    pub(super) fn splice_when_worth_it(&mut self, flow: &mut Flow) {
        if flow.means == Means::Copy && flow.up.bytes + flow.down.bytes >= PROMOTE_AFTER {
            self.promote(flow, Means::Splice);
        }
    }

    pub(super) fn promote(&mut self, flow: &mut Flow, means: Means) {
        let engines = &self.slots[flow.slot].meter.engines;
        engines[meter_slot(flow.means)].active.sub(1);
        flow.means = means;
        engines[meter_slot(means)].active.add(1);
        engines[meter_slot(means)].promoted.add(1);
    }

    /// Counts the end, tells it, and closes.
    pub(super) fn end(&mut self, flow: &mut Flow, reason: Reason, how: How) -> Fate {
        if let (Reason::ConnectTimeout, Some(backend)) = (reason, flow.backend_address) {
            self.tell_failed_dial(flow.slot, backend);
        }
        if reason == Reason::TlsHandshakeTimeout {
            self.handshake_ended(flow, Shaken::Timeout);
        }
        self.take_count(flow);
        self.unjoin(flow);
        self.stays(flow);
        let age = Duration::from_micros(self.micros.saturating_sub(flow.accepted));
        let slot = &mut self.slots[flow.slot];
        slot.open -= 1;
        let meter = &slot.meter.engines[meter_slot(flow.means)];
        if flow.slot == NO_ROUTE {
            meter.began.add(1);
        }
        meter.active.sub(1);
        meter.terminations[reason as usize].add(1);
        slot.meter.aged(age);
        if let (Some(admitted), Some(route)) = (flow.admitted.take(), &slot.route) {
            route.admission.leave(admitted);
        }
        self.report(flow, reason, age);
        for way in [&mut flow.up, &mut flow.down] {
            self.stores.release(way);
        }
        if how == How::Reset {
            flow.client.reset_on_close();
            if let Some(backend) = &flow.backend {
                backend.reset_on_close();
            }
        }
        flow.counted = None;
        self.shared.open.fetch_sub(1, Relaxed);
        self.look_whether_gone(flow.slot);
        Fate::Over
    }

    fn report(&mut self, flow: &Flow, reason: Reason, duration: Duration) {
        let ended = Ended {
            id: self.id(flow),
            route: self.slots[flow.slot].name.clone(),
            engine: engine_of(flow.means),
            client: flow.client_address,
            listen: flow.listen,
            backend: flow.backend_address,
            reason,
            at: wall(),
            duration,
            bytes_in: flow.up.bytes,
            bytes_out: flow.down.bytes,
        };
        if self.told.len() < UNTOLD {
            self.told.push(ended);
        } else {
            self.shared.pressure.unlogged.fetch_add(1, Relaxed);
        }
    }
}

impl crate::stream::relay::Stores {
    /// Takes back what a connection that ends still holds.
    fn release(&mut self, way: &mut Way) {
        match std::mem::take(&mut way.waiting) {
            Waiting::Nothing => {}
            Waiting::Bytes(held) => self.buffers.give_back(held),
            Waiting::Pipe(loaded) => self.pipes.forget(loaded),
        }
    }
}
