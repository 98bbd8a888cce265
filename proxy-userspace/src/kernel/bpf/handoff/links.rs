//! The interfaces that the program is attached to. A tcx link is pinned under its interface's number; of a clsact filter, which needs no
//! descriptor to live, a folder with the number in its name remains. That name says, too, whether the clsact is ours to take away.

use std::{
    error::Error,
    ffi::{CStr, CString},
    fs, io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::programs::{
    Link, SchedClassifier, TcAttachType,
    links::{FdLink, PinnedLink},
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
};

use super::{HandoffError, object::links_folder, qdisc};

/// Beginnings of a note's name: of a filter on a clsact that was there, and on one made for it.
const CLSACT: &str = "clsact-";
const MADE: &str = "made-clsact-";
/// Priority of our filters: found again by it and [`handle_of`].
const PRIORITY: u16 = 29_544;
const ARPHRD_ETHER: u32 = 1;
const ARPHRD_LOOPBACK: u32 = 772;

/// How the program is attached to an interface.
enum Pin {
    Tcx(PathBuf),
    Clsact { note: PathBuf, made: bool },
}

/// Interfaces with a pin, in order.
pub fn attached(folder: &Path) -> Vec<u32> {
    let mut all: Vec<u32> = names(folder).iter().filter_map(|name| ifindex_of(name)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Attaches the program where it is not.
pub fn attach(program: &mut SchedClassifier, folder: &Path, ifindex: u32) -> Result<(), HandoffError> {
    if find(folder, ifindex).is_some() {
        return Ok(());
    }
    let name = name_of(ifindex)?;
    check_ethernet(ifindex, &name)?;
    let name = name.to_string_lossy().into_owned();
    match attach_tcx(program, folder, ifindex, &name) {
        Ok(()) => Ok(()),
        Err(tcx) => attach_clsact(program, folder, ifindex, &name)
            .map_err(|clsact| HandoffError::Attach { ifindex, why: format!("tcx: {tcx}; clsact: {clsact}") }),
    }
}

/// Puts this program where an earlier one is; takes the pins of interfaces away that are gone.
pub fn adopt(program: &mut SchedClassifier, folder: &Path) -> Result<(), HandoffError> {
    for ifindex in attached(folder) {
        let adopted = match find(folder, ifindex) {
            Some(Pin::Tcx(path)) => adopt_tcx(program, &path),
            Some(Pin::Clsact { .. }) => adopt_clsact(program, folder, ifindex),
            None => Ok(()),
        };
        if let Err(why) = adopted {
            tracing::debug!(ifindex, why, "an interface with the handoff program is gone");
            remove_pin(folder, ifindex)?;
        }
    }
    Ok(())
}

/// Detaches the program; nothing to do where it is not.
pub fn detach(folder: &Path, ifindex: u32) -> Result<(), HandoffError> {
    if let Some(Pin::Clsact { made, .. }) = find(folder, ifindex)
        && let Ok(name) = name_of(ifindex)
        && let Ok(link) = filter_on(&name.to_string_lossy(), folder)
    {
        // Gone with its interface, or taken away by hand: it is detached.
        let _ = link.detach();
        if made && let Err(error) = qdisc::remove_unused(ifindex) {
            tracing::debug!(ifindex, %error, "a clsact without filters stays");
        }
    }
    // The last reference to a link is its pin.
    remove_pin(folder, ifindex)
}

fn attach_tcx(program: &mut SchedClassifier, folder: &Path, ifindex: u32, name: &str) -> Result<(), String> {
    let options = TcAttachOptions::TcxOrder(Default::default());
    let id = program.attach_with_options(name, TcAttachType::Ingress, options).map_err(chain)?;
    let link = program.take_link(id).map_err(chain)?;
    let link = FdLink::try_from(link).map_err(chain)?;
    link.pin(links_folder(folder).join(ifindex.to_string())).map(drop).map_err(chain)
}

/// The way of kernels before 6.6.
pub fn attach_clsact(program: &mut SchedClassifier, folder: &Path, ifindex: u32, name: &str) -> Result<(), String> {
    // There already, perhaps: then attaching works, or says what is wrong.
    let kind = if qdisc_add_clsact(name).is_ok() { MADE } else { CLSACT };
    let handle = handle_of(folder);
    let options = TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle, classid: None });
    let id = match program.attach_with_options(name, TcAttachType::Ingress, options) {
        Ok(id) => id,
        // Left by a daemon whose pins are gone, or that died before it had left a note: this one's program takes the place.
        Err(error) => {
            let left = filter_on(name, folder).map_err(chain)?;
            program.attach_to_link(left).map_err(|_| chain(error))?
        }
    };
    // Dropped, it would be detached.
    mem::forget(program.take_link(id).map_err(chain)?);
    fs::create_dir(links_folder(folder).join(format!("{kind}{ifindex}"))).map_err(chain)
}

fn adopt_tcx(program: &mut SchedClassifier, path: &Path) -> Result<(), String> {
    let link = FdLink::from(PinnedLink::from_pin(path).map_err(chain)?);
    let id = program.attach_to_link(SchedClassifierLink::try_from(link).map_err(chain)?).map_err(chain)?;
    // Its descriptor: the pin keeps the link.
    program.take_link(id).map(drop).map_err(chain)
}

fn adopt_clsact(program: &mut SchedClassifier, folder: &Path, ifindex: u32) -> Result<(), String> {
    let name = name_of(ifindex).map_err(chain)?;
    let id = program.attach_to_link(filter_on(&name.to_string_lossy(), folder).map_err(chain)?).map_err(chain)?;
    mem::forget(program.take_link(id).map_err(chain)?);
    Ok(())
}

fn filter_on(name: &str, folder: &Path) -> Result<SchedClassifierLink, io::Error> {
    SchedClassifierLink::attached(name, TcAttachType::Ingress, PRIORITY, handle_of(folder), None)
}

/// The same for each daemon that uses the folder, and another for a second daemon of this network namespace, whose filter is no
/// business of the first.
fn handle_of(folder: &Path) -> TcHandle {
    // FNV-1a, the same in each version.
    let step = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let hash = folder.as_os_str().as_encoded_bytes().iter().fold(0x811c_9dc5, step);
    // 0 has the kernel choose.
    TcHandle::from(hash | 1)
}

fn find(folder: &Path, ifindex: u32) -> Option<Pin> {
    let links = links_folder(folder);
    let there = |kind: &str| Some(links.join(format!("{kind}{ifindex}"))).filter(|path| path.exists());
    let clsact = |made| move |note| Pin::Clsact { note, made };
    there("").map(Pin::Tcx).or_else(|| there(CLSACT).map(clsact(false))).or_else(|| there(MADE).map(clsact(true)))
}

fn remove_pin(folder: &Path, ifindex: u32) -> Result<(), HandoffError> {
    match find(folder, ifindex) {
        None => Ok(()),
        Some(Pin::Tcx(path)) => {
            fs::remove_file(&path).map_err(|source| HandoffError::Pin { call: "unlink", path, source })
        }
        Some(Pin::Clsact { note: path, .. }) => {
            fs::remove_dir(&path).map_err(|source| HandoffError::Pin { call: "rmdir", path, source })
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let listed = fs::read_dir(links_folder(folder)).into_iter().flatten();
    listed.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn ifindex_of(name: &str) -> Option<u32> {
    name.strip_prefix(CLSACT).or_else(|| name.strip_prefix(MADE)).unwrap_or(name).parse().ok()
}

fn name_of(ifindex: u32) -> Result<CString, HandoffError> {
    let mut name = [0 as libc::c_char; libc::IF_NAMESIZE];
    // SAFETY: room for a name, which the call ends with a zero.
    let found = unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr()) };
    if found.is_null() {
        return Err(HandoffError::Interface { ifindex, call: "if_indextoname", source: io::Error::last_os_error() });
    }
    // SAFETY: a string that ends within `name`.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_owned())
}

/// The program reads an Ethernet header, which also the loopback interface has.
fn check_ethernet(ifindex: u32, name: &CStr) -> Result<(), HandoffError> {
    let failed = |call| HandoffError::Interface { ifindex, call, source: io::Error::last_os_error() };
    // SAFETY: a new socket; the result is checked and owned.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(failed("socket"));
    }
    // SAFETY: a descriptor that is open and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: integers and bytes, for which zeros are values.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes_with_nul()) {
        *to = *from as libc::c_char;
    }
    // SAFETY: a request of the type that this ioctl takes, alive during the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) } < 0 {
        return Err(failed("ioctl(SIOCGIFHWADDR)"));
    }
    // SAFETY: the field that the call filled.
    let kind = u32::from(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family });
    if matches!(kind, ARPHRD_ETHER | ARPHRD_LOOPBACK) {
        Ok(())
    } else {
        Err(HandoffError::NotEthernet { ifindex, kind })
    }
}

/// An error with its causes, in one line.
fn chain(error: impl Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(&format!(": {source}"));
        cause = source.source();
    }
    text
}
