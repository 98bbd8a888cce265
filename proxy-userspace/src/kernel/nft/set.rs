//! Named sets and maps: what a [`SetSpec`] is in netlink, and back.
//!
//! The kernel keeps key and data types only to tell them back; what it uses are lengths. They and the user data, which
//! it never looks into, are what lets `nft` list a set as it was declared.

use proxy_core::ruleset::{Data, Field, SetKind, SetSpec};

use super::{
    NftError,
    uapi::{expr, set},
    userdata,
};
use crate::kernel::netlink::{Attributes, Writer};

/// `enum datatypes` of nft (`include/datatype.h`).
const INTEGER: u32 = 4;
const IPV4: u32 = 7;
const IPV6: u32 = 8;
const INET_PROTOCOL: u32 = 12;
const INET_SERVICE: u32 = 13;
const MARK: u32 = 19;
/// Each field of a concatenation has six bits of the type (`TYPE_BITS`).
const TYPE_BITS: u32 = 6;
/// The most fields a key can have: eight (`NFT_REG32_COUNT` bytes would allow more, `TYPE_BITS` does not).
const MAX_FIELDS: u32 = 32 / TYPE_BITS;

/// Bytes of the field's value, without padding.
pub const fn field_bytes(field: Field) -> usize {
    match field {
        Field::Mark | Field::Slot | Field::Ipv4 => 4,
        Field::Ipv6 => 16,
        Field::Protocol => 1,
        Field::Port => 2,
    }
}

const fn field_type(field: Field) -> u32 {
    match field {
        Field::Mark => MARK,
        Field::Ipv4 => IPV4,
        Field::Ipv6 => IPV6,
        Field::Protocol => INET_PROTOCOL,
        Field::Port => INET_SERVICE,
        Field::Slot => INTEGER,
    }
}

const fn field_of_type(kind: u32) -> Option<Field> {
    match kind {
        MARK => Some(Field::Mark),
        IPV4 => Some(Field::Ipv4),
        IPV6 => Some(Field::Ipv6),
        INET_PROTOCOL => Some(Field::Protocol),
        INET_SERVICE => Some(Field::Port),
        INTEGER => Some(Field::Slot),
        _ => None,
    }
}

/// Bytes of a key as the kernel has it: a lone field as it is, each field of a concatenation padded.
pub fn key_bytes(key: &[Field]) -> usize {
    match key {
        [field] => field_bytes(*field),
        fields => fields.iter().map(|field| field_bytes(*field).next_multiple_of(4)).sum(),
    }
}

fn key_type(key: &[Field]) -> u32 {
    key.iter().fold(0, |sum, field| (sum << TYPE_BITS) | field_type(*field))
}

fn key_of_type(mut kind: u32) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while kind != 0 {
        fields.push(field_of_type(kind & ((1 << TYPE_BITS) - 1))?);
        kind >>= TYPE_BITS;
    }
    fields.reverse();
    Some(fields)
}

const fn data_type(data: Data) -> (u32, u32) {
    match data {
        Data::Mark => (MARK, 4),
        Data::Verdict => (set::DATA_VERDICT, 0),
        Data::Ipv4 => (IPV4, 4),
        Data::Ipv6 => (IPV6, 16),
        Data::Ipv4Port => (IPV4 << TYPE_BITS | INET_SERVICE, 8),
        Data::Ipv6Port => (IPV6 << TYPE_BITS | INET_SERVICE, 20),
    }
}

const ALL_DATA: [Data; 6] = [Data::Mark, Data::Verdict, Data::Ipv4, Data::Ipv6, Data::Ipv4Port, Data::Ipv6Port];

fn flags(spec: &SetSpec) -> u32 {
    let map = if spec.data.is_some() { set::F_MAP } else { 0 };
    let kind = match spec.kind {
        SetKind::Hash => 0,
        SetKind::Interval => set::F_INTERVAL,
        SetKind::Dynamic { timeout_seconds: None, .. } => set::F_EVAL,
        SetKind::Dynamic { timeout_seconds: Some(_), .. } => set::F_EVAL | set::F_TIMEOUT,
    };
    map | kind
}

/// Refuses what cannot be said in netlink.
pub fn check(name: &str, spec: &SetSpec) -> Result<(), NftError> {
    let unsupported = |why| Err(NftError::Unsupported { set: name.to_owned(), why });
    if spec.key.is_empty() || spec.key.len() > MAX_FIELDS as usize {
        return unsupported("a key has one to five fields");
    }
    if spec.kind == SetKind::Interval {
        match spec.key.as_slice() {
            [Field::Ipv4 | Field::Ipv6 | Field::Protocol | Field::Port] => {}
            [Field::Mark | Field::Slot] => return unsupported("ranges of host-endian keys are not in order"),
            _ => return unsupported("a range has one field"),
        }
    }
    Ok(())
}

/// The attributes of a `NEWSET` message, after table and name. `id` is unique within the batch.
pub fn put(writer: &mut Writer, spec: &SetSpec, id: u32) {
    writer.put_be32(set::FLAGS, flags(spec));
    writer.put_be32(set::KEY_TYPE, key_type(&spec.key));
    writer.put_be32(set::KEY_LEN, key_bytes(&spec.key) as u32);
    if let Some(data) = spec.data {
        let (kind, length) = data_type(data);
        writer.put_be32(set::DATA_TYPE, kind);
        writer.put_be32(set::DATA_LEN, length);
    }
    writer.put_be32(set::ID, id);
    if let SetKind::Dynamic { size, timeout_seconds } = spec.kind {
        let description = writer.nest(set::DESC);
        writer.put_be32(set::DESC_SIZE, size);
        writer.end(description);
        if let Some(seconds) = timeout_seconds {
            writer.put_be64(set::TIMEOUT, u64::from(seconds) * 1000);
        }
    }
    writer.put(set::USERDATA, &userdata::of_set(spec));
    if spec.counter {
        let expression = writer.nest(set::EXPR);
        writer.put_text(expr::NAME, "counter");
        let nothing = writer.nest(expr::DATA);
        writer.end(nothing);
        writer.end(expression);
    }
}

/// Everything about a set of the kernel that decides whether it is one of ours.
#[derive(Default)]
struct Described {
    flags: u32,
    key_type: u32,
    key_bytes: u32,
    data_type: u32,
    data_bytes: u32,
    size: Option<u32>,
    timeout_milliseconds: u64,
    counter: bool,
    /// An expression that is not a lone counter.
    other_expression: bool,
}

/// The spec of the set in a `NEWSET` message; `None` for a set [`put`] would never make.
pub fn parse(attributes: Attributes<'_>) -> Option<SetSpec> {
    let described = describe(attributes)?;
    let key = key_of_type(described.key_type)?;
    let data = match described.flags & set::F_MAP {
        0 => None,
        _ => Some(data_of_type(described.data_type, described.data_bytes)?),
    };
    let timeout_seconds = match described.flags & set::F_TIMEOUT {
        0 => None,
        _ => Some(whole_seconds(described.timeout_milliseconds)?),
    };
    let kind = match (described.flags & set::F_EVAL, described.flags & set::F_INTERVAL) {
        (0, 0) => SetKind::Hash,
        (0, _) => SetKind::Interval,
        (_, _) => SetKind::Dynamic { size: described.size?, timeout_seconds },
    };
    let spec = SetSpec { key, data, kind, counter: described.counter };
    let same = flags(&spec) == described.flags
        && key_bytes(&spec.key) == described.key_bytes as usize
        && (described.size.is_none() || matches!(kind, SetKind::Dynamic { .. }))
        && !described.other_expression
        && check("", &spec).is_ok();
    same.then_some(spec)
}

fn data_of_type(kind: u32, bytes: u32) -> Option<Data> {
    // The length the kernel tells for verdicts is its own.
    ALL_DATA
        .into_iter()
        .find(|data| data_type(*data).0 == kind && (*data == Data::Verdict || data_type(*data).1 == bytes))
}

fn whole_seconds(milliseconds: u64) -> Option<u32> {
    if milliseconds == 0 || !milliseconds.is_multiple_of(1000) {
        return None;
    }
    u32::try_from(milliseconds / 1000).ok()
}

fn describe(attributes: Attributes<'_>) -> Option<Described> {
    let mut described = Described::default();
    for attribute in attributes {
        match attribute.kind {
            set::FLAGS => described.flags = attribute.be32()?,
            set::KEY_TYPE => described.key_type = attribute.be32()?,
            set::KEY_LEN => described.key_bytes = attribute.be32()?,
            set::DATA_TYPE => described.data_type = attribute.be32()?,
            set::DATA_LEN => described.data_bytes = attribute.be32()?,
            set::DESC => described.size = attribute.nested().find(set::DESC_SIZE).and_then(|size| size.be32()),
            set::TIMEOUT => described.timeout_milliseconds = attribute.be64()?,
            set::EXPR => {
                let name = attribute.nested().find(expr::NAME);
                described.counter = name.and_then(|name| name.text()) == Some("counter");
                described.other_expression = !described.counter;
            }
            set::EXPRESSIONS => described.other_expression = true,
            _ => {}
        }
    }
    Some(described)
}
