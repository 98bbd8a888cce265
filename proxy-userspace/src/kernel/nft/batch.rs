//! Changes as one batch of messages, and back from a message number to the change it came from.

use proxy_core::{
    diff::Change,
    ruleset::{Base, Chain, ChainKind, Element, Hook, Key, Rule, SetSpec, TABLE, TimeoutPolicy},
};

use super::{
    NftError, element as elements, set as sets,
    statement::rule_object,
    uapi::{BATCH_BEGIN, BATCH_END, SUBSYSTEM, chain, element, msg, object, rule, set, table},
};
use crate::kernel::netlink::{Attributes, Mark, Writer};

/// `NLM_F_REQUEST`
pub const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub const CREATE: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_CREATE) as u16;
pub const APPEND: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_CREATE | libc::NLM_F_APPEND) as u16;

/// `struct nfgenmsg`: family, version, resource id.
pub const INET: [u8; 4] = [libc::NFPROTO_INET as u8, 0, 0, 0];
/// The same of the two messages around a batch: the resource is the subsystem.
pub const BATCH: [u8; 4] = [libc::AF_UNSPEC as u8, 0, 0, SUBSYSTEM as u8];

/// The most a list of elements can have: the length of an attribute is 16 bits, its header included.
const MAX_LIST: usize = u16::MAX as usize;

/// `NFT_MSG_*` as `nlmsg_type`.
pub const fn kind(message: u16) -> u16 {
    SUBSYSTEM << 8 | message
}

/// A batch ready to be sent.
#[derive(Debug)]
pub struct Batch {
    pub bytes: Vec<u8>,
    first_sequence: u32,
    owners: Vec<Owner>,
}

/// Which change a message came from.
#[derive(Debug, Clone, Copy)]
struct Owner {
    /// The first, for a message with many elements.
    change: u32,
    /// Where the message begins in the batch, in bytes.
    at: usize,
}

/// Where in the batch an error lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Culprit {
    /// The batch as a whole: privileges, memory, or the check at the end.
    Batch,
    Change(usize),
}

impl Batch {
    /// How many sequence numbers a batch of `changes` can need at most.
    pub fn messages(changes: &[Change]) -> u32 {
        let rules = |change: &Change| match change {
            Change::AddRules { rules, .. } => rules.len(),
            _ => 1,
        };
        u32::try_from(changes.iter().map(rules).sum::<usize>()).unwrap_or(u32::MAX - 2).saturating_add(2)
    }

    pub fn encode(changes: &[Change], first_sequence: u32) -> Result<Self, NftError> {
        let mut encoder = Encoder { writer: Writer::new(), first_sequence, owners: Vec::new(), list: None, index: 0 };
        encoder.frame(BATCH_BEGIN);
        for (index, change) in (0u32..).zip(changes) {
            encoder.index = index;
            encoder.change(change)?;
        }
        encoder.close_list();
        encoder.frame(BATCH_END);
        Ok(Self { bytes: encoder.writer.finish()?, first_sequence, owners: encoder.owners })
    }

    /// The change that the answer with that sequence number and attribute offset is about.
    pub fn culprit(&self, sequence: u32, offset: Option<u32>) -> Culprit {
        let message = sequence.wrapping_sub(self.first_sequence);
        let last = self.owners.len().saturating_sub(1);
        match self.owners.get(message as usize) {
            Some(owner) if message > 0 && (message as usize) < last => {
                let further = offset.map_or(0, |offset| self.elements_before(owner.at, offset as usize));
                Culprit::Change(owner.change as usize + further)
            }
            _ => Culprit::Batch,
        }
    }

    /// How many elements lie before the one at `offset` of the message at `at`; 0 for other messages. The end of a range
    /// belongs to the element before it.
    fn elements_before(&self, at: usize, offset: usize) -> usize {
        let whole = self.bytes.get(at..).unwrap_or_default();
        let length = whole.first_chunk().copied().map_or(0, u32::from_ne_bytes);
        let whole = whole.get(..length as usize).unwrap_or_default();
        let is_elements = whole
            .get(4..6)
            .is_some_and(|it| it == kind(msg::NEW_ELEMENT).to_ne_bytes() || it == kind(msg::DEL_ELEMENT).to_ne_bytes());
        let list = Attributes::of_message(whole, INET.len()).find(element::LIST_ELEMENTS);
        let Some(list) = list.filter(|_| is_elements) else { return 0 };
        // Offsets of the items count from the list's payload, four bytes behind its header.
        let inside = offset.saturating_sub(list.offset + 4);
        let starts = list.nested().take_while(|item| item.offset <= inside).filter(|item| {
            let flags = item.nested().find(element::FLAGS).and_then(|flags| flags.be32()).unwrap_or(0);
            flags & element::F_INTERVAL_END == 0
        });
        starts.count().saturating_sub(1)
    }
}

/// The message elements are being added to.
struct List {
    message: Mark,
    elements: Mark,
    set: String,
    add: bool,
}

struct Encoder {
    writer: Writer,
    first_sequence: u32,
    owners: Vec<Owner>,
    list: Option<List>,
    index: u32,
}

impl Encoder {
    fn next_sequence(&mut self) -> u32 {
        let message = u32::try_from(self.owners.len()).unwrap_or(u32::MAX);
        self.owners.push(Owner { change: self.index, at: self.writer.len() });
        self.first_sequence.wrapping_add(message)
    }

    fn frame(&mut self, kind: u16) {
        let sequence = self.next_sequence();
        let message = self.writer.message(kind, REQUEST, sequence, &BATCH);
        self.writer.end_message(message);
    }

    fn begin(&mut self, message: u16, flags: u16) -> Mark {
        let sequence = self.next_sequence();
        self.writer.message(kind(message), flags, sequence, &INET)
    }

    fn change(&mut self, change: &Change) -> Result<(), NftError> {
        match change {
            Change::AddElement { set, spec, key, element } => return self.add_element(set, spec, key, element),
            Change::DeleteElement { set, spec, key, last } => {
                return self.delete_element(set, spec, key, last.as_ref());
            }
            _ => self.close_list(),
        }
        match change {
            Change::AddTable { lock } => self.add_table(*lock),
            Change::DeleteTable => self.named(msg::DEL_TABLE, &[(table::NAME, TABLE)]),
            Change::AddTimeout { name, policy } => self.add_timeout(name, policy),
            Change::DeleteTimeout { name } => self.delete_timeout(name),
            Change::AddSet { name, spec } => self.add_set(name, spec)?,
            Change::DeleteSet { name } => self.named(msg::DEL_SET, &[(set::TABLE, TABLE), (set::NAME, name)]),
            Change::AddChain { name, chain } => self.add_chain(name, chain),
            Change::AddRules { chain, rules } => self.add_rules(chain, rules)?,
            Change::FlushChain { name } => self.named(msg::DEL_RULE, &[(rule::TABLE, TABLE), (rule::CHAIN, name)]),
            Change::DeleteChain { name } => self.named(msg::DEL_CHAIN, &[(chain::TABLE, TABLE), (chain::NAME, name)]),
            Change::AddElement { .. } | Change::DeleteElement { .. } => {}
        }
        Ok(())
    }

    /// A message that only names what it is about.
    fn named(&mut self, message: u16, names: &[(u16, &str)]) {
        let mark = self.begin(message, REQUEST);
        for (attribute, name) in names {
            self.writer.put_text(*attribute, name);
        }
        self.writer.end_message(mark);
    }

    fn add_table(&mut self, lock: bool) {
        let mark = self.begin(msg::NEW_TABLE, CREATE);
        self.writer.put_text(table::NAME, TABLE);
        // Without flags an existing table keeps those it has.
        if lock {
            self.writer.put_be32(table::FLAGS, table::F_OWNER | table::F_PERSIST);
        }
        self.writer.end_message(mark);
    }

    fn add_timeout(&mut self, name: &str, policy: &TimeoutPolicy) {
        let mark = self.begin(msg::NEW_OBJECT, CREATE);
        self.writer.put_text(object::TABLE, TABLE);
        self.writer.put_text(object::NAME, name);
        self.writer.put_be32(object::TYPE, object::TYPE_CT_TIMEOUT);
        let data = self.writer.nest(object::DATA);
        self.writer.put(object::L3PROTO, &(libc::NFPROTO_INET as u16).to_be_bytes());
        self.writer.put(object::L4PROTO, &[super::timeout::protocol(policy).number()]);
        let seconds = self.writer.nest(object::POLICY);
        for (attribute, value) in super::timeout::seconds(policy) {
            self.writer.put_be32(attribute, value);
        }
        self.writer.end(seconds);
        self.writer.end(data);
        self.writer.end_message(mark);
    }

    fn delete_timeout(&mut self, name: &str) {
        let mark = self.begin(msg::DEL_OBJECT, REQUEST);
        self.writer.put_text(object::TABLE, TABLE);
        self.writer.put_text(object::NAME, name);
        self.writer.put_be32(object::TYPE, object::TYPE_CT_TIMEOUT);
        self.writer.end_message(mark);
    }

    fn add_set(&mut self, name: &str, spec: &SetSpec) -> Result<(), NftError> {
        sets::check(name, spec)?;
        let mark = self.begin(msg::NEW_SET, CREATE);
        self.writer.put_text(set::TABLE, TABLE);
        self.writer.put_text(set::NAME, name);
        sets::put(&mut self.writer, spec, self.index.wrapping_add(1));
        self.writer.end_message(mark);
        Ok(())
    }

    fn add_chain(&mut self, name: &str, chain: &Chain) {
        let mark = self.begin(msg::NEW_CHAIN, CREATE);
        self.writer.put_text(chain::TABLE, TABLE);
        self.writer.put_text(chain::NAME, name);
        if let Some(Base { kind, hook, priority }) = chain.base {
            let nest = self.writer.nest(chain::HOOK);
            self.writer.put_be32(chain::HOOK_NUMBER, hook_number(hook));
            self.writer.put_be32(chain::HOOK_PRIORITY, priority.cast_unsigned());
            self.writer.end(nest);
            self.writer.put_be32(chain::POLICY, chain::ACCEPT);
            self.writer.put_text(chain::TYPE, chain_type(kind));
        }
        self.writer.end_message(mark);
    }

    fn add_rules(&mut self, chain: &str, rules: &[Rule]) -> Result<(), NftError> {
        for rule in rules {
            let message = rule_object(TABLE, chain, rule)?.message(kind(msg::NEW_RULE), APPEND);
            let sequence = self.next_sequence();
            self.writer.copy_message(&message, sequence);
        }
        Ok(())
    }

    fn add_element(&mut self, set: &str, spec: &SetSpec, key: &Key, wanted: &Element) -> Result<(), NftError> {
        self.element(set, true, |writer| elements::put_new(writer, set, spec, key, wanted))
    }

    fn delete_element(&mut self, set: &str, spec: &SetSpec, key: &Key, last: Option<&Key>) -> Result<(), NftError> {
        self.element(set, false, |writer| elements::put_old(writer, set, spec, key, last))
    }

    /// Adds to the message that is open when it is about the same set and still has room.
    fn element(
        &mut self,
        set: &str,
        add: bool,
        put: impl Fn(&mut Writer) -> Result<(), NftError>,
    ) -> Result<(), NftError> {
        if let Some(list) = self.list.as_ref().filter(|list| list.set == set && list.add == add) {
            let (before, elements) = (self.writer.len(), list.elements);
            put(&mut self.writer)?;
            if self.writer.nest_len(elements) <= MAX_LIST {
                return Ok(());
            }
            self.writer.truncate(before);
        }
        self.close_list();
        self.open_list(set, add);
        put(&mut self.writer)
    }

    fn open_list(&mut self, set: &str, add: bool) {
        let message = match add {
            true => self.begin(msg::NEW_ELEMENT, CREATE),
            false => self.begin(msg::DEL_ELEMENT, REQUEST),
        };
        self.writer.put_text(element::LIST_TABLE, TABLE);
        self.writer.put_text(element::LIST_SET, set);
        let elements = self.writer.nest(element::LIST_ELEMENTS);
        self.list = Some(List { message, elements, set: set.to_owned(), add });
    }

    fn close_list(&mut self) {
        if let Some(List { message, elements, .. }) = self.list.take() {
            self.writer.end(elements);
            self.writer.end_message(message);
        }
    }
}

/// `enum nf_inet_hooks`
pub const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

pub const fn chain_type(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Nat => "nat",
        ChainKind::Filter => "filter",
    }
}
