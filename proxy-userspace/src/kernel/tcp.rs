//! What the kernel says of a TCP socket: how far each direction is, to the byte.

mod again;
mod option;

use std::{
    ffi::c_int,
    io,
    os::fd::{AsFd, AsRawFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

pub use again::say_again;
use option::{get, set};

/// Of `struct tcp_info` (`linux/tcp.h`), which only ever grows at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpInfo {
    /// The peer's FIN is among `received`, or the connection was reset ([`has_failed`]).
    pub finished: bool,
    /// Acknowledged by the peer, the SYN of a connection that was dialled included (v4.1+).
    pub acked: u64,
    /// Come in order, the FIN included (v4.1+).
    pub received: u64,
}

const ACKED: usize = 120;
const RECEIVED: usize = 128;
const NEEDED: usize = 136;

/// `TCP_CLOSE`, `TCP_CLOSE_WAIT`, `TCP_LAST_ACK`, `TCP_CLOSING`, `TCP_TIME_WAIT` (`linux/tcp_states.h`, fixed by
/// `TCP_INFO`).
const AFTER_FIN: [u8; 5] = [7, 8, 9, 11, 6];

/// Takes the socket's lock: what has come before is dealt with when this returns.
pub fn info(socket: impl AsFd) -> Result<TcpInfo, Errno> {
    let mut bytes = [0u8; NEEDED];
    let mut length = NEEDED as libc::socklen_t;
    // SAFETY: a buffer of `length` bytes that outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    check(result)?;
    if (length as usize) < NEEDED {
        return Err(Errno::NOTSUP);
    }
    let word = |at: usize| {
        let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).unwrap_or_default();
        u64::from_ne_bytes(word)
    };
    Ok(TcpInfo { finished: AFTER_FIN.contains(&bytes[0]), acked: word(ACKED), received: word(RECEIVED) })
}

/// There was a reset, or the peer has vanished. Takes nothing: the next call still says so.
pub fn has_failed(socket: impl AsFd) -> bool {
    let socket = socket.as_fd();
    let mut asked = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    poll(&mut asked, Some(&Timespec::default())).is_ok() && asked[0].revents().contains(PollFlags::ERR)
}

/// Bytes written and not yet acknowledged.
pub fn unacked(socket: impl AsFd) -> Result<u64, Errno> {
    ask(socket, libc::TIOCOUTQ)
}

/// Bytes come in order and not yet read, without the FIN.
pub fn unread(socket: impl AsFd) -> Result<u64, Errno> {
    ask(socket, libc::FIONREAD)
}

fn ask(socket: impl AsFd, what: libc::Ioctl) -> Result<u64, Errno> {
    let mut bytes: c_int = 0;
    // SAFETY: both requests write one `int`.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), what, &raw mut bytes) })?;
    Ok(u64::try_from(bytes).unwrap_or_default())
}

/// How many bytes have ever been written, in the measure of [`TcpInfo::acked`]: never too many, and exact when nothing is
/// acknowledged meanwhile.
pub fn written(socket: impl AsFd) -> Result<u64, Errno> {
    let acked = info(&socket)?.acked;
    Ok(acked + unacked(&socket)?)
}

/// Tries before a socket that is never still is given up.
const PATIENCE: usize = 64;

/// The same, exact.
pub fn written_exactly(socket: impl AsFd) -> Result<u64, Errno> {
    for _ in 0..PATIENCE {
        let before = info(&socket)?.acked;
        let written = before + unacked(&socket)?;
        if info(&socket)?.acked == before {
            return Ok(written);
        }
    }
    Err(Errno::AGAIN)
}

/// How many bytes have ever been read by this process, in the measure of [`TcpInfo::received`].
pub fn read_exactly(socket: impl AsFd) -> Result<u64, Errno> {
    for _ in 0..PATIENCE {
        let before = info(&socket)?;
        let unread = unread(&socket)?;
        if info(&socket)? == before {
            return before.received.checked_sub(u64::from(before.finished) + unread).ok_or(Errno::AGAIN);
        }
    }
    Err(Errno::AGAIN)
}

/// Looks at what is queued as if it had just come (`tcp_set_rcvlowat`, v4.18+).
pub fn look_at_queue(socket: impl AsFd) -> Result<(), Errno> {
    set(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1)
}

/// Room for what is sent, in bytes as the kernel accounts them, whatever `net.core.wmem_max` says: CAP_NET_ADMIN.
pub fn force_send_room(socket: impl AsFd, bytes: u32) -> Result<(), Errno> {
    // The kernel doubles it.
    set(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, (bytes / 2) as c_int)
}

/// Lets the peer send what its window allows already, and beyond that two segments at a time. The window it could have had, for
/// [`let_go`].
pub fn hold_back(socket: impl AsFd) -> Result<c_int, Errno> {
    let before: c_int = get(&socket, libc::TCP_WINDOW_CLAMP)?;
    // With less than two a sender waits for more, and is told of it by the next read only when it is twice as much.
    let segments = 2 * get::<c_int>(&socket, libc::TCP_MAXSEG)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, segments)?;
    Ok(before)
}

/// Takes it back. The peer hears of it when something is read next.
pub fn let_go(socket: impl AsFd, window: c_int) -> Result<(), Errno> {
    set(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, window)
}

fn check(result: c_int) -> Result<(), Errno> {
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}
