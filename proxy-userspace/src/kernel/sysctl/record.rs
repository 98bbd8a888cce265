//! `restore.json`: what settings were before shunt changed them. Outlives the daemon, so that `shunt cleanup` can undo.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::{Settings, Sysctl, SysctlError};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    was: String,
    set: String,
    /// The kernel changed it by itself, as another setting was written.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    followed: bool,
}

impl Entry {
    pub(super) fn main(was: &str, set: &str) -> Self {
        Self { was: was.to_owned(), set: set.to_owned(), followed: false }
    }

    pub(super) fn followed(was: &str, set: &str) -> Self {
        Self { was: was.to_owned(), set: set.to_owned(), followed: true }
    }
}

type Record = BTreeMap<Sysctl, Entry>;

/// Adds entries. One that is there already is replaced: the caller has just seen a value that is not shunt's.
pub(super) fn remember(path: &Path, entries: &[(Sysctl, Entry)]) -> Result<(), SysctlError> {
    if entries.is_empty() {
        return Ok(());
    }
    let mut record = load(path)?;
    record.extend(entries.iter().cloned());
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
    /// It no longer exists: an interface that is gone.
    Gone {
        name: Sysctl,
    },
}

/// Puts back what shunt changed, where it still has the value shunt gave it, and removes the record.
/// Without a record there is nothing to do.
pub fn restore(settings: &Settings, path: &Path) -> Result<Vec<Restored>, SysctlError> {
    let record = load(path)?;
    // Looked at before anything is written: writing a main setting changes those that follow it.
    let mut done = Vec::new();
    let mut ours: Vec<(&Sysctl, &Entry)> = Vec::new();
    for (name, entry) in &record {
        match settings.read(name) {
            Ok(value) if value == entry.set => ours.push((name, entry)),
            Ok(value) if value == entry.was => {}
            Ok(_) if entry.followed && entry.was == entry.set => {}
            Ok(value) => done.push(Restored::Foreign { name: name.clone(), value, ours: entry.set.clone() }),
            Err(_) => done.push(Restored::Gone { name: name.clone() }),
        }
    }
    ours.sort_by_key(|(_, entry)| entry.followed);
    for (name, entry) in ours {
        if settings.read(name)? != entry.was {
            settings.write(name, &entry.was)?;
        }
        if entry.was != entry.set {
            done.push(Restored::PutBack { name: name.clone(), from: entry.set.clone(), to: entry.was.clone() });
        }
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed(path, source)),
        _ => Ok(done),
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
