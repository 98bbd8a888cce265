//! The engine `sockmap`: the kernel passes on what comes from one socket to its partner. Entry points only.
#![no_std]
#![no_main]

mod judge;
mod maps;

use aya_ebpf::{macros::stream_verdict, programs::SkBuffContext};
// Its panic handler.
use proxy_ebpf as _;

/// Runs for each piece of a stream that has come in order, under the lock of the socket it came to.
#[stream_verdict]
pub fn shunt_sockmap(ctx: SkBuffContext) -> u32 {
    match judge::judge(&ctx) {
        Ok(verdict) => verdict,
        Err(left) => left.verdict(),
    }
}

/// Helpers marked `gpl_only` are refused to programs that do not say this.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 4] = *b"GPL\0";
