//! The program that shows whether this kernel runs our programs rightly: entry points only.
#![no_std]
#![no_main]

mod count;
mod maps;

use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};

/// Counts the packet in its flow and lets it pass. The daemon runs it on packets of its own making before it trusts this
/// kernel with any other program; attached to a device, it observes and never decides.
#[classifier]
pub fn shunt_probe(ctx: TcContext) -> i32 {
    maps::stamp_abi();
    let outcome = match count::try_count(&ctx) {
        Ok(outcome) => outcome,
        Err(refused) => refused.outcome(),
    };
    maps::count_outcome(outcome);
    TC_ACT_UNSPEC
}

/// Helpers marked `gpl_only` are refused to programs that do not say this.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 4] = *b"GPL\0";
