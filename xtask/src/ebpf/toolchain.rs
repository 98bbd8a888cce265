//! The compiler, linker and `strip` for the BPF target, from nothing and without root.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{bare_cargo, run};
use crate::{apt::Apt, cargo::output, ui};

/// Whatever Debian this is: these are of bookworm.
const SUITES: [(&str, &str); 2] = [("debian", "bookworm"), ("debian-security", "bookworm-security")];
/// Debian's compiler with a prebuilt `core` for the BPF target, and the LLVM it links: one compiler, one object.
const RUST_VERSION: &str = "1.96.0+dfsg1-1~deb12u2";
const RUST_PACKAGES: [&str; 4] =
    ["rustc-web", "libstd-rust-web-1.96", "libstd-rust-web-dev", "libstd-rust-web-dev-bpf"];
const LLVM_VERSION: &str = "1:22.1.8-1~deb12u1";
const LLVM_PACKAGES: [&str; 2] = ["libllvm22", "llvm-22"];
/// What libLLVM links and a small system may lack: any version of the suite will do.
const LIBRARIES: [&str; 6] = ["libz3-4", "libedit2", "libxml2", "libicu72", "libbsd0", "libmd0"];
const LINKER_VERSION: &str = "0.10.4";
const LINKER_FEATURES: &str = "rust-llvm-22";

/// The toolchain cannot be had on this machine. Not a failure of the sources.
#[derive(Debug)]
pub struct Unavailable(String);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the pinned eBPF toolchain cannot be had here (docs/ebpf.md): {}", self.0)
    }
}

impl std::error::Error for Unavailable {}

/// The toolchain that the committed object is made with.
pub struct Pinned {
    rust: PathBuf,
    linker: PathBuf,
}

impl Pinned {
    /// Finds the toolchain in `.toolchain`, or downloads it there.
    ///
    /// # Errors
    /// [`Unavailable`] when a part of it cannot be downloaded, built or started.
    pub fn install(root: &Path) -> Result<Self> {
        if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
            return Err(Unavailable("it is pinned for x86-64 Linux".to_owned()).into());
        }
        let folder = root.join(".toolchain");
        // Versions in the names: a changed pin is a new folder, not a mixture.
        let toolchain = Self {
            rust: folder.join(format!("rust-{RUST_VERSION}-llvm-{}", LLVM_VERSION.replace(':', "_"))),
            linker: folder.join(format!("bpf-linker-{LINKER_VERSION}")),
        };
        fs::create_dir_all(&folder).context("make .toolchain")?;
        if !toolchain.rust.exists() {
            ui::note(&format!("fetch Debian's rustc-web {RUST_VERSION} and LLVM {LLVM_VERSION} into .toolchain, once"));
            install_packages(&folder, &toolchain.rust).map_err(unavailable)?;
        }
        output(toolchain.environment(&mut Command::new(toolchain.rustc()))?.arg("--version")).map_err(unavailable)?;
        if !toolchain.linker().exists() {
            install_linker(root, &toolchain.linker).map_err(unavailable)?;
        }
        output(toolchain.environment(&mut Command::new(toolchain.linker()))?.arg("--version")).map_err(unavailable)?;
        Ok(toolchain)
    }

    pub fn folder(&self) -> &Path {
        &self.rust
    }

    fn linker(&self) -> PathBuf {
        self.linker.join("bin/bpf-linker")
    }

    /// A tool of LLVM, without the caller's environment.
    pub fn llvm(&self, tool: &str) -> Command {
        let mut command = Command::new(self.rust.join("usr/lib/llvm-22/bin").join(tool));
        command.env_clear().env("LD_LIBRARY_PATH", self.libraries());
        command
    }

    fn libraries(&self) -> PathBuf {
        self.rust.join("usr/lib/x86_64-linux-gnu")
    }

    fn rustc(&self) -> PathBuf {
        self.rust.join("usr/bin/rustc")
    }

    /// Makes a command use this compiler and linker and their libraries. The BPF target is unstable: hence
    /// `RUSTC_BOOTSTRAP`.
    pub fn environment<'a>(&self, command: &'a mut Command) -> Result<&'a mut Command> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([self.linker.join("bin")].into_iter().chain(std::env::split_paths(&path)))
            .context("a folder whose name has a colon")?;
        Ok(command
            .env("RUSTC", self.rustc())
            .env("RUSTC_BOOTSTRAP", "1")
            .env("PATH", path)
            .env("LD_LIBRARY_PATH", self.libraries()))
    }
}

/// rustup's nightly with the sources of `core`, and a bpf-linker in `PATH`: the usual way of aya.
pub struct Nightly {
    pub linker: PathBuf,
}

impl Nightly {
    pub fn find() -> Option<Self> {
        let sysroot = output(Command::new("rustc").args(["+nightly", "--print", "sysroot"])).ok()?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
        let path = std::env::var_os("PATH")?;
        let linker =
            std::env::split_paths(&path).map(|folder| folder.join("bpf-linker")).find(|file| file.is_file())?;
        core.exists().then_some(Self { linker })
    }
}

fn unavailable(error: anyhow::Error) -> anyhow::Error {
    Unavailable(format!("{error:#}")).into()
}

/// Fetches Debian's packages into `to`. apt checks their signatures.
fn install_packages(folder: &Path, to: &Path) -> Result<()> {
    let rust = RUST_PACKAGES.iter().map(|name| format!("{name}={RUST_VERSION}"));
    let llvm = LLVM_PACKAGES.iter().map(|name| format!("{name}={LLVM_VERSION}"));
    let packages: Vec<String> = rust.chain(llvm).chain(LIBRARIES.map(str::to_owned)).collect();
    let apt = Apt::new(folder.join("apt"), &SUITES)?;
    apt.unpack(&packages, to).context("can Debian's mirror be reached, and has it these versions still?")
}

/// bpf-linker compiles with the machine's own compiler; it finds libLLVM when it runs.
fn install_linker(root: &Path, to: &Path) -> Result<()> {
    ui::note(&format!("build bpf-linker {LINKER_VERSION}"));
    run(bare_cargo(root)
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"])
        .args(["--no-default-features", "--features", LINKER_FEATURES, "--no-track", "--root"])
        .arg(to))
}
