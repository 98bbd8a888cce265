//! From a packet on its way in to its verdict.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_ktime_get_ns,
    programs::TcContext,
};
use proxy_abi::{
    flow::IPV4,
    handoff::{HandoffEnd, HandoffEntry, HandoffFlow, outcome},
};
use proxy_translate::{
    Packet,
    flow::Flow,
    icmp,
    network::{self, ETHERNET, IPV4_HEADER, IPV6_HEADER, Network},
    segment::{self, Context, Step, Verdict},
    tcp,
};

use crate::{
    end,
    maps::{self, Scratch},
    route::{Leaves, shunt_send},
    skb::Skb,
};

const ETHERTYPE_IPV4: u32 = 0x0800u16.to_be() as u32;
const ETHERTYPE_IPV6: u32 = 0x86ddu16.to_be() as u32;

/// Not a verdict of the kernel's: the packet is translated, and its way is to be asked for.
const SEND: i32 = i32::MAX;

/// What became of a packet, and what the kernel is told: one word, because a function of the program returns one register.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Decided(u64);

impl Decided {
    pub const NOT_OURS: Self = Self::stack(outcome::NOT_OURS);

    /// The word again, as a function of the program returns it.
    pub const fn of(word: u64) -> Self {
        Self(word)
    }

    pub const fn word(self) -> u64 {
        self.0
    }

    pub const fn new(outcome: u32, verdict: i32) -> Self {
        Self((outcome as u64) << 32 | verdict as u32 as u64)
    }

    const fn stack(outcome: u32) -> Self {
        Self::new(outcome, TC_ACT_UNSPEC)
    }

    pub const fn drop(outcome: u32) -> Self {
        Self::new(outcome, TC_ACT_SHOT)
    }

    pub const fn outcome(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub const fn verdict(self) -> i32 {
        self.0 as i32
    }

    /// The outcome is `outcome`, where the way the packet left has nothing more to say.
    const fn or(self, outcome: u32) -> Self {
        if self.outcome() == outcome::TRANSLATED { Self::new(outcome, self.verdict()) } else { self }
    }
}

/// Each step is a function that is global to the verifier: it is walked once, by itself, and not again for every way that leads to
/// it. So a step knows nothing of the one before but what is in the scratch, and answers a number that may be any.
#[inline(always)]
pub fn packet(ctx: &TcContext) -> Decided {
    let skb = ctx.skb.skb;
    let decided = match shunt_read(skb) {
        TCP => {
            let decided = Decided::of(shunt_tcp(skb));
            if decided.verdict() == SEND && shunt_write(skb, shunt_options(skb)) == 0 {
                Decided::drop(outcome::NOT_WRITABLE)
            } else {
                decided
            }
        }
        ICMP if shunt_read_quoted(skb) != 0 => Decided::of(shunt_icmp(skb)),
        _ => Decided::NOT_OURS,
    };
    if decided.verdict() == SEND { Decided::of(shunt_send(skb)).or(decided.outcome()) } else { decided }
}

const NEITHER: u32 = 0;
const TCP: u32 = 1;
const ICMP: u32 = 2;

/// Reads the IP header and the ports into the scratch; what kind of packet it is.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shunt_read(skb: *mut __sk_buff) -> u32 {
    let Some(scratch) = maps::scratch() else { return NEITHER };
    // SAFETY: this CPU's scratch, used by nothing else while this packet is at hand.
    let Some(network) = headers(&Skb(&TcContext::new(skb)), unsafe { &mut *scratch }) else { return NEITHER };
    let icmp = if network.version == IPV4 { network::ICMP } else { network::ICMPV6 };
    let kind = if network.protocol == network::TCP {
        TCP
    } else if network.protocol == icmp {
        ICMP
    } else {
        NEITHER
    };
    // SAFETY: as above.
    unsafe { (*scratch).network = network };
    kind
}

#[inline(always)]
fn headers(skb: &Skb<'_>, scratch: &mut Scratch) -> Option<Network> {
    // SAFETY: fields of the context that the program was given; the verifier rewrites the reads.
    let (protocol, vlan) = unsafe { ((*skb.0.skb.skb).protocol, (*skb.0.skb.skb).vlan_present) };
    // With a tag it is a packet of another interface, where it will come in again without.
    if vlan != 0 {
        return None;
    }
    match protocol {
        ETHERTYPE_IPV4 => {
            let header = skb.load::<{ IPV4_HEADER / 4 }>(ETHERNET)?;
            let network = Network::v4(&header, ETHERNET, skb.length())?;
            let [ports] = skb.load(network.transport)?;
            scratch.key = network::key_v4(&header, ports);
            Some(network)
        }
        ETHERTYPE_IPV6 => {
            let header = skb.load::<{ IPV6_HEADER / 4 }>(ETHERNET)?;
            let network = Network::v6(&header, ETHERNET)?;
            let [ports] = skb.load(network.transport)?;
            scratch.key = network::key_v6(&header, ports);
            Some(network)
        }
        _ => None,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shunt_tcp(skb: *mut __sk_buff) -> u64 {
    let decided = maps::scratch().map_or(Decided::NOT_OURS, |scratch| of_tcp(&TcContext::new(skb), scratch));
    decided.word()
}

#[inline(always)]
fn of_tcp(ctx: &TcContext, scratch: *mut Scratch) -> Decided {
    // SAFETY: this CPU's scratch; nothing writes these two fields from here on.
    let (network, key) = unsafe { (&(*scratch).network, &(*scratch).key) };
    let Some(entry) = maps::entry(key) else { return Decided::NOT_OURS };
    let Some((flow, gate)) = maps::flow(entry) else { return Decided::stack(outcome::PENDING) };
    let Some(header) = Skb(ctx).load::<{ tcp::HEADER / 4 }>(network.transport) else {
        return Decided::drop(outcome::MALFORMED);
    };
    let (this, other) = ends_of(flow, entry);
    // SAFETY: fields of the context and of a live element. Other CPUs may write the element at the same time, as may userspace its own
    // fields: every field is one aligned word, no decision depends on two of them agreeing, and nothing is indexed by them.
    let (mut sides, context, last_seen_ns) = unsafe {
        (
            Flow {
                gate,
                closing: &mut (*flow).closing,
                closed_ns: &mut (*flow).closed_ns,
                this: &mut *this,
                other: &*other,
            },
            Context { now_ns: bpf_ktime_get_ns(), segments: (*ctx.skb.skb).gso_segs, ifindex: (*ctx.skb.skb).ifindex },
            (*this).last_seen_ns,
        )
    };
    let write = match segment::decide(network, &header, entry, &mut sides, context) {
        Ok(Step::Forward(write)) => write,
        Ok(Step::Own { seq, ack }) => {
            return match segment::write_own(&mut Skb(ctx), network.transport, &header, (seq, ack)) {
                Some(()) => Decided::stack(outcome::OWN_ACK),
                None => Decided::drop(outcome::NOT_WRITABLE),
            };
        }
        Err(Verdict::Stack(outcome)) => return Decided::stack(outcome),
        Err(Verdict::Drop(outcome)) => return Decided::drop(outcome),
        Err(Verdict::Replace) => {
            end::replaced(scratch, entry, flow);
            return Decided::stack(outcome::REPLACED);
        }
        // Only of what is written.
        Err(Verdict::Send { .. }) => return Decided::NOT_OURS,
    };
    // SAFETY: this CPU's scratch and live elements.
    unsafe {
        (*scratch).entry = *entry;
        (*scratch).write = write;
        let leaves = Leaves::new((*other).ifindex, write.tcp_bytes());
        (*scratch).leaves = leaves.asking(last_seen_ns, context.now_ns);
    }
    if write.ended {
        end::ended(scratch, entry, flow);
    }
    Decided::new(write.outcome(), SEND)
}

/// Writes the headers as the scratch says, after the options; 0 when they cannot be written.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shunt_write(skb: *mut __sk_buff, of_options: u64) -> u32 {
    let Some(scratch) = maps::scratch().filter(|_| of_options != NOT_WRITTEN) else { return 0 };
    let ctx = TcContext::new(skb);
    // SAFETY: this CPU's scratch; nothing writes these fields meanwhile.
    let (network, entry, write) = unsafe { (&(*scratch).network, &(*scratch).entry, &(*scratch).write) };
    segment::write_headers(&mut Skb(&ctx), (ETHERNET, network), entry, write, of_options as u32).map_or(0, |()| 1)
}

const NOT_WRITTEN: u64 = u64::MAX;

/// Writes the options as the scratch says: the difference for the checksum.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shunt_options(skb: *mut __sk_buff) -> u64 {
    let Some(scratch) = maps::scratch() else { return NOT_WRITTEN };
    // SAFETY: this CPU's scratch; nothing writes these fields meanwhile.
    let (network, entry, write) = unsafe { (&(*scratch).network, &(*scratch).entry, &(*scratch).write) };
    let Some((flow, _)) = maps::flow(entry) else { return NOT_WRITTEN };
    let (this, other) = ends_of(flow, entry);
    let ctx = TcContext::new(skb);
    // SAFETY: live elements; see `of_tcp`.
    let written = unsafe { segment::write_options(&mut Skb(&ctx), network, entry, write, &mut *this, &*other) };
    written.map_or(NOT_WRITTEN, u64::from)
}

/// Reads what an ICMP error quotes into the scratch; 0 when it is none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shunt_read_quoted(skb: *mut __sk_buff) -> u32 {
    let Some(scratch) = maps::scratch() else { return 0 };
    // SAFETY: this CPU's scratch.
    match icmp::quoted(&Skb(&TcContext::new(skb)), unsafe { &(*scratch).network }) {
        Some(quoted) => {
            // SAFETY: as above.
            unsafe { (*scratch).quoted = quoted };
            1
        }
        None => 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shunt_icmp(skb: *mut __sk_buff) -> u64 {
    let decided = maps::scratch().map_or(Decided::NOT_OURS, |scratch| of_icmp(&TcContext::new(skb), scratch));
    decided.word()
}

#[inline(always)]
fn of_icmp(ctx: &TcContext, scratch: *mut Scratch) -> Decided {
    // SAFETY: this CPU's scratch; nothing writes these fields from here on.
    let (network, quoted) = unsafe { (&(*scratch).network, &(*scratch).quoted) };
    // Packets of the end that the quoted one went to: translated, they go to the end that sent it.
    let Some(entry) = maps::entry(&quoted.key) else { return Decided::NOT_OURS };
    let Some((flow, gate)) = maps::flow(entry) else { return Decided::stack(outcome::ICMP_OWN) };
    let (this, other) = ends_of(flow, entry);
    // SAFETY: live elements, read only; see `of_tcp`.
    let verdict = unsafe { icmp::translate(&mut Skb(ctx), (ETHERNET, network), quoted, entry, gate, &*this) };
    match verdict {
        Verdict::Stack(outcome) => Decided::stack(outcome),
        Verdict::Drop(outcome) => Decided::drop(outcome),
        // Of a segment only.
        Verdict::Replace => Decided::NOT_OURS,
        Verdict::Send { outcome, .. } => {
            // SAFETY: this CPU's scratch and a live element.
            unsafe {
                (*scratch).entry = *entry;
                (*scratch).leaves = Leaves::new((*other).ifindex, 0);
            }
            Decided::new(outcome, SEND)
        }
    }
}

/// The end that sent a packet of this entry, and the one it goes to.
#[inline(always)]
fn ends_of(flow: *mut HandoffFlow, entry: &HandoffEntry) -> (*mut HandoffEnd, *mut HandoffEnd) {
    let direction = usize::from(entry.direction & 1);
    // SAFETY: a live element; the index is 0 or 1.
    unsafe {
        let ends = (&raw mut (*flow).ends).cast::<HandoffEnd>();
        (ends.add(direction), ends.add(1 - direction))
    }
}
