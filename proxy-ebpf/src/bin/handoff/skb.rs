//! The kernel's packet. Every access goes through a helper, which checks its bounds in the kernel, reaches what is not in the linear
//! part, and makes a shared packet our own before it is changed.

use core::arch::asm;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM},
    helpers::{bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use proxy_translate::{
    OPTIONS, Options, Packet,
    options::{self, Layout},
};

use crate::maps;

/// `BPF_F_PSEUDO_HDR`: a checksum that a device will complete holds this part too.
const PSEUDO_HEADER: u64 = 1 << 4;

pub struct Skb<'a>(pub &'a TcContext);

/// The number again, where it is from 1 to `most`: by two bounds, which every verifier remembers; that a number is not 0 those before
/// Linux 6.8 forget. The compiler, which knows more, would ask for the latter.
#[inline(always)]
fn from_one(number: usize, most: usize) -> Option<u32> {
    let less = unknown(number.wrapping_sub(1) as u64);
    if less >= most as u64 {
        return None;
    }
    Some(unknown(less) as u32 + 1)
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
    fn step(&self, start: usize, length: usize, layout: Layout) -> Layout {
        let word = u64::from(shunt_step(self.0.skb.skb, start as u32, length as u32, layout.word()));
        Layout::of(unknown(word) as u32)
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

/// The same number, of which the compiler knows nothing: it leaves checks away that the verifier, which knows less, wants to see.
#[inline(always)]
fn unknown(mut number: u64) -> u64 {
    // SAFETY: an instruction that changes nothing.
    unsafe { asm!("{number} = {number}", number = inout(reg) number, options(pure, nomem, nostack)) };
    number
}

/// Global to the verifier: walked once, and not again for each step.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shunt_step(skb: *mut __sk_buff, start: u32, length: u32, layout: u32) -> u32 {
    options::step(&Skb(&TcContext::new(skb)), start as usize, length as usize, Layout::of(layout)).word()
}
