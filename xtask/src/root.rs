//! Building is for the user, network namespaces are for root.

use std::{env, os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result, anyhow};
use nix::unistd::geteuid;

pub fn is_root() -> bool {
    geteuid().is_root()
}

/// Goes on as root: when we are not, replaces this process by itself under sudo, with `args`.
///
/// # Errors
/// When sudo cannot be started.
pub fn become_root(args: &[&str]) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let program = env::current_exe().context("path of this program")?;
    crate::ui::note("network namespaces and packages need root: asking sudo");
    let error = Command::new("sudo").arg("-E").arg(program).args(args).exec();
    Err(anyhow!(error).context("not root, and sudo cannot be started: run this as root"))
}
