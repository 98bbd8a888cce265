//! The network interfaces of this namespace, and news of them, through rtnetlink.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use nix::errno::Errno;
use tokio::io::{Interest, unix::AsyncFd};

use super::netlink::{NetlinkSocket, SyscallError, TooLong, Writer};

/// Bytes of `struct ifinfomsg` and of `struct ifaddrmsg`.
const LINK: usize = 16;
const ADDRESS: usize = 8;
/// A dump that others keep changing is begun again so often.
const TRIES: usize = 8;
/// Notifications that may wait, in bytes.
const QUEUE: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    #[error("the kernel refused to list {what}: {errno}")]
    Refused { what: &'static str, errno: Errno },
    #[error(transparent)]
    TooLong(#[from] TooLong),
    #[error("interfaces cannot be awaited: {0}")]
    Wait(#[from] io::Error),
}

/// Asks, and hears of changes. It becomes readable on news.
#[derive(Debug)]
pub struct Interfaces {
    asks: NetlinkSocket,
    news: NetlinkSocket,
}

impl Interfaces {
    /// In the network namespace of the calling thread.
    pub fn open() -> Result<Self, InterfaceError> {
        let news = NetlinkSocket::open(mnl::Bus::Route)?;
        news.receive_queue(QUEUE)?;
        for group in [libc::RTNLGRP_LINK, libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR] {
            news.join(group)?;
        }
        Ok(Self { asks: NetlinkSocket::open(mnl::Bus::Route)?, news })
    }

    /// To be awaited in the runtime of the caller.
    pub fn into_async(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is the socket's own, which lives and stays the same as long as `self` does.
        unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }.map_err(Into::into)
    }

    /// Those that are up, have an address and lead elsewhere: where connections between other machines can come from.
    pub fn in_use(&mut self) -> Result<BTreeSet<u32>, InterfaceError> {
        let up = self.dump("interfaces", libc::RTM_GETLINK, LINK, libc::RTM_NEWLINK, up)?;
        let with_address = self.dump("addresses", libc::RTM_GETADDR, ADDRESS, libc::RTM_NEWADDR, addressed)?;
        Ok(&up & &with_address)
    }

    /// Reads all news; never blocks. What they are does not matter: [`Self::in_use`] is asked again.
    pub fn drain(&mut self) -> Result<(), InterfaceError> {
        loop {
            match self.news.receive() {
                Ok(Some(_)) | Err(SyscallError { errno: Errno::ENOBUFS, .. }) => {}
                Ok(None) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// `answers`: the kind of the messages that `read` takes an interface's number from.
    fn dump(
        &mut self,
        what: &'static str,
        kind: u16,
        fixed: usize,
        answers: u16,
        read: fn(&[u8]) -> Option<u32>,
    ) -> Result<BTreeSet<u32>, InterfaceError> {
        for _ in 0..TRIES {
            match self.dump_once(kind, fixed, answers, read)? {
                Ok(found) => return Ok(found),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(InterfaceError::Refused { what, errno }),
            }
        }
        Err(InterfaceError::Refused { what, errno: Errno::EINTR })
    }

    fn dump_once(
        &mut self,
        kind: u16,
        fixed: usize,
        answers: u16,
        read: fn(&[u8]) -> Option<u32>,
    ) -> Result<Result<BTreeSet<u32>, Errno>, InterfaceError> {
        let sequence = self.asks.take_sequence(1);
        let mut writer = Writer::new();
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        let message = writer.message(kind, flags, sequence, &vec![0; fixed]);
        writer.end_message(message);
        self.asks.send(&writer.finish()?)?;
        let (mut found, mut interrupted) = (BTreeSet::new(), false);
        // The next part of a dump is queued when the call before returns (`netlink_dump`), so an empty queue is the end.
        while let Some(messages) = self.asks.receive()? {
            for message in messages.filter(|message| message.sequence == sequence) {
                interrupted |= i32::from(message.flags) & libc::NLM_F_DUMP_INTR != 0;
                match message.answer() {
                    None if message.kind == answers => found.extend(read(message.payload)),
                    None => {}
                    Some(answer) => {
                        let errno = answer.errno.or(interrupted.then_some(Errno::EINTR));
                        return Ok(errno.map_or(Ok(found), Err));
                    }
                }
            }
        }
        Ok(Err(Errno::EINTR))
    }
}

/// `struct ifinfomsg`: the number of an interface that is up and no loopback.
fn up(payload: &[u8]) -> Option<u32> {
    let number = u32::from_ne_bytes(*payload.get(4..)?.first_chunk()?);
    let flags = u32::from_ne_bytes(*payload.get(8..)?.first_chunk()?);
    let flag = |flag: i32| flags & flag.cast_unsigned() != 0;
    (flag(libc::IFF_UP) && !flag(libc::IFF_LOOPBACK)).then_some(number)
}

/// `struct ifaddrmsg`
fn addressed(payload: &[u8]) -> Option<u32> {
    payload.get(4..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

impl AsFd for Interfaces {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }
}

impl AsRawFd for Interfaces {
    fn as_raw_fd(&self) -> RawFd {
        self.news.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_up_and_no_loopback_is_told_by_its_number() {
        let link = |flags: i32| {
            let mut bytes = vec![0u8; LINK];
            bytes[4..8].copy_from_slice(&7u32.to_ne_bytes());
            bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
            bytes
        };
        assert_eq!(up(&link(libc::IFF_UP)), Some(7));
        assert_eq!(up(&link(0)), None);
        assert_eq!(up(&link(libc::IFF_UP | libc::IFF_LOOPBACK)), None);
        for length in 0..12 {
            assert_eq!(up(&link(libc::IFF_UP)[..length]), None);
        }
    }

    #[test]
    fn the_loopback_interface_is_never_in_use() {
        let in_use = Interfaces::open().expect("netlink is for everybody").in_use().expect("listed");
        assert!(!in_use.contains(&1), "{in_use:?}");
    }
}
