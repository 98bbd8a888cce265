//! `recv` into the worker's scratch buffer, `send` out of it.

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};

use super::{Broken, Stores, TURN, Waiting, Way, buffers::Buffers};
use crate::stream::socket::Socket;

impl Way {
    /// True when it stopped because its turn was over.
    pub(super) fn copy(&mut self, from: &mut Socket, to: &mut Socket, stores: &mut Stores) -> Result<bool, Broken> {
        if !self.flush(to, &mut stores.buffers)? {
            return Ok(false);
        }
        let mut turn = TURN;
        while self.may_read(from) {
            let scratch = stores.buffers.scratch();
            let room = scratch.len();
            let read = match recv(&from.fd, &mut *scratch, RecvFlags::empty()) {
                Ok((0, _)) => {
                    self.ended = true;
                    break;
                }
                Ok((read, _)) => read,
                Err(Errno::AGAIN) => {
                    from.readable = false;
                    break;
                }
                Err(Errno::INTR) => continue,
                Err(_) => return Err(Broken::From),
            };
            if read < room {
                self.ended = from.read_short();
            }
            // The FIN that follows goes into the same segment.
            let flags = if self.ended { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
            let sent = send_all(to, &scratch[..read], flags)?;
            self.bytes += sent as u64;
            if sent < read {
                self.waiting = Waiting::Bytes(stores.buffers.keep(sent..read));
                return Ok(false);
            }
            turn = turn.saturating_sub(read);
            if turn == 0 {
                return Ok(from.readable && !self.ended);
            }
        }
        Ok(false)
    }

    /// Writes what waits. True when nothing is left of it.
    pub(super) fn flush(&mut self, to: &mut Socket, buffers: &mut Buffers) -> Result<bool, Broken> {
        let Waiting::Bytes(held) = &mut self.waiting else { return Ok(matches!(self.waiting, Waiting::Nothing)) };
        if !to.writable {
            return Ok(false);
        }
        let sent = send_all(to, held.left(), SendFlags::NOSIGNAL)?;
        self.bytes += held.advance(sent);
        if !held.is_empty() {
            return Ok(false);
        }
        if let Waiting::Bytes(held) = std::mem::take(&mut self.waiting) {
            buffers.give_back(held);
        }
        Ok(true)
    }
}

/// How much the kernel took. Less than all means that it takes no more now, and says when it does (`sk_stream_wait_memory`
/// marks the socket also when a part was taken, v4.6+): a second call would only hear EAGAIN.
pub(super) fn send_all(to: &mut Socket, bytes: &[u8], flags: SendFlags) -> Result<usize, Broken> {
    loop {
        let sent = match send(&to.fd, bytes, flags) {
            Ok(sent) => sent,
            Err(Errno::AGAIN) => 0,
            Err(Errno::INTR) => continue,
            Err(_) => return Err(Broken::To),
        };
        to.writable = sent == bytes.len();
        return Ok(sent);
    }
}
