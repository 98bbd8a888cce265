//! The network interfaces of this namespace, and news of them, through rtnetlink.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use nix::errno::Errno;
use tokio::io::{Interest, unix::AsyncFd};

use super::netlink::{Attributes, NetlinkSocket, SyscallError, TooLong, Writer};

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

/// Numbers of interfaces of this network namespace, the loopback interface left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Where connections between other machines can come from, now or when it is up and has an address: each with Ethernet headers that is
    /// no part of a bridge or a bond, and each with an address.
    pub entrances: BTreeSet<u32>,
    /// All.
    pub all: BTreeSet<u32>,
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

    /// Those there are, up or not: a packet may come as soon as one is.
    pub fn find(&mut self) -> Result<Found, InterfaceError> {
        let mut links = |read| self.dump("interfaces", libc::RTM_GETLINK, LINK, libc::RTM_NEWLINK, read);
        let (all, ethernet) = (links(elsewhere)?, links(ethernet)?);
        let with_address = self.dump("addresses", libc::RTM_GETADDR, ADDRESS, libc::RTM_NEWADDR, addressed)?;
        Ok(Found { entrances: &ethernet | &(&all & &with_address), all })
    }

    /// Reads all news; never blocks. What they are does not matter: [`Self::find`] is asked again.
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

/// `struct ifinfomsg`: the number of an interface that is no loopback.
fn elsewhere(payload: &[u8]) -> Option<u32> {
    let number = u32::from_ne_bytes(*payload.get(4..)?.first_chunk()?);
    let flags = u32::from_ne_bytes(*payload.get(8..)?.first_chunk()?);
    (flags & libc::IFF_LOOPBACK.cast_unsigned() == 0).then_some(number)
}

/// `struct ifinfomsg` and its attributes: the number of an interface with Ethernet headers whose packets nobody takes for a bridge or bond.
fn ethernet(payload: &[u8]) -> Option<u32> {
    let kind = u16::from_ne_bytes(*payload.get(2..)?.first_chunk()?);
    let belongs = Attributes::new(payload.get(LINK..)?).find(libc::IFLA_MASTER).is_some();
    elsewhere(payload).filter(|_| kind == libc::ARPHRD_ETHER && !belongs)
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

    /// `struct ifinfomsg` of the interface 7, and one attribute.
    fn link(kind: u16, flags: i32, attribute: u16) -> Vec<u8> {
        let mut bytes = vec![0u8; LINK];
        bytes[2..4].copy_from_slice(&kind.to_ne_bytes());
        bytes[4..8].copy_from_slice(&7u32.to_ne_bytes());
        bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend(8u16.to_ne_bytes());
        bytes.extend(attribute.to_ne_bytes());
        bytes.extend([9, 0, 0, 0]);
        bytes
    }

    #[test]
    fn an_ethernet_interface_counts_before_it_is_up_unless_it_is_part_of_another() {
        const MTU: u16 = libc::IFLA_MTU;
        assert_eq!(ethernet(&link(libc::ARPHRD_ETHER, 0, MTU)), Some(7));
        assert_eq!(ethernet(&link(libc::ARPHRD_ETHER, libc::IFF_UP, libc::IFLA_MASTER)), None);
        assert_eq!(ethernet(&link(libc::ARPHRD_NONE, libc::IFF_UP, MTU)), None);
        assert_eq!(ethernet(&link(libc::ARPHRD_ETHER, libc::IFF_LOOPBACK, MTU)), None);
        assert_eq!(elsewhere(&link(libc::ARPHRD_NONE, 0, MTU)), Some(7));
        for length in 0..LINK {
            assert_eq!(ethernet(&link(libc::ARPHRD_ETHER, 0, MTU)[..length]), None);
        }
    }

    #[test]
    fn the_loopback_interface_is_never_found() {
        let found = Interfaces::open().expect("netlink is for everybody").find().expect("listed");
        assert!(!found.all.contains(&1) && found.entrances.is_subset(&found.all), "{found:?}");
    }
}
