//! Where the daemon's socket is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use toml::de::DeTable;

use crate::cli::{Failure, Place};

pub(in crate::cli) const DEFAULT_CONFIG: &str = "/etc/shunt/shunt.toml";
pub(in crate::cli) const DEFAULT_SOCKET: &str = "/run/shunt/admin.sock";

/// `--socket`, else `admin.socket` of `--config` or of the default file where it can be read, else the default.
pub(super) fn socket(place: &Place) -> Result<PathBuf, Failure> {
    if let Some(socket) = &place.socket {
        return Ok(socket.clone());
    }
    match &place.config {
        Some(config) => {
            let text = fs::read_to_string(config).map_err(|error| {
                Failure::new(
                    format!("cannot read {}: {error}", config.display()),
                    "name the daemon's file, or use --socket PATH",
                )
            })?;
            in_text(&text, config).ok_or_else(|| {
                Failure::new(
                    format!("{}: admin.socket is not a path", config.display()),
                    "mend it, or use --socket PATH",
                )
            })
        }
        None => {
            let config = Path::new(DEFAULT_CONFIG);
            let found = fs::read_to_string(config).ok().and_then(|text| in_text(&text, config));
            Ok(found.unwrap_or_else(|| DEFAULT_SOCKET.into()))
        }
    }
}

/// Reads this one key only, past errors elsewhere: a daemon must be reachable while its file has problems.
/// `None`: it is there and is no path.
fn in_text(text: &str, file: &Path) -> Option<PathBuf> {
    let (document, _problems) = DeTable::parse_recoverable(text);
    let admin = document.get_ref().get("admin").and_then(|admin| admin.get_ref().as_table());
    let Some(value) = admin.and_then(|admin| admin.get("socket")) else { return Some(DEFAULT_SOCKET.into()) };
    let socket = value.get_ref().as_str().filter(|socket| !socket.is_empty())?;
    Some(file.parent().unwrap_or(Path::new("")).join(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_found_in_a_file_that_is_wrong_elsewhere() {
        let file = Path::new("/etc/x/shunt.toml");
        let found = in_text("[admin]\nsocket = \"/run/x.sock\"\n[nonsense]\nport = 0\n", file);
        assert_eq!(found, Some("/run/x.sock".into()));
        assert_eq!(in_text("[admin]\nsocket = \"/run/x.sock\"\n[[route]\nname =\n", file), Some("/run/x.sock".into()));
        assert_eq!(in_text("[admin]\nsocket = \"x.sock\"\n", file), Some("/etc/x/x.sock".into()));
        assert_eq!(in_text("", file), Some(DEFAULT_SOCKET.into()));
        assert_eq!(in_text("[admin]\nsocket = 1\n", file), None);
    }

    #[test]
    fn a_socket_that_is_named_wins() {
        let place = Place { config: Some("/no/such/file".into()), socket: Some("/run/y.sock".into()) };
        assert_eq!(socket(&place), Ok("/run/y.sock".into()));
        assert!(socket(&Place { socket: None, ..place }).is_err());
    }
}
