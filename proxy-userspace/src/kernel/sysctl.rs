//! Kernel settings under `/proc/sys`: what shunt needs, setting it, and putting back exactly what it changed.

mod record;

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use record::{Entry, Pair};
pub use record::{Restored, restore, take_back};
use thiserror::Error;

use crate::stream::handover::RESERVED;

/// The name of one setting. Shown as `sysctl` writes it: `net.ipv4.ip_forward`; a dot inside a part
/// (an interface `eth0.100`) is shown as `/`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Sysctl(String);

impl Sysctl {
    /// `path`: below `/proc/sys`, without a leading slash.
    pub fn new(path: impl Into<String>) -> Self {
        Self(path.into())
    }

    /// The interface of `net/<family>/conf/<interface>/<setting>`.
    pub(crate) fn interface(&self) -> Option<&str> {
        self.0.split('/').nth(3)
    }

    fn file(&self, root: &Path) -> PathBuf {
        root.join(&self.0)
    }
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let swapped: String = self
            .0
            .chars()
            .map(|c| {
                if c == '/' {
                    '.'
                } else if c == '.' {
                    '/'
                } else {
                    c
                }
            })
            .collect();
        f.write_str(&swapped)
    }
}

/// Where the settings are; `/proc/sys` outside tests.
#[derive(Debug, Clone)]
pub struct Settings {
    root: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self { root: PathBuf::from("/proc/sys") }
    }
}

#[derive(Debug, Error)]
pub enum SysctlError {
    #[error("cannot read {name}: {source}")]
    Read { name: Sysctl, source: io::Error },
    #[error("cannot set {name} = {value}: {source}")]
    Write { name: Sysctl, value: String, source: io::Error },
    /// `restore.json`
    #[error("{path}: {source}")]
    Record { path: PathBuf, source: io::Error },
    #[error("{path} is not a record of kernel settings: {source}")]
    RecordContent { path: PathBuf, source: serde_json::Error },
}

impl SysctlError {
    /// The command or step that mends it, one line.
    pub fn mend(&self) -> String {
        match self {
            Self::Read { name, source } if source.kind() == io::ErrorKind::NotFound => {
                match name.0.contains("nf_conntrack") {
                    true => "modprobe nf_conntrack".to_owned(),
                    false => format!("this kernel has no {name}: use one with IP networking built in"),
                }
            }
            Self::Read { name, .. } => format!("run as root or with CAP_NET_ADMIN; then `sysctl {name}` must answer"),
            Self::Write { name, value, .. } => format!(
                "run with CAP_NET_ADMIN, or set it where the network namespace is made: `sysctl -w {name}={value}` \
                 (containers: `--sysctl {name}={value}`)"
            ),
            Self::Record { path, .. } => {
                format!(
                    "make {} writable for shunt, or set admin.socket elsewhere",
                    path.parent().unwrap_or(path).display()
                )
            }
            Self::RecordContent { path, .. } => format!("look into it, then remove it: rm {}", path.display()),
        }
    }
}

impl Settings {
    #[cfg(test)]
    fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The value, without the newline at its end.
    pub fn read(&self, name: &Sysctl) -> Result<String, SysctlError> {
        match fs::read_to_string(name.file(&self.root)) {
            Ok(value) => Ok(value.trim_end().to_owned()),
            Err(source) => Err(SysctlError::Read { name: name.clone(), source }),
        }
    }

    pub fn write(&self, name: &Sysctl, value: &str) -> Result<(), SysctlError> {
        // Without O_CREAT and O_TRUNC: the files of /proc take a value in one write(2).
        fs::OpenOptions::new()
            .write(true)
            .open(name.file(&self.root))
            // The newline is what makes an empty value a value.
            .and_then(|mut file| file.write_all(format!("{value}\n").as_bytes()))
            .map_err(|source| SysctlError::Write { name: name.clone(), value: value.to_owned(), source })
    }

    /// Whether [`Settings::write`] would be allowed. Writes nothing.
    pub fn writable(&self, name: &Sysctl) -> bool {
        fs::OpenOptions::new().write(true).open(name.file(&self.root)).is_ok()
    }

    /// The settings `net/<family>/conf/<interface>/<setting>` that exist, with their values.
    pub(crate) fn per_interface(&self, family: &str, setting: &str) -> Vec<(Sysctl, String)> {
        let Ok(interfaces) = fs::read_dir(self.root.join(format!("net/{family}/conf"))) else { return Vec::new() };
        let mut found: Vec<_> = interfaces
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .map(|interface| Sysctl::new(format!("net/{family}/conf/{interface}/{setting}")))
            .filter_map(|name| self.read(&name).ok().map(|value| (name, value)))
            .collect();
        found.sort();
        found
    }
}

/// The file beside the admin socket in which [`Settings::apply`] keeps what was before.
pub fn record_beside(socket: &Path) -> PathBuf {
    socket.with_file_name("restore.json")
}

/// One setting shunt needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needed {
    pub name: Sysctl,
    pub value: Value,
    /// Half a sentence.
    pub why: &'static str,
    /// Settings the kernel changes by itself when this one is written.
    follows: &'static [(&'static str, &'static str)],
    /// Routes are served all the same where the kernel does not have it (`CONFIG_NF_CONNTRACK_TIMESTAMP`), or where it may
    /// not be set.
    pub optional: bool,
}

/// What a setting must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    Exactly(&'static str),
    /// A list of numbers and ranges that has at least these.
    Among {
        first: u16,
        last: u16,
    },
}

impl Value {
    /// What is to be written where it is `now` something else; `None`: it is as it must be.
    pub fn instead_of(self, now: &str) -> Option<String> {
        match self {
            Self::Exactly(value) => (now != value).then(|| value.to_owned()),
            Self::Among { first, last } => {
                // The kernel joins ranges that touch (`proc_do_large_bitmap`).
                let covers = |range: &str| {
                    let (from, to) = range.split_once('-').unwrap_or((range, range));
                    let number = |text: &str| text.trim().parse::<u16>().ok();
                    number(from).is_some_and(|from| from <= first) && number(to).is_some_and(|to| to >= last)
                };
                let has = now.split(',').any(covers);
                let others = if now.is_empty() { String::new() } else { format!("{now},") };
                (!has).then(|| format!("{others}{first}-{last}"))
            }
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(value) => f.write_str(value),
            Self::Among { first, last } => write!(f, "{first}-{last}"),
        }
    }
}

/// What the routes ask of the kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct Routes {
    /// The kernel forwards some …
    pub ipv4: bool,
    pub ipv6: bool,
    /// … and the daemon relays some …
    pub relayed: bool,
    /// … of which it hands some over.
    pub handed: bool,
}

/// The settings these routes need.
pub fn needed(routes: Routes) -> Vec<Needed> {
    let mut needed = Vec::new();
    if routes.relayed {
        needed.push(Needed {
            name: Sysctl::new("net/ipv4/tcp_tw_reuse"),
            value: Value::Exactly("1"),
            // tcp_twsk_unique(), v6.18
            why: "a source port towards a backend is used again after a second, not after a minute of TIME_WAIT",
            follows: &[],
            optional: true,
        });
    }
    if routes.handed {
        let (first, last) = (*RESERVED.start(), *RESERVED.end());
        needed.push(Needed {
            name: Sysctl::new("net/ipv4/ip_local_reserved_ports"),
            value: Value::Among { first, last },
            why: "the kernel does not give out source ports of connections that have been handed over",
            follows: &[],
            optional: true,
        });
    }
    if !routes.ipv4 && !routes.ipv6 {
        return needed;
    }
    if routes.ipv4 {
        needed.push(Needed {
            name: Sysctl::new("net/ipv4/ip_forward"),
            value: Value::Exactly("1"),
            why: "the kernel forwards IPv4 packets between interfaces",
            // inet_forward_change() and devinet_sysctl_forward(), v6.18
            follows: &[("ipv4", "forwarding"), ("ipv4", "accept_redirects")],
            optional: false,
        });
    }
    if routes.ipv6 {
        needed.push(Needed {
            name: Sysctl::new("net/ipv6/conf/all/forwarding"),
            value: Value::Exactly("1"),
            why: "the kernel forwards IPv6 packets between interfaces",
            // addrconf_fixup_forwarding(), v6.18
            follows: &[("ipv6", "forwarding")],
            optional: false,
        });
    }
    needed.push(Needed {
        name: Sysctl::new("net/netfilter/nf_conntrack_acct"),
        value: Value::Exactly("1"),
        why: "conntrack counts the packets and bytes of every connection",
        follows: &[],
        optional: false,
    });
    needed.push(Needed {
        name: Sysctl::new("net/netfilter/nf_conntrack_timestamp"),
        value: Value::Exactly("1"),
        why: "conntrack remembers when each connection began, also for the next daemon",
        follows: &[],
        optional: true,
    });
    needed
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub name: Sysctl,
    pub from: String,
    pub to: String,
    pub why: &'static str,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    pub changed: Vec<Change>,
    /// What an operator should know about it, one sentence each.
    pub warnings: Vec<String>,
}

impl Settings {
    /// What [`Settings::apply`] would change. Reads only.
    pub fn pending(&self, needed: &[Needed]) -> Result<Vec<Change>, SysctlError> {
        let mut pending = Vec::new();
        for need in needed {
            let Some(from) = self.read_needed(need)? else { continue };
            if let Some(to) = need.value.instead_of(&from) {
                pending.push(Change { name: need.name.clone(), from, to, why: need.why });
            }
        }
        Ok(pending)
    }

    /// `None`: this kernel does not have it, and need not.
    fn read_needed(&self, need: &Needed) -> Result<Option<String>, SysctlError> {
        match self.read(&need.name) {
            Err(SysctlError::Read { source, .. }) if need.optional && source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    /// Sets what is not yet as needed, and keeps in the file `record` what it was before, for [`restore`].
    /// Stops at the first setting that cannot be set; those before it stay set, and recorded.
    pub fn apply(&self, needed: &[Needed], record: &Path) -> Result<Applied, SysctlError> {
        let mut applied = Applied::default();
        for need in needed {
            let Some(from) = self.read_needed(need)? else { continue };
            let Some(to) = need.value.instead_of(&from) else { continue };
            if need.name.0 == "net/ipv6/conf/all/forwarding" {
                applied.warnings.extend(self.router_advertisements_lost());
            }
            match self.apply_one(need, &from, &to, record) {
                Err(error) if need.optional => {
                    applied.warnings.push(format!("{error}; with it, {}", need.why));
                    continue;
                }
                result => result?,
            }
            tracing::info!(sysctl = %need.name, from, to, "changed a kernel setting: {}", need.why);
            applied.changed.push(Change { name: need.name.clone(), from, to, why: need.why });
        }
        Ok(applied)
    }

    fn apply_one(&self, need: &Needed, from: &str, to: &str, record: &Path) -> Result<(), SysctlError> {
        let follows = need.follows.iter().flat_map(|(family, setting)| self.per_interface(family, setting));
        let before: Vec<_> = follows.filter(|(name, _)| *name != need.name).collect();
        let pair = Pair { was: from.to_owned(), set: to.to_owned() };
        let mut entry = Entry { pair, followed: BTreeMap::new() };
        // Recorded first: dying between the two leaves a record of a change that did not happen, which restore skips.
        record::remember(record, &need.name, &entry)?;
        self.write(&need.name, to)?;
        // As the kernel writes it: a list comes back sorted and joined.
        let set = self.read(&need.name)?;
        let rewritten = set != entry.pair.set;
        entry.pair.set = set;
        // Also those that did not change: writing the old value of this setting will change them.
        entry.followed = before
            .into_iter()
            .filter_map(|(name, was)| self.read(&name).ok().map(|set| (name, Pair { was, set })))
            .collect();
        if entry.followed.is_empty() && !rewritten { Ok(()) } else { record::remember(record, &need.name, &entry) }
    }

    /// A router does not accept router advertisements unless `accept_ra` is 2 (`ipv6_accept_ra`, v6.18): interfaces that
    /// got addresses or routes that way would lose them when they expire.
    pub fn router_advertisements_lost(&self) -> Vec<String> {
        let learnt = learnt_from_advertisements(&fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default());
        self.per_interface("ipv6", "accept_ra")
            .into_iter()
            .filter(|(_, value)| value == "1")
            .filter_map(|(name, _)| {
                let interface = name.interface()?;
                learnt.iter().any(|known| known == interface).then(|| {
                    format!(
                        "{interface} gets its IPv6 routes by router advertisements, which a forwarding host ignores while \
                         {name} is 1: set it to 2 (sysctl -w {name}=2)"
                    )
                })
            })
            .collect()
    }
}

/// Interfaces with a route that came by router advertisement: flag `RTF_ADDRCONF` in `/proc/net/ipv6_route`.
fn learnt_from_advertisements(ipv6_route: &str) -> Vec<String> {
    const RTF_ADDRCONF: u32 = 0x0004_0000;
    let mut interfaces: Vec<String> = ipv6_route
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let flags = u32::from_str_radix(fields.nth(8)?, 16).ok()?;
            let interface = fields.next()?;
            (flags & RTF_ADDRCONF != 0).then(|| interface.to_owned())
        })
        .collect();
    interfaces.sort();
    interfaces.dedup();
    interfaces
}

#[cfg(test)]
mod tests;
