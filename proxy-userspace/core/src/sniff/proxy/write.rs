//! Headers for the backends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{MAX_HEADER, Tlvs, checksum, kind, v2};

/// What a header of version 2 tells a backend.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    /// The client, and the address it dialled.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub alpn: Option<&'a [u8]>,
    pub authority: Option<&'a str>,
    /// Left out when it is longer than [`kind::UNIQUE_ID_MAX`].
    pub unique_id: Option<&'a [u8]>,
    /// The value of a TLV of type [`kind::SSL`].
    pub ssl: Option<&'a [u8]>,
    /// Those of the header that came in are passed on, but for checksum, padding and what is given above.
    pub received: Option<&'a Tlvs>,
}

impl<'a> Outgoing<'a> {
    /// Without TLVs.
    pub fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        Self { source, destination, alpn: None, authority: None, unique_id: None, ssl: None, received: None }
    }

    fn tlvs(&self) -> impl Iterator<Item = (u8, &'a [u8])> {
        let own = [
            (kind::ALPN, self.alpn),
            (kind::AUTHORITY, self.authority.map(str::as_bytes)),
            (kind::UNIQUE_ID, self.unique_id.filter(|id| id.len() <= kind::UNIQUE_ID_MAX)),
            (kind::SSL, self.ssl),
        ];
        let replaced = move |kind| own.iter().any(|(own, value)| *own == kind && value.is_some());
        let received = self.received.into_iter().flat_map(Tlvs::iter);
        let received =
            received.filter(move |(kind, _)| !matches!(*kind, kind::CRC32C | kind::NOOP) && !replaced(*kind));
        own.into_iter().filter_map(|(kind, value)| Some((kind, value?))).chain(received)
    }
}

/// A header of version 1, of at most 104 bytes.
pub fn write_v1(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let ports = format_args!("{} {}", source.port(), destination.port());
    match Family::of(source, destination) {
        Family::V4(source, destination) => format!("PROXY TCP4 {source} {destination} {ports}\r\n"),
        Family::V6(source, destination) => format!("PROXY TCP6 {} {} {ports}\r\n", hex(source), hex(destination)),
    }
    .into_bytes()
}

/// A header of version 2, of at most [`MAX_HEADER`] bytes: TLVs for which there is no room are left out. `crc32c`: with
/// a checksum.
pub fn write_v2(outgoing: &Outgoing<'_>, crc32c: bool) -> Vec<u8> {
    const CHECKSUM: [u8; 7] = [kind::CRC32C, 0, 4, 0, 0, 0, 0];
    let room = MAX_HEADER - CHECKSUM.len();
    let mut header = Vec::with_capacity(256);
    header.extend(v2::SIGNATURE);
    match Family::of(outgoing.source, outgoing.destination) {
        Family::V4(source, destination) => {
            header.extend([v2::PROXY, v2::TCP4, 0, 0]);
            header.extend([source.octets(), destination.octets()].as_flattened());
        }
        Family::V6(source, destination) => {
            header.extend([v2::PROXY, v2::TCP6, 0, 0]);
            header.extend([source.octets(), destination.octets()].as_flattened());
        }
    }
    header.extend([outgoing.source.port(), outgoing.destination.port()].map(u16::to_be_bytes).as_flattened());
    for (kind, value) in outgoing.tlvs() {
        match u16::try_from(value.len()) {
            Ok(length) if header.len() + 3 + value.len() <= room => {
                header.push(kind);
                header.extend(length.to_be_bytes());
                header.extend(value);
            }
            _ => {}
        }
    }
    if crc32c {
        header.extend(CHECKSUM);
    }
    // At most `MAX_HEADER`, which fits.
    let length = (header.len() - v2::FIXED) as u16;
    header[v2::FIXED - 2..v2::FIXED].copy_from_slice(&length.to_be_bytes());
    if crc32c {
        let sum = checksum::crc32c([&header]);
        let place = header.len() - 4;
        header[place..].copy_from_slice(&sum.to_be_bytes());
    }
    header
}

/// One family for both ends.
enum Family {
    V4(Ipv4Addr, Ipv4Addr),
    V6(Ipv6Addr, Ipv6Addr),
}

impl Family {
    fn of(source: SocketAddr, destination: SocketAddr) -> Self {
        match (source.ip().to_canonical(), destination.ip().to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Self::V4(source, destination),
            (source, destination) => Self::V6(mapped(source), mapped(destination)),
        }
    }
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// Without the dotted form of mapped addresses, which §2.1 does not know.
fn hex(address: Ipv6Addr) -> String {
    match (address.to_ipv4_mapped(), address.segments()) {
        (Some(_), [.., high, low]) => format!("::ffff:{high:x}:{low:x}"),
        (None, _) => address.to_string(),
    }
}
