//! Building is for the user, network namespaces are for root.

use std::{
    env,
    os::unix::{fs::chown, process::CommandExt},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, anyhow};
use nix::unistd::geteuid;

/// The option that `demo` and `bench` share.
const NO_BUILD: &str = "--no-build";

pub fn is_root() -> bool {
    geteuid().is_root()
}

/// Whether programs can be started as root at all: nobody shall learn that after a build of minutes.
///
/// # Errors
/// When we are not root and there is no sudo.
pub fn within_reach() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let sudo = Command::new("sudo").arg("--version").output();
    sudo.map(drop).context("network namespaces need root, and there is no sudo: run this as root")
}

/// Goes on as root: when we are not, replaces this process by itself under sudo, with its own arguments and `--no-build`,
/// for what was to be built has been, by the user.
///
/// # Errors
/// When sudo cannot be started.
pub fn become_root() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let program = env::current_exe().context("path of this program")?;
    crate::ui::note("network namespaces need root: asking sudo");
    let given = env::args_os().skip(1).filter(|arg| arg != NO_BUILD);
    let error = Command::new("sudo").arg("-E").arg(program).args(given).arg(NO_BUILD).exec();
    Err(anyhow!(error).context("not root, and sudo cannot be started: run this as root"))
}

/// Under sudo, gives a file we made to the user who called.
pub fn give_back(path: &Path) -> Result<()> {
    let id = |name: &str| env::var(name).ok().and_then(|text| text.parse().ok());
    if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
        chown(path, Some(user), Some(group)).with_context(|| format!("chown {}", path.display()))?;
    }
    Ok(())
}
