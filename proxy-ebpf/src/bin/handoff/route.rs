//! Where a translated packet leaves: the FIB is asked for each, so routes and neighbours may change at any time.

use core::ptr;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Lookup,
    },
    helpers::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh},
    programs::TcContext,
};
use proxy_abi::{flow::IPV4, handoff::outcome};
use proxy_translate::network::{ETHERNET, words};

use crate::{
    arrival::Decided,
    maps::{self, Scratch},
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// What the way of a packet depends on besides its addresses.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Leaves {
    /// Where packets of the end it goes to come from, 0 = not known.
    last: u32,
    /// Bytes of its TCP header, 0 for an ICMP error.
    tcp_bytes: u32,
    /// Not 0: by the neighbour layer, also where the address of the next hop is known.
    asks: u32,
}

/// Once in about a second, in nanoseconds as a power of two.
const ASKS: u32 = 30;

impl Leaves {
    #[inline(always)]
    pub const fn new(last: u32, tcp_bytes: u32) -> Self {
        Self { last, tcp_bytes, asks: 0 }
    }

    /// Who sends a packet by an address that the FIB knows does not use the neighbour: it would never be doubted, and a next hop whose
    /// address changes without a word be missed for ever. So now and then a packet goes the kernel's own way, which asks it.
    #[inline(always)]
    pub const fn asking(self, last_seen_ns: u64, now_ns: u64) -> Self {
        Self { asks: (last_seen_ns >> ASKS != now_ns >> ASKS) as u32, ..self }
    }
}

/// Sends the packet, whose headers are those of the entry in the scratch already, as the FIB says.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn shunt_send(skb: *mut __sk_buff) -> u64 {
    let decided = maps::scratch().map_or(Decided::NOT_OURS, |scratch| send(&TcContext::new(skb), scratch));
    decided.word()
}

#[inline(always)]
fn send(ctx: &TcContext, scratch: *mut Scratch) -> Decided {
    ask(ctx, scratch);
    // SAFETY: this CPU's scratch; two fields of it.
    let (leaves, lookup) = unsafe { ((*scratch).leaves, &mut (*scratch).question) };
    // SAFETY: helper on the context that the program was given; the question is as long as is said.
    let answer = unsafe { bpf_fib_lookup(ctx.skb.skb.cast(), lookup, size_of::<Lookup>() as i32, 0) };
    // SAFETY: the field that the helper filled, v5.12+; before, still the 0 that it was.
    let most = u32::from(unsafe { lookup.__bindgen_anon_1.mtu_result });
    match answer as u32 {
        BPF_FIB_LKUP_RET_SUCCESS if most != 0 && size(ctx, scratch) > most => Decided::drop(outcome::TOO_BIG),
        BPF_FIB_LKUP_RET_SUCCESS if leaves.asks != 0 => {
            Decided::new(outcome::TRANSLATED, by_neighbour(lookup.ifindex))
        }
        BPF_FIB_LKUP_RET_SUCCESS => {
            let [a, b, c, d, e, f] = lookup.dmac;
            let [g, h, i, j, k, l] = lookup.smac;
            if ctx.store(0, &[a, b, c, d, e, f, g, h, i, j, k, l], 0).is_err() {
                return Decided::drop(outcome::NOT_WRITABLE);
            }
            // SAFETY: helper without pointers.
            Decided::new(outcome::TRANSLATED, unsafe { bpf_redirect(lookup.ifindex, 0) } as i32)
        }
        BPF_FIB_LKUP_RET_NO_NEIGH => Decided::new(outcome::NEIGHBOUR, by_neighbour(lookup.ifindex)),
        // Forwarding is off: the FIB is not asked for packets in transit. The neighbour layer may still be.
        BPF_FIB_LKUP_RET_FWD_DISABLED if leaves.last != 0 => {
            Decided::new(outcome::BY_LAST_INTERFACE, by_neighbour(leaves.last))
        }
        BPF_FIB_LKUP_RET_FRAG_NEEDED => Decided::drop(outcome::TOO_BIG),
        _ => Decided::drop(outcome::NO_ROUTE),
    }
}

/// Out on that interface, to the next hop that the neighbour layer finds (v5.10+).
#[inline(always)]
fn by_neighbour(ifindex: u32) -> i32 {
    // SAFETY: without parameters of its own the helper takes the next hop from the packet.
    unsafe { bpf_redirect_neigh(ifindex, ptr::null_mut(), 0, 0) as i32 }
}

/// Bytes of the IP packet; a super-packet is as large as its segments.
#[inline(always)]
fn size(ctx: &TcContext, scratch: *mut Scratch) -> u32 {
    // SAFETY: this CPU's scratch, two fields of it; a field of the context.
    let (network, tcp_bytes, gso_size) =
        unsafe { (&(*scratch).network, (*scratch).leaves.tcp_bytes, (*ctx.skb.skb).gso_size) };
    let after_ip = if gso_size > 0 { tcp_bytes + gso_size } else { network.length as u32 };
    (network.transport - ETHERNET) as u32 + after_ip
}

/// Writes the question for the way of a translated packet into the scratch.
#[inline(never)]
fn ask(ctx: &TcContext, scratch: *mut Scratch) {
    // SAFETY: this CPU's scratch; three fields of it.
    let (network, entry, lookup) =
        unsafe { (&(*scratch).network, &(*scratch).entry, &mut (*scratch).question) };
    // SAFETY: integers only, for which zeros are values; a field of the context.
    let ifindex = unsafe {
        *lookup = core::mem::zeroed();
        (*ctx.skb.skb).ifindex
    };
    lookup.l4_protocol = network.protocol;
    // Without a length: with one the kernel would also compare it with what sockets here were told of the path (`fib_nh_exception`),
    // and nobody would tell the sender. On its way there the packet meets the router who does.
    lookup.ifindex = ifindex;
    lookup.sport = u16::from_ne_bytes(entry.source.port_be);
    lookup.dport = u16::from_ne_bytes(entry.destination.port_be);
    if network.version == IPV4 {
        lookup.family = AF_INET;
        lookup.__bindgen_anon_2.tos = network.class;
        lookup.__bindgen_anon_3.ipv4_src = words(&entry.source)[0];
        lookup.__bindgen_anon_4.ipv4_dst = words(&entry.destination)[0];
    } else {
        lookup.family = AF_INET6;
        lookup.__bindgen_anon_3.ipv6_src = words(&entry.source);
        lookup.__bindgen_anon_4.ipv6_dst = words(&entry.destination);
    }
}
