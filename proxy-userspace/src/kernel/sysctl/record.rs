//! `restore.json`: what settings were before shunt changed them. Outlives the daemon, so that `shunt cleanup` can undo.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::{Change, Settings, Sysctl, SysctlError};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pair {
    pub(super) was: String,
    pub(super) set: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    #[serde(flatten)]
    pub(super) pair: Pair,
    /// What the kernel changes by itself as this one is written, in either direction.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) followed: BTreeMap<Sysctl, Pair>,
}

type Record = BTreeMap<Sysctl, Entry>;

/// Adds an entry. One that is there already is replaced: the caller has just seen a value that is not shunt's.
pub(super) fn remember(path: &Path, name: &Sysctl, entry: &Entry) -> Result<(), SysctlError> {
    let mut record = load(path)?;
    record.insert(name.clone(), entry.clone());
    store(path, &record)
}

/// One setting of the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restored {
    PutBack {
        name: Sysctl,
        from: String,
        to: String,
    },
    /// Somebody else has changed it since: left alone.
    Foreign {
        name: Sysctl,
        value: String,
        ours: String,
    },
    /// It no longer exists: a module that is gone.
    Gone {
        name: Sysctl,
    },
}

/// Puts back what shunt changed, where it still has the value shunt gave it, and removes the record.
/// Without a record there is nothing to do.
pub fn restore(settings: &Settings, path: &Path) -> Result<Vec<Restored>, SysctlError> {
    let mut done = Vec::new();
    for (name, Entry { pair, followed }) in load(path)? {
        match settings.read(&name) {
            Ok(value) if value == pair.set => {
                put_back(settings, &name, &pair, followed)?;
                done.push(Restored::PutBack { name, from: pair.set, to: pair.was });
            }
            Ok(value) if value == pair.was => {}
            Ok(value) => done.push(Restored::Foreign { name, value, ours: pair.set }),
            Err(_) => done.push(Restored::Gone { name }),
        }
    }
    remove(path)?;
    Ok(done)
}

/// Puts back what a change has set that came to nothing: `changed` is what it was to set. The record forgets those settings.
pub fn take_back(settings: &Settings, path: &Path, changed: &[Change]) -> Result<(), SysctlError> {
    let mut record = load(path)?;
    for Change { name, from, .. } in changed {
        let is_set =
            |entry: &Entry| entry.pair.was == *from && settings.read(name).is_ok_and(|value| value == entry.pair.set);
        if !record.get(name).is_some_and(is_set) {
            continue;
        }
        if let Some(Entry { pair, followed }) = record.remove(name) {
            put_back(settings, name, &pair, followed)?;
        }
    }
    if record.is_empty() { remove(path) } else { store(path, &record) }
}

fn put_back(
    settings: &Settings,
    name: &Sysctl,
    pair: &Pair,
    followed: BTreeMap<Sysctl, Pair>,
) -> Result<(), SysctlError> {
    // Looked at before the write, which changes them.
    let followed = followed.into_iter();
    let ours: Vec<_> =
        followed.filter(|(name, pair)| settings.read(name).is_ok_and(|value| value == pair.set)).collect();
    settings.write(name, &pair.was)?;
    for (name, pair) in ours {
        if settings.read(&name).is_ok_and(|value| value != pair.was) {
            settings.write(&name, &pair.was)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), SysctlError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed(path, source)),
        _ => Ok(()),
    }
}

fn load(path: &Path) -> Result<Record, SysctlError> {
    match fs::read(path) {
        Ok(text) => {
            serde_json::from_slice(&text).map_err(|source| SysctlError::RecordContent { path: path.to_owned(), source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Record::new()),
        Err(source) => Err(failed(path, source)),
    }
}

fn store(path: &Path, record: &Record) -> Result<(), SysctlError> {
    let write = || -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let temporary = path.with_extension("json.new");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| failed(path, source))
}

fn failed(path: &Path, source: io::Error) -> SysctlError {
    SysctlError::Record { path: path.to_owned(), source }
}
