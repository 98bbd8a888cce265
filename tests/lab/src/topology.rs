//! The hosts, their addresses and how they are wired.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::{
    cable::Cable,
    host::Host,
    leftovers::{self, PREFIX, ip_batch},
    pins::Pins,
};

/// The gateway, seen by clients.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 88, 1, 1);
/// The gateway, seen by clients.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd88, 1, 0, 0, 0, 0, 0, 1);
/// First address of the client; more of them follow (.3, .4, …).
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 88, 1, 2);
/// First address of the client.
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd88, 1, 0, 0, 0, 0, 0, 2);
/// The gateway, seen by backends; the source address of masqueraded connections.
pub const BACKEND_SIDE: Ipv4Addr = Ipv4Addr::new(10, 88, 2, 1);
/// The gateway, seen by backends.
pub const BACKEND_SIDE6: Ipv6Addr = Ipv6Addr::new(0xfd88, 2, 0, 0, 0, 0, 0, 1);

/// Set before any link exists, so that every link is born with it. An IPv6 address is usable at once without duplicate
/// address detection, and nothing depends on what the machine's own sysctls happen to be.
const SYSCTLS: [(&str, &str); 6] = [
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv4.conf.default.rp_filter", "0"),
    ("net.ipv6.conf.all.disable_ipv6", "0"),
    ("net.ipv6.conf.default.disable_ipv6", "0"),
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
];
const FORWARDING: [&str; 2] = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"];

/// What a lab shall look like. [`Lab::builder`] starts one.
#[derive(Debug, Clone)]
pub struct LabBuilder {
    backends: u8,
    client_addresses: u8,
    forwarding: bool,
    cabled: bool,
}

impl LabBuilder {
    /// How many backends, 1–100. Default 2.
    pub fn backends(mut self, count: u8) -> Self {
        self.backends = count;
        self
    }

    /// How many IPv4 and IPv6 addresses the client has, 1–200, consecutive from [`CLIENT`] and [`CLIENT6`]. Default 1.
    pub fn client_addresses(mut self, count: u8) -> Self {
        self.client_addresses = count;
        self
    }

    /// Whether the gateway already forwards. Default yes; no, to see the daemon turn it on.
    pub fn forwarding(mut self, on: bool) -> Self {
        self.forwarding = on;
        self
    }

    /// The links are [`Cable`]s: without offloads, and their frames are in our hands.
    pub fn cabled(mut self) -> Self {
        self.cabled = true;
        self
    }

    /// # Errors
    /// Without root, without iproute2, or for counts out of range.
    pub fn build(self) -> Result<Lab> {
        ensure!((1..=100).contains(&self.backends), "a lab has 1–100 backends, not {}", self.backends);
        ensure!((1..=200).contains(&self.client_addresses), "1–200 client addresses, not {}", self.client_addresses);
        ensure!(geteuid().is_root(), "the lab makes network namespaces: run as root, or through `cargo xtask test`");
        leftovers::remove_once();
        Lab::build(&self)
    }
}

/// A client, a gateway and backends, gone when dropped.
#[derive(Debug)]
pub struct Lab {
    client: Host,
    gateway: Host,
    backends: Vec<Host>,
    client_addresses: u8,
    /// Before the folder it is in.
    pins: Pins,
    dir: TempDir,
    #[cfg(feature = "tls")]
    tls: crate::tls::OfLab,
    /// The client's, then the backends'; none where the links are veths.
    cables: Vec<Cable>,
    /// Last: nothing above needs the namespaces once it runs.
    _namespaces: Namespaces,
}

impl Lab {
    /// A lab with two backends and one client address.
    ///
    /// # Errors
    /// As [`LabBuilder::build`].
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    pub fn builder() -> LabBuilder {
        LabBuilder { backends: 2, client_addresses: 1, forwarding: true, cabled: false }
    }

    pub fn client(&self) -> &Host {
        &self.client
    }

    pub fn gateway(&self) -> &Host {
        &self.gateway
    }

    /// Backend `number`, counted from 1: backend 1 is 10.88.2.2.
    ///
    /// # Panics
    /// When the lab has no such backend.
    pub fn backend(&self, number: usize) -> &Host {
        &self.backends[number - 1]
    }

    /// The link of the client (0) or a backend (from 1), in a lab that was built with [`LabBuilder::cabled`].
    ///
    /// # Panics
    /// When the lab has no such cable.
    pub fn cable(&self, number: usize) -> &Cable {
        &self.cables[number]
    }

    pub fn cables(&self) -> &[Cable] {
        &self.cables
    }

    pub fn backends(&self) -> &[Host] {
        &self.backends
    }

    /// Every IPv4 address of the client.
    pub fn client_addresses(&self) -> Vec<Ipv4Addr> {
        (0..self.client_addresses).map(client_ip).collect()
    }

    /// Scratch folder of this lab: logs, sockets, files that servers serve.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the daemon has pinned in the BPF file system beside its socket.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Certificates of this lab and whom its clients believe, made when first asked for.
    #[cfg(feature = "tls")]
    pub fn tls(&self) -> Result<std::sync::Arc<crate::tls::Material>> {
        self.tls.of(self)
    }

    fn build(spec: &LabBuilder) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let stem = format!("{PREFIX}{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix(&format!("{stem}-")).tempdir().context("scratch folder")?;

        let names = Namespaces::create(&stem, spec.backends)?;
        let client = Host::open(&names.client, CLIENT, CLIENT6)?;
        let gateway = Host::open(&names.gateway, GATEWAY, GATEWAY6)?;
        let backends = (0..spec.backends)
            .zip(&names.backends)
            .map(|(n, name)| Host::open(name, backend_ip(n), backend_ip6(n)))
            .collect::<Result<Vec<_>>>()?;
        let pins = Pins::mount(dir.path())?;
        let mut lab = Self {
            client,
            gateway,
            backends,
            client_addresses: spec.client_addresses,
            pins,
            dir,
            #[cfg(feature = "tls")]
            tls: Default::default(),
            cables: Vec::new(),
            _namespaces: names,
        };
        lab.wire(spec)?;
        Ok(lab)
    }

    fn wire(&mut self, spec: &LabBuilder) -> Result<()> {
        for host in [&self.client, &self.gateway].into_iter().chain(&self.backends) {
            for (key, value) in SYSCTLS {
                host.set_sysctl(key, value)?;
            }
        }
        for key in FORWARDING {
            self.gateway.set_sysctl(key, if spec.forwarding { "1" } else { "0" })?;
        }
        if spec.cabled {
            let hosts = [("clients".to_owned(), &self.client)].into_iter();
            let backends = self.backends.iter().zip(1..).map(|(host, n)| (format!("backend{n}"), host));
            let lay = |(device, host): (String, &Host)| Cable::lay(&self.gateway, &device, host);
            self.cables = hosts.chain(backends).map(lay).collect::<Result<_>>()?;
        } else {
            ip_batch(Some(self.gateway.name()), &self.veths())?;
        }
        ip_batch(Some(self.gateway.name()), &self.gateway_links())?;
        ip_batch(Some(self.client.name()), &client_links(spec.client_addresses))?;
        for host in &self.backends {
            ip_batch(Some(host.name()), &backend_links(host))?;
        }
        Ok(())
    }

    fn veths(&self) -> String {
        let link =
            |name: &str, host: &Host| format!("link add name {name} type veth peer name eth0 netns {}\n", host.name());
        let backends = self.backends.iter().zip(1..).map(|(host, n)| link(&format!("backend{n}"), host));
        [link("clients", &self.client)].into_iter().chain(backends).collect()
    }

    /// The backends share one subnet without sharing a bridge: the gateway has a link and a host route to each, which
    /// keeps a bridge's cost out of what is measured.
    fn gateway_links(&self) -> String {
        let mut lines = format!(
            "link set lo up\n\
             address add {GATEWAY}/24 dev clients\n\
             address add {GATEWAY6}/64 dev clients nodad\n\
             link set clients up\n"
        );
        for (host, n) in self.backends.iter().zip(1..) {
            let (ip, ip6) = (host.ip, host.ip6);
            let _ = write!(
                lines,
                "address add {BACKEND_SIDE}/32 dev backend{n}\n\
                 address add {BACKEND_SIDE6}/128 dev backend{n} nodad\n\
                 link set backend{n} up\n\
                 route add {ip}/32 dev backend{n} src {BACKEND_SIDE}\n\
                 route add {ip6}/128 dev backend{n} src {BACKEND_SIDE6}\n"
            );
        }
        lines
    }
}

fn client_links(addresses: u8) -> String {
    let mut lines = "link set lo up\nlink set eth0 up\n".to_owned();
    for n in 0..addresses {
        let _ = write!(
            lines,
            "address add {}/24 dev eth0\naddress add {}/64 dev eth0 nodad\n",
            client_ip(n),
            Ipv6Addr::from_bits(CLIENT6.to_bits() + u128::from(n)),
        );
    }
    let _ = write!(lines, "route add default via {GATEWAY} src {CLIENT}\nroute add ::/0 via {GATEWAY6}\n");
    lines
}

fn backend_links(host: &Host) -> String {
    format!(
        "link set lo up\n\
         link set eth0 up\n\
         address add {}/32 dev eth0\n\
         address add {}/128 dev eth0 nodad\n\
         route add {BACKEND_SIDE}/32 dev eth0\n\
         route add {BACKEND_SIDE6}/128 dev eth0\n\
         route add default via {BACKEND_SIDE}\n\
         route add ::/0 via {BACKEND_SIDE6}\n",
        host.ip, host.ip6
    )
}

fn client_ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(CLIENT.to_bits() + u32::from(n))
}

fn backend_ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(BACKEND_SIDE.to_bits() + 1 + u32::from(n))
}

fn backend_ip6(n: u8) -> Ipv6Addr {
    Ipv6Addr::from_bits(BACKEND_SIDE6.to_bits() + 1 + u128::from(n))
}

/// Names of namespaces that exist as long as this does.
#[derive(Debug)]
struct Namespaces {
    client: String,
    gateway: String,
    backends: Vec<String>,
}

impl Namespaces {
    fn create(stem: &str, backends: u8) -> Result<Self> {
        // Made before the namespaces are, so that a failure half-way removes the first half.
        let names = Self {
            client: format!("{stem}-client"),
            gateway: format!("{stem}-gateway"),
            backends: (1..=backends).map(|n| format!("{stem}-backend{n}")).collect(),
        };
        ip_batch(None, &names.all().iter().map(|name| format!("netns add {name}\n")).collect::<String>())?;
        Ok(names)
    }

    fn all(&self) -> Vec<String> {
        [&self.client, &self.gateway].into_iter().chain(&self.backends).cloned().collect()
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        if let Err(error) = leftovers::remove(&self.all()) {
            eprintln!("lab: {error:#}");
        }
    }
}
