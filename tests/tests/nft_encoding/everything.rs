//! One ruleset with everything in it that shunt can say, as values and as an nft script.

use std::{collections::BTreeMap, net::IpAddr};

use proxy_core::{
    config::{
        Protocol::{Tcp, Udp},
        RateUnit,
    },
    ruleset::*,
};

use crate::support::*;

/// Every variant of every type of the ruleset, next to its nft spelling in [`SCRIPT`].
pub fn everything() -> Ruleset {
    Ruleset { timeouts: timeouts(), sets: sets(), chains: chains() }
}

pub const SCRIPT: &str = r#"
table inet shunt {
    ct timeout tcp-short {
        protocol tcp; l3proto inet
        policy = { syn_sent: 30, established: 7200, fin_wait: 61, close_wait: 59, last_ack: 29, time_wait: 20, close: 9 }
    }
    ct timeout udp-short { protocol udp; l3proto inet; policy = { unreplied: 31, replied: 122 }; }

    set acct { type mark; counter; elements = { 0x00000800 counter packets 7 bytes 700 } }
    set allow4 {
        type ipv4_addr; flags interval; counter
        elements = { 0.0.0.0-0.255.255.255, 10.0.0.0/8, 11.0.0.0-11.0.0.9 comment "office", 192.168.1.1, 255.255.255.0/24 }
    }
    set allow6 { type ipv6_addr; flags interval; elements = { ::1, 2001:db8::/32 comment "doc", ffff::/16 } }
    map be4 { type mark : ipv4_addr . inet_service; elements = { 0x00000800 comment "web" : 10.0.0.1 . 80 } }
    map be4p { type mark : ipv4_addr; elements = { 0x00000800 : 10.0.0.1 } }
    map be6 { type mark : ipv6_addr . inet_service; elements = { 0x00000800 : fd00::1 . 8080 } }
    map be6p { type mark : ipv6_addr; elements = { 0x00000800 : fd00::1 } }
    set conn4 { type ipv4_addr; size 1000; flags dynamic; }
    set connm { type mark; size 1000; flags dynamic; }
    set hairpin4 { type ipv4_addr . ipv4_addr; elements = { 10.0.0.1 . 10.0.0.2 } }
    set hairpin6 { type ipv6_addr . ipv6_addr; elements = { fd00::1 . fd00::2 } }
    set kill { type mark; }
    map lb { type mark : verdict; elements = { 0x00000800 : jump slots, 0x00001000 comment "many" : goto guard } }
    set ports { type inet_service; flags interval; elements = { 80, 1000-1999, 60000-65535 } }
    set protocols { type inet_proto; elements = { tcp, udp } }
    map r4 {
        type ipv4_addr . inet_proto . inet_service : mark; counter
        elements = { 10.0.0.1 . tcp . 80 counter packets 3 bytes 400 comment "web" : 0x00000800 }
    }
    map r6 { type ipv6_addr . inet_proto . inet_service : mark; counter; elements = { fd00::1 . udp . 53 : 0x00001000 } }
    map ra { type inet_proto . inet_service : mark; }
    map ranges { type ipv4_addr : verdict; flags interval; elements = { 10.0.0.0/8 : goto routed } }
    set rate4 { type ipv4_addr; size 1000; flags dynamic,timeout; timeout 60s; }
    set rate6 { type ipv6_addr; size 1000; flags dynamic,timeout; timeout 1h; }
    set ratem { type mark; size 10; flags dynamic,timeout; timeout 60s; }
    map slot4 {
        typeof ct mark . numgen inc mod 2 : ip daddr . tcp dport
        elements = { 0x00000800 . 0 comment "one" : 10.0.0.1 . 80 , 0x00000800 . 15 : 10.0.0.2 . 80 }
    }
    map slot4p { typeof ct mark . numgen inc mod 2 : ip daddr; elements = { 0x00000800 . 0 : 10.0.0.1 } }
    map slot6 { typeof ct mark . numgen inc mod 2 : ip6 daddr . tcp dport; }
    map slot6p { typeof ct mark . numgen inc mod 2 : ip6 daddr; }
    map slotv { typeof ct mark . numgen inc mod 2 : verdict; }

    chain forward {
        type filter hook forward priority filter; policy accept;
        ct direction original ct mark & 0xfffff800 @acct
        ct direction reply ct mark & 0xfffff800 @acct
        meta l4proto tcp ct mark @kill reject with tcp reset
        ct mark @kill reject with icmpx type port-unreachable
        meta nfproto ipv4 ip daddr 127.0.0.0/8 accept
        meta nfproto ipv6 ip6 daddr ::1 accept
        ip daddr 172.16.0.0/12 return
        ip daddr 0.0.0.0/0 return
        ip daddr 192.0.2.1 return
        ip6 daddr fe80::/10 return
        ip6 daddr 2001:db8::/32 return
        ip6 saddr @allow6 accept
        th dport @ports accept
        meta l4proto @protocols accept
    }
    chain guard {
        ct mark & 0x00000700 == 0x00000100 return
        ct mark & 0x00000700 != 0x00000100 accept
        ip saddr != @allow4 goto slots
        ct count over 20 accept
        add @conn4 { ip saddr ct count over 20 } accept
        add @connm { ct mark & 0xfffff800 ct count over 3 } return
        update @rate4 { ip saddr limit rate over 300/minute burst 300 packets } return
        update @rate6 { ip6 saddr limit rate over 3/second burst 5 packets } return
        update @ratem { ct mark limit rate over 7/hour burst 1 packets } return
    }
    chain input { type filter hook input priority -5; policy accept; }
    chain output { type nat hook output priority -100; policy accept; jump route; }
    chain post {
        type nat hook postrouting priority srcnat; policy accept;
        ct mark @kill masquerade
        ct status dnat ip saddr . ip daddr @hairpin4 masquerade
        ct status dnat ip6 saddr . ip6 daddr @hairpin6 masquerade
    }
    chain pre {
        type nat hook prerouting priority dstnat; policy accept;
        fib daddr type local jump route
        fib daddr type != local accept
        tcp flags & (fin | syn | rst | ack) == syn accept
        tcp flags & (fin | syn | rst | ack) != syn accept
        meta l4proto tcp tcp flags & (fin | rst) != 0x0 accept
    }
    chain route {
        ct mark set ip daddr . meta l4proto . th dport map @r4 goto routed
        ct mark set ip6 daddr . meta l4proto . th dport map @r6 goto routed
        ct mark set meta l4proto . th dport map @ra goto routed
        ip daddr vmap @ranges
    }
    chain routed {
        ct mark set ct mark & 0xfffff8ff | 0x00000100
        ct event set new,destroy
        ct event set new,destroy,"mark"
        meta l4proto tcp ct timeout set "tcp-short"
        meta l4proto udp ct timeout set "udp-short"
        ct mark vmap @lb
        dnat ip to ct mark map @be4p
        dnat ip6 to ct mark & 0xfffff800 map @be6p
        meta l4proto tcp dnat ip to ct mark map @be4
        meta l4proto udp dnat ip6 to ct mark & 0xfffff800 map @be6
    }
    chain slots {
        meta l4proto tcp dnat ip to ct mark . numgen inc mod 16 map @slot4
        meta l4proto udp dnat ip to ct mark & 0xfffff800 . numgen random mod 16 map @slot4
        meta l4proto tcp dnat ip6 to ct mark . numgen inc mod 65537 map @slot6
        meta l4proto tcp dnat ip to ct mark . jhash ip saddr mod 16 seed 0x5eed map @slot4
        meta l4proto udp dnat ip6 to ct mark . jhash ip6 saddr mod 16 seed 0x1 map @slot6
        dnat ip to ct mark . numgen inc mod 2 map @slot4p
        dnat ip6 to ct mark . jhash ip6 saddr mod 16 seed 0x5eed map @slot6p
        ct mark . numgen random mod 4 vmap @slotv
    }
}
"#;

pub fn timeouts() -> BTreeMap<String, TimeoutPolicy> {
    let tcp = TimeoutPolicy::Tcp {
        syn_sent: 30,
        established: 7200,
        fin_wait: 61,
        close_wait: 59,
        last_ack: 29,
        time_wait: 20,
        close: 9,
    };
    let udp = TimeoutPolicy::Udp { unreplied: 31, replied: 122 };
    BTreeMap::from([("tcp-short".to_owned(), tcp), ("udp-short".to_owned(), udp)])
}

pub fn sets() -> BTreeMap<String, Set> {
    use Field::*;
    let mut sets = BTreeMap::new();
    let mut add = |name: &str, set: Set| sets.insert(name.to_owned(), set);
    let mark = |mark| vec![KeyPart::Mark(mark)];
    let slot = |slot| vec![KeyPart::Mark(0x800), KeyPart::Slot(slot)];

    add("acct", hash(&[Mark], None).counted().with(&mark(0x800), element(Value::None).counter(7, 700)));
    let allow4 = interval(Ipv4, None)
        .counted()
        .range(address("0.0.0.0"), address("0.255.255.255"), element(Value::None))
        .range(address("10.0.0.0"), address("10.255.255.255"), element(Value::None))
        .range(address("11.0.0.0"), address("11.0.0.9"), element(Value::None).comment("office"))
        .range(address("192.168.1.1"), address("192.168.1.1"), element(Value::None))
        .range(address("255.255.255.0"), address("255.255.255.255"), element(Value::None));
    add("allow4", allow4);
    let allow6 = interval(Ipv6, None)
        .range(address("::1"), address("::1"), element(Value::None))
        .range(
            address("2001:db8::"),
            address("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"),
            element(Value::None).comment("doc"),
        )
        .range(address("ffff::"), address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), element(Value::None));
    add("allow6", allow6);
    let web4 = element(endpoint("10.0.0.1:80")).comment("web");
    add("be4", hash(&[Mark], Some(Data::Ipv4Port)).with(&mark(0x800), web4));
    add("be4p", hash(&[Mark], Some(Data::Ipv4)).with(&mark(0x800), element(host("10.0.0.1"))));
    add("be6", hash(&[Mark], Some(Data::Ipv6Port)).with(&mark(0x800), element(endpoint("[fd00::1]:8080"))));
    add("be6p", hash(&[Mark], Some(Data::Ipv6)).with(&mark(0x800), element(host("fd00::1"))));
    add("conn4", dynamic(Ipv4, 1000, None));
    add("connm", dynamic(Mark, 1000, None));
    let pair = [address("10.0.0.1"), address("10.0.0.2")];
    add("hairpin4", hash(&[Ipv4, Ipv4], None).with(&pair, element(Value::None)));
    let pair = [address("fd00::1"), address("fd00::2")];
    add("hairpin6", hash(&[Ipv6, Ipv6], None).with(&pair, element(Value::None)));
    add("kill", hash(&[Mark], None));
    let lb = hash(&[Mark], Some(Data::Verdict))
        .with(&mark(0x800), element(Value::Jump("slots".into())))
        .with(&mark(0x1000), element(Value::Goto("guard".into())).comment("many"));
    add("lb", lb);
    let ports = interval(Port, None)
        .range(KeyPart::Port(80), KeyPart::Port(80), element(Value::None))
        .range(KeyPart::Port(1000), KeyPart::Port(1999), element(Value::None))
        .range(KeyPart::Port(60000), KeyPart::Port(65535), element(Value::None));
    add("ports", ports);
    let protocols = hash(&[Protocol], None)
        .with(&[KeyPart::Protocol(Tcp)], element(Value::None))
        .with(&[KeyPart::Protocol(Udp)], element(Value::None));
    add("protocols", protocols);
    let listen = [address("10.0.0.1"), KeyPart::Protocol(Tcp), KeyPart::Port(80)];
    let route = element(Value::Mark(0x800)).comment("web").counter(3, 400);
    add("r4", hash(&[Ipv4, Protocol, Port], Some(Data::Mark)).counted().with(&listen, route));
    let listen = [address("fd00::1"), KeyPart::Protocol(Udp), KeyPart::Port(53)];
    let route = element(Value::Mark(0x1000));
    add("r6", hash(&[Ipv6, Protocol, Port], Some(Data::Mark)).counted().with(&listen, route));
    add("ra", hash(&[Protocol, Port], Some(Data::Mark)));
    let ranges = interval(Ipv4, Some(Data::Verdict)).range(
        address("10.0.0.0"),
        address("10.255.255.255"),
        element(Value::Goto("routed".into())),
    );
    add("ranges", ranges);
    add("rate4", dynamic(Ipv4, 1000, Some(60)));
    add("rate6", dynamic(Ipv6, 1000, Some(3600)));
    add("ratem", dynamic(Mark, 10, Some(60)));
    let slot4 = hash(&[Mark, Slot], Some(Data::Ipv4Port))
        .with(&slot(0), element(endpoint("10.0.0.1:80")).comment("one"))
        .with(&slot(15), element(endpoint("10.0.0.2:80")));
    add("slot4", slot4);
    add("slot4p", hash(&[Mark, Slot], Some(Data::Ipv4)).with(&slot(0), element(host("10.0.0.1"))));
    add("slot6", hash(&[Mark, Slot], Some(Data::Ipv6Port)));
    add("slot6p", hash(&[Mark, Slot], Some(Data::Ipv6)));
    add("slotv", hash(&[Mark, Slot], Some(Data::Verdict)));
    sets
}

const ROUTE: Load = Load::Mark { mask: Some(0xffff_f800) };
pub const MARK: Load = Load::Mark { mask: None };

pub fn chains() -> BTreeMap<String, Chain> {
    let base = |kind, hook, priority| Some(Base { kind, hook, priority });
    let mut chains = BTreeMap::new();
    let mut add = |name: &str, base, rules: Vec<Rule>| chains.insert(name.to_owned(), Chain { base, rules });
    add("forward", base(ChainKind::Filter, Hook::Forward, 0), forward());
    add("input", base(ChainKind::Filter, Hook::Input, -5), vec![]);
    add("output", base(ChainKind::Nat, Hook::Output, -100), vec![vec![Statement::Jump("route".into())]]);
    add("guard", None, guard());
    add("post", base(ChainKind::Nat, Hook::Postrouting, 100), post());
    add("pre", base(ChainKind::Nat, Hook::Prerouting, -100), pre());
    add("route", None, route());
    add("routed", None, routed());
    add("slots", None, slots());
    chains
}

fn forward() -> Vec<Rule> {
    use Statement::*;
    let counted = |direction| vec![Direction(direction), is_in(&[ROUTE], "acct")];
    let to = |prefix: &str, end| vec![DestinationIn(prefix.parse().expect("a prefix")), end];
    vec![
        counted(proxy_core::ruleset::Direction::Original),
        counted(proxy_core::ruleset::Direction::Reply),
        vec![IsProtocol(Tcp), is_in(&[MARK], "kill"), RejectReset],
        vec![is_in(&[MARK], "kill"), RejectUnreachable],
        [vec![IsFamily(Family::V4)], to("127.0.0.0/8", Accept)].concat(),
        [vec![IsFamily(Family::V6)], to("::1/128", Accept)].concat(),
        to("172.16.0.0/12", Return),
        to("0.0.0.0/0", Return),
        to("192.0.2.1/32", Return),
        to("fe80::/10", Return),
        to("2001:db8::/32", Return),
        vec![is_in(&[Load::SourceAddress(Family::V6)], "allow6"), Accept],
        vec![is_in(&[Load::DestinationPort], "ports"), Accept],
        vec![is_in(&[Load::Protocol], "protocols"), Accept],
    ]
}

fn guard() -> Vec<Rule> {
    use Statement::*;
    let update = |set: &str, key, over| Update { set: set.into(), key, over };
    let source = Load::SourceAddress(Family::V4);
    vec![
        vec![MarkIs { mask: 0x700, value: 0x100, equal: true }, Return],
        vec![MarkIs { mask: 0x700, value: 0x100, equal: false }, Accept],
        vec![In { key: vec![source], set: "allow4".into(), negate: true }, Goto("slots".into())],
        vec![CountOver(20), Accept],
        vec![update("conn4", source, Over::Connections(20)), Accept],
        vec![update("connm", ROUTE, Over::Connections(3)), Return],
        vec![update("rate4", source, Over::Rate { count: 300, per: RateUnit::Minute, burst: 300 }), Return],
        vec![
            update("rate6", Load::SourceAddress(Family::V6), Over::Rate { count: 3, per: RateUnit::Second, burst: 5 }),
            Return,
        ],
        vec![update("ratem", MARK, Over::Rate { count: 7, per: RateUnit::Hour, burst: 1 }), Return],
    ]
}

fn post() -> Vec<Rule> {
    use Statement::*;
    let pair = |family| [Load::SourceAddress(family), Load::DestinationAddress(family)];
    vec![
        vec![is_in(&[MARK], "kill"), Masquerade],
        vec![IsDnatted, is_in(&pair(Family::V4), "hairpin4"), Masquerade],
        vec![IsDnatted, is_in(&pair(Family::V6), "hairpin6"), Masquerade],
    ]
}

fn pre() -> Vec<Rule> {
    use Statement::*;
    use tcp_flags::*;
    let mask = FIN | SYN | RST | ACK;
    vec![
        vec![DestinationIsLocal(true), Jump("route".into())],
        vec![DestinationIsLocal(false), Accept],
        vec![TcpFlags { mask, value: SYN, equal: true }, Accept],
        vec![TcpFlags { mask, value: SYN, equal: false }, Accept],
        vec![IsProtocol(Tcp), TcpFlags { mask: FIN | RST, value: 0, equal: false }, Accept],
    ]
}

fn route() -> Vec<Rule> {
    use Statement::*;
    let listen = |family| vec![Load::DestinationAddress(family), Load::Protocol, Load::DestinationPort];
    let to = |key, map: &str| vec![SetMarkFrom { key, map: map.into() }, Goto("routed".into())];
    vec![
        to(listen(Family::V4), "r4"),
        to(listen(Family::V6), "r6"),
        to(vec![Load::Protocol, Load::DestinationPort], "ra"),
        vec![VerdictMap { key: vec![Load::DestinationAddress(Family::V4)], map: "ranges".into() }],
    ]
}

fn routed() -> Vec<Rule> {
    use Statement::*;
    vec![
        vec![SetMarkBits { keep: 0xffff_f8ff, bits: 0x100 }],
        vec![SetEvents(events::NEW | events::DESTROY)],
        vec![SetEvents(events::NEW | events::DESTROY | events::MARK)],
        vec![IsProtocol(Tcp), SetTimeout("tcp-short".into())],
        vec![IsProtocol(Udp), SetTimeout("udp-short".into())],
        vec![VerdictMap { key: vec![MARK], map: "lb".into() }],
        vec![dnat(Family::V4, &[MARK], "be4p", false)],
        vec![dnat(Family::V6, &[ROUTE], "be6p", false)],
        vec![IsProtocol(Tcp), dnat(Family::V4, &[MARK], "be4", true)],
        vec![IsProtocol(Udp), dnat(Family::V6, &[ROUTE], "be6", true)],
    ]
}

fn slots() -> Vec<Rule> {
    use Statement::*;
    let hash = |family, seed| Load::SourceHash { family, modulus: 16, seed };
    vec![
        vec![IsProtocol(Tcp), dnat(Family::V4, &[MARK, Load::Sequence { modulus: 16 }], "slot4", true)],
        vec![IsProtocol(Udp), dnat(Family::V4, &[ROUTE, Load::Random { modulus: 16 }], "slot4", true)],
        vec![IsProtocol(Tcp), dnat(Family::V6, &[MARK, Load::Sequence { modulus: 65537 }], "slot6", true)],
        vec![IsProtocol(Tcp), dnat(Family::V4, &[MARK, hash(Family::V4, 0x5eed)], "slot4", true)],
        vec![IsProtocol(Udp), dnat(Family::V6, &[MARK, hash(Family::V6, 1)], "slot6", true)],
        vec![dnat(Family::V4, &[MARK, Load::Sequence { modulus: 2 }], "slot4p", false)],
        vec![dnat(Family::V6, &[MARK, hash(Family::V6, 0x5eed)], "slot6p", false)],
        vec![VerdictMap { key: vec![MARK, Load::Random { modulus: 4 }], map: "slotv".into() }],
    ]
}

pub fn is_in(key: &[Load], set: &str) -> Statement {
    Statement::In { key: key.to_vec(), set: set.into(), negate: false }
}

fn dnat(family: Family, key: &[Load], map: &str, port: bool) -> Statement {
    Statement::Dnat { family, key: key.to_vec(), map: map.into(), port }
}

fn address(text: &str) -> KeyPart {
    KeyPart::Address(text.parse().expect("an address"))
}

pub fn host(text: &str) -> Value {
    Value::Address(text.parse::<IpAddr>().expect("an address"))
}

pub fn endpoint(text: &str) -> Value {
    Value::Endpoint(text.parse().expect("an address and a port"))
}
