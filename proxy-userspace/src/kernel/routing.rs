//! One routing rule and one route per family, through rtnetlink: packets with a mark are for this machine, whatever their
//! destination.
//!
//! Two requests and two dumps are too little for a crate of their own.

use std::fmt;

use nix::errno::Errno;

use super::netlink::{Attributes, NetlinkSocket, SyscallError, TooLong, Writer};

/// What is there is recognised by all of this together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The mark, and the mask it is looked at with.
    pub mark: u32,
    pub priority: u32,
    pub table: u32,
    /// Who made it (`rtm_protocol`, `FRA_PROTOCOL`).
    pub protocol: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// What is made, in this order, for each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// `ip route add local default dev lo table T`
    Route,
    /// `ip rule add fwmark M/M lookup T`
    Rule,
}

#[derive(Debug, thiserror::Error)]
pub enum RoutingError {
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    #[error("the kernel refused to {what}: {errno}{}", .text.as_ref().map_or(String::new(), |text| format!(" ({text})")))]
    Refused { what: String, errno: Errno, text: Option<String> },
    #[error("the kernel's answer to \"{0}\" was lost")]
    NoAnswer(String),
    #[error(transparent)]
    TooLong(#[from] TooLong),
}

/// A dump that others keep changing is begun again so often.
const TRIES: usize = 8;
/// Bytes of `struct rtmsg` and `struct fib_rule_hdr`.
const FIXED: usize = 12;
/// `LOOPBACK_IFINDEX`
const LOOPBACK: u32 = 1;
const REQUEST: i32 = libc::NLM_F_REQUEST | libc::NLM_F_ACK;

/// `RTA_OIF`, `RTA_TABLE`
const ROUTE_INTERFACE: u16 = 4;
const ROUTE_TABLE: u16 = 15;
/// `FRA_PRIORITY`, `FRA_FWMARK`, `FRA_TABLE`, `FRA_FWMASK`, `FRA_PROTOCOL` (`include/uapi/linux/fib_rules.h`)
const RULE_PRIORITY: u16 = 6;
const RULE_MARK: u16 = 10;
const RULE_TABLE: u16 = 15;
const RULE_MASK: u16 = 16;
const RULE_PROTOCOL: u16 = 21;
/// `FR_ACT_TO_TBL`
const TO_TABLE: u8 = 1;

/// A rule or route that somebody else made and that is in the way, as `ip` would print it.
pub type Foreign = String;

/// What there is of a policy in one family.
#[derive(Debug, Default)]
pub struct Found {
    pub route: bool,
    pub rule: bool,
    pub foreign: Option<Foreign>,
}

impl Found {
    pub fn has(&self, piece: Piece) -> bool {
        match piece {
            Piece::Route => self.route,
            Piece::Rule => self.rule,
        }
    }
}

#[derive(Debug)]
pub struct Routing {
    socket: NetlinkSocket,
}

impl Routing {
    /// Opens the socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, RoutingError> {
        let socket = NetlinkSocket::open(mnl::Bus::Route)?;
        socket.strict_dumps()?;
        Ok(Self { socket })
    }

    pub fn add(&mut self, family: Family, piece: Piece, policy: Policy) -> Result<(), RoutingError> {
        let (new, create) = (piece.messages().0, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        let what = format!("add {}", Shown(family, piece, policy));
        self.request(&what, new, REQUEST | create, &piece.body(family, policy), |_| {})
    }

    pub fn remove(&mut self, family: Family, piece: Piece, policy: Policy) -> Result<(), RoutingError> {
        let what = format!("delete {}", Shown(family, piece, policy));
        self.request(&what, piece.messages().1, REQUEST, &piece.body(family, policy), |_| {})
    }

    pub fn find(&mut self, family: Family, policy: Policy) -> Result<Found, RoutingError> {
        let mut found = Found::default();
        let mut filter = Writer::new();
        filter.put(ROUTE_TABLE, &policy.table.to_ne_bytes());
        let routes = self.dump("list the routes of the table", libc::RTM_GETROUTE, family, filter.bytes());
        let routes = match routes {
            // The table has never been used.
            Err(RoutingError::Refused { errno: Errno::ENOENT, .. }) => Vec::new(),
            routes => routes?,
        };
        for route in routes {
            let Some((fixed, attributes)) = taken_apart(&route) else { continue };
            if word(attributes, ROUTE_TABLE) != Some(policy.table) {
                continue;
            }
            match is_our_route(fixed, attributes, policy) {
                true => found.route = true,
                false => found.foreign = Some(format!("a route in table {}", policy.table)),
            }
        }
        for rule in self.dump("list the routing rules", libc::RTM_GETRULE, family, &[])? {
            let Some((fixed, attributes)) = taken_apart(&rule) else { continue };
            let rule = Rule::read(fixed, attributes);
            match rule.is_of(policy) {
                true => found.rule = true,
                false if rule.is_in_the_way_of(policy) => found.foreign = Some(format!("rule \"{rule}\"")),
                false => {}
            }
        }
        Ok(found)
    }

    fn dump(&mut self, what: &str, kind: u16, family: Family, attributes: &[u8]) -> Result<Vec<Vec<u8>>, RoutingError> {
        let mut body = vec![0; FIXED];
        body[0] = family.number();
        body.extend(attributes);
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
        for _ in 0..TRIES {
            let mut objects = Vec::new();
            match self.request(what, kind, flags, &body, |payload| objects.push(payload.to_vec())) {
                Err(RoutingError::Refused { errno: Errno::EINTR, .. }) => {}
                result => return result.map(|()| objects),
            }
        }
        Err(RoutingError::Refused { what: what.to_owned(), errno: Errno::EINTR, text: None })
    }

    /// Every message that is not the kernel's last word goes to `each`. The answer, or the next part of a dump, is queued
    /// when the call before returns (`netlink_dump`), so an empty queue is the end.
    fn request(
        &mut self,
        what: &str,
        kind: u16,
        flags: i32,
        body: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), RoutingError> {
        let sequence = self.socket.take_sequence(1);
        let mut writer = Writer::new();
        let message = writer.message(kind, flags as u16, sequence, body);
        writer.end_message(message);
        self.socket.send(&writer.finish()?)?;
        let mut interrupted = false;
        while let Some(messages) = self.socket.receive()? {
            for message in messages.filter(|message| message.sequence == sequence) {
                interrupted |= i32::from(message.flags) & libc::NLM_F_DUMP_INTR != 0;
                let Some(answer) = message.answer() else {
                    each(message.payload);
                    continue;
                };
                let errno = answer.errno.or(interrupted.then_some(Errno::EINTR));
                return match errno {
                    None => Ok(()),
                    Some(errno) => Err(RoutingError::Refused { what: what.to_owned(), errno, text: answer.text }),
                };
            }
        }
        Err(RoutingError::NoAnswer(what.to_owned()))
    }
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::V4 => libc::AF_INET as u8,
            Self::V6 => libc::AF_INET6 as u8,
        }
    }
}

impl Piece {
    /// To make it, to remove it.
    fn messages(self) -> (u16, u16) {
        match self {
            Self::Route => (libc::RTM_NEWROUTE, libc::RTM_DELROUTE),
            Self::Rule => (libc::RTM_NEWRULE, libc::RTM_DELRULE),
        }
    }

    /// What follows the header of a message about it.
    fn body(self, family: Family, policy: Policy) -> Vec<u8> {
        let Policy { mark, priority, table, protocol } = policy;
        let mut body = Writer::new();
        match self {
            Self::Route => {
                body.put(ROUTE_TABLE, &table.to_ne_bytes());
                body.put(ROUTE_INTERFACE, &LOOPBACK.to_ne_bytes());
            }
            Self::Rule => {
                body.put(RULE_PRIORITY, &priority.to_ne_bytes());
                body.put(RULE_MARK, &mark.to_ne_bytes());
                body.put(RULE_MASK, &mark.to_ne_bytes());
                body.put(RULE_TABLE, &table.to_ne_bytes());
                body.put(RULE_PROTOCOL, &[protocol]);
            }
        }
        // family, dst_len, src_len, tos, table (an attribute), then protocol, scope, type or two reserved bytes and the
        // action; flags
        let kind = match self {
            Self::Route => [protocol, libc::RT_SCOPE_HOST, libc::RTN_LOCAL],
            Self::Rule => [0, 0, TO_TABLE],
        };
        let mut whole = vec![family.number(), 0, 0, 0, libc::RT_TABLE_UNSPEC];
        whole.extend(kind);
        whole.extend([0; 4]);
        whole.extend(body.bytes());
        whole
    }
}

/// The fixed part of a message and its attributes.
fn taken_apart(payload: &[u8]) -> Option<(&[u8; FIXED], Attributes<'_>)> {
    let fixed = payload.first_chunk()?;
    Some((fixed, Attributes::new(payload.get(FIXED..)?)))
}

fn word(attributes: Attributes<'_>, kind: u16) -> Option<u32> {
    attributes.find(kind)?.payload.first_chunk().copied().map(u32::from_ne_bytes)
}

/// `rtm_dst_len`, `rtm_protocol`, `rtm_type`
fn is_our_route(fixed: &[u8; FIXED], attributes: Attributes<'_>, policy: Policy) -> bool {
    fixed[1] == 0
        && fixed[5] == policy.protocol
        && fixed[7] == libc::RTN_LOCAL
        && word(attributes, ROUTE_INTERFACE) == Some(LOOPBACK)
}

/// A rule of the kernel, as far as it matters.
#[derive(Debug)]
struct Rule {
    priority: u32,
    mark: u32,
    mask: u32,
    /// 0 for a rule that does something else.
    table: u32,
    protocol: u8,
}

impl Rule {
    fn read(fixed: &[u8; FIXED], attributes: Attributes<'_>) -> Self {
        let word = |kind| word(attributes, kind).unwrap_or(0);
        Self {
            priority: word(RULE_PRIORITY),
            mark: word(RULE_MARK),
            mask: word(RULE_MASK),
            table: if fixed[7] == TO_TABLE { word(RULE_TABLE) } else { 0 },
            protocol: attributes.find(RULE_PROTOCOL).and_then(|it| it.payload.first().copied()).unwrap_or(0),
        }
    }

    fn is_of(&self, policy: Policy) -> bool {
        let Policy { mark, priority, table, protocol } = policy;
        (self.priority, self.mark, self.mask) == (priority, mark, mark)
            && (self.table, self.protocol) == (table, protocol)
    }

    /// It looks for the same mark, or uses the same table or place.
    fn is_in_the_way_of(&self, policy: Policy) -> bool {
        self.mark & self.mask & policy.mark != 0 || self.table == policy.table || self.priority == policy.priority
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: fwmark {:#x}/{:#x} lookup {}", self.priority, self.mark, self.mask, self.table)
    }
}

/// As one would write it for `ip`.
struct Shown(Family, Piece, Policy);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(family, piece, Policy { mark, priority, table, .. }) = self;
        let family = match family {
            Family::V4 => "-4",
            Family::V6 => "-6",
        };
        match piece {
            Piece::Route => write!(f, "`ip {family} route local default dev lo table {table}`"),
            Piece::Rule => write!(f, "`ip {family} rule fwmark {mark:#x}/{mark:#x} lookup {table} pref {priority}`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Policy = Policy { mark: 0x1000_0000, priority: 954, table: 29_544, protocol: 115 };

    /// The rule as the kernel tells it.
    fn told(policy: Policy) -> Rule {
        let body = Piece::Rule.body(Family::V6, policy);
        let (fixed, attributes) = taken_apart(&body).expect("long enough");
        Rule::read(fixed, attributes)
    }

    #[test]
    fn what_it_makes_it_recognises() {
        assert!(told(OURS).is_of(OURS));
        let body = Piece::Route.body(Family::V4, OURS);
        let (fixed, attributes) = taken_apart(&body).expect("long enough");
        assert!(is_our_route(fixed, attributes, OURS));
        assert!(!is_our_route(fixed, attributes, Policy { protocol: 4, ..OURS }));
    }

    #[test]
    fn a_rule_is_in_the_way_when_it_has_a_thing_in_common_and_is_not_ours() {
        let apart = Policy { mark: 0xca6c, priority: 5210, table: 51_820, protocol: 4 };
        assert!(!told(apart).is_in_the_way_of(OURS));
        for near in [
            Policy { mark: 0x3000_0000, ..apart },
            Policy { priority: OURS.priority, ..apart },
            Policy { table: OURS.table, ..apart },
        ] {
            assert!(told(near).is_in_the_way_of(OURS) && !told(near).is_of(OURS), "{near:?}");
        }
        // A foreign rule that looks at the whole mark for another value never sees ours.
        let whole = Rule { mark: 0xca6c, mask: u32::MAX, ..told(apart) };
        assert!(!whole.is_in_the_way_of(OURS));
    }

    #[test]
    fn messages_cut_off_anywhere_are_read_without_a_panic() {
        let body = Piece::Rule.body(Family::V4, OURS);
        // The last three bytes are padding.
        for length in 0..body.len() - 3 {
            let rule = taken_apart(&body[..length]).map(|(fixed, attributes)| Rule::read(fixed, attributes));
            assert!(!rule.is_some_and(|rule| rule.is_of(OURS)));
        }
    }
}
