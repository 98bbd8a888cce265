//! One network namespace with its addresses.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{process::run, wait::patiently};

/// A host of the lab: a network namespace. Cheap to clone; the namespace lives until its [`crate::Lab`] goes.
#[derive(Debug, Clone)]
pub struct Host {
    name: Arc<str>,
    handle: Arc<File>,
    /// First IPv4 address; on the gateway the one towards the clients.
    pub ip: Ipv4Addr,
    /// First IPv6 address.
    pub ip6: Ipv6Addr,
}

impl Host {
    /// Opens the existing namespace `name`.
    pub(crate) fn open(name: &str, ip: Ipv4Addr, ip6: Ipv6Addr) -> Result<Self> {
        let path = Path::new("/run/netns").join(name);
        let handle = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self { name: name.into(), handle: Arc::new(handle), ip, ip6 })
    }

    /// Name of the namespace, as `ip netns exec` takes it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run in this namespace: in a process group of its own, so that Ctrl-C on the terminal reaches
    /// only us, and without stdin.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let handle = Arc::clone(&self.handle);
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).process_group(0);
        // SAFETY: the closure runs between fork and exec. It makes one system call on a descriptor it owns and turns
        // an errno into an io::Error, which allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(move || Ok(setns(&*handle, CloneFlags::CLONE_NEWNET)?));
        }
        command
    }

    /// Runs a shell line here; its stdout. For pipelines and redirections in tests.
    ///
    /// # Errors
    /// With stderr when the line exits non-zero.
    pub fn sh(&self, line: &str) -> Result<String> {
        let mut command = self.command("bash");
        command.args(["-c", line]);
        run(&mut command)
    }

    /// Fetches a URL with curl (HTTP errors are errors, 10 s at most); the body.
    pub fn curl(&self, url: &str) -> Result<Vec<u8>> {
        let output = self.command("curl").args(["-gfsS", "--max-time", "10", url]).output().context("start curl")?;
        anyhow::ensure!(output.status.success(), "curl {url}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(output.stdout)
    }

    /// Runs `work` on a thread inside this namespace and gives its answer. Sockets opened there belong to the namespace
    /// for good, so they can be used from any thread afterwards.
    ///
    /// # Panics
    /// When `work` panics, or the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            setns(&*self.handle, CloneFlags::CLONE_NEWNET).expect("setns into a namespace of the lab (needs root)");
            work()
        };
        thread::scope(|scope| match scope.spawn(inside).join() {
            Ok(answer) => answer,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    /// Connects from here, waiting at most 10 s.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        self.connect_within(to, Duration::from_secs(10))
    }

    /// Connects from here, waiting at most `within`.
    pub fn connect_within(&self, to: impl Into<SocketAddr>, within: Duration) -> io::Result<TcpStream> {
        let to = to.into();
        self.run(|| TcpStream::connect_timeout(&to, patiently(within)))
    }

    /// Connects from a given local address (port 0: any), which may still be in TIME_WAIT.
    pub fn connect_from(&self, from: impl Into<SocketAddr>, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let socket = self.socket(from.into(), Type::STREAM)?;
        socket.connect_timeout(&to.into().into(), patiently(Duration::from_secs(10)))?;
        Ok(socket.into())
    }

    /// A TCP socket bound here, not connected: for tests that need an option set before connect.
    pub fn tcp_socket(&self, from: impl Into<SocketAddr>) -> io::Result<Socket> {
        self.socket(from.into(), Type::STREAM)
    }

    /// A UDP socket bound here.
    pub fn udp(&self, from: impl Into<SocketAddr>) -> io::Result<UdpSocket> {
        Ok(self.socket(from.into(), Type::DGRAM)?.into())
    }

    /// A TCP listener here. Backlog 4096.
    pub fn listen(&self, on: impl Into<SocketAddr>) -> io::Result<TcpListener> {
        let socket = self.socket(on.into(), Type::STREAM)?;
        socket.listen(4096)?;
        Ok(socket.into())
    }

    /// `ip` of the family of `like`.
    pub fn address_like(&self, like: IpAddr) -> IpAddr {
        if like.is_ipv4() { self.ip.into() } else { self.ip6.into() }
    }

    /// Writes a sysctl (`net.ipv4.ip_forward`, dots) of this namespace only.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        self.run(|| fs::write(&path, value)).with_context(|| format!("sysctl {key} = {value} in {}", self.name))
    }

    /// Reads a sysctl as this namespace sees it, trimmed.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key);
        let text = self.run(|| fs::read_to_string(&path)).with_context(|| format!("sysctl {key} in {}", self.name))?;
        Ok(text.trim().to_owned())
    }

    fn socket(&self, bind: SocketAddr, kind: Type) -> io::Result<Socket> {
        let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
        let socket = self.run(|| Socket::new(Domain::for_address(bind), kind, Some(protocol)))?;
        socket.set_reuse_address(kind == Type::STREAM)?;
        socket.bind(&bind.into())?;
        Ok(socket)
    }
}

/// /proc/sys/net shows the namespace of the thread that asks.
fn sysctl_path(key: &str) -> String {
    format!("/proc/sys/{}", key.replace('.', "/"))
}
