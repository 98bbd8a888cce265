//! A kernel's image, and an initramfs that can mount the host's files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::cargo;

/// What the first process must have before it has a root file system; everything else is loaded from there.
const MODULES: [&str; 5] = ["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_rng"];
const INIT: &str = include_str!("../../vm/init");

/// What the machine boots.
#[derive(Debug)]
pub struct Image {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub modules: PathBuf,
}

impl Image {
    /// From the unpacked packages of a kernel and of busybox; the initramfs is made in `folder`.
    pub fn make(tree: &Path, busybox: &Path, folder: &Path) -> Result<Self> {
        if !tree.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", tree.join("lib")).context("lib in usr")?;
        }
        let release = only(&tree.join("lib/modules"))?;
        let modules = tree.join("lib/modules").join(&release);
        let candidates = [tree.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
        let kernel = candidates.into_iter().find(|path| path.exists()).context("no vmlinuz in the packages")?;
        cargo::output(Command::new("depmod").arg("-b").arg(tree).arg(&release))?;

        let root = folder.join("initramfs");
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::create_dir_all(root.join("bin"))?;
        fs::create_dir_all(root.join("modules"))?;
        let busybox = ["bin/busybox", "usr/bin/busybox"].map(|name| busybox.join(name));
        let busybox = busybox.iter().find(|path| path.exists()).context("no busybox in its package")?;
        fs::copy(busybox, root.join("bin/busybox"))?;
        std::os::unix::fs::symlink("busybox", root.join("bin/sh"))?;
        write_program(&root.join("init"), INIT)?;
        let mut order = String::new();
        for module in with_needed(&fs::read_to_string(modules.join("modules.dep"))?) {
            let name = copy_module(&modules.join(module), &root.join("modules"))?;
            order += &format!("{name}\n");
        }
        fs::write(root.join("modules/order"), order)?;
        let initramfs = folder.join("initramfs.cpio");
        pack(busybox, &root, &initramfs)?;
        Ok(Self { kernel, initramfs, modules })
    }
}

/// [`MODULES`] and what they need, in the order of loading. One that is not in the list is part of the kernel.
fn with_needed(dependencies: &str) -> Vec<String> {
    let mut order: Vec<String> = Vec::new();
    for wanted in MODULES {
        let entry = dependencies.lines().filter_map(|line| line.split_once(':')).find(|(path, _)| {
            let file = path.rsplit('/').next().unwrap_or_default();
            file.split(".ko").next().unwrap_or_default().replace('-', "_") == wanted
        });
        let Some((module, needed)) = entry else { continue };
        for path in needed.split_whitespace().rev().chain([module]) {
            if !order.iter().any(|other| other == path) {
                order.push(path.to_owned());
            }
        }
    }
    order
}

/// Uncompressed: the name of the copy.
fn copy_module(module: &Path, to: &Path) -> Result<String> {
    let name = module.file_name().and_then(|name| name.to_str()).context("name of a module")?;
    let (plain, bytes) = match name.strip_suffix(".xz") {
        Some(plain) => {
            let unpacked = Command::new("xz").arg("-dc").arg(module).output().context("start xz")?;
            ensure!(unpacked.status.success(), "xz -dc {}", module.display());
            (plain, unpacked.stdout)
        }
        None => (name, fs::read(module)?),
    };
    fs::write(to.join(plain), bytes)?;
    Ok(plain.to_owned())
}

fn pack(busybox: &Path, root: &Path, to: &Path) -> Result<()> {
    let mut find = Command::new("find").arg(".").current_dir(root).stdout(Stdio::piped()).spawn()?;
    let names = find.stdout.take().context("find")?;
    let archive = fs::File::create(to)?;
    let status = Command::new(busybox)
        .args(["cpio", "-o", "-H", "newc"])
        .current_dir(root)
        .stdin(names)
        .stdout(archive)
        .stderr(Stdio::null())
        .status()?;
    ensure!(find.wait()?.success() && status.success(), "pack the initramfs");
    Ok(())
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The name of the only entry of a folder.
fn only(folder: &Path) -> Result<String> {
    let mut entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    let name = entries.next().context("an empty folder")??.file_name();
    ensure!(entries.next().is_none(), "more than one kernel in {}", folder.display());
    name.into_string().ok().context("a name that is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need_and_once() {
        let listed = "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n\
                      kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz\n\
                      kernel/drivers/char/hw_random/virtio-rng.ko.xz:\n";
        let order = with_needed(listed);
        let names: Vec<&str> = order.iter().filter_map(|path| path.rsplit('/').next()).collect();
        assert_eq!(names, ["9pnet.ko.xz", "9pnet_virtio.ko.xz", "netfs.ko.xz", "9p.ko.xz", "virtio-rng.ko.xz"]);
    }
}
