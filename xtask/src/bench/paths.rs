//! The ways from the client to the backend that are compared.

use std::{
    fmt, fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;
use shunt_lab::{GATEWAY, Lab, Running, Shunt, kernel, run};

use super::services;

pub const RULE: &str = include_str!("../../bench/peers/rule.nft");
pub const RULE_COUNTED: &str = include_str!("../../bench/peers/rule-counted.nft");
const HAPROXY: &str = include_str!("../../bench/peers/haproxy.cfg");
const NGINX: &str = include_str!("../../bench/peers/nginx.conf");
pub const SHUNT: &str = include_str!("../../bench/peers/shunt.toml");
/// Hears once of each connection and writes nowhere. The kernel may queue as many bytes for it as for shunt.
const LISTENER: &str = "exec conntrack -E -p tcp -e NEW,DESTROY -b 33554432 > /dev/null";

/// One way from the client to the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PathKind {
    /// Routing without NAT, without connection tracking
    Plain,
    /// A hand-written nft DNAT rule
    Rule,
    /// The same with what counts: nf_conntrack_acct, and counters for each port and direction
    RuleCounted,
    /// … and with who hears of each connection: `conntrack -E`
    RuleLogged,
    /// shunt, nft engine, with accounting
    Shunt,
    /// shunt, engine = "copy", a worker per core
    Copy,
    /// shunt, engine = "splice", a worker per core
    Splice,
    /// shunt, engine = "sockmap", a worker per core
    Sockmap,
    /// shunt, engine = "handoff": relayed at first, then packets of one connection become packets of the other
    Handoff,
    /// HAProxy, TCP mode, option splice-auto, 2 threads
    Haproxy,
    /// The same without option splice-auto
    HaproxyCopy,
    /// nginx stream, 2 workers
    Nginx,
}

impl PathKind {
    pub const ALL: [Self; 12] = [
        Self::Plain,
        Self::Rule,
        Self::RuleCounted,
        Self::RuleLogged,
        Self::Shunt,
        Self::Copy,
        Self::Splice,
        Self::Sockmap,
        Self::Handoff,
        Self::Haproxy,
        Self::HaproxyCopy,
        Self::Nginx,
    ];

    /// The proxies that shunt's stream path is compared with.
    pub const PEERS: [Self; 3] = [Self::Haproxy, Self::HaproxyCopy, Self::Nginx];

    pub fn title(self) -> &'static str {
        match self {
            Self::Plain => "plain routing",
            Self::Rule => "nft rule",
            Self::RuleCounted => "nft rule, counted",
            Self::RuleLogged => "nft rule, counted and logged",
            Self::Shunt => "shunt nft",
            Self::Copy => "shunt copy",
            Self::Splice => "shunt splice",
            Self::Sockmap => "shunt sockmap",
            Self::Handoff => "shunt handoff",
            Self::Haproxy => "HAProxy splice",
            Self::HaproxyCopy => "HAProxy copy",
            Self::Nginx => "nginx",
        }
    }

    /// Served by the daemon under test.
    pub fn is_shunt(self) -> bool {
        matches!(self, Self::Shunt | Self::Copy | Self::Splice | Self::Sockmap | Self::Handoff)
    }
}

impl fmt::Display for PathKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}

/// A path that forwards now; it stops when dropped or, with errors told, by [`RunningPath::stop`].
#[derive(Debug)]
pub struct RunningPath {
    pub kind: PathKind,
    /// What the client dials.
    pub target: Ipv4Addr,
    forwarder: Forwarder,
}

#[derive(Debug)]
enum Forwarder {
    Routing,
    Rule,
    Logged(Running),
    Program(Running),
    Shunt(Box<Shunt>),
}

impl RunningPath {
    /// Starts `kind` on the lab's gateway, which must be as [`Self::stop`] leaves it. `shunt`: the daemon's binary.
    pub fn start(kind: PathKind, lab: &Lab, shunt: Option<&Path>) -> Result<Self> {
        // shunt turns it on itself.
        let counted = if matches!(kind, PathKind::RuleCounted | PathKind::RuleLogged) { "1" } else { "0" };
        lab.gateway().set_sysctl("net.netfilter.nf_conntrack_acct", counted)?;
        let forwarder = match kind {
            PathKind::Plain => Forwarder::Routing,
            PathKind::Rule | PathKind::RuleCounted => {
                let script = if kind == PathKind::Rule { RULE } else { RULE_COUNTED };
                kernel::nft_load(lab.gateway(), lab.dir(), script)?;
                Forwarder::Rule
            }
            PathKind::RuleLogged => {
                kernel::nft_load(lab.gateway(), lab.dir(), RULE_COUNTED)?;
                let mut listener = lab.gateway().command("sh");
                listener.args(["-c", LISTENER]);
                Forwarder::Logged(Running::start("listener", listener, lab.dir())?)
            }
            PathKind::Haproxy | PathKind::HaproxyCopy => {
                let without = HAPROXY.replace("    option splice-auto\n", "");
                let config = if kind == PathKind::Haproxy { HAPROXY } else { &without };
                let file = write(lab, "haproxy.cfg", config)?;
                Forwarder::Program(lab.serve(
                    lab.gateway(),
                    "haproxy",
                    "haproxy",
                    &["-db", "-f", &file],
                    services::HTTP,
                )?)
            }
            PathKind::Nginx => {
                let file = write(lab, "nginx-peer.conf", NGINX)?;
                let prefix = lab.dir().to_str().context("path of the lab's folder")?;
                let args = ["-e", "stderr", "-p", prefix, "-c", &file];
                Forwarder::Program(lab.serve(lab.gateway(), "nginx-peer", "nginx", &args, services::HTTP)?)
            }
            PathKind::Shunt | PathKind::Copy | PathKind::Splice | PathKind::Sockmap | PathKind::Handoff => {
                let binary = shunt.context("no shunt binary was built")?;
                let engine = match kind {
                    PathKind::Copy => "[defaults]\nengine = \"copy\"\n",
                    PathKind::Splice => "[defaults]\nengine = \"splice\"\n",
                    PathKind::Sockmap => "[defaults]\nengine = \"sockmap\"\n",
                    PathKind::Handoff => "[defaults]\nengine = \"handoff\"\n",
                    _ => "",
                };
                let config = format!("{engine}{SHUNT}");
                Forwarder::Shunt(Box::new(Shunt::builder().binary(binary).start(lab, &config)?))
            }
        };
        let target = if kind == PathKind::Plain { lab.backend(1).ip } else { GATEWAY };
        Ok(Self { kind, target, forwarder })
    }

    /// The processes that forward or decide; empty for the kernel alone.
    pub fn pids(&self) -> Result<Vec<u32>> {
        match &self.forwarder {
            Forwarder::Routing | Forwarder::Rule => Ok(Vec::new()),
            Forwarder::Program(running) | Forwarder::Logged(running) => with_children(running.pid()),
            Forwarder::Shunt(shunt) => Ok(vec![shunt.pid()?]),
        }
    }

    /// Stops it and takes away what it put into the gateway's kernel.
    pub fn stop(self, lab: &Lab) -> Result<()> {
        match self.forwarder {
            Forwarder::Routing => {}
            Forwarder::Rule => delete_by_hand(lab)?,
            Forwarder::Logged(log) => {
                drop(log);
                delete_by_hand(lab)?;
            }
            Forwarder::Program(running) => drop(running),
            Forwarder::Shunt(mut shunt) => {
                shunt.terminate(Duration::from_secs(40))?;
                run(&mut shunt.command(&["cleanup"])).context("shunt cleanup")?;
            }
        }
        kernel::conntrack_flush(lab.gateway())
    }
}

fn delete_by_hand(lab: &Lab) -> Result<()> {
    run(lab.gateway().command("nft").args(["delete", "table", "ip", "by_hand"])).map(drop)
}

/// CPU seconds the forwarding processes have used.
pub fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    pids.iter().map(|pid| kernel::cpu_seconds(*pid)).sum()
}

/// Resident bytes of the forwarding processes. Pages shared between nginx's workers count once per worker.
pub fn resident_bytes(pids: &[u32]) -> Result<u64> {
    pids.iter().map(|pid| kernel::resident_bytes(*pid)).sum()
}

/// A process and those it has started.
pub fn with_children(pid: u32) -> Result<Vec<u32>> {
    let path = PathBuf::from(format!("/proc/{pid}/task/{pid}/children"));
    let children = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(std::iter::once(pid).chain(children.split_whitespace().filter_map(|child| child.parse().ok())).collect())
}

fn write(lab: &Lab, name: &str, content: &str) -> Result<String> {
    let path = lab.dir().join(name);
    fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
    path.to_str().map(str::to_owned).context("path of the lab's folder")
}
