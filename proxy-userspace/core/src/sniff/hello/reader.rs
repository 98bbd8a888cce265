//! Finds the end of the hello's handshake message among the records that carry it.

use std::borrow::Cow;

use super::{Hello, MAX_HELLO, MAX_MESSAGE, NotHello, message};
use crate::sniff::cursor::Cursor;

/// Content type, version, length.
pub(super) const RECORD_HEADER: usize = 5;
/// RFC 8446 §5.1.
const MAX_RECORD: usize = 1 << 14;
/// Type, and a length of three bytes.
const MESSAGE_HEADER: usize = 4;
/// Content type of a record.
const HANDSHAKE: u8 = 22;
/// Type of a handshake message.
const CLIENT_HELLO: u8 = 1;

/// Remembers how far it has got, so that a hello which comes a byte at a time costs as much as one that comes whole.
#[derive(Debug, Clone, Default)]
pub struct HelloReader {
    /// Bytes of the connection that are done with.
    at: usize,
    /// Bytes of the current record still to come.
    record_left: usize,
    /// The message's header; zero where it has not come yet.
    header: [u8; MESSAGE_HEADER],
    header_length: usize,
    /// Bytes of the message's body that have come.
    body_length: usize,
}

impl HelloReader {
    /// Like [`parse`](super::parse). `received` begins with everything the calls before were given; after a hello or
    /// an error there is nothing more to ask.
    ///
    /// # Errors
    /// As [`parse`](super::parse).
    pub fn advance(&mut self, received: &[u8]) -> Result<Option<Hello>, NotHello> {
        while !self.is_complete() {
            let Some(rest) = received.get(self.at..) else { return Ok(None) };
            if self.record_left == 0 {
                let Some(length) = self.record(rest)? else { return Ok(None) };
                self.record_left = length;
                self.at += RECORD_HEADER;
            } else {
                let taken = self.take(rest.get(..self.record_left).unwrap_or(rest));
                if taken == 0 {
                    return Ok(None);
                }
                self.at += taken;
                self.record_left -= taken;
                self.check()?;
            }
        }
        let message = received.get(..self.at).and_then(join).ok_or(NotHello::Malformed)?;
        message::read(message.get(MESSAGE_HEADER..).unwrap_or_default()).map(Some)
    }

    #[cfg(test)]
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Length of the record that begins here; `None` when its header is not complete.
    fn record(&self, bytes: &[u8]) -> Result<Option<usize>, NotHello> {
        if self.at + RECORD_HEADER >= MAX_HELLO {
            return Err(NotHello::TooLong);
        }
        // The minor version says nothing and must be ignored (RFC 8446 §5.1).
        let may_begin_a_record = bytes.iter().zip([HANDSHAKE, 3]).all(|(got, wanted)| *got == wanted);
        if !may_begin_a_record {
            return Err(if self.at == 0 { NotHello::NotTls } else { NotHello::Malformed });
        }
        let Some([_, _, _, high, low]) = bytes.first_chunk() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        // An empty one would promise nothing about an end (RFC 8446 §5.1 forbids it too).
        if length == 0 {
            return Err(NotHello::Malformed);
        }
        if length > MAX_RECORD || self.at + RECORD_HEADER + length > MAX_HELLO {
            return Err(NotHello::TooLong);
        }
        Ok(Some(length))
    }

    /// Takes bytes of the message; how many.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let missing = self.header.get_mut(self.header_length..).unwrap_or_default();
        if missing.is_empty() {
            self.body_length += bytes.len();
            return bytes.len();
        }
        let taken = missing.len().min(bytes.len());
        missing.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        self.header_length += taken;
        taken
    }

    /// Can what has come still become a ClientHello?
    fn check(&self) -> Result<(), NotHello> {
        let announced = self.body_announced();
        if self.header[0] != CLIENT_HELLO {
            return Err(NotHello::OtherMessage);
        }
        if announced > MAX_MESSAGE - MESSAGE_HEADER {
            return Err(NotHello::TooLong);
        }
        // A hello ends its record: what follows it belongs to another key (RFC 8446 §5.1) or must wait for an answer.
        if self.header_length == MESSAGE_HEADER && self.body_length + self.record_left > announced {
            return Err(NotHello::Malformed);
        }
        Ok(())
    }

    /// Before the header is complete: the least it can be.
    fn body_announced(&self) -> usize {
        let [_, high, middle, low] = self.header;
        usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low)
    }

    fn is_complete(&self) -> bool {
        self.header_length == MESSAGE_HEADER && self.body_length == self.body_announced()
    }
}

/// The payloads of the records.
fn join(records: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut cursor = Cursor::new(records);
    let mut payload = move || {
        if cursor.is_empty() {
            return None;
        }
        cursor.bytes(RECORD_HEADER - 2)?;
        cursor.vector16()
    };
    let mut message = Cow::Borrowed(payload()?);
    while let Some(more) = payload() {
        message.to_mut().extend_from_slice(more);
    }
    Some(message)
}
