//! A connection after it has been handed over to the packet level: what is read of it there, and what that means.
//!
//! The session it had as a relayed connection goes on: the same limits, the same ends. Who calls gives every [`Look`] at its
//! counters; nobody is told of a byte.

mod record;

pub use record::{RECORD_BYTES, Record, route_hash};

use crate::{
    flow::Side,
    reason::Reason,
    session::{Action, Event, Limits, Session, Tick},
};

/// What the packet level knows of a flow at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Look {
    /// Payload since it was handed over: from the client, from the backend.
    pub bytes: [u64; 2],
    pub packets: [u64; 2],
    /// When the last packet of either end came; 0: none has come.
    pub last: Tick,
    pub ending: Ending,
}

/// How far the two ends have come with their end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ending {
    #[default]
    No,
    /// This side has sent FIN.
    HalfClosed(Side),
    /// Both have, this one first, and know it of each other.
    Finished(Side),
    /// This side has sent a reset.
    Reset(Side),
}

/// One handed-over flow, as far as deciding goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handed {
    pub session: Session,
    /// Bytes the daemon relayed before.
    relayed: [u64; 2],
    looked: Look,
}

impl Handed {
    /// `relayed`: before its counters began; `passed_on`: after that, so that they have it with the next packet.
    pub fn new(session: Session, relayed: [u64; 2], passed_on: [u64; 2]) -> Self {
        Self { session, relayed, looked: Look { bytes: passed_on, ..Look::default() } }
    }

    /// Over its whole life: in and out.
    pub fn bytes(&self) -> [u64; 2] {
        [0, 1].map(|side| self.relayed[side] + self.looked.bytes[side])
    }

    pub fn packets(&self) -> [u64; 2] {
        self.looked.packets
    }

    /// Takes over what was seen: the bytes that have come since the look before, and what is to be done.
    pub fn look(&mut self, look: Look, limits: &Limits, now: Tick) -> ([u64; 2], Action) {
        // Counters of the packet level may be read while they are written: they never go back here.
        let new = [0, 1].map(|side| look.bytes[side].saturating_sub(self.looked.bytes[side]));
        let active = look.last.min(now);
        if new != [0, 0] && active > self.session.last_activity() {
            // A probe of a living peer without a byte is no activity: idle means the same as for a relayed connection.
            self.session.moved(active);
        }
        self.looked = Look {
            bytes: [0, 1].map(|side| self.looked.bytes[side] + new[side]),
            packets: [0, 1].map(|side| self.looked.packets[side].max(look.packets[side])),
            ..look
        };
        (new, self.ending(look.ending, limits, now))
    }

    /// Its time may have come. To be called after a look.
    pub fn tick(&mut self, limits: &Limits, now: Tick) -> Action {
        self.session.step(Event::Tick, limits, now)
    }

    pub fn cut(&mut self, reason: Reason, limits: &Limits, now: Tick) -> Action {
        self.session.step(Event::Cut(reason), limits, now)
    }

    fn ending(&mut self, ending: Ending, limits: &Limits, now: Tick) -> Action {
        let mut finished = |side| self.session.step(Event::Finished { side, silent: false }, limits, now);
        match ending {
            Ending::No => Action::Nothing,
            Ending::HalfClosed(side) => finished(side),
            Ending::Finished(first) => match finished(first) {
                Action::Nothing => finished(first.other()),
                // It was over already, or ends with this one.
                action => action,
            },
            Ending::Reset(side) => self.session.step(Event::Reset(side), limits, now),
        }
    }
}

#[cfg(test)]
mod tests;
