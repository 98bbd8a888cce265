//! Handed-over flows: packets of one TCP connection become packets of the other, on their way in (docs/handoff.md). Entry points only.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod arrival;
mod end;
mod maps;
mod route;
mod skb;

use aya_ebpf::{macros::classifier, programs::TcContext};
// Its panic handler, which the linker removes.
use proxy_ebpf as _;

/// A packet on its way in: translated and sent on, or left to the stack.
#[classifier]
pub fn shunt_handoff(ctx: TcContext) -> i32 {
    let decided = arrival::packet(&ctx);
    maps::count(decided.outcome());
    decided.verdict()
}

/// Helpers marked `gpl_only` are refused to programs that do not say this.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 4] = *b"GPL\0";
