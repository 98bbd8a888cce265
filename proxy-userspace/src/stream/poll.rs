//! One worker's epoll instance, and the names its sockets have in it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use proxy_core::flow::Side;
use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    io::Errno,
};

use super::relay::sockmap::Interest;

/// Events taken from the kernel at once.
const BATCH: usize = 512;
/// Keys from here on are not flows.
const LISTENERS: u32 = 0xff00_0000;
const WAKE: u32 = u32::MAX;
const CALLS: u32 = u32::MAX - 1;

/// Whose event it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Flow {
        key: u32,
        /// Low bits of the flow's number: an event of the flow that had the key before is not taken for one of this.
        number: u32,
        side: Side,
    },
    Listener(u32),
    /// Commands wait.
    Wake,
    /// The kernel calls for joined connections.
    Calls,
}

/// Bits of a flow's number in a [`Source`].
pub const NUMBER_MASK: u64 = 0x7fff_ffff;

impl Source {
    fn token(self) -> u64 {
        match self {
            Self::Flow { key, number, side } => {
                u64::from(key) << 32 | u64::from(number) << 1 | u64::from(side == Side::Backend)
            }
            Self::Listener(index) => u64::from(LISTENERS + index) << 32,
            Self::Wake => u64::from(WAKE) << 32,
            Self::Calls => u64::from(CALLS) << 32,
        }
    }

    fn of(token: u64) -> Self {
        match (token >> 32) as u32 {
            WAKE => Self::Wake,
            CALLS => Self::Calls,
            key if key >= LISTENERS => Self::Listener(key - LISTENERS),
            key => {
                let side = if token & 1 == 0 { Side::Client } else { Side::Backend };
                Self::Flow { key, number: (token >> 1) as u32 & NUMBER_MASK as u32, side }
            }
        }
    }
}

#[derive(Debug)]
pub struct Poll {
    epoll: OwnedFd,
}

/// Room for what the kernel tells at once.
pub struct Events(Vec<Event>);

impl Default for Events {
    fn default() -> Self {
        Self(vec![Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; BATCH])
    }
}

impl Events {
    pub fn get(&self, index: usize) -> Option<(Source, EventFlags)> {
        let event = self.0.get(index)?;
        Some((Source::of(event.data.u64()), event.flags))
    }
}

impl Poll {
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Everything about a connection, once and for all: no further call is made for it until it is closed.
    pub fn add_flow(&self, fd: impl AsFd, source: Source) -> Result<(), Errno> {
        let all = EventFlags::IN | EventFlags::PRI | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, fd, EventData::new_u64(source.token()), all)
    }

    /// As long as there is something to accept or to read.
    pub fn add_level(&self, fd: impl AsFd, source: Source) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, EventData::new_u64(source.token()), EventFlags::IN)
    }

    /// What is wanted of a connection that the kernel moves: its end in any case.
    pub fn change_flow(&self, fd: impl AsFd, source: Source, interest: Interest) -> Result<(), Errno> {
        let mut flags = EventFlags::RDHUP | EventFlags::ET;
        flags.set(EventFlags::IN | EventFlags::PRI, interest.readable);
        flags.set(EventFlags::OUT, interest.writable);
        epoll::modify(&self.epoll, fd, EventData::new_u64(source.token()), flags)
    }

    pub fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// The number of events. `None`: waits for ever.
    pub fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> Result<usize, Errno> {
        let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
        match epoll::wait(&self.epoll, &mut events.0[..], timeout.as_ref()) {
            Err(Errno::INTR) => Ok(0),
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_reads_back_from_its_token() {
        for source in [
            Source::Wake,
            Source::Calls,
            Source::Listener(0),
            Source::Listener(70_000),
            Source::Flow { key: 0, number: 0, side: Side::Client },
            Source::Flow { key: 0xfeff_ffff, number: 0x7fff_ffff, side: Side::Backend },
        ] {
            assert_eq!(Source::of(source.token()), source);
        }
    }
}
