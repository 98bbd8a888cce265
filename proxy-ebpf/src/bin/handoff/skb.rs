//! The kernel's packet. Every access goes through a helper, which checks its bounds in the kernel, reaches what is not in the linear
//! part, and makes a shared packet our own before it is changed.

use core::arch::asm;

use aya_ebpf::{
    bindings::BPF_F_RECOMPUTE_CSUM,
    helpers::{bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use proxy_translate::{OPTIONS, Options, Packet};

use crate::maps;

/// `BPF_F_PSEUDO_HDR`: a checksum that a device will complete holds this part too.
const PSEUDO_HEADER: u64 = 1 << 4;

pub struct Skb<'a>(pub &'a TcContext);

/// The number again, where it is from 1 to `most`: by two bounds, which every verifier remembers; that a number is not 0 those before
/// Linux 6.8 forget. The compiler, which knows more, would ask for the latter.
#[inline(always)]
fn from_one(number: usize, most: usize) -> Option<u32> {
    let mut less = number.wrapping_sub(1);
    // SAFETY: does nothing, with a number that may be any from here on.
    unsafe { asm!("{0} = {0}", inout(reg) less, options(pure, nomem, nostack, preserves_flags)) };
    if less >= most {
        return None;
    }
    // SAFETY: as above.
    unsafe { asm!("{0} = {0}", inout(reg) less, options(pure, nomem, nostack, preserves_flags)) };
    Some(less as u32 + 1)
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn length(&self) -> usize {
        self.0.len() as usize
    }

    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> Option<[u32; N]> {
        self.0.load(at).ok()
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, at: usize, words: &[u32; N]) -> Option<()> {
        self.0.store(at, words, 0).ok()
    }

    #[inline(always)]
    fn store_unsummed<const N: usize>(&mut self, at: usize, words: &[u32; N]) -> Option<()> {
        self.0.store(at, words, u64::from(BPF_F_RECOMPUTE_CSUM)).ok()
    }

    /// Through a map: what is read from there may be anything.
    #[inline(always)]
    fn opaque(&mut self, number: usize) -> usize {
        match maps::scratch() {
            // SAFETY: a live element, of this CPU only.
            Some(room) => unsafe {
                let room = &raw mut (*room).number;
                room.write_volatile(number as u32);
                room.read_volatile() as usize
            },
            None => 0,
        }
    }

    #[inline(always)]
    fn pair(&self, at: usize) -> Option<[u8; 2]> {
        self.0.load(at).ok()
    }

    #[inline(always)]
    fn options(&mut self, at: usize, length: usize) -> Option<&Options> {
        let room = maps::scratch()?;
        // SAFETY: a live element, of this CPU only, used by nothing else while this packet is at hand.
        let room = unsafe { &mut (*room).options };
        *room = [0; OPTIONS / 4];
        let Some(length) = from_one(length, OPTIONS) else { return Some(room) };
        // SAFETY: `length` bytes fit into the room, which is more than 0 and at most all of it.
        let loaded = unsafe { bpf_skb_load_bytes(self.0.skb.skb.cast(), at as u32, room.as_mut_ptr().cast(), length) };
        (loaded == 0).then_some(room)
    }

    #[inline(always)]
    fn fill_with_nops(&mut self, at: usize, length: usize) -> Option<()> {
        let Some(length) = from_one(length, OPTIONS) else { return Some(()) };
        let nops = maps::NOPS.as_ptr().cast_mut().cast();
        // SAFETY: `length` bytes are there to be read, more than 0 and at most all of them.
        let stored = unsafe { bpf_skb_store_bytes(self.0.skb.skb, at as u32, nops, length, 0) };
        (stored == 0).then_some(())
    }

    #[inline(always)]
    fn adjust_checksum(&mut self, at: usize, pseudo: u32, rest: u32) -> Option<()> {
        // SAFETY: helpers on the context that the program was given; offsets are checked in the kernel.
        let changed = unsafe {
            bpf_l4_csum_replace(self.0.skb.skb, at as u32, 0, u64::from(pseudo), PSEUDO_HEADER)
                | bpf_l4_csum_replace(self.0.skb.skb, at as u32, 0, u64::from(rest), 0)
        };
        (changed == 0).then_some(())
    }
}
