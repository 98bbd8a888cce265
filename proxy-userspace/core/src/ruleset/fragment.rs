//! What one route adds to the skeleton.

use std::{borrow::Cow, net::IpAddr};

use super::{
    Chain, Counter, Data, Element, Family, Field, Key, KeyPart, Load, Over, Rule, SetKind, SetSpec, Statement as S,
    TimeoutPolicy, Value, names as n,
    skeleton::{FAMILIES, dnat},
};
use crate::{
    balance,
    config::{Balance, Keepalive, Listen, PortRange, Protocol, RateUnit, Route, RouteName, SourceAddress, Target},
    flow::MarkLayout,
    plan::{RoutePlan, SharedListen},
};

mod clients;

/// A route's part of the table. Parts of different routes may name the same chain, set or shared element: it is there
/// as long as one of them does.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fragment {
    pub timeouts: Vec<(String, TimeoutPolicy)>,
    pub sets: Vec<(String, SetSpec)>,
    pub chains: Vec<(String, Chain)>,
    pub elements: Vec<Member>,
}

/// An element and the set it is in.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    pub set: Cow<'static, str>,
    pub key: Key,
    pub element: Element,
}

/// An address a route's backend has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    /// `None`: the port the client dialled.
    pub port: Option<u16>,
    pub weight: u16,
    pub up: bool,
}

impl Endpoint {
    fn family(&self) -> Family {
        family_of(self.address)
    }
}

/// What a fragment depends on beside the route itself.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    pub mark: MarkLayout,
    /// The mark of this route's connections.
    pub own: u32,
    /// Marks of the routes that share a port with this one.
    pub marks: &'a dyn Marks,
    pub endpoints: &'a [Endpoint],
    /// The kernel counted a refusal for want of a backend once: keep the counter.
    pub counts_no_backend: bool,
}

/// Route name → mark.
pub trait Marks: std::fmt::Debug {
    fn mark(&self, route: &RouteName) -> Option<u32>;
}

/// The fragment of a route that the nft engine serves.
pub fn fragment(plan: &RoutePlan, context: Context<'_>) -> Fragment {
    let mut fragment = counters(&plan.route.name, context.own);
    fragment.listen(plan, &context);
    fragment.timeouts(plan, &context);
    fragment.policy(&plan.route, &context);
    fragment.backends(&plan.route, &context);
    fragment
}

/// The fragment of a route that is no longer configured but still has connections: no new ones, still counted.
pub fn draining(name: &RouteName, mark: u32) -> Fragment {
    counters(name, mark)
}

/// The fragment of a route that the daemon listens for: what is dialled at its own addresses passes to its sockets, also
/// where a route of the kernel has the port at every address of this machine.
pub fn passing(plan: &RoutePlan) -> Fragment {
    let mut fragment = Fragment::default();
    // One element per port: ranges that overlap would name the same one twice.
    let apart = |l: &Listen| l.ports.is_single() || plan.route.shares_port_with.is_empty();
    let own = plan.own_listens.iter().chain(plan.shared_listens.iter().map(|shared| &shared.listen));
    for listen in own.filter(|l| !l.address.is_unspecified() && !l.address.is_loopback() && apart(l)) {
        for port in listen.ports.first..=listen.ports.last {
            let listen = Listen { ports: PortRange { first: port, last: port }, ..*listen };
            let (set, key) = port_key(listen, plan.route.protocol, n::SHARED, n::SHARED_ANY);
            fragment.member(set, key, Value::Goto(n::RELAYED.into()));
        }
    }
    if !fragment.elements.is_empty() {
        fragment.chain(n::RELAYED.into(), Vec::new());
    }
    fragment
}

fn counters(name: &RouteName, mark: u32) -> Fragment {
    // Most routes add two more: where they listen, and their backend.
    let mut fragment = Fragment { elements: Vec::with_capacity(5), ..Fragment::default() };
    let key = || Key::new(&[KeyPart::Mark(mark)]);
    fragment.elements.push(Member {
        set: n::CONNECTIONS.into(),
        key: key(),
        element: Element { comment: Some(name.as_str().into()), ..Element::of(Value::None) },
    });
    fragment.member(n::TRAFFIC_IN, key(), Value::None);
    fragment.member(n::TRAFFIC_OUT, key(), Value::None);
    fragment
}

impl Element {
    /// An element without range or comment, its counter at zero.
    pub fn of(value: Value) -> Self {
        Self { last: None, value, comment: None, counter: Counter::default() }
    }
}

pub(crate) fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

impl Fragment {
    /// Both.
    pub fn and(mut self, other: Self) -> Self {
        self.timeouts.extend(other.timeouts);
        self.sets.extend(other.sets);
        self.chains.extend(other.chains);
        self.elements.extend(other.elements);
        self
    }

    fn member(&mut self, set: impl Into<Cow<'static, str>>, key: Key, value: Value) {
        self.elements.push(Member { set: set.into(), key, element: Element::of(value) });
    }

    fn range(&mut self, set: String, first: Key, last: Key, value: Value) {
        let element = Element { last: Some(last), ..Element::of(value) };
        self.elements.push(Member { set: set.into(), key: first, element });
    }

    fn chain(&mut self, name: String, rules: Vec<Rule>) {
        self.chains.push((name, Chain { base: None, rules }));
    }

    fn listen(&mut self, plan: &RoutePlan, context: &Context<'_>) {
        for listen in &plan.own_listens {
            self.listen_alone(plan.route.protocol, *listen, context.own);
        }
        for (index, shared) in plan.shared_listens.iter().enumerate() {
            self.listen_shared(&plan.route, index, shared, context);
        }
    }

    fn listen_alone(&mut self, protocol: Protocol, listen: Listen, mark: u32) {
        let i = family_of(listen.address) as usize;
        let any = listen.address.is_unspecified();
        if listen.ports.is_single() {
            let (set, key) = port_key(listen, protocol, n::EXACT, n::ANY);
            self.member(set, key, Value::Mark(mark));
            return;
        }
        let place = if any { format!("any{}", [4, 6][i]) } else { listen.address.to_string().replace(':', "_") };
        let ports = format!("ports-{}-{place}", protocol.as_str());
        let field = SetSpec { key: vec![Field::Port], data: Some(Data::Mark), kind: SetKind::Interval, counter: false };
        self.sets.push((ports.clone(), field));
        let lookup = S::SetMarkFrom { key: vec![Load::DestinationPort], map: ports.clone() };
        self.chain(ports.clone(), vec![vec![lookup, S::Goto("routed".into())]]);
        let jump = Value::Jump(ports.as_str().into());
        if any {
            self.member(n::ANY_RANGES[i], Key::new(&[KeyPart::Protocol(protocol)]), jump);
        } else {
            let key = Key::new(&[KeyPart::Address(listen.address), KeyPart::Protocol(protocol)]);
            self.member(n::RANGES[i], key, jump);
        }
        let (first, last) = (listen.ports.first, listen.ports.last);
        self.range(ports, Key::new(&[KeyPart::Port(first)]), Key::new(&[KeyPart::Port(last)]), Value::Mark(mark));
    }

    /// Several routes on one port, told apart by the client's network.
    fn listen_shared(&mut self, route: &Route, index: usize, shared: &SharedListen, context: &Context<'_>) {
        let chain = format!("clients-{}-{index}", route.name);
        let family = family_of(shared.listen.address);
        let i = family as usize;
        let (set, key) = port_key(shared.listen, route.protocol, n::SHARED, n::SHARED_ANY);
        self.member(set, key, Value::Jump(chain.as_str().into()));
        let field = [Field::Ipv4, Field::Ipv6][i];
        let spec = SetSpec { key: vec![field], data: Some(Data::Mark), kind: SetKind::Interval, counter: false };
        self.sets.push((chain.clone(), spec));
        let lookup = S::SetMarkFrom { key: vec![Load::SourceAddress(family)], map: chain.clone() };
        let unmatched = vec![S::SetMark(context.own), S::Goto(n::NO_ROUTE.into())];
        self.chain(chain.clone(), vec![vec![lookup, S::Goto("routed".into())], unmatched]);
        for (first, last, mark) in clients::segments(shared, family, context) {
            let key = |ip| Key::new(&[KeyPart::Address(ip)]);
            self.range(chain.clone(), key(first), key(last), Value::Mark(mark));
        }
        self.member(n::NO_ROUTE, Key::new(&[KeyPart::Mark(context.own)]), Value::None);
    }

    fn timeouts(&mut self, plan: &RoutePlan, context: &Context<'_>) {
        let policy = timeout_policy(&plan.route);
        if !plan.ct_timeouts || policy == TimeoutPolicy::TCP_STANDARD || policy == TimeoutPolicy::UDP_STANDARD {
            return;
        }
        let name = match policy {
            TimeoutPolicy::Tcp { syn_sent, established, fin_wait, .. } => {
                format!("tcp-{syn_sent}-{established}-{fin_wait}")
            }
            TimeoutPolicy::Udp { replied, .. } => format!("udp-{replied}"),
        };
        self.timeouts.push((name.clone(), policy));
        let chain = format!("timeouts-{name}");
        self.chain(chain.clone(), vec![vec![S::IsProtocol(plan.route.protocol), S::SetTimeout(name)]]);
        self.member(n::TIMEOUTS, Key::new(&[KeyPart::Mark(context.own)]), Value::Jump(chain.into()));
    }

    fn policy(&mut self, route: &Route, context: &Context<'_>) {
        let mut rules = Vec::new();
        self.access(route, &mut rules, context);
        self.limits(route, &mut rules, context);
        if !rules.is_empty() {
            let chain = format!("policy-{}", route.name);
            self.member(n::POLICIES, Key::new(&[KeyPart::Mark(context.own)]), Value::Jump(chain.as_str().into()));
            self.chain(chain, rules);
        }
    }

    fn access(&mut self, route: &Route, rules: &mut Vec<Rule>, context: &Context<'_>) {
        if route.allow.is_empty() && route.deny.is_empty() {
            return;
        }
        self.member(n::DENIED, Key::new(&[KeyPart::Mark(context.own)]), Value::None);
        for family in FAMILIES {
            let denied = || S::Goto(n::DENIED.into());
            for (list, nets, negate) in [("deny", &route.deny, false), ("allow", &route.allow, true)] {
                let set = format!("{list}{}-{}", [4, 6][family as usize], route.name);
                let ranges = clients::ranges(nets, family);
                if ranges.is_empty() {
                    if negate && !nets.is_empty() {
                        rules.push(vec![S::IsFamily(family), denied()]);
                    }
                    continue;
                }
                let field = [Field::Ipv4, Field::Ipv6][family as usize];
                let spec = SetSpec { key: vec![field], data: None, kind: SetKind::Interval, counter: false };
                self.sets.push((set.clone(), spec));
                for (first, last) in ranges {
                    let key = |ip| Key::new(&[KeyPart::Address(ip)]);
                    self.range(set.clone(), key(first), key(last), Value::None);
                }
                rules.push(vec![S::In { key: vec![Load::SourceAddress(family)], set, negate }, denied()]);
            }
        }
    }

    fn limits(&mut self, route: &Route, rules: &mut Vec<Rule>, context: &Context<'_>) {
        let key = Key::new(&[KeyPart::Mark(context.own)]);
        if let Some(rate) = route.limits.rate_per_client {
            let count = rate.count.get();
            let over = Over::Rate { count, per: rate.per, burst: count };
            // An idle element is full again after one unit: it may be forgotten then.
            let timeout_seconds = match rate.per {
                RateUnit::Second => 10,
                RateUnit::Minute => 60,
                RateUnit::Hour => 3600,
            };
            self.per_client(route, "rate", over, Some(timeout_seconds), rules, n::LIMIT_RATE);
            self.member(n::LIMIT_RATE, key.clone(), Value::None);
        }
        if let Some(count) = route.limits.connections_per_client {
            self.per_client(route, "count", Over::Connections(count.get()), None, rules, n::LIMIT_PER_CLIENT);
            self.member(n::LIMIT_PER_CLIENT, key.clone(), Value::None);
        }
        if let Some(count) = route.limits.connections {
            rules.push(vec![S::CountOver(count.get()), S::Goto(n::LIMIT_CONNECTIONS.into())]);
            self.member(n::LIMIT_CONNECTIONS, key, Value::None);
        }
    }

    fn per_client(
        &mut self,
        route: &Route,
        what: &str,
        over: Over,
        timeout_seconds: Option<u32>,
        rules: &mut Vec<Rule>,
        refusal: &str,
    ) {
        for (family, field) in [(Family::V4, Field::Ipv4), (Family::V6, Field::Ipv6)] {
            if !route.listen.iter().any(|l| family_of(l.address) == family) {
                continue;
            }
            let set = format!("{what}{}-{}", [4, 6][family as usize], route.name);
            let kind = SetKind::Dynamic { size: CLIENTS, timeout_seconds };
            self.sets.push((set.clone(), SetSpec { key: vec![field], data: None, kind, counter: false }));
            rules.push(vec![S::Update { set, key: Load::SourceAddress(family), over }, S::Goto(refusal.into())]);
        }
    }

    fn backends(&mut self, route: &Route, context: &Context<'_>) {
        if route.source_address == SourceAddress::Client {
            self.member(n::CLIENT_SOURCE, Key::new(&[KeyPart::Mark(context.own)]), Value::None);
            for endpoint in context.endpoints {
                // A backend that dials its own service would answer itself directly.
                let key = Key::new(&[KeyPart::Address(endpoint.address); 2]);
                self.member(n::HAIRPIN[endpoint.family() as usize], key, Value::None);
            }
        }
        match route.backends.as_slice() {
            [only] if matches!(only.target, Target::Address { .. }) => self.one_backend(context),
            _ => self.balanced(route, context),
        }
        let served = |family| context.endpoints.iter().any(|e| e.up && e.family() == family);
        let unserved = route.listen.iter().any(|l| !served(family_of(l.address)));
        if unserved || context.counts_no_backend {
            self.member(n::NO_BACKEND, Key::new(&[KeyPart::Mark(context.own)]), Value::None);
        }
    }

    fn one_backend(&mut self, context: &Context<'_>) {
        for endpoint in context.endpoints.iter().filter(|e| e.up) {
            let i = endpoint.family() as usize;
            let set = if endpoint.port.is_some() { n::BACKEND[i] } else { n::BACKEND_SAME_PORT[i] };
            self.member(set, Key::new(&[KeyPart::Mark(context.own)]), target(endpoint));
        }
    }

    fn balanced(&mut self, route: &Route, context: &Context<'_>) {
        let slots = balance::slots(route.balance, &route.backends);
        let (chain, rules) = balancer(route, slots);
        self.member(n::BALANCER, Key::new(&[KeyPart::Mark(context.own)]), Value::Goto(chain.as_str().into()));
        self.chain(chain, rules);
        for family in FAMILIES {
            let endpoints: Vec<&Endpoint> = context.endpoints.iter().filter(|e| e.family() == family).collect();
            for (slot, index) in balance::fill(route.balance, &endpoints, slots).into_iter().enumerate() {
                let endpoint = endpoints[index];
                let set = if endpoint.port.is_some() { n::SLOTS } else { n::SLOTS_SAME_PORT };
                let key = Key::new(&[KeyPart::Mark(context.own), KeyPart::Slot(slot as u32)]);
                self.member(set[family as usize], key, target(endpoint));
            }
        }
    }
}

/// Clients remembered per limit. A full set lets new clients pass unlimited (`nft_dynset_eval`).
const CLIENTS: u32 = 65_536;

fn port_key(
    listen: Listen,
    protocol: Protocol,
    exact: [&'static str; 2],
    any: [&'static str; 2],
) -> (&'static str, Key) {
    let i = family_of(listen.address) as usize;
    let port = KeyPart::Port(listen.ports.first);
    if listen.address.is_unspecified() {
        (any[i], Key::new(&[KeyPart::Protocol(protocol), port]))
    } else {
        (exact[i], Key::new(&[KeyPart::Address(listen.address), KeyPart::Protocol(protocol), port]))
    }
}

fn target(endpoint: &Endpoint) -> Value {
    match endpoint.port {
        Some(port) => Value::Endpoint((endpoint.address, port).into()),
        None => Value::Address(endpoint.address),
    }
}

/// The chain that picks a slot. Round-robin counts, so each such route has its own: routes that took turns on one
/// counter would each see only every other slot. The others are shared by all routes with that many slots.
fn balancer(route: &Route, slots: u32) -> (String, Vec<Rule>) {
    let (name, pick): (String, fn(Family, u32) -> Load) = match route.balance {
        Balance::RoundRobin | Balance::LeastConnections => {
            (format!("round-robin-{}", route.name), |_, modulus| Load::Sequence { modulus })
        }
        Balance::Random => (format!("random-{slots}"), |_, modulus| Load::Random { modulus }),
        Balance::SourceHash | Balance::Maglev => {
            (format!("hash-{slots}"), |family, modulus| Load::SourceHash { family, modulus, seed: balance::HASH_SEED })
        }
    };
    let mut rules: Vec<Rule> = Vec::new();
    for family in FAMILIES {
        let key = || vec![Load::Mark { mask: None }, pick(family, slots)];
        rules.extend(dnat(family, key, n::SLOTS, n::SLOTS_SAME_PORT));
    }
    rules.push(vec![S::Goto(n::NO_BACKEND.into())]);
    (name, rules)
}

/// The conntrack timeouts of a route, whole seconds, at least 1.
pub fn timeout_policy(route: &Route) -> TimeoutPolicy {
    let seconds =
        |d: std::time::Duration| u32::try_from(d.as_secs_f64().ceil() as u64).unwrap_or(FOREVER).clamp(1, FOREVER);
    let idle = match (route.keepalive, route.timeouts.idle) {
        (Keepalive::Immortal, _) | (_, None) => FOREVER,
        (Keepalive::Standard, Some(idle)) => seconds(idle),
        (Keepalive::Extended, Some(idle)) => seconds(idle.saturating_mul(6)),
    };
    match route.protocol {
        Protocol::Tcp => {
            let half_closed = route.timeouts.half_closed.map_or(FOREVER, seconds);
            TimeoutPolicy::tcp(seconds(route.timeouts.connect), idle, half_closed)
        }
        Protocol::Udp => TimeoutPolicy::udp(idle),
    }
}

/// Twenty-four days: conntrack keeps time in 32 bits of jiffies, half of which are the past (`nf_ct_expires`), and a
/// kernel may count a thousand a second.
pub const FOREVER: u32 = 24 * 86_400;
