//! What of conntrack's events is queued at all: those with a mark of shunt's. Without it every connection that is forwarded or
//! made here, also others', takes room from the ends that must not be lost, and wakes the daemon.

use libc::{
    BPF_ABS, BPF_IMM, BPF_IND, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_LDX, BPF_MISC, BPF_RET, BPF_TAX, BPF_W,
    SKF_AD_NLATTR, SKF_AD_OFF, sock_filter,
};

use super::wire::{NFGENMSG, NLMSG_HEADER, cta};

/// A classic filter, which needs no privilege: the program looks for `CTA_MARK` behind the headers and passes what has a bit of
/// `id_mask` in it (`bpf_skb_get_nlattr`).
pub fn program(id_mask: u32) -> [sock_filter; 9] {
    let step = |code: u32, k: u32| sock_filter { code: code as u16, jt: 0, jf: 0, k };
    [
        step(BPF_LD | BPF_IMM, (NLMSG_HEADER + NFGENMSG) as u32),
        step(BPF_LDX | BPF_IMM, cta::MARK.into()),
        step(BPF_LD | BPF_W | BPF_ABS, (SKF_AD_OFF + SKF_AD_NLATTR).cast_unsigned()),
        // 0: there is none.
        sock_filter { jt: 4, ..step(BPF_JMP | BPF_JEQ | BPF_K, 0) },
        step(BPF_MISC | BPF_TAX, 0),
        step(BPF_LD | BPF_W | BPF_IND, 4),
        sock_filter { jf: 1, ..step(BPF_JMP | BPF_JSET | BPF_K, id_mask) },
        step(BPF_RET | BPF_K, u32::MAX),
        step(BPF_RET | BPF_K, 0),
    ]
}
