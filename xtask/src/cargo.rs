//! Calls of cargo and of other programs.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{root, stop, ui};

/// Top folder of the repository.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// A cargo command in the workspace: the cargo that runs us.
pub fn command(args: &[&str]) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.args(args).current_dir(workspace());
    command
}

/// Says and runs a command to its end, its output going to the terminal.
///
/// # Errors
/// With `what` when it fails, or when somebody asked to stop meanwhile.
pub fn run(what: &str, command: &mut Command) -> Result<()> {
    stop::check()?;
    ui::step(what);
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    stop::check()?;
    ensure!(status.success(), "{what}: failed ({status}); the command was {command:?}");
    Ok(())
}

/// What the command prints; its standard error is in the error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {:?}", command.get_program()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed: {}: {}", output.status, said.trim());
    }
    String::from_utf8(output.stdout).context("output is not UTF-8")
}

/// Lets programs that cargo starts (tests, benches) run as root while cargo itself does not, so that nothing in the
/// target folder ends up owned by root.
pub fn run_programs_as_root(command: &mut Command) -> Result<()> {
    if root::is_root() {
        return Ok(());
    }
    let variable = format!("CARGO_TARGET_{}_RUNNER", host()?.replace('-', "_").to_uppercase());
    command.env(variable, "sudo -E");
    Ok(())
}

/// The platform that programs are built for when nothing else is asked for.
pub fn host() -> Result<String> {
    let version = Command::new("rustc").arg("-vV").output().context("start rustc")?;
    let version = String::from_utf8_lossy(&version.stdout);
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("host in `rustc -vV`")
}

/// Builds the daemon with optimisation, as it is deployed.
pub fn build_daemon_release() -> Result<()> {
    let args = ["build", "--release", "--locked", "--package", "proxy-userspace", "--bin", "shunt"];
    run("build: the daemon, release", &mut command(&args))
}

/// Where [`build_daemon_release`] puts it.
pub fn daemon_release() -> PathBuf {
    target().join("release/shunt")
}

/// Where a build of the daemon without optimisation puts it.
pub fn daemon_debug() -> PathBuf {
    target().join("debug/shunt")
}

/// The folder that holds the one this program was built into.
fn target() -> PathBuf {
    let program = env::current_exe().unwrap_or_default();
    program.ancestors().nth(2).unwrap_or(Path::new("target")).to_owned()
}
