//! What shunt's eBPF programs share. Each folder of `bin/` is one object, loaded by itself, so that what one kernel lacks
//! costs it one engine and not all; docs/ebpf.md says how they are built.
#![no_std]

pub mod packet;

/// The linker removes it: nothing here panics, and the verifier would refuse a program that could loop for ever.
#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
