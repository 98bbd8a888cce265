//! Watching for foreign hands on the table.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use nix::errno::Errno;
use proxy_core::ruleset::TABLE;
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    NftError,
    batch::{INET, kind},
    uapi::{SUBSYSTEM, generation, msg},
};
use crate::kernel::netlink::{Attributes, Message, NetlinkSocket, SyscallError};

/// Bytes of notifications that may wait. A foreign `nft -f` of some ten thousand elements fits.
const QUEUE: usize = 4 << 20;

/// What happened since the last look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MonitorNews {
    /// Somebody else changed or deleted something in the table.
    pub foreign_change: bool,
    /// Who made the last foreign change, as the kernel has it: name and process id.
    pub process: Option<(String, u32)>,
    /// Notifications were lost: anything may have changed.
    pub overrun: bool,
}

/// A socket of its own that hears of every change in the namespace's nf_tables. It becomes readable on news.
#[derive(Debug)]
pub struct NftMonitor {
    socket: NetlinkSocket,
    own_port_id: u32,
}

impl NftMonitor {
    /// Changes made by the socket with `own_port_id` ([`KernelNft::port_id`](super::KernelNft::port_id)) are no news.
    pub fn open(own_port_id: u32) -> Result<Self, NftError> {
        let socket = NetlinkSocket::open(mnl::Bus::Netfilter)?;
        socket.receive_queue(QUEUE)?;
        socket.drop_messages_of(own_port_id)?;
        socket.join(libc::NFNLGRP_NFTABLES.cast_unsigned())?;
        Ok(Self { socket, own_port_id })
    }

    /// To be awaited in the runtime of the caller.
    pub fn into_async(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is the socket's own, which lives and stays the same as long as `self` does.
        unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }.map_err(Into::into)
    }

    /// Reads everything that waits; never blocks.
    pub fn drain(&mut self) -> Result<MonitorNews, NftError> {
        let mut news = MonitorNews::default();
        loop {
            match self.socket.receive() {
                Ok(Some(messages)) => {
                    for message in messages.filter(|message| message.port_id != self.own_port_id) {
                        note(&mut news, &message);
                    }
                }
                Ok(None) => return Ok(news),
                Err(SyscallError { errno: Errno::ENOBUFS, .. }) => news.overrun = true,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The kernel tells the changes of a batch, then the generation that they make with the process that made it
/// (`nft_commit_notify`, `nf_tables_gen_notify`).
fn note(news: &mut MonitorNews, message: &Message<'_>) {
    if message.kind >> 8 != SUBSYSTEM {
        return;
    }
    let attributes = Attributes::of_message(message.whole, INET.len());
    if message.kind == kind(msg::NEW_GENERATION) {
        let name = attributes.find(generation::PROCESS_NAME).and_then(|name| name.text());
        let id = attributes.find(generation::PROCESS_ID).and_then(|id| id.be32());
        if let (true, Some(name), Some(id)) = (news.foreign_change, name, id) {
            news.process = Some((name.to_owned(), id));
        }
        return;
    }
    // The table's name is the first attribute of every object of nf_tables.
    let in_table = attributes.find(1).and_then(|name| name.text()) == Some(TABLE);
    let in_family = message.payload.first() == INET.first();
    news.foreign_change |= in_table && in_family;
}

impl AsFd for NftMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for NftMonitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
