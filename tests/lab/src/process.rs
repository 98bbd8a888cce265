//! Child processes that never outlive their guard.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use crate::wait::wait_for;

/// Runs a command to its end; its stdout.
///
/// # Errors
/// With the command line and stderr when it cannot start or exits non-zero.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A running program. Its whole process group is killed on drop; what it wrote is shown when a test panics.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Running {
    /// Starts `command`, which leads a process group of its own (as [`crate::Host::command`] makes it), with stdout and
    /// stderr going to one file in `dir`.
    pub fn start(name: &str, mut command: Command, dir: &Path) -> Result<Self> {
        let (log, file) = new_log(name, dir)?;
        command.stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("start {name}: {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, log, ended: None })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it wrote so far, stdout and stderr in order.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// The exit status, once it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    /// Sends a signal to the program itself, not to its group.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.leader(), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        wait_for(&format!("{name} ends"), within, || self.ended()).with_context(|| self.log())
    }

    /// SIGTERM, then waits.
    pub fn terminate(&mut self, within: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(within)
    }

    /// SIGKILL to the program and everything it started; returns when the program is gone.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            // The group may already be gone; then there is nothing left to kill.
            let _ = killpg(self.leader(), Signal::SIGKILL);
            self.ended = self.child.wait().ok();
        }
    }

    /// Waits until `ready` holds, and fails at once, with the log, when the program ends before.
    pub fn wait_ready(&mut self, within: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let name = self.name.clone();
        let outcome = wait_for(&format!("{name} is ready"), within, || match self.ended() {
            Some(status) => Some(Err(status)),
            None => ready().then_some(Ok(())),
        });
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("{name} ended early, {status}:\n{}", self.log()),
            Err(error) => Err(error.context(self.log())),
        }
    }

    fn leader(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("--- {} ({}) wrote:\n{}---", self.name, self.child.id(), self.log());
        }
    }
}

/// `nginx.log`, `nginx-2.log`, …: a restarted program keeps the log of its former life.
fn new_log(name: &str, dir: &Path) -> Result<(PathBuf, File)> {
    let mut n = 1;
    loop {
        let path = dir.join(if n == 1 { format!("{name}.log") } else { format!("{name}-{n}.log") });
        match File::options().append(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => n += 1,
            Err(error) => return Err(error).with_context(|| format!("create {}", path.display())),
        }
    }
}
