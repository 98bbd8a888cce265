//! One direction between joined sockets.
//!
//! Numbers of bytes count from the join. Of what the kernel passes the first `had` bytes had come before it: a piece that repeats
//! some is handed over whole, and which it repeats no verdict knows of the first.

use std::{
    ops::Range,
    sync::atomic::{Ordering, fence},
};

use proxy_abi::sockmap::{FAULT_GAP, FAULT_OVERFLOW, NO_FAULT};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recv},
};

use super::Stop;
use crate::{
    kernel::{
        sockmap::{Line, Seen},
        tcp,
    },
    stream::{
        relay::{
            Broken, Moved, TURN, Waiting, Way,
            buffers::{Buffers, SIZE},
            copy::send_all,
        },
        socket::Socket,
    },
};

#[derive(Debug)]
pub struct Lane {
    /// What had been read of the one socket and written to the other, in the kernel's own measures.
    read: u64,
    written: u64,
    /// `None`: nothing has come yet that would tell.
    had: Option<u64>,
    /// Of what was passed: had before, or read by the daemon.
    taken: u64,
    /// Redirected bytes that the way has counted.
    counted: u64,
    /// The last redirect known to have reached the socket's own queue, behind which the daemon may write.
    settled: u64,
    grant: Grant,
    granted: u64,
    epoch: u64,
    /// The window that the peer of `from` had before it was held back.
    held_back: Option<i32>,
}

/// So many unread bytes are too many when nothing but a kernel thread's turn would close the window.
const TOO_MANY: u64 = 4 << 20;

/// Who moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grant {
    /// The daemon.
    None,
    /// The kernel; it calls when so many bytes have been redirected, and when it passes some.
    Until { wake_at: u64 },
}

impl Lane {
    pub fn between(from: &Socket, to: &Socket) -> Result<Self, Errno> {
        Ok(Self {
            read: tcp::read_exactly(from)?,
            written: tcp::written_exactly(to)?,
            had: None,
            taken: 0,
            counted: 0,
            settled: 0,
            grant: Grant::None,
            granted: 0,
            epoch: 0,
            held_back: None,
        })
    }

    /// The daemon need not hear of what comes.
    pub fn is_quiet(&self) -> bool {
        self.grant != Grant::None
    }

    /// Bytes that were passed and that the daemon has not read.
    pub fn waits(&self, seen: &Seen) -> u64 {
        seen.passed.saturating_sub(self.taken)
    }

    /// Nothing has been redirected since.
    pub fn is_counted(&self, seen: &Seen) -> bool {
        seen.redirected == self.counted
    }

    pub fn count(&mut self, way: &mut Way, seen: &Seen) {
        way.bytes += seen.redirected.saturating_sub(self.counted);
        self.counted = seen.redirected;
    }

    /// `grant`: bytes that the kernel may have under way. True when it has to be done again although nothing will happen.
    #[expect(clippy::too_many_arguments, reason = "the parts of a direction, borrowed apart")]
    pub fn turn(
        &mut self,
        line: Line<'_>,
        grant: u64,
        from: &mut Socket,
        to: &mut Socket,
        way: &mut Way,
        buffers: &mut Buffers,
        moved: &mut Moved,
    ) -> Result<bool, Stop> {
        if way.passed_on {
            self.count(way, &line.seen());
            return Ok(false);
        }
        let seen = line.seen();
        self.count(way, &seen);
        match seen.fault {
            NO_FAULT => {}
            FAULT_OVERFLOW => return Err(Stop::Overflow),
            fault => return Err(Stop::Fault(fault)),
        }
        let mut look = false;
        if seen.passed > self.dealt(way) {
            self.revoke(line, &seen);
            if !self.find_out_had(line, from)? || !self.may_write(&seen, to)? {
                return Ok(true);
            }
            moved.again |= self.relay(line, from, to, way, buffers)?;
        }
        if from.finished || from.hung_up {
            look = !self.finish(line, from, to, way)?;
        } else if !moved.again {
            look = self.renew(line, grant, to, way)?;
        }
        moved.finished = way.pass_on_end(to)?;
        Ok(look && !moved.finished)
    }

    /// After a turn: holds the peer back when what it sends piles up behind what is redirected the other way (`behind`). The kernel charges
    /// such bytes to nobody, so that the window stays open, until its thread has had its turn, which a busy machine delays.
    pub fn hold_back(&mut self, line: Line<'_>, from: &Socket, way: &Way, behind: impl FnOnce() -> bool) {
        let seen = line.seen();
        if self.is_quiet() || self.held_back.is_some() || seen.passed == self.dealt(way) {
            return;
        }
        if self.waits(&seen) > TOO_MANY && behind() {
            self.held_back = tcp::hold_back(from).ok();
            return;
        }
        // Nothing else tells of what comes there.
        self.epoch += 1;
        line.allow(self.granted, u64::MAX, self.epoch);
    }

    /// What was redirected has not all reached the socket `to`.
    pub fn is_behind(&self, line: Line<'_>, to: &Socket, way: &Way) -> bool {
        let expected = self.expected(line.seen().redirected, way);
        tcp::written(to).is_ok_and(|written| written < expected)
    }

    /// While something is passed and not relayed the kernel redirects nothing; now it will not when all is relayed, either.
    fn revoke(&mut self, line: Line<'_>, seen: &Seen) {
        if self.is_quiet() {
            (self.grant, self.granted) = (Grant::None, seen.redirected);
            line.allow(self.granted, u64::MAX, 0);
        }
    }

    /// Of what was passed: relayed, or known to have been read before.
    fn dealt(&self, way: &Way) -> u64 {
        match &way.waiting {
            Waiting::Bytes(held) => self.taken.saturating_sub(held.left().len() as u64),
            Waiting::Nothing | Waiting::Pipe(_) => self.taken,
        }
    }

    /// What the partner must have been given, in its own measure.
    fn expected(&self, redirected: u64, way: &Way) -> u64 {
        self.written + redirected + self.dealt(way).saturating_sub(self.had.unwrap_or(0))
    }

    /// Before the first byte: how much of what was passed had been read before. False when it cannot be told yet.
    fn find_out_had(&mut self, line: Line<'_>, from: &Socket) -> Result<bool, Stop> {
        if self.had.is_some() {
            return Ok(true);
        }
        let before = line.seen().passed;
        let info = tcp::info(from).map_err(|_| Broken::From)?;
        // Of a socket that was reset nobody can say whether a FIN is counted, and so not which byte is the first. Who resets
        // does not expect that what was under way arrives.
        if info.finished && tcp::has_failed(from) {
            return Err(Broken::From.into());
        }
        let new = info.received.saturating_sub(self.read + u64::from(info.finished));
        if line.seen().passed != before {
            return Ok(false);
        }
        // Not so much: something has come and is not judged yet.
        let Some(had) = before.checked_sub(new) else { return Ok(false) };
        if had >= SIZE as u64 {
            return Err(Stop::Fault(FAULT_GAP));
        }
        (self.had, self.taken) = (Some(had), had);
        Ok(true)
    }

    /// What was redirected before has left the queue in front of the socket, so nothing is overtaken.
    fn may_write(&mut self, seen: &Seen, to: &Socket) -> Result<bool, Stop> {
        if seen.redirected == self.settled {
            return Ok(true);
        }
        let relayed = self.taken.saturating_sub(self.had.unwrap_or(0));
        if tcp::written(to).map_err(|_| Broken::To)? == self.written + seen.redirected + relayed {
            self.settled = seen.redirected;
        }
        Ok(seen.redirected == self.settled)
    }

    /// Reads what was passed and writes it. True when there may be more.
    fn relay(
        &mut self,
        line: Line<'_>,
        from: &mut Socket,
        to: &mut Socket,
        way: &mut Way,
        buffers: &mut Buffers,
    ) -> Result<bool, Stop> {
        let flushed = way.flush(to, buffers)?;
        line.set_relayed(self.dealt(way));
        if !flushed {
            return Ok(false);
        }
        // Before anything is read: reading is what tells the peer of the wider window.
        if let Some(window) = self.held_back.take() {
            let _ = tcp::let_go(&*from, window);
        }
        let mut turn = TURN;
        loop {
            let new = match self.receive(from, buffers) {
                // Also while something is on its way to the queue that is read from: no end to be believed.
                Ok(new) if new.is_empty() => return Ok(false),
                Err(Errno::AGAIN) => return Ok(false),
                Ok(new) => new,
                Err(Errno::INTR) => continue,
                Err(_) => return Err(Broken::From.into()),
            };
            self.taken += new.len() as u64;
            let sent = send_all(to, &buffers.scratch()[new.clone()], SendFlags::NOSIGNAL)?;
            way.bytes += sent as u64;
            let left = new.start + sent..new.end;
            let all = left.is_empty();
            if !all {
                way.waiting = Waiting::Bytes(buffers.keep(left));
            }
            line.set_relayed(self.dealt(way));
            if !all {
                return Ok(false);
            }
            turn = turn.saturating_sub(new.len());
            if turn == 0 {
                return Ok(true);
            }
        }
    }

    /// Reads what is new into the scratch buffer: where it lies there.
    ///
    /// The kernel counts what is read, and what was had before is counted already: counted twice, it would take as many bytes that
    /// come for read, and tell nobody of them (`tcp_epollin_ready`, v6.18). So as many always stay in the queue, the last that
    /// were relayed.
    fn receive(&self, from: &Socket, buffers: &mut Buffers) -> Result<Range<usize>, Errno> {
        let had = self.had.unwrap_or(0) as usize;
        if had == 0 {
            let (read, _) = recv(&from.fd, buffers.scratch(), RecvFlags::empty())?;
            return Ok(0..read);
        }
        let (scratch, aside) = buffers.both();
        let (there, _) = recv(&from.fd, &mut *scratch, RecvFlags::PEEK)?;
        let new = there.saturating_sub(had);
        if new == 0 {
            return Ok(0..0);
        }
        let (read, _) = recv(&from.fd, &mut aside[..new], RecvFlags::empty())?;
        Ok(had..had + read)
    }

    /// The peer has finished: whether everything before that is through.
    fn finish(&mut self, line: Line<'_>, from: &Socket, to: &Socket, way: &mut Way) -> Result<bool, Stop> {
        let info = tcp::info(from).map_err(|_| Broken::From)?;
        if !info.finished {
            return Ok(false);
        }
        // After the socket's lock was had: all that came is judged.
        let seen = line.seen();
        self.count(way, &seen);
        let new = info.received.checked_sub(self.read + 1);
        let judged = (seen.redirected + seen.passed).saturating_sub(self.had.unwrap_or(0));
        let relayed = self.dealt(way) == seen.passed && matches!(way.waiting, Waiting::Nothing);
        if new != Some(judged) || !relayed {
            return Ok(false);
        }
        way.ended = tcp::written(to).map_err(|_| Broken::To)? == self.expected(seen.redirected, way);
        Ok(way.ended)
    }

    /// Lets the kernel go on, as far as the partner has taken what it was given. True when that is to be looked at again.
    fn renew(&mut self, line: Line<'_>, grant: u64, to: &Socket, way: &Way) -> Result<bool, Stop> {
        let seen = line.seen();
        let all_relayed = seen.passed == self.dealt(way) && matches!(way.waiting, Waiting::Nothing);
        if self.had.is_none() || !all_relayed {
            return Ok(seen.passed > self.dealt(way) && matches!(way.waiting, Waiting::Nothing));
        }
        if matches!(self.grant, Grant::Until { wake_at } if seen.redirected < wake_at) {
            return Ok(false);
        }
        let acked = tcp::info(to).map_err(|_| Broken::To)?.acked;
        let under_way = self.expected(seen.redirected, way).saturating_sub(acked);
        let room = grant.saturating_sub(under_way);
        self.epoch += 1;
        if room < grant / 2 {
            // The reader is slow. What was granted stays so; after that the daemon relays at its pace.
            if self.is_quiet() {
                line.allow(self.granted, u64::MAX, self.epoch);
                self.grant = Grant::Until { wake_at: u64::MAX };
            }
            return Ok(false);
        }
        let wake_at = seen.redirected + room / 2;
        self.granted = seen.redirected + room;
        line.allow(self.granted, wake_at, self.epoch);
        self.grant = Grant::Until { wake_at };
        // A piece may have been passed just before, and nobody would be called for it.
        fence(Ordering::SeqCst);
        Ok(line.seen().passed != self.dealt(way))
    }
}
