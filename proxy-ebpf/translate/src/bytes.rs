//! A packet in memory.

use crate::{OPTIONS, Options, Packet, checksum};

/// A packet in memory, for tests and the self-probe.
#[derive(Debug)]
pub struct Bytes<'a> {
    bytes: &'a mut [u8],
    /// The transport checksum holds the pseudo-header alone, as the kernel's `CHECKSUM_PARTIAL`.
    partial: bool,
    options: Options,
}

impl<'a> Bytes<'a> {
    /// A packet whose checksums are whole.
    pub const fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, partial: false, options: [0; OPTIONS / 4] }
    }

    /// A packet whose transport checksum a device will complete.
    pub const fn partial(bytes: &'a mut [u8]) -> Self {
        Self { bytes, partial: true, options: [0; OPTIONS / 4] }
    }
}

impl Packet for Bytes<'_> {
    fn length(&self) -> usize {
        self.bytes.len()
    }

    fn load<const N: usize>(&self, at: usize) -> Option<[u32; N]> {
        let bytes = self.bytes.get(at..at.checked_add(4 * N)?)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes(bytes.try_into().ok()?);
        }
        Some(words)
    }

    fn store<const N: usize>(&mut self, at: usize, words: &[u32; N]) -> Option<()> {
        let bytes = self.bytes.get_mut(at..at.checked_add(4 * N)?)?;
        for (word, bytes) in words.iter().zip(bytes.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Some(())
    }

    fn store_unsummed<const N: usize>(&mut self, at: usize, words: &[u32; N]) -> Option<()> {
        self.store(at, words)
    }

    fn pair(&self, at: usize) -> Option<[u8; 2]> {
        self.bytes.get(at..at.checked_add(2)?)?.try_into().ok()
    }

    fn options(&mut self, at: usize, length: usize) -> Option<&Options> {
        let mut bytes = [0; OPTIONS];
        bytes.get_mut(..length)?.copy_from_slice(self.bytes.get(at..at.checked_add(length)?)?);
        for (word, bytes) in self.options.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes(bytes.try_into().ok()?);
        }
        Some(&self.options)
    }

    fn fill_with_nops(&mut self, at: usize, length: usize) -> Option<()> {
        self.bytes.get_mut(at..at.checked_add(length)?)?.fill(1);
        Some(())
    }

    fn adjust_checksum(&mut self, at: usize, pseudo: u32, rest: u32) -> Option<()> {
        let field = self.bytes.get_mut(at..at.checked_add(2)?)?;
        let old = u16::from_ne_bytes((&*field).try_into().ok()?);
        let new = if self.partial {
            checksum::fold16(checksum::add(u32::from(old), pseudo))
        } else {
            checksum::adjust(old, checksum::add(pseudo, rest))
        };
        field.copy_from_slice(&new.to_ne_bytes());
        Some(())
    }
}
