//! Tests, and everything else a change must pass.

use std::{env, process::Command, time::Instant};

use anyhow::{Result, anyhow};
use clap::Args;

use crate::{cargo, ebpf, fuzz, root, setup, ui};

/// Tests on the real kernel share its two or more cores with the servers they start and have deadlines.
const TEST_THREADS: &str = "2";

#[derive(Debug, Args)]
pub struct TestOptions {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Only this package (shunt-tests: the scenarios on the real kernel)
    #[arg(short, long)]
    package: Option<String>,
    /// Do not look for missing system packages
    #[arg(long)]
    no_setup: bool,
    /// Passed on to the test programs, after `--`
    #[arg(last = true)]
    args: Vec<String>,
}

#[derive(Debug, Args)]
pub struct CiOptions {
    /// Do not look for missing system packages
    #[arg(long)]
    no_setup: bool,
    /// Do not build the eBPF objects again to compare them: for machines without Debian's packages
    #[arg(long)]
    no_ebpf: bool,
}

/// setup, build, test. The test programs run as root.
pub fn test(options: &TestOptions) -> Result<()> {
    root::within_reach()?;
    if !options.no_setup {
        setup::ensure_done()?;
    }
    // The scenarios run the daemon's binary, which a test of one package would not build.
    cargo::run("build: workspace", &mut cargo::command(&["build", "--workspace", "--locked"]))?;
    let mut command = cargo::command(&["test", "--locked"]);
    match &options.package {
        Some(package) => command.args(["--package", package]),
        None => command.arg("--workspace"),
    };
    command.args(options.filter.as_deref());
    command.arg("--").args(&options.args);
    limit_threads(&mut command);
    cargo::run_programs_as_root(&mut command)?;
    let begin = Instant::now();
    cargo::run("test: everything, on this kernel", &mut command)?;
    ui::note(&format!("tests passed in {:.0} s", begin.elapsed().as_secs_f64()));
    Ok(())
}

/// Cheapest first, so that a slip is seen early.
pub fn ci(options: &CiOptions) -> Result<()> {
    root::within_reach()?;
    if !options.no_setup {
        setup::ensure_done()?;
    }
    cargo::run("fmt: is it formatted?", &mut cargo::command(&["fmt", "--all", "--check"]))?;
    let fuzz_targets = ["fmt", "--manifest-path", "tests/fuzz/Cargo.toml", "--check"];
    cargo::run("fmt: fuzz targets too?", &mut cargo::command(&fuzz_targets))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    cargo::run("clippy: no warnings", &mut cargo::command(&clippy))?;
    if !options.no_ebpf {
        objects()?;
    }
    test(&TestOptions { filter: None, package: None, no_setup: true, args: Vec::new() })?;
    fuzz::smoke()?;
    let mut docs = cargo::command(&["doc", "--workspace", "--no-deps", "--document-private-items", "--locked"]);
    cargo::run("doc: no broken links", docs.env("RUSTDOCFLAGS", "-D warnings"))?;
    ui::step("ci: all passed");
    Ok(())
}

/// Whether the committed eBPF objects are what their sources compile to. Not to know it is not to pass.
fn objects() -> Result<()> {
    ui::step("ebpf: are the objects what their sources compile to?");
    let begin = Instant::now();
    ebpf::check().map_err(|error| match error.is::<ebpf::Unavailable>() {
        true => anyhow!("{error:#}. `cargo xtask ci --no-ebpf` leaves this check out"),
        false => error,
    })?;
    ui::note(&format!("the same bytes; {:.0} s", begin.elapsed().as_secs_f64()));
    Ok(())
}

fn limit_threads(command: &mut Command) {
    if env::var_os("RUST_TEST_THREADS").is_none() {
        command.env("RUST_TEST_THREADS", TEST_THREADS);
    }
}
