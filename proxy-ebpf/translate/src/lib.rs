//! Header in, header out: how a packet of one TCP connection becomes a packet of the other one (docs/handoff.md).
//!
//! Nothing here knows a kernel. The program in `proxy-ebpf` runs it on packets of the kernel, the self-probe and the tests on bytes in
//! memory ([`bytes::Bytes`]): what is tested is what runs. For the sake of the verifier there are no loops whose end is not known to the
//! compiler, no slices, and no pointer arithmetic: a variable offset is an argument of [`Packet`], never an index.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod bytes;
pub mod checksum;
pub mod flow;
pub mod icmp;
pub mod network;
pub mod options;
pub mod segment;
pub mod tcp;
pub mod whole;

use options::Layout;

/// Bytes of TCP options at most (RFC 9293 §3.1).
pub const OPTIONS: usize = 40;

/// Options as words of memory.
pub type Options = [u32; OPTIONS / 4];

/// A packet that begins with its Ethernet header.
///
/// Headers are read and written as words of memory, not as bytes: a word is in the order of the wire, and `u32::from_be` makes it a number.
pub trait Packet {
    /// Bytes of all of it.
    fn length(&self) -> usize;

    /// `N` words from byte `at`; `None` past the end.
    fn load<const N: usize>(&self, at: usize) -> Option<[u32; N]>;

    /// Replaces `N` words from byte `at`. What the sum over the packet loses or gains by it, a checksum in the packet makes up for.
    fn store<const N: usize>(&mut self, at: usize, words: &[u32; N]) -> Option<()>;

    /// As [`Packet::store`] where no checksum makes up for it: an IPv6 header.
    fn store_unsummed<const N: usize>(&mut self, at: usize, words: &[u32; N]) -> Option<()>;

    /// Two bytes from `at`.
    fn pair(&self, at: usize) -> Option<[u8; 2]>;

    /// The first `length` (0–40) bytes from `at`, then zeros.
    fn options(&mut self, at: usize, length: usize) -> Option<&Options>;

    /// Replaces `length` (0–40) bytes from `at` by NOP options.
    fn fill_with_nops(&mut self, at: usize, length: usize) -> Option<()>;

    /// [`options::step`], wherever that is done: the verifier walks anew through what it knows more than once.
    fn step(&self, start: usize, length: usize, layout: Layout) -> Layout
    where
        Self: Sized,
    {
        options::step(self, start, length, layout)
    }

    /// Adds differences ([`checksum::difference`]) to the transport checksum at `at`: `pseudo` of what is in the pseudo-header, `rest` of
    /// what is after the network header. A checksum that a device will complete holds the pseudo-header alone.
    fn adjust_checksum(&mut self, at: usize, pseudo: u32, rest: u32) -> Option<()>;
}

/// Byte `at` of words.
#[inline(always)]
pub const fn byte(words: &[u32], at: usize) -> u8 {
    words[at / 4].to_ne_bytes()[at % 4]
}
