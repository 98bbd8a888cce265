//! The files that outlive the daemon: readable for its user alone, and whole at every moment.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use super::AcmeError;

/// Replaces `file`, or leaves it as it was. Its folder is made where it is missing.
pub(super) fn write(file: &Path, content: &[u8]) -> Result<(), AcmeError> {
    let failed = |error| AcmeError::file(file, error);
    let folder = file.parent().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    make(folder).map_err(|error| AcmeError::file(folder, error))?;
    try_write(folder, file, content).map_err(failed)
}

/// `None`: it is not there.
pub(super) fn read(file: &Path) -> Result<Option<Vec<u8>>, AcmeError> {
    match fs::read(file) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(AcmeError::file(file, error)),
    }
}

/// Keys are kept there: nobody else may even list it.
fn make(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    if fs::metadata(folder)?.permissions().mode() & 0o077 != 0 {
        fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn try_write(folder: &Path, file: &Path, content: &[u8]) -> io::Result<()> {
    let beside = file.with_added_extension("new");
    // Left behind by a daemon that was killed; with another's permissions it would keep them.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    new.write_all(content)?;
    new.sync_all()?;
    fs::rename(&beside, file)?;
    // The rename too: an order less after a power failure.
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("there").permissions().mode() & 0o777
    }

    #[test]
    fn what_is_kept_is_for_the_daemon_alone_and_replaced_whole() {
        let top = std::env::temp_dir().join(format!("shunt-acme-{}", std::process::id()));
        let file = top.join("ca.example").join("a.example.pem");
        assert!(read(&file).expect("readable").is_none());
        write(&file, b"one").expect("written");
        fs::write(file.with_added_extension("new"), b"half of somebody's").expect("written");
        fs::set_permissions(top.join("ca.example"), Permissions::from_mode(0o755)).expect("allowed");
        write(&file, b"two").expect("written");
        assert_eq!(read(&file).expect("readable").as_deref(), Some(&b"two"[..]));
        assert_eq!((mode(&top), mode(&top.join("ca.example")), mode(&file)), (0o700, 0o700, 0o600));
        assert_eq!(fs::read_dir(top.join("ca.example")).expect("a folder").count(), 1);
        fs::remove_dir_all(&top).expect("removed");
    }
}
