//! Leads connections that dial one of many ports to one listening socket: entry point only.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod maps;
mod steer;

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    macros::sk_lookup,
    programs::SkLookupContext,
};
// Its panic handler.
use proxy_ebpf as _;
use steer::Way;

/// Runs for packets that belong to no connection yet, before the kernel looks for a listening socket.
#[sk_lookup]
pub fn shunt_lookup(ctx: SkLookupContext) -> u32 {
    match steer::way(&ctx) {
        // Without that socket it is as if the program were not there.
        Way::Listener(index) => {
            let _ = maps::LISTENERS.redirect_sk_lookup(&ctx, index, 0);
            SK_PASS
        }
        Way::AsWithout => SK_PASS,
        Way::Refuse => SK_DROP,
    }
}

/// Helpers marked `gpl_only` are refused to programs that do not say this.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 4] = *b"GPL\0";
