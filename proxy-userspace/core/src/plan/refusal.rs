//! Why an engine cannot serve a route, as values.

use std::fmt;

use crate::{
    capability::{Capabilities, FilterChain, Handoff, Sockmap},
    config::{Balance, Engine, EngineChoice, Protocol, Route, RouteName, SourceAddress, Target, TlsMode},
    plan::Port,
    ruleset::Family,
};

/// Why an engine cannot serve a route here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The engine sees packets, and the route must read or write the stream.
    NeedsStream(Need),
    /// On the port of a route that the engine does not serve: only one engine can have the port.
    SharesPortWith(RouteName),
    /// A loopback address cannot be masqueraded onto the wire (`route_localnet` would be needed).
    LoopbackListen,
    /// The route listens on this family, and none of its backends is of it: NAT does not translate between families.
    NoBackendOfFamily(Family),
    /// Routes that share a port are told apart by `match.client`, and one of them listens on a range.
    ClientMatchOnRange,
    /// Some backends have a port, others keep the dialled one.
    MixedPorts,
    /// `source_address = "client"`, and a backend on this machine: its answers to the client would leave the machine.
    ClientSourceToLoopback,
    /// A relayed connection is a TCP connection.
    OnlyTcp,
    /// More than [`MAX_STREAM_PORTS`], and each is a socket: no `sk_lookup` leads them to one.
    TooManyPorts(usize),
    Lacks(Capability),
    /// The engine never sees the bytes it moves, and they must be deciphered or enciphered.
    NeedsBytes(Need),
    /// The engine `sockmap` is not trusted here: the check that failed.
    Untrusted(String),
    /// It could serve the route: better where processors are idle, much worse where they are not, and nobody can tell beforehand
    /// (docs/sockmap.md).
    NotBetter,
    CannotHandOver(Handoff),
    /// What is handed over does not pass this chain of the host's firewall: not without being asked for.
    BypassesFirewall(FilterChain),
    /// Both ends of a connection that is handed over are on other machines.
    StaysOnThisMachine,
    /// The port of a connection that is handed over must stay taken, and those of clients' addresses are not ours to keep.
    ClientsPorts,
}

/// What only a reader or writer of the stream can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Sni,
    Alpn,
    AcceptProxy,
    SendProxy,
    TlsPassthroughCheck,
    TlsTermination,
    BackendTls,
    LeastConnections,
}

/// A thing this kernel or these privileges do not offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    NetAdmin,
    NftNat,
    NftConnlimit,
    NftCtTimeout,
    NftBalance,
    NftSocket,
    Conntrack,
    Ipv6,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeedsStream(need) => write!(f, "{need}"),
            Self::SharesPortWith(route) => {
                write!(f, "shares a port with route \"{route}\", which this engine does not serve")
            }
            Self::LoopbackListen => f.write_str("listens on a loopback address while a backend is elsewhere"),
            Self::NoBackendOfFamily(Family::V4) => f.write_str("listens on IPv4, and no backend has an IPv4 address"),
            Self::NoBackendOfFamily(Family::V6) => f.write_str("listens on IPv6, and no backend has an IPv6 address"),
            Self::ClientMatchOnRange => {
                f.write_str("match.client is served on single ports, and a route on this port listens on a range")
            }
            Self::MixedPorts => f.write_str("some backends have a port and others keep the dialled one"),
            Self::ClientSourceToLoopback => f.write_str(
                "source_address = \"client\" needs backends on other machines, and one has a loopback address",
            ),
            Self::OnlyTcp => f.write_str("relays TCP only"),
            Self::TooManyPorts(ports) => {
                write!(
                    f,
                    "listens on {ports} ports, each of which is a socket without sk_lookup (Linux 5.9, CAP_BPF); at most \
                     {MAX_STREAM_PORTS} are served so"
                )
            }
            Self::NeedsBytes(need) => write!(f, "{need}; this engine never sees the bytes"),
            Self::Lacks(capability) => write!(f, "{capability}"),
            Self::Untrusted(check) => write!(f, "not trusted on this kernel: {check}"),
            Self::NotBetter => f.write_str(
                "only where the route says so: a small message comes a fifth sooner and costs the daemon nothing (70 against 89 µs), but on \
                 busy processors it waits for a kernel thread (16 ms against 45 µs), and bulk is slower than with splice (10.6 against \
                 12.7 Gbit/s; docs/sockmap.md); engine = \"sockmap\" forces it",
            ),
            Self::CannotHandOver(why) => write!(f, "{why}"),
            Self::BypassesFirewall(chain) => write!(
                f,
                "what is handed over would not be seen by {chain}, which filters; engine = \"handoff\" says that it may"
            ),
            Self::StaysOnThisMachine => {
                f.write_str("hands over connections between other machines, and these begin or end on this one")
            }
            Self::ClientsPorts => {
                f.write_str("source_address = \"client\": the ports of clients' addresses cannot be kept for it")
            }
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sni => "match.sni is in the first bytes of the stream",
            Self::Alpn => "match.alpn is in the first bytes of the stream",
            Self::AcceptProxy => "proxy_protocol.accept_from reads a header from the stream",
            Self::SendProxy => "proxy_protocol.send writes a header into the stream",
            Self::TlsPassthroughCheck => "tls.mode = \"passthrough\" looks at the ClientHello",
            Self::TlsTermination => "tls.mode = \"terminate\" ends TLS in the daemon",
            Self::BackendTls => "backend_tls encrypts in the daemon",
            Self::LeastConnections => "balance = \"least-connections\" needs a decision per connection in the daemon",
        })
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NetAdmin => "CAP_NET_ADMIN is missing",
            Self::NftNat => {
                "this kernel has no nf_tables NAT (CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT, CONFIG_NFT_FIB_INET)"
            }
            Self::NftConnlimit => "this kernel has no `ct count` (CONFIG_NFT_CONNLIMIT), which limits need",
            Self::NftCtTimeout => "this kernel has no `ct timeout` (CONFIG_NF_CONNTRACK_TIMEOUT), which timeouts need",
            Self::NftBalance => {
                "this kernel has no numgen or jhash (CONFIG_NFT_NUMGEN, CONFIG_NFT_HASH), which balance needs"
            }
            Self::NftSocket => {
                "this kernel has no `socket` in nf_tables (CONFIG_NFT_SOCKET), which source_address = \"client\" needs where \
                 the daemon dials; proxy_protocol.send tells a backend who the client is"
            }
            Self::Conntrack => "this kernel has no conntrack over netlink (CONFIG_NF_CT_NETLINK)",
            Self::Ipv6 => "IPv6 is switched off on this machine",
        })
    }
}

impl fmt::Display for Handoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("connections can be handed over"),
            Self::NotPermitted => f.write_str(
                "CAP_BPF, CAP_NET_ADMIN or CAP_NET_RAW is missing, or before Linux 5.11 RLIMIT_MEMLOCK is too low",
            ),
            Self::NoTc => f.write_str("this kernel has neither tcx (Linux 6.6) nor clsact (CONFIG_NET_CLS_ACT)"),
            Self::NoBpffs => {
                f.write_str("there is no BPF file system that may be written to (mount -t bpf bpf /sys/fs/bpf)")
            }
            Self::ProbeFailed(check) => write!(f, "its self-probe failed on this kernel: {check}"),
            Self::NotBroughtUp(what) => write!(f, "it could not be brought up: {what}"),
            Self::NotAsked => f.write_str("the kernel was not asked"),
        }
    }
}

/// Ports of one route where each has sockets.
pub const MAX_STREAM_PORTS: usize = 1024;

/// Every reason against every engine, in order of preference.
pub(super) fn refusals(route: &Route, port: &Port, capabilities: &Capabilities) -> Vec<(Engine, Refusal)> {
    let mut refused: Vec<(Engine, Refusal)> =
        nft(route, port, capabilities).into_iter().map(|r| (Engine::Nft, r)).collect();
    let relays = stream(route, capabilities);
    // What nobody would use is not asked for.
    let wanted = route.engine == EngineChoice::Forced(Engine::Handoff) || !refused.is_empty();
    let handoff = relays.iter().cloned().chain(handoff(route, capabilities, wanted));
    refused.extend(handoff.map(|refusal| (Engine::Handoff, refusal)));
    for engine in [Engine::Sockmap, Engine::Splice, Engine::Copy] {
        refused.extend(relays.iter().map(|refusal| (engine, refusal.clone())));
        if engine == Engine::Sockmap {
            refused.extend(sockmap(route, capabilities).into_iter().map(|refusal| (engine, refusal)));
        }
        if engine != Engine::Copy {
            refused.extend(encrypts(route).into_iter().map(|need| (engine, Refusal::NeedsBytes(need))));
        }
    }
    refused
}

/// Whether the route must be served where the stream is, whoever is beside it.
pub(super) fn is_for_stream(route: &Route, capabilities: &Capabilities) -> bool {
    match route.engine {
        EngineChoice::Forced(engine) => engine != Engine::Nft,
        EngineChoice::Auto => !own(route, capabilities).is_empty(),
    }
}

/// Against all engines that relay in the daemon.
fn stream(route: &Route, capabilities: &Capabilities) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut refuse = |condition: bool, refusal| {
        if condition {
            refusals.push(refusal);
        }
    };
    let ports: usize = route.listen.iter().map(|l| usize::from(l.ports.last - l.ports.first) + 1).sum();
    let ipv6 = route.listen.iter().any(|l| l.address.is_ipv6());
    refuse(route.protocol == Protocol::Udp, Refusal::OnlyTcp);
    let transparent = route.source_address == SourceAddress::Client;
    let on_loopback = |target: &Target| matches!(target, Target::Address { ip, .. } if ip.is_loopback());
    let from_elsewhere = route.listen.iter().any(|l| !l.address.is_loopback());
    let to_loopback = route.backends.iter().any(|b| on_loopback(&b.target));
    refuse(transparent && from_elsewhere && to_loopback, Refusal::ClientSourceToLoopback);
    refuse(transparent && !capabilities.net_admin, Refusal::Lacks(Capability::NetAdmin));
    refuse(transparent && !capabilities.nft_socket, Refusal::Lacks(Capability::NftSocket));
    refuse(ports > MAX_STREAM_PORTS && !capabilities.sk_lookup, Refusal::TooManyPorts(ports));
    refuse(ipv6 && !capabilities.ipv6, Refusal::Lacks(Capability::Ipv6));
    refusals
}

/// Against joining sockets, besides what is against relaying.
fn sockmap(route: &Route, capabilities: &Capabilities) -> Option<Refusal> {
    match &capabilities.sockmap {
        Sockmap::Refused(check) => Some(Refusal::Untrusted(check.clone())),
        Sockmap::Trusted if route.engine == EngineChoice::Auto => Some(Refusal::NotBetter),
        Sockmap::Trusted => None,
    }
}

/// Against handing over, beyond what the daemon needs to relay until then. `wanted`: no cheaper engine serves the route.
fn handoff(route: &Route, capabilities: &Capabilities, wanted: bool) -> Vec<Refusal> {
    let mut refusals: Vec<Refusal> = encrypts(route).into_iter().map(Refusal::NeedsBytes).collect();
    let mut refuse = |condition: bool, refusal| {
        if condition {
            refusals.push(refusal);
        }
    };
    let is_loopback = |target: &Target| matches!(target, Target::Address { ip, .. } if ip.is_loopback());
    let from_here = route.listen.iter().all(|listen| listen.address.is_loopback());
    let to_here = route.backends.iter().all(|backend| is_loopback(&backend.target));
    refuse(route.source_address == SourceAddress::Client, Refusal::ClientsPorts);
    refuse(from_here || to_here, Refusal::StaysOnThisMachine);
    let passed_by = capabilities.filter.iter().filter(|_| wanted && route.engine == EngineChoice::Auto).cloned();
    refusals.extend(passed_by.map(Refusal::BypassesFirewall));
    let answer_matters = wanted && !matches!(refusals.last(), Some(Refusal::BypassesFirewall(_)));
    if capabilities.handoff != Handoff::Works && (answer_matters || capabilities.handoff != Handoff::NotAsked) {
        refusals.push(Refusal::CannotHandOver(capabilities.handoff.clone()));
    }
    refusals
}

/// Ciphers that the route needs.
fn encrypts(route: &Route) -> Vec<Need> {
    let terminates = route.tls.as_ref().is_some_and(|tls| tls.mode == TlsMode::Terminate);
    let ends = terminates.then_some(Need::TlsTermination);
    ends.into_iter().chain(route.backend_tls.as_ref().map(|_| Need::BackendTls)).collect()
}

fn nft(route: &Route, port: &Port, capabilities: &Capabilities) -> Vec<Refusal> {
    let mut refusals = own(route, capabilities);
    if let Some(relayed) = port.relayed.as_ref().filter(|relayed| **relayed != route.name) {
        refusals.push(Refusal::SharesPortWith(relayed.clone()));
    }
    if port.has_range && !matches_on_range(route) {
        refusals.push(Refusal::ClientMatchOnRange);
    }
    refusals
}

/// What the engine nft cannot do for the route, whoever is beside it.
fn own(route: &Route, capabilities: &Capabilities) -> Vec<Refusal> {
    let mut refusals: Vec<Refusal> = needs(route).into_iter().map(Refusal::NeedsStream).collect();
    if matches_on_range(route) {
        refusals.push(Refusal::ClientMatchOnRange);
    }
    refusals.extend(addresses(route));
    refusals.extend(lacks(route, capabilities).into_iter().map(Refusal::Lacks));
    refusals
}

fn matches_on_range(route: &Route) -> bool {
    !route.matches.client.is_empty() && route.listen.iter().any(|l| !l.ports.is_single())
}

fn needs(route: &Route) -> Vec<Need> {
    let mut needs = Vec::new();
    let mut need = |condition: bool, need| {
        if condition {
            needs.push(need);
        }
    };
    let tls_mode = route.tls.as_ref().map(|tls| tls.mode);
    need(!route.matches.sni.is_empty(), Need::Sni);
    need(!route.matches.alpn.is_empty(), Need::Alpn);
    need(!route.proxy_protocol.accept_from.is_empty(), Need::AcceptProxy);
    need(route.proxy_protocol.send.is_some(), Need::SendProxy);
    need(tls_mode == Some(TlsMode::Passthrough), Need::TlsPassthroughCheck);
    need(tls_mode == Some(TlsMode::Terminate), Need::TlsTermination);
    need(route.backend_tls.is_some(), Need::BackendTls);
    need(route.balance == Balance::LeastConnections, Need::LeastConnections);
    needs
}

fn addresses(route: &Route) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let address = |target: &Target| match target {
        Target::Address { ip, .. } => Some(*ip),
        Target::Name { .. } => None,
    };
    let known: Vec<_> = route.backends.iter().filter_map(|b| address(&b.target)).collect();
    let names = known.len() < route.backends.len();
    let remote = names || known.iter().any(|ip| !ip.is_loopback());
    if remote && route.listen.iter().any(|l| l.address.is_loopback()) {
        refusals.push(Refusal::LoopbackListen);
    }
    for (family, v4) in [(Family::V4, true), (Family::V6, false)] {
        let listens = route.listen.iter().any(|l| l.address.is_ipv4() == v4);
        if listens && !names && !known.iter().any(|ip| ip.is_ipv4() == v4) {
            refusals.push(Refusal::NoBackendOfFamily(family));
        }
    }
    let kept = route.backends.iter().filter(|b| b.target.port().is_none()).count();
    if kept != 0 && kept != route.backends.len() {
        refusals.push(Refusal::MixedPorts);
    }
    refusals
}

fn lacks(route: &Route, has: &Capabilities) -> Vec<Capability> {
    let mut lacks = Vec::new();
    let mut lack = |condition: bool, capability| {
        if condition {
            lacks.push(capability);
        }
    };
    let counts = route.limits.connections.is_some() || route.limits.connections_per_client.is_some();
    let standard = matches!(
        crate::ruleset::timeout_policy(route),
        crate::ruleset::TimeoutPolicy::TCP_STANDARD | crate::ruleset::TimeoutPolicy::UDP_STANDARD
    );
    lack(!has.net_admin, Capability::NetAdmin);
    lack(!has.nft_nat, Capability::NftNat);
    lack(!has.conntrack_netlink, Capability::Conntrack);
    lack(!has.nft_connlimit && counts, Capability::NftConnlimit);
    lack(!has.nft_ct_timeout && !standard && route.protocol == Protocol::Tcp, Capability::NftCtTimeout);
    lack(!has.nft_balance && route.backends.len() > 1, Capability::NftBalance);
    lack(!has.ipv6 && route.listen.iter().any(|l| l.address.is_ipv6()), Capability::Ipv6);
    lacks
}
