//! Binding the two addresses of the admin API, with an error an operator can act on.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
            net::UnixListener as StdUnixListener,
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::{
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
        stat::{Mode, fchmod},
    },
};
use thiserror::Error;
use tokio::net::{TcpListener, UnixListener, UnixStream};

#[derive(Debug, Error)]
pub enum BindError {
    #[error("another shunt daemon{} answers on {path}", pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    AnotherDaemon { path: PathBuf, pid: Option<i32> },
    #[error("{path} is there and is not a socket")]
    NotASocket { path: PathBuf },
    #[error("cannot listen on {path}: {source}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("cannot listen on {address}: {source}")]
    Address { address: SocketAddr, source: io::Error },
}

impl BindError {
    /// What to do about it, one line.
    pub fn mend(&self) -> String {
        match self {
            Self::AnotherDaemon { .. } => "stop it first, or give this one its own admin.socket".to_owned(),
            Self::NotASocket { path } => format!("remove {} or set admin.socket to another path", path.display()),
            Self::Socket { source, path } if source.kind() == io::ErrorKind::PermissionDenied => {
                format!("make {} writable for this user, or set admin.socket elsewhere", folder(path).display())
            }
            Self::Socket { .. } => "set admin.socket to a path in a folder that exists and is writable".to_owned(),
            Self::Address { source, address } => match source.kind() {
                io::ErrorKind::AddrInUse => {
                    format!(
                        "another program has it (ss -ltnp 'sport = :{}'): stop it, or change admin.listen, or set it to \"off\"",
                        address.port()
                    )
                }
                io::ErrorKind::AddrNotAvailable => "this machine has no such address: change admin.listen".to_owned(),
                io::ErrorKind::PermissionDenied => {
                    "ports below 1024 need CAP_NET_BIND_SERVICE: change admin.listen to a higher one".to_owned()
                }
                _ => "change admin.listen, or set it to \"off\"".to_owned(),
            },
        }
    }
}

/// Both ends, bound and listening. Dropping it removes the socket's file.
#[derive(Debug)]
pub struct Listeners {
    pub(super) tcp: Option<TcpListener>,
    pub(super) unix: UnixListener,
    pub(super) file: SocketFile,
}

impl Listeners {
    /// Binds `listen` (`None`: no TCP) and `socket`. A socket file that a dead daemon left is replaced.
    pub async fn bind(listen: Option<SocketAddr>, socket: &Path) -> Result<Self, BindError> {
        let (unix, file) = bind_unix(socket).await?;
        let tcp = match listen {
            Some(address) => {
                Some(TcpListener::bind(address).await.map_err(|source| BindError::Address { address, source })?)
            }
            None => None,
        };
        Ok(Self { tcp, unix, file })
    }

    /// Where TCP listens; the port is known here when 0 was asked for.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref()?.local_addr().ok()
    }
}

/// The socket in the file system and the lock beside it, which a second daemon cannot get while this one lives.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // The lock's file stays: removing it would let two daemons hold locks on two files of one name.
        fs::remove_file(&self.path).ok();
    }
}

async fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |source: io::Error| BindError::Socket { path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o755).create(folder(path)).map_err(failed)?;
    let lock = lock(path).await?;
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(BindError::NotASocket { path: path.to_owned() }),
        Ok(_) => {
            if let Some(pid) = answers(path).await {
                return Err(BindError::AnotherDaemon { path: path.to_owned(), pid });
            }
            fs::remove_file(path).map_err(failed)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = listen_unix(path).and_then(UnixListener::from_std).map_err(failed)?;
    Ok((listener, SocketFile { path: path.to_owned(), _lock: lock }))
}

async fn lock(path: &Path) -> Result<Flock<File>, BindError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = File::options().create(true).truncate(false).write(true).open(PathBuf::from(name));
    let file = file.map_err(|source| BindError::Socket { path: path.to_owned(), source })?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            Err(BindError::AnotherDaemon { path: path.to_owned(), pid: answers(path).await.flatten() })
        }
        Err((_, errno)) => Err(BindError::Socket { path: path.to_owned(), source: errno.into() }),
    }
}

/// Whether somebody listens on the socket, and their process id where known.
async fn answers(path: &Path) -> Option<Option<i32>> {
    match tokio::time::timeout(Duration::from_secs(2), UnixStream::connect(path)).await {
        Ok(Ok(stream)) => Some(stream.peer_cred().ok().and_then(|peer| peer.pid())),
        Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => None,
        // A full backlog, or no permission: somebody is there.
        Ok(Err(_)) | Err(_) => Some(None),
    }
}

fn listen_unix(path: &Path) -> io::Result<StdUnixListener> {
    const MODE: u32 = 0o660;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The file is made with the socket's own mode (unix_bind_bsd, v6.18): there is no moment in which all may connect.
    fchmod(socket.as_fd(), Mode::from_bits_truncate(MODE))?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(MODE))?;
    listen(&socket, Backlog::new(64)?)?;
    Ok(StdUnixListener::from(socket))
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of its own, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("shunt-listen-{}-{name}", std::process::id())))
        }

        fn socket(&self) -> PathBuf {
            self.0.join("new/admin.sock")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).ok();
        }
    }

    #[tokio::test]
    async fn the_folder_is_made_and_the_socket_is_for_owner_and_group() {
        let folder = Folder::new("mode");
        let listeners = Listeners::bind(None, &folder.socket()).await.expect("bind");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&folder.socket()), 0o660);
        assert_eq!(mode(&folder.0.join("new")), 0o755);
        drop(listeners);
        assert!(!folder.socket().exists());
    }

    #[tokio::test]
    async fn a_second_daemon_is_told_the_pid_of_the_first() {
        let folder = Folder::new("second");
        let _first = Listeners::bind(None, &folder.socket()).await.expect("bind");
        let error = Listeners::bind(None, &folder.socket()).await.expect_err("an error");
        let said = error.to_string();
        assert!(said.contains(&format!("(pid {})", std::process::id())), "{said}");
        assert!(folder.socket().exists(), "the first one's socket must stay");
    }

    #[tokio::test]
    async fn a_socket_that_answers_is_respected_even_without_a_lock() {
        let folder = Folder::new("foreign");
        fs::create_dir_all(folder.0.join("new")).expect("folder");
        let _foreign = StdUnixListener::bind(folder.socket()).expect("foreign");
        let error = Listeners::bind(None, &folder.socket()).await.expect_err("an error");
        assert!(matches!(error, BindError::AnotherDaemon { .. }), "{error}");
    }

    #[tokio::test]
    async fn the_socket_of_a_dead_daemon_is_replaced() {
        let folder = Folder::new("stale");
        fs::create_dir_all(folder.0.join("new")).expect("folder");
        drop(StdUnixListener::bind(folder.socket()).expect("the dead one's"));
        assert!(folder.socket().exists());
        Listeners::bind(None, &folder.socket()).await.expect("bind");
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_not_removed() {
        let folder = Folder::new("file");
        fs::create_dir_all(folder.0.join("new")).expect("folder");
        fs::write(folder.socket(), "precious").expect("file");
        let error = Listeners::bind(None, &folder.socket()).await.expect_err("an error");
        assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read_to_string(folder.socket()).expect("file"), "precious");
    }

    #[tokio::test]
    async fn an_address_in_use_is_named_with_its_mend() {
        let folder = Folder::new("tcp");
        let other = TcpListener::bind("127.0.0.1:0").await.expect("other");
        let address = other.local_addr().expect("address");
        let error = Listeners::bind(Some(address), &folder.socket()).await.expect_err("an error");
        assert!(error.to_string().contains(&address.to_string()), "{error}");
        assert!(error.mend().contains("admin.listen"), "{}", error.mend());
        assert!(!folder.socket().exists(), "nothing stays behind");
    }
}
