//! What is told of a connection when it has ended.

use std::{fmt, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use proxy_core::{config::Engine, reason::Reason};

/// Names a connection of the stream path: never given twice, not even by the next daemon, which may have taken some over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(u64);

impl StreamId {
    /// `worker`: 0–255. `number`: below 2^52.
    pub const fn new(worker: u8, number: u64) -> Self {
        Self((worker as u64) << 52 | (number & ((1 << 52) - 1)))
    }

    pub const fn worker(self) -> u8 {
        (self.0 >> 52) as u8
    }

    pub const fn number(self) -> u64 {
        self.0 & ((1 << 52) - 1)
    }

    /// The whole id, as it stands beside a handed-over flow in the kernel.
    pub const fn bits(self) -> u64 {
        self.0
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// `s` and fifteen hexadecimal digits: cannot be mistaken for the id of a kernel-forwarded connection.
impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{:015x}", self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an id of a relayed connection is an s and fifteen hexadecimal digits")]
pub struct BadStreamId;

impl FromStr for StreamId {
    type Err = BadStreamId;

    fn from_str(text: &str) -> Result<Self, BadStreamId> {
        let digits = text.strip_prefix('s').filter(|d| d.len() == 15 && d.bytes().all(|b| b.is_ascii_hexdigit()));
        digits.and_then(|d| u64::from_str_radix(d, 16).ok()).map(Self).ok_or(BadStreamId)
    }
}

/// A connection that has ended, or was refused.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    pub id: StreamId,
    /// `-` when no route was found.
    pub route: Arc<str>,
    pub engine: Engine,
    /// As the PROXY header has it, where one was accepted.
    pub client: SocketAddr,
    pub listen: SocketAddr,
    /// `None`: it never had one.
    pub backend: Option<SocketAddr>,
    pub reason: Reason,
    /// When it ended, since the Unix epoch.
    pub at: Duration,
    pub duration: Duration,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_and_is_no_conntrack_id() {
        let id = StreamId::new(7, 0x1234_5678_9abc);
        assert_eq!((id.worker(), id.number()), (7, 0x1234_5678_9abc));
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().parse::<proxy_core::flow::FlowId>().is_err());
        assert_eq!("s12".parse::<StreamId>(), Err(BadStreamId));
    }
}
