//! A TAP device: Ethernet frames to and from a host.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    process::Command,
};

use anyhow::{Context, Result};
use nix::libc;

use crate::{host::Host, process::run};

nix::ioctl_write_ptr_bad!(set_interface, libc::TUNSETIFF, libc::ifreq);

const DEVICE: &str = "/dev/net/tun";
/// Larger than any frame of a link without offloads.
const FRAME: usize = 2048;
/// Frames that wait to be read: what the windows of many connections allow, as a cable loses nothing unless it is told to.
const QUEUE: &str = "10000";

#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Makes the device `name` in the namespace of `host`; it goes with this.
    pub fn open(host: &Host, name: &str) -> Result<Self> {
        if !Path::new(DEVICE).exists() {
            // Where it is a module that nobody has asked for yet; whether it helped shows with the next call.
            let _ = Command::new("modprobe").arg("tun").status();
        }
        let file = host.run(|| File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE));
        let file = file.with_context(|| format!("open {DEVICE} (CONFIG_TUN)"))?;
        // SAFETY: integers and arrays of them, for which zeros are values.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
        // SAFETY: the kernel reads the request, and writes the name into it; it lives until the call is over.
        unsafe { set_interface(file.as_raw_fd(), &raw const request) }
            .with_context(|| format!("TUNSETIFF {name} in {}", host.name()))?;
        run(host.command("ip").args(["link", "set", name, "txqueuelen", QUEUE]))?;
        Ok(Self(file))
    }

    /// The next frame that the host has sent.
    pub fn read(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; FRAME];
        let length = (&self.0).read(&mut frame).ok()?;
        frame.truncate(length);
        Some(frame)
    }

    /// The host receives a frame.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write(frame).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
