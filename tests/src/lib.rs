//! What the tests of shunt's kernel shell share. The lab itself is `shunt_lab`.

use std::{
    io::Write,
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use proxy_userspace::kernel::capability;

/// Runs `work` on a thread of its own in a network namespace of its own, which goes with the thread.
pub fn in_new_namespace<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET)
            .context("unshare(CLONE_NEWNET): run as root, or through `cargo xtask test`")?;
        Ok(work())
    });
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// `nft -f -` in the calling thread's namespace.
pub fn nft_load(script: &str) -> Result<()> {
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    nft.stdin.take().context("stdin")?.write_all(script.as_bytes())?;
    let output = nft.wait_with_output()?;
    if !output.status.success() {
        bail!("nft -f: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// `nft list table inet shunt` in the calling thread's namespace.
pub fn nft_listing() -> Result<String> {
    let output = Command::new("nft").args(["list", "table", "inet", "shunt"]).output()?;
    if !output.status.success() {
        bail!("nft list: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Whether this kernel can keep a table for its owner, and for the next one (v6.9+). Tests of that have nothing to say elsewhere.
pub fn kernel_locks_tables() -> bool {
    static LOCKS: OnceLock<bool> = OnceLock::new();
    *LOCKS.get_or_init(|| {
        let locks = capability::probe_details().capabilities().nft_owner_persist;
        if !locks {
            println!("this kernel locks no tables");
        }
        locks
    })
}
