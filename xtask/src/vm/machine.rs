//! One run of qemu.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::image::Image;
use crate::{stop, ui};

const MEMORY: &str = "4096";
const CONSOLE: &str = "console.log";

/// A kernel has said something on its console by then, or the processor's own virtualisation does not work here.
const FIRST_WORDS: Duration = Duration::from_secs(20);

/// Who plays the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    /// qemu itself, with a thread per processor.
    Software,
}

impl Accelerator {
    /// How many times longer the tests' lab waits.
    pub const fn patience(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Software => 6,
        }
    }
}

/// KVM where it is there and works: within other virtual machines it may be there and hang.
pub fn accelerator(image: &Image, results: &Path) -> Result<Accelerator> {
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accelerator::Software);
    }
    let mut machine = command(image, results, Accelerator::Kvm).stderr(Stdio::null()).spawn().context("start qemu")?;
    let deadline = Instant::now() + FIRST_WORDS;
    let console = results.join(CONSOLE);
    // Before that only the loader has spoken, which runs where the kernel then hangs.
    let spoken = || fs::read(&console).is_ok_and(|text| String::from_utf8_lossy(&text).contains("Linux version"));
    while machine.try_wait()?.is_none() && !spoken() && Instant::now() < deadline && !stop::asked() {
        thread::sleep(Duration::from_millis(50));
    }
    let works = spoken();
    machine.kill()?;
    machine.wait()?;
    if !works {
        ui::note("KVM is there and does not work: software emulation");
    }
    Ok(if works { Accelerator::Kvm } else { Accelerator::Software })
}

/// Boots the image and waits until the machine is off. `results`: a folder that it may write to. Its console is kept there. `meanwhile` is
/// called several times a second.
///
/// # Errors
/// When qemu fails, or the machine is still on after `within`.
pub fn run(
    image: &Image,
    results: &Path,
    accelerator: Accelerator,
    within: Duration,
    mut meanwhile: impl FnMut(),
) -> Result<()> {
    let mut machine = command(image, results, accelerator).spawn().context("start qemu-system-x86_64")?;
    let deadline = Instant::now() + within;
    loop {
        if let Some(status) = machine.try_wait()? {
            if status.success() {
                return Ok(());
            }
            bail!("qemu: {status}");
        }
        if stop::asked() || Instant::now() >= deadline {
            machine.kill()?;
            machine.wait()?;
            stop::check()?;
            bail!("the machine was still on after {} s", within.as_secs());
        }
        meanwhile();
        thread::sleep(Duration::from_millis(200));
    }
}

fn command(image: &Image, results: &Path, accelerator: Accelerator) -> Command {
    let share = |path: &Path, id: &str, more: &str| {
        // Commas separate qemu's own options.
        let path = path.display().to_string().replace(',', ",,");
        format!("local,path={path},mount_tag={id},id={id},security_model=none,multidevs=remap{more}")
    };
    let accelerator = match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Software => "tcg,thread=multi",
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", accelerator, "-cpu", "max,arch-capabilities=off", "-smp", "2", "-m", MEMORY])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initramfs)
        // A timer that is late because the host is busy is no broken timer, over which the kernel would panic.
        .args(["-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1 mitigations=off no_timer_check"])
        .args(["-serial", &format!("file:{}", results.join(CONSOLE).display())])
        .args(["-device", "virtio-rng-pci"])
        .args(["-virtfs", &share(Path::new("/"), "host", ",readonly=on")])
        .args(["-virtfs", &share(results, "results", "")])
        .stdin(Stdio::null());
    command
}
