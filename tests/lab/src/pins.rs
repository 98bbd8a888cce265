//! A BPF file system of the lab's own, beside the daemon's socket: what it pins goes with the lab.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Unmounted when dropped.
#[derive(Debug)]
pub struct Pins(PathBuf);

impl Pins {
    /// # Errors
    /// Where the kernel has none, or the caller may not.
    pub fn mount(dir: &Path) -> Result<Self> {
        let path = dir.join("bpf");
        fs::create_dir(&path).context("folder of pins")?;
        let nothing = None::<&str>;
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), nothing).context("mount -t bpf")?;
        Ok(Self(path))
    }

    /// What the daemon has pinned; empty when it has cleaned up.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn left(&self) -> Result<Vec<PathBuf>> {
        let mut left = Vec::new();
        // The file system has two files of its own.
        for folder in fs::read_dir(&self.0)?.collect::<Result<Vec<_>, _>>()? {
            if folder.file_type()?.is_dir() {
                left.push(folder.path());
            }
        }
        Ok(left)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // Also while a daemon still has files of it open.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
