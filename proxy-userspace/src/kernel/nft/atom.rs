//! Single expressions, and the kernel's numbers in them (`include/uapi/linux/netfilter/nf_tables.h`).

use nftnl::nftnl_sys as sys;
use proxy_core::config::RateUnit;

use super::{
    NftError,
    expression::Expression,
    uapi::{object, register},
};

/// The first register, where keys begin and results go.
pub const FIRST: u32 = register(0);

/// `enum nft_payload_bases`
pub const NETWORK_HEADER: u32 = 1;
pub const TRANSPORT_HEADER: u32 = 2;
/// `NFT_CMP_EQ`, `NFT_CMP_NEQ`
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
/// `NFT_META_MARK`, `NFT_META_IIF`, `NFT_META_NFPROTO`, `NFT_META_L4PROTO`
pub const META_MARK: u32 = 3;
pub const META_INPUT_INTERFACE: u32 = 4;
pub const META_FAMILY: u32 = 15;
pub const META_PROTOCOL: u32 = 16;
/// `NFT_CT_DIRECTION`, `NFT_CT_STATUS`, `NFT_CT_MARK`, `NFT_CT_EVENTMASK`
pub const CT_DIRECTION: u32 = 1;
pub const CT_STATUS: u32 = 2;
pub const CT_MARK: u32 = 3;
pub const CT_EVENTS: u32 = 18;
/// `IPS_DST_NAT`
pub const STATUS_DNAT: u32 = 1 << 5;
/// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_DADDR`, `RTN_LOCAL`
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 1 << 1;
pub const ROUTE_LOCAL: u32 = 2;
/// `LOOPBACK_IFINDEX`: the same in every network namespace.
pub const LOOPBACK_INDEX: u32 = 1;
/// `NFT_NG_INCREMENTAL`, `NFT_NG_RANDOM`
pub const NUMGEN_SEQUENCE: u32 = 0;
pub const NUMGEN_RANDOM: u32 = 1;
/// `NFT_NAT_DNAT`, `NF_NAT_RANGE_MAP_IPS`, `NF_NAT_RANGE_PROTO_SPECIFIED`
const NAT_DNAT: u32 = 1;
const NAT_ADDRESS: u32 = 1;
const NAT_PORT: u32 = 2;
/// `NFT_LOOKUP_F_INV`
const LOOKUP_INVERTED: u32 = 1;
/// `NFT_DYNSET_OP_ADD`, `NFT_DYNSET_OP_UPDATE`
const DYNSET_ADD: u32 = 0;
const DYNSET_UPDATE: u32 = 1;
/// `NFT_CONNLIMIT_F_INV`, `NFT_LIMIT_F_INV`: "over"
const OVER: u32 = 1;
/// `NFT_REJECT_TCP_RST`, `NFT_REJECT_ICMPX_UNREACH`, `NFT_REJECT_ICMPX_PORT_UNREACH`
const REJECT_RESET: u32 = 1;
const REJECT_ICMPX: u32 = 2;
const REJECT_PORT_UNREACHABLE: u8 = 1;

pub fn meta(key: u32, to: u32) -> Expression {
    Expression::new(c"meta").u32(sys::NFTNL_EXPR_META_KEY, key).u32(sys::NFTNL_EXPR_META_DREG, to)
}

pub fn payload(base: u32, offset: u32, bytes: u32, to: u32) -> Expression {
    Expression::new(c"payload")
        .u32(sys::NFTNL_EXPR_PAYLOAD_BASE, base)
        .u32(sys::NFTNL_EXPR_PAYLOAD_OFFSET, offset)
        .u32(sys::NFTNL_EXPR_PAYLOAD_LEN, bytes)
        .u32(sys::NFTNL_EXPR_PAYLOAD_DREG, to)
}

/// `register = register & mask ^ xor`
pub fn bitwise(register: u32, mask: &[u8], xor: &[u8]) -> Expression {
    Expression::new(c"bitwise")
        .u32(sys::NFTNL_EXPR_BITWISE_SREG, register)
        .u32(sys::NFTNL_EXPR_BITWISE_DREG, register)
        .u32(sys::NFTNL_EXPR_BITWISE_LEN, mask.len() as u32)
        .data(sys::NFTNL_EXPR_BITWISE_MASK, mask)
        .data(sys::NFTNL_EXPR_BITWISE_XOR, xor)
}

/// Goes on with the rule when the first register has the value, or has not.
pub fn compare(equal: bool, value: &[u8]) -> Expression {
    Expression::new(c"cmp")
        .u32(sys::NFTNL_EXPR_CMP_SREG, FIRST)
        .u32(sys::NFTNL_EXPR_CMP_OP, if equal { EQUAL } else { NOT_EQUAL })
        .data(sys::NFTNL_EXPR_CMP_DATA, value)
}

pub fn immediate(value: &[u8]) -> Expression {
    Expression::new(c"immediate").u32(sys::NFTNL_EXPR_IMM_DREG, FIRST).data(sys::NFTNL_EXPR_IMM_DATA, value)
}

pub fn verdict(code: i32, chain: Option<&str>) -> Result<Expression, NftError> {
    let verdict = Expression::new(c"immediate")
        .u32(sys::NFTNL_EXPR_IMM_DREG, libc::NFT_REG_VERDICT as u32)
        .u32(sys::NFTNL_EXPR_IMM_VERDICT, code.cast_unsigned());
    match chain {
        Some(chain) => verdict.name(sys::NFTNL_EXPR_IMM_CHAIN, chain),
        None => Ok(verdict),
    }
}

/// The kind of address the destination is to this machine, into the first register.
pub fn destination_type() -> Expression {
    Expression::new(c"fib")
        .u32(sys::NFTNL_EXPR_FIB_RESULT, FIB_ADDRESS_TYPE)
        .u32(sys::NFTNL_EXPR_FIB_FLAGS, FIB_DESTINATION)
        .u32(sys::NFTNL_EXPR_FIB_DREG, FIRST)
}

pub fn timeout(name: &str) -> Result<Expression, NftError> {
    Expression::new(c"objref")
        .u32(sys::NFTNL_EXPR_OBJREF_IMM_TYPE, object::TYPE_CT_TIMEOUT)
        .name(sys::NFTNL_EXPR_OBJREF_IMM_NAME, name)
}

/// To the address in the first register, and the port in `port`.
pub fn dnat(family: u8, port: Option<u32>) -> Expression {
    let nat = Expression::new(c"nat")
        .u32(sys::NFTNL_EXPR_NAT_TYPE, NAT_DNAT)
        .u32(sys::NFTNL_EXPR_NAT_FAMILY, u32::from(family))
        .u32(sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, FIRST)
        .u32(sys::NFTNL_EXPR_NAT_REG_ADDR_MAX, FIRST);
    match port {
        None => nat.u32(sys::NFTNL_EXPR_NAT_FLAGS, NAT_ADDRESS),
        Some(register) => nat
            .u32(sys::NFTNL_EXPR_NAT_FLAGS, NAT_ADDRESS | NAT_PORT)
            .u32(sys::NFTNL_EXPR_NAT_REG_PROTO_MIN, register)
            .u32(sys::NFTNL_EXPR_NAT_REG_PROTO_MAX, register),
    }
}

/// Looks the first register up; a verdict or a value goes to `result`.
pub fn lookup(set: &str, result: Option<u32>, negate: bool) -> Result<Expression, NftError> {
    let lookup = Expression::new(c"lookup")
        .u32(sys::NFTNL_EXPR_LOOKUP_SREG, FIRST)
        .u32(sys::NFTNL_EXPR_LOOKUP_FLAGS, if negate { LOOKUP_INVERTED } else { 0 })
        .name(sys::NFTNL_EXPR_LOOKUP_SET, set)?;
    Ok(match result {
        Some(register) => lookup.u32(sys::NFTNL_EXPR_LOOKUP_DREG, register),
        None => lookup,
    })
}

/// `add @set { … }` where the element counts what is there, `update` where it counts what comes.
pub fn add_to(set: &str, update: bool, limit: Expression) -> Result<Expression, NftError> {
    let dynset = Expression::new(c"dynset")
        .u32(sys::NFTNL_EXPR_DYNSET_SREG_KEY, FIRST)
        .u32(sys::NFTNL_EXPR_DYNSET_OP, if update { DYNSET_UPDATE } else { DYNSET_ADD })
        .name(sys::NFTNL_EXPR_DYNSET_SET_NAME, set)?;
    Ok(dynset.nested(sys::NFTNL_EXPR_DYNSET_EXPR, limit))
}

pub fn ct(key: u32) -> Expression {
    Expression::new(c"ct").u32(sys::NFTNL_EXPR_CT_KEY, key)
}

pub fn number(kind: u32, modulus: u32, to: u32) -> Expression {
    Expression::new(c"numgen")
        .u32(sys::NFTNL_EXPR_NG_DREG, to)
        .u32(sys::NFTNL_EXPR_NG_MODULUS, modulus)
        .u32(sys::NFTNL_EXPR_NG_TYPE, kind)
}

/// The seed is always sent: without one the kernel draws its own, and no two loads would hash alike.
pub fn hash(input: u32, bytes: u32, modulus: u32, seed: u32, to: u32) -> Expression {
    Expression::new(c"hash")
        .u32(sys::NFTNL_EXPR_HASH_SREG, input)
        .u32(sys::NFTNL_EXPR_HASH_DREG, to)
        .u32(sys::NFTNL_EXPR_HASH_LEN, bytes)
        .u32(sys::NFTNL_EXPR_HASH_MODULUS, modulus)
        .u32(sys::NFTNL_EXPR_HASH_SEED, seed)
        .u32(sys::NFTNL_EXPR_HASH_TYPE, 0)
}

pub fn connections_over(count: u32) -> Expression {
    Expression::new(c"connlimit").u32(sys::NFTNL_EXPR_CONNLIMIT_COUNT, count).u32(sys::NFTNL_EXPR_CONNLIMIT_FLAGS, OVER)
}

pub fn rate_over(count: u32, per: RateUnit, burst: u32) -> Expression {
    let seconds = match per {
        RateUnit::Second => 1,
        RateUnit::Minute => 60,
        RateUnit::Hour => 3600,
    };
    Expression::new(c"limit")
        .u64(sys::NFTNL_EXPR_LIMIT_RATE, u64::from(count))
        .u64(sys::NFTNL_EXPR_LIMIT_UNIT, seconds)
        .u32(sys::NFTNL_EXPR_LIMIT_BURST, burst)
        .u32(sys::NFTNL_EXPR_LIMIT_TYPE, 0)
        .u32(sys::NFTNL_EXPR_LIMIT_FLAGS, OVER)
}

pub fn reject_reset() -> Expression {
    reject(REJECT_RESET, 0)
}

pub fn reject_unreachable() -> Expression {
    reject(REJECT_ICMPX, REJECT_PORT_UNREACHABLE)
}

fn reject(kind: u32, code: u8) -> Expression {
    Expression::new(c"reject").u32(sys::NFTNL_EXPR_REJECT_TYPE, kind).u8(sys::NFTNL_EXPR_REJECT_CODE, code)
}
