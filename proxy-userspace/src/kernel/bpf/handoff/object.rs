//! The object in the kernel: loaded, with new maps or with those of a folder.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, Map, MapData, MapError},
    programs::SchedClassifier,
};
use nix::sys::statfs::FsType;
use proxy_abi::handoff::LAYOUT;

use super::{HandoffError, Sizes, flows::Flows};
use crate::kernel::bpf::BpfError;

/// The program, compiled by `cargo xtask ebpf build` (docs/ebpf.md).
static OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../proxy-ebpf/objects/handoff.bpf.o"));

pub const PROGRAM: &str = "shunt_handoff";

/// Maps that outlive the daemon; the program's scratch does not.
pub const PINNED: [&str; 5] = ["ABI", "FLOWS", "ENTRIES", "EVENTS", "OUTCOMES"];

const BPFFS: FsType = FsType(libc::BPF_FS_MAGIC);

/// Loads the object; its maps are new and go with it.
pub fn load(sizes: Sizes) -> Result<Ebpf, HandoffError> {
    let mut loader = EbpfLoader::new();
    load_with(&mut loader, sizes)
}

/// Loads the object with the maps that are pinned in `folder`, or new ones, pinned there.
pub fn load_pinned(folder: &Path, sizes: Sizes) -> Result<(Ebpf, Sizes), HandoffError> {
    let sizes = match pinned_sizes(folder)? {
        Some(pinned) => pinned,
        None => sizes,
    };
    let mut loader = EbpfLoader::new();
    for name in PINNED {
        loader.map_pin_path(name, folder.join(name));
    }
    let mut object = load_with(&mut loader, sizes)?;
    let mut abi: Array<_, u32> = map_mut(&mut object, "ABI")?;
    abi.set(0, LAYOUT, 0).map_err(|source| BpfError::Map { map: "ABI", source })?;
    Ok((object, sizes))
}

fn load_with(loader: &mut EbpfLoader<'_>, sizes: Sizes) -> Result<Ebpf, HandoffError> {
    loader.map_max_entries("FLOWS", sizes.flows);
    loader.map_max_entries("ENTRIES", sizes.flows.saturating_mul(2));
    loader.map_max_entries("EVENTS", sizes.events);
    let mut object = loader.load(OBJECT).map_err(BpfError::from_load)?;
    program(&mut object)?.load().map_err(BpfError::from_program)?;
    Ok(object)
}

/// The program of a loaded object.
pub fn program(object: &mut Ebpf) -> Result<&mut SchedClassifier, HandoffError> {
    let program = object.program_mut(PROGRAM).ok_or(BpfError::Missing { what: PROGRAM })?;
    Ok(program.try_into().map_err(BpfError::from_program)?)
}

/// Takes a map out of the object.
pub fn take<T>(object: &mut Ebpf, name: &'static str) -> Result<T, HandoffError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = object.take_map(name).ok_or(BpfError::Missing { what: name })?;
    Ok(T::try_from(map).map_err(|source| BpfError::Map { map: name, source })?)
}

/// Takes `FLOWS` out of the object, mapped.
pub fn map_flows(object: &mut Ebpf, count: u32) -> Result<Flows, HandoffError> {
    let Some(Map::Array(array)) = object.take_map("FLOWS") else {
        return Err(BpfError::Missing { what: "FLOWS" }.into());
    };
    Flows::map(array.fd().as_fd(), count).map_err(HandoffError::Memory)
}

fn map_mut<'a, T>(object: &'a mut Ebpf, name: &'static str) -> Result<T, HandoffError>
where
    T: TryFrom<&'a mut Map, Error = MapError>,
{
    let map = object.map_mut(name).ok_or(BpfError::Missing { what: name })?;
    Ok(T::try_from(map).map_err(|source| BpfError::Map { map: name, source })?)
}

/// Makes the folder, and the one of the links in it.
pub fn make_folder(folder: &Path) -> Result<(), HandoffError> {
    let existing = folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(folder);
    let kind = nix::sys::statfs::statfs(existing)
        .map_err(|errno| HandoffError::Pin { call: "statfs", path: existing.into(), source: errno.into() })?
        .filesystem_type();
    if kind != BPFFS {
        return Err(HandoffError::NotBpffs(folder.to_owned()));
    }
    let links = links_folder(folder);
    fs::create_dir_all(&links).map_err(|source| HandoffError::Pin { call: "mkdir", path: links, source })
}

pub fn links_folder(folder: &Path) -> PathBuf {
    folder.join("links")
}

/// The sizes of the maps that are pinned in `folder`; `None` where there are none, or half of them from a daemon that died while it
/// made them: those are removed.
fn pinned_sizes(folder: &Path) -> Result<Option<Sizes>, HandoffError> {
    if !folder.join("ABI").exists() {
        remove_maps(folder)?;
        return Ok(None);
    }
    let failed = |map| move |source| BpfError::Map { map, source };
    let abi = MapData::from_pin(folder.join("ABI")).map_err(failed("ABI"))?;
    let abi: Array<_, u32> = Array::try_from(Map::Array(abi)).map_err(failed("ABI"))?;
    match abi.get(&0, 0).map_err(failed("ABI"))? {
        LAYOUT => {}
        0 => {
            remove_maps(folder)?;
            return Ok(None);
        }
        pinned => return Err(HandoffError::Layout { folder: folder.to_owned(), pinned }),
    }
    let size = |map: &'static str| -> Result<u32, HandoffError> {
        let data = MapData::from_pin(folder.join(map)).map_err(failed(map))?;
        Ok(data.info().map_err(failed(map))?.max_entries())
    };
    Ok(Some(Sizes { flows: size("FLOWS")?, events: size("EVENTS")? }))
}

pub fn remove_maps(folder: &Path) -> Result<(), HandoffError> {
    for name in PINNED {
        let path = folder.join(name);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(HandoffError::Pin { call: "unlink", path, source }),
        }
    }
    Ok(())
}
