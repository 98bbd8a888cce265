//! A small table of its own, `inet shunt_transparent`: it marks the packets that belong to a transparent socket of this
//! machine, so that a routing rule can lead them to it ([`crate::kernel::return_path`]).
//!
//! Two chains. The first asks for a socket, and every packet that has none is through with it. The second leaves out what
//! would only be caught by a listener on all addresses (somebody else's): such a listener would get what is forwarded to
//! other machines. It asks for that second, since the kernel cannot answer it of a socket in TIME_WAIT (`nft_socket_eval`),
//! which must go on getting its packets.

use nftnl::nftnl_sys as sys;
use proxy_core::diff::{Fingerprint, TableState};

use super::{
    NftError, Refusal,
    atom::{self, FIRST, META_MARK, META_PROTOCOL},
    batch::{APPEND, BATCH, CREATE, INET, REQUEST, kind},
    expression::{Expression, RuleObject},
    read,
    statement::join,
    uapi::{BATCH_BEGIN, BATCH_END, chain, msg, table, verdict},
};
use crate::kernel::netlink::{NetlinkSocket, Writer};

pub const TRANSPARENT_TABLE: &str = "shunt_transparent";

const ENTRY: &str = "pre";
const MARKING: &str = "local";
/// After everything others do with marks on the way in: restore them from conntrack (mangle), or look up with them the way
/// back (`fib saddr . mark`, firewalld's IPv6_rpfilter at 10).
const PRIORITY: i32 = 300;
/// `NF_INET_PRE_ROUTING`
const PREROUTING: u32 = 0;

/// The table, through a socket that owns it when it is locked.
#[derive(Debug)]
pub struct TransparentTable {
    socket: NetlinkSocket,
}

impl TransparentTable {
    /// Opens the socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NftError> {
        Ok(Self { socket: NetlinkSocket::open(mnl::Bus::Netfilter)? })
    }

    /// `None`: there is no such table.
    pub fn state(&mut self) -> Result<Option<TableState>, NftError> {
        read::read_table(&mut self.socket, TRANSPARENT_TABLE)
    }

    /// The table is there, and holds the rules that [`Self::put`] makes for this mark and no others.
    pub fn is_whole(&mut self, mark: u32) -> Result<bool, NftError> {
        let of_chain = |(chain, expressions): &(&str, Vec<Expression>)| {
            ((*chain).to_owned(), join(expressions.iter().map(Expression::print)))
        };
        let mut wanted: Vec<(String, Fingerprint)> = rules(mark)?.iter().map(of_chain).collect();
        let mut found = read::rules(&mut self.socket, TRANSPARENT_TABLE)?;
        // Stable: the order within a chain stays.
        wanted.sort_by(|a, b| a.0.cmp(&b.0));
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found == wanted)
    }

    /// Puts the table into the kernel, in the place of one that is there. One batch.
    pub fn put(&mut self, mark: u32, lock: bool) -> Result<(), NftError> {
        let before = self.state()?;
        let mut messages = Messages::new(self.socket.take_sequence(MESSAGES));
        if let Some(before) = before {
            messages.delete(before);
        }
        messages.add_table(lock);
        messages.add_chain(ENTRY, Some(PRIORITY));
        messages.add_chain(MARKING, None);
        for (chain, expressions) in rules(mark)? {
            messages.add_rule(chain, expressions)?;
        }
        self.commit(messages)
    }

    /// Removes the table. False: there was none.
    pub fn remove(&mut self) -> Result<bool, NftError> {
        let Some(before) = self.state()? else { return Ok(false) };
        let mut messages = Messages::new(self.socket.take_sequence(MESSAGES));
        messages.delete(before);
        self.commit(messages).map(|()| true)
    }

    fn commit(&mut self, messages: Messages) -> Result<(), NftError> {
        self.socket.send(&messages.finish()?)?;
        let mut refusals = Vec::new();
        // Queued when `sendmsg` returns (`nfnetlink_rcv_batch`).
        while let Some(received) = self.socket.receive()? {
            for answer in received.filter_map(|message| message.answer()) {
                let Some(errno) = answer.errno else { continue };
                let object = format!("table inet {TRANSPARENT_TABLE}");
                refusals.push(Refusal { change: None, object, errno, text: answer.text });
            }
        }
        match refusals.is_empty() {
            true => Ok(()),
            false => Err(NftError::from_refusals(refusals, &[])),
        }
    }
}

/// More than a batch of this table ever has.
const MESSAGES: u32 = 16;

/// `NFT_SOCKET_TRANSPARENT`, `NFT_SOCKET_WILDCARD`
const SOCKET_TRANSPARENT: u32 = 0;
const SOCKET_WILDCARD: u32 = 2;

/// Each with its chain, in order.
fn rules(mark: u32) -> Result<Vec<(&'static str, Vec<Expression>)>, NftError> {
    let udp = libc::IPPROTO_UDP as u8;
    Ok(vec![
        // Not only TCP: an ICMP error about one of its packets ("fragmentation needed") has a socket too.
        (
            ENTRY,
            vec![
                atom::meta(META_PROTOCOL, FIRST),
                atom::compare(false, &[udp]),
                socket(SOCKET_TRANSPARENT),
                atom::compare(true, &[1]),
                atom::verdict(verdict::GOTO, Some(MARKING))?,
            ],
        ),
        (MARKING, vec![socket(SOCKET_WILDCARD), atom::compare(true, &[1]), atom::verdict(verdict::RETURN, None)?]),
        (
            MARKING,
            vec![
                atom::meta(META_MARK, FIRST),
                atom::bitwise(FIRST, &(!mark).to_ne_bytes(), &mark.to_ne_bytes()),
                Expression::new(c"meta").u32(sys::NFTNL_EXPR_META_KEY, META_MARK).u32(sys::NFTNL_EXPR_META_SREG, FIRST),
            ],
        ),
    ])
}

/// What the socket that a packet belongs to is, into the first register; a packet without one is through with the rule.
fn socket(key: u32) -> Expression {
    Expression::new(c"socket").u32(sys::NFTNL_EXPR_SOCKET_KEY, key).u32(sys::NFTNL_EXPR_SOCKET_DREG, FIRST)
}

/// A batch in the making.
struct Messages {
    writer: Writer,
    sequence: u32,
}

impl Messages {
    fn new(first_sequence: u32) -> Self {
        let mut messages = Self { writer: Writer::new(), sequence: first_sequence };
        messages.frame(BATCH_BEGIN);
        messages
    }

    fn next_sequence(&mut self) -> u32 {
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        sequence
    }

    fn frame(&mut self, kind: u16) {
        let sequence = self.next_sequence();
        let message = self.writer.message(kind, REQUEST, sequence, &BATCH);
        self.writer.end_message(message);
    }

    fn message(&mut self, message: u16, flags: u16, fill: impl FnOnce(&mut Writer)) {
        let sequence = self.next_sequence();
        let mark = self.writer.message(kind(message), flags, sequence, &INET);
        fill(&mut self.writer);
        self.writer.end_message(mark);
    }

    /// An orphan of a daemon that locked it must be taken over before it can be deleted.
    fn delete(&mut self, before: TableState) {
        if before.locked {
            self.add_table(true);
        }
        self.message(msg::DEL_TABLE, REQUEST, |writer| writer.put_text(table::NAME, TRANSPARENT_TABLE));
    }

    fn add_table(&mut self, lock: bool) {
        self.message(msg::NEW_TABLE, CREATE, |writer| {
            writer.put_text(table::NAME, TRANSPARENT_TABLE);
            if lock {
                writer.put_be32(table::FLAGS, table::F_OWNER | table::F_PERSIST);
            }
        });
    }

    fn add_chain(&mut self, name: &str, priority: Option<i32>) {
        self.message(msg::NEW_CHAIN, CREATE, |writer| {
            writer.put_text(chain::TABLE, TRANSPARENT_TABLE);
            writer.put_text(chain::NAME, name);
            if let Some(priority) = priority {
                let hook = writer.nest(chain::HOOK);
                writer.put_be32(chain::HOOK_NUMBER, PREROUTING);
                writer.put_be32(chain::HOOK_PRIORITY, priority.cast_unsigned());
                writer.end(hook);
                writer.put_be32(chain::POLICY, chain::ACCEPT);
                writer.put_text(chain::TYPE, "filter");
            }
        });
    }

    fn add_rule(&mut self, chain: &str, expressions: Vec<Expression>) -> Result<(), NftError> {
        let message = RuleObject::new(TRANSPARENT_TABLE, chain, expressions)?.message(kind(msg::NEW_RULE), APPEND);
        let sequence = self.next_sequence();
        self.writer.copy_message(&message, sequence);
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>, NftError> {
        self.frame(BATCH_END);
        Ok(self.writer.finish()?)
    }
}
