//! Traffic that never stops and counts every answer it does not get.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use shunt_lab::Host;

const PATIENCE: Duration = Duration::from_secs(2);
/// One new connection each.
const REQUEST_EVERY: Duration = Duration::from_millis(5);
/// One message on the connection that stays, one datagram.
const BEAT_EVERY: Duration = Duration::from_millis(20);

/// What has happened so far. Differences of two readings describe the time between them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// HTTP requests answered, each on a connection of its own, by backend 1 and backend 2.
    pub answered: [u64; 2],
    pub failed: u64,
    /// Requests on the one connection that stays.
    pub kept: u64,
    /// Times that connection broke and was made anew.
    pub broken: u64,
    /// UDP datagrams that came back.
    pub datagrams: u64,
    pub lost: u64,
}

impl Tally {
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            answered: [self.answered[0] - earlier.answered[0], self.answered[1] - earlier.answered[1]],
            failed: self.failed - earlier.failed,
            kept: self.kept - earlier.kept,
            broken: self.broken - earlier.broken,
            datagrams: self.datagrams - earlier.datagrams,
            lost: self.lost - earlier.lost,
        }
    }

    pub fn requests(&self) -> u64 {
        self.answered.iter().sum()
    }
}

#[derive(Debug, Default)]
struct Counters {
    stop: AtomicBool,
    answered: [AtomicU64; 2],
    failed: AtomicU64,
    kept: AtomicU64,
    broken: AtomicU64,
    datagrams: AtomicU64,
    lost: AtomicU64,
}

/// Threads in the client's namespace; they end when dropped.
#[derive(Debug)]
pub struct Traffic {
    counters: Arc<Counters>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    pub fn start(client: &Host, web: SocketAddr, echo: SocketAddr) -> Result<Self> {
        let counters = Arc::new(Counters::default());
        let spawn = |work: fn(&Counters, &Host, SocketAddr), to| {
            let (counters, client) = (Arc::clone(&counters), client.clone());
            thread::spawn(move || work(&counters, &client, to))
        };
        let threads = vec![spawn(new_connections, web), spawn(one_connection, web), spawn(datagrams, echo)];
        Ok(Self { counters, threads })
    }

    pub fn tally(&self) -> Tally {
        let c = &self.counters;
        Tally {
            answered: [c.answered[0].load(Relaxed), c.answered[1].load(Relaxed)],
            failed: c.failed.load(Relaxed),
            kept: c.kept.load(Relaxed),
            broken: c.broken.load(Relaxed),
            datagrams: c.datagrams.load(Relaxed),
            lost: c.lost.load(Relaxed),
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.counters.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn new_connections(counters: &Counters, client: &Host, web: SocketAddr) {
    client.run(|| {
        while !counters.stop.load(Relaxed) {
            match connect(web).and_then(|mut stream| request(&mut stream, "close")) {
                Ok(backend) => counters.answered[backend].fetch_add(1, Relaxed),
                Err(_) => counters.failed.fetch_add(1, Relaxed),
            };
            thread::sleep(REQUEST_EVERY);
        }
    });
}

fn one_connection(counters: &Counters, client: &Host, web: SocketAddr) {
    client.run(|| {
        let mut stream = None;
        while !counters.stop.load(Relaxed) {
            thread::sleep(BEAT_EVERY);
            let kept = match &mut stream {
                Some(stream) => request(stream, "keep-alive").map(drop),
                None => connect(web).map(|fresh| stream = Some(fresh)),
            };
            match kept {
                Ok(()) => counters.kept.fetch_add(1, Relaxed),
                Err(_) => {
                    stream = None;
                    counters.broken.fetch_add(1, Relaxed)
                }
            };
        }
    });
}

fn datagrams(counters: &Counters, client: &Host, echo: SocketAddr) {
    let Ok(socket) = client.udp((client.address_like(echo.ip()), 0)) else { return };
    let round_trip = || -> io::Result<()> {
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        socket.send_to(b"beat", echo)?;
        let mut answer = [0; 64];
        let n = socket.recv(&mut answer)?;
        if answer[..n].ends_with(b"beat") { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    };
    while !counters.stop.load(Relaxed) {
        match round_trip() {
            Ok(()) => counters.datagrams.fetch_add(1, Relaxed),
            Err(_) => counters.lost.fetch_add(1, Relaxed),
        };
        thread::sleep(BEAT_EVERY);
    }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Asks for the page that names its backend; the backend's index.
fn request(stream: &mut TcpStream, connection: &str) -> io::Result<usize> {
    write!(stream, "GET /who HTTP/1.1\r\nHost: demo\r\nConnection: {connection}\r\n\r\n")?;
    // Head and page are far smaller than this and come in one or two segments.
    let mut answer = [0; 2048];
    let mut got = 0;
    loop {
        match stream.read(&mut answer[got..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => got += n,
        }
        match &answer[..got] {
            page if page.ends_with(b"backend1\n") => return Ok(0),
            page if page.ends_with(b"backend2\n") => return Ok(1),
            _ => {}
        }
    }
}
