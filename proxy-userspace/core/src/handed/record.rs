//! What is kept beside a handed-over flow in the kernel, so that a daemon started later goes on with it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The room there is for it.
pub const RECORD_BYTES: usize = 64;

/// Raised with every change of what follows.
const VERSION: u8 = 1;

/// The rest (peers, listen address, counters, who has finished) is what the packet level itself holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// [`route_hash`] of its route's name: ids of routes are given anew by every daemon.
    pub route: u64,
    /// As the PROXY header has it, where one was accepted.
    pub client: SocketAddr,
    /// When it was accepted: milliseconds since the machine was started.
    pub began: u64,
    /// Bytes relayed before it was handed over: in, out.
    pub relayed: [u64; 2],
}

impl Record {
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let (ip, v6) = match self.client.ip() {
            IpAddr::V4(ip) => (ip.to_ipv6_mapped(), 0),
            IpAddr::V6(ip) => (ip, 1),
        };
        bytes[0] = VERSION;
        bytes[1] = v6;
        bytes[2..4].copy_from_slice(&self.client.port().to_be_bytes());
        bytes[4..20].copy_from_slice(&ip.octets());
        let numbers = [self.route, self.began, self.relayed[0], self.relayed[1]];
        for (place, number) in bytes[24..56].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }

    /// `None`: of another version, or of nobody.
    pub fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let ip = Ipv6Addr::from(*bytes.get(4..)?.first_chunk::<16>()?);
        let ip = match (bytes[0], bytes[1]) {
            (VERSION, 0) => IpAddr::V4(ip.to_ipv4_mapped()?),
            (VERSION, 1) => IpAddr::V6(ip),
            _ => return None,
        };
        let port = u16::from_be_bytes([bytes[2], bytes[3]]);
        Some(Self {
            route: number(24)?,
            client: SocketAddr::new(ip, port),
            began: number(32)?,
            relayed: [number(40)?, number(48)?],
        })
    }
}

/// FNV-1a (Fowler, Noll, Vo): the same in every build.
pub fn route_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
