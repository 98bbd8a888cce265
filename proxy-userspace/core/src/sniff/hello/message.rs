//! The body of a ClientHello, once all of it is there.

use super::{Hello, NotHello, name};
use crate::sniff::cursor::Cursor;

const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
/// `ECHClientHelloType.outer`. The inner one a client-facing server passes on; nothing in it is encrypted any more.
const OUTER: u8 = 0;

/// The protocol names a client offers (RFC 7301 §3.1), each of 1–255 bytes, as they came: one allocation, however many
/// a client invents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Protocols(Box<[u8]>);

impl Protocols {
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut list = Cursor::new(&self.0);
        std::iter::from_fn(move || list.vector8())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, protocol: &[u8]) -> bool {
        self.iter().any(|offered| offered == protocol)
    }
}

/// Reads the message behind its header.
pub(super) fn read(body: &[u8]) -> Result<Hello, NotHello> {
    let extensions = extensions(body)?;
    let mut hello = Hello { sni: None, alpn: Protocols::default(), ech: false };
    let mut kinds = Vec::new();
    let mut cursor = Cursor::new(extensions);
    while !cursor.is_empty() {
        let (kind, data) = extension(&mut cursor).ok_or(NotHello::Malformed)?;
        kinds.push(kind);
        match kind {
            SERVER_NAME => hello.sni = name::read(server_name(data).ok_or(NotHello::Malformed)?)?,
            ALPN => hello.alpn = protocols(data).ok_or(NotHello::Malformed)?,
            ENCRYPTED_CLIENT_HELLO => hello.ech = data.first() == Some(&OUTER),
            _ => {}
        }
    }
    kinds.sort_unstable();
    if kinds.is_sorted_by(|a, b| a < b) { Ok(hello) } else { Err(NotHello::DuplicateExtension) }
}

/// Steps over everything up to the extensions, which end the message. Before TLS 1.3 they may be missing.
fn extensions(body: &[u8]) -> Result<&[u8], NotHello> {
    let mut cursor = Cursor::new(body);
    let [major, _minor] = cursor.array().ok_or(NotHello::Malformed)?;
    if major != 3 {
        return Err(NotHello::Version);
    }
    let mut fields = || {
        let _random: [u8; 32] = cursor.array()?;
        let session_id = cursor.vector8()?;
        let cipher_suites = cursor.vector16()?;
        let compression = cursor.vector8()?;
        let extensions = if cursor.is_empty() { &[] } else { cursor.vector16()? };
        let lengths_are_right = session_id.len() <= 32
            && !cipher_suites.is_empty()
            && cipher_suites.len().is_multiple_of(2)
            && !compression.is_empty()
            && cursor.is_empty();
        lengths_are_right.then_some(extensions)
    };
    fields().ok_or(NotHello::Malformed)
}

fn extension<'a>(cursor: &mut Cursor<'a>) -> Option<(u16, &'a [u8])> {
    Some((cursor.u16()?, cursor.vector16()?))
}

/// RFC 6066 §3: a list of names of different types, of which only one was ever defined. Other types cannot be stepped
/// over, as nothing says how long they are: the list is exactly one host name.
fn server_name(data: &[u8]) -> Option<&[u8]> {
    const HOST_NAME: u8 = 0;
    let mut list = Cursor::new(whole(Cursor::vector16, data)?);
    let kind = list.u8()?;
    let name = list.vector16()?;
    (kind == HOST_NAME && list.is_empty()).then_some(name)
}

/// RFC 7301 §3.1.
fn protocols(data: &[u8]) -> Option<Protocols> {
    let list = whole(Cursor::vector16, data)?;
    let mut cursor = Cursor::new(list);
    // At least one, none empty.
    loop {
        if cursor.vector8()?.is_empty() {
            return None;
        }
        if cursor.is_empty() {
            return Some(Protocols(list.into()));
        }
    }
}

/// A vector with nothing behind it.
fn whole<'a>(vector: impl Fn(&mut Cursor<'a>) -> Option<&'a [u8]>, data: &'a [u8]) -> Option<&'a [u8]> {
    let mut cursor = Cursor::new(data);
    let contents = vector(&mut cursor)?;
    cursor.is_empty().then_some(contents)
}
