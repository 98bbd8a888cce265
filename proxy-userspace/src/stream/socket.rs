//! The sockets of the stream path: how they are made, and what edge-triggered epoll has told of them.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt as options};
use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, connect, getsockname, ipproto, listen, socket_with, sockopt},
};

use crate::kernel::repair;

/// Connections that may wait to be accepted; `net.core.somaxconn` caps it.
const BACKLOG: i32 = 4096;
const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// A connected or connecting socket and its readiness. A flag that is set may be wrong, and the call then says EAGAIN; one
/// that is not set is right until the next event.
#[derive(Debug)]
pub struct Socket {
    pub fd: OwnedFd,
    pub readable: bool,
    pub writable: bool,
    /// The peer's FIN has come: after what is queued there is nothing more.
    pub finished: bool,
    /// Both directions are over, or there was a reset.
    pub hung_up: bool,
    /// There was a reset, or the peer has vanished.
    pub failed: bool,
    /// Urgent data has come. A read stops at its mark, so a short one need not have emptied the queue (`tcp_recvmsg_locked`),
    /// and a splice does not get past it (`tcp_read_sock`).
    pub urgent: bool,
    /// The peer has been told in its own words why this is the end; a reset might overtake them.
    pub told: bool,
}

impl Socket {
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            readable: false,
            writable: false,
            finished: false,
            hung_up: false,
            failed: false,
            urgent: false,
            told: false,
        }
    }

    pub fn note(&mut self, events: EventFlags) {
        let over = events.intersects(EventFlags::HUP | EventFlags::ERR);
        self.hung_up |= over;
        self.failed |= events.contains(EventFlags::ERR);
        self.finished |= events.contains(EventFlags::RDHUP);
        self.urgent |= events.contains(EventFlags::PRI);
        self.readable |= over || events.intersects(EventFlags::IN | EventFlags::RDHUP);
        self.writable |= over || events.contains(EventFlags::OUT);
    }

    /// A read gave less than there was room for: the queue is empty, and what comes next makes a new event. True when the
    /// FIN is known to be all that is left, so that no call is needed to read it.
    pub fn read_short(&mut self) -> bool {
        self.readable = self.finished || self.hung_up || self.urgent;
        self.finished && !self.hung_up && !self.urgent
    }

    /// The kernel asks now and then whether the peer is there (`net.ipv4.tcp_keepalive_time` and its companions).
    pub fn probe_peer(&self) {
        let _ = sockopt::set_socket_keepalive(&self.fd, true);
    }

    /// Sends the acknowledgement that is due, if one is.
    pub fn acknowledge(&self) {
        let _ = sockopt::set_tcp_quickack(&self.fd, true);
    }

    /// Closing it will send a reset, and throws away what is not sent; unless the peer knows already.
    pub fn reset_on_close(&self) {
        if self.told {
            return;
        }
        let _ = sockopt::set_socket_linger(&self.fd, Some(Duration::ZERO));
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    }
}

/// Listens, but accepts nothing yet. Other sockets of this kind may have the same address: the kernel deals connections out
/// among them (`SO_REUSEPORT`). The address need not be on this machine yet. What is accepted inherits its options.
pub fn listener(address: SocketAddr) -> io::Result<OwnedFd> {
    let fd = socket_with(family(address.ip()), SocketType::STREAM, FLAGS, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    sockopt::set_socket_reuseport(&fd, true)?;
    sockopt::set_tcp_nodelay(&fd, true)?;
    // Urgent bytes are bytes of the stream (RFC 6093 §4).
    sockopt::set_socket_oobinline(&fd, true)?;
    match address.ip() {
        IpAddr::V4(_) => sockopt::set_ip_freebind(&fd, true)?,
        IpAddr::V6(_) => {
            sockopt::set_ipv6_v6only(&fd, true)?;
            sockopt::set_ipv6_freebind(&fd, true)?;
        }
    }
    bind(&fd, &address)?;
    Ok(fd)
}

/// Whether nobody listens there: `SO_REUSEPORT` would let a second program of the same user take a part of the connections.
pub fn is_free(address: SocketAddr) -> io::Result<()> {
    let fd = socket_with(family(address.ip()), SocketType::STREAM, FLAGS, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    match address.ip() {
        IpAddr::V4(_) => sockopt::set_ip_freebind(&fd, true)?,
        IpAddr::V6(_) => {
            sockopt::set_ipv6_v6only(&fd, true)?;
            sockopt::set_ipv6_freebind(&fd, true)?;
        }
    }
    Ok(bind(&fd, &address)?)
}

/// The ports that anybody listens on in this network namespace, at whatever address. The kernel lists listening sockets first.
pub fn listened_ports() -> io::Result<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for file in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let table = match File::open(file) {
            Ok(table) => table,
            // No IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for line in BufReader::new(table).lines().skip(1) {
            let line = line?;
            let mut fields = line.split_whitespace().skip(1);
            let (local, state) = (fields.next(), fields.nth(1));
            if state != Some(LISTENING) {
                break;
            }
            let port = local.and_then(|local| local.rsplit(':').next());
            ports.extend(port.and_then(|port| u16::from_str_radix(port, 16).ok()));
        }
    }
    Ok(ports)
}

/// `TCP_LISTEN`, as `/proc/net/tcp` writes it.
const LISTENING: &str = "0A";

/// From here on connections are taken by the kernel.
pub fn start_listening(fd: &OwnedFd) -> io::Result<()> {
    Ok(listen(fd, BACKLOG)?)
}

/// From where a backend is dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// An address and port of this machine that the kernel chooses.
    Anywhere,
    /// This address, be it one of this machine or not.
    Address(IpAddr),
    /// This port, with segments of at most so many bytes.
    Port { port: u16, segment: Option<u16> },
}

/// Begins to connect. The socket becomes writable when the backend has answered.
pub fn dial(to: SocketAddr, from: From, keepalive: bool) -> Result<Socket, Errno> {
    let fd = socket_with(family(to.ip()), SocketType::STREAM, FLAGS, Some(ipproto::TCP))?;
    sockopt::set_tcp_nodelay(&fd, true)?;
    sockopt::set_socket_oobinline(&fd, true)?;
    if keepalive {
        sockopt::set_socket_keepalive(&fd, true)?;
    }
    // The acknowledgement of the backend's SYN goes with the first bytes, a segment less for each connection
    // (`tcp_rcv_synsent_state_process`). Who has none to send asks for it: `Socket::acknowledge`.
    sockopt::set_tcp_quickack(&fd, false)?;
    match from {
        From::Anywhere => {}
        From::Address(source) => bind_to_foreign(&fd, source)?,
        From::Port { port, segment } => bind_to_port(&fd, family(to.ip()), port, segment)?,
    }
    match connect(&fd, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(errno) => return Err(errno),
    }
    if let From::Port { segment: Some(_), .. } = from {
        // The SYN has said it. What the answer says would be cut to it, too (`tcp_parse_options`, v6.18).
        let _ = repair::limit_segments(&fd, 0);
    }
    Ok(Socket::new(fd))
}

/// The port is chosen when it is known where to, so that as many connections are possible as to each backend.
fn bind_to_foreign(fd: &OwnedFd, source: IpAddr) -> Result<(), Errno> {
    let errno = |errno: nix::errno::Errno| Errno::from_raw_os_error(errno as i32);
    // Both are bits of the socket, whatever its family (`ipv6_setsockopt` passes SOL_IP on, v6.18).
    setsockopt(fd, options::IpTransparent, &true).map_err(errno)?;
    setsockopt(fd, options::IpBindAddressNoPort, &true).map_err(errno)?;
    bind(fd, &SocketAddr::new(source, 0))
}

/// Towards other backends the port has other sockets of ours (`SO_REUSEADDR`).
fn bind_to_port(fd: &OwnedFd, family: AddressFamily, port: u16, segment: Option<u16>) -> Result<(), Errno> {
    sockopt::set_socket_reuseaddr(fd, true)?;
    if let Some(segment) = segment {
        // Best effort: the pair is looked at before it is handed over.
        let _ = repair::limit_segments(fd, segment);
    }
    let any: IpAddr = match family {
        AddressFamily::INET => Ipv4Addr::UNSPECIFIED.into(),
        _ => Ipv6Addr::UNSPECIFIED.into(),
    };
    bind(fd, &SocketAddr::new(any, port))
}

/// What the client dialled.
pub fn local_address(fd: &OwnedFd) -> Option<SocketAddr> {
    SocketAddr::try_from(getsockname(fd).ok()?).ok()
}
