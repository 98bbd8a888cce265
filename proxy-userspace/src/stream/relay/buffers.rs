//! Memory for bytes on their way. A worker reads into one scratch buffer that stays in its core's cache; only what a slow
//! reader leaves of it is kept, in the buffer itself when that is much, so that nothing is copied twice.

use std::ops::Range;

/// Bytes read at once. Large enough that a syscall costs little per byte, small enough for the second-level cache.
pub const SIZE: usize = 128 * 1024;
/// Up to here what is left is copied into a piece of its own: a stalled reader of small messages holds little.
const SMALL: usize = 8 * 1024;
/// Buffers kept for the next slow reader.
const KEPT: usize = 16;

#[derive(Debug)]
pub struct Buffers {
    scratch: Box<[u8]>,
    /// For those whose bytes become others on the way; empty until the first of them.
    second: Box<[u8]>,
    spare: Vec<Box<[u8]>>,
}

/// Bytes that wait for their reader.
#[derive(Debug)]
pub struct Held {
    bytes: Box<[u8]>,
    left: Range<u32>,
    /// So many of the first are no payload: a PROXY header.
    header: u32,
}

impl Default for Buffers {
    fn default() -> Self {
        Self { scratch: vec![0; SIZE].into(), second: Box::default(), spare: Vec::new() }
    }
}

impl Buffers {
    pub fn scratch(&mut self) -> &mut [u8] {
        &mut self.scratch
    }

    /// The scratch buffer, and one that is read into before it. What is to be kept must be in the first.
    pub fn both(&mut self) -> (&mut [u8], &mut [u8]) {
        if self.second.is_empty() {
            self.second = vec![0; SIZE].into();
        }
        (&mut self.scratch, &mut self.second)
    }

    /// Keeps `left` of what was read into the scratch buffer.
    pub fn keep(&mut self, left: Range<usize>) -> Held {
        if left.len() <= SMALL {
            let bytes: Box<[u8]> = self.scratch[left.clone()].into();
            return Held { bytes, left: 0..left.len() as u32, header: 0 };
        }
        let next = self.spare.pop().unwrap_or_else(|| vec![0; SIZE].into());
        let bytes = std::mem::replace(&mut self.scratch, next);
        Held { bytes, left: left.start as u32..left.end as u32, header: 0 }
    }

    /// Takes the memory back.
    pub fn give_back(&mut self, held: Held) {
        if held.bytes.len() == SIZE && self.spare.len() < KEPT {
            self.spare.push(held.bytes);
        }
    }
}

impl Held {
    /// `payload` behind a `header` of our own.
    pub fn first(mut header: Vec<u8>, payload: &[u8]) -> Self {
        let length = header.len() as u32;
        header.extend_from_slice(payload);
        Self { left: 0..header.len() as u32, bytes: header.into(), header: length }
    }

    /// All of it has been counted already.
    pub fn counted(self) -> Self {
        Self { header: self.left.len() as u32, ..self }
    }

    pub fn left(&self) -> &[u8] {
        self.bytes.get(self.left.start as usize..self.left.end as usize).unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// `sent` bytes of it are written; how many of them were payload.
    pub fn advance(&mut self, sent: usize) -> u64 {
        let sent = (sent as u32).min(self.left.len() as u32);
        self.left.start += sent;
        let header = self.header.min(sent);
        self.header -= header;
        u64::from(sent - header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_is_kept_in_place_and_little_is_copied() {
        let mut buffers = Buffers::default();
        buffers.scratch()[..4].copy_from_slice(b"abcd");
        let before = buffers.scratch().as_ptr();
        let little = buffers.keep(1..4);
        assert_eq!((little.left(), buffers.scratch().as_ptr()), (&b"bcd"[..], before));
        let much = buffers.keep(2..SIZE);
        assert_eq!((&much.left()[..2], much.left().as_ptr()), (&b"cd"[..], before.wrapping_add(2)));
        buffers.give_back(much);
        assert_ne!(buffers.scratch().as_ptr(), before);
        assert_eq!(buffers.spare.len(), 1);
    }

    #[test]
    fn a_header_is_not_counted_as_payload() {
        let mut held = Held::first(b"PROXY".to_vec(), b"hello");
        assert_eq!(held.left(), b"PROXYhello");
        assert_eq!([held.advance(3), held.advance(3), held.advance(4)], [0, 1, 4]);
        assert!(held.is_empty());
    }
}
