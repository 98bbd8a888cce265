//! The few nfnetlink messages of the probes, built and read without a library: they are malformed on purpose, or one
//! request long. The ruleset itself goes another way.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
        sockopt,
    },
    time::TimeVal,
};

const HEADER: usize = 16;
const NFGENMSG: usize = 4;
pub(super) const SUBSYS_CTNETLINK: u8 = 1;
pub(crate) const SUBSYS_NFTABLES: u8 = 10;
const IPCTNL_MSG_CT_GET_STATS: u8 = 5;
const NESTED: u16 = 1 << 15;

/// One request: type, flags, family and attributes; its sequence number is its place in the batch.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    kind: u16,
    flags: u16,
    family: u8,
    resource: u16,
    attributes: Vec<u8>,
}

impl Message {
    pub(crate) fn new(subsystem: u8, message: u8, family: u8, flags: i32) -> Self {
        let kind = u16::from(subsystem) << 8 | u16::from(message);
        Self { kind, flags: (libc::NLM_F_REQUEST | flags) as u16, family, resource: 0, attributes: Vec::new() }
    }

    pub(crate) fn string(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub(super) fn be32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn nested(self, kind: u16, value: &[u8]) -> Self {
        self.bytes(kind | NESTED, value)
    }

    fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.attributes.extend(attribute(kind, value));
        self
    }

    fn encode(&self, sequence: u32) -> Vec<u8> {
        let length = HEADER + NFGENMSG + self.attributes.len();
        let mut bytes = Vec::with_capacity(length);
        bytes.extend((length as u32).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.family, 0]);
        bytes.extend(self.resource.to_be_bytes());
        bytes.extend(&self.attributes);
        bytes
    }
}

/// One attribute, padded to four bytes.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + value.len().next_multiple_of(4));
    bytes.extend((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// `NFT_MSG_GETGEN`: the smallest question to nf_tables; needs CAP_NET_ADMIN.
pub(super) fn get_generation() -> Message {
    Message::new(SUBSYS_NFTABLES, libc::NFT_MSG_GETGEN as u8, libc::AF_UNSPEC as u8, 0)
}

/// The number of conntrack entries: the smallest question to ctnetlink; needs CAP_NET_ADMIN.
pub(super) fn get_conntrack_count() -> Message {
    Message::new(SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET_STATS, libc::AF_UNSPEC as u8, 0)
}

/// Sends one request; `Ok` with the attributes of the answer, or the kernel's error.
pub(super) fn ask(message: Message) -> io::Result<Vec<u8>> {
    let socket = open()?;
    transmit(&socket, &message.encode(1))?;
    let mut answer = Err(io::Error::from(io::ErrorKind::UnexpectedEof));
    each_answer(&socket, |reply| {
        answer = match reply.error {
            Some(0) => return Next::Stop,
            Some(code) => Err(io::Error::from_raw_os_error(code)),
            None => Ok(reply.payload.get(NFGENMSG..).unwrap_or_default().to_vec()),
        };
        Next::Stop
    })?;
    answer
}

/// Sends a dump request; the attributes of every object, each with its `nfgenmsg` family.
pub(crate) fn dump(message: Message) -> io::Result<Vec<(u8, Vec<u8>)>> {
    let socket = open()?;
    transmit(&socket, &message.encode(1))?;
    let mut objects = Vec::new();
    let mut failed = None;
    each_answer(&socket, |reply| {
        if reply.kind == libc::NLMSG_DONE as u16 {
            return Next::Stop;
        }
        if let Some(code) = reply.error {
            failed = (code != 0).then(|| io::Error::from_raw_os_error(code));
            return Next::Stop;
        }
        if let (Some(family), Some(attributes)) = (reply.payload.first(), reply.payload.get(NFGENMSG..)) {
            objects.push((*family, attributes.to_vec()));
        }
        Next::Go
    })?;
    failed.map_or(Ok(objects), Err)
}

/// Sends `messages` as one nf_tables batch, each with an acknowledgement asked for. The result of each, in order:
/// 0 or an errno. An error when the kernel refused the batch before looking into it.
pub(super) fn batch(messages: &[Message]) -> io::Result<Vec<i32>> {
    let mut frame = Message::new(0, libc::NFNL_MSG_BATCH_BEGIN as u8, libc::AF_UNSPEC as u8, 0);
    frame.resource = u16::from(SUBSYS_NFTABLES);
    let mut bytes = frame.encode(0);
    for (sequence, message) in (1..).zip(messages) {
        bytes.extend(message.encode(sequence));
    }
    frame.kind = libc::NFNL_MSG_BATCH_END as u16;
    bytes.extend(frame.encode(messages.len() as u32 + 1));

    let socket = open()?;
    transmit(&socket, &bytes)?;
    let mut results: Vec<Option<i32>> = vec![None; messages.len()];
    let mut refused = None;
    each_answer(&socket, |reply| {
        let Some(code) = reply.error else { return Next::Go };
        match (reply.sequence as usize).checked_sub(1).and_then(|index| results.get_mut(index)) {
            Some(result) => *result = Some(code),
            None if code != 0 => refused = Some(io::Error::from_raw_os_error(code)),
            None => {}
        }
        if refused.is_some() || results.iter().all(Option::is_some) { Next::Stop } else { Next::Go }
    })?;
    refused.map_or(Ok(()), Err)?;
    results.into_iter().collect::<Option<_>>().ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
}

fn open() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    // The kernel answers within the send; the limit is for the case that it does not.
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(2, 0))?;
    Ok(socket)
}

fn transmit(socket: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let sent = send(socket.as_raw_fd(), bytes, MsgFlags::empty())?;
    if sent == bytes.len() { Ok(()) } else { Err(io::Error::from(io::ErrorKind::WriteZero)) }
}

struct Reply<'a> {
    kind: u16,
    sequence: u32,
    /// Of `NLMSG_ERROR`: 0 or an errno.
    error: Option<i32>,
    payload: &'a [u8],
}

enum Next {
    Go,
    Stop,
}

fn each_answer(socket: &OwnedFd, mut take: impl FnMut(Reply<'_>) -> Next) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some((reply, after)) = split(rest) {
            if let Next::Stop = take(reply) {
                return Ok(());
            }
            rest = after;
        }
    }
}

/// The first message of a datagram and what follows it.
fn split(bytes: &[u8]) -> Option<(Reply<'_>, &[u8])> {
    let length = u32_at(bytes, 0)? as usize;
    let payload = bytes.get(HEADER..length)?;
    let kind = u16_at(bytes, 4)?;
    let error = match kind == libc::NLMSG_ERROR as u16 {
        true => Some((u32_at(payload, 0)? as i32).wrapping_neg()),
        false => None,
    };
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((Reply { kind, sequence: u32_at(bytes, 8)?, error, payload }, rest))
}

/// The attributes of a message or of a nest: type without flags, value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !(NESTED | 1 << 14);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A string attribute, without its final zero.
pub(crate) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

pub(crate) fn be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.get(..4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_the_way_there_and_back() {
        let message = Message::new(1, 2, 3, 0).string(7, "abc").be32(9, 5).nested(4, &attribute(1, b"x"));
        let bytes = message.encode(6);
        let found: Vec<_> = attributes(&bytes[HEADER + NFGENMSG..]).collect();
        assert_eq!(found[0], (7, &b"abc\0"[..]));
        assert_eq!(found[1], (9, &[0, 0, 0, 5][..]));
        assert_eq!(found[2].0, 4);
        assert_eq!(attributes(found[2].1).collect::<Vec<_>>(), [(1, &b"x"[..])]);
    }

    #[test]
    fn the_messages_of_a_datagram_are_told_apart() {
        let mut bytes = Message::new(1, 2, 3, 0).string(7, "abc").encode(6);
        let first = bytes.len();
        bytes.extend([20, 0, 0, 0, libc::NLMSG_ERROR as u8, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend((-libc::ENOENT).to_ne_bytes());
        let (reply, rest) = split(&bytes).expect("an object");
        assert_eq!((reply.kind, reply.sequence, reply.error), (0x0102, 6, None));
        assert_eq!(rest.len(), bytes.len() - first);
        let (reply, rest) = split(rest).expect("an error");
        assert_eq!((reply.sequence, reply.error, rest.len()), (9, Some(libc::ENOENT), 0));
    }

    #[test]
    fn cut_off_answers_end_the_walk_and_nothing_panics() {
        let bytes = Message::new(1, 2, 3, 0).string(7, "abcdefg").encode(6);
        for length in 0..bytes.len() {
            assert!(split(&bytes[..length]).is_none());
            attributes(&bytes[..length]).for_each(drop);
        }
        assert!(split(&[0; 64]).is_none());
        assert_eq!(attributes(&[0; 64]).count(), 0);
    }
}
