//! Packages of Debian's, unpacked and not installed. apt is asked with a configuration of its own, so that the system's is neither
//! read nor changed; it checks signatures with the system's keys.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{cargo, ui};

const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The sources; as old as the lists.
const LIST: &str = "sources.list";
/// Lists are fetched anew after so long, in seconds.
const FRESH: u64 = 86_400;

/// apt with its own sources, lists and cache.
#[derive(Debug)]
pub struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Fetches the lists of these suites, each with its archive. One that is not there any more is passed over.
    pub fn new(folder: PathBuf, suites: &[(&str, &str)]) -> Result<Self> {
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(name)).context("make apt's folders")?;
        }
        let mirror = mirror()?;
        let line =
            |(archive, suite): &(&str, &str)| format!("deb [signed-by={KEYS}] {mirror}/{archive} {suite} main\n");
        let sources: String = suites.iter().map(line).collect();
        let apt = Self { folder };
        let list = apt.folder.join(LIST);
        let fresh = fs::metadata(&list).and_then(|file| file.modified()).is_ok_and(|time| {
            time.elapsed().is_ok_and(|age| age.as_secs() < FRESH)
                && fs::read_to_string(&list).is_ok_and(|l| l == sources)
        });
        if !fresh {
            ui::note(&format!("fetch the package lists of {}", names(suites)));
            fs::write(&list, sources).context("write sources.list")?;
            // A suite that is gone makes it fail, and the lists of the others are there all the same.
            apt.command("apt-get").args(["update", "-qq"]).output().context("start apt-get")?;
        }
        Ok(apt)
    }

    /// Unpacks packages into `to`, which exists only when that has succeeded.
    pub fn unpack(&self, packages: &[String], to: &Path) -> Result<()> {
        if to.exists() {
            return Ok(());
        }
        ui::note(&format!("download {}", packages.join(" ")));
        let mut scratch = to.as_os_str().to_owned();
        scratch.push(".unpacking");
        let scratch = PathBuf::from(scratch);
        if scratch.exists() {
            fs::remove_dir_all(&scratch).context("remove an unfinished download")?;
        }
        let (archives, tree) = (scratch.join("archives"), scratch.join("tree"));
        fs::create_dir_all(&archives)?;
        fs::create_dir_all(&tree)?;
        let downloaded = cargo::output(self.command("apt-get").arg("download").args(packages).current_dir(&archives));
        if downloaded.is_err() {
            // The lists may be the reason: the next try shall not begin with these.
            fs::remove_file(self.folder.join(LIST)).context("forget the package lists")?;
        }
        downloaded?;
        for archive in fs::read_dir(&archives)? {
            cargo::output(Command::new("dpkg-deb").arg("-x").arg(archive?.path()).arg(&tree))?;
        }
        fs::rename(&tree, to)?;
        fs::remove_dir_all(&scratch)?;
        Ok(())
    }

    /// A tool of apt's with this configuration.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = |name: &str| self.folder.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::sourcelist={}", folder(LIST)),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State={}", folder("")),
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::Cache={}", folder("cache")),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "APT::Sandbox::User=".to_owned(),
            "Acquire::http::Timeout=30".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.env("LC_ALL", "C");
        command
    }
}

fn names(suites: &[(&str, &str)]) -> String {
    suites.iter().map(|(_, suite)| *suite).collect::<Vec<_>>().join(", ")
}

/// The mirror that this machine has its own packages from; Debian's archives lie beside each other on it.
fn mirror() -> Result<String> {
    let output = Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)"]).output();
    let listed = String::from_utf8(output.context("start apt-get")?.stdout).context("apt-get indextargets")?;
    let of_debian = listed.lines().find_map(|uri| uri.trim_end_matches('/').strip_suffix("/debian"));
    of_debian.map(str::to_owned).context("apt has no source of Debian's main archive: its packages are needed")
}
