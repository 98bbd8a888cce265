//! What can go wrong between shunt and nf_tables, and whose fault it is.

use std::fmt;

use nix::errno::Errno;
use proxy_core::{
    diff::Change,
    ruleset::{Field, Key, SetSpec, TABLE},
};

use super::set::field_bytes;
use crate::kernel::netlink::{SyscallError, TooLong};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NftError {
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// `CAP_NET_ADMIN` is missing in the network namespace.
    #[error("nf_tables may not be changed: CAP_NET_ADMIN is missing in this network namespace")]
    NotPermitted,
    #[error("table inet {TABLE} belongs to another running process")]
    OwnedByOther,
    /// Before v6.9, or the table exists and was never locked.
    #[error("table inet {TABLE} cannot be locked: the kernel is older than 6.9, or the table exists unlocked")]
    CannotLock,
    /// At least one; nothing of the batch was taken.
    #[error("{}", Refusals(.0))]
    Refused(Vec<Refusal>),
    #[error("the kernel's answers to a batch were lost, and the ruleset did not change")]
    LostAnswers,
    /// Others changed the ruleset each time it was read.
    #[error("the ruleset kept changing while it was read")]
    Interrupted,
    #[error("the kernel refused to tell {what}: {errno}")]
    NotTold { what: &'static str, errno: Errno },
    #[error("the kernel's answer about {0} makes no sense")]
    Malformed(&'static str),
    #[error("{0:?} cannot be a name in nf_tables: 1 to 255 bytes without NUL")]
    Name(String),
    #[error("a rule of chain {chain} has more than 128 expressions")]
    RuleTooLong { chain: String },
    #[error("set {set}: {why}")]
    Unsupported { set: String, why: &'static str },
    #[error(transparent)]
    TooLong(#[from] TooLong),
}

/// A change the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its place in the batch; `None` when the batch as a whole was refused.
    pub change: Option<usize>,
    /// What it was about, in words.
    pub object: String,
    pub errno: Errno,
    /// The kernel's own words, where it has some.
    pub text: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.errno.desc())?;
        self.text.as_ref().map_or(Ok(()), |text| write!(f, " ({text})"))
    }
}

struct Refusals<'a>(&'a [Refusal]);

impl fmt::Display for Refusals<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => write!(f, "the kernel refused a batch"),
            [one] => write!(f, "the kernel refused {one}"),
            [first, rest @ ..] => write!(f, "the kernel refused {first}, and {} more", rest.len()),
        }
    }
}

impl NftError {
    /// The refusals that have a meaning of their own, or all of them.
    pub(super) fn from_refusals(refusals: Vec<Refusal>, changes: &[Change]) -> Self {
        let locks = |refusal: &Refusal| {
            let change = refusal.change.and_then(|index| changes.get(index));
            matches!(change, Some(Change::AddTable { lock: true }))
        };
        let not_supported = |errno| matches!(errno, Errno::EOPNOTSUPP | Errno::EINVAL);
        if refusals.iter().any(|refusal| refusal.errno == Errno::EPERM && refusal.change.is_none()) {
            Self::NotPermitted
        } else if refusals.iter().any(|refusal| refusal.errno == Errno::EPERM) {
            Self::OwnedByOther
        } else if refusals.iter().any(|refusal| locks(refusal) && not_supported(refusal.errno)) {
            Self::CannotLock
        } else {
            Self::Refused(refusals)
        }
    }
}

impl NftError {
    /// What to do about it, one line.
    pub fn mend(&self) -> Option<String> {
        let mend = match self {
            Self::NotPermitted => "run as root, or give the service AmbientCapabilities=CAP_NET_ADMIN",
            Self::OwnedByOther => "stop the other shunt daemon of this network namespace first",
            Self::CannotLock => "set kernel.lock_table = false",
            Self::Refused(_) => {
                "`shunt doctor` shows what this kernel lacks; `shunt plan --format nft` shows what was asked of it"
            }
            Self::Interrupted => "something rewrites nftables all the time: find it with `nft monitor`",
            Self::Syscall(_) | Self::LostAnswers | Self::NotTold { .. } => {
                "`shunt doctor` shows what this kernel lacks"
            }
            Self::Malformed(_)
            | Self::Name(_)
            | Self::RuleTooLong { .. }
            | Self::Unsupported { .. }
            | Self::TooLong(_) => {
                return None;
            }
        };
        Some(mend.to_owned())
    }

    /// 4 where a privilege or a kernel feature is missing, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotPermitted | Self::CannotLock => 4,
            Self::Refused(refusals)
                if refusals.iter().any(|r| matches!(r.errno, Errno::EOPNOTSUPP | Errno::ENOENT)) =>
            {
                4
            }
            Self::Syscall(_)
            | Self::OwnedByOther
            | Self::Refused(_)
            | Self::LostAnswers
            | Self::Interrupted
            | Self::NotTold { .. }
            | Self::Malformed(_)
            | Self::Name(_)
            | Self::RuleTooLong { .. }
            | Self::Unsupported { .. }
            | Self::TooLong(_) => 1,
        }
    }
}

/// A change in words: `element 10.0.0.1 . 6 . 80 of set r4`.
pub(super) fn describe(change: &Change) -> String {
    match change {
        Change::AddTable { .. } | Change::DeleteTable => format!("table inet {TABLE}"),
        Change::AddTimeout { name, .. } | Change::DeleteTimeout { name } => format!("ct timeout {name}"),
        Change::AddSet { name, .. } | Change::DeleteSet { name } => format!("set {name}"),
        Change::AddElement { set, spec, key, .. } => format!("new element {} of set {set}", Shown(spec, key)),
        Change::DeleteElement { set, spec, key, .. } => format!("old element {} of set {set}", Shown(spec, key)),
        Change::AddChain { name, .. } | Change::DeleteChain { name } => format!("chain {name}"),
        Change::AddRules { chain, .. } => format!("a rule of chain {chain}"),
        Change::FlushChain { name } => format!("the rules of chain {name}"),
    }
}

/// A key in nft's spelling.
struct Shown<'a>(&'a SetSpec, &'a Key);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.1.bytes();
        for (index, field) in self.0.key.iter().enumerate() {
            let (bytes, behind) = rest.split_at(field_bytes(*field).next_multiple_of(4).min(rest.len()));
            rest = behind;
            if index > 0 {
                f.write_str(" . ")?;
            }
            field_value(f, *field, bytes)?;
        }
        Ok(())
    }
}

fn field_value(f: &mut fmt::Formatter<'_>, field: Field, bytes: &[u8]) -> fmt::Result {
    let word = bytes.first_chunk::<4>().copied();
    match (field, word, bytes.first_chunk::<16>().copied()) {
        (Field::Mark, Some(word), _) => write!(f, "{:#010x}", u32::from_ne_bytes(word)),
        (Field::Slot, Some(word), _) => write!(f, "{}", u32::from_ne_bytes(word)),
        (Field::Ipv4, Some(word), _) => write!(f, "{}", std::net::Ipv4Addr::from(word)),
        (Field::Ipv6, _, Some(address)) => write!(f, "{}", std::net::Ipv6Addr::from(address)),
        (Field::Protocol, Some(word), _) => write!(f, "{}", word[0]),
        (Field::Port, Some(word), _) => write!(f, "{}", u16::from_be_bytes([word[0], word[1]])),
        (Field::Mark | Field::Slot | Field::Ipv4 | Field::Ipv6 | Field::Protocol | Field::Port, _, _) => {
            write!(f, "{bytes:02x?}")
        }
    }
}
