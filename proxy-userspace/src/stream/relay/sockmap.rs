//! Two sockets that the kernel joins: what comes from one goes to the other without the daemon (docs/sockmap.md).
//!
//! The kernel never has more of a direction than it was granted. Beyond, bytes are passed to the daemon, which writes them as
//! `copy` does and so gives the sender the reader's pace; when it has caught up, it grants again.

mod lane;
mod probe;

use proxy_core::session::Tick;
use rustix::io::Errno;

use self::lane::Lane;
pub use self::probe::trust_in_sockmap;
use super::{Broken, Moved, Stores, Waiting, Way};
use crate::{
    kernel::{
        sockmap::{Place, Sockmap},
        tcp,
    },
    stream::socket::Socket,
};

/// Bytes of one direction that the kernel may have taken from one peer and not yet brought to the other, …
pub const GRANT: u64 = 1 << 20;
/// … less where many connections share this, …
const GRANTED: u64 = 512 << 20;
/// … but no less than this, or the daemon would be called all the time.
const LEAST: u64 = 64 << 10;
/// Room to send, as the kernel accounts it: what is granted always fits, so that it never waits outside the socket, where what
/// is passed would wait behind it without closing the window.
const SEND_ROOM: u32 = 8 << 20;
/// Bytes that may wait for the daemon beyond what the socket's window allows. Some do: behind what is redirected the other way, until a
/// kernel thread had its turn, nothing closes the window.
pub const BEYOND: u64 = 8 << 20;

/// A pair of joined sockets.
#[derive(Debug)]
pub struct Joined {
    places: [Place; 2],
    /// Client to backend; `None`: this direction is copied.
    up: Option<Lane>,
    down: Option<Lane>,
    /// Looks in a row that had to be repeated without anything having moved.
    looks: u32,
    /// When to look again although nothing happens.
    pub look_at: Option<Tick>,
    /// What the sockets are watched for: the client's, and the backend's.
    pub watched: [Interest; 2],
}

/// What the sockets should be watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    pub readable: bool,
    pub writable: bool,
}

impl Interest {
    /// As every connection begins.
    const ALL: Self = Self { readable: true, writable: true };
}

/// What a turn has done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Turn {
    pub up: Moved,
    pub down: Moved,
    /// Nothing will tell when the next step is possible: look again.
    pub look: bool,
}

/// Why a turn cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Broken(Broken),
    /// More waits for its reader than may be.
    Overflow,
    /// The kernel and the daemon do not agree about the bytes.
    Fault(u32),
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl Joined {
    /// Joins two connected sockets between which nothing waits.
    ///
    /// # Errors
    /// They are as they were: not joined. `AGAIN`: not now, because something waits to be read.
    pub fn new(map: &mut Sockmap, client: &Socket, backend: &Socket, now: u64) -> Result<Self, Errno> {
        tcp::force_send_room(client, SEND_ROOM)?;
        tcp::force_send_room(backend, SEND_ROOM)?;
        // Nobody but this thread reads or writes, so these stay true until the first piece is judged.
        let up = Lane::between(client, backend)?;
        let down = Lane::between(backend, client)?;
        // A piece that was partly read would be handed over whole: what is had twice is for the lost packets alone ([`Lane`]).
        if tcp::unread(client)? > 0 || tcp::unread(backend)? > 0 {
            return Err(Errno::AGAIN);
        }
        let mut places = map.introduce(client, backend, now)?;
        for place in &places {
            map.line(place.index).set_hard(map.window() + BEYOND);
        }
        let [place, other] = &mut places;
        if let Err(errno) = map.arm(place, client) {
            map.leave(&places, now);
            return Err(errno);
        }
        // From here on there is no way back: taking an armed socket out loses what is queued.
        let down = map.arm(other, backend).is_ok().then_some(down);
        for (socket, armed) in [(client, true), (backend, down.is_some())] {
            if armed {
                let _ = tcp::look_at_queue(socket);
            }
        }
        Ok(Self { places, up: Some(up), down, looks: 0, look_at: None, watched: [Interest::ALL; 2] })
    }

    /// For sockets that are closed next.
    pub fn leave(&self, map: &mut Sockmap, now: u64) {
        map.leave(&self.places, now);
    }

    /// Which of its two directions has this channel.
    pub fn indexes(&self) -> [u32; 2] {
        [self.places[0].index, self.places[1].index]
    }

    /// Counts what the kernel has moved; when the last byte came, in nanoseconds of `CLOCK_MONOTONIC`, and how many bytes wait
    /// beyond what the window allows.
    pub fn count(&mut self, map: &Sockmap, up: &mut Way, down: &mut Way) -> (u64, u64) {
        let mut both = (0, 0);
        for (lane, way, place) in [(&mut self.up, up, &self.places[0]), (&mut self.down, down, &self.places[1])] {
            if let Some(lane) = lane {
                let seen = map.line(place.index).seen();
                lane.count(way, &seen);
                both = (seen.last.max(both.0), both.1 + lane.waits(&seen).saturating_sub(map.window()));
            }
        }
        both
    }

    /// [`Self::count`] would find nothing.
    pub fn is_counted(&self, map: &Sockmap) -> bool {
        let idle = |lane: &Option<Lane>, place: &Place| {
            let seen = map.line(place.index).seen();
            lane.as_ref().is_none_or(|lane| lane.is_counted(&seen) && lane.waits(&seen) <= map.window())
        };
        idle(&self.up, &self.places[0]) && idle(&self.down, &self.places[1])
    }

    /// Does what there is to do.
    pub fn turn(
        &mut self,
        client: &mut Socket,
        backend: &mut Socket,
        (up, down): (&mut Way, &mut Way),
        stores: &mut Stores,
    ) -> Result<Turn, Stop> {
        let Stores { buffers, pipes: _, sockmap: Some(map) } = stores else { return Err(Stop::Fault(0)) };
        let mut turn = Turn::default();
        let before = (up.bytes, down.bytes);
        let grant = (GRANTED / u64::from(map.joined().max(1))).clamp(LEAST, GRANT);
        let [there, back] = &self.places;
        if let Some(lane) = &mut self.up {
            turn.look |= lane.turn(map.line(there.index), grant, client, backend, up, buffers, &mut turn.up)?;
        }
        if let Some(lane) = &mut self.down {
            turn.look |= lane
                .turn(map.line(back.index), grant, backend, client, down, buffers, &mut turn.down)
                .map_err(mirrored)?;
        }
        if let (Some(there_lane), Some(back_lane)) = (&mut self.up, &mut self.down) {
            let (there_line, back_line) = (map.line(there.index), map.line(back.index));
            there_lane.hold_back(there_line, client, up, || back_lane.is_behind(back_line, client, down));
            back_lane.hold_back(back_line, backend, down, || there_lane.is_behind(there_line, backend, up));
        }
        turn.up.bytes = up.bytes - before.0;
        turn.down.bytes = down.bytes - before.1;
        if self.down.is_none() {
            turn.down =
                down.pump(super::Means::Copy, backend, client, stores).map_err(|b| mirrored(Stop::Broken(b)))?;
        }
        Ok(turn)
    }

    /// How often in a row a turn ended with `look`.
    pub fn looked(&mut self, again: bool) -> u32 {
        self.looks = if again { self.looks + 1 } else { 0 };
        self.looks
    }

    /// Of the client's socket, and of the backend's.
    pub fn interests(&self, up: &Way, down: &Way) -> [Interest; 2] {
        let quiet = |lane: &Option<Lane>, way: &Way| way.passed_on || lane.as_ref().is_some_and(Lane::is_quiet);
        let waits = |way: &Way| !matches!(way.waiting, Waiting::Nothing);
        let (there, back) = (quiet(&self.up, up), quiet(&self.down, down));
        [
            Interest { readable: !there, writable: waits(down) || self.down.is_none() },
            Interest { readable: !back, writable: waits(up) },
        ]
    }
}

/// Of the way back the sockets are the other way round.
fn mirrored(stop: Stop) -> Stop {
    match stop {
        Stop::Broken(Broken::From) => Stop::Broken(Broken::To),
        Stop::Broken(Broken::To) => Stop::Broken(Broken::From),
        other => other,
    }
}
