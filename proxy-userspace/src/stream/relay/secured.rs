//! Bytes from one socket to the other where at least one of them has TLS.
//!
//! What is counted is the plaintext: when it is written, or when it is enciphered. A `close_notify` is to TLS what a FIN is
//! to TCP, and each becomes the other. A FIN without `close_notify` may be an attacker's (RFC 8446 §6.1): it goes on as
//! what it is, a FIN without `close_notify`, or as a reset where the other side has no TLS. Only behind the other side's own
//! end it goes on as a FIN: many clients just close when they have everything.

use proxy_core::session::Tick;
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};

use super::{
    Broken, Moved, Stores, TURN, Waiting, Way,
    buffers::Held,
    copy::send_all,
    tls::{Leg, MAX_PENDING, Out, RECORD},
};
use crate::stream::socket::Socket;

/// Read at once: whole records, when the peer fills them. What they become fits into a buffer.
const READ: usize = 6 * (RECORD + 22);

/// The TLS of a connection.
#[derive(Debug, Default)]
pub struct Secured {
    /// `None`: the client has no TLS.
    pub client: Option<Leg>,
    /// `None`: the backend has none.
    pub backend: Option<Leg>,
    /// Plaintext of a client without TLS that was read before there was a backend.
    pub early: Vec<u8>,
    /// What goes to the backend before TLS.
    pub header: Vec<u8>,
}

/// A socket, and its TLS if it has any.
#[derive(Debug)]
pub struct End<'a> {
    pub socket: &'a mut Socket,
    pub leg: Option<&'a mut Leg>,
    /// Plaintext that came before.
    pub early: Option<&'a mut Vec<u8>>,
}

enum Read {
    Bytes(usize),
    /// Nothing is there now.
    Nothing,
}

impl Way {
    /// Moves what can be moved without waiting, at most about [`TURN`] bytes. `answered`: the end of the other way is
    /// through.
    pub fn pump_secured(
        &mut self,
        mut from: End<'_>,
        mut to: End<'_>,
        answered: bool,
        stores: &mut Stores,
        now: Tick,
    ) -> Result<Moved, Broken> {
        let (before, waited) = (self.bytes, self.waits());
        let (mut turn, mut again, mut moved) = (TURN, false, false);
        loop {
            let flushed = self.flush(to.socket, &mut stores.buffers)?;
            moved |= self.waits() < waited;
            if !flushed {
                break;
            }
            if let Some(leg) = to.leg.as_mut().filter(|leg| !leg.control.is_empty()) {
                self.waiting = Waiting::Bytes(Held::first(std::mem::take(&mut leg.control), &[]));
                continue;
            }
            if self.ended {
                break;
            }
            if turn == 0 {
                again = true;
                break;
            }
            match self.transform(&mut from, &mut to, stores, now)? {
                Read::Bytes(bytes) => turn = turn.saturating_sub(bytes.max(1)),
                Read::Nothing => break,
            }
        }
        let finished = self.ended && !self.passed_on && self.pass_on(to, answered)?;
        Ok(Moved { bytes: self.bytes - before, finished, again, moved: moved || self.bytes > before })
    }

    fn waits(&self) -> usize {
        if let Waiting::Bytes(held) = &self.waiting { held.left().len() } else { 0 }
    }

    /// Reads once, and writes what it becomes.
    fn transform(
        &mut self,
        from: &mut End<'_>,
        to: &mut End<'_>,
        stores: &mut Stores,
        now: Tick,
    ) -> Result<Read, Broken> {
        let (scratch, second) = stores.buffers.both();
        let Some((there, read)) = self.read_before(from, second)? else { return Ok(Read::Nothing) };
        if self.ended {
            return Ok(Read::Bytes(0));
        }
        let sealed = to.leg.is_some();
        let mut out = Out { bytes: scratch, length: 0, payload: 0, leg: to.leg.as_deref_mut(), now };
        let input = second.get_mut(..there).unwrap_or_default();
        match from.leg.as_deref_mut() {
            None => {
                for record in input.chunks(RECORD) {
                    out.put(record).map_err(|_| Broken::To)?;
                }
            }
            Some(leg) => match leg.open(input, &mut out) {
                Ok(()) => self.ended = leg.closed,
                Err(error) => {
                    tracing::debug!(%error, "TLS");
                    leg.say_why();
                    let said = send(&from.socket.fd, &leg.control, SendFlags::NOSIGNAL);
                    from.socket.told = said.is_ok_and(|sent| sent > 0 && sent == leg.control.len());
                    return Err(Broken::From);
                }
            },
        }
        let (length, payload) = (out.length, out.payload);
        let sent = if length == 0 { 0 } else { send_all(to.socket, &scratch[..length], SendFlags::NOSIGNAL)? };
        self.bytes += if sealed { payload } else { sent as u64 };
        if sent < length {
            let held = stores.buffers.keep(sent..length);
            self.waiting = Waiting::Bytes(if sealed { held.counted() } else { held });
        }
        Ok(Read::Bytes(read))
    }

    /// What is there to be worked on, in `into`, and how much of it is new. `None`: nothing.
    fn read_before(&mut self, from: &mut End<'_>, into: &mut [u8]) -> Result<Option<(usize, usize)>, Broken> {
        if let Some(early) = from.early.as_mut().filter(|early| !early.is_empty()) {
            let early = std::mem::take(*early);
            into.get_mut(..early.len()).ok_or(Broken::From)?.copy_from_slice(&early);
            return Ok(Some((early.len(), early.len())));
        }
        let kept = from.leg.as_ref().map_or(0, |leg| leg.pending.len());
        if kept > MAX_PENDING {
            return Err(Broken::From);
        }
        if let Some(leg) = &from.leg {
            into.get_mut(..kept).ok_or(Broken::From)?.copy_from_slice(&leg.pending);
            if leg.more {
                return Ok(Some((kept, 0)));
            }
        }
        let most = if from.leg.is_some() { READ } else { READ / RECORD * RECORD };
        let room = into.get_mut(kept..most.max(kept + RECORD)).ok_or(Broken::From)?;
        let wanted = room.len();
        loop {
            if !from.socket.readable {
                return Ok(None);
            }
            match recv(&from.socket.fd, &mut *room, RecvFlags::empty()) {
                Ok((0, _)) => {
                    self.ended = true;
                    self.truncated = from.leg.is_some();
                    return Ok(Some((kept, 0)));
                }
                Ok((read, _)) => {
                    if read < wanted {
                        // An end is read as one: whether TLS has said it before is what matters.
                        from.socket.read_short();
                    }
                    return Ok(Some((kept + read, read)));
                }
                Err(Errno::AGAIN) => from.socket.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Broken::From),
            }
        }
    }

    /// The end, in the words of the other side. True when it is through.
    fn pass_on(&mut self, to: End<'_>, answered: bool) -> Result<bool, Broken> {
        if !matches!(self.waiting, Waiting::Nothing) {
            return Ok(false);
        }
        match to.leg {
            None if self.truncated && !answered => return Err(Broken::From),
            Some(leg) if !self.truncated && !leg.close_sent => {
                let record = leg.close();
                // In one segment with the FIN: a peer that has closed its socket answers the record alone with a reset.
                let sent = send_all(to.socket, &record, SendFlags::NOSIGNAL | SendFlags::MORE)?;
                if let Some(left) = record.get(sent..).filter(|left| !left.is_empty()) {
                    self.waiting = Waiting::Bytes(Held::first(left.to_vec(), &[]));
                    return Ok(false);
                }
            }
            Some(_) | None => {}
        }
        self.passed_on = true;
        match shutdown(&to.socket.fd, Shutdown::Write) {
            Ok(()) => Ok(true),
            // Its reset has come meanwhile.
            Err(_) => Err(Broken::To),
        }
    }
}
