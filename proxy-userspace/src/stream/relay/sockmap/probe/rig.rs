//! A client, a server, and two joined sockets between them, all in one thread.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{
    kernel::{
        sockmap::{Seen, Sockmap},
        tcp,
    },
    stream::{
        relay::{
            Stores, Way,
            buffers::Buffers,
            pipes::Pipes,
            sockmap::{Joined, Stop},
        },
        socket::Socket,
    },
};

/// For one check; a loaded machine takes a hundredth of it.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Nothing has moved for so long.
const STILL: Duration = Duration::from_millis(30);

pub struct Rig {
    pub client: Talker,
    pub server: Talker,
    pub near: [Socket; 2],
    ways: [Way; 2],
    joined: Option<Joined>,
    stores: Stores,
}

/// What an end says.
#[derive(Debug, Clone, Copy)]
pub struct Talk {
    /// More.
    pub bytes: u64,
    pub finish: bool,
}

/// One end: says bytes that follow from their place, and compares what it hears.
pub struct Talker {
    pub stream: TcpStream,
    says: Pattern,
    hears: Pattern,
    pub sent: u64,
    to_send: u64,
    finish: bool,
    finished: bool,
    pub heard: u64,
    pub ended: bool,
    pub reads: bool,
}

/// Whether this machine has the address.
pub fn is_there(address: IpAddr) -> bool {
    TcpListener::bind((address, 0)).is_ok()
}

impl Rig {
    pub fn new(map: Sockmap, address: IpAddr) -> Result<Self, String> {
        let make = || -> io::Result<_> { Ok((pair(address)?, pair(address)?)) };
        let ((a, client), (b, server)) = match make() {
            Ok(pairs) => pairs,
            Err(error) => return Err(format!("no connection to {address}: {error}")),
        };
        let near = [a, b].map(|stream| Socket::new(stream.into()));
        let stores = Stores { buffers: Buffers::default(), pipes: Pipes::new(0), sockmap: Some(map) };
        Ok(Self {
            client: Talker::new(client, 1),
            server: Talker::new(server, 2),
            near,
            ways: Default::default(),
            joined: None,
            stores,
        })
    }

    /// Takes the pair out of the maps and gives them back.
    pub fn end(mut self) -> Option<Sockmap> {
        let mut map = self.stores.sockmap.take()?;
        if let Some(joined) = &self.joined {
            joined.leave(&mut map, 0);
        }
        Some(map)
    }

    pub fn join(&mut self) -> Result<(), String> {
        let Some(map) = &mut self.stores.sockmap else { return Err("no maps".into()) };
        let [a, b] = &self.near;
        let joined = Joined::new(map, a, b, 0).map_err(|errno| format!("the sockets cannot be joined: {errno}"))?;
        self.joined = Some(joined);
        Ok(())
    }

    /// Joins, and lets each side say something so that both directions are under way.
    pub fn greet(&mut self) -> Result<(), String> {
        self.join()?;
        for talker in [&mut self.client, &mut self.server] {
            talker.talk(Talk { bytes: 10, finish: false });
        }
        self.wait("the first bytes", |rig| rig.client.heard == 10 && rig.server.heard == 10)
    }

    /// Until both sides have heard all that the other said, its end too.
    pub fn through(&mut self) -> Result<(), String> {
        self.client.finish = true;
        self.server.finish = true;
        self.wait("all bytes and both ends", |rig| rig.client.ended && rig.server.ended)?;
        for (name, from, to) in [("up", &self.client, &self.server), ("down", &self.server, &self.client)] {
            if from.sent != to.heard {
                return Err(format!("{name}: {} bytes were sent and {} came", from.sent, to.heard));
            }
        }
        Ok(())
    }

    pub fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        while !done(self) {
            if !self.step()? {
                if Instant::now() > until {
                    let (heard, sent) = ([self.server.heard, self.client.heard], [self.client.sent, self.server.sent]);
                    return Err(format!("{what} did not come: {heard:?} of {sent:?} bytes, {:?}", self.seen()));
                }
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(())
    }

    pub fn until_still(&mut self) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        let mut moved = Instant::now();
        while moved.elapsed() < STILL && Instant::now() < until {
            match self.step()? {
                true => moved = Instant::now(),
                false => std::thread::sleep(Duration::from_micros(100)),
            }
        }
        Ok(())
    }

    /// The client says so much, and it is copied, as the daemon does before it joins.
    pub fn before_the_join(&mut self, bytes: u64) -> Result<(), String> {
        self.client.talk(Talk { bytes, finish: false });
        let until = Instant::now() + PATIENCE;
        while self.server.heard < bytes {
            self.step()?;
            self.relay_by_hand()?;
            if Instant::now() > until {
                return Err(format!("{} of {bytes} bytes came, relayed by hand", self.server.heard));
            }
        }
        Ok(())
    }

    fn relay_by_hand(&mut self) -> Result<(), String> {
        let mut buffer = [0; 4096];
        let [a, b] = &self.near;
        match rustix::io::read(&a.fd, &mut buffer) {
            Err(Errno::AGAIN) => Ok(()),
            Ok(read) => match rustix::io::write(&b.fd, &buffer[..read]) {
                Ok(written) if written == read => Ok(()),
                other => Err(format!("{other:?} of {read} bytes by hand")),
            },
            Err(errno) => Err(errno.to_string()),
        }
    }

    pub fn seen(&self) -> [Seen; 2] {
        let (Some(joined), Some(map)) = (&self.joined, &self.stores.sockmap) else { return Default::default() };
        joined.indexes().map(|index| map.line(index).seen())
    }

    /// Everything that can be done now. False when it was nothing.
    pub fn step(&mut self) -> Result<bool, String> {
        let (client, server) = (self.client.step(), self.server.step());
        let mut moved =
            client.map_err(|e| format!("the client: {e}"))? | server.map_err(|e| format!("the server: {e}"))?;
        let Some(joined) = &mut self.joined else { return Ok(moved) };
        let [a, b] = &mut self.near;
        for socket in [&mut *a, &mut *b] {
            look(socket);
        }
        let [up, down] = &mut self.ways;
        let before = up.bytes + down.bytes;
        match joined.turn(a, b, (&mut *up, &mut *down), &mut self.stores) {
            Ok(turn) => moved |= turn.up.finished || turn.down.finished,
            Err(Stop::Broken(side)) => return Err(format!("a socket broke: {side:?}")),
            Err(Stop::Overflow) => return Err("more was passed than the window allows".into()),
            Err(Stop::Fault(fault)) => return Err(format!("the pieces do not fit together ({fault})")),
        }
        Ok(moved | (up.bytes + down.bytes > before))
    }
}

/// What epoll would tell.
fn look(socket: &mut Socket) {
    (socket.readable, socket.writable) = (true, true);
    let mut asked = [PollFd::new(&socket.fd, PollFlags::RDHUP)];
    if poll(&mut asked, Some(&Timespec::default())).is_ok() {
        let answer = asked[0].revents();
        let over = answer.intersects(PollFlags::HUP | PollFlags::ERR);
        socket.finished |= answer.contains(PollFlags::RDHUP);
        socket.hung_up |= over;
    }
}

/// The accepted socket, and the one that dialled.
fn pair(address: IpAddr) -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(SocketAddr::new(address, 0))?;
    let far = TcpStream::connect(listener.local_addr()?)?;
    let (near, _) = listener.accept()?;
    for stream in [&near, &far] {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
    }
    Ok((near, far))
}

impl Talker {
    fn new(stream: TcpStream, seed: u64) -> Self {
        // There are two, 1 and 2.
        let (says, hears) = (Pattern::new(seed), Pattern::new(3 - seed));
        let (finish, finished, ended) = (false, false, false);
        Self { stream, says, hears, sent: 0, to_send: 0, finish, finished, heard: 0, ended, reads: true }
    }

    /// Says so much more; 0 takes back what is not said yet.
    pub fn talk(&mut self, talk: Talk) {
        self.to_send = if talk.bytes == 0 { self.sent } else { self.to_send + talk.bytes };
        self.finish = talk.finish;
    }

    /// The last bytes go out once more, in front of those that follow.
    pub fn say_again(&mut self, bytes: u32) -> io::Result<()> {
        // Nothing else may hold the old socket: it goes with its last descriptor.
        let placeholder = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let old = std::mem::replace(&mut self.stream, TcpStream::from(OwnedFd::from(placeholder)));
        self.stream = tcp::say_again(old, bytes)?;
        self.sent -= u64::from(bytes);
        Ok(())
    }

    fn step(&mut self) -> io::Result<bool> {
        let said = self.say()?;
        let heard = self.reads && self.hear()?;
        Ok(said || heard)
    }

    fn say(&mut self) -> io::Result<bool> {
        if self.sent == self.to_send {
            if self.finish && !self.finished {
                self.finished = true;
                self.stream.shutdown(Shutdown::Write)?;
                return Ok(true);
            }
            return Ok(false);
        }
        let bytes = self.says.from(self.sent, (self.to_send - self.sent) as usize);
        match self.stream.write(bytes) {
            Ok(sent) => {
                self.sent += sent as u64;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn hear(&mut self) -> io::Result<bool> {
        if self.ended {
            return Ok(false);
        }
        let mut bytes = [0; PERIOD];
        match self.stream.read(&mut bytes) {
            Ok(0) => {
                self.ended = true;
                Ok(true)
            }
            Ok(count) => {
                if bytes[..count] != *self.hears.from(self.heard, count) {
                    return Err(io::Error::other(format!("behind byte {} came what was not sent", self.heard)));
                }
                self.heard += count as u64;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Bytes that repeat after a prime number: one that is lost, doubled or moved is noticed.
struct Pattern(Vec<u8>);

const PERIOD: usize = 65_521;

impl Pattern {
    fn new(seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        let once: Vec<u8> = (0..PERIOD).map(next).collect();
        // Twice, so that a piece from anywhere is in one place.
        Self([&once[..], &once[..]].concat())
    }

    /// At most `PERIOD` bytes from `place` on.
    fn from(&self, place: u64, bytes: usize) -> &[u8] {
        let start = (place % PERIOD as u64) as usize;
        &self.0[start..start + bytes.min(PERIOD)]
    }
}
