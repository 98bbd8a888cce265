//! A non-blocking netlink socket: one `sendmsg` per batch, replies until `EAGAIN`, extended acknowledgements.

mod attributes;

use std::{
    fmt,
    io::IoSlice,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

pub use attributes::{Attribute, Attributes, Mark, TooLong, Writer};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::socket::{MsgFlags, NetlinkAddr, recv, sendmsg, setsockopt, sockopt},
};

/// Bytes of a netlink message header, `struct nlmsghdr`.
pub const HEADER: usize = 16;

/// The largest datagram read. Dumps come in at most 32 KiB (`netlink_recvmsg`), a notification about one object in a
/// little more than the 64 KiB an attribute can hold.
const RECEIVE_BUFFER: usize = 128 * 1024;

/// `NETLINK_GET_STRICT_CHK` (`include/uapi/linux/netlink.h`)
const GET_STRICT_CHECK: libc::c_int = 12;

/// A system call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {errno}")]
pub struct SyscallError {
    pub call: &'static str,
    pub errno: Errno,
}

/// `map_err` for nix's results.
fn failed(call: &'static str) -> impl FnOnce(Errno) -> SyscallError {
    move |errno| SyscallError { call, errno }
}

/// A socket bound to a port id of its own for as long as it lives.
pub struct NetlinkSocket {
    socket: mnl::Socket,
    sequence: u32,
    send_buffer: usize,
    received: Vec<u8>,
}

// SAFETY: `struct mnl_socket` is a descriptor and an address; libmnl keeps nothing per thread.
unsafe impl Send for NetlinkSocket {}

impl fmt::Debug for NetlinkSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetlinkSocket").field("port_id", &self.port_id()).finish_non_exhaustive()
    }
}

impl NetlinkSocket {
    /// Opens and binds a socket of the calling thread's network namespace.
    pub fn open(bus: mnl::Bus) -> Result<Self, SyscallError> {
        let failed = |error: std::io::Error| SyscallError {
            call: "socket(AF_NETLINK)",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or_default()),
        };
        let socket = mnl::Socket::new(bus).map_err(failed)?;
        for (set, flags) in [
            (FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC), "fcntl(F_SETFD)"),
            (FcntlArg::F_SETFL(OFlag::O_NONBLOCK), "fcntl(F_SETFL)"),
        ] {
            fcntl(borrowed(&socket), set).map_err(self::failed(flags))?;
        }
        let on: libc::c_int = 1;
        set_option(&socket, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, &on, "setsockopt(NETLINK_EXT_ACK)")?;
        set_option(&socket, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, &on, "setsockopt(NETLINK_CAP_ACK)")?;
        Ok(Self { socket, sequence: 0, send_buffer: 0, received: vec![0; RECEIVE_BUFFER] })
    }

    /// The address the kernel knows this socket by.
    pub fn port_id(&self) -> u32 {
        self.socket.portid()
    }

    /// Subscribes to a multicast group, `NFNLGRP_*`.
    pub fn join(&self, group: u32) -> Result<(), SyscallError> {
        let call = "setsockopt(NETLINK_ADD_MEMBERSHIP)";
        set_option(&self.socket, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, &group, call)
    }

    /// Has rtnetlink look at the attributes of a dump's request: only what was asked for is told (v4.20+).
    pub fn strict_dumps(&self) -> Result<(), SyscallError> {
        let on: libc::c_int = 1;
        let call = "setsockopt(NETLINK_GET_STRICT_CHK)";
        set_option(&self.socket, libc::SOL_NETLINK, GET_STRICT_CHECK, &on, call)
    }

    /// Asks for a receive queue of `bytes`, past `net.core.rmem_max` where the privileges allow it.
    pub fn receive_queue(&self, bytes: usize) -> Result<(), SyscallError> {
        setsockopt(&self.as_fd(), sockopt::RcvBufForce, &bytes)
            .or_else(|_| setsockopt(&self.as_fd(), sockopt::RcvBuf, &bytes))
            .map_err(failed("setsockopt(SO_RCVBUF)"))
    }

    /// Has the kernel drop notifications caused by the socket with that port id before they reach the queue, so that
    /// one's own batches cannot overrun it. The notifications in a datagram have one origin (`nft_commit_notify`), and its
    /// port id is the fourth word of the first header; a filter loads words as big-endian.
    pub fn drop_messages_of(&self, port_id: u32) -> Result<(), SyscallError> {
        const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
        const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
        let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let mut program = [
            step(LOAD_WORD, 0, 0, 12),
            step(JUMP_IF_EQUAL, 0, 1, u32::from_be_bytes(port_id.to_ne_bytes())),
            step(RETURN, 0, 0, 0),
            step(RETURN, 0, 0, u32::MAX),
        ];
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        set_option(&self.socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter, "setsockopt(SO_ATTACH_FILTER)")
    }

    /// `count` sequence numbers that were not used before, the first of them. They wrap.
    pub fn take_sequence(&mut self, count: u32) -> u32 {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(count);
        first
    }

    /// Sends all of `bytes` to the kernel as one datagram. A batch must not be split: the kernel takes each datagram for
    /// a batch of its own (`nfnetlink_rcv_batch`).
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), SyscallError> {
        self.grow_send_buffer(bytes.len())?;
        let kernel = NetlinkAddr::new(0, 0);
        let sent = sendmsg(self.socket.as_raw_fd(), &[IoSlice::new(bytes)], &[], MsgFlags::empty(), Some(&kernel))
            .map_err(failed("sendmsg(AF_NETLINK)"))?;
        match sent == bytes.len() {
            true => Ok(()),
            false => Err(SyscallError { call: "sendmsg(AF_NETLINK)", errno: Errno::EMSGSIZE }),
        }
    }

    /// `netlink_sendmsg` refuses what does not fit into the send buffer with `EMSGSIZE`. The socket keeps the buffer: it
    /// is a limit, not memory.
    fn grow_send_buffer(&mut self, bytes: usize) -> Result<(), SyscallError> {
        let wanted = bytes.saturating_add(4096).max(128 * 1024);
        if wanted <= self.send_buffer {
            return Ok(());
        }
        setsockopt(&self.as_fd(), sockopt::SndBufForce, &wanted)
            .or_else(|_| setsockopt(&self.as_fd(), sockopt::SndBuf, &wanted))
            .map_err(failed("setsockopt(SO_SNDBUF)"))?;
        self.send_buffer = wanted;
        Ok(())
    }

    /// The next datagram; `None` when the queue is empty. `ENOBUFS` says that messages were lost, and the queue goes on.
    pub fn receive(&mut self) -> Result<Option<Messages<'_>>, SyscallError> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let length = loop {
            match recv(self.socket.as_raw_fd(), &mut self.received, flags) {
                Ok(length) => break length,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(SyscallError { call: "recv(AF_NETLINK)", errno }),
            }
        };
        match self.received.get(..length) {
            Some(bytes) => Ok(Some(Messages { bytes })),
            None => Err(SyscallError { call: "recv(AF_NETLINK)", errno: Errno::EMSGSIZE }),
        }
    }
}

/// For the options nix does not name. `value` is what the kernel expects of `option`; pointers in it are valid.
fn borrowed(socket: &mnl::Socket) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the socket lives, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

fn set_option<T>(
    fd: &impl AsRawFd,
    level: i32,
    option: i32,
    value: &T,
    call: &'static str,
) -> Result<(), SyscallError> {
    // SAFETY: `value` lives until the call returns, its size is given, and the kernel copies it.
    let result = unsafe {
        let length = size_of::<T>() as libc::socklen_t;
        libc::setsockopt(fd.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length)
    };
    Errno::result(result).map(drop).map_err(failed(call))
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrowed(&self.socket)
    }
}

impl AsRawFd for NetlinkSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The messages of one datagram. Ends at the first one that does not fit into it.
#[derive(Debug, Clone, Copy)]
pub struct Messages<'a> {
    bytes: &'a [u8],
}

impl<'a> Messages<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }
}

/// One message, header taken apart.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// `nlmsg_type`
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub port_id: u32,
    pub payload: &'a [u8],
    /// Header and payload.
    pub whole: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = usize::try_from(u32_at(self.bytes, 0)?).ok()?;
        let whole = self.bytes.get(..length)?;
        let payload = whole.get(HEADER..)?;
        let message = Message {
            kind: u16_at(whole, 4)?,
            flags: u16_at(whole, 6)?,
            sequence: u32_at(whole, 8)?,
            port_id: u32_at(whole, 12)?,
            payload,
            whole,
        };
        self.bytes = self.bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

impl Message<'_> {
    /// The kernel's answer, when this message is one: `NLMSG_ERROR`, or `NLMSG_DONE` with an error in it.
    pub fn answer(&self) -> Option<Answer> {
        match i32::from(self.kind) {
            libc::NLMSG_ERROR => Some(self.error_answer()),
            libc::NLMSG_DONE => {
                let code = i32_at(self.payload, 0).unwrap_or(0);
                let extension = self.payload.get(4..).unwrap_or_default();
                Some(Answer::new(code, if self.has_extension() { extension } else { &[] }))
            }
            _ => None,
        }
    }

    fn error_answer(&self) -> Answer {
        // A message cut off before its error code says nothing but that something is wrong.
        let code = i32_at(self.payload, 0).unwrap_or(-libc::EBADMSG);
        let capped = i32::from(self.flags) & libc::NLM_F_CAPPED != 0;
        let original = match capped {
            true => HEADER,
            false => u32_at(self.payload, 4).map_or(HEADER, |length| length as usize).next_multiple_of(4),
        };
        let extension = self.payload.get(4usize.saturating_add(original)..).unwrap_or_default();
        Answer::new(code, if self.has_extension() { extension } else { &[] })
    }

    fn has_extension(&self) -> bool {
        i32::from(self.flags) & libc::NLM_F_ACK_TLVS != 0
    }
}

/// What the kernel says about a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// `None`: it is acknowledged, or the dump is complete.
    pub errno: Option<Errno>,
    /// The kernel's own words (`NLMSGERR_ATTR_MSG`).
    pub text: Option<String>,
    /// Where in the request the offending attribute begins, in bytes from its header (`NLMSGERR_ATTR_OFFS`).
    pub offset: Option<u32>,
}

/// `NLMSGERR_ATTR_MSG`, `NLMSGERR_ATTR_OFFS` (`include/uapi/linux/netlink.h`).
const ERROR_TEXT: u16 = 1;
const ERROR_OFFSET: u16 = 2;

impl Answer {
    fn new(code: i32, extension: &[u8]) -> Self {
        let mut answer = Self { errno: None, text: None, offset: None };
        if code < 0 {
            answer.errno = Some(Errno::from_raw(code.saturating_neg()));
        }
        for attribute in Attributes::new(extension) {
            match attribute.kind {
                ERROR_TEXT => answer.text = attribute.text().map(str::to_owned),
                ERROR_OFFSET => answer.offset = u32_at(attribute.payload, 0),
                _ => {}
            }
        }
        answer
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_ne_bytes)
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    bytes_at(bytes, at).map(i32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: i32, flags: i32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(HEADER + payload.len()).unwrap_or(0).to_ne_bytes());
        bytes.extend(u16::try_from(kind).unwrap_or(0).to_ne_bytes());
        bytes.extend(u16::try_from(flags).unwrap_or(0).to_ne_bytes());
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend(9u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_extended_acknowledgement_gives_errno_text_and_offset() {
        let mut payload = (-libc::EEXIST).to_ne_bytes().to_vec();
        payload.extend([0; HEADER]);
        payload.extend([9, 0, 1, 0, b'b', b'u', b's', b'y', 0, 0, 0, 0]);
        payload.extend([8, 0, 2, 0]);
        payload.extend(44u32.to_ne_bytes());
        let bytes = message(libc::NLMSG_ERROR, libc::NLM_F_CAPPED | libc::NLM_F_ACK_TLVS, &payload);
        let answer = Messages::new(&bytes).next().and_then(|message| message.answer());
        let wanted = Answer { errno: Some(Errno::EEXIST), text: Some("busy".into()), offset: Some(44) };
        assert_eq!(answer, Some(wanted));
    }

    #[test]
    fn messages_cut_off_anywhere_end_the_datagram_without_a_panic() {
        let mut payload = (-libc::EPERM).to_ne_bytes().to_vec();
        payload.extend([0xff; 40]);
        let bytes = message(libc::NLMSG_ERROR, libc::NLM_F_ACK_TLVS, &payload);
        for length in 0..=bytes.len() {
            let whole = Messages::new(&bytes[..length]).filter_map(|message| message.answer()).count();
            assert_eq!(whole, usize::from(length == bytes.len()));
        }
    }

    #[test]
    fn a_message_shorter_than_its_header_ends_the_datagram() {
        assert_eq!(Messages::new(&[4, 0, 0, 0, 1, 0, 0, 0]).count(), 0);
        assert_eq!(Messages::new(&[0; 64]).count(), 0);
    }
}
