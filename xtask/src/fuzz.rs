//! Coverage-guided fuzzing of everything that reads what strangers send.
//!
//! libFuzzer with the compiler that builds the rest: coverage comes from LLVM's own pass, which the stable rustc can run.
//! No sanitizer is needed, as there is no unsafe code in `proxy-core`; panics, overflows and endless loops end a run.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::{Args, builder::PossibleValuesParser};

use crate::{cargo, setup, stop, ui};

/// A program `tests/fuzz/src/<name>.rs` (and `[[bin]]` in the `Cargo.toml` there), with seeds in
/// `tests/fuzz/corpus/<name>/`.
struct Target {
    name: &'static str,
    /// The longest input that makes sense, in bytes.
    longest: usize,
    /// Its input is text: the words of the seeds are tried everywhere.
    text: bool,
}

const TARGETS: [Target; 4] = [
    Target { name: "hello", longest: 17_000, text: false },
    Target { name: "proxy", longest: 4_200, text: false },
    Target { name: "config", longest: 8_192, text: true },
    Target { name: "session", longest: 400, text: false },
];

/// `-C` options: coverage of edges, counted in line, and what is compared with what.
const COVERAGE: [&str; 5] = [
    "passes=sancov-module",
    "llvm-args=-sanitizer-coverage-level=4",
    "llvm-args=-sanitizer-coverage-inline-8bit-counters",
    "llvm-args=-sanitizer-coverage-pc-table",
    "llvm-args=-sanitizer-coverage-trace-compares",
];
/// Seconds for all targets together when fuzzing is one check among many.
const SMOKE: u64 = 60;
/// Of one input. Machines that run checks are slow now and then.
const TIMEOUT_SECONDS: u64 = 25;
const MEMORY_MIB: u64 = 1024;
const REPORT_EVERY: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
pub struct Options {
    /// How long each target runs
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only this target
    #[arg(long, value_parser = PossibleValuesParser::new(TARGETS.map(|target| target.name)))]
    only: Option<String>,
    /// Do not look for missing system packages
    #[arg(long)]
    no_setup: bool,
}

/// Runs the targets one after the other; what they learn stays in `target/fuzz/corpus`.
///
/// # Errors
/// With the reproducer's path when an input broke a promise.
pub fn run(options: &Options) -> Result<()> {
    if !options.no_setup {
        setup::ensure_done()?;
    }
    let programs = build()?;
    let wanted = |target: &&Target| options.only.as_ref().is_none_or(|only| only == target.name);
    for target in TARGETS.iter().filter(wanted) {
        ui::step(&format!("fuzz: {} for {} s", target.name, options.seconds));
        fuzz(target, &programs.join(target.name), options.seconds)?;
    }
    Ok(())
}

/// A minute for all targets: finds what is broken, not what is rare.
pub fn smoke() -> Result<()> {
    run(&Options { seconds: SMOKE / TARGETS.len() as u64, only: None, no_setup: true })
}

/// The folder of the programs.
fn build() -> Result<PathBuf> {
    let host = cargo::host()?;
    let folder = home();
    // With a target named, the flags are not for build scripts and macros.
    let mut command = cargo::command(&["build", "--release", "--locked", "--manifest-path", "tests/fuzz/Cargo.toml"]);
    command.args(["--target", &host]).arg("--target-dir").arg(&folder);
    let flags = COVERAGE.map(|option| format!("-C{option}")).join(" ");
    command.env("RUSTFLAGS", format!("--cfg fuzzing {flags}"));
    cargo::run("build: fuzz targets", &mut command)?;
    Ok(folder.join(host).join("release"))
}

/// Everything that fuzzing leaves behind.
fn home() -> PathBuf {
    cargo::workspace().join("target/fuzz")
}

fn fuzz(target: &Target, program: &Path, seconds: u64) -> Result<()> {
    let seeds = cargo::workspace().join("tests/fuzz/corpus").join(target.name);
    let learned = home().join("corpus").join(target.name);
    let artifacts = home().join("artifacts").join(target.name);
    for folder in [&learned, &artifacts] {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let log = home().join(format!("{}.log", target.name));
    let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
    let mut command = Command::new(program);
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={}", target.longest))
        .arg(format!("-timeout={TIMEOUT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .env("RUST_BACKTRACE", "0");
    if target.text {
        command.arg(format!("-dict={}", dictionary(target, &seeds)?.display()));
    }
    command.args([&learned, &seeds]).stdout(output.try_clone()?).stderr(output);
    let before = reproducers(&artifacts);
    let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
    let status = follow(child, target, &log)?;
    stop::check()?;
    if status.success() {
        return Ok(());
    }
    let found = reproducers(&artifacts).difference(&before).next().cloned();
    let found = found.map_or_else(|| "none was written".to_owned(), |path| path.display().to_string());
    bail!(
        "fuzz {}: an input broke a promise ({status})\n{}\nreproducer: {found}\nagain: {} {found}",
        target.name,
        end_of(&log),
        program.display()
    )
}

/// Until it ends, saying now and then how far it is.
fn follow(mut child: Child, target: &Target, log: &Path) -> Result<ExitStatus> {
    let begin = Instant::now();
    let mut said = begin;
    loop {
        if let Some(status) = child.try_wait().context("wait for the fuzz target")? {
            report(target, log, begin);
            return Ok(status);
        }
        if stop::asked() {
            child.kill().context("stop the fuzz target")?;
        }
        if said.elapsed() >= REPORT_EVERY {
            report(target, log, begin);
            said = Instant::now();
        }
        thread::sleep(Duration::from_millis(200));
    }
}

fn report(target: &Target, log: &Path, begin: Instant) {
    if let Some(figures) = figures(&read(log)) {
        ui::note(&format!("{}: {:.0} s, {figures}", target.name, begin.elapsed().as_secs_f64()));
    }
}

/// Of the last line that has some: `#58172 DONE cov: 5374 ft: 17395 corp: 1606/3607Kb … exec/s: 4474 rss: 40Mb`.
fn figures(log: &str) -> Option<String> {
    let words: Vec<&str> = log.lines().rev().find(|line| is_figures(line))?.split_whitespace().collect();
    let after = |name: &str| words.iter().skip_while(|word| **word != name).nth(1).copied().unwrap_or("?");
    let runs = words.first()?.trim_start_matches('#');
    Some(format!("{runs} runs, {} edges, {} runs/s", after("cov:"), after("exec/s:")))
}

fn is_figures(line: &str) -> bool {
    line.strip_prefix('#').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn reproducers(folder: &Path) -> BTreeSet<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// What the target said last, without figures and without the input itself, which is in the reproducer.
fn end_of(log: &Path) -> String {
    let text = read(log);
    let lines = text.lines().filter(|line| !is_figures(line) && !line.starts_with(['\t', '=']));
    let lines: Vec<&str> = lines.map(|line| line.get(..300).unwrap_or(line)).collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

fn read(log: &Path) -> String {
    String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned()
}

/// The words of the seeds, so that keys need not be guessed letter by letter.
fn dictionary(target: &Target, seeds: &Path) -> Result<PathBuf> {
    let mut words = BTreeSet::new();
    for seed in reproducers(seeds) {
        let text = fs::read_to_string(&seed).with_context(|| format!("read {}", seed.display()))?;
        let text: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let is_word = |c: char| c.is_ascii_alphanumeric() || "_-.:/*".contains(c);
        words.extend(text.join("\n").split(|c| !is_word(c)).filter(|word| word.len() > 1).map(str::to_owned));
    }
    let path = home().join(format!("{}.dict", target.name));
    let text: String = words.iter().map(|word| format!("\"{word}\"\n")).collect();
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_figures_are_told_whatever_is_said_after_them() {
        let log = "INFO: Seed: 1\n#3\tINITED cov: 10 ft: 20 corp: 3/9Kb exec/s: 0 rss: 29Mb\n\
                   #99\tDONE   cov: 12 ft: 30 corp: 4/10Kb lim: 4218 exec/s: 33 rss: 40Mb\n\
                   ###### Recommended dictionary. ######\nDone 99 runs in 3 second(s)\n";
        assert_eq!(figures(log).as_deref(), Some("99 runs, 12 edges, 33 runs/s"));
        assert_eq!(figures("INFO: Seed: 1\n"), None);
    }
}
