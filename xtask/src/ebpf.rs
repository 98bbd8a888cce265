//! `cargo xtask ebpf build | check`: from `proxy-ebpf/` to the committed `objects/*.bpf.o`, byte for byte the same
//! everywhere.

mod toolchain;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

pub use toolchain::Unavailable;
use toolchain::{Nightly, Pinned};

use crate::{cargo, ui};

/// Exit code of `check` and `build` where the toolchain cannot be had: neither passed nor failed. The number is the one
/// that test harnesses of the GNU kind take for "skipped".
pub const EXIT_UNAVAILABLE: u8 = 77;

const TARGET: &str = "bpfel-unknown-none";
/// One object for each folder in here.
const PROGRAMS: &str = "proxy-ebpf/src/bin";
const OBJECTS: &str = "proxy-ebpf/objects";
/// For the oldest instruction set. Not `--bpf-expand-memcpy-in-order`: with it, filling memory with zeros is a call of `memset`, which no
/// kernel has.
const LLC_ARGUMENTS: [&str; 3] = ["-O3", "-mcpu=generic", "-filetype=obj"];
/// What `sha256sum` prints of them; `sha256sum --check` in the folder reads it.
const CHECKSUMS: &str = "proxy-ebpf/objects/SHA256SUMS";

/// Compiles the eBPF programs and replaces the committed objects and their checksums.
///
/// Where the pinned toolchain cannot be had but rustup's nightly with `rust-src` can, the objects are compiled with that and
/// left in `proxy-ebpf/target`: their bytes cannot be compared, so they do not replace the committed ones.
///
/// # Errors
/// [`Unavailable`] where there is no toolchain at all (see [`EXIT_UNAVAILABLE`]); else what the compiler said.
pub fn build() -> Result<()> {
    let root = root()?;
    let pinned = match Pinned::install(&root) {
        Ok(pinned) => pinned,
        Err(error) => return build_with_nightly(&root, error),
    };
    for (name, built) in compile(&root, &pinned)? {
        let committed = root.join(OBJECTS).join(&name);
        fs::copy(&built, &committed).with_context(|| format!("replace {}", committed.display()))?;
    }
    let sums = checksums(&root)?;
    fs::write(root.join(CHECKSUMS), &sums).with_context(|| format!("write {CHECKSUMS}"))?;
    print!("{sums}");
    Ok(())
}

/// Compiles the eBPF programs and compares the results with the committed objects.
///
/// # Errors
/// [`Unavailable`] where the pinned toolchain cannot be had (see [`EXIT_UNAVAILABLE`]); else which bytes differ from which.
pub fn check() -> Result<()> {
    let root = root()?;
    let stated = fs::read_to_string(root.join(CHECKSUMS)).with_context(|| format!("read {CHECKSUMS}"))?;
    ensure!(
        stated == checksums(&root)?,
        "the files in {OBJECTS} are not those that {CHECKSUMS} states: run `cargo xtask ebpf build`"
    );
    for (name, built) in compile(&root, &Pinned::install(&root)?)? {
        let (committed, built) = (sha256(&root.join(OBJECTS).join(&name))?, sha256(&built)?);
        ensure!(
            built == committed,
            "{OBJECTS}/{name} is not what its sources compile to (committed {committed}, built {built}): \
             run `cargo xtask ebpf build`"
        );
        ui::note(&format!("{name}: same bytes from its sources, {built}"));
    }
    Ok(())
}

/// The programs' names, in order.
fn programs(root: &Path) -> Result<Vec<String>> {
    let listed = fs::read_dir(root.join(PROGRAMS)).with_context(|| format!("list {PROGRAMS}"))?;
    let mut names = Vec::new();
    for folder in listed {
        names.push(folder?.file_name().into_string().ok().context("a program whose name is not UTF-8")?);
    }
    names.sort();
    Ok(names)
}

/// What `SHA256SUMS` has to say of the committed objects.
fn checksums(root: &Path) -> Result<String> {
    let mut sums = String::new();
    for name in programs(root)? {
        let name = format!("{name}.bpf.o");
        let digest = sha256(&root.join(OBJECTS).join(&name))?;
        sums.push_str(&format!("{digest}  {name}\n"));
    }
    Ok(sums)
}

/// Compiles, links and strips every object; returns its file name and where it is.
fn compile(root: &Path, pinned: &Pinned) -> Result<Vec<(String, PathBuf)>> {
    // The folders of downloaded crates are in debug information; they exist once the crates are fetched.
    run(bare_cargo(root).args(["fetch", "--locked"]))?;
    // The linker by its name: cargo hashes every flag but `--remap-path-prefix` into the names of the crates.
    let mut flags: Vec<OsString> =
        ["-Cdebuginfo=2", "-Clink-arg=--btf", "-Clink-arg=--emit=llvm-bc", "-Clinker=bpf-linker"]
            .map(OsString::from)
            .to_vec();
    for (from, to) in remapped(root, pinned)? {
        flags.push(concat(&[b"--remap-path-prefix=", from.as_os_str().as_encoded_bytes(), b"=", to.as_bytes()])?);
    }
    run(pinned
        .environment(&mut bare_cargo(root))?
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(OsString::from("\x1f").as_os_str()))
        .args(["build", "--release", "--locked", "--target", TARGET]))?;
    let folder = root.join("proxy-ebpf/target").join(TARGET).join("release");
    // LLVM orders the types of BTF by the addresses of its nodes, and those move with the length of every path that the
    // process is given. So the linker stops at bitcode, and code is generated from names that are the same everywhere.
    let mut objects = Vec::new();
    for program in programs(root)? {
        let (whole, stripped) = (format!("{program}.o"), format!("{program}.bpf.o"));
        run(pinned.llvm("llc").current_dir(&folder).args(LLC_ARGUMENTS).args(["-o", &whole, &program]))?;
        let strip = ["--strip-debug", "-o", &stripped, &whole];
        run(pinned.llvm("llvm-strip").current_dir(&folder).args(strip))?;
        let path = folder.join(&stripped);
        objects.push((stripped, path));
    }
    Ok(objects)
}

/// Folders whose names must not reach the object, and what stands there instead. The last that matches wins.
fn remapped(root: &Path, pinned: &Pinned) -> Result<Vec<(PathBuf, &'static str)>> {
    let cargo_home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => std::env::home_dir().context("neither CARGO_HOME nor a home folder")?.join(".cargo"),
    };
    let mut folders = vec![(root.to_owned(), "/shunt"), (pinned.folder().to_owned(), "/rust")];
    // One folder per registry, named after its host: a mirror must not change the object.
    for folder in fs::read_dir(cargo_home.join("registry/src")).context("list the fetched crates")? {
        folders.push((folder?.path(), "/crates"));
    }
    Ok(folders)
}

fn build_with_nightly(root: &Path, error: anyhow::Error) -> Result<()> {
    let Some(nightly) = error.is::<Unavailable>().then(Nightly::find).flatten() else {
        return Err(error);
    };
    ui::note(&format!("no pinned toolchain ({error:#}): rustup's nightly and {}", nightly.linker.display()));
    run(bare_cargo(root)
        .env_remove("RUSTC")
        .env("RUSTUP_TOOLCHAIN", "nightly")
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            concat(&[
                b"-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clinker=",
                nightly.linker.as_os_str().as_encoded_bytes(),
            ])?,
        )
        .args(["build", "--release", "--locked", "-Zbuild-std=core", "--target", TARGET]))?;
    println!("left in proxy-ebpf/target/{TARGET}/release; {OBJECTS} is unchanged: another compiler, other bytes");
    Ok(())
}

/// cargo in `proxy-ebpf`, free of what the calling cargo and the user's shell set for other targets.
fn bare_cargo(root: &Path) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root.join("proxy-ebpf"));
    for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR"] {
        command.env_remove(name);
    }
    command
}

fn root() -> Result<PathBuf> {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(xtask.parent().context("xtask has no parent folder")?.to_owned())
}

fn sha256(file: &Path) -> Result<String> {
    let text = cargo::output(Command::new("sha256sum").arg("--").arg(file))?;
    let digest = text.split_whitespace().next().context("sha256sum printed nothing")?;
    Ok(digest.trim_start_matches('\\').to_owned())
}

fn concat(parts: &[&[u8]]) -> Result<OsString> {
    Ok(String::from_utf8(parts.concat()).context("a folder whose name is not UTF-8")?.into())
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {:?}", command.get_program()))?;
    ensure!(status.success(), "{:?} failed: {status}", command.get_program());
    Ok(())
}
