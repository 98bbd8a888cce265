//! What version 2 says beyond the two ends: types, lengths and values (§2.2).

use crate::sniff::cursor::Cursor;

/// The types that are registered.
pub mod kind {
    /// The protocol that the client and the first proxy agreed on.
    pub const ALPN: u8 = 0x01;
    /// The server name the client asked for.
    pub const AUTHORITY: u8 = 0x02;
    pub const CRC32C: u8 = 0x03;
    /// Padding.
    pub const NOOP: u8 = 0x04;
    /// At most [`UNIQUE_ID_MAX`] bytes that tell the connection from all others.
    pub const UNIQUE_ID: u8 = 0x05;
    /// One byte of flags, four of the verification's result, and TLVs: the TLS between the client and the first proxy.
    pub const SSL: u8 = 0x20;
    pub const NETNS: u8 = 0x30;

    pub const UNIQUE_ID_MAX: usize = 128;
}

/// In the order they came, as they came: known ones, others, and several of one type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tlvs(Box<[u8]>);

impl Tlvs {
    /// `None` when the lengths do not add up, or a unique id is too long.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut cursor = Cursor::new(bytes);
        while !cursor.is_empty() {
            let (kind, value) = next(&mut cursor)?;
            if kind == kind::UNIQUE_ID && value.len() > kind::UNIQUE_ID_MAX {
                return None;
            }
        }
        Some(Self(bytes.into()))
    }

    /// Type and value.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &[u8])> {
        let mut cursor = Cursor::new(&self.0);
        std::iter::from_fn(move || next(&mut cursor))
    }

    /// The first of a type.
    pub fn get(&self, kind: u8) -> Option<&[u8]> {
        self.iter().find_map(|(found, value)| (found == kind).then_some(value))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

pub(super) fn next<'a>(cursor: &mut Cursor<'a>) -> Option<(u8, &'a [u8])> {
    Some((cursor.u8()?, cursor.vector16()?))
}
