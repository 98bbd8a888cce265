//! The system packages that building and testing need.

mod services;

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{cargo, root, ui};

/// Name of the package, and what it is for.
const PACKAGES: [(&str, &str); 28] = [
    ("gcc", "links"),
    ("libc6-dev", "links"),
    ("g++", "compiles libFuzzer"),
    ("pkg-config", "finds libmnl and libnftnl"),
    ("libmnl-dev", "netlink"),
    ("libnftnl-dev", "nftables over netlink"),
    ("nftables", "lists and loads rulesets in tests"),
    ("iproute2", "namespaces, links, ss, tc"),
    ("iputils-ping", "reachability"),
    ("ethtool", "offloads of links"),
    ("conntrack", "conntrack listings"),
    ("tcpdump", "what passes on a link at a handover"),
    ("procps", "sysctl, ps"),
    ("curl", "HTTP client"),
    ("wrk", "HTTP load"),
    ("nghttp2-client", "HTTP/2 load"),
    ("iperf3", "bulk traffic"),
    ("socat", "echo servers"),
    ("nginx", "HTTP server, and a peer in the benchmark"),
    ("libnginx-mod-stream", "a peer in the benchmark"),
    ("haproxy", "PROXY protocol, and a peer in the benchmark"),
    ("redis-server", "a real protocol with long connections"),
    ("postgresql", "a real protocol with long connections and much data"),
    ("python3", "small servers"),
    ("python3-websockets", "WebSocket, both ends"),
    ("python3-grpcio", "gRPC, both ends"),
    ("pebble", "an ACME CA, of Let's Encrypt, for tests"),
    ("openssl", "certificates, TLS client and server"),
];

#[derive(Debug, Args)]
pub struct Options {
    /// Only say what is missing; exit code 1 when something is
    #[arg(long)]
    check: bool,
}

/// Installs what is missing, and only that.
pub fn run(options: &Options) -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        ui::step("setup: all system packages are installed");
        return Ok(());
    }
    ui::step(&format!("setup: missing {}", missing.len()));
    for (name, purpose) in PACKAGES.iter().filter(|(name, _)| missing.contains(name)) {
        ui::note(&format!("{name:<22}{purpose}"));
    }
    ensure!(!options.check, "{} packages are missing: `cargo xtask setup` installs them", missing.len());
    if !root::is_root() {
        return install_through_sudo();
    }
    install(&missing)?;
    ui::note(
        "installed these packages and what they depend on; no service was started or enabled, nothing else changed",
    );
    Ok(())
}

/// For tasks that need the packages.
pub fn ensure_done() -> Result<()> {
    run(&Options { check: false })
}

fn missing() -> Result<Vec<&'static str>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(PACKAGES.map(|(name, _)| name))
        .stderr(Stdio::null())
        .output();
    let names = || PACKAGES.map(|(name, _)| name).join(" ");
    let output = output.with_context(|| {
        format!("no dpkg-query: setup knows Debian and Ubuntu only. Elsewhere install what corresponds to: {}; then pass --no-setup, or to demo and bench, after `cargo build`, --no-build", names())
    })?;
    let listing = String::from_utf8_lossy(&output.stdout);
    let installed: BTreeSet<&str> = listing.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(PACKAGES.map(|(name, _)| name).into_iter().filter(|name| !installed.contains(name)).collect())
}

/// A child, not a replacement of this process: the task that needs the packages goes on as the user.
fn install_through_sudo() -> Result<()> {
    let program = std::env::current_exe().context("path of this program")?;
    cargo::run("setup: asking sudo to install them", Command::new("sudo").arg(program).arg("setup"))
        .context("install them as root: apt-get install the packages above")
}

fn install(packages: &[&str]) -> Result<()> {
    let quiet = services::KeepQuiet::begin()?;
    let updated = !has_package_lists();
    if updated {
        update()?;
    }
    let mut outcome = apt_install(packages);
    if outcome.is_err() && !updated {
        // Old lists name versions that the mirrors no longer have.
        update()?;
        outcome = apt_install(packages);
    }
    outcome?;
    quiet.end(packages)
}

fn update() -> Result<()> {
    cargo::run("setup: apt-get update", Command::new("apt-get").args(["update", "-q"]))
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(["install", "-qy", "--no-install-recommends"]).args(packages);
    cargo::run("setup: apt-get install", command.env("DEBIAN_FRONTEND", "noninteractive"))
}

fn has_package_lists() -> bool {
    fs::read_dir("/var/lib/apt/lists")
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages")))
}
