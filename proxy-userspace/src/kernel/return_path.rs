//! The way back of connections that the daemon dials from the client's own address: what a backend sends to the client
//! must reach the daemon's socket instead of being forwarded.
//!
//! Three things lead it there: a table that marks packets with a transparent socket ([`TransparentTable`]), a routing rule for
//! that mark, and a route "everything is this machine" in the rule's table. Made together or not at all, adopted from a
//! daemon before this one, and left behind until [`remove`].

use std::{fs, path::Path, time::Duration};

use nix::errno::Errno;

use super::{
    nft::{NftError, TRANSPARENT_TABLE, TransparentTable},
    routing::{Family, Foreign, Piece, Policy, Routing, RoutingError},
};

/// Chosen to be nobody else's. The bit is above what Kubernetes, Tailscale and their like use of the mark, and not in the
/// marks of wg-quick and Mullvad; 29544 is "sh" in ASCII; 954 goes before VRF's rule (1000) and Tailscale's (5210 on).
pub const POLICY: Policy = Policy { mark: 0x1000_0000, priority: 954, table: 29_544, protocol: 115 };

const USES_MARKS: &str = "net.ipv4.conf.all.src_valid_mark";

/// How soon it is put back when somebody takes it away: systemd-networkd removes rules it does not know when it starts.
const WATCHING: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum ReturnPathError {
    #[error("source_address = \"client\": {0} is somebody else's, where shunt's must be")]
    Taken(Foreign),
    /// The question where a packet may have come from would take the rule of its mark too, and find this machine.
    #[error("source_address = \"client\": {USES_MARKS} is 1: the kernel would drop what the backends answer")]
    MarksInReversePath,
    #[error("source_address = \"client\": table inet {TRANSPARENT_TABLE} belongs to another running process")]
    OwnedByOther,
    #[error("source_address = \"client\": {0}")]
    Routing(#[from] RoutingError),
    #[error("source_address = \"client\": {0}")]
    Nft(#[from] NftError),
}

impl ReturnPathError {
    /// One line of how to mend it.
    pub fn mend(&self) -> Option<String> {
        let Policy { mark, priority, table, .. } = POLICY;
        match self {
            Self::Taken(_) => Some(format!(
                "`ip rule; ip -6 rule; ip route show table {table}` show it: mark bit {mark:#x}, table {table} and rule \
                 priority {priority} must be shunt's alone"
            )),
            Self::MarksInReversePath => {
                Some(format!("sysctl -w {USES_MARKS}=0 (wg-quick sets it for a default route)"))
            }
            Self::OwnedByOther => Some(format!("`nft list table inet {TRANSPARENT_TABLE}` names it: stop it first")),
            Self::Routing(RoutingError::Refused { errno: Errno::EPERM, .. }) => {
                Some("run as root, or give the service AmbientCapabilities=CAP_NET_ADMIN".into())
            }
            Self::Routing(RoutingError::Refused { errno: Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT, .. }) => {
                Some("a kernel built with CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES".into())
            }
            Self::Routing(_) => None,
            Self::Nft(error) => error.mend(),
        }
    }

    /// 4 where a privilege or a kernel feature is missing, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Taken(_) | Self::MarksInReversePath | Self::OwnedByOther => 1,
            Self::Routing(RoutingError::Refused { errno, .. }) => {
                u8::from(matches!(errno, Errno::EPERM | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT)) * 3 + 1
            }
            Self::Routing(_) => 1,
            Self::Nft(error) => error.exit_code(),
        }
    }
}

/// The way back, in the kernel. It stays there when this is dropped; a locked table is then nobody's.
#[derive(Debug)]
pub struct ReturnPath {
    table: TransparentTable,
    routing: Routing,
    lock: bool,
}

/// A way back that was just made. Dropped, it is taken back as far as it was not there before.
#[derive(Debug)]
#[must_use = "dropping it takes the way back away again"]
pub struct SetUp {
    path: Option<ReturnPath>,
    made: Vec<Made>,
}

#[derive(Debug)]
enum Made {
    Piece(Family, Piece),
    Table,
}

impl ReturnPath {
    /// `lock`: the table is this process's alone.
    pub fn set_up(lock: bool) -> Result<SetUp, ReturnPathError> {
        let mut path = Self { table: TransparentTable::open()?, routing: Routing::open()?, lock };
        let missing = missing(&mut path.routing)?;
        let before = path.table.state()?;
        if before.is_some_and(|table| table.owned_by_other) {
            return Err(ReturnPathError::OwnedByOther);
        }
        let mut set_up = SetUp { path: None, made: Vec::new() };
        let result = path.make(missing, &mut set_up.made);
        // The table last: from then on packets take this way.
        let result = result.and_then(|()| Ok(path.table.put(POLICY.mark, lock)?));
        if result.is_ok() && before.is_none() {
            set_up.made.push(Made::Table);
        }
        set_up.path = Some(path);
        result.map(|()| set_up)
    }

    /// Looks after it for as long as the task runs.
    pub async fn watch(mut self) {
        let mut told = String::new();
        loop {
            tokio::time::sleep(WATCHING).await;
            match self.restore() {
                Ok(false) => told.clear(),
                Ok(true) => tracing::warn!("the way back of source_address = \"client\" was damaged, and is repaired"),
                Err(error) if error.to_string() != told => {
                    tracing::error!(%error, "the way back of source_address = \"client\" cannot be repaired");
                    told = error.to_string();
                }
                Err(_) => {}
            }
        }
    }

    /// Whether something had to be put back.
    fn restore(&mut self) -> Result<bool, ReturnPathError> {
        let missing = missing(&mut self.routing)?;
        let damaged = !missing.is_empty();
        self.make(missing, &mut Vec::new())?;
        if self.table.is_whole(POLICY.mark)? {
            return Ok(damaged);
        }
        self.table.put(POLICY.mark, self.lock)?;
        Ok(true)
    }

    fn make(&mut self, missing: Vec<(Family, Piece)>, made: &mut Vec<Made>) -> Result<(), ReturnPathError> {
        for (family, piece) in missing {
            self.routing.add(family, piece, POLICY)?;
            made.push(Made::Piece(family, piece));
        }
        Ok(())
    }
}

impl SetUp {
    /// It stays.
    pub fn keep(mut self) -> Option<ReturnPath> {
        self.made.clear();
        self.path.take()
    }
}

impl Drop for SetUp {
    fn drop(&mut self) {
        let Some(path) = &mut self.path else { return };
        for made in self.made.drain(..).rev() {
            let undone = match made {
                Made::Piece(family, piece) => path.routing.remove(family, piece, POLICY).map_err(ReturnPathError::from),
                Made::Table => path.table.remove().map(drop).map_err(ReturnPathError::from),
            };
            if let Err(error) = undone {
                tracing::warn!(%error, "left behind; `shunt cleanup` removes it");
            }
        }
    }
}

/// Rules and routes are there; or could be: nobody else has what they need.
pub fn is_in_place() -> Result<bool, ReturnPathError> {
    Ok(missing(&mut Routing::open()?)?.is_empty())
}

fn missing(routing: &mut Routing) -> Result<Vec<(Family, Piece)>, ReturnPathError> {
    if is_set(USES_MARKS, "1") {
        return Err(ReturnPathError::MarksInReversePath);
    }
    let mut missing = Vec::new();
    for family in families() {
        let found = routing.find(family, POLICY)?;
        if let Some(foreign) = found.foreign {
            return Err(ReturnPathError::Taken(foreign));
        }
        missing.extend(PIECES.into_iter().filter(|piece| !found.has(*piece)).map(|piece| (family, piece)));
    }
    Ok(missing)
}

/// Takes away what a daemon has left behind, each in words.
pub fn remove() -> Result<Vec<String>, ReturnPathError> {
    let mut done = Vec::new();
    if TransparentTable::open()?.remove()? {
        done.push(format!("deleted table inet {TRANSPARENT_TABLE}"));
    }
    let mut routing = Routing::open()?;
    for family in [Family::V4, Family::V6].into_iter().filter(|family| exists(*family)) {
        let found = routing.find(family, POLICY)?;
        for piece in PIECES.into_iter().rev().filter(|piece| found.has(*piece)) {
            routing.remove(family, piece, POLICY)?;
            let version = match family {
                Family::V4 => "IPv4",
                Family::V6 => "IPv6",
            };
            done.push(match piece {
                Piece::Route => format!("deleted the {version} route of table {}", POLICY.table),
                Piece::Rule => format!("deleted the {version} routing rule {}", POLICY.priority),
            });
        }
    }
    Ok(done)
}

/// In the order they are made in.
const PIECES: [Piece; 2] = [Piece::Route, Piece::Rule];

/// Those that connections can be of: without IPv6 on the loopback interface a route there is refused.
fn families() -> impl Iterator<Item = Family> {
    let v6 = is_set("net.ipv6.conf.lo.disable_ipv6", "0");
    [Family::V4, Family::V6].into_iter().filter(move |family| *family == Family::V4 || v6)
}

/// The setting has that value.
fn is_set(sysctl: &str, wanted: &str) -> bool {
    fs::read_to_string(format!("/proc/sys/{}", sysctl.replace('.', "/"))).is_ok_and(|value| value.trim() == wanted)
}

fn exists(family: Family) -> bool {
    family == Family::V4 || Path::new("/proc/sys/net/ipv6").exists()
}
