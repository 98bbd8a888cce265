//! What the kernel knows of a living TCP connection, and a socket's going without a word: `TCP_REPAIR`
//! (tcp(7), `do_tcp_setsockopt`, v3.5+; needs `CAP_NET_ADMIN` in the network namespace).
//!
//! A socket under repair goes on: it acknowledges, and sends again what was lost. It cannot be read from or written to.
//! One that is closed under repair, also by the end of the process, sends neither FIN nor RST (`__tcp_close`,
//! `tcp_disconnect`, v3.5+).

use std::{
    io,
    mem::{offset_of, size_of},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use libc::{c_int, c_void};
use proxy_core::handoff::Facts;
use rustix::net::sockopt;

/// A call on one of the two sockets failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub struct RepairError {
    pub call: &'static str,
    pub source: io::Error,
}

/// Sequence numbers of a connection, as its next byte in each direction will have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequences {
    /// The next byte from the peer. Its FIN counts as one.
    pub rcv_nxt: u32,
    /// The next byte that will be written.
    pub write_seq: u32,
    /// Bytes before `rcv_nxt` that were not read. Without the FIN.
    pub unread: u32,
}

/// What a connection has queued in the kernel, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Queued {
    /// Received in order and not read. Without the FIN.
    pub unread: u32,
    /// Written and not acknowledged …
    pub unacked: u32,
    /// … of these, never sent.
    pub unsent: u32,
}

/// The part of `struct tcp_info` (linux/tcp.h) that is of use here.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Info {
    state: u8,
    _ca_state_to_backoff: [u8; 4],
    options: u8,
    /// `snd_wscale` in the low four bits, `rcv_wscale` in the high ones.
    scales: u8,
    _flags: u8,
    _rto_ato: [u32; 2],
    snd_mss: u32,
    _rcv_mss: u32,
    unacked: u32,
    _sacked_to_rcv_ssthresh: [u32; 10],
    rtt: u32,
    _rttvar_to_snd_cwnd: [u32; 3],
    advmss: u32,
    _reordering_to_total_retrans: [u32; 4],
    _pacing_to_delivery_rate: [u64; 8],
    _busy_to_sndbuf_limited: [u64; 3],
    _delivered: [u32; 2],
    _bytes_sent_retrans: [u64; 2],
    _dsack_reord: [u32; 2],
    rcv_ooopack: u32,
    snd_wnd: u32,
    rcv_wnd: u32,
}

const _: () = assert!(offset_of!(Info, rtt) == 68 && offset_of!(Info, advmss) == 84);
const _: () = assert!(offset_of!(Info, rcv_ooopack) == 224 && offset_of!(Info, rcv_wnd) == 232);

/// The kernel takes the room for timestamps off `advmss` when they are agreed (`tcp_rcv_synsent_state_process`, v6.18).
const TIMESTAMPS_TAKE: u32 = 12;
const ESTABLISHED: u8 = 1;
const TIME_WAIT: u8 = 6;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;
const OPT_TIMESTAMPS: u8 = 1;
const OPT_SACK: u8 = 2;
const OPT_WSCALE: u8 = 4;
const OPT_ECN: u8 = 8;
/// v6.7+
const OPT_USEC_TS: u8 = 64;

/// `TCP_REPAIR_OFF_NO_WP`: no window probe, which would be a packet of our own (v4.19+).
const OFF_NO_PROBE: c_int = -1;
const RECEIVE_QUEUE: c_int = 1;
const SEND_QUEUE: c_int = 2;
const NO_QUEUE: c_int = 0;

const SIOCOUTQNSD: libc::c_ulong = 0x894b;

/// Puts a connection under repair; [`release`] takes it back.
pub fn hold(socket: impl AsFd) -> Result<(), RepairError> {
    set(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1, "setsockopt(TCP_REPAIR, 1)")
}

/// Back to normal, without a packet. The kernel forgets `SO_REUSEADDR` on the way (`tcp_setsockopt`): without it, the port
/// could not be bound again beside this socket.
pub fn release(socket: impl AsFd) -> Result<(), RepairError> {
    set(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, OFF_NO_PROBE, "setsockopt(TCP_REPAIR, -1)")?;
    sockopt::set_socket_reuseaddr(&socket, true)
        .map_err(|e| RepairError { call: "setsockopt(SO_REUSEADDR)", source: e.into() })
}

/// Looks until its numbers are of one moment: bytes come while they are read.
const LOOKS: usize = 16;

/// Of a connection that is held. `None`: bytes come faster than they can be counted.
pub fn sequences(socket: impl AsFd) -> Result<Option<Sequences>, RepairError> {
    let choose = |queue| set(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, queue, "setsockopt(TCP_REPAIR_QUEUE)");
    let number = || get::<u32>(&socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, "getsockopt(TCP_QUEUE_SEQ)");
    choose(SEND_QUEUE)?;
    let write_seq = number()?;
    choose(RECEIVE_QUEUE)?;
    let mut found = None;
    let mut unread = bytes_unread(&socket)?;
    for _ in 0..LOOKS {
        let rcv_nxt = number()?;
        let before = std::mem::replace(&mut unread, bytes_unread(&socket)?);
        if before == unread {
            found = Some(Sequences { rcv_nxt, write_seq, unread });
            break;
        }
    }
    // With a queue chosen, `tcp_write_xmit` would take what is written for sent, and a read for a look.
    choose(NO_QUEUE)?;
    Ok(found)
}

pub fn queued(socket: impl AsFd) -> Result<Queued, RepairError> {
    Ok(Queued {
        unread: bytes_unread(&socket)?,
        unacked: ioctl(&socket, libc::TIOCOUTQ, "ioctl(SIOCOUTQ)")?,
        unsent: ioctl(&socket, SIOCOUTQNSD, "ioctl(SIOCOUTQNSD)")?,
    })
}

/// What was agreed when the connection began, and where it stands. `peer_mss` is right of a connection that is held
/// (`rx_opt.mss_clamp`); of another it is what the path allows, too.
pub fn facts(socket: impl AsFd) -> Result<Facts, RepairError> {
    let peer_mss = get::<u32>(&socket, libc::IPPROTO_TCP, libc::TCP_MAXSEG, "getsockopt(TCP_MAXSEG)")?;
    let info = get::<Info>(&socket, libc::IPPROTO_TCP, libc::TCP_INFO, "getsockopt(TCP_INFO)")?;
    let has = |option| info.options & option != 0;
    let scale = |bits: u8| if has(OPT_WSCALE) { bits & 0xf } else { 0 };
    Ok(Facts {
        established: info.state == ESTABLISHED,
        timestamps: has(OPT_TIMESTAMPS),
        sack: has(OPT_SACK),
        ecn: has(OPT_ECN),
        timestamps_in_micros: has(OPT_USEC_TS),
        peer_scale: scale(info.scales),
        own_scale: scale(info.scales >> 4),
        snd_mss: info.snd_mss,
        announced_mss: info.advmss + if has(OPT_TIMESTAMPS) { TIMESTAMPS_TAKE } else { 0 },
        out_of_order: info.rcv_ooopack,
        peer_mss,
        window: info.snd_wnd,
        announced: info.rcv_wnd,
        round_trip: Duration::from_micros(info.rtt.into()),
    })
}

/// Its peer's FIN has come, be it read or not.
pub fn is_finished(socket: impl AsFd) -> Result<bool, RepairError> {
    let state = get::<u8>(&socket, libc::IPPROTO_TCP, libc::TCP_INFO, "getsockopt(TCP_INFO)")?;
    Ok(matches!(state, TIME_WAIT | CLOSE_WAIT | LAST_ACK | CLOSING))
}

/// What its next timestamp would be (`TCP_TIMESTAMP`, v3.9+).
pub fn timestamp(socket: impl AsFd) -> Result<u32, RepairError> {
    get::<u32>(&socket, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP, "getsockopt(TCP_TIMESTAMP)")
}

/// Memory of everything received and not read, in whatever order it came: 0 when there is nothing (`SO_MEMINFO`, v4.12+).
pub fn receive_memory(socket: impl AsFd) -> Result<u32, RepairError> {
    let memory = get::<[u32; 9]>(&socket, libc::SOL_SOCKET, libc::SO_MEMINFO, "getsockopt(SO_MEMINFO)")?;
    Ok(memory[0])
}

/// From now on no more of what its peer sends can wait here (`SO_RCVBUF`, which the kernel doubles for its own needs).
pub fn take_at_most(socket: impl AsFd, bytes: usize) -> Result<(), RepairError> {
    sockopt::set_socket_recv_buffer_size(&socket, bytes)
        .map_err(|e| RepairError { call: "setsockopt(SO_RCVBUF)", source: e.into() })
}

/// From now on its peer is not told that it may send more at once. What it was told holds.
pub fn announce_little(socket: impl AsFd, bytes: c_int) -> Result<(), RepairError> {
    set(&socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, bytes, "setsockopt(TCP_WINDOW_CLAMP)")
}

/// The kernel finds out again how much is of use (`SO_BUF_LOCK`, v5.14+).
pub fn take_as_ever(socket: impl AsFd) -> Result<(), RepairError> {
    set(&socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0, "setsockopt(SO_BUF_LOCK)")
}

/// Sends the acknowledgement that is owed, if one is.
pub fn quick_ack(socket: impl AsFd) -> Result<(), RepairError> {
    set(&socket, libc::IPPROTO_TCP, libc::TCP_QUICKACK, 1, "setsockopt(TCP_QUICKACK)")
}

/// The largest segment that is announced and sent, without options, 88–32767; 0: no limit but the interface's. Of use before
/// `connect` and for what is accepted later.
pub fn limit_segments(socket: impl AsFd, bytes: u16) -> Result<(), RepairError> {
    let bytes = if bytes == 0 { 0 } else { bytes.clamp(88, 32_767) };
    set(&socket, libc::IPPROTO_TCP, libc::TCP_MAXSEG, bytes.into(), "setsockopt(TCP_MAXSEG)")
}

/// The connection is gone from this machine and its peer hears nothing of it.
pub fn vanish(socket: OwnedFd) -> Result<(), (OwnedFd, RepairError)> {
    match hold(&socket) {
        Ok(()) => {
            drop(socket);
            Ok(())
        }
        Err(error) => Err((socket, error)),
    }
}

/// Received in order and not read.
fn bytes_unread(socket: impl AsFd) -> Result<u32, RepairError> {
    ioctl(&socket, libc::FIONREAD, "ioctl(SIOCINQ)")
}

fn set(socket: impl AsFd, level: c_int, name: c_int, value: c_int, call: &'static str) -> Result<(), RepairError> {
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open for as long as it is borrowed; the option's value is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket,
            level,
            name,
            (&raw const value).cast::<c_void>(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(RepairError { call, source: io::Error::last_os_error() }),
    }
}

/// Options whose value is made of integers.
trait Plain: Default {}

impl Plain for u8 {}
impl Plain for u32 {}
impl Plain for [u32; 9] {}
impl Plain for Info {}

/// An older kernel writes less than asked for: what it does not know stays 0.
fn get<T: Plain>(socket: impl AsFd, level: c_int, name: c_int, call: &'static str) -> Result<T, RepairError> {
    let mut value = T::default();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `value`, whose type takes any bytes.
    let result = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw mut value).cast::<c_void>(), &raw mut length)
    };
    match result {
        0 => Ok(value),
        _ => Err(RepairError { call, source: io::Error::last_os_error() }),
    }
}

fn ioctl(socket: impl AsFd, request: libc::c_ulong, call: &'static str) -> Result<u32, RepairError> {
    let mut value: c_int = 0;
    // SAFETY: the three requests write an int.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request as _, &raw mut value) };
    match result {
        0 => Ok(u32::try_from(value).unwrap_or(0)),
        _ => Err(RepairError { call, source: io::Error::last_os_error() }),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read, Write},
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;

    /// A connection through loopback; `None` without the privilege.
    fn pair() -> Option<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let one = TcpStream::connect(listener.local_addr().expect("an address")).expect("it connects");
        let (other, _) = listener.accept().expect("it accepts");
        other.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        match hold(&one) {
            Err(error) if error.source.kind() == ErrorKind::PermissionDenied => None,
            result => {
                result.expect("it can be held");
                release(&one).expect("and released");
                Some((one, other))
            }
        }
    }

    #[test]
    fn sequence_numbers_move_by_what_is_sent() {
        let Some((mut one, mut other)) = pair() else { return };
        let numbers = |socket: &TcpStream| {
            hold(socket).expect("held");
            let numbers = sequences(socket).expect("numbers").expect("nothing comes");
            release(socket).expect("released");
            numbers
        };
        let before = [numbers(&one), numbers(&other)];
        assert_eq!((before[0].write_seq, before[0].rcv_nxt), (before[1].rcv_nxt, before[1].write_seq));
        one.write_all(b"seven b").expect("it writes");
        assert_eq!(queued(&other).expect("queued").unread, 7);
        other.read_exact(&mut [0; 7]).expect("it reads");
        let after = [numbers(&one), numbers(&other)];
        assert_eq!(after[0].write_seq.wrapping_sub(before[0].write_seq), 7);
        assert_eq!(after[1].rcv_nxt, after[0].write_seq);
        let facts = [one, other].map(|socket| {
            hold(&socket).expect("held");
            facts(&socket).expect("facts")
        });
        assert!(facts[0].established && facts[0].announced_mss == facts[1].peer_mss, "{facts:?}");
        assert_eq!((facts[0].own_scale, facts[1].own_scale), (facts[1].peer_scale, facts[0].peer_scale));
    }

    #[test]
    fn a_connection_that_vanished_is_not_heard_of_by_its_peer() {
        let Some((one, mut other)) = pair() else { return };
        vanish(one.into()).expect("it vanishes");
        let silence = other.read(&mut [0; 1]).expect_err("neither FIN nor RST");
        assert!(matches!(silence.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{silence}");
    }
}
