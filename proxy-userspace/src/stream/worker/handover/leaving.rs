//! From commit on: what slipped into the sockets still goes on, then they vanish and the connection has another owner.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use proxy_abi::handoff::{closing, seen};
use proxy_core::{
    handoff::{self, Action, Both, Seen},
    reason::Reason,
    session::Event,
};

use super::release;
use crate::{
    kernel::{
        bpf::handoff::PassedOn,
        repair::{self, RepairError},
    },
    stream::{
        admission::Seat,
        flow::Flow,
        handover::{HandedOver, Handing, Held, Stage},
        relay::{Means, Waiting, Way},
        socket::Socket,
        worker::{Fate, Worker, meter_slot},
    },
};

/// The longest wait between two looks at a connection that is leaving.
const MOST_PATIENCE: Duration = Duration::from_millis(16);

impl Worker {
    /// The connection has left the relay and its sockets are still there.
    pub(in crate::stream::worker) fn look_after(&mut self, key: u32, flow: &mut Flow) -> Fate {
        // A reset that slipped in: the program has not seen it.
        let failed = |socket: &Socket| socket.failed;
        if failed(&flow.client) {
            return self.give_up(flow, Reason::ResetByClient);
        }
        if flow.backend.as_ref().is_some_and(failed) {
            return self.give_up(flow, Reason::ResetByBackend);
        }
        let Some(mut handing) = flow.handover.take() else { return Fate::Lives };
        let action = self.look_at_both(flow, &mut handing);
        match action {
            Ok(Action::Vanish) => return self.vanish(flow, *handing),
            Ok(Action::GiveUp) => {
                flow.handover = Some(handing);
                return self.give_up(flow, Reason::ResetByBackend);
            }
            Ok(
                Action::Nothing
                | Action::Measure
                | Action::Arm(_)
                | Action::Commit
                | Action::Pause
                | Action::Relay { .. }
                | Action::Look
                | Action::PassOn
                | Action::Leave,
            ) => {}
            Err(error) => {
                tracing::error!(%error, "a connection that was handed over cannot be looked after");
                flow.handover = Some(handing);
                return self.give_up(flow, Reason::InternalError);
            }
        }
        if let Some(committed) = handing.committed() {
            committed.look_at = self.now().after(committed.patience);
            committed.patience = (committed.patience * 2).min(MOST_PATIENCE);
        }
        flow.handover = Some(handing);
        self.arm(key, flow);
        Fate::Lives
    }

    fn look_at_both(&mut self, flow: &mut Flow, handing: &mut Handing) -> Result<Action, RepairError> {
        let Some(engine) = self.shared.handoff.clone() else { return Ok(Action::GiveUp) };
        loop {
            let Stage::Committed(committed) = &mut handing.stage else { return Ok(Action::GiveUp) };
            let gate = committed.armed.gate;
            let Some(backend) = flow.backend.as_ref() else { return Ok(Action::GiveUp) };
            let mut sockets: Both<Seen> = Default::default();
            // A FIN that slipped in is passed on like a byte.
            let finished = [repair::is_finished(&flow.client)?, repair::is_finished(backend)?];
            let fin = [finished[0] && !flow.up.ended, finished[1] && !flow.down.ended];
            let held = [&flow.up, &flow.down].map(|way| match &way.waiting {
                Waiting::Nothing => 0,
                Waiting::Bytes(held) => held.left().len() as u32,
                // Nothing is taken into a pipe any more, and none was loaded at commit.
                Waiting::Pipe(loaded) => loaded.bytes as u32,
            });
            for (index, socket) in [&flow.client, backend].into_iter().enumerate() {
                let queued = repair::queued(socket)?;
                sockets[index] = Seen {
                    write_seq: committed.written[index],
                    unread: queued.unread + held[index] + u32::from(fin[index]),
                    unacked: queued.unacked,
                    unsent: queued.unsent,
                    ..Seen::default()
                };
            }
            let record = engine.store.flow(gate);
            let acknowledged = [0, 1].map(|index| {
                let end = &record.ends[index];
                (end.seen & seen::ACK != 0).then_some(end.ack)
            });
            let ended = [flow.up.ended, flow.down.ended];
            let knows = |end: usize| !ended[end] || record.ends[end].seen & seen::FIN != 0;
            // Behind a reset nobody acknowledges anything, and nobody waits for what has slipped in.
            let reset = record.closing & (closing::RESET_BY_CLIENT | closing::RESET_BY_BACKEND) != 0;
            let acknowledged = if reset { committed.written.map(Some) } else { acknowledged };
            if reset {
                sockets.iter_mut().for_each(|socket| socket.unread = 0);
            }
            let settled = committed.ticket.is_some_and(|ticket| engine.grace.passed(ticket));
            if settled && !(knows(0) && knows(1)) {
                // Both wrote the same word at once. Once more, and then nobody does who has not seen it.
                self.tell_program(flow, handing, [0; 2], ended);
                let Some(committed) = handing.committed() else { return Ok(Action::GiveUp) };
                committed.ticket = Some(engine.grace.ask());
                return Ok(Action::Look);
            }
            let event = handoff::Event::Looked { sockets, acknowledged, settled };
            match handing.protocol.step(event, &engine.when, self.now()) {
                Action::PassOn => {
                    let rest = [0, 1].map(|end| sockets[end].unread - u32::from(fin[end]));
                    self.tell_program(flow, handing, rest, [fin[0] || ended[0], fin[1] || ended[1]]);
                    if !self.pass_on(flow, handing)? {
                        return Ok(Action::Look);
                    }
                }
                Action::Leave => {
                    engine.store.leave(gate);
                    committed.ticket = Some(engine.grace.ask());
                    return Ok(Action::Leave);
                }
                action => return Ok(action),
            }
        }
    }

    /// What is passed on besides its packets: `rest` is still to be.
    fn tell_program(&self, flow: &Flow, handing: &mut Handing, rest: Both<u32>, finished: Both<bool>) {
        let (Some(engine), Some(committed)) = (&self.shared.handoff, handing.committed()) else { return };
        let relayed = [flow.up.bytes, flow.down.bytes];
        for end in 0..2 {
            let other = 1 - end;
            let fin = u32::from(if end == 0 { flow.up.passed_on } else { flow.down.passed_on });
            let what = PassedOn {
                bytes: relayed[end] - committed.relayed[end] + u64::from(rest[end]),
                own_seq: committed.written[other].wrapping_sub(fin).wrapping_add(rest[end]),
                finished: finished[end],
            };
            engine.store.passed_on(committed.armed.gate, end, what);
        }
    }

    /// What slipped into the sockets before the gate was open goes to the other end as ever. True when all of it has.
    fn pass_on(&mut self, flow: &mut Flow, handing: &mut Handing) -> Result<bool, RepairError> {
        let (Some(committed), Some(backend)) = (handing.committed(), flow.backend.as_mut()) else { return Ok(true) };
        repair::release(&flow.client)?;
        repair::release(&*backend)?;
        (flow.client.readable, backend.readable) = (true, true);
        let before = [written(&flow.down), written(&flow.up)];
        // An end that is gone is for the program to notice.
        let _ = flow.up.pump(Means::Copy, &mut flow.client, backend, &mut self.stores);
        let _ = flow.down.pump(Means::Copy, backend, &mut flow.client, &mut self.stores);
        let after = [written(&flow.down), written(&flow.up)];
        for (end, written) in committed.written.iter_mut().enumerate() {
            *written = written.wrapping_add((after[end] - before[end]) as u32);
        }
        let done = [&flow.up, &flow.down].iter().all(|way| matches!(way.waiting, Waiting::Nothing));
        repair::hold(&flow.client)?;
        repair::hold(&*backend)?;
        Ok(done)
    }

    /// What would have ended a relayed connection ends it with its owner, a few milliseconds later.
    pub(in crate::stream::worker) fn while_leaving(&mut self, key: u32, flow: &mut Flow, event: Event) -> Fate {
        if let (Event::Cut(reason), Some(committed)) =
            (event, flow.handover.as_mut().and_then(|handing| handing.committed()))
        {
            committed.cut.get_or_insert(reason);
        }
        let committed = flow.handover.as_mut().and_then(|handing| handing.committed());
        if committed.is_some_and(|committed| committed.look_at <= self.now()) {
            return self.look_after(key, flow);
        }
        self.arm(key, flow);
        Fate::Lives
    }

    /// Both sockets go without a packet; the connection has another owner.
    fn vanish(&mut self, flow: &mut Flow, handing: Handing) -> Fate {
        let Handing { port: Some(port), stage: Stage::Committed(committed), .. } = handing else {
            return self.give_up(flow, Reason::InternalError);
        };
        let index = flow.slot;
        let slot = &mut self.slots[index];
        let Some(route) = slot.route.clone() else { return self.give_up(flow, Reason::InternalError) };
        slot.open -= 1;
        slot.meter.engines[meter_slot(flow.means)].active.sub(1);
        slot.meter.handed_over.add(1);
        let admission = Arc::clone(&route.admission);
        let seat = flow.admitted.take().map(|admitted| Seat { admission, admitted });
        let [bytes_in, bytes_out] = committed.relayed;
        let at = |micros: u64| self.shared.began + Duration::from_micros(micros);
        let handed = HandedOver {
            id: self.id(flow),
            route_id: route.id,
            route: Arc::clone(&route.meters.name),
            client: flow.client_address,
            ends: committed.armed.ends,
            gate: committed.armed.gate.0,
            bytes_in,
            bytes_out,
            passed_on: [flow.up.bytes - bytes_in, flow.down.bytes - bytes_out],
            accepted: at(flow.accepted),
            active: at(flow.session.last_activity().0 * 1000),
            limits: route.limits,
            cut: committed.cut,
            meters: Arc::clone(&route.meters),
            held: Held { seat, counted: flow.counted.take(), port },
        };
        flow.backend = None;
        committed.armed.place.send(handed);
        self.shared.open.fetch_sub(1, Relaxed);
        self.look_whether_gone(index);
        Fate::Over
    }

    /// The ends hear of it by a reset each, as far as their numbers are still known here.
    fn give_up(&mut self, flow: &mut Flow, reason: Reason) -> Fate {
        release(flow);
        self.stays(flow);
        flow.session.step(Event::Cut(reason), &self.slots[flow.slot].limits, self.now());
        self.end(flow, reason, proxy_core::session::How::Reset)
    }
}

/// How far the sequence numbers of the socket have come that this way writes to. The FIN counts as one.
fn written(way: &Way) -> u64 {
    way.bytes + u64::from(way.passed_on)
}
