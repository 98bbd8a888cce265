//! One end of a connection: TCP, or TLS over it, used alike, so that one test shows what holds for both.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;

/// What TLS does with the bytes of a socket.
pub trait Session: fmt::Debug + Send + Sync {
    /// # Errors
    /// `UnexpectedEof` when the stream ends and TLS has not said so.
    fn read(&self, tcp: &TcpStream, into: &mut [u8]) -> io::Result<usize>;
    fn write(&self, tcp: &TcpStream, from: &[u8]) -> io::Result<usize>;
    /// The certificate that the peer has shown, DER.
    fn peer_certificate(&self) -> Option<Vec<u8>>;
    /// `close_notify`, once.
    fn finish(&self, tcp: &TcpStream) -> io::Result<()>;
}

/// Makes a session of an accepted connection.
pub trait Accept: fmt::Debug + Send + Sync {
    fn accept(&self, tcp: TcpStream) -> io::Result<Stream>;
}

/// Clones are the same connection, which is closed with the last of them.
#[derive(Debug, Clone)]
pub struct Stream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tcp: TcpStream,
    session: Option<Arc<dyn Session>>,
}

impl Stream {
    pub fn secured(tcp: TcpStream, session: Arc<dyn Session>) -> Self {
        Self(Arc::new(Inner { tcp, session: Some(session) }))
    }

    /// As [`TcpStream::shutdown`]; TLS says the end first.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let said = match (&self.0.session, how) {
            (Some(session), Shutdown::Write | Shutdown::Both) => session.finish(&self.0.tcp),
            (Some(_), Shutdown::Read) | (None, _) => Ok(()),
        };
        self.0.tcp.shutdown(how)?;
        said
    }

    /// `close_notify` alone, without a FIN.
    pub fn say_end(&self) -> io::Result<()> {
        self.0.session.as_ref().map_or(Ok(()), |session| session.finish(&self.0.tcp))
    }

    /// A FIN alone, which TLS has not announced.
    pub fn cut(&self) -> io::Result<()> {
        self.0.tcp.shutdown(Shutdown::Write)
    }

    /// The certificate that the peer has shown, DER.
    pub fn peer_certificate(&self) -> Option<Vec<u8>> {
        self.0.session.as_ref()?.peer_certificate()
    }

    pub fn tcp(&self) -> &TcpStream {
        &self.0.tcp
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.tcp.local_addr()
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.0.tcp.peer_addr()
    }

    pub fn set_nodelay(&self, on: bool) -> io::Result<()> {
        self.0.tcp.set_nodelay(on)
    }

    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.tcp.set_read_timeout(timeout)
    }

    /// One that reads while another writes.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(self.clone())
    }
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Self {
        Self(Arc::new(Inner { tcp, session: None }))
    }
}

impl Read for &Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &self.0.session {
            Some(session) => session.read(&self.0.tcp, into),
            None => (&self.0.tcp).read(into),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match &self.0.session {
            Some(session) => session.write(&self.0.tcp, from),
            None => (&self.0.tcp).write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        (&*self).read(into)
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        (&*self).write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.tcp.as_fd()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // As every program that is done says it, unless it goes with a reset.
        let abrupt = SockRef::from(&self.tcp).linger().is_ok_and(|linger| linger.is_some());
        if let (Some(session), false) = (&self.session, abrupt) {
            let _ = self.tcp.set_nonblocking(true);
            let _ = session.finish(&self.tcp);
        }
    }
}
