//! The PROXY protocol, versions 1 and 2: who a proxy in front of this one accepted the connection from.
//!
//! Source: HAProxy's `doc/proxy-protocol.txt`, §2.1 (version 1), §2.2 (version 2 and its TLVs). A header is only ever
//! looked for where the configuration says that one must come; what does not match exactly is refused.
//!
//! IPv4 addresses written as IPv6 (`::ffff:10.0.0.1`) are given as the IPv4 addresses they are, so that `allow`, `deny`
//! and `match.client` cannot be got around; a header whose two ends are of different families is written with both as
//! IPv6. Reading a written header gives the same ends back.

mod checksum;
mod tlv;
mod v1;
mod v2;
mod write;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;

pub use tlv::{Tlvs, kind};
pub use write::{Outgoing, write_v1, write_v2};

/// The longest header that is read or written, in bytes; nginx has the same limit. The protocol allows 16 + 65535, and
/// wants a header to fit into one TCP segment.
pub const MAX_HEADER: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: Version,
    /// `None`: those of the connection itself are meant. So says the proxy in front of its own health checks (`LOCAL`,
    /// `UNKNOWN`), and so it is taken for families that cannot be the client of a TCP route (Unix sockets, UDP).
    pub ends: Option<Ends>,
    /// Empty in version 1, and where the header says nothing about a client.
    pub tlvs: Tlvs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// The connection that the first proxy accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// Why a connection does not begin with a valid header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    #[error("the connection does not begin with a PROXY header")]
    Absent,
    /// Version 1, §2.1.
    #[error("the PROXY line is malformed")]
    Line,
    #[error("the PROXY line has no end within 107 bytes")]
    LineTooLong,
    /// Beyond [`MAX_HEADER`].
    #[error("the PROXY header is longer than 4096 bytes")]
    TooLong,
    #[error("the PROXY header is of version 2 but its 13th byte is neither LOCAL nor PROXY")]
    Command,
    #[error("the PROXY header names an address family or a transport that does not exist")]
    Family,
    #[error("the PROXY header is too short for its addresses")]
    Addresses,
    /// §2.2: lengths that contradict each other, or a value of a length it cannot have.
    #[error("the TLVs of the PROXY header are malformed")]
    Tlv,
    /// §2.2.3.
    #[error("the PROXY header does not have the checksum it says it has")]
    Checksum,
}

/// Reads the header from everything received so far, and says how many bytes it takes. `None`: more are needed.
///
/// # Errors
/// At the first byte that cannot belong to a header; in version 1 no later than at the end of its line.
pub fn parse(received: &[u8]) -> Result<Option<(Header, usize)>, BadHeader> {
    match received.first() {
        None => Ok(None),
        Some(b'P') => v1::parse(received),
        Some(b'\r') => v2::parse(received),
        Some(_) => Err(BadHeader::Absent),
    }
}
