//! Netlink sockets of the netfilter family: one that hears events, one that asks.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use super::{ConntrackError, Hear, filter};

/// Datagrams read by one `recvmmsg`.
const BATCH: usize = 128;
/// One event is a datagram of 200–500 bytes.
const SLOT: usize = 2048;

fn failed(call: &'static str) -> ConntrackError {
    ConntrackError::Call { call, source: io::Error::last_os_error() }
}

fn open(flags: libc::c_int) -> Result<OwnedFd, ConntrackError> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_NETFILTER) };
    if fd < 0 {
        return Err(failed("socket(AF_NETLINK, NETLINK_NETFILTER)"));
    }
    // SAFETY: `fd` was just opened and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero sockaddr_nl is valid: the kernel chooses the port, no groups.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: `address` outlives the call and `length` is its size.
    if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(failed("bind(AF_NETLINK)"));
    }
    Ok(fd)
}

fn set_option<T>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` outlives the call and `length` is its size.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, ptr::from_ref(value).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What one batch read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batch {
    /// So many datagrams, at least one.
    Read(usize),
    Empty,
    /// The receive buffer ran over: datagrams between the last batch and the next are missing.
    Overrun,
}

/// Hears conntrack events of the network namespace it was opened in.
#[derive(Debug)]
pub struct EventSocket {
    fd: OwnedFd,
    buffer: Box<[u8]>,
    lengths: [usize; BATCH],
}

impl AsRawFd for EventSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl EventSocket {
    /// `receive_buffer`: bytes the kernel may queue; 32 MiB hold some 52,000 events. Without `CAP_NET_ADMIN` in the
    /// initial user namespace it is capped at `net.core.rmem_max`.
    /// `id_mask`: what has none of these bits in its mark is not queued.
    pub fn open(receive_buffer: usize, hear: Hear, id_mask: u32) -> Result<Self, ConntrackError> {
        let fd = open(libc::SOCK_NONBLOCK)?;
        let mut steps = filter::program(id_mask);
        let program = libc::sock_fprog { len: steps.len() as libc::c_ushort, filter: steps.as_mut_ptr() };
        set_option(&fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
            .map_err(|source| ConntrackError::Call { call: "setsockopt(SO_ATTACH_FILTER)", source })?;
        let size = libc::c_int::try_from(receive_buffer).unwrap_or(libc::c_int::MAX);
        if set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &size).is_err() {
            set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUF, &size)
                .map_err(|source| ConntrackError::Call { call: "setsockopt(SO_RCVBUF)", source })?;
        }
        let ends = [libc::NFNLGRP_CONNTRACK_UPDATE, libc::NFNLGRP_CONNTRACK_DESTROY];
        let groups: &[libc::c_int] = match hear {
            Hear::Ends => &ends,
            Hear::BeginningsAndEnds => &[libc::NFNLGRP_CONNTRACK_NEW, ends[0], ends[1]],
        };
        for group in groups {
            set_option(&fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)
                .map_err(|source| ConntrackError::Call { call: "setsockopt(NETLINK_ADD_MEMBERSHIP)", source })?;
        }
        Ok(Self { fd, buffer: vec![0; BATCH * SLOT].into(), lengths: [0; BATCH] })
    }

    /// Reads up to 128 datagrams without waiting.
    pub fn read(&mut self) -> Result<Batch, ConntrackError> {
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: SLOT }; BATCH];
        // SAFETY: an all-zero mmsghdr is valid: no name, no control data.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        for ((slot, part), header) in self.buffer.chunks_exact_mut(SLOT).zip(&mut parts).zip(&mut headers) {
            part.iov_base = slot.as_mut_ptr().cast();
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: every header points at one iovec, every iovec at SLOT bytes of `self.buffer`; all outlive the call.
        let read = unsafe {
            let count = BATCH as libc::c_uint;
            libc::recvmmsg(self.fd.as_raw_fd(), headers.as_mut_ptr(), count, libc::MSG_DONTWAIT, ptr::null_mut())
        };
        let Ok(read) = usize::try_from(read) else { return Self::nothing_read() };
        for (length, header) in self.lengths.iter_mut().zip(&headers).take(read) {
            *length = (header.msg_len as usize).min(SLOT);
        }
        Ok(if read == 0 { Batch::Empty } else { Batch::Read(read) })
    }

    fn nothing_read() -> Result<Batch, ConntrackError> {
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOBUFS) => Ok(Batch::Overrun),
            Some(libc::EINTR | libc::EAGAIN) => Ok(Batch::Empty),
            _ => Err(ConntrackError::Call { call: "recvmmsg(NETLINK_NETFILTER)", source: error }),
        }
    }

    /// The datagrams of the last [`Batch::Read`].
    pub fn datagrams(&self, read: usize) -> impl Iterator<Item = &[u8]> {
        self.buffer.chunks_exact(SLOT).zip(&self.lengths).take(read).map(|(slot, length)| &slot[..*length])
    }
}

/// Asks and waits for the answer.
#[derive(Debug)]
pub struct RequestSocket {
    fd: OwnedFd,
    buffer: Box<[u8]>,
}

impl RequestSocket {
    pub fn open() -> Result<Self, ConntrackError> {
        let fd = open(0)?;
        // An answer is queued before `send` returns; the limit only guards against waiting for ever.
        let patience = libc::timeval { tv_sec: 5, tv_usec: 0 };
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)
            .map_err(|source| ConntrackError::Call { call: "setsockopt(SO_RCVTIMEO)", source })?;
        let on: libc::c_int = 1;
        set_option(&fd, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, &on)
            .map_err(|source| ConntrackError::Call { call: "setsockopt(NETLINK_CAP_ACK)", source })?;
        Ok(Self { fd, buffer: vec![0; 64 * 1024].into() })
    }

    pub fn send(&mut self, bytes: &[u8]) -> Result<(), ConntrackError> {
        // SAFETY: `bytes` outlives the call.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 { Err(failed("send(NETLINK_NETFILTER)")) } else { Ok(()) }
    }

    /// One datagram, of one or more messages.
    pub fn receive(&mut self) -> Result<&[u8], ConntrackError> {
        loop {
            // SAFETY: `self.buffer` outlives the call and its length is given.
            let read =
                unsafe { libc::recv(self.fd.as_raw_fd(), self.buffer.as_mut_ptr().cast(), self.buffer.len(), 0) };
            match usize::try_from(read) {
                Ok(read) => return Ok(&self.buffer[..read.min(self.buffer.len())]),
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(failed("recv(NETLINK_NETFILTER)")),
            }
        }
    }
}
