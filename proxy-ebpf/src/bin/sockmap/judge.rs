//! One piece of a stream: to the partner, to the daemon, or nowhere.
//!
//! | piece | verdict |
//! | --- | --- |
//! | of a socket that is not joined | `SK_PASS` |
//! | empty (a bare FIN) | `SK_DROP`: passed it would lose what comes after, redirected it would kill the partner |
//! | had before, all of it | `SK_DROP`, emptied first so that the kernel does not count it as read |
//! | had before in part | cut, then as below |
//! | within the grant, nothing passed is waiting | redirected |
//! | the partner is gone | `SK_PASS` |
//! | beyond the grant, or behind what was passed | `SK_PASS`: the window closes until the daemon has read it |
//! | … and more than `hard` waits already, or it cannot be cut, or something is missing | `SK_DROP`, with a fault: the daemon ends the connection |

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::{bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_skb_adjust_room},
    programs::SkBuffContext,
};
use proxy_abi::sockmap::{Channel, FAULT_GAP, FAULT_OVERFLOW, FAULT_TRIM, NO_FAULT};

use crate::maps;

/// Most that `bpf_skb_adjust_room` takes off an `sk_skb` at once (`sk_skb_adjust_room`, v5.13–v6.18).
const CUT: u32 = 0xfff;

/// A piece has at most 512 KiB (`GSO_MAX_SIZE`, v5.19+): twelve times twelve cuts. Not loops: where the verifier guards against
/// speculation (without `CAP_PERFMON`) it follows one beyond its end.
macro_rules! twelve_times {
    ($step:expr) => {
        twelve_times!(@ $step, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@ $step:expr, $($nth:literal)*) => {
        $({
            let _ = $nth;
            $step;
        })*
    };
}

/// Why a piece is not moved.
pub enum Left {
    /// The socket is not joined, or not any more.
    NotJoined,
    /// A bare FIN, or nothing that had not been there before.
    Empty,
    Fault,
}

impl Left {
    pub const fn verdict(&self) -> u32 {
        match self {
            Self::NotJoined => SK_PASS,
            Self::Empty | Self::Fault => SK_DROP,
        }
    }
}

#[inline(always)]
pub fn judge(ctx: &SkBuffContext) -> Result<u32, Left> {
    // SAFETY: the context of this very run.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the value is written before the socket is armed, and not again.
    let index = *unsafe { maps::INDEXES.get(cookie) }.ok_or(Left::NotJoined)?;
    let channel = maps::CHANNELS.get_ptr_mut(index).ok_or(Left::NotJoined)?;
    // SAFETY: a live element. Its half `judged` is written by this program alone, under the lock of one socket; of the
    // other half words are read that the daemon may change meanwhile, each whole.
    let channel = unsafe { &mut *channel };
    let rest = whole_or_cut(ctx, channel, index)?;
    // SAFETY: takes nothing.
    channel.judged.last = unsafe { bpf_ktime_get_ns() };
    Ok(pass_on(ctx, channel, index, cookie, rest))
}

/// Bytes of the piece that had not come before; cuts off those that had.
#[inline(always)]
fn whole_or_cut(ctx: &SkBuffContext, channel: &mut Channel, index: u32) -> Result<u64, Left> {
    let length = ctx.len();
    if length == 0 {
        return Err(Left::Empty);
    }
    // SAFETY: the context of this very run. The first word is the sequence number (`struct tcp_skb_cb`).
    let first = unsafe { (*ctx.skb.skb).cb[0] };
    let judged = &mut channel.judged;
    if judged.started == 0 {
        // What of it was read before the join is for the daemon to say: nothing is granted before it has.
        maps::stamp_abi();
        judged.started = 1;
        judged.next = first.wrapping_add(length);
        return Ok(u64::from(length));
    }
    let had = judged.next.wrapping_sub(first);
    if had == 0 {
        judged.next = first.wrapping_add(length);
        return Ok(u64::from(length));
    }
    if had > u32::MAX / 2 {
        return Err(fault(channel, index, FAULT_GAP));
    }
    let mut left = if had < length { had } else { length };
    let cut = left;
    twelve_times!(left = if left == 0 { 0 } else { shunt_cut(ctx.skb.skb, left) });
    if left != 0 {
        return Err(fault(channel, index, FAULT_TRIM));
    }
    channel.judged.trimmed = channel.judged.trimmed.wrapping_add(u64::from(cut));
    let rest = length - cut;
    channel.judged.next = channel.judged.next.wrapping_add(rest);
    if rest == 0 { Err(Left::Empty) } else { Ok(u64::from(rest)) }
}

/// Takes bytes off the beginning, with twelve cuts at most: those that are still to be taken. Global to the verifier, which walks it
/// once, by itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shunt_cut(skb: *mut __sk_buff, bytes: u32) -> u32 {
    let mut left = bytes;
    twelve_times!(left = cut(skb, left));
    left
}

#[inline(always)]
fn cut(skb: *mut __sk_buff, left: u32) -> u32 {
    let now = if left < CUT { left } else { CUT };
    // SAFETY: helper on the context that the program was given.
    if left == 0 || unsafe { bpf_skb_adjust_room(skb, -(now as i32), 0, 0) } != 0 {
        return left;
    }
    left - now
}

#[inline(always)]
fn pass_on(ctx: &SkBuffContext, channel: &mut Channel, index: u32, cookie: u64, rest: u64) -> u32 {
    let Channel { judged, allowed } = channel;
    if judged.fault != NO_FAULT {
        return SK_DROP;
    }
    let redirected = judged.redirected.wrapping_add(rest);
    if read(&allowed.relayed) == judged.passed && redirected <= read(&allowed.granted) {
        // It looks the partner up, and says SK_DROP when there is none.
        let verdict = maps::PEERS.redirect_skb(ctx, cookie, 0) as u32;
        if verdict == SK_PASS {
            judged.redirected = redirected;
            if redirected >= read(&allowed.wake_at) {
                call(channel, index);
            }
            return SK_PASS;
        }
    }
    let passed = judged.passed.wrapping_add(rest);
    if passed.wrapping_sub(read(&allowed.relayed)) > read(&allowed.hard) {
        return fault(channel, index, FAULT_OVERFLOW).verdict();
    }
    judged.passed = passed;
    call(channel, index);
    SK_PASS
}

#[inline(always)]
fn fault(channel: &mut Channel, index: u32, fault: u32) -> Left {
    channel.judged.fault = fault;
    call(channel, index);
    Left::Fault
}

/// Tells the daemon, once for each epoch.
#[inline(always)]
fn call(channel: &mut Channel, index: u32) {
    let epoch = read(&channel.allowed.epoch);
    if epoch == 0 || epoch == channel.judged.told {
        return;
    }
    // When there is no room, the next piece tries again.
    if maps::CALLS.output::<u32>(&index, 0).is_ok() {
        channel.judged.told = epoch;
    }
}

/// A word that the daemon writes.
#[inline(always)]
fn read(word: &u64) -> u64 {
    // SAFETY: an aligned word of a live map element.
    unsafe { core::ptr::read_volatile(word) }
}
