//! The machine around shunt.

use std::{os::unix::net::UnixStream, path::Path};

use nix::sys::{
    resource::{Resource, getrlimit},
    socket::{getsockopt, sockopt},
    utsname::uname,
};

use super::Check;

/// NAT in the `inet` family came with 5.2.
const OLDEST: (u32, u32) = (5, 2);

pub(super) fn kernel_version() -> Check {
    let check =
        Check::of("kernel", "NAT in the inet family came with 5.2, protected tables that outlive the daemon with 6.9");
    let release = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    match version(&release) {
        Some(found) if found >= OLDEST => check.ok(release),
        Some(_) => check.missing(release, "a kernel of 5.2 or newer"),
        None => check.ok(format!("{release}: not understood, the other checks decide")),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub(super) fn file_limit() -> Check {
    let check =
        Check::of("open files", "the nft engine needs a few dozen, health checks one per backend while they run");
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < 1024 => {
            check.warn(format!("at most {soft}"), format!("ulimit -n {}; systemd: LimitNOFILE=65536", hard.min(65_536)))
        }
        Ok((soft, _)) => check.ok(format!("at most {soft}")),
        Err(errno) => check.ok(format!("not known: {errno}")),
    }
}

pub(super) fn running_daemon(socket: &Path) -> Check {
    let check = Check::of("running daemon", "two daemons in one network namespace cannot share the table");
    let Ok(stream) = UnixStream::connect(socket) else {
        return check.ok(format!("none on {}", socket.display()));
    };
    let pid = getsockopt(&stream, sockopt::PeerCredentials).map(|peer| format!("pid {}", peer.pid()));
    check.ok(format!("{} on {}", pid.as_deref().unwrap_or("one"), socket.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_read() {
        for (release, expected) in [
            ("6.1.0-18-amd64", Some((6, 1))),
            ("5.15.153.1-microsoft-standard-WSL2", Some((5, 15))),
            ("6.18", Some((6, 18))),
            ("linux", None),
            ("", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }
}
