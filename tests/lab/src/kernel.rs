//! What the kernel says about a host or a process.

use std::fs;

use anyhow::{Context, Result};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeVal,
};

use crate::{host::Host, process::run};

/// Whether this kernel is older than version `major.minor`: for what older ones cannot do.
pub fn older_than(major: u32, minor: u32) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) < (Some(major), Some(minor))
}

/// `nft list ruleset` in `host`.
pub fn nft_ruleset(host: &Host) -> Result<String> {
    run(host.command("nft").args(["list", "ruleset"]))
}

/// Loads an nft script in `host`, atomically.
pub fn nft_load(host: &Host, dir: &std::path::Path, script: &str) -> Result<()> {
    let file = tempfile::Builder::new().suffix(".nft").tempfile_in(dir).context("nft script file")?;
    fs::write(file.path(), script).context("write nft script")?;
    run(host.command("nft").arg("-f").arg(file.path())).map(drop).with_context(|| script.to_owned())
}

/// Entries in the conntrack table of `host`.
pub fn conntrack_count(host: &Host) -> Result<u64> {
    let text = host.sysctl("net.netfilter.nf_conntrack_count")?;
    text.parse().with_context(|| format!("nf_conntrack_count: {text:?}"))
}

/// Lines of `conntrack -L` in `host`; `filter` as in conntrack(8): `-p tcp --dport 80`. With bytes when accounting is on.
pub fn conntrack_list(host: &Host, filter: &str) -> Result<Vec<String>> {
    let listing = run(host.command("conntrack").arg("-L").args(filter.split_whitespace()))?;
    Ok(listing.lines().map(str::to_owned).collect())
}

/// Empties the conntrack table of `host`.
pub fn conntrack_flush(host: &Host) -> Result<()> {
    run(host.command("conntrack").arg("-F")).map(drop)
}

/// TCP sockets of `host` that are not listening, as `ss` counts them, in any of `states` (`established`, `time-wait`, …).
pub fn tcp_sockets(host: &Host, states: &[&str]) -> Result<usize> {
    let mut command = host.command("ss");
    command.args(["-Htan"]);
    for state in states {
        command.args(["state", state]);
    }
    Ok(run(&mut command)?.lines().count())
}

/// Bytes in the receive and send queues of all TCP sockets of `host`.
pub fn queued_bytes(host: &Host) -> Result<u64> {
    let listing = run(host.command("ss").args(["-Htn"]))?;
    // State, Recv-Q, Send-Q, addresses.
    let numbers =
        |line: &str| -> u64 { line.split_whitespace().skip(1).take(2).filter_map(|n| n.parse::<u64>().ok()).sum() };
    Ok(listing.lines().map(numbers).sum())
}

/// Bytes that one TCP socket of `host` may hold at most, to be received and to be sent (`tcp_rmem`, `tcp_wmem`).
pub fn socket_buffers(host: &Host) -> Result<u64> {
    let largest = |key: &str| -> Result<u64> {
        let three = host.sysctl(key)?;
        three.split_whitespace().last().and_then(|n| n.parse().ok()).with_context(|| format!("{key}: {three}"))
    };
    Ok(largest("net.ipv4.tcp_rmem")? + largest("net.ipv4.tcp_wmem")?)
}

/// Resident memory of a process in bytes (`VmRSS`).
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok())
        .with_context(|| format!("VmRSS of process {pid}"))?;
    Ok(kilobytes * 1024)
}

/// Open descriptors of a process.
pub fn open_descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("process {pid}"))?.count())
}

/// CPU seconds, user and system, a process has used, its finished threads included.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // The command name may hold spaces and parentheses; fields count from its last parenthesis.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    let (utime, stime) = ticks(11).zip(ticks(12)).with_context(|| format!("/proc/{pid}/stat: {stat:?}"))?;
    Ok((utime + stime) as f64 / TICKS_PER_SECOND)
}

/// Times that the threads of a process have gone to sleep.
pub fn sleeps(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        sum += line.context("voluntary_ctxt_switches")?.trim().parse::<u64>()?;
    }
    Ok(sum)
}

/// CPU seconds, user and system, this process has used, all its threads together.
pub fn own_cpu_seconds() -> Result<f64> {
    let used = getrusage(UsageWho::RUSAGE_SELF).context("getrusage(RUSAGE_SELF)")?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(used.user_time()) + seconds(used.system_time()))
}

/// CPU seconds all processors have been busy since boot, interrupts included.
pub fn busy_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    anyhow::ensure!(fields.len() >= 8, "/proc/stat: {stat:?}");
    // user nice system idle iowait irq softirq steal (guest time is in user already). proc_stat(5)
    let busy = fields[0] + fields[1] + fields[2] + fields[5] + fields[6];
    Ok(busy as f64 / TICKS_PER_SECOND)
}

/// USER_HZ: 100 on every Linux port but alpha.
const TICKS_PER_SECOND: f64 = 100.0;

/// Bytes the objects of a slab cache take, all namespaces together; needs root.
pub fn slab_bytes(cache: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/slabinfo").context("/proc/slabinfo")?;
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(cache));
    let fields: Vec<u64> = line
        .with_context(|| format!("no slab cache {cache}"))?
        .split_whitespace()
        .skip(1)
        .map_while(|field| field.parse().ok())
        .collect();
    anyhow::ensure!(fields.len() >= 3, "/proc/slabinfo: {cache}: {fields:?}");
    Ok(fields[0] * fields[2])
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holdings {
    pub sockets: usize,
    /// Ends of pipes.
    pub pipes: usize,
    /// Descriptors of everything else.
    pub others: usize,
    pub threads: usize,
    /// Resident memory in bytes.
    pub memory: u64,
}

/// What the process `pid` holds now.
pub fn holdings(pid: u32) -> Result<Holdings> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))?.count();
    let mut holdings = Holdings { sockets: 0, pipes: 0, others: 0, threads, memory: resident_bytes(pid)? };
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("process {pid}"))?;
    // One that is closed meanwhile is nothing.
    for target in descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()) {
        match target.to_string_lossy() {
            name if name.starts_with("socket:") => holdings.sockets += 1,
            name if name.starts_with("pipe:") => holdings.pipes += 1,
            _ => holdings.others += 1,
        }
    }
    Ok(holdings)
}
