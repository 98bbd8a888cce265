//! Debian's kernels: which there are, and their packages unpacked. apt is asked with a configuration of its own, so that the
//! system's is neither read nor changed; it checks signatures with the system's keys.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::ui;

/// Archive and suite, oldest first. One that is not there any more is passed over.
const SUITES: [(&str, &str); 9] = [
    ("debian", "bullseye"),
    ("debian-security", "bullseye-security"),
    ("debian", "bookworm"),
    ("debian-security", "bookworm-security"),
    ("debian", "bookworm-backports"),
    ("debian", "trixie"),
    ("debian-security", "trixie-security"),
    ("debian", "trixie-backports"),
    ("debian", "sid"),
];
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const META: &str = "linux-image-amd64";
/// The shell of the initramfs, and its cpio.
const BUSYBOX: &str = "busybox-static";

/// apt with its own sources, lists and cache.
#[derive(Debug)]
pub struct Apt {
    folder: PathBuf,
}

/// A kernel that can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    pub version: String,
    pub suite: String,
}

impl Kernel {
    /// As people call it: `6.1`.
    pub fn series(&self) -> String {
        self.version.split('.').take(2).collect::<Vec<_>>().join(".")
    }

    fn is(&self, asked: &str) -> bool {
        self.suite == asked || self.version == asked || self.version.starts_with(&format!("{asked}."))
    }
}

impl Apt {
    /// Fetches the lists of all suites, once a day.
    pub fn new(folder: PathBuf) -> Result<Self> {
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(name)).context("make apt's folders")?;
        }
        let mirror = mirror()?;
        let line =
            |(archive, suite): &(&str, &str)| format!("deb [signed-by={KEYS}] {mirror}/{archive} {suite} main\n");
        let sources: String = SUITES.iter().map(line).collect();
        let apt = Self { folder };
        let list = apt.folder.join("sources.list");
        let fresh = fs::metadata(&list).and_then(|file| file.modified()).is_ok_and(|time| {
            time.elapsed().is_ok_and(|age| age.as_secs() < 86_400)
                && fs::read_to_string(&list).is_ok_and(|l| l == sources)
        });
        if !fresh {
            ui::note("the package lists of Debian's suites");
            fs::write(&list, sources).context("write sources.list")?;
            // A suite that is gone makes it fail, and the lists of the others are there all the same.
            apt.command("apt-get").args(["update", "-qq"]).output().context("start apt-get")?;
        }
        Ok(apt)
    }

    /// All kernels, newest first.
    fn kernels(&self) -> Result<Vec<Kernel>> {
        let listing = super::output(self.command("apt-cache").args(["madison", META]))?;
        let kernel = |line: &str| {
            let mut fields = line.split('|').map(str::trim);
            let (version, origin) = (fields.nth(1)?, fields.next()?);
            let suite = origin.split_whitespace().nth(1)?.split('/').next()?;
            Some(Kernel { version: version.to_owned(), suite: suite.to_owned() })
        };
        let mut kernels: Vec<Kernel> = listing.lines().filter_map(kernel).collect();
        kernels.sort_by_key(|kernel| std::cmp::Reverse(numbers(&kernel.version)));
        Ok(kernels)
    }

    /// The newest kernel of each name, which is a suite's or a version's beginning; the newest of each series when no name is
    /// given. Oldest first.
    pub fn choose(&self, names: &[String]) -> Result<Vec<Kernel>> {
        let kernels = self.kernels()?;
        ensure!(!kernels.is_empty(), "apt knows no {META}: can Debian's mirror be reached?");
        let mut chosen: Vec<Kernel> = Vec::new();
        if names.is_empty() {
            for kernel in kernels {
                if chosen.iter().all(|other| other.series() != kernel.series()) {
                    chosen.push(kernel);
                }
            }
        } else {
            for name in names {
                let found = kernels.iter().find(|kernel| kernel.is(name));
                let have =
                    || kernels.iter().map(|k| format!("{} ({})", k.version, k.suite)).collect::<Vec<_>>().join(", ");
                let found = found.with_context(|| format!("no kernel {name:?}; there are {}", have()))?;
                if !chosen.contains(found) {
                    chosen.push(found.clone());
                }
            }
        }
        chosen.sort_by_key(|kernel| numbers(&kernel.version));
        Ok(chosen)
    }

    /// The kernel's packages in `to`: those that it needs in exactly its version.
    pub fn unpack(&self, kernel: &Kernel, to: &Path) -> Result<()> {
        let (mut wanted, mut known) = (vec![META.to_owned()], BTreeSet::new());
        while let Some(name) = wanted.pop() {
            // Those of newer kernels need each other.
            if !known.insert(name.clone()) {
                continue;
            }
            let shown = super::output(self.command("apt-cache").args(["show", &format!("{name}={}", kernel.version)]))?;
            let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
            let pinned = format!("(= {})", kernel.version);
            wanted.extend(depends.split(", ").filter_map(|one| Some(one.strip_suffix(&pinned)?.trim().to_owned())));
        }
        known.remove(META);
        let packages: Vec<String> = known.iter().map(|name| format!("{name}={}", kernel.version)).collect();
        self.download(packages, to)
    }

    pub fn unpack_busybox(&self, to: &Path) -> Result<()> {
        self.download(vec![BUSYBOX.to_owned()], to)
    }

    /// Unpacks packages into `to`, which exists only when that has succeeded.
    fn download(&self, packages: Vec<String>, to: &Path) -> Result<()> {
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
        super::output(self.command("apt-get").arg("download").args(&packages).current_dir(&archives))?;
        for archive in fs::read_dir(&archives)? {
            super::output(Command::new("dpkg-deb").arg("-x").arg(archive?.path()).arg(&tree))?;
        }
        fs::rename(&tree, to)?;
        fs::remove_dir_all(&scratch)?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = |name: &str| self.folder.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::sourcelist={}", folder("sources.list")),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State={}", folder("")),
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::Cache={}", folder("cache")),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "APT::Sandbox::User=".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.env("LC_ALL", "C");
        command
    }
}

/// The numbers of a version, which order it.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// The mirror that this machine has its own packages from; Debian's archives lie beside each other on it.
fn mirror() -> Result<String> {
    let output = Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)"]).output();
    let listed = String::from_utf8(output.context("start apt-get")?.stdout).context("apt-get indextargets")?;
    let of_debian = listed.lines().find_map(|uri| uri.trim_end_matches('/').strip_suffix("/debian"));
    of_debian.map(str::to_owned).context("apt has no source of Debian's main archive: the kernels come from there")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_answers_to_its_suite_and_to_the_beginning_of_its_version_by_whole_numbers() {
        let kernel = Kernel { version: "6.12.107-1".into(), suite: "trixie".into() };
        assert!(["trixie", "6.12", "6", "6.12.107-1"].iter().all(|name| kernel.is(name)));
        assert!(["6.1", "bookworm", "6.12.10"].iter().all(|name| !kernel.is(name)));
        assert_eq!(kernel.series(), "6.12");
        assert!(numbers("6.12.9-1") < numbers("6.12.107-1"));
    }
}
