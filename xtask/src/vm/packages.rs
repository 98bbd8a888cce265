//! Debian's kernels: which there are, and their packages unpacked.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{apt::Apt, cargo};

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
const META: &str = "linux-image-amd64";
/// The shell of the initramfs, and its cpio.
const BUSYBOX: &str = "busybox-static";

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

/// Where they are had from.
#[derive(Debug)]
pub struct Kernels(Apt);

impl Kernels {
    /// Keeps what it fetches in `folder`.
    pub fn new(folder: PathBuf) -> Result<Self> {
        Ok(Self(Apt::new(folder, &SUITES)?))
    }

    /// All kernels, newest first.
    fn kernels(&self) -> Result<Vec<Kernel>> {
        let listing = cargo::output(self.0.command("apt-cache").args(["madison", META]))?;
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
            let shown =
                cargo::output(self.0.command("apt-cache").args(["show", &format!("{name}={}", kernel.version)]))?;
            let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
            let pinned = format!("(= {})", kernel.version);
            wanted.extend(depends.split(", ").filter_map(|one| Some(one.strip_suffix(&pinned)?.trim().to_owned())));
        }
        known.remove(META);
        let packages: Vec<String> = known.iter().map(|name| format!("{name}={}", kernel.version)).collect();
        self.0.unpack(&packages, to)
    }

    pub fn unpack_busybox(&self, to: &Path) -> Result<()> {
        self.0.unpack(&[BUSYBOX.to_owned()], to)
    }
}

/// The numbers of a version, which order it.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
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
