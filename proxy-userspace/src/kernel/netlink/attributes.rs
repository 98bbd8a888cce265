//! Messages and attributes: written into one growing buffer, read without a copy.
//!
//! Sets of hundreds of thousands of elements go through here, so neither side makes an object per element.

use super::HEADER;

/// Bytes of an attribute's header, `struct nlattr`.
const ATTRIBUTE: usize = 4;
const NESTED: u16 = libc::NLA_F_NESTED as u16;
/// The two flag bits above the type (`NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;

/// What was written does not fit: an attribute holds at most 65,531 bytes, a string no NUL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("longer than a netlink attribute can hold, or a name with a NUL in it")]
pub struct TooLong;

/// Where a message or a nest began; ends it again.
#[must_use = "a message or nest that is not ended has no length"]
#[derive(Debug, Clone, Copy)]
pub struct Mark(usize);

/// Netlink messages, one behind the other.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    /// Something did not fit; told at the end, so that the code in between reads like the message.
    overflow: bool,
}

impl Writer {
    pub fn new() -> Self {
        Self::default()
    }

    /// What was written, unless a part of it did not fit.
    pub fn finish(self) -> Result<Vec<u8>, TooLong> {
        match self.overflow {
            true => Err(TooLong),
            false => Ok(self.bytes),
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes back everything written after the first `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        self.bytes.truncate(length);
    }

    /// Begins a message: the header, then whatever the protocol puts before the attributes.
    pub fn message(&mut self, kind: u16, flags: u16, sequence: u32, fixed: &[u8]) -> Mark {
        let mark = Mark(self.bytes.len());
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend(fixed);
        self.pad();
        mark
    }

    pub fn end_message(&mut self, mark: Mark) {
        let length = self.bytes.len().saturating_sub(mark.0);
        match u32::try_from(length) {
            Ok(length) => self.patch(mark.0, &length.to_ne_bytes()),
            Err(_) => self.overflow = true,
        }
    }

    /// A message built elsewhere; its sequence number is set.
    pub fn copy_message(&mut self, message: &[u8], sequence: u32) {
        let at = self.bytes.len();
        self.bytes.extend(message);
        self.patch(at + 8, &sequence.to_ne_bytes());
        self.pad();
    }

    pub fn put(&mut self, kind: u16, payload: &[u8]) {
        match u16::try_from(payload.len().saturating_add(ATTRIBUTE)) {
            Ok(length) => {
                self.bytes.extend(length.to_ne_bytes());
                self.bytes.extend(kind.to_ne_bytes());
                self.bytes.extend(payload);
                self.pad();
            }
            Err(_) => self.overflow = true,
        }
    }

    /// With the NUL that the kernel wants at its end.
    pub fn put_text(&mut self, kind: u16, text: &str) {
        let at = self.bytes.len();
        if text.len() + ATTRIBUTE >= usize::from(u16::MAX) || text.contains('\0') {
            self.overflow = true;
            return;
        }
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        self.end_attribute(at);
        self.pad();
    }

    pub fn put_be32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    pub fn put_be64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_be_bytes());
    }

    pub fn nest(&mut self, kind: u16) -> Mark {
        let mark = Mark(self.bytes.len());
        self.bytes.extend([0; 2]);
        self.bytes.extend((kind | NESTED).to_ne_bytes());
        mark
    }

    pub fn end(&mut self, mark: Mark) {
        self.end_attribute(mark.0);
    }

    /// Bytes of the nest so far, with its header.
    pub fn nest_len(&self, mark: Mark) -> usize {
        self.bytes.len().saturating_sub(mark.0)
    }

    fn end_attribute(&mut self, at: usize) {
        match u16::try_from(self.bytes.len().saturating_sub(at)) {
            Ok(length) => self.patch(at, &length.to_ne_bytes()),
            Err(_) => self.overflow = true,
        }
    }

    fn patch(&mut self, at: usize, value: &[u8]) {
        match self.bytes.get_mut(at..at.saturating_add(value.len())) {
            Some(place) => place.copy_from_slice(value),
            None => self.overflow = true,
        }
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The attributes of a message or a nest. Ends at the first one that does not fit.
#[derive(Debug, Clone, Copy)]
pub struct Attributes<'a> {
    bytes: &'a [u8],
    whole: usize,
}

#[derive(Debug, Clone, Copy)]
pub struct Attribute<'a> {
    pub kind: u16,
    pub payload: &'a [u8],
    /// Where the attribute begins in what it was read from, in bytes.
    pub offset: usize,
}

impl<'a> Attributes<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, whole: bytes.len() }
    }

    /// Those of a whole message whose header is followed by `fixed` bytes; offsets count from the header.
    pub fn of_message(message: &'a [u8], fixed: usize) -> Self {
        let bytes = message.get(HEADER.saturating_add(fixed)..).unwrap_or_default();
        Self { bytes, whole: message.len() }
    }

    /// The first attribute of that type.
    pub fn find(mut self, kind: u16) -> Option<Attribute<'a>> {
        self.by_ref().find(|attribute| attribute.kind == kind)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let header = self.bytes.first_chunk::<ATTRIBUTE>()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let payload = self.bytes.get(ATTRIBUTE..length)?;
        let offset = self.whole - self.bytes.len();
        self.bytes = self.bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Attribute { kind, payload, offset })
    }
}

impl<'a> Attribute<'a> {
    pub fn nested(&self) -> Attributes<'a> {
        Attributes::new(self.payload)
    }

    /// Up to the first NUL.
    pub fn text(&self) -> Option<&'a str> {
        let text = self.payload.split(|byte| *byte == 0).next()?;
        std::str::from_utf8(text).ok()
    }

    pub fn be32(&self) -> Option<u32> {
        self.payload.first_chunk().copied().map(u32::from_be_bytes)
    }

    pub fn be64(&self) -> Option<u64> {
        self.payload.first_chunk().copied().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() -> Result<(), TooLong> {
        let mut writer = Writer::new();
        let message = writer.message(1, 2, 3, &[1, 0, 0, 0]);
        writer.put_text(1, "shunt");
        let nest = writer.nest(2);
        writer.put_be32(3, 7);
        writer.put_be64(4, 8);
        writer.end(nest);
        writer.end_message(message);
        let bytes = writer.finish()?;
        let attributes = Attributes::of_message(&bytes, 4);
        assert_eq!(attributes.find(1).and_then(|name| name.text()), Some("shunt"));
        let nest = attributes.find(2).map(|nest| nest.nested());
        assert_eq!(nest.and_then(|nest| nest.find(3)).and_then(|value| value.be32()), Some(7));
        assert_eq!(nest.and_then(|nest| nest.find(4)).and_then(|value| value.be64()), Some(8));
        assert_eq!(attributes.map(|attribute| attribute.offset).collect::<Vec<_>>(), [20, 32]);
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_not_a_wrong_length() {
        let mut writer = Writer::new();
        writer.put(1, &[0; 65_532]);
        assert_eq!(writer.finish(), Err(TooLong));
        let mut writer = Writer::new();
        writer.put_text(1, "a\0b");
        assert_eq!(writer.finish(), Err(TooLong));
        let mut writer = Writer::new();
        let nest = writer.nest(1);
        writer.put(2, &[0; 40_000]);
        writer.put(2, &[0; 40_000]);
        writer.end(nest);
        assert_eq!(writer.finish(), Err(TooLong));
    }

    #[test]
    fn lengths_that_lie_end_the_walk() {
        assert_eq!(Attributes::new(&[3, 0, 1, 0, 0, 0, 0, 0]).count(), 0);
        assert_eq!(Attributes::new(&[12, 0, 1, 0, 0, 0, 0, 0]).count(), 0);
        assert_eq!(Attributes::new(&[8, 0]).count(), 0);
    }
}
