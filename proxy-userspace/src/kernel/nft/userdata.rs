//! User data: what `nft` leaves with a set or an element to be able to list it as it was written. Type, length and value
//! of one byte, one byte and up to 255 bytes (`include/libnftnl/udata.h`).

use proxy_core::ruleset::{Data, Field, SetSpec};

/// `NFTNL_UDATA_SET_*`
const KEY_BYTE_ORDER: u8 = 0;
const DATA_BYTE_ORDER: u8 = 1;
const KEY_TYPEOF: u8 = 3;
const DATA_TYPEOF: u8 = 4;
const DATA_INTERVAL: u8 = 6;
/// `NFTNL_UDATA_SET_TYPEOF_*`
const EXPRESSION: u8 = 0;
const EXPRESSION_DATA: u8 = 1;
/// `NFTNL_UDATA_SET_ELEM_*`
const ELEMENT_COMMENT: u8 = 0;
const ELEMENT_FLAGS: u8 = 1;
/// `NFTNL_SET_ELEM_F_INTERVAL_OPEN`: the range goes on to the last key there is.
const INTERVAL_OPEN: u32 = 1;

/// `enum byteorder` of nft
const NO_ORDER: u32 = 0;
const HOST_ENDIAN: u32 = 1;
const BIG_ENDIAN: u32 = 2;

/// `enum expr_types` of nft, `include/expression.h`.
const EXPR_VERDICT: u32 = 1;
const EXPR_PAYLOAD: u32 = 7;
const EXPR_META: u32 = 9;
const EXPR_CT: u32 = 12;
const EXPR_CONCAT: u32 = 13;
const EXPR_NUMGEN: u32 = 23;

/// `enum proto_desc_id` of nft, and the fields' numbers there.
const PROTO_TCP: u32 = 8;
const PROTO_TH: u32 = 11;
const PROTO_IP: u32 = 12;
const PROTO_IP6: u32 = 13;
const FIELD_DPORT: u32 = 2;
const IP_SADDR: u32 = 11;
const IP_DADDR: u32 = 12;
const IP6_SADDR: u32 = 8;
const IP6_DADDR: u32 = 9;
const META_L4PROTO: u32 = 16;
const CT_MARK: u32 = 3;

/// A value as nft would write it after `typeof`.
#[derive(Clone, Copy)]
enum Typeof {
    Payload(u32, u32),
    Meta(u32),
    Ct(u32),
    /// `numgen inc mod 2`
    Numgen,
    Verdict,
}

fn put(bytes: &mut Vec<u8>, kind: u8, value: &[u8]) {
    // Longer values do not come up: a typeof of five fields stays below 140 bytes, a comment is cut at 128.
    let length = u8::try_from(value.len()).unwrap_or(u8::MAX);
    bytes.push(kind);
    bytes.push(length);
    bytes.extend(value.iter().take(usize::from(length)));
}

fn put_u32(bytes: &mut Vec<u8>, kind: u8, value: u32) {
    put(bytes, kind, &value.to_ne_bytes());
}

/// What nft 1.0.6 leaves with a set of that spec.
pub fn of_set(spec: &SetSpec) -> Vec<u8> {
    let mut bytes = Vec::new();
    // With a slot in its key a set is declared by `typeof`, else by `type`.
    let by_typeof = spec.key.contains(&Field::Slot);
    put_u32(&mut bytes, KEY_BYTE_ORDER, key_byte_order(&spec.key));
    if let Some(data) = spec.data {
        put_u32(&mut bytes, DATA_BYTE_ORDER, data_byte_order(data));
    }
    let fields: Vec<Typeof> = spec.key.iter().map(|field| typeof_field(*field)).collect();
    put_typeof(&mut bytes, KEY_TYPEOF, &fields, by_typeof);
    if let Some(data) = spec.data {
        put_typeof(&mut bytes, DATA_TYPEOF, typeof_data(data), by_typeof);
        put_u32(&mut bytes, DATA_INTERVAL, 0);
    }
    bytes
}

/// nft leaves the shell of a `typeof` also with a concatenation declared by `type`.
fn put_typeof(bytes: &mut Vec<u8>, kind: u8, values: &[Typeof], by_typeof: bool) {
    match (values, by_typeof) {
        ([value], true) => put(bytes, kind, &expression(*value)),
        ([_], false) => {}
        (values, _) => {
            let mut inner = Vec::new();
            if by_typeof {
                for (index, value) in (0u8..).zip(values) {
                    put(&mut inner, index, &expression(*value));
                }
            }
            put(bytes, kind, &wrapped(EXPR_CONCAT, &inner));
        }
    }
}

fn wrapped(kind: u32, inner: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_u32(&mut bytes, EXPRESSION, kind);
    put(&mut bytes, EXPRESSION_DATA, inner);
    bytes
}

fn expression(value: Typeof) -> Vec<u8> {
    let mut inner = Vec::new();
    let kind = match value {
        Typeof::Payload(protocol, field) => {
            put_u32(&mut inner, 0, protocol);
            put_u32(&mut inner, 1, field);
            EXPR_PAYLOAD
        }
        Typeof::Meta(key) => {
            put_u32(&mut inner, 0, key);
            EXPR_META
        }
        Typeof::Ct(key) => {
            put_u32(&mut inner, 0, key);
            // No direction.
            put_u32(&mut inner, 1, u32::MAX);
            EXPR_CT
        }
        Typeof::Numgen => {
            put_u32(&mut inner, 0, 0);
            put_u32(&mut inner, 1, 2);
            put_u32(&mut inner, 2, 0);
            EXPR_NUMGEN
        }
        Typeof::Verdict => EXPR_VERDICT,
    };
    wrapped(kind, &inner)
}

const fn typeof_field(field: Field) -> Typeof {
    match field {
        Field::Mark => Typeof::Ct(CT_MARK),
        Field::Ipv4 => Typeof::Payload(PROTO_IP, IP_SADDR),
        Field::Ipv6 => Typeof::Payload(PROTO_IP6, IP6_SADDR),
        Field::Protocol => Typeof::Meta(META_L4PROTO),
        Field::Port => Typeof::Payload(PROTO_TH, FIELD_DPORT),
        Field::Slot => Typeof::Numgen,
    }
}

const fn typeof_data(data: Data) -> &'static [Typeof] {
    match data {
        Data::Mark => &[Typeof::Ct(CT_MARK)],
        Data::Verdict => &[Typeof::Verdict],
        Data::Ipv4 => &[Typeof::Payload(PROTO_IP, IP_DADDR)],
        Data::Ipv6 => &[Typeof::Payload(PROTO_IP6, IP6_DADDR)],
        Data::Ipv4Port => &[Typeof::Payload(PROTO_IP, IP_DADDR), Typeof::Payload(PROTO_TCP, FIELD_DPORT)],
        Data::Ipv6Port => &[Typeof::Payload(PROTO_IP6, IP6_DADDR), Typeof::Payload(PROTO_TCP, FIELD_DPORT)],
    }
}

const fn key_byte_order(key: &[Field]) -> u32 {
    match key {
        [Field::Mark | Field::Slot] => HOST_ENDIAN,
        [Field::Ipv4 | Field::Ipv6 | Field::Port] => BIG_ENDIAN,
        _ => NO_ORDER,
    }
}

const fn data_byte_order(data: Data) -> u32 {
    match data {
        Data::Mark => HOST_ENDIAN,
        Data::Ipv4 | Data::Ipv6 => BIG_ENDIAN,
        Data::Verdict | Data::Ipv4Port | Data::Ipv6Port => NO_ORDER,
    }
}

/// The most a comment can have, without its NUL (`NFTNL_UDATA_COMMENT_MAXLEN`).
pub const MAX_COMMENT: usize = 127;

/// What nft leaves with an element; empty when there is nothing to say. `open`: a range without an end.
pub fn of_element(bytes: &mut Vec<u8>, comment: Option<&str>, open: bool) {
    bytes.clear();
    if let Some(comment) = comment {
        let text = comment.as_bytes();
        bytes.push(ELEMENT_COMMENT);
        bytes.push(u8::try_from(text.len() + 1).unwrap_or(u8::MAX));
        bytes.extend(text);
        bytes.push(0);
    }
    if open {
        put_u32(bytes, ELEMENT_FLAGS, INTERVAL_OPEN);
    }
}

/// The comment in an element's user data.
pub fn comment(mut bytes: &[u8]) -> Option<&str> {
    while let [kind, length, rest @ ..] = bytes {
        let (value, rest) = rest.split_at_checked(usize::from(*length))?;
        if *kind == ELEMENT_COMMENT {
            return std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok();
        }
        bytes = rest;
    }
    None
}

#[cfg(test)]
mod tests {
    use proxy_core::ruleset::SetKind;

    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn spec(key: &[Field], data: Option<Data>) -> SetSpec {
        SetSpec { key: key.to_vec(), data, kind: SetKind::Hash, counter: false }
    }

    /// The wanted bytes are what `nft --debug=mnl` (1.0.6) shows for the set above them, on a little-endian machine.
    #[test]
    #[cfg(target_endian = "little")]
    fn sets_declared_by_type_carry_the_user_data_of_nft() {
        // type ipv4_addr . inet_proto . inet_service : mark
        let map = spec(&[Field::Ipv4, Field::Protocol, Field::Port], Some(Data::Mark));
        assert_eq!(hex(&of_set(&map)), "000400000000010401000000030800040d0000000100060400000000");
        // type mark : ipv4_addr . inet_service
        let map = spec(&[Field::Mark], Some(Data::Ipv4Port));
        assert_eq!(hex(&of_set(&map)), "000401000000010400000000040800040d0000000100060400000000");
        // type inet_proto
        assert_eq!(hex(&of_set(&spec(&[Field::Protocol], None))), "000400000000");
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn sets_declared_by_typeof_carry_the_user_data_of_nft() {
        // typeof ct mark . numgen inc mod 2 : ip6 daddr . tcp dport
        let map = spec(&[Field::Mark, Field::Slot], Some(Data::Ipv6Port));
        let key = "033a00040d0000000132001400040c000000010c0004030000000104ffffffff\
                   011a00041700000001120004000000000104020000000204 00000000";
        let data = "043400040d000000012c0014000407000000010c00040d0000000104090000000114\
                    000407000000010c0004080000000104 02000000";
        let wanted = format!("000400000000010400000000{key}{data}060400000000").replace(' ', "");
        assert_eq!(hex(&of_set(&map)), wanted);
        // typeof ct mark . numgen inc mod 2 : verdict
        let map = spec(&[Field::Mark, Field::Slot], Some(Data::Verdict));
        assert!(hex(&of_set(&map)).ends_with("04080004010000000100060400000000"));
    }

    #[test]
    fn a_comment_is_read_back_and_lengths_that_lie_are_not_followed() {
        let mut bytes = Vec::new();
        of_element(&mut bytes, Some("web"), true);
        assert_eq!(comment(&bytes), Some("web"));
        assert_eq!(comment(&[0, 9, b'a']), None);
        assert_eq!(comment(&[1]), None);
    }
}
