//! Statements as expressions: the same ones, in the same order, that `nft` makes of the statement's spelling.

use std::net::IpAddr;

use nftnl_sys as sys;
use proxy_core::{
    config::{Protocol, RateUnit},
    diff::Fingerprint,
    ruleset::{Direction, Family, Load, Over, Rule, Statement},
};

use super::{
    NftError,
    expression::{Expression, RuleObject},
    uapi::{register, verdict},
};

/// The first register, where keys begin and results go.
const FIRST: u32 = register(0);
/// The word `jhash` reads its input from, behind the widest key that has a slot in it.
const HASH_INPUT: u32 = 6;

const IPPROTO_TCP: u8 = 6;
/// `enum nft_payload_bases`
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// `NFT_CMP_EQ`, `NFT_CMP_NEQ`
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
/// `NFT_META_NFPROTO`, `NFT_META_L4PROTO`
const META_FAMILY: u32 = 15;
/// `NFT_META_IIF`
const META_INPUT_INTERFACE: u32 = libc::NFT_META_IIF as u32;
/// `LOOPBACK_IFINDEX`: the same in every network namespace.
const LOOPBACK_INDEX: u32 = 1;
const META_PROTOCOL: u32 = 16;
/// `NFT_CT_DIRECTION`, `NFT_CT_STATUS`, `NFT_CT_MARK`, `NFT_CT_EVENTMASK`
const CT_DIRECTION: u32 = 1;
const CT_STATUS: u32 = 2;
const CT_MARK: u32 = 3;
const CT_EVENTS: u32 = 18;
/// `IPS_DST_NAT`
const STATUS_DNAT: u32 = 1 << 5;
/// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_DADDR`, `RTN_LOCAL`
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 1 << 1;
const ROUTE_LOCAL: u32 = 2;
/// `NFT_NG_INCREMENTAL`, `NFT_NG_RANDOM`
const NUMGEN_SEQUENCE: u32 = 0;
const NUMGEN_RANDOM: u32 = 1;
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
/// `NFT_OBJECT_CT_TIMEOUT`
const OBJECT_TIMEOUT: u32 = super::uapi::object::TYPE_CT_TIMEOUT;

/// A rule of `chain`, ready to be sent.
pub fn rule_object(table: &str, chain: &str, rule: &Rule) -> Result<RuleObject, NftError> {
    RuleObject::new(table, chain, expressions(rule)?)
}

/// Comparable with [`fingerprint_of`] of the same rule read from the kernel.
pub fn fingerprint(rule: &Rule) -> Fingerprint {
    match expressions(rule) {
        Ok(expressions) => join(expressions.iter().map(Expression::print)),
        // Cannot be sent either, and no rule of the kernel looks like it.
        Err(error) => Fingerprint(format!("not encodable: {error}")),
    }
}

/// The fingerprint of a rule of the kernel, given as the whole message.
pub fn fingerprint_of(message: &[u8]) -> Fingerprint {
    match RuleObject::parse(message) {
        Some(rule) => join(rule.print().into_iter()),
        None => Fingerprint("an expression that libnftnl does not know".to_owned()),
    }
}

fn join(expressions: impl Iterator<Item = String>) -> Fingerprint {
    let expressions: Vec<String> = expressions.map(|text| normalized(&text)).collect();
    Fingerprint(expressions.join("; "))
}

/// The kernel tells the timeout of a `dynset` also when it has none (`nft_dynset_dump`).
fn normalized(text: &str) -> String {
    text.replace(" timeout 0ms", "")
}

fn expressions(rule: &Rule) -> Result<Vec<Expression>, NftError> {
    let mut builder = Builder::default();
    for statement in rule {
        builder.statement(statement)?;
    }
    Ok(builder.expressions)
}

/// What the rule has matched so far: `nft` does not match the same protocol twice.
#[derive(Default)]
struct Builder {
    expressions: Vec<Expression>,
    family: Option<Family>,
    protocol: Option<u8>,
}

impl Builder {
    fn push(&mut self, expression: Expression) {
        self.expressions.push(expression);
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), NftError> {
        match statement {
            Statement::IsProtocol(protocol) => self.protocol(*protocol),
            Statement::IsFamily(family) => self.family(*family),
            Statement::TcpFlags { mask, value, equal } => self.tcp_flags(*mask, *value, *equal),
            Statement::DestinationIsLocal(local) => self.destination_is_local(*local),
            Statement::DestinationIn(prefix) => self.destination_in(prefix.network(), prefix.prefix_len()),
            Statement::Direction(direction) => self.direction(*direction),
            Statement::MarkIs { mask, value, equal } => {
                self.mark(FIRST, Some(*mask));
                self.compare(*equal, &value.to_ne_bytes());
            }
            Statement::IsDnatted => {
                self.ct(CT_STATUS);
                self.bitwise(FIRST, &STATUS_DNAT.to_ne_bytes(), &[0; 4]);
                self.compare(false, &[0; 4]);
            }
            Statement::In { key, set, negate } => self.member(key, set, *negate)?,
            Statement::NotFromLoopback => {
                self.meta(META_INPUT_INTERFACE, FIRST);
                self.compare(false, &LOOPBACK_INDEX.to_ne_bytes());
            }
            Statement::SetMark(mark) => {
                self.immediate(&mark.to_ne_bytes());
                self.set_ct(CT_MARK);
            }
            Statement::SetMarkFrom { key, map } => {
                self.look_up(key, map, Some(FIRST))?;
                self.set_ct(CT_MARK);
            }
            Statement::SetMarkBits { keep, bits } => {
                self.ct(CT_MARK);
                self.bitwise(FIRST, &keep.to_ne_bytes(), &bits.to_ne_bytes());
                self.set_ct(CT_MARK);
            }
            Statement::SetEvents(events) => {
                self.immediate(&events.to_ne_bytes());
                self.set_ct(CT_EVENTS);
            }
            Statement::SetTimeout(name) => self.set_timeout(name)?,
            Statement::Dnat { family, key, map, port } => self.dnat(*family, key, map, *port)?,
            Statement::Masquerade => self.push(Expression::new(c"masq")),
            Statement::VerdictMap { key, map } => self.look_up(key, map, Some(libc::NFT_REG_VERDICT as u32))?,
            Statement::CountOver(count) => self.push(connections_over(*count)),
            Statement::Update { set, key, over } => self.update(set, key, *over)?,
            Statement::RejectReset => self.push(reject(REJECT_RESET, 0)),
            Statement::RejectUnreachable => self.push(reject(REJECT_ICMPX, REJECT_PORT_UNREACHABLE)),
            Statement::Jump(chain) => self.verdict(verdict::JUMP, Some(chain))?,
            Statement::Goto(chain) => self.verdict(verdict::GOTO, Some(chain))?,
            Statement::Return => self.verdict(verdict::RETURN, None)?,
            Statement::Accept => self.verdict(verdict::ACCEPT, None)?,
        }
        Ok(())
    }

    fn protocol(&mut self, protocol: Protocol) {
        self.match_protocol(protocol.number());
    }

    fn match_protocol(&mut self, number: u8) {
        self.meta(META_PROTOCOL, FIRST);
        self.compare(true, &[number]);
        self.protocol = Some(number);
    }

    fn family(&mut self, family: Family) {
        self.meta(META_FAMILY, FIRST);
        self.compare(true, &[family_number(family)]);
        self.family = Some(family);
    }

    /// An address of one family must not be read from a packet of the other.
    fn need_family(&mut self, family: Family) {
        if self.family != Some(family) {
            self.family(family);
        }
    }

    fn tcp_flags(&mut self, mask: u8, value: u8, equal: bool) {
        if self.protocol != Some(IPPROTO_TCP) {
            self.match_protocol(IPPROTO_TCP);
        }
        self.payload(TRANSPORT_HEADER, 13, 1, FIRST);
        self.bitwise(FIRST, &[mask], &[0]);
        self.compare(equal, &[value]);
    }

    fn destination_is_local(&mut self, local: bool) {
        self.push(
            Expression::new(c"fib")
                .u32(sys::NFTNL_EXPR_FIB_RESULT, FIB_ADDRESS_TYPE)
                .u32(sys::NFTNL_EXPR_FIB_FLAGS, FIB_DESTINATION)
                .u32(sys::NFTNL_EXPR_FIB_DREG, FIRST),
        );
        self.compare(local, &ROUTE_LOCAL.to_ne_bytes());
    }

    /// A prefix of whole bytes is compared by loading only those; any other is masked.
    fn destination_in(&mut self, network: IpAddr, prefix_bits: u8) {
        let (family, address) = match network {
            IpAddr::V4(address) => (Family::V4, address.octets().to_vec()),
            IpAddr::V6(address) => (Family::V6, address.octets().to_vec()),
        };
        self.need_family(family);
        let offset = destination_offset(family);
        let whole = usize::from(prefix_bits / 8);
        match (address.get(..whole), prefix_bits % 8) {
            (Some(bytes), 0) if whole > 0 => {
                self.payload(NETWORK_HEADER, offset, u32::from(prefix_bits / 8), FIRST);
                self.compare(true, bytes);
            }
            _ => {
                let mask: Vec<u8> = (0..address.len()).map(|index| mask_byte(prefix_bits, index)).collect();
                self.payload(NETWORK_HEADER, offset, address_bytes(family), FIRST);
                self.bitwise(FIRST, &mask, &vec![0; mask.len()]);
                self.compare(true, &address);
            }
        }
    }

    fn direction(&mut self, direction: Direction) {
        let number = match direction {
            Direction::Original => 0u8,
            Direction::Reply => 1,
        };
        self.ct(CT_DIRECTION);
        self.compare(true, &[number]);
    }

    fn member(&mut self, key: &[Load], set: &str, negate: bool) -> Result<(), NftError> {
        self.load_key(key);
        let flags = if negate { LOOKUP_INVERTED } else { 0 };
        let lookup = lookup(set)?.u32(sys::NFTNL_EXPR_LOOKUP_FLAGS, flags);
        self.push(lookup);
        Ok(())
    }

    fn look_up(&mut self, key: &[Load], map: &str, result: Option<u32>) -> Result<(), NftError> {
        self.load_key(key);
        let mut lookup = lookup(map)?.u32(sys::NFTNL_EXPR_LOOKUP_FLAGS, 0);
        if let Some(register) = result {
            lookup = lookup.u32(sys::NFTNL_EXPR_LOOKUP_DREG, register);
        }
        self.push(lookup);
        Ok(())
    }

    fn set_timeout(&mut self, name: &str) -> Result<(), NftError> {
        let reference = Expression::new(c"objref")
            .u32(sys::NFTNL_EXPR_OBJREF_IMM_TYPE, OBJECT_TIMEOUT)
            .name(sys::NFTNL_EXPR_OBJREF_IMM_NAME, name)?;
        self.push(reference);
        Ok(())
    }

    fn dnat(&mut self, family: Family, key: &[Load], map: &str, port: bool) -> Result<(), NftError> {
        self.look_up(key, map, Some(FIRST))?;
        let mut nat = Expression::new(c"nat")
            .u32(sys::NFTNL_EXPR_NAT_TYPE, NAT_DNAT)
            .u32(sys::NFTNL_EXPR_NAT_FAMILY, u32::from(family_number(family)))
            .u32(sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, FIRST)
            .u32(sys::NFTNL_EXPR_NAT_REG_ADDR_MAX, FIRST)
            .u32(sys::NFTNL_EXPR_NAT_FLAGS, if port { NAT_ADDRESS | NAT_PORT } else { NAT_ADDRESS });
        if port {
            let register = register(words(address_bytes(family)));
            nat = nat.u32(sys::NFTNL_EXPR_NAT_REG_PROTO_MIN, register).u32(sys::NFTNL_EXPR_NAT_REG_PROTO_MAX, register);
        }
        self.push(nat);
        Ok(())
    }

    fn update(&mut self, set: &str, key: &Load, over: Over) -> Result<(), NftError> {
        self.load_key(std::slice::from_ref(key));
        let (operation, limit) = match over {
            Over::Connections(count) => (DYNSET_ADD, connections_over(count)),
            Over::Rate { count, per, burst } => (DYNSET_UPDATE, rate_over(count, per, burst)),
        };
        let dynset = Expression::new(c"dynset")
            .u32(sys::NFTNL_EXPR_DYNSET_SREG_KEY, FIRST)
            .u32(sys::NFTNL_EXPR_DYNSET_OP, operation)
            .name(sys::NFTNL_EXPR_DYNSET_SET_NAME, set)?
            .nested(sys::NFTNL_EXPR_DYNSET_EXPR, limit);
        self.push(dynset);
        Ok(())
    }

    fn verdict(&mut self, code: i32, chain: Option<&str>) -> Result<(), NftError> {
        let mut verdict = Expression::new(c"immediate")
            .u32(sys::NFTNL_EXPR_IMM_DREG, libc::NFT_REG_VERDICT as u32)
            .u32(sys::NFTNL_EXPR_IMM_VERDICT, code.cast_unsigned());
        if let Some(chain) = chain {
            verdict = verdict.name(sys::NFTNL_EXPR_IMM_CHAIN, chain)?;
        }
        self.push(verdict);
        Ok(())
    }

    /// Fields lie one behind the other, each on a four-byte border.
    fn load_key(&mut self, key: &[Load]) {
        for load in key {
            if let Some(family) = load_family(load) {
                self.need_family(family);
            }
        }
        let mut word = 0;
        for load in key {
            self.load(load, word);
            word += words(load_bytes(load));
        }
    }

    fn load(&mut self, load: &Load, word: u32) {
        let to = register(word);
        match load {
            Load::Mark { mask } => self.mark(to, *mask),
            Load::SourceAddress(family) => {
                self.payload(NETWORK_HEADER, source_offset(*family), address_bytes(*family), to);
            }
            Load::DestinationAddress(family) => {
                self.payload(NETWORK_HEADER, destination_offset(*family), address_bytes(*family), to);
            }
            Load::Protocol => self.meta(META_PROTOCOL, to),
            Load::DestinationPort => self.payload(TRANSPORT_HEADER, 2, 2, to),
            Load::Sequence { modulus } => self.push(number(NUMGEN_SEQUENCE, *modulus, to)),
            Load::Random { modulus } => self.push(number(NUMGEN_RANDOM, *modulus, to)),
            Load::SourceHash { family, modulus, seed } => {
                let input = register(HASH_INPUT.max(word + 1));
                let bytes = address_bytes(*family);
                self.payload(NETWORK_HEADER, source_offset(*family), bytes, input);
                self.push(hash(input, bytes, *modulus, *seed, to));
            }
        }
    }

    fn mark(&mut self, to: u32, mask: Option<u32>) {
        self.push(ct(CT_MARK).u32(sys::NFTNL_EXPR_CT_DREG, to));
        if let Some(mask) = mask {
            self.bitwise(to, &mask.to_ne_bytes(), &[0; 4]);
        }
    }

    fn ct(&mut self, key: u32) {
        self.push(ct(key).u32(sys::NFTNL_EXPR_CT_DREG, FIRST));
    }

    fn set_ct(&mut self, key: u32) {
        self.push(ct(key).u32(sys::NFTNL_EXPR_CT_SREG, FIRST));
    }

    fn meta(&mut self, key: u32, to: u32) {
        self.push(Expression::new(c"meta").u32(sys::NFTNL_EXPR_META_KEY, key).u32(sys::NFTNL_EXPR_META_DREG, to));
    }

    fn payload(&mut self, base: u32, offset: u32, bytes: u32, to: u32) {
        self.push(
            Expression::new(c"payload")
                .u32(sys::NFTNL_EXPR_PAYLOAD_BASE, base)
                .u32(sys::NFTNL_EXPR_PAYLOAD_OFFSET, offset)
                .u32(sys::NFTNL_EXPR_PAYLOAD_LEN, bytes)
                .u32(sys::NFTNL_EXPR_PAYLOAD_DREG, to),
        );
    }

    fn bitwise(&mut self, register: u32, mask: &[u8], xor: &[u8]) {
        self.push(
            Expression::new(c"bitwise")
                .u32(sys::NFTNL_EXPR_BITWISE_SREG, register)
                .u32(sys::NFTNL_EXPR_BITWISE_DREG, register)
                .u32(sys::NFTNL_EXPR_BITWISE_LEN, mask.len() as u32)
                .data(sys::NFTNL_EXPR_BITWISE_MASK, mask)
                .data(sys::NFTNL_EXPR_BITWISE_XOR, xor),
        );
    }

    fn compare(&mut self, equal: bool, value: &[u8]) {
        self.push(
            Expression::new(c"cmp")
                .u32(sys::NFTNL_EXPR_CMP_SREG, FIRST)
                .u32(sys::NFTNL_EXPR_CMP_OP, if equal { EQUAL } else { NOT_EQUAL })
                .data(sys::NFTNL_EXPR_CMP_DATA, value),
        );
    }

    fn immediate(&mut self, value: &[u8]) {
        self.push(
            Expression::new(c"immediate").u32(sys::NFTNL_EXPR_IMM_DREG, FIRST).data(sys::NFTNL_EXPR_IMM_DATA, value),
        );
    }
}

fn lookup(set: &str) -> Result<Expression, NftError> {
    Expression::new(c"lookup").u32(sys::NFTNL_EXPR_LOOKUP_SREG, FIRST).name(sys::NFTNL_EXPR_LOOKUP_SET, set)
}

fn ct(key: u32) -> Expression {
    Expression::new(c"ct").u32(sys::NFTNL_EXPR_CT_KEY, key)
}

fn number(kind: u32, modulus: u32, to: u32) -> Expression {
    Expression::new(c"numgen")
        .u32(sys::NFTNL_EXPR_NG_DREG, to)
        .u32(sys::NFTNL_EXPR_NG_MODULUS, modulus)
        .u32(sys::NFTNL_EXPR_NG_TYPE, kind)
}

/// The seed is always sent: without one the kernel draws its own, and no two loads would hash alike.
fn hash(input: u32, bytes: u32, modulus: u32, seed: u32, to: u32) -> Expression {
    Expression::new(c"hash")
        .u32(sys::NFTNL_EXPR_HASH_SREG, input)
        .u32(sys::NFTNL_EXPR_HASH_DREG, to)
        .u32(sys::NFTNL_EXPR_HASH_LEN, bytes)
        .u32(sys::NFTNL_EXPR_HASH_MODULUS, modulus)
        .u32(sys::NFTNL_EXPR_HASH_SEED, seed)
        .u32(sys::NFTNL_EXPR_HASH_TYPE, 0)
}

fn connections_over(count: u32) -> Expression {
    Expression::new(c"connlimit").u32(sys::NFTNL_EXPR_CONNLIMIT_COUNT, count).u32(sys::NFTNL_EXPR_CONNLIMIT_FLAGS, OVER)
}

fn rate_over(count: u32, per: RateUnit, burst: u32) -> Expression {
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

fn reject(kind: u32, code: u8) -> Expression {
    Expression::new(c"reject").u32(sys::NFTNL_EXPR_REJECT_TYPE, kind).u8(sys::NFTNL_EXPR_REJECT_CODE, code)
}

fn load_family(load: &Load) -> Option<Family> {
    match load {
        Load::SourceAddress(family) | Load::DestinationAddress(family) | Load::SourceHash { family, .. } => {
            Some(*family)
        }
        Load::Mark { .. } | Load::Protocol | Load::DestinationPort | Load::Sequence { .. } | Load::Random { .. } => {
            None
        }
    }
}

fn load_bytes(load: &Load) -> u32 {
    match load {
        Load::SourceAddress(family) | Load::DestinationAddress(family) => address_bytes(*family),
        Load::Mark { .. }
        | Load::Protocol
        | Load::DestinationPort
        | Load::Sequence { .. }
        | Load::Random { .. }
        | Load::SourceHash { .. } => 4,
    }
}

/// The n-th byte of a netmask.
fn mask_byte(prefix_bits: u8, index: usize) -> u8 {
    let bits = usize::from(prefix_bits).saturating_sub(index * 8).min(8);
    u8::MAX.checked_shl(8 - bits as u32).unwrap_or(0)
}

fn words(bytes: u32) -> u32 {
    bytes.div_ceil(4)
}

const fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::NFPROTO_IPV4 as u8,
        Family::V6 => libc::NFPROTO_IPV6 as u8,
    }
}

const fn address_bytes(family: Family) -> u32 {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

/// Where the source address lies in the IP header (RFC 791 §3.1, RFC 8200 §3).
const fn source_offset(family: Family) -> u32 {
    match family {
        Family::V4 => 12,
        Family::V6 => 8,
    }
}

const fn destination_offset(family: Family) -> u32 {
    match family {
        Family::V4 => 16,
        Family::V6 => 24,
    }
}
