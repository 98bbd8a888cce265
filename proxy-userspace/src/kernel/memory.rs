//! Memory that was needed once and is free now.

/// Gives free memory back to the kernel. The allocator keeps what parsing or diffing a large configuration took.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no arguments that could be wrong; it takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
