//! Version 2: binary (§2.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{
    BadHeader, Ends, Header, MAX_HEADER, Tlvs, Version, checksum,
    tlv::{self, kind},
};
use crate::sniff::cursor::Cursor;

pub(super) const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length of the rest.
pub(super) const FIXED: usize = SIGNATURE.len() + 4;
const LOCAL: u8 = 0x20;
pub(super) const PROXY: u8 = 0x21;
/// TCP over IPv4, and over IPv6.
pub(super) const TCP4: u8 = 0x11;
pub(super) const TCP6: u8 = 0x21;

/// What the 13th and the 14th byte promise about the rest.
enum Content {
    /// Nothing that counts: `LOCAL`, or a family or transport that the sender could not tell.
    Skipped,
    Tcp4,
    Tcp6,
    /// Addresses of so many bytes, of no use here.
    Foreign(usize),
}

pub(super) fn parse(received: &[u8]) -> Result<Option<(Header, usize)>, BadHeader> {
    if !SIGNATURE.iter().zip(received).all(|(wanted, got)| wanted == got) {
        return Err(BadHeader::Absent);
    }
    let mut cursor = Cursor::new(received.get(SIGNATURE.len()..).unwrap_or_default());
    let Some(command) = cursor.u8() else { return Ok(None) };
    if !matches!(command, LOCAL | PROXY) {
        return Err(BadHeader::Command);
    }
    let Some(family) = cursor.u8() else { return Ok(None) };
    let content = content(command, family)?;
    let Some(length) = cursor.u16().map(usize::from) else { return Ok(None) };
    if FIXED + length > MAX_HEADER {
        return Err(BadHeader::TooLong);
    }
    if length < content.addresses() {
        return Err(BadHeader::Addresses);
    }
    let Some(header) = received.get(..FIXED + length) else { return Ok(None) };
    let (ends, tlvs) = read(header, &content)?;
    Ok(Some((Header { version: Version::V2, ends, tlvs }, header.len())))
}

fn content(command: u8, family: u8) -> Result<Content, BadHeader> {
    Ok(match (command, family >> 4, family & 0xf) {
        // The family is to be ignored, even one that does not exist.
        (LOCAL, _, _) => Content::Skipped,
        (_, 0..=3, 0) | (_, 0, 1..=2) => Content::Skipped,
        (_, 1, 1) => Content::Tcp4,
        (_, 2, 1) => Content::Tcp6,
        (_, 1, 2) => Content::Foreign(Content::Tcp4.addresses()),
        (_, 2, 2) => Content::Foreign(Content::Tcp6.addresses()),
        (_, 3, 1..=2) => Content::Foreign(2 * 108),
        _ => return Err(BadHeader::Family),
    })
}

impl Content {
    /// Bytes in front of the TLVs.
    fn addresses(&self) -> usize {
        match self {
            Self::Skipped => 0,
            Self::Tcp4 => 2 * (4 + 2),
            Self::Tcp6 => 2 * (16 + 2),
            Self::Foreign(length) => *length,
        }
    }
}

fn read(header: &[u8], content: &Content) -> Result<(Option<Ends>, Tlvs), BadHeader> {
    let mut cursor = Cursor::new(header.get(FIXED..).unwrap_or_default());
    let ends = match content {
        Content::Skipped => return Ok((None, Tlvs::default())),
        Content::Tcp4 => ends::<4>(&mut cursor, |octets| Ipv4Addr::from(octets).into()).map(Some),
        Content::Tcp6 => ends::<16>(&mut cursor, |octets| Ipv6Addr::from(octets).to_canonical()).map(Some),
        Content::Foreign(length) => cursor.bytes(*length).map(|_| None),
    };
    let ends = ends.ok_or(BadHeader::Addresses)?;
    verify(header, cursor)?;
    let tlvs = Tlvs::read(cursor.rest()).ok_or(BadHeader::Tlv)?;
    Ok((ends, tlvs))
}

/// `None`: bytes are missing.
fn ends<const N: usize>(cursor: &mut Cursor<'_>, address: fn([u8; N]) -> IpAddr) -> Option<Ends> {
    let [source, destination] = [address(cursor.array()?), address(cursor.array()?)];
    let source = SocketAddr::new(source, cursor.u16()?);
    Some(Ends { source, destination: SocketAddr::new(destination, cursor.u16()?) })
}

/// §2.2.3: the checksum is that of the whole header, with zeros in its own place.
fn verify(header: &[u8], mut tlvs: Cursor<'_>) -> Result<(), BadHeader> {
    while let Some((kind, value)) = tlv::next(&mut tlvs) {
        if kind != kind::CRC32C {
            continue;
        }
        let stated: [u8; 4] = value.try_into().map_err(|_| BadHeader::Tlv)?;
        let (before, after) = header.split_at(header.len() - tlvs.rest().len());
        let before = before.strip_suffix(&stated).ok_or(BadHeader::Tlv)?;
        if checksum::crc32c([before, &[0; 4], after]) != u32::from_be_bytes(stated) {
            return Err(BadHeader::Checksum);
        }
    }
    Ok(())
}
