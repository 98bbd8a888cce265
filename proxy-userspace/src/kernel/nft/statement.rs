//! Statements as expressions: the same ones, in the same order, that `nft` makes of the statement's spelling.

use std::net::IpAddr;

use nftnl::nftnl_sys as sys;
use proxy_core::{
    config::Protocol,
    diff::Fingerprint,
    ruleset::{Direction, Family, Load, Over, Rule, Statement},
};

use super::{
    NftError,
    atom::{
        self, CT_DIRECTION, CT_EVENTS, CT_MARK, CT_STATUS, FIRST, LOOPBACK_INDEX, META_FAMILY, META_INPUT_INTERFACE,
        META_PROTOCOL, NETWORK_HEADER, NUMGEN_RANDOM, NUMGEN_SEQUENCE, ROUTE_LOCAL, STATUS_DNAT, TRANSPORT_HEADER,
    },
    expression::{Expression, RuleObject},
    uapi::{register, verdict},
};

/// The word `jhash` reads its input from, behind the widest key that has a slot in it.
const HASH_INPUT: u32 = 6;

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

/// One fingerprint of a rule's printed expressions.
pub fn join(expressions: impl Iterator<Item = String>) -> Fingerprint {
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
                self.push(atom::immediate(&mark.to_ne_bytes()));
                self.set_ct(CT_MARK);
            }
            Statement::SetMarkFrom { key, map } => {
                self.look_up(key, map, FIRST)?;
                self.set_ct(CT_MARK);
            }
            Statement::SetMarkBits { keep, bits } => {
                self.ct(CT_MARK);
                self.bitwise(FIRST, &keep.to_ne_bytes(), &bits.to_ne_bytes());
                self.set_ct(CT_MARK);
            }
            Statement::SetEvents(events) => {
                self.push(atom::immediate(&events.to_ne_bytes()));
                self.set_ct(CT_EVENTS);
            }
            Statement::SetTimeout(name) => self.push(atom::timeout(name)?),
            Statement::Dnat { family, key, map, port } => self.dnat(*family, key, map, *port)?,
            Statement::Masquerade => self.push(Expression::new(c"masq")),
            Statement::VerdictMap { key, map } => self.look_up(key, map, libc::NFT_REG_VERDICT as u32)?,
            Statement::CountOver(count) => self.push(atom::connections_over(*count)),
            Statement::Update { set, key, over } => self.update(set, key, *over)?,
            Statement::RejectReset => self.push(atom::reject_reset()),
            Statement::RejectUnreachable => self.push(atom::reject_unreachable()),
            Statement::Jump(chain) => self.push(atom::verdict(verdict::JUMP, Some(chain))?),
            Statement::Goto(chain) => self.push(atom::verdict(verdict::GOTO, Some(chain))?),
            Statement::Return => self.push(atom::verdict(verdict::RETURN, None)?),
            Statement::Accept => self.push(atom::verdict(verdict::ACCEPT, None)?),
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
        if self.protocol != Some(Protocol::Tcp.number()) {
            self.match_protocol(Protocol::Tcp.number());
        }
        self.payload(TRANSPORT_HEADER, 13, 1, FIRST);
        self.bitwise(FIRST, &[mask], &[0]);
        self.compare(equal, &[value]);
    }

    fn destination_is_local(&mut self, local: bool) {
        self.push(atom::destination_type());
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
        self.push(atom::lookup(set, None, negate)?);
        Ok(())
    }

    fn look_up(&mut self, key: &[Load], map: &str, result: u32) -> Result<(), NftError> {
        self.load_key(key);
        self.push(atom::lookup(map, Some(result), false)?);
        Ok(())
    }

    /// The port lies behind the address in what the map yields.
    fn dnat(&mut self, family: Family, key: &[Load], map: &str, port: bool) -> Result<(), NftError> {
        self.look_up(key, map, FIRST)?;
        let port = port.then(|| register(words(address_bytes(family))));
        self.push(atom::dnat(family_number(family), port));
        Ok(())
    }

    fn update(&mut self, set: &str, key: &Load, over: Over) -> Result<(), NftError> {
        self.load_key(std::slice::from_ref(key));
        let (update, limit) = match over {
            Over::Connections(count) => (false, atom::connections_over(count)),
            Over::Rate { count, per, burst } => (true, atom::rate_over(count, per, burst)),
        };
        self.push(atom::add_to(set, update, limit)?);
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
            Load::Sequence { modulus } => self.push(atom::number(NUMGEN_SEQUENCE, *modulus, to)),
            Load::Random { modulus } => self.push(atom::number(NUMGEN_RANDOM, *modulus, to)),
            Load::SourceHash { family, modulus, seed } => {
                let input = register(HASH_INPUT.max(word + 1));
                let bytes = address_bytes(*family);
                self.payload(NETWORK_HEADER, source_offset(*family), bytes, input);
                self.push(atom::hash(input, bytes, *modulus, *seed, to));
            }
        }
    }

    fn mark(&mut self, to: u32, mask: Option<u32>) {
        self.push(atom::ct(CT_MARK).u32(sys::NFTNL_EXPR_CT_DREG, to));
        if let Some(mask) = mask {
            self.bitwise(to, &mask.to_ne_bytes(), &[0; 4]);
        }
    }

    fn ct(&mut self, key: u32) {
        self.push(atom::ct(key).u32(sys::NFTNL_EXPR_CT_DREG, FIRST));
    }

    fn set_ct(&mut self, key: u32) {
        self.push(atom::ct(key).u32(sys::NFTNL_EXPR_CT_SREG, FIRST));
    }

    fn meta(&mut self, key: u32, to: u32) {
        self.push(atom::meta(key, to));
    }

    fn payload(&mut self, base: u32, offset: u32, bytes: u32, to: u32) {
        self.push(atom::payload(base, offset, bytes, to));
    }

    fn bitwise(&mut self, register: u32, mask: &[u8], xor: &[u8]) {
        self.push(atom::bitwise(register, mask, xor));
    }

    fn compare(&mut self, equal: bool, value: &[u8]) {
        self.push(atom::compare(equal, value));
    }
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
