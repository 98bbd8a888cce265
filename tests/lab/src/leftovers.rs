//! What killed runs left behind.

use std::{
    env, fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Once,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

pub(crate) const PREFIX: &str = "shunt-";
const NETNS: &str = "/run/netns";

/// Removes the namespaces of labs whose process is gone, with the processes in them and their scratch folders. Once per
/// process.
pub(crate) fn remove_once() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let dead: Vec<String> = namespaces().into_iter().filter(|name| owner_is_gone(name)).collect();
        for name in &dead {
            end_processes_in(name);
        }
        // Two runs that start at once find the same leftovers; the slower one has nothing to remove.
        for name in &dead {
            let _ = remove(std::slice::from_ref(name));
        }
        for folder in scratch_folders().filter(|name| owner_is_gone(name)) {
            let _ = fs::remove_dir_all(env::temp_dir().join(folder));
        }
    });
}

/// Names of all namespaces of all labs.
fn namespaces() -> Vec<String> {
    named_by_labs(Path::new(NETNS)).collect()
}

/// Names of the scratch folders of all labs, which begin as their namespaces do.
fn scratch_folders() -> impl Iterator<Item = String> {
    named_by_labs(&env::temp_dir())
}

fn named_by_labs(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let names = fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| owner(name).is_some())
}

/// Removes namespaces by name, all in one call of `ip`.
pub(crate) fn remove(names: &[String]) -> Result<()> {
    ip_batch(None, &names.iter().map(|name| format!("netns delete {name}\n")).collect::<String>())
}

/// Runs a batch of `ip` commands, in a namespace or in the initial one.
pub(crate) fn ip_batch(netns: Option<&str>, lines: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start ip (package iproute2)")?;
    // Dropped at the end of the statement: ip sees the end of its input.
    child.stdin.take().context("stdin of ip")?.write_all(lines.as_bytes()).context("write to ip")?;
    let output = child.wait_with_output().context("wait for ip")?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip -batch in {}: {}\n{lines}", netns.unwrap_or("init"), message.trim());
    Ok(())
}

/// The pid in `shunt-<pid>-<n>-<host>`.
fn owner(name: &str) -> Option<i32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

fn owner_is_gone(name: &str) -> bool {
    owner(name).is_some_and(|pid| kill(Pid::from_raw(pid), None) == Err(nix::errno::Errno::ESRCH))
}

/// Kills, one by one and by pid, the processes whose network namespace is `name`.
fn end_processes_in(name: &str) {
    let Ok(namespace) = fs::metadata(Path::new(NETNS).join(name)) else { return };
    let Ok(processes) = fs::read_dir("/proc") else { return };
    for pid in processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok()) {
        let netns = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let is_inside = fs::metadata(netns).is_ok_and(|m| (m.dev(), m.ino()) == (namespace.dev(), namespace.ino()));
        if is_inside {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_the_lab_carries_its_pid_and_others_do_not() {
        assert_eq!(owner("shunt-4711-0-gateway"), Some(4711));
        assert_eq!(owner("shunt-test"), None);
        assert_eq!(owner("other-4711-0-gateway"), None);
    }

    #[test]
    fn the_namespaces_of_a_living_process_are_kept() {
        assert!(!owner_is_gone(&format!("{PREFIX}{}-0-client", std::process::id())));
    }
}
