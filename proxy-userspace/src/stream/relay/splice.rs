//! `splice(2)` from the socket into a pipe and on into the other socket: pages move, bytes are not copied.
//!
//! EAGAIN does not say whether the pipe is full or the socket empty. Here a pipe is filled only when it is empty, so it
//! always means the socket.

use rustix::{
    io::Errno,
    pipe::{SpliceFlags, splice},
};

use super::{
    Broken, Stores, TURN, Waiting, Way,
    pipes::{Loaded, Pipes},
};
use crate::stream::socket::Socket;

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

impl Way {
    /// True when it stopped because its turn was over.
    pub(super) fn splice(&mut self, from: &mut Socket, to: &mut Socket, stores: &mut Stores) -> Result<bool, Broken> {
        // What was read before the connection came here.
        if matches!(self.waiting, Waiting::Bytes(_)) && !self.flush(to, &mut stores.buffers)? {
            return Ok(false);
        }
        if !self.empty(to, &mut stores.pipes)? {
            return Ok(false);
        }
        let mut turn = TURN;
        while self.may_read(from) {
            let pipe = if from.urgent { None } else { stores.pipes.take() };
            let Some(pipe) = pipe else { return self.copy(from, to, stores) };
            match splice(&from.fd, None, &pipe.write, None, pipe.size, FLAGS) {
                Ok(0) => {
                    self.ended = true;
                    stores.pipes.give_back(pipe);
                    break;
                }
                Ok(bytes) => {
                    self.waiting = Waiting::Pipe(Loaded { pipe, bytes });
                    if !self.empty(to, &mut stores.pipes)? {
                        return Ok(false);
                    }
                    turn = turn.saturating_sub(bytes);
                    if turn == 0 {
                        return Ok(true);
                    }
                }
                Err(errno) => {
                    stores.pipes.give_back(pipe);
                    match errno {
                        Errno::AGAIN => {
                            from.readable = false;
                            break;
                        }
                        Errno::INTR => {}
                        _ => return Err(Broken::From),
                    }
                }
            }
        }
        Ok(false)
    }

    /// Writes what is in the pipe. True when nothing is left, and the pipe is free.
    fn empty(&mut self, to: &mut Socket, pipes: &mut Pipes) -> Result<bool, Broken> {
        let Waiting::Pipe(loaded) = &mut self.waiting else { return Ok(true) };
        while loaded.bytes > 0 {
            if !to.writable {
                return Ok(false);
            }
            match splice(&loaded.pipe.read, None, &to.fd, None, loaded.bytes, FLAGS) {
                Ok(sent) => {
                    loaded.bytes -= sent.min(loaded.bytes);
                    self.bytes += sent as u64;
                }
                Err(Errno::AGAIN) => to.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Broken::To),
            }
        }
        if let Waiting::Pipe(loaded) = std::mem::take(&mut self.waiting) {
            pipes.give_back(loaded.pipe);
        }
        Ok(true)
    }
}
