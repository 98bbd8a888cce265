//! Conntrack over netlink (`nf_conntrack_netlink`): events, dumps, and changes to single entries.

mod filter;
pub mod forget;
mod netlink;
mod nudge;
pub mod parse;
mod socket;
pub mod twin;
mod wire;

use std::{future::Future, io};

use proxy_core::{
    conntrack::{Entry, Event},
    flow::EntryKey,
};

pub use netlink::{NetlinkConntrack, usage};

/// A call to conntrack that failed.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    #[error("{call}: {source}")]
    Call {
        /// As strace would name it.
        call: &'static str,
        source: io::Error,
    },
    /// The kernel's answer to one request.
    #[error("conntrack {what}: {source}")]
    Refused { what: &'static str, source: io::Error },
    #[error("the kernel's answer to conntrack {0} was cut short")]
    Truncated(&'static str),
}

/// Which entries a dump yields: those with a route id in the mark, and of them the ones whose end bits match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkFilter {
    pub value: u32,
    pub mask: u32,
}

/// Which events are asked for. The kernel makes none that nobody hears, and each costs a new connection some 2 % of
/// its time on the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hear {
    /// Entries remember when they began (`nf_conntrack_timestamp`): dumps and ends tell it.
    Ends,
    BeginningsAndEnds,
}

/// What one [`Conntrack::drain`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drained {
    /// The limit stopped it: there may be more.
    pub more: bool,
}

/// How full the kernel's table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub entries: u64,
    pub max: u64,
}

/// The kernel's connection table, as the owner of the flow table uses it. Only entries with one of shunt's marks are
/// ever seen through it.
pub trait Conntrack {
    /// Waits until an event may be there. Cancel safe; to be followed by [`Conntrack::drain`] until nothing is left.
    fn readable(&self) -> impl Future<Output = Result<(), ConntrackError>>;

    /// Reads queued events without waiting.
    fn drain(&mut self, each: &mut dyn FnMut(&Event)) -> Result<Drained, ConntrackError>;

    /// Every entry that matches; IPv4 and IPv6. An entry may come twice. Makes the kernel evict expired entries on its
    /// way (`ctnetlink_dump_table`), so their `Destroy` is queued when it returns.
    fn dump(&mut self, filter: MarkFilter, each: &mut dyn FnMut(&Entry)) -> Result<(), ConntrackError>;

    /// Sets the bits `mask` of each entry's mark to `value`. Entries that are gone are skipped; the number of those
    /// found is returned.
    fn set_mark(&mut self, keys: &[EntryKey], value: u32, mask: u32) -> Result<usize, ConntrackError>;

    /// Deletes the entries, if they are still the same ones.
    fn delete(&mut self, keys: &[EntryKey]) -> Result<usize, ConntrackError>;

    /// Makes both ends of these TCP flows, already marked as cut, answer something, so that the ruleset resets them now
    /// and not with their next packet. Best effort.
    fn nudge(&mut self, keys: &[EntryKey]);

    /// `None` where this network namespace does not tell.
    fn usage(&self) -> Option<Usage>;
}
