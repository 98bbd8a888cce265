//! The table of shunt in the kernel: changed by atomic batches, read back as a snapshot, watched for foreign hands.
//!
//! Rules are libnftnl's objects; everything else is written straight into the batch, since an object per element is
//! what a table of hundreds of thousands of them cannot afford.

mod atom;
mod batch;
mod element;
mod error;
mod expression;
mod memory;
mod monitor;
mod read;
mod set;
mod statement;
mod timeout;
mod transparent;
mod uapi;
mod userdata;

use nix::errno::Errno;
use proxy_core::{
    diff::{Change, Fingerprint, Snapshot},
    ruleset::{Counter, Key, Rule},
};

pub use error::{NftError, Refusal};
pub use memory::{MemoryNft, Owner};
pub use monitor::{MonitorNews, NftMonitor};
pub use transparent::{TRANSPARENT_TABLE, TransparentTable};

use self::{
    batch::{Batch, Culprit},
    error::describe,
};
use super::netlink::{NetlinkSocket, SyscallError};

/// Headers before the attributes of a message: `struct nlmsghdr`, `struct nfgenmsg`.
const HEADER_AND_FIXED: usize = super::netlink::HEADER + batch::INET.len();

/// Answers to a batch that are kept; a broken batch can have one per message.
const MAX_REFUSALS: usize = 64;
/// Bytes of the queue those answers wait in, about 100 each.
const ANSWER_QUEUE: usize = 8 << 20;

/// What `reconcile` needs of nf_tables.
pub trait Nft {
    /// What the kernel holds of shunt's table. The elements of dynamic sets, which the packet path fills, and of sets
    /// shunt would never make are left out.
    fn snapshot(&mut self) -> Result<Snapshot, NftError>;

    /// All of the changes or none. Fails with [`NftError::Refused`] and what every refused change ran into.
    fn apply(&mut self, changes: &[Change]) -> Result<(), NftError>;

    /// Comparable with the rules of [`Nft::snapshot`].
    fn fingerprint(&self, rule: &Rule) -> Fingerprint;

    /// A number that changes whenever anyone commits a change to any table of the namespace.
    fn generation(&mut self) -> Result<u32, NftError>;

    /// The counters of a set's elements, in the order of the keys; of ranges, by their first key.
    fn counters(&mut self, set: &str) -> Result<Vec<(Key, Counter)>, NftError>;

    /// The counters of these elements only, in any order. The set's key is a mark. Fails when one is not there.
    fn some_counters(&mut self, set: &str, keys: &[Key]) -> Result<Vec<(Key, Counter)>, NftError>;
}

/// The kernel's nf_tables, through one socket for as long as it lives: a locked table belongs to the socket
/// (`NFT_TABLE_F_OWNER`, v5.12+), and is left as an orphan when it closes (`NFT_TABLE_F_PERSIST`, v6.9+).
#[derive(Debug)]
pub struct KernelNft {
    socket: NetlinkSocket,
}

impl KernelNft {
    /// Opens the socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NftError> {
        let socket = NetlinkSocket::open(mnl::Bus::Netfilter)?;
        socket.receive_queue(ANSWER_QUEUE)?;
        Ok(Self { socket })
    }

    /// What the kernel knows this socket by, and what [`NftMonitor`] takes for "us".
    pub fn port_id(&self) -> u32 {
        self.socket.port_id()
    }

    /// Reads what the kernel said to the batch. The answers are queued when `sendmsg` returns (`nfnetlink_rcv_batch`).
    fn answers(&mut self, batch: &Batch, changes: &[Change]) -> Result<Answers, NftError> {
        let mut answers = Answers::default();
        loop {
            let messages = match self.socket.receive() {
                Ok(Some(messages)) => messages,
                Ok(None) => return Ok(answers),
                Err(SyscallError { errno: Errno::ENOBUFS, .. }) => {
                    answers.overrun = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            for message in messages {
                let Some(answer) = message.answer() else { continue };
                let Some(errno) = answer.errno else { continue };
                if answers.refusals.len() >= MAX_REFUSALS {
                    continue;
                }
                let change = match batch.culprit(message.sequence, answer.offset) {
                    Culprit::Batch => None,
                    Culprit::Change(index) => Some(index),
                };
                let object = change.and_then(|index| changes.get(index)).map_or("the batch".to_owned(), describe);
                answers.refusals.push(Refusal { change, object, errno, text: answer.text });
            }
        }
    }
}

#[derive(Default)]
struct Answers {
    refusals: Vec<Refusal>,
    /// Some were lost.
    overrun: bool,
}

impl Nft for KernelNft {
    fn snapshot(&mut self) -> Result<Snapshot, NftError> {
        read::snapshot(&mut self.socket)
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), NftError> {
        if changes.is_empty() {
            return Ok(());
        }
        let before = self.generation()?;
        let first = self.socket.take_sequence(Batch::messages(changes));
        let batch = Batch::encode(changes, first)?;
        self.socket.send(&batch.bytes)?;
        let answers = self.answers(&batch, changes)?;
        match (answers.refusals.is_empty(), answers.overrun) {
            (true, false) => Ok(()),
            (false, _) => Err(NftError::from_refusals(answers.refusals, changes)),
            // Whether it was taken can only be told from the number of the ruleset.
            (true, true) => match self.generation()? == before {
                true => Err(NftError::LostAnswers),
                false => Ok(()),
            },
        }
    }

    fn fingerprint(&self, rule: &Rule) -> Fingerprint {
        statement::fingerprint(rule)
    }

    fn generation(&mut self) -> Result<u32, NftError> {
        read::generation(&mut self.socket)
    }

    fn counters(&mut self, set: &str) -> Result<Vec<(Key, Counter)>, NftError> {
        read::counters(&mut self.socket, set)
    }

    fn some_counters(&mut self, set: &str, keys: &[Key]) -> Result<Vec<(Key, Counter)>, NftError> {
        read::some_counters(&mut self.socket, set, keys)
    }
}
