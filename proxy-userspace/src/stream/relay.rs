//! One direction of a relayed connection: bytes from one socket to the other, with backpressure, until the FIN.

pub mod buffers;
mod copy;
pub mod pipes;
pub mod secured;
pub mod sockmap;
mod splice;
pub mod tls;

use rustix::{
    io::Errno,
    net::{Shutdown, shutdown},
};

use self::{
    buffers::{Buffers, Held},
    pipes::{Loaded, Pipes},
};
use super::socket::Socket;
use crate::kernel::sockmap::Sockmap;

/// A connection that has so much to say gives way to the others now and then, in bytes.
pub const TURN: usize = 1 << 20;

/// One way through a connection.
#[derive(Debug, Default)]
pub struct Way {
    /// Payload passed on, ever.
    pub bytes: u64,
    pub waiting: Waiting,
    /// The FIN has been read.
    pub ended: bool,
    /// … and passed on.
    pub passed_on: bool,
    /// It came without the `close_notify` of TLS: something may be missing.
    pub truncated: bool,
    /// Nothing is read for now.
    pub paused: bool,
}

/// What has been read and not yet been written, because the reader is slow. An idle connection holds nothing.
#[derive(Debug, Default)]
pub enum Waiting {
    #[default]
    Nothing,
    Bytes(Held),
    Pipe(Loaded),
}

/// How the bytes are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Means {
    Copy,
    Splice,
    /// The kernel, between sockets that are joined ([`sockmap::Joined`]).
    Sockmap,
}

/// What a turn has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    pub bytes: u64,
    /// The FIN has been passed on in this turn.
    pub finished: bool,
    /// There may be more to do without a new event.
    pub again: bool,
    /// Something has been written, also when it is no new payload.
    pub moved: bool,
}

impl Way {
    /// Whether `from` may have something that is to be read.
    fn may_read(&self, from: &Socket) -> bool {
        from.readable && !self.ended && !self.paused
    }
}

/// The socket that is gone: reset, or vanished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    From,
    To,
}

/// What the relays of one worker share.
#[derive(Debug)]
pub struct Stores {
    pub buffers: Buffers,
    pub pipes: Pipes,
    /// `None`: nothing is joined here.
    pub sockmap: Option<Sockmap>,
}

impl Way {
    /// Moves what can be moved without waiting, at most about [`TURN`] bytes.
    pub fn pump(
        &mut self,
        means: Means,
        from: &mut Socket,
        to: &mut Socket,
        stores: &mut Stores,
    ) -> Result<Moved, Broken> {
        let before = self.bytes;
        let again = match means {
            Means::Copy | Means::Sockmap => self.copy(from, to, stores)?,
            Means::Splice => self.splice(from, to, stores)?,
        };
        let finished = self.pass_on_end(to)?;
        Ok(Moved { bytes: self.bytes - before, finished, again, moved: self.bytes > before })
    }

    /// The FIN goes on when everything before it has. True when it has gone now.
    fn pass_on_end(&mut self, to: &Socket) -> Result<bool, Broken> {
        if !self.ended || self.passed_on || !matches!(self.waiting, Waiting::Nothing) {
            return Ok(false);
        }
        self.passed_on = true;
        match shutdown(&to.fd, Shutdown::Write) {
            Ok(()) => Ok(true),
            // Its reset has come meanwhile.
            Err(Errno::NOTCONN | Errno::PIPE) => Err(Broken::To),
            Err(_) => Err(Broken::To),
        }
    }
}
