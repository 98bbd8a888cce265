//! What a client says on a connection, and how it sees the connection end.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{libc, setsockopt_impl, sockopt_impl};
use socket2::SockRef;

use crate::{
    host::Host,
    pattern::{self, Digested},
    wait::patiently,
};

/// Longer than any answer takes in a lab.
const PATIENCE: Duration = Duration::from_secs(10);
/// A stalled or lossy connection still comes to its end in it.
const STALLED: Duration = Duration::from_secs(120);

/// How a connection ended for the one who reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The end of the stream: the other side sent FIN.
    Finished,
    /// RST.
    Reset,
    /// FIN, without the `close_notify` of TLS before it.
    Cut,
}

/// Sends `text` and expects it back.
pub fn echo(stream: &mut (impl Read + Write + AsFd), text: &[u8]) -> Result<()> {
    SockRef::from(&*stream).set_read_timeout(Some(patiently(PATIENCE)))?;
    stream.write_all(text)?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    ensure!(back == text, "{:?} came back as {:?}", String::from_utf8_lossy(text), String::from_utf8_lossy(&back));
    Ok(())
}

/// Sends `bytes` of the pattern `seed` and receives at once, to the end of both: what was sent, and what came.
pub fn exchange(stream: &TcpStream, seed: u64, bytes: u64) -> Result<(Digested, Digested)> {
    stream.set_read_timeout(Some(patiently(STALLED)))?;
    stream.set_write_timeout(Some(patiently(STALLED)))?;
    thread::scope(|scope| {
        let sender = scope.spawn(move || -> Result<Digested> {
            let sent = pattern::send(&mut &*stream, seed, bytes)?;
            stream.shutdown(Shutdown::Write)?;
            Ok(sent)
        });
        let received = pattern::receive(&mut &*stream).context("receiving")?;
        Ok((sender.join().expect("sender").context("sending")?, received))
    })
}

/// Connects, and reads the name that a [`Behaviour::Tagged`](crate::scripted::Behaviour::Tagged) server says.
pub fn who(client: &Host, to: &str) -> Result<String> {
    let to: SocketAddr = to.parse()?;
    let mut stream = client.connect_within(to, PATIENCE).with_context(|| format!("connect {to}"))?;
    stream.set_read_timeout(Some(patiently(PATIENCE)))?;
    stream.write_all(b"\n")?;
    let mut name = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        name.push(byte[0]);
    }
    Ok(String::from_utf8(name)?)
}

/// Closes with RST instead of FIN.
pub fn reset(stream: impl AsFd) -> Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(())
}

/// Reads up to the end: what came before it, and how it ended.
///
/// # Errors
/// When it has not ended after `within`.
pub fn read_to_end(stream: &mut (impl Read + AsFd), within: Duration) -> Result<(Vec<u8>, End)> {
    let within = patiently(within);
    let deadline = Instant::now() + within;
    let (mut all, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "the connection has not ended after {within:?}; {} bytes came", all.len());
        SockRef::from(&*stream).set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok((all, End::Finished)),
            Ok(n) => all.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok((all, End::Reset)),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok((all, End::Cut)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => bail!("reading: {error}"),
        }
    }
}

/// Waits for the end of a connection on which nothing more shall come.
pub fn end_of(stream: &mut (impl Read + AsFd), within: Duration) -> Result<End> {
    let (bytes, end) = read_to_end(stream, within)?;
    ensure!(bytes.is_empty(), "{:?} came before the end", String::from_utf8_lossy(&bytes));
    Ok(end)
}

/// Connects to where the connection shall be ended at once; how that is seen. The reset may be there before connect has
/// returned.
pub fn turned_away(host: &Host, from: IpAddr, to: SocketAddr, within: Duration) -> Result<End> {
    match host.connect_from((from, 0), to) {
        Ok(mut stream) => end_of(&mut stream, within),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(End::Reset),
        Err(error) => bail!("connect {to}: {error}"),
    }
}

/// Reads exactly `count` bytes, or what came until there were no more.
pub fn read_some(stream: &mut (impl Read + AsFd), count: usize) -> Result<Vec<u8>> {
    SockRef::from(&*stream).set_read_timeout(Some(patiently(PATIENCE)))?;
    let mut all = Vec::new();
    Read::take(stream, count as u64).read_to_end(&mut all)?;
    Ok(all)
}

sockopt_impl!(Repair, SetOnly, libc::IPPROTO_TCP, libc::TCP_REPAIR, i32);

/// The socket is gone without a word to the other end, as if its machine had lost power.
pub fn vanish(stream: impl AsFd) -> Result<()> {
    nix::sys::socket::setsockopt(&stream, Repair, &1).context("TCP_REPAIR")
}
