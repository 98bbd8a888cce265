//! How the kernel shares a processor out among threads.

use std::{io, mem};

/// The shortest there is, in nanoseconds (`__setparam_fair`, v6.12+).
const SLICE: u64 = 100_000;

/// From now on the calling thread wants the processor soon and for a short time, not late and for long
/// (`sched_attr.sched_runtime` of `SCHED_OTHER`, v6.12+; an older kernel takes no notice). Its share of the processor stays
/// what it is, and so does a thread that somebody has given another policy.
pub fn short_slices() -> io::Result<()> {
    let mut attributes = attributes()?;
    if i64::from(attributes.sched_policy) != i64::from(libc::SCHED_OTHER) {
        return Ok(());
    }
    attributes.sched_runtime = SLICE;
    // SAFETY: `attributes` is a whole sched_attr that the kernel has filled, `size` included; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Of the calling thread.
fn attributes() -> io::Result<libc::sched_attr> {
    // SAFETY: integers only, and zero is a value of each.
    let mut attributes: libc::sched_attr = unsafe { mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: the kernel writes at most `size` bytes, which `attributes` has; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) } {
        0 => Ok(attributes),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gets_short_slices_and_keeps_its_policy_and_its_share() {
        let (before, after) = std::thread::spawn(|| {
            let before = attributes().expect("sched_getattr");
            short_slices().expect("sched_setattr");
            (before, attributes().expect("sched_getattr"))
        })
        .join()
        .expect("no panic");
        assert_eq!((after.sched_policy, after.sched_nice), (before.sched_policy, before.sched_nice));
        // An older kernel tells of no slice.
        let known = before.sched_runtime > 0;
        assert_eq!(after.sched_runtime, if known { SLICE } else { 0 });
    }
}
