//! `cargo xtask vm`: our tests on other kernels, those of Debian's packages, in a machine that qemu makes.

mod image;
mod machine;
mod packages;
mod results;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{cargo, root, ui};
use image::Image;
use machine::Accelerator;
use packages::{Kernel, Kernels};
use results::{Column, Outcome};

/// Test programs that say what this kernel can do for shunt.
const TESTS: [&str; 16] = [
    "ebpf_objects",
    "privileges",
    "handoff_life",
    "handoff_peers",
    "sockmap",
    "lab",
    "nft_encoding",
    "templates",
    "forwarding",
    "backends",
    "limits",
    "accounting",
    "conntrack",
    "survival",
    "stream_classify",
    "stream_ranges",
];
const DOCTOR: &str = "doctor";
const GUEST: &str = include_str!("../vm/guest.sh");
/// Packages that only this task needs.
const PACKAGES: [(&str, &str); 2] = [("qemu-system-x86", "qemu-system-x86_64"), ("kmod", "depmod")];
/// Software emulation on a busy machine boots in half a minute or so.
const BOOT: Duration = Duration::from_secs(300);

#[derive(Debug, Args)]
pub struct Options {
    /// A suite of Debian, or the beginning of a version: bookworm, 6.1; may be repeated. Default: the newest of each series
    /// that Debian has
    #[arg(long)]
    kernel: Vec<String>,
    /// A test program of tests/tests; may be repeated. Default: those that depend on the kernel most
    #[arg(long)]
    test: Vec<String>,
    /// Of each program only the tests whose name contains this; may be repeated
    #[arg(long)]
    only: Vec<String>,
    /// None of the tests whose name contains this; may be repeated
    #[arg(long)]
    skip: Vec<String>,
    /// Seconds that a check may take; software emulation is ten times slower than the processor
    #[arg(long, default_value_t = 1200)]
    limit: u64,
    /// A shell command to run there as well, after the tests; may be repeated. What it says is in `command-N.log`
    #[arg(long)]
    run: Vec<String>,
    /// Print what came out as JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Something to run in the machine.
#[derive(Debug)]
struct Check {
    name: String,
    folder: PathBuf,
    command: String,
}

/// Boots every kernel that is asked for, runs every check there, and prints a table of what came out.
pub fn run(options: &Options) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the machine is an x86-64 one");
    ensure_installed()?;
    let folder = cargo::workspace().join("target/vm");
    fs::create_dir_all(&folder)?;
    let debian = Kernels::new(folder.join("apt"))?;
    let kernels = debian.choose(&options.kernel)?;
    // Copies: what is built meanwhile, or another run, shall not change them under the machine.
    let programs = tempfile::Builder::new().prefix("programs-").tempdir_in(&folder)?;
    let checks = checks(options, programs.path())?;
    let busybox = folder.join("busybox");
    debian.unpack_busybox(&busybox)?;
    let (mut columns, mut accelerator) = (Vec::new(), None);
    for kernel in &kernels {
        ui::step(&format!("vm: Linux {} of {}", kernel.version, kernel.suite));
        let tree = folder.join(format!("linux-{}", kernel.version));
        debian.unpack(kernel, &tree)?;
        let outcomes = examine(kernel, &tree, &busybox, &folder, &checks, options.limit, &mut accelerator)?;
        let results = results_of(&folder, kernel);
        let (doctor, programs) = (results::doctor(&results), results::programs(&results));
        columns.push(Column { kernel: kernel.version.clone(), outcomes, doctor, programs });
    }
    let names: Vec<String> = checks.into_iter().map(|check| check.name).collect();
    let table = results::table(&names, &columns);
    if options.json {
        println!("{:#}", results::json(&names, &columns));
    } else {
        print!("{table}");
    }
    let file = folder.join("results.md");
    fs::write(&file, table)?;
    ui::note(&format!("written to {}; logs and consoles in {}/*/", file.display(), folder.display()));
    let bad = columns.iter().flat_map(|column| &column.outcomes).filter(|outcome| !outcome.passed()).count();
    ensure!(bad == 0, "{bad} checks did not pass");
    Ok(())
}

/// Where a kernel leaves what it has to say.
fn results_of(folder: &Path, kernel: &Kernel) -> PathBuf {
    folder.join(format!("on-{}", kernel.version))
}

/// Runs all checks on one kernel.
fn examine(
    kernel: &Kernel,
    tree: &Path,
    busybox: &Path,
    folder: &Path,
    checks: &[Check],
    limit: u64,
    accelerator: &mut Option<Accelerator>,
) -> Result<Vec<Outcome>> {
    let results = results_of(folder, kernel);
    let lock = fs::File::create(results.with_added_extension("lock"))?;
    lock.try_lock().with_context(|| format!("another run uses {}", results.display()))?;
    if results.exists() {
        fs::remove_dir_all(&results)?;
    }
    fs::create_dir_all(&results)?;
    let image = Image::make(tree, busybox, &results)?;
    fs::write(results.join("guest.sh"), GUEST)?;
    let line = |check: &Check| format!("{}\t{}\t{limit}\t{}\n", check.name, check.folder.display(), check.command);
    fs::write(results.join("checks"), checks.iter().map(line).collect::<String>())?;
    let within = BOOT + Duration::from_secs((limit + 10) * checks.len() as u64);
    let accelerator = match accelerator {
        Some(known) => *known,
        None => *accelerator.insert(machine::accelerator(&image, &results)?),
    };
    let patience = accelerator.patience();
    fs::write(
        results.join("settings"),
        format!("MODULES='{}'\nexport SHUNT_LAB_PATIENCE={patience}\n", image.modules.display()),
    )?;
    let mut progress = Progress::new(checks, &results);
    if let Err(error) = machine::run(&image, &results, accelerator, within, || progress.tell()) {
        crate::stop::check()?;
        ui::error(&error);
    }
    progress.tell();
    if progress.told < checks.len() {
        ui::note(&format!(
            "the machine ended before {}: {}/console.log",
            checks[progress.told].name,
            results.display()
        ));
    }
    Ok(checks.iter().map(|check| Outcome::read(&results, &check.name)).collect())
}

/// Says what has ended, as it ends.
struct Progress<'a> {
    checks: &'a [Check],
    results: &'a Path,
    since: Instant,
    booted: bool,
    told: usize,
}

impl<'a> Progress<'a> {
    fn new(checks: &'a [Check], results: &'a Path) -> Self {
        Self { checks, results, since: Instant::now(), booted: false, told: 0 }
    }

    fn tell(&mut self) {
        if !self.booted && self.results.join("uname").exists() {
            self.booted = true;
            ui::note(&format!("booted after {} s", self.since.elapsed().as_secs()));
            self.since = Instant::now();
        }
        while let Some(check) = self.checks.get(self.told) {
            let outcome = Outcome::read(self.results, &check.name);
            if outcome == Outcome::NotRun {
                return;
            }
            ui::note(&format!("{:<18}{:>5} s  {}", check.name, self.since.elapsed().as_secs(), outcome.cell()));
            self.since = Instant::now();
            self.told += 1;
        }
    }
}

/// Builds the daemon and the test programs, copies them to `programs`, and says how to run them.
fn checks(options: &Options, programs: &Path) -> Result<Vec<Check>> {
    let daemon = ["build", "--locked", "--package", "proxy-userspace", "--bin", "shunt"];
    cargo::run("build: the daemon", &mut cargo::command(&daemon))?;
    let wanted: Vec<&str> = match options.test.as_slice() {
        [] => TESTS.to_vec(),
        tests => tests.iter().map(String::as_str).collect(),
    };
    ui::step("build: the test programs");
    let mut build = cargo::command(&["test", "--locked", "--package", "shunt-tests", "--no-run"]);
    build.args(["--message-format", "json-render-diagnostics"]);
    build.args(wanted.iter().flat_map(|name| ["--test", name]));
    let built = cargo::output(&mut build)?;
    let copy = |from: &Path, name: &str| -> Result<String> {
        let to = programs.join(name);
        fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
        Ok(format!("{to:?}"))
    };
    // Beside the test programs, which look for it there.
    let shunt = copy(&cargo::daemon_debug(), "shunt")?;
    let mut checks =
        vec![Check { name: DOCTOR.to_owned(), folder: cargo::workspace(), command: format!("{shunt} doctor --json") }];
    for wanted in wanted {
        let named = built.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut named =
            named.filter(|message| message["target"]["name"] == *wanted && message["executable"].is_string());
        let message = named.next().with_context(|| format!("cargo built no test {wanted}"))?;
        let program = copy(Path::new(message["executable"].as_str().unwrap_or_default()), wanted)?;
        // One at a time: emulated processors are slow, and the tests have deadlines.
        let skipped: String = options.skip.iter().map(|name| format!(" --skip {name}")).collect();
        let command = format!("{program} --test-threads 1 --show-output{skipped} {}", options.only.join(" "));
        checks.push(Check { name: wanted.to_owned(), folder: cargo::workspace().join("tests"), command });
    }
    for (n, command) in options.run.iter().enumerate() {
        checks.push(Check {
            name: format!("command-{}", n + 1),
            folder: cargo::workspace(),
            command: format!("export PATH={}:$PATH; {command}", programs.display()),
        });
    }
    Ok(checks)
}

fn ensure_installed() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |program: &str| std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, program)| !has(program)).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let command = ["apt-get", "install", "-qy", "--no-install-recommends"];
    let mut install = if root::is_root() { Command::new("env") } else { Command::new("sudo") };
    install.args(["DEBIAN_FRONTEND=noninteractive"]).args(command).args(&missing);
    cargo::run(&format!("setup: apt-get install {}", missing.join(" ")), &mut install)
}
