//! One connection of a scripted TCP server.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use super::{Behaviour, Ended, Record, Shared, Start};
use crate::{pattern, stream::Stream};

/// Thousands of connections at once, each a thread: small stacks.
const STACK: usize = 128 * 1024;
/// … but a handshake goes deep.
const TLS_STACK: usize = 512 * 1024;

/// Reads once, answers, closes.
pub(super) fn reply(mut stream: &Stream, answer: &[u8], received: &AtomicU64) {
    let mut request = [0; 4096];
    if let Ok(n) = stream.read(&mut request) {
        received.fetch_add(n as u64, Ordering::Relaxed);
        let _ = stream.write_all(answer);
    }
}

/// A connection is open from the moment it is accepted; one with TLS, from the end of its handshake.
pub(super) fn serve_on_thread(id: u64, tcp: TcpStream, peer: SocketAddr, shared: &Arc<Shared>) {
    let (stack, begun) = match &shared.tls {
        Some(_) => (TLS_STACK, Err(tcp)),
        None => {
            let stream = Stream::from(tcp);
            shared.open().insert(id, stream.clone());
            (STACK, Ok(stream))
        }
    };
    let thread_shared = Arc::clone(shared);
    let thread = thread::Builder::new().stack_size(stack).spawn(move || {
        let stream = match begun.or_else(|tcp| shake_hands(id, tcp, &thread_shared)) {
            Ok(stream) => stream,
            Err(error) => return thread_shared.records().push(Record::failed(peer, error.kind())),
        };
        let record = match &thread_shared.behaviour {
            Behaviour::Hold => return,
            Behaviour::Reply(answer) => {
                reply(&stream, answer, &thread_shared.received);
                None
            }
            _ => Some(serve(&stream, peer, &thread_shared)),
        };
        // Out of the map before it is dropped, so that the close happens here and before the record shows.
        thread_shared.open().remove(&id);
        drop(stream);
        thread_shared.records().extend(record);
    });
    if thread.is_err() {
        shared.open().remove(&id);
    }
}

fn shake_hands(id: u64, tcp: TcpStream, shared: &Shared) -> io::Result<Stream> {
    let stream = match &shared.tls {
        Some(tls) => tls.accept(tcp)?,
        None => tcp.into(),
    };
    shared.open().insert(id, stream.clone());
    Ok(stream)
}

fn serve(stream: &Stream, peer: SocketAddr, shared: &Shared) -> Record {
    let _ = stream.set_nodelay(true);
    let mut life = Life { stream, shared, received: pattern::Running::default(), sent: 0 };
    let ended = match &shared.behaviour {
        Behaviour::Echo => life.echo(),
        Behaviour::Tagged(name) => life.write(format!("{name}\n").as_bytes()).and_then(|()| life.echo()),
        Behaviour::ResetAtOnce => life.reset(),
        Behaviour::ResetAfter(bytes) => life.reset_after(*bytes),
        Behaviour::Exchange { seed, bytes, start } => life.exchange(*seed, *bytes, *start),
        // Served by the acceptor itself.
        Behaviour::Hold | Behaviour::Reply(_) => Ok(Ended::ByServer),
    };
    let ended = ended.unwrap_or_else(|error| Ended::Failed(error.kind()));
    Record { peer, received: life.received.finish(), sent: life.sent, ended }
}

impl Record {
    /// Nothing was said.
    fn failed(peer: SocketAddr, kind: io::ErrorKind) -> Self {
        Self { peer, received: pattern::Running::default().finish(), sent: 0, ended: Ended::Failed(kind) }
    }
}

struct Life<'a> {
    stream: &'a Stream,
    shared: &'a Shared,
    received: pattern::Running,
    sent: u64,
}

impl Life<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = (&mut self.stream).read(buffer)?;
        self.received.update(&buffer[..n]);
        self.shared.received.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        (&mut self.stream).write_all(bytes)?;
        self.sent += bytes.len() as u64;
        Ok(())
    }

    fn echo(&mut self) -> io::Result<Ended> {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match self.read(&mut buffer)? {
                0 => return Ok(Ended::ClientFinished),
                n => self.write(&buffer[..n])?,
            }
        }
    }

    fn read_to_end(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        while self.read(&mut buffer)? > 0 {}
        Ok(())
    }

    fn reset(&mut self) -> io::Result<Ended> {
        socket2::SockRef::from(self.stream).set_linger(Some(Duration::ZERO))?;
        Ok(Ended::ByServer)
    }

    fn reset_after(&mut self, bytes: usize) -> io::Result<Ended> {
        let mut left = bytes;
        let mut buffer = vec![0; 16 * 1024];
        while left > 0 {
            let piece = left.min(buffer.len());
            match self.read(&mut buffer[..piece])? {
                0 => return Ok(Ended::ClientFinished),
                n => left -= n,
            }
        }
        self.reset()
    }

    fn exchange(&mut self, seed: u64, bytes: u64, start: Start) -> io::Result<Ended> {
        let stream = self.stream;
        let send = || -> io::Result<u64> {
            pattern::send(&mut &*stream, seed, bytes)?;
            stream.shutdown(Shutdown::Write)?;
            Ok(bytes)
        };
        if let Start::AfterSayingBack(first) = start {
            io::copy(&mut stream.take(first as u64), &mut &*stream)?;
            (&*stream).read_exact(&mut [0])?;
        }
        match start {
            Start::AfterClientFinished => {
                self.read_to_end()?;
                self.sent = send()?;
            }
            Start::AtOnce | Start::AfterSayingBack(_) => {
                self.sent = thread::scope(|scope| {
                    let sender = scope.spawn(send);
                    let received = self.read_to_end();
                    let sent = sender.join().unwrap_or_else(|_| Err(io::Error::other("the sending thread panicked")));
                    received.and(sent)
                })?;
            }
        }
        Ok(Ended::ClientFinished)
    }
}
