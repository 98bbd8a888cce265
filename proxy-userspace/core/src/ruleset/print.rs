//! The ruleset as a script for `nft -f`.

use std::{
    fmt::{self, Display, Formatter, Write},
    net::{Ipv4Addr, Ipv6Addr},
};

use super::{
    Base, Chain, ChainKind, Data, Direction, Element, Family, Field, Hook, Key, Load, Over, Ruleset, Set, SetKind,
    SetSpec, Statement, TABLE, TimeoutPolicy, Value, events, tcp_flags,
};
use crate::config::RateUnit;

/// A script that makes this table on a machine without one: `nft -f` takes it.
pub fn print(ruleset: &Ruleset) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_table(&mut out, ruleset);
    out
}

fn write_table(out: &mut String, ruleset: &Ruleset) -> fmt::Result {
    writeln!(out, "table inet {TABLE} {{")?;
    for (name, policy) in &ruleset.timeouts {
        write!(out, "\tct timeout {name} {{\n\t\tprotocol {}\n\t\tl3proto inet\n", protocol_of(policy))?;
        writeln!(out, "\t\tpolicy = {{ {} }}\n\t}}\n", policy)?;
    }
    for (name, set) in &ruleset.sets {
        write_set(out, name, set)?;
    }
    for (name, chain) in &ruleset.chains {
        write_chain(out, name, chain)?;
    }
    writeln!(out, "}}")
}

fn protocol_of(policy: &TimeoutPolicy) -> &'static str {
    match policy {
        TimeoutPolicy::Tcp { .. } => "tcp",
        TimeoutPolicy::Udp { .. } => "udp",
    }
}

impl Display for TimeoutPolicy {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Tcp { syn_sent, established, fin_wait, close_wait, last_ack, time_wait, close } => write!(
                f,
                "syn_sent : {syn_sent}, established : {established}, fin_wait : {fin_wait}, close_wait : {close_wait}, \
                 last_ack : {last_ack}, time_wait : {time_wait}, close : {close}"
            ),
            Self::Udp { unreplied, replied } => write!(f, "unreplied : {unreplied}, replied : {replied}"),
        }
    }
}

fn write_set(out: &mut String, name: &str, set: &Set) -> fmt::Result {
    let SetSpec { key, data, kind, counter } = &set.spec;
    let typeof_ = key.contains(&Field::Slot);
    writeln!(out, "\t{} {name} {{", if data.is_some() { "map" } else { "set" })?;
    write!(out, "\t\t{} ", if typeof_ { "typeof" } else { "type" })?;
    write_joined(out, key.iter().map(|f| if typeof_ { typeof_field(*f) } else { type_field(*f) }))?;
    if let Some(data) = data {
        write!(out, " : {}", if typeof_ { typeof_data(*data) } else { type_data(*data) })?;
    }
    writeln!(out)?;
    match kind {
        SetKind::Hash => {}
        SetKind::Interval => writeln!(out, "\t\tflags interval")?,
        SetKind::Dynamic { size, timeout_seconds: None } => writeln!(out, "\t\tsize {size}\n\t\tflags dynamic")?,
        SetKind::Dynamic { size, timeout_seconds: Some(seconds) } => {
            writeln!(out, "\t\tsize {size}\n\t\tflags dynamic,timeout\n\t\ttimeout {seconds}s")?;
        }
    }
    if *counter {
        writeln!(out, "\t\tcounter")?;
    }
    if !set.elements.is_empty() {
        writeln!(out, "\t\telements = {{")?;
        for (key, element) in &set.elements {
            write_element(out, &set.spec, key, element)?;
        }
        writeln!(out, "\t\t}}")?;
    }
    writeln!(out, "\t}}\n")
}

fn write_joined<'a>(out: &mut String, parts: impl Iterator<Item = &'a str>) -> fmt::Result {
    for (i, part) in parts.enumerate() {
        write!(out, "{}{part}", if i > 0 { " . " } else { "" })?;
    }
    Ok(())
}

fn type_field(field: Field) -> &'static str {
    match field {
        Field::Mark => "mark",
        Field::Ipv4 => "ipv4_addr",
        Field::Ipv6 => "ipv6_addr",
        Field::Protocol => "inet_proto",
        Field::Port => "inet_service",
        Field::Slot => "integer",
    }
}

fn typeof_field(field: Field) -> &'static str {
    match field {
        Field::Mark => "ct mark",
        Field::Ipv4 => "ip daddr",
        Field::Ipv6 => "ip6 daddr",
        Field::Protocol => "meta l4proto",
        Field::Port => "tcp dport",
        Field::Slot => "numgen inc mod 2",
    }
}

fn type_data(data: Data) -> &'static str {
    match data {
        Data::Mark => "mark",
        Data::Verdict => "verdict",
        Data::Ipv4 => "ipv4_addr",
        Data::Ipv6 => "ipv6_addr",
        Data::Ipv4Port => "ipv4_addr . inet_service",
        Data::Ipv6Port => "ipv6_addr . inet_service",
    }
}

fn typeof_data(data: Data) -> &'static str {
    match data {
        Data::Mark => "ct mark",
        Data::Verdict => "verdict",
        Data::Ipv4 => "ip daddr",
        Data::Ipv6 => "ip6 daddr",
        Data::Ipv4Port => "ip daddr . tcp dport",
        Data::Ipv6Port => "ip6 daddr . tcp dport",
    }
}

fn write_element(out: &mut String, spec: &SetSpec, key: &Key, element: &Element) -> fmt::Result {
    out.push_str("\t\t\t");
    match &element.last {
        Some(last) if last != key => {
            write_key(out, &spec.key, key)?;
            out.push('-');
            write_key(out, &spec.key, last)?;
        }
        _ => write_key(out, &spec.key, key)?,
    }
    if spec.counter {
        write!(out, " counter packets {} bytes {}", element.counter.packets, element.counter.bytes)?;
    }
    if let Some(comment) = &element.comment {
        write!(out, " comment \"{comment}\"")?;
    }
    match &element.value {
        Value::None => {}
        Value::Mark(mark) => write!(out, " : {mark:#010x}")?,
        Value::Address(ip) => write!(out, " : {ip}")?,
        Value::Endpoint(to) => write!(out, " : {} . {}", to.ip(), to.port())?,
        Value::Goto(chain) => write!(out, " : goto {chain}")?,
        Value::Jump(chain) => write!(out, " : jump {chain}")?,
    }
    out.push_str(",\n");
    Ok(())
}

fn write_key(out: &mut String, fields: &[Field], key: &Key) -> fmt::Result {
    let mut bytes = key.bytes();
    for (i, field) in fields.iter().enumerate() {
        if i > 0 {
            out.push_str(" . ");
        }
        let width = if *field == Field::Ipv6 { 16 } else { 4 };
        let Some((head, rest)) = bytes.split_at_checked(width) else { return Err(fmt::Error) };
        bytes = rest;
        let word = [head[0], head[1], head[2], head[3]];
        match field {
            Field::Mark => write!(out, "{:#010x}", u32::from_ne_bytes(word))?,
            Field::Slot => write!(out, "{}", u32::from_ne_bytes(word))?,
            Field::Ipv4 => write!(out, "{}", Ipv4Addr::from(word))?,
            Field::Ipv6 => {
                write!(out, "{}", Ipv6Addr::from(<[u8; 16]>::try_from(head).map_err(|_| fmt::Error)?))?;
            }
            Field::Protocol => match word[0] {
                6 => out.push_str("tcp"),
                17 => out.push_str("udp"),
                other => write!(out, "{other}")?,
            },
            Field::Port => write!(out, "{}", u16::from_be_bytes([word[0], word[1]]))?,
        }
    }
    Ok(())
}

fn write_chain(out: &mut String, name: &str, chain: &Chain) -> fmt::Result {
    writeln!(out, "\tchain {name} {{")?;
    if let Some(Base { kind, hook, priority }) = chain.base {
        let kind = match kind {
            ChainKind::Nat => "nat",
            ChainKind::Filter => "filter",
        };
        let hook = match hook {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        };
        writeln!(out, "\t\ttype {kind} hook {hook} priority {priority}; policy accept;")?;
    }
    for rule in &chain.rules {
        out.push_str("\t\t");
        for (i, statement) in rule.iter().enumerate() {
            write!(out, "{}{statement}", if i > 0 { " " } else { "" })?;
        }
        out.push('\n');
    }
    writeln!(out, "\t}}\n")
}

struct Loads<'a>(&'a [Load]);

impl Display for Loads<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (i, load) in self.0.iter().enumerate() {
            write!(f, "{}{load}", if i > 0 { " . " } else { "" })?;
        }
        Ok(())
    }
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

impl Display for Load {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Mark { mask: None } => f.write_str("ct mark"),
            Self::Mark { mask: Some(mask) } => write!(f, "ct mark & {mask:#010x}"),
            Self::SourceAddress(family) => write!(f, "{} saddr", ip(family)),
            Self::DestinationAddress(family) => write!(f, "{} daddr", ip(family)),
            Self::Protocol => f.write_str("meta l4proto"),
            Self::DestinationPort => f.write_str("th dport"),
            Self::Sequence { modulus } => write!(f, "numgen inc mod {modulus}"),
            Self::Random { modulus } => write!(f, "numgen random mod {modulus}"),
            Self::SourceHash { family, modulus, seed } => {
                write!(f, "jhash {} saddr mod {modulus} seed {seed:#x}", ip(family))
            }
        }
    }
}

fn flag_names(flags: u8) -> String {
    let names = [(tcp_flags::FIN, "fin"), (tcp_flags::SYN, "syn"), (tcp_flags::RST, "rst"), (tcp_flags::ACK, "ack")];
    let set: Vec<&str> = names.into_iter().filter(|&(bit, _)| flags & bit != 0).map(|(_, name)| name).collect();
    if set.is_empty() { "0x0".into() } else { set.join(" | ") }
}

fn event_names(bits: u32) -> String {
    let names = [(events::NEW, "new"), (events::DESTROY, "destroy"), (events::MARK, "\"mark\"")];
    names.into_iter().filter(|&(bit, _)| bits & bit != 0).map(|(_, name)| name).collect::<Vec<_>>().join(",")
}

impl Display for Statement {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let equals = |equal: bool| if equal { "==" } else { "!=" };
        match self {
            Self::IsProtocol(protocol) => write!(f, "meta l4proto {}", protocol.as_str()),
            Self::IsFamily(Family::V4) => f.write_str("meta nfproto ipv4"),
            Self::IsFamily(Family::V6) => f.write_str("meta nfproto ipv6"),
            Self::TcpFlags { mask, value, equal } => {
                write!(f, "tcp flags & ({}) {} {}", flag_names(*mask), equals(*equal), flag_names(*value))
            }
            Self::DestinationIsLocal(true) => f.write_str("fib daddr type local"),
            Self::DestinationIsLocal(false) => f.write_str("fib daddr type != local"),
            Self::DestinationIn(net) => {
                let family = if net.addr().is_ipv4() { "ip" } else { "ip6" };
                if net.prefix_len() == net.max_prefix_len() {
                    write!(f, "{family} daddr {}", net.addr())
                } else {
                    write!(f, "{family} daddr {net}")
                }
            }
            Self::Direction(Direction::Original) => f.write_str("ct direction original"),
            Self::Direction(Direction::Reply) => f.write_str("ct direction reply"),
            Self::MarkIs { mask, value, equal } => {
                write!(f, "ct mark & {mask:#010x} {} {value:#010x}", equals(*equal))
            }
            Self::IsDnatted => f.write_str("ct status dnat"),
            Self::In { key, set, negate: false } => write!(f, "{} @{set}", Loads(key)),
            Self::In { key, set, negate: true } => write!(f, "{} != @{set}", Loads(key)),
            Self::SetMark(mark) => write!(f, "ct mark set {mark:#010x}"),
            Self::SetMarkFrom { key, map } => write!(f, "ct mark set {} map @{map}", Loads(key)),
            Self::SetMarkBits { keep, bits } => write!(f, "ct mark set ct mark & {keep:#010x} | {bits:#010x}"),
            Self::NotFromLoopback => f.write_str("iif != \"lo\""),
            Self::SetEvents(bits) => write!(f, "ct event set {}", event_names(*bits)),
            Self::SetTimeout(name) => write!(f, "ct timeout set \"{name}\""),
            Self::Dnat { family, key, map, .. } => write!(f, "dnat {} to {} map @{map}", ip(*family), Loads(key)),
            Self::Masquerade => f.write_str("masquerade"),
            Self::VerdictMap { key, map } => write!(f, "{} vmap @{map}", Loads(key)),
            Self::CountOver(count) => write!(f, "ct count over {count}"),
            Self::Update { set, key, over: Over::Connections(count) } => {
                write!(f, "add @{set} {{ {key} ct count over {count} }}")
            }
            Self::Update { set, key, over: Over::Rate { count, per, burst } } => {
                let per = match per {
                    RateUnit::Second => "second",
                    RateUnit::Minute => "minute",
                    RateUnit::Hour => "hour",
                };
                write!(f, "update @{set} {{ {key} limit rate over {count}/{per} burst {burst} packets }}")
            }
            Self::RejectReset => f.write_str("reject with tcp reset"),
            Self::RejectUnreachable => f.write_str("reject with icmpx port-unreachable"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Return => f.write_str("return"),
            Self::Accept => f.write_str("accept"),
        }
    }
}
