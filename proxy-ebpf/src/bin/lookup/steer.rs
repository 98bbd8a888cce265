//! Which socket a packet is led to.

use core::{arch::asm, mem::offset_of};

use aya_ebpf::{bindings::bpf_sk_lookup, maps::lpm_trie::Key, programs::SkLookupContext};
use proxy_abi::lookup::{LEAVE, ListenKey, REFUSE};

use crate::maps::RANGES;

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;

/// A field of the context, by a load of its own: the verifier takes loads at constant offsets only, and the compiler would
/// make one load at a chosen offset of two in two branches.
macro_rules! load {
    ($context:expr, $field:ident) => {
        load!($context, $field, 0)
    };
    ($context:expr, $field:ident, $more:literal) => {{
        let value: u64;
        // SAFETY: reads four bytes of the context, which the kernel lets programs of this kind read.
        unsafe {
            asm!(
                "{value} = *(u32 *)({context} + {offset})",
                value = out(reg) value,
                context = in(reg) $context,
                offset = const offset_of!(bpf_sk_lookup, $field) + $more,
                options(pure, readonly, nostack),
            );
        }
        value as u32
    }};
}

pub enum Way {
    /// To the socket at this place of `LISTENERS`.
    Listener(u32),
    /// Where the kernel would lead it.
    AsWithout,
    Refuse,
}

/// An entry of the dialled address itself counts before one of all addresses, as with sockets.
#[inline(always)]
pub fn way(ctx: &SkLookupContext) -> Way {
    let context = ctx.lookup;
    if load!(context, protocol) != IPPROTO_TCP {
        return Way::AsWithout;
    }
    let port_be = (load!(context, local_port) as u16).to_be_bytes();
    let family = load!(context, family);
    let words = if family == AF_INET {
        [0, 0, V4_MAPPED, load!(context, local_ip4)]
    } else {
        [
            load!(context, local_ip6),
            load!(context, local_ip6, 4),
            load!(context, local_ip6, 8),
            load!(context, local_ip6, 12),
        ]
    };
    let any = if family == AF_INET { [0, 0, V4_MAPPED, 0] } else { [0; 4] };
    match find(words, port_be).or_else(|| find(any, port_be)) {
        None | Some(LEAVE) => Way::AsWithout,
        Some(REFUSE) => Way::Refuse,
        Some(index) => Way::Listener(index),
    }
}

/// `::ffff:0:0/96`, the third word as it is in memory.
const V4_MAPPED: u32 = 0xffff_u32.to_be();

#[inline(always)]
fn find(words: [u32; 4], port_be: [u8; 2]) -> Option<u32> {
    let mut address = [0; 16];
    let [a, b, c, d] = words.map(u32::to_ne_bytes);
    address[..4].copy_from_slice(&a);
    address[4..8].copy_from_slice(&b);
    address[8..12].copy_from_slice(&c);
    address[12..].copy_from_slice(&d);
    RANGES.get(Key::new(ListenKey::BITS, ListenKey { address, port_be })).copied()
}
