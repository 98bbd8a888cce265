//! Elements of sets, written into and read from the list of a `NEWSETELEM` message without an object in between.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use proxy_core::{
    diff::ElementState,
    ruleset::{Counter, Data, Element, Key, SetKind, SetSpec, Value},
};

use super::{
    NftError,
    set::{field_bytes, key_bytes},
    uapi::{LIST_ITEM, element, expr, verdict},
    userdata,
};
use crate::kernel::netlink::{Attribute, Attributes, Writer};

/// The widest key of an interval set: an IPv6 address.
const MAX_RANGE_KEY: usize = 16;

/// Writes what `nft add element` sends: one list item, or two for a range.
pub fn put_new(writer: &mut Writer, set: &str, spec: &SetSpec, key: &Key, wanted: &Element) -> Result<(), NftError> {
    let key = kernel_key(set, spec, key)?;
    let end = end_of_range(set, spec, wanted.last.as_ref())?;
    let comment = wanted.comment.as_deref();
    if comment.is_some_and(|comment| comment.len() > userdata::MAX_COMMENT || comment.contains('\0')) {
        return Err(NftError::Unsupported { set: set.to_owned(), why: "a comment has at most 127 bytes and no NUL" });
    }
    let item = writer.nest(LIST_ITEM);
    put_key(writer, key);
    put_data(writer, set, spec.data, &wanted.value)?;
    if comment.is_some() || end == RangeEnd::Open {
        let mut bytes = Vec::new();
        userdata::of_element(&mut bytes, comment, end == RangeEnd::Open);
        writer.put(element::USERDATA, &bytes);
    }
    if spec.counter && wanted.counter != Counter::default() {
        put_counter(writer, wanted.counter);
    }
    writer.end(item);
    put_end(writer, &end);
    Ok(())
}

/// Writes the item, or the two of a range, that name an element to be deleted.
pub fn put_old(writer: &mut Writer, set: &str, spec: &SetSpec, key: &Key, last: Option<&Key>) -> Result<(), NftError> {
    let key = kernel_key(set, spec, key)?;
    let end = end_of_range(set, spec, last)?;
    let item = writer.nest(LIST_ITEM);
    put_key(writer, key);
    writer.end(item);
    put_end(writer, &end);
    Ok(())
}

/// Writes the item that asks for one element of a set keyed by whole words.
pub fn put_asked(writer: &mut Writer, key: &Key) {
    let item = writer.nest(LIST_ITEM);
    put_key(writer, key.bytes());
    writer.end(item);
}

/// The key without the padding that a lone field does not have in the kernel.
fn kernel_key<'a>(set: &str, spec: &SetSpec, key: &'a Key) -> Result<&'a [u8], NftError> {
    let length = key_bytes(&spec.key);
    match key.bytes().get(..length) {
        Some(bytes) if key.bytes().len() == length.next_multiple_of(4) => Ok(bytes),
        _ => Err(NftError::Unsupported { set: set.to_owned(), why: "a key has not the fields of the set" }),
    }
}

/// What ends a range: the kernel wants the first key behind it, and nothing when there is none.
#[derive(Debug, PartialEq, Eq)]
enum RangeEnd {
    /// No range.
    None,
    Open,
    Before([u8; MAX_RANGE_KEY], usize),
}

fn end_of_range(set: &str, spec: &SetSpec, last: Option<&Key>) -> Result<RangeEnd, NftError> {
    match (spec.kind, last) {
        (SetKind::Interval, Some(last)) => {
            let last = kernel_key(set, spec, last)?;
            Ok(successor(last).map_or(RangeEnd::Open, |(bytes, length)| RangeEnd::Before(bytes, length)))
        }
        (SetKind::Hash | SetKind::Dynamic { .. }, None) => Ok(RangeEnd::None),
        (SetKind::Interval, None) | (SetKind::Hash | SetKind::Dynamic { .. }, Some(_)) => Err(NftError::Unsupported {
            set: set.to_owned(),
            why: "an element has a last key where its set has ranges",
        }),
    }
}

/// The next big-endian number of the same length; `None` after the last one.
fn successor(key: &[u8]) -> Option<([u8; MAX_RANGE_KEY], usize)> {
    let mut bytes = [0; MAX_RANGE_KEY];
    bytes.get_mut(..key.len())?.copy_from_slice(key);
    for byte in bytes.get_mut(..key.len())?.iter_mut().rev() {
        let (next, carry) = byte.overflowing_add(1);
        *byte = next;
        if !carry {
            return Some((bytes, key.len()));
        }
    }
    None
}

/// The number before; `None` before 0.
fn predecessor(key: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = key.to_vec();
    for byte in bytes.iter_mut().rev() {
        let (next, borrow) = byte.overflowing_sub(1);
        *byte = next;
        if !borrow {
            return Some(bytes);
        }
    }
    None
}

fn put_key(writer: &mut Writer, key: &[u8]) {
    let nest = writer.nest(element::KEY);
    writer.put(element::DATA_VALUE, key);
    writer.end(nest);
}

fn put_end(writer: &mut Writer, end: &RangeEnd) {
    if let RangeEnd::Before(bytes, length) = end {
        let item = writer.nest(LIST_ITEM);
        writer.put_be32(element::FLAGS, element::F_INTERVAL_END);
        put_key(writer, bytes.get(..*length).unwrap_or_default());
        writer.end(item);
    }
}

fn put_data(writer: &mut Writer, set: &str, data: Option<Data>, value: &Value) -> Result<(), NftError> {
    let mut bytes = [0u8; 20];
    let length = match (data, value) {
        (None, Value::None) => return Ok(()),
        (Some(Data::Verdict), Value::Goto(chain)) => {
            put_verdict(writer, verdict::GOTO, chain);
            return Ok(());
        }
        (Some(Data::Verdict), Value::Jump(chain)) => {
            put_verdict(writer, verdict::JUMP, chain);
            return Ok(());
        }
        (Some(Data::Mark), Value::Mark(mark)) => fill(&mut bytes, &[&mark.to_ne_bytes()]),
        (Some(Data::Ipv4), Value::Address(IpAddr::V4(address))) => fill(&mut bytes, &[&address.octets()]),
        (Some(Data::Ipv6), Value::Address(IpAddr::V6(address))) => fill(&mut bytes, &[&address.octets()]),
        (Some(Data::Ipv4Port), Value::Endpoint(SocketAddr::V4(endpoint))) => {
            fill(&mut bytes, &[&endpoint.ip().octets(), &endpoint.port().to_be_bytes(), &[0; 2]])
        }
        (Some(Data::Ipv6Port), Value::Endpoint(SocketAddr::V6(endpoint))) => {
            fill(&mut bytes, &[&endpoint.ip().octets(), &endpoint.port().to_be_bytes(), &[0; 2]])
        }
        _ => {
            return Err(NftError::Unsupported {
                set: set.to_owned(),
                why: "a value is not of the kind the map yields",
            });
        }
    };
    let nest = writer.nest(element::DATA);
    writer.put(element::DATA_VALUE, bytes.get(..length).unwrap_or_default());
    writer.end(nest);
    Ok(())
}

/// Puts the parts one behind the other; their length.
fn fill(bytes: &mut [u8], parts: &[&[u8]]) -> usize {
    let mut length = 0;
    for byte in parts.iter().copied().flatten() {
        if let Some(place) = bytes.get_mut(length) {
            *place = *byte;
            length += 1;
        }
    }
    length
}

fn put_verdict(writer: &mut Writer, code: i32, chain: &str) {
    let nest = writer.nest(element::DATA);
    let inner = writer.nest(element::DATA_VERDICT);
    writer.put_be32(element::VERDICT_CODE, code.cast_unsigned());
    writer.put_text(element::VERDICT_CHAIN, chain);
    writer.end(inner);
    writer.end(nest);
}

fn put_counter(writer: &mut Writer, counter: Counter) {
    let nest = writer.nest(element::EXPR);
    writer.put_text(expr::NAME, "counter");
    let data = writer.nest(expr::DATA);
    writer.put_be64(expr::COUNTER_BYTES, counter.bytes);
    writer.put_be64(expr::COUNTER_PACKETS, counter.packets);
    writer.end(data);
    writer.end(nest);
}

/// A list item of the kernel, taken apart.
struct Item<'a> {
    key: &'a [u8],
    /// Ends the range before it.
    end: bool,
    data: Option<Attribute<'a>>,
    user_data: &'a [u8],
    counter: Option<Counter>,
}

/// `None` for an element without a key: a catch-all, which shunt never makes.
fn item<'a>(attributes: Attributes<'a>) -> Option<Item<'a>> {
    let mut key = None;
    let mut item = Item { key: &[], end: false, data: None, user_data: &[], counter: None };
    for attribute in attributes {
        match attribute.kind {
            element::KEY => key = attribute.nested().find(element::DATA_VALUE),
            element::DATA => item.data = Some(attribute),
            element::FLAGS => item.end = attribute.be32()? & element::F_INTERVAL_END != 0,
            element::USERDATA => item.user_data = attribute.payload,
            element::EXPR => item.counter = counter(attribute.nested()),
            _ => {}
        }
    }
    item.key = key?.payload;
    Some(item)
}

fn counter(expression: Attributes<'_>) -> Option<Counter> {
    if expression.find(expr::NAME)?.text() != Some("counter") {
        return None;
    }
    let data = expression.find(expr::DATA)?.nested();
    Some(Counter { packets: data.find(expr::COUNTER_PACKETS)?.be64()?, bytes: data.find(expr::COUNTER_BYTES)?.be64()? })
}

/// The items of a `NEWSETELEM` message's attributes.
fn items<'a>(attributes: Attributes<'a>) -> impl Iterator<Item = Item<'a>> {
    let list = attributes.find(element::LIST_ELEMENTS).map(|list| list.nested());
    list.into_iter().flatten().filter(|attribute| attribute.kind == LIST_ITEM).filter_map(|it| item(it.nested()))
}

/// Adds the counters of a message's elements to `counters`.
pub fn read_counters(attributes: Attributes<'_>, counters: &mut Vec<(Key, Counter)>) {
    for item in items(attributes).filter(|item| !item.end) {
        counters.push((Key::from_kernel(item.key), item.counter.unwrap_or_default()));
    }
}

/// The elements of one set, message by message.
#[derive(Default)]
pub struct Elements {
    single: HashMap<Key, ElementState>,
    /// First keys and keys behind the end, of an interval set: `(key, starts, element)`.
    borders: Vec<(Vec<u8>, bool, ElementState)>,
}

impl Elements {
    pub fn read(&mut self, spec: &SetSpec, attributes: Attributes<'_>) {
        for item in items(attributes) {
            let state = ElementState {
                last: None,
                value: value(spec.data, item.data),
                comment: userdata::comment(item.user_data).map(Into::into),
                counter: item.counter.unwrap_or_default(),
            };
            match spec.kind {
                SetKind::Interval => self.borders.push((item.key.to_vec(), !item.end, state)),
                SetKind::Hash | SetKind::Dynamic { .. } => {
                    self.single.insert(Key::from_kernel(item.key), state);
                }
            }
        }
    }

    /// Joins the borders of ranges. A range that is not ended goes up to the next one, or to the last key there is; an
    /// end without a range is what `nft` puts at key 0.
    pub fn finish(self, spec: &SetSpec) -> HashMap<Key, ElementState> {
        let Self { mut single, mut borders } = self;
        // At the same key the end of one range comes before the start of the next.
        borders.sort_by(|one, other| (&one.0, one.1).cmp(&(&other.0, other.1)));
        let mut open: Option<(Vec<u8>, ElementState)> = None;
        for (key, starts, state) in borders {
            if let Some((first, range)) = open.take()
                && let Some(last) = predecessor(&key)
            {
                single.insert(Key::from_kernel(&first), ElementState { last: Some(Key::from_kernel(&last)), ..range });
            }
            if starts {
                open = Some((key, state));
            }
        }
        if let Some((first, range)) = open {
            let length = spec.key.first().copied().map_or(0, field_bytes);
            let last = Key::from_kernel(&vec![u8::MAX; length]);
            single.insert(Key::from_kernel(&first), ElementState { last: Some(last), ..range });
        }
        single
    }
}

/// What an element yields; [`Value::None`] for a value shunt would never write, which equals none it wants.
fn value(data: Option<Data>, attribute: Option<Attribute<'_>>) -> Value {
    data.zip(attribute).and_then(|(data, attribute)| known_value(data, attribute)).unwrap_or(Value::None)
}

fn known_value(data: Data, attribute: Attribute<'_>) -> Option<Value> {
    if data == Data::Verdict {
        return known_verdict(attribute.nested().find(element::DATA_VERDICT)?.nested());
    }
    let bytes = attribute.nested().find(element::DATA_VALUE)?.payload;
    Some(match data {
        Data::Mark => Value::Mark(u32::from_ne_bytes(bytes.first_chunk().copied()?)),
        Data::Ipv4 => Value::Address(ipv4(bytes)?.into()),
        Data::Ipv6 => Value::Address(ipv6(bytes)?.into()),
        Data::Ipv4Port => Value::Endpoint((ipv4(bytes)?, port(bytes.get(4..)?)?).into()),
        Data::Ipv6Port => Value::Endpoint((ipv6(bytes)?, port(bytes.get(16..)?)?).into()),
        Data::Verdict => return None,
    })
}

fn known_verdict(attributes: Attributes<'_>) -> Option<Value> {
    let code = attributes.find(element::VERDICT_CODE)?.be32()?.cast_signed();
    let chain = attributes.find(element::VERDICT_CHAIN).and_then(|chain| chain.text())?;
    match code {
        verdict::GOTO => Some(Value::Goto(chain.into())),
        verdict::JUMP => Some(Value::Jump(chain.into())),
        _ => None,
    }
}

fn ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    bytes.first_chunk::<4>().copied().map(Ipv4Addr::from)
}

fn ipv6(bytes: &[u8]) -> Option<Ipv6Addr> {
    bytes.first_chunk::<16>().copied().map(Ipv6Addr::from)
}

fn port(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().copied().map(u16::from_be_bytes)
}
