//! Reading the table back. A dump that another process's change interrupts is begun again.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use nix::errno::Errno;
use proxy_core::{
    diff::{ChainState, Fingerprint, SetState, Snapshot, TableState},
    ruleset::{Base, ChainKind, Counter, Hook, Key, SetKind, SetSpec, TABLE},
};

use super::{
    HEADER_AND_FIXED, NftError,
    batch::{INET, REQUEST, chain_type, hook_number, kind},
    element::{Elements, put_asked, read_counters},
    set as sets,
    statement::fingerprint_of,
    timeout,
    uapi::{chain, element, generation as generations, msg, object, rule, set, table},
};
use crate::kernel::netlink::{Attributes, Message, NetlinkSocket, SyscallError, Writer};

/// How often one dump, and all of them together, are begun again.
const DUMP_TRIES: usize = 32;
const SNAPSHOT_TRIES: usize = 8;
/// How long a hash table that grows is left alone.
const GROWING: Duration = Duration::from_millis(2);

const DUMP: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;

/// What a request is about, for its attributes and for errors.
struct Query<'a> {
    what: &'static str,
    message: u16,
    flags: u16,
    attributes: &'a [(u16, &'a str)],
    /// Elements of a set, one by one.
    keys: &'a [Key],
}

impl<'a> Query<'a> {
    const fn dump(what: &'static str, message: u16, attributes: &'a [(u16, &'a str)]) -> Self {
        Self { what, message, flags: DUMP, attributes, keys: &[] }
    }

    /// Reading needs the same privilege as changing (`nfnetlink_rcv`).
    fn refused(&self, errno: Errno) -> NftError {
        match errno {
            Errno::EPERM => NftError::NotPermitted,
            errno => NftError::NotTold { what: self.what, errno },
        }
    }
}

/// How a request ended.
enum End {
    Complete,
    /// The kernel changed meanwhile: what was read is worth nothing.
    Interrupted,
    Refused(Errno),
}

pub fn snapshot(socket: &mut NetlinkSocket) -> Result<Snapshot, NftError> {
    let mut generation_before = generation(socket)?;
    for _ in 0..SNAPSHOT_TRIES {
        let snapshot = read_all(socket);
        let generation_after = generation(socket)?;
        match snapshot {
            // A set that vanished between two dumps is an error only if nothing else changed.
            Ok(_) | Err(NftError::NotTold { .. } | NftError::Interrupted) if generation_before != generation_after => {
                generation_before = generation_after;
            }
            result => return result,
        }
    }
    // Others keep changing their tables: each part is whole, and a difference made of parts that do not fit is refused
    // by the kernel as a whole.
    read_all(socket)
}

fn read_all(socket: &mut NetlinkSocket) -> Result<Snapshot, NftError> {
    let Some(table) = read_table(socket, TABLE)? else { return Ok(Snapshot::default()) };
    let mut snapshot = Snapshot { table: Some(table), ..Snapshot::default() };
    read_timeouts(socket, &mut snapshot)?;
    read_sets(socket, &mut snapshot)?;
    read_chains(socket, &mut snapshot)?;
    Ok(snapshot)
}

/// `None`: there is no such table.
pub fn read_table(socket: &mut NetlinkSocket, name: &str) -> Result<Option<TableState>, NftError> {
    let own = socket.port_id();
    let names = [(table::NAME, name)];
    let query = Query { what: "the table", message: msg::GET_TABLE, flags: REQUEST, attributes: &names, keys: &[] };
    let mut state = None;
    let end = request(socket, &query, |message| {
        let attributes = Attributes::of_message(message.whole, INET.len());
        let flags = attributes.find(table::FLAGS).and_then(|flags| flags.be32()).unwrap_or(0);
        let owner = attributes.find(table::OWNER).and_then(|owner| owner.be32()).unwrap_or(0);
        // When the owner dies the kernel takes its flag away and leaves the other (`nf_tables_release_owner`, v6.9).
        let locked = flags & (table::F_OWNER | table::F_PERSIST) != 0;
        state = Some(TableState { locked, owned_by_other: locked && owner != 0 && owner != own });
    })?;
    match end {
        End::Complete => Ok(state),
        End::Refused(Errno::ENOENT) => Ok(None),
        End::Refused(errno) => Err(query.refused(errno)),
        End::Interrupted => Err(NftError::Interrupted),
    }
}

fn read_timeouts(socket: &mut NetlinkSocket, snapshot: &mut Snapshot) -> Result<(), NftError> {
    let names = [(object::TABLE, TABLE)];
    snapshot.timeouts = dump(
        socket,
        &Query::dump("the objects", msg::GET_OBJECT, &names),
        |timeouts: &mut BTreeMap<_, _>, message| {
            let attributes = Attributes::of_message(message.whole, INET.len());
            if is_ours(attributes, object::TABLE) {
                timeouts.extend(timeout::parse(attributes));
            }
        },
    )?;
    Ok(())
}

/// A set as the kernel describes it.
struct Described {
    name: String,
    spec: Option<SetSpec>,
    size: Size,
}

/// How many elements a dump of the set must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// The packet path adds and expires them.
    Changing,
    /// `NFTA_SET_COUNT`
    Known(usize),
    /// By an older kernel.
    Untold,
}

fn describe(message: &Message<'_>) -> Option<Described> {
    let attributes = Attributes::of_message(message.whole, INET.len());
    if !is_ours(attributes, set::TABLE) {
        return None;
    }
    let name = attributes.find(set::NAME)?.text()?.to_owned();
    let spec = sets::parse(attributes);
    let count = attributes.find(set::COUNT).and_then(|count| count.be32());
    let size = match (spec.as_ref().map(|spec| spec.kind), count) {
        (Some(SetKind::Hash), Some(count)) => Size::Known(count as usize),
        (Some(SetKind::Hash), None) => Size::Untold,
        // A tree is not rebuilt while it is dumped, and the kernel counts its borders, not its ranges.
        (Some(SetKind::Interval | SetKind::Dynamic { .. }) | None, _) => Size::Changing,
    };
    Some(Described { name, spec, size })
}

fn read_sets(socket: &mut NetlinkSocket, snapshot: &mut Snapshot) -> Result<(), NftError> {
    let names = [(set::TABLE, TABLE)];
    let query = Query::dump("the sets", msg::GET_SET, &names);
    let found = dump(socket, &query, |sets: &mut Vec<_>, message| sets.extend(describe(message)))?;
    for Described { name, spec, size } in found {
        let elements = match &spec {
            Some(spec) if !matches!(spec.kind, SetKind::Dynamic { .. }) => {
                let read = |elements: &mut Elements, attributes: Attributes<'_>| elements.read(spec, attributes);
                dump_elements(socket, &name, size, read, |elements| elements.finish(spec), HashMap::len)?
            }
            _ => HashMap::new(),
        };
        snapshot.sets.insert(name, SetState { spec, elements });
    }
    Ok(())
}

/// Dumps a set until all of it was told. A hash table that is growing while it is dumped, as it does for some
/// milliseconds after a big batch, leaves elements out and tells others twice (`nft_rhash_walk` counts how many it has
/// told, and the order changes), and the kernel does not say so.
fn dump_elements<T: Default, U>(
    socket: &mut NetlinkSocket,
    name: &str,
    size: Size,
    read: impl Fn(&mut T, Attributes<'_>),
    finish: impl Fn(T) -> U,
    count: impl Fn(&U) -> usize,
) -> Result<U, NftError> {
    let names = [(element::LIST_TABLE, TABLE), (element::LIST_SET, name)];
    let query = Query::dump("the elements of a set", msg::GET_ELEMENT, &names);
    let mut before = None;
    for _ in 0..DUMP_TRIES {
        let (messages, elements) = dump(socket, &query, |(messages, elements): &mut (usize, T), message| {
            *messages += 1;
            read(elements, Attributes::of_message(message.whole, INET.len()));
        })?;
        let elements = finish(elements);
        let counted = count(&elements);
        let whole = match size {
            Size::Changing => true,
            Size::Known(wanted) => counted == wanted,
            // One message is told at one moment. Of more, two that agree are as good as it gets.
            Size::Untold => messages <= 1 || before.replace(counted) == Some(counted),
        };
        if whole {
            return Ok(elements);
        }
        std::thread::sleep(GROWING);
    }
    Err(NftError::Interrupted)
}

fn read_chains(socket: &mut NetlinkSocket, snapshot: &mut Snapshot) -> Result<(), NftError> {
    let names = [(chain::TABLE, TABLE)];
    snapshot.chains =
        dump(socket, &Query::dump("the chains", msg::GET_CHAIN, &names), |chains: &mut BTreeMap<_, _>, message| {
            let attributes = Attributes::of_message(message.whole, INET.len());
            if is_ours(attributes, chain::TABLE) {
                chains.extend(parse_chain(attributes));
            }
        })?;
    for (chain, fingerprint) in rules(socket, TABLE)? {
        if let Some(state) = snapshot.chains.get_mut(&chain) {
            state.rules.push(fingerprint);
        }
    }
    Ok(())
}

/// The rules of a table, each with its chain; within a chain in order.
pub fn rules(socket: &mut NetlinkSocket, table: &str) -> Result<Vec<(String, Fingerprint)>, NftError> {
    let names = [(rule::TABLE, table)];
    dump(socket, &Query::dump("the rules", msg::GET_RULE, &names), |rules: &mut Vec<_>, message| {
        let attributes = Attributes::of_message(message.whole, INET.len());
        let text = |kind| attributes.find(kind).and_then(|name| name.text());
        if let Some(chain) = text(rule::CHAIN)
            && text(rule::TABLE) == Some(table)
        {
            rules.push((chain.to_owned(), fingerprint_of(message.whole)));
        }
    })
}

fn parse_chain(attributes: Attributes<'_>) -> Option<(String, ChainState)> {
    let name = attributes.find(chain::NAME)?.text()?.to_owned();
    let Some(hook) = attributes.find(chain::HOOK) else {
        return Some((name, ChainState { base: None, rules: Vec::new() }));
    };
    let state = match parse_base(attributes, hook.nested()) {
        Some(base) => ChainState { base: Some(base), rules: Vec::new() },
        // Told apart from a chain without a hook by a rule that none equals.
        None => {
            ChainState { base: None, rules: vec![Fingerprint("a hook, type or policy that shunt does not use".into())] }
        }
    };
    Some((name, state))
}

fn parse_base(attributes: Attributes<'_>, hook: Attributes<'_>) -> Option<Base> {
    let number = hook.find(chain::HOOK_NUMBER)?.be32()?;
    let priority = hook.find(chain::HOOK_PRIORITY)?.be32()?.cast_signed();
    let name = attributes.find(chain::TYPE)?.text()?;
    let policy = attributes.find(chain::POLICY)?.be32()?;
    let hooks = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];
    let hook = hooks.into_iter().find(|hook| hook_number(*hook) == number)?;
    let kind = [ChainKind::Nat, ChainKind::Filter].into_iter().find(|kind| chain_type(*kind) == name)?;
    (policy == chain::ACCEPT).then_some(Base { kind, hook, priority })
}

/// Some dumps tell the objects of all tables.
fn is_ours(attributes: Attributes<'_>, table: u16) -> bool {
    attributes.find(table).and_then(|name| name.text()) == Some(TABLE)
}

/// In the order of the keys.
pub fn counters(socket: &mut NetlinkSocket, name: &str) -> Result<Vec<(Key, Counter)>, NftError> {
    let names = [(set::TABLE, TABLE), (set::NAME, name)];
    let query = Query { what: "a set", message: msg::GET_SET, flags: REQUEST, attributes: &names, keys: &[] };
    for _ in 0..SNAPSHOT_TRIES {
        let mut described = None;
        let end = request(socket, &query, |message| described = describe(message))?;
        let size = match (end, described) {
            (End::Complete, Some(described)) => described.size,
            (End::Complete | End::Interrupted, _) => return Err(NftError::Malformed(query.what)),
            (End::Refused(errno), _) => return Err(query.refused(errno)),
        };
        let read = |counters: &mut Vec<_>, attributes: Attributes<'_>| read_counters(attributes, counters);
        let finish = |mut counters: Vec<(Key, Counter)>| {
            counters.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
            counters.dedup_by(|(one, _), (other, _)| one == other);
            counters
        };
        match dump_elements(socket, name, size, read, finish, Vec::len) {
            // The size is asked for again: the set may have changed after it was told.
            Err(NftError::Interrupted) => {}
            result => return result,
        }
    }
    Err(NftError::Interrupted)
}

/// Elements asked for at once: as many messages come back, and each waits in a page of its own until it is read.
const ASKED_AT_ONCE: usize = 256;

/// Of these elements only, in any order. The kernel answers with a message for each (`nft_get_set_elem`), where a dump has many
/// in one.
pub fn some_counters(socket: &mut NetlinkSocket, name: &str, keys: &[Key]) -> Result<Vec<(Key, Counter)>, NftError> {
    let names = [(element::LIST_TABLE, TABLE), (element::LIST_SET, name)];
    let mut counters = Vec::with_capacity(keys.len());
    for keys in keys.chunks(ASKED_AT_ONCE) {
        let what = "elements of a set";
        let query = Query { what, message: msg::GET_ELEMENT, flags: REQUEST, attributes: &names, keys };
        let before = counters.len();
        let end = request(socket, &query, |message| {
            read_counters(Attributes::of_message(message.whole, INET.len()), &mut counters);
        })?;
        match end {
            End::Complete if counters.len() - before == keys.len() => {}
            End::Complete | End::Interrupted => return Err(NftError::Interrupted),
            End::Refused(errno) => return Err(query.refused(errno)),
        }
    }
    Ok(counters)
}

pub fn generation(socket: &mut NetlinkSocket) -> Result<u32, NftError> {
    let query =
        Query { what: "its generation", message: msg::GET_GENERATION, flags: REQUEST, attributes: &[], keys: &[] };
    let mut generation = None;
    let end = request(socket, &query, |message| {
        let attributes = Attributes::of_message(message.whole, INET.len());
        generation = attributes.find(generations::ID).and_then(|id| id.be32());
    })?;
    match end {
        End::Refused(errno) => Err(query.refused(errno)),
        End::Complete | End::Interrupted => generation.ok_or(NftError::Malformed(query.what)),
    }
}

/// Collects a dump, from the beginning each time it is interrupted.
fn dump<T: Default>(
    socket: &mut NetlinkSocket,
    query: &Query<'_>,
    mut each: impl FnMut(&mut T, &Message<'_>),
) -> Result<T, NftError> {
    for _ in 0..DUMP_TRIES {
        let mut collected = T::default();
        match request(socket, query, |message| each(&mut collected, message))? {
            End::Complete => return Ok(collected),
            End::Interrupted | End::Refused(Errno::EINTR | Errno::EAGAIN) => {}
            End::Refused(errno) => return Err(query.refused(errno)),
        }
    }
    Err(NftError::Interrupted)
}

/// Sends the request and hands every message of the answer to `each`. The answer, or the next part of a dump, is queued
/// when the call before returns (`netlink_dump`), so an empty queue is the end.
fn request(socket: &mut NetlinkSocket, query: &Query<'_>, mut each: impl FnMut(&Message<'_>)) -> Result<End, NftError> {
    let sequence = socket.take_sequence(1);
    let mut writer = Writer::new();
    let message = writer.message(kind(query.message), query.flags, sequence, &INET);
    for (attribute, text) in query.attributes {
        writer.put_text(*attribute, text);
    }
    if !query.keys.is_empty() {
        let list = writer.nest(element::LIST_ELEMENTS);
        query.keys.iter().for_each(|key| put_asked(&mut writer, key));
        writer.end(list);
    }
    writer.end_message(message);
    let bytes = writer.finish()?;
    socket.send(&bytes)?;

    let mut end = End::Complete;
    let mut done = query.flags != DUMP;
    loop {
        let messages = match socket.receive() {
            Ok(Some(messages)) => messages,
            Ok(None) if done => return Ok(end),
            Ok(None) => return Err(NftError::Malformed(query.what)),
            Err(SyscallError { errno: Errno::ENOBUFS, .. }) => {
                end = End::Interrupted;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        for message in messages.filter(|message| message.sequence == sequence) {
            if i32::from(message.flags) & libc::NLM_F_DUMP_INTR != 0 {
                end = End::Interrupted;
            }
            match message.answer() {
                Some(answer) => {
                    done = true;
                    if let Some(errno) = answer.errno {
                        end = End::Refused(errno);
                    }
                }
                None if message.whole.len() >= HEADER_AND_FIXED => each(&message),
                None => {}
            }
        }
    }
}
