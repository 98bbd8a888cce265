//! The static part of the table: chains and empty sets that are the same whatever the routes are.

use super::{
    Base, Chain, ChainKind, Data, Direction, Family, Field, Hook, Load, Rule, Ruleset, Set, SetKind, SetSpec,
    Statement as S, TimeoutPolicy, events, names as n, tcp_flags,
};
use crate::{
    config::Protocol,
    flow::{End, MarkLayout},
};

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The ruleset of no routes.
pub fn skeleton(mark: MarkLayout) -> Ruleset {
    let mut ruleset = Ruleset::default();
    ruleset.timeouts.insert(n::TCP_STANDARD.into(), TimeoutPolicy::TCP_STANDARD);
    ruleset.timeouts.insert(n::UDP_STANDARD.into(), TimeoutPolicy::UDP_STANDARD);
    for (name, spec) in sets() {
        ruleset.sets.insert(name.into(), Set { spec, elements: Default::default() });
    }
    for (name, chain) in chains(mark) {
        ruleset.chains.insert(name.into(), chain);
    }
    ruleset
}

fn sets() -> Vec<(&'static str, SetSpec)> {
    let map =
        |key: &[Field], data| SetSpec { key: key.to_vec(), data: Some(data), kind: SetKind::Hash, counter: false };
    let set = |key: &[Field]| SetSpec { key: key.to_vec(), data: None, kind: SetKind::Hash, counter: false };
    let counted = || SetSpec { counter: true, ..set(&[Field::Mark]) };
    let mut sets = vec![
        (n::CONNECTIONS, counted()),
        (n::TRAFFIC_IN, counted()),
        (n::TRAFFIC_OUT, counted()),
        (n::TIMEOUTS, map(&[Field::Mark], Data::Verdict)),
        (n::POLICIES, map(&[Field::Mark], Data::Verdict)),
        (n::BALANCER, map(&[Field::Mark], Data::Verdict)),
        (n::CLIENT_SOURCE, set(&[Field::Mark])),
    ];
    sets.extend(n::REFUSALS.map(|(name, _)| (name, counted())));
    for (i, address, host, endpoint) in
        [(0, Field::Ipv4, Data::Ipv4, Data::Ipv4Port), (1, Field::Ipv6, Data::Ipv6, Data::Ipv6Port)]
    {
        sets.extend([
            (n::EXACT[i], map(&[address, Field::Protocol, Field::Port], Data::Mark)),
            (n::SHARED[i], map(&[address, Field::Protocol, Field::Port], Data::Verdict)),
            (n::RANGES[i], map(&[address, Field::Protocol], Data::Verdict)),
            (n::ANY[i], map(&[Field::Protocol, Field::Port], Data::Mark)),
            (n::SHARED_ANY[i], map(&[Field::Protocol, Field::Port], Data::Verdict)),
            (n::ANY_RANGES[i], map(&[Field::Protocol], Data::Verdict)),
            (n::BACKEND[i], map(&[Field::Mark], endpoint)),
            (n::BACKEND_SAME_PORT[i], map(&[Field::Mark], host)),
            (n::SLOTS[i], map(&[Field::Mark, Field::Slot], endpoint)),
            (n::SLOTS_SAME_PORT[i], map(&[Field::Mark, Field::Slot], host)),
            (n::HAIRPIN[i], set(&[address, address])),
        ]);
    }
    sets
}

fn chains(mark: MarkLayout) -> Vec<(&'static str, Chain)> {
    let mut chains = base_chains(mark);
    chains.extend([
        ("route", plain(vec![jump_family(Family::V4, "route4"), jump_family(Family::V6, "route6")])),
        ("route4", plain(route(Family::V4))),
        ("route6", plain(route(Family::V6))),
        ("routed", plain(routed())),
        ("track", plain(track(mark))),
        ("ending", plain(ending(mark))),
        ("ending-reset", plain(ending_reset(mark))),
        ("cut", plain(cut())),
        ("left-over", plain(vec![vec![S::IsProtocol(Protocol::Tcp), S::RejectReset]])),
    ]);
    chains.extend(n::REFUSALS.map(|(name, _)| (name, plain(refuse(name)))));
    chains
}

fn plain(rules: Vec<Rule>) -> Chain {
    Chain { base: None, rules }
}

fn base_chains(mark: MarkLayout) -> Vec<(&'static str, Chain)> {
    let base = |kind, hook, priority, rules| Chain { base: Some(Base { kind, hook, priority }), rules };
    let ours = || S::MarkIs { mask: mark.id_mask(), value: 0, equal: false };
    let key = vec![Load::Mark { mask: Some(mark.id_mask()) }];
    let hairpin = |family: Family| {
        let key = vec![Load::SourceAddress(family), Load::DestinationAddress(family)];
        vec![S::IsDnatted, S::In { key, set: n::HAIRPIN[family as usize].into(), negate: false }, S::Masquerade]
    };
    let masquerade =
        vec![ours(), S::IsDnatted, S::In { key, set: n::CLIENT_SOURCE.into(), negate: true }, S::Masquerade];
    vec![
        ("prerouting", base(ChainKind::Nat, Hook::Prerouting, -100, vec![vec![S::Jump("route".into())]])),
        ("output", base(ChainKind::Nat, Hook::Output, -100, vec![vec![S::Jump("route".into())]])),
        (
            "postrouting",
            base(ChainKind::Nat, Hook::Postrouting, 100, vec![masquerade, hairpin(Family::V4), hairpin(Family::V6)]),
        ),
        ("track-forward", base(ChainKind::Filter, Hook::Forward, 0, counted(mark, &[]))),
        ("track-output", base(ChainKind::Filter, Hook::Output, 0, counted(mark, &[]))),
        // What loopback delivers was counted on its way out.
        ("track-input", base(ChainKind::Filter, Hook::Input, 0, counted(mark, &[S::NotFromLoopback]))),
    ]
}

fn jump_family(family: Family, chain: &str) -> Rule {
    vec![S::IsFamily(family), S::Jump(chain.into())]
}

/// Finds the route of a new connection: the exact address first, then any local one; the exact port before ranges.
fn route(family: Family) -> Vec<Rule> {
    let i = family as usize;
    let exact = vec![Load::DestinationAddress(family), Load::Protocol, Load::DestinationPort];
    let any = vec![Load::Protocol, Load::DestinationPort];
    let vmap = |key: Vec<Load>, map: &str| vec![S::VerdictMap { key, map: map.into() }];
    let mark = |key: Vec<Load>, map: &str| vec![S::SetMarkFrom { key, map: map.into() }, S::Goto("routed".into())];
    let loopback = match family {
        Family::V4 => ipnet::IpNet::from(ipnet::Ipv4Net::new_assert([127, 0, 0, 0].into(), 8)),
        Family::V6 => ipnet::IpNet::from(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128)),
    };
    vec![
        vmap(exact.clone(), n::SHARED[i]),
        mark(exact, n::EXACT[i]),
        vmap(vec![Load::DestinationAddress(family), Load::Protocol], n::RANGES[i]),
        vec![S::DestinationIsLocal(false), S::Return],
        // A loopback source cannot be masqueraded onto the wire without route_localnet.
        vec![S::DestinationIn(loopback), S::Return],
        vmap(any.clone(), n::SHARED_ANY[i]),
        mark(any, n::ANY[i]),
        vmap(vec![Load::Protocol], n::ANY_RANGES[i]),
    ]
}

/// The mark is the route's now; everything else is keyed by it.
fn routed() -> Vec<Rule> {
    let key = || vec![Load::Mark { mask: None }];
    let vmap = |map: &str| vec![S::VerdictMap { key: key(), map: map.into() }];
    let any = tcp_flags::FIN | tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK;
    let mut rules = vec![
        // A connection begins with a SYN. Anything else is a left-over: routed again it would reach some backend that
        // does not know it (`nf_conntrack_tcp_loose`).
        vec![S::TcpFlags { mask: any, value: tcp_flags::SYN, equal: false }, S::Goto("left-over".into())],
        vec![S::In { key: key(), set: n::CONNECTIONS.into(), negate: false }],
        vec![S::SetEvents(events::NEW | events::DESTROY)],
        vec![S::IsProtocol(Protocol::Tcp), S::SetTimeout(n::TCP_STANDARD.into())],
        vec![S::IsProtocol(Protocol::Udp), S::SetTimeout(n::UDP_STANDARD.into())],
        vmap(n::TIMEOUTS),
        vmap(n::POLICIES),
        vmap(n::BALANCER),
    ];
    for family in FAMILIES {
        rules.extend(dnat(family, key, n::BACKEND, n::BACKEND_SAME_PORT));
    }
    rules.push(vec![S::Goto(n::NO_BACKEND.into())]);
    rules
}

/// The rules that look a backend up by `key`, with and without a port of its own.
pub(super) fn dnat(
    family: Family,
    key: impl Fn() -> Vec<Load>,
    with_port: [&str; 2],
    same_port: [&str; 2],
) -> Vec<Rule> {
    let i = family as usize;
    let to = |port, map: &str| S::Dnat { family, key: key(), map: map.into(), port };
    vec![
        vec![S::IsProtocol(Protocol::Tcp), to(true, with_port[i])],
        vec![S::IsProtocol(Protocol::Udp), to(true, with_port[i])],
        vec![to(false, same_port[i])],
    ]
}

/// Every packet: counted if its connection is of a route, and then looked at for an end. The look-up is the question
/// whether it is, so that a packet pays for one.
fn counted(mark: MarkLayout, only: &[S]) -> Vec<Rule> {
    [(Direction::Original, n::TRAFFIC_IN), (Direction::Reply, n::TRAFFIC_OUT)]
        .map(|(direction, set)| {
            let key = vec![Load::Mark { mask: Some(mark.id_mask()) }];
            let of_a_route = S::In { key, set: set.into(), negate: false };
            [only, &[S::Direction(direction), of_a_route, S::Goto("track".into())]].concat()
        })
        .into()
}

/// The rare ends among the packets of routed connections.
fn track(mark: MarkLayout) -> Vec<Rule> {
    vec![
        vec![end_is(mark, End::Cut), S::Goto("cut".into())],
        vec![tcp_any(tcp_flags::FIN | tcp_flags::RST), S::Goto("ending".into())],
    ]
}

fn end_is(mark: MarkLayout, end: End) -> S {
    S::MarkIs { mask: mark.end_mask(), value: mark.end_bits(end), equal: true }
}

fn set_end(mark: MarkLayout, end: End) -> S {
    S::SetMarkBits { keep: !mark.end_mask(), bits: mark.end_bits(end) }
}

fn tcp_any(mask: u8) -> S {
    S::TcpFlags { mask, value: 0, equal: false }
}

/// The first FIN, and the second: `finished_*` is known here and told at once.
fn ending(mark: MarkLayout) -> Vec<Rule> {
    let told = || S::SetEvents(events::NEW | events::DESTROY | events::MARK);
    let step = |direction, from| vec![S::Direction(direction), end_is(mark, from)];
    let second = |direction, from, to| [step(direction, from), vec![told(), set_end(mark, to), S::Return]].concat();
    let first = |direction, to| [step(direction, End::Open), vec![set_end(mark, to), S::Return]].concat();
    vec![
        vec![tcp_any(tcp_flags::RST), S::Goto("ending-reset".into())],
        second(Direction::Original, End::BackendFinished, End::FinishedBackendFirst),
        second(Direction::Reply, End::ClientFinished, End::FinishedClientFirst),
        first(Direction::Original, End::ClientFinished),
        first(Direction::Reply, End::BackendFinished),
    ]
}

/// A reset ends what is open or half-closed; after both FINs it says nothing new.
fn ending_reset(mark: MarkLayout) -> Vec<Rule> {
    let told = || S::SetEvents(events::NEW | events::DESTROY | events::MARK);
    let rule =
        |direction, from, to| vec![S::Direction(direction), end_is(mark, from), told(), set_end(mark, to), S::Return];
    [(Direction::Original, End::ResetByClient), (Direction::Reply, End::ResetByBackend)]
        .into_iter()
        .flat_map(|(direction, to)| {
            [End::Open, End::ClientFinished, End::BackendFinished].map(|from| rule(direction, from, to))
        })
        .collect()
}

/// Answers with resets, but lets those of the ends pass, and the daemon's SYNs that make a silent end speak.
fn cut() -> Vec<Rule> {
    vec![
        vec![tcp_any(tcp_flags::RST | tcp_flags::SYN), S::Accept],
        vec![S::IsProtocol(Protocol::Tcp), S::RejectReset],
        vec![S::RejectUnreachable],
    ]
}

fn refuse(set: &str) -> Vec<Rule> {
    vec![
        vec![S::In { key: vec![Load::Mark { mask: None }], set: set.into(), negate: false }],
        vec![S::IsProtocol(Protocol::Tcp), S::RejectReset],
        vec![S::RejectUnreachable],
    ]
}

impl TimeoutPolicy {
    /// Of a TCP route that says nothing about timeouts: `connect` 30 s, `idle` 4 h, `half_closed` 30 min.
    pub const TCP_STANDARD: Self = Self::tcp(30, 14_400, 1_800);
    /// Of a UDP route that says nothing about timeouts: 2 min (RFC 4787 REQ-5), 30 s until the first answer.
    pub const UDP_STANDARD: Self = Self::udp(120);

    /// Seconds. `TIME_WAIT` is as long as Linux backends keep theirs (`TCP_TIMEWAIT_LEN`): given out again sooner, the
    /// gateway's source port would meet the backend's memory of its last use, and the new connection would wait a second.
    pub const fn tcp(connect: u32, idle: u32, half_closed: u32) -> Self {
        Self::Tcp {
            syn_sent: connect,
            established: idle,
            fin_wait: half_closed,
            close_wait: half_closed,
            last_ack: 30,
            time_wait: 60,
            close: 10,
        }
    }

    /// Seconds.
    pub const fn udp(idle: u32) -> Self {
        Self::Udp { unreplied: if idle < 30 { idle } else { 30 }, replied: idle }
    }
}
