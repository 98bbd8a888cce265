//! The owner with a table in memory: the tests play the workers and the program.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Instant,
};

use proxy_abi::{
    flow::{Endpoint, IPV4},
    handoff::{FROM_BACKEND, FROM_CLIENT, HandoffEntry, HandoffKey, OWNER_BYTES, closing, gate as state},
};
use proxy_core::{
    config::{self, Engine},
    plan::plan,
    reason::Reason,
    ruleset::Endpoint as Backend,
};

use super::{adopt::Remnants, clock::Clock, owner::Owner, *};
use crate::{
    kernel::bpf::handoff::{Boundary, Gate, MemoryHandoffs, NewFlow},
    stream::{
        RouteSpec, StreamId,
        handover::{Ends, Held, Seat, SourcePorts},
        meter::RouteTotals,
    },
};

const ALICE: &str = "10.1.0.1:40000";

/// What the parts share in a test.
struct Stage {
    store: Arc<MemoryHandoffs>,
    ports: SourcePorts,
    route: Arc<Route>,
    owner: Owner,
    next: u64,
}

fn route(extra: &str, workers: usize) -> Arc<Route> {
    let text =
        format!("[[route]]\nname = \"shop\"\nlisten = [\"10.0.0.1:443\"]\nbackends = [\"10.2.0.1:443\"]\n{extra}");
    let config = config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    let plan = plan(&config, &proxy_core::capability::Capabilities::all());
    let endpoint = Backend { address: IpAddr::from([10, 2, 0, 1]), port: Some(443), weight: 1, up: true };
    let spec = RouteSpec { id: 7, plan: Arc::clone(&plan.routes()[0]), endpoints: vec![endpoint], names: Vec::new() };
    Arc::new(Route::new(spec, None, workers).expect("a route"))
}

fn owner(store: &Arc<MemoryHandoffs>) -> Owner {
    let store: Arc<dyn HandoffStore> = Arc::<MemoryHandoffs>::clone(store);
    Owner::new(store, Resets::new(Sender::open()), Arc::default())
}

fn stage(extra: &str) -> Stage {
    let store = Arc::new(MemoryHandoffs::new(64).expect("a table"));
    let route = route(extra, 1);
    let mut owner = owner(&store);
    owner.serve(vec![Arc::clone(&route)]);
    Stage { store, ports: SourcePorts::default(), route, owner, next: 1 << 20 }
}

fn endpoint(address: SocketAddr) -> Endpoint {
    match address.ip() {
        IpAddr::V4(ip) => Endpoint::v4(ip.octets(), address.port().to_be_bytes()),
        IpAddr::V6(ip) => Endpoint::v6(ip.octets(), address.port().to_be_bytes()),
    }
}

/// Both entries of a flow with these addresses.
fn entries(ends: &Ends) -> [(HandoffKey, HandoffEntry); 2] {
    let [client, listen, source, backend] = [ends.client, ends.listen, ends.source, ends.backend].map(endpoint);
    let there = HandoffEntry { direction: FROM_CLIENT, source, destination: backend, ..HandoffEntry::default() };
    let back = HandoffEntry { direction: FROM_BACKEND, source: listen, destination: client, ..HandoffEntry::default() };
    [(HandoffKey::new(client, listen, IPV4), there), (HandoffKey::new(backend, source, IPV4), back)]
}

impl Stage {
    /// A worker hands a connection of this client over, after 100 bytes in and 200 out.
    fn hand_over(&mut self, client: &str) -> (StreamId, Gate) {
        self.next += 1;
        let id = StreamId::new(0, self.next);
        let backend = "10.2.0.1:443".parse().expect("an address");
        let port = self.ports.take(backend).expect("a port");
        let client = client.parse().expect("an address");
        let ends = Ends {
            client,
            listen: "10.0.0.1:443".parse().expect("an address"),
            source: SocketAddr::from(([10, 0, 0, 1], port.port())),
            backend,
        };
        let new = NewFlow { id: id.bits(), owner: [0; OWNER_BYTES], entries: entries(&ends), interfaces: [0; 2] };
        let gate = self.store.insert(&new).expect("room");
        self.store.open_gate(gate, [Boundary { own_seq: 500, first_seq: 1_000, acked: 400 }; 2]);
        self.store.leave(gate);
        let now = Instant::now();
        let admitted = self.route.admission.enter(&self.route.config, client.ip(), now.elapsed()).expect("admitted");
        let chosen = self.route.count(backend).expect("its backend");
        self.owner.receive(HandedOver {
            id,
            route_id: 7,
            route: Arc::clone(&self.route.meters.name),
            client,
            ends,
            gate: gate.0,
            bytes_in: 100,
            bytes_out: 200,
            passed_on: [0; 2],
            accepted: now,
            active: now,
            limits: self.route.limits,
            cut: None,
            meters: Arc::clone(&self.route.meters),
            held: Held {
                seat: Some(Seat { admission: Arc::clone(&self.route.admission), admitted }),
                counted: Some(chosen),
                port,
            },
        });
        (id, gate)
    }

    /// The program has seen so many payload bytes of both ends.
    fn carry(&self, gate: Gate, bytes: [u64; 2]) {
        self.store.change(gate, |flow| {
            for (end, bytes) in flow.ends.iter_mut().zip(bytes) {
                end.end_seq += bytes;
                end.last_seen_ns = Clock::start().now().0 * 1_000_000;
            }
        });
    }

    fn totals(&self) -> RouteTotals {
        self.route.meters.totals()
    }

    fn handoff(&self) -> crate::stream::meter::EngineTotals {
        let totals = self.totals();
        let of = totals.engines.into_iter().find(|(engine, _)| *engine == Engine::Handoff);
        of.map(|(_, totals)| totals).unwrap_or_default()
    }

    fn ended(&mut self) -> Vec<(Reason, u64, u64)> {
        self.owner.told.drain(..).map(|ended| (ended.reason, ended.bytes_in, ended.bytes_out)).collect()
    }

    /// Turns the clock until something has ended.
    fn until_ended(&mut self) -> Vec<(Reason, u64, u64)> {
        let deadline = Instant::now() + std::time::Duration::from_secs(10);
        while self.owner.told.is_empty() {
            assert!(Instant::now() < deadline, "nothing has ended");
            self.owner.advance();
            std::thread::yield_now();
        }
        self.ended()
    }
}

#[test]
fn bytes_are_counted_while_it_lives_for_the_flow_and_for_the_route() {
    let mut stage = stage("");
    let (id, gate) = stage.hand_over(ALICE);
    stage.carry(gate, [10, 20]);
    stage.owner.look_at_all();
    let shown = &stage.owner.list(&ConnectionFilter::default())[0];
    assert_eq!((shown.bytes_in, shown.bytes_out, shown.engine), (110, 220, Engine::Handoff));
    assert_eq!((shown.id.as_str(), shown.state.as_str()), (id.to_string().as_str(), "established"));
    let totals = stage.handoff();
    assert_eq!((totals.active, totals.promoted, totals.bytes_in, totals.bytes_out), (1, 1, 10, 20));
}

#[test]
fn an_end_is_counted_and_told_once_with_every_byte() {
    let mut stage = stage("");
    let (id, gate) = stage.hand_over(ALICE);
    stage.carry(gate, [10, 20]);
    stage.store.change(gate, |flow| flow.closing = closing::FINISHED | closing::BACKEND_FIRST);
    for _ in 0..3 {
        stage.owner.look(gate);
        stage.owner.look_at_all();
    }
    assert_eq!(stage.ended(), [(Reason::FinishedBackendFirst, 110, 220)]);
    assert_eq!(stage.owner.kill(id), None);
    let totals = stage.handoff();
    assert_eq!((totals.active, totals.terminations), (0, vec![(Reason::FinishedBackendFirst, 1)]));
    assert_eq!(totals.bytes_out, 20);
}

#[test]
fn a_reset_behind_both_ends_takes_nothing_away() {
    let mut stage = stage("");
    let (_, gate) = stage.hand_over(ALICE);
    let bits = closing::FINISHED | closing::CLIENT_FIRST | closing::RESET_BY_BACKEND;
    stage.store.change(gate, |flow| flow.closing = bits);
    stage.owner.look_at_all();
    assert_eq!(stage.ended(), [(Reason::FinishedClientFirst, 100, 200)]);
}

#[test]
fn limits_and_its_backend_count_it_until_it_ends_and_its_port_rests_longer() {
    let mut stage = stage("limits = { connections = 1, connections_per_client = 1 }\n");
    let (_, gate) = stage.hand_over(ALICE);
    let enter = |stage: &Stage| {
        let client = IpAddr::from([10, 1, 0, 2]);
        stage.route.admission.enter(&stage.route.config, client, std::time::Duration::ZERO).map(drop)
    };
    assert_eq!(enter(&stage), Err(Reason::LimitConnections));
    assert_eq!(stage.totals().backends[0].1, 1);
    stage.store.change(gate, |flow| flow.closing = closing::RESET_BY_CLIENT);
    stage.owner.look(gate);
    assert_eq!(stage.ended()[0].0, Reason::ResetByClient);
    assert_eq!(enter(&stage), Ok(()));
    assert_eq!((stage.totals().backends[0].1, stage.ports.taken()), (0, 1));
    assert!(stage.store.flow(gate).is_over(), "what is sent again is still answered");
}

#[test]
fn a_killed_connection_is_nobodys_at_once() {
    let mut stage = stage("");
    let (id, gate) = stage.hand_over(ALICE);
    let killed = stage.owner.kill(id).expect("there");
    assert_eq!((&*killed.0, killed.1.to_string().as_str()), ("shop", ALICE));
    assert_eq!(stage.ended(), [(Reason::Killed, 100, 200)]);
    assert_eq!(stage.store.flow(gate).id, 0, "what still comes is answered by the kernel's reset");
    assert_eq!(stage.ports.taken(), 1);
}

#[test]
fn silence_ends_it_and_bytes_keep_it() {
    let mut stage = stage("timeouts = { idle = \"1s\" }\n");
    let (_, silent) = stage.hand_over(ALICE);
    let (_, busy) = stage.hand_over("10.1.0.1:40001");
    let deadline = Instant::now() + std::time::Duration::from_secs(10);
    while stage.owner.told.is_empty() {
        assert!(Instant::now() < deadline, "the silent one lives for ever");
        stage.carry(busy, [1, 0]);
        stage.owner.advance();
        std::thread::yield_now();
    }
    assert_eq!(stage.ended(), [(Reason::IdleTimeout, 100, 200)]);
    assert!(stage.owner.flows.get(silent).is_none() && stage.owner.flows.get(busy).is_some());
}

#[test]
fn a_lifetime_ends_also_what_is_busy() {
    let mut stage = stage("timeouts = { lifetime = \"1s\" }\n");
    stage.hand_over(ALICE);
    assert_eq!(stage.until_ended()[0].0, Reason::LifetimeExceeded);
}

#[test]
fn a_half_closed_one_has_its_own_limit() {
    let mut stage = stage("timeouts = { half_closed = \"1s\" }\n");
    let (_, gate) = stage.hand_over(ALICE);
    stage.store.change(gate, |flow| flow.closing = closing::CLIENT_FIRST);
    stage.owner.look(gate);
    assert_eq!(stage.owner.list(&ConnectionFilter::default())[0].state, "half_closed");
    assert_eq!(stage.until_ended()[0].0, Reason::HalfClosedTimeout);
}

#[test]
fn a_route_that_goes_drains_and_says_when_nothing_is_left() {
    let mut stage = stage("timeouts = { drain = \"1s\" }\n");
    stage.hand_over(ALICE);
    stage.owner.leave(7, Leaving::new(1));
    assert!(stage.owner.gone.is_empty());
    assert_eq!(stage.until_ended()[0].0, Reason::Drained);
    assert_eq!(stage.owner.gone, [7]);
}

#[test]
fn the_next_daemon_goes_on_with_it() {
    let mut before = stage("limits = { connections = 1 }\n");
    let (id, gate) = before.hand_over(ALICE);
    before.carry(gate, [10, 20]);
    let Stage { store, owner: gone, .. } = before;
    drop(gone);
    let ports = SourcePorts::default();
    let remnants = Remnants::collect(&*store, &ports);
    assert_eq!(ports.taken(), 1, "before anybody dials");
    let route = route("limits = { connections = 1 }\n", 1);
    let mut after = Stage { owner: owner(&store), store, ports, route, next: 2 << 20 };
    after.owner.serve(vec![Arc::clone(&after.route)]);
    let unrouted = Arc::new(Meters::new(0, "-", 1));
    assert_eq!(after.owner.adopt(remnants, &unrouted), (1, 0));
    after.carry(gate, [1, 2]);
    let shown = after.owner.list(&ConnectionFilter::default()).remove(0);
    assert_eq!((shown.id.as_str(), shown.route.as_str()), (id.to_string().as_str(), "shop"));
    assert_eq!((shown.bytes_in, shown.bytes_out, shown.client.to_string().as_str()), (111, 222, ALICE));
    let totals = after.handoff();
    assert_eq!((totals.total, totals.active, totals.bytes_in, totals.bytes_out), (1, 1, 1, 2));
    assert_eq!(after.totals().backends[0].1, 1);
    let client = IpAddr::from([10, 1, 0, 2]);
    let refused = after.route.admission.enter(&after.route.config, client, std::time::Duration::ZERO);
    assert_eq!(refused.map(drop), Err(Reason::LimitConnections), "it counts as before");
    assert!(after.owner.kill(id).is_some());
}

#[test]
fn what_had_ended_and_was_told_is_not_told_again_by_the_next_daemon() {
    let mut before = stage("");
    let (_, told) = before.hand_over(ALICE);
    before.store.change(told, |flow| flow.closing = closing::FINISHED);
    before.owner.look(told);
    let (_, untold) = before.hand_over("10.1.0.1:40001");
    before.store.change(untold, |flow| flow.closing = closing::FINISHED | closing::CLIENT_FIRST);
    let Stage { store, route, .. } = before;
    let ports = SourcePorts::default();
    let mut after = owner(&store);
    after.serve(vec![route]);
    let remnants = Remnants::collect(&*store, &ports);
    assert_eq!(store.flow(told).id, 0, "taken away");
    after.adopt(remnants, &Arc::new(Meters::new(0, "-", 1)));
    let reasons: Vec<_> = after.told.iter().map(|ended| (ended.reason, ended.bytes_in)).collect();
    assert_eq!(reasons, [(Reason::FinishedClientFirst, 100)]);
}

#[test]
fn one_that_was_being_handed_over_when_the_daemon_died_is_cut() {
    let mut before = stage("");
    let (_, gate) = before.hand_over(ALICE);
    before.store.change(gate, |flow| flow.gate = state::OPEN);
    let remnants = Remnants::collect(&*before.store, &SourcePorts::default());
    let mut after = owner(&before.store);
    assert_eq!(after.adopt(remnants, &Arc::new(Meters::new(0, "-", 1))), (0, 1));
    assert_eq!(before.store.flow(gate).id, 0);
}

#[test]
fn one_whose_route_nobody_configures_any_more_is_drained_under_no_name() {
    let mut before = stage("");
    before.hand_over(ALICE);
    let remnants = Remnants::collect(&*before.store, &SourcePorts::default());
    let mut after = owner(&before.store);
    assert_eq!(after.adopt(remnants, &Arc::new(Meters::new(0, "-", 1))), (1, 0));
    let shown = after.list(&ConnectionFilter::default()).remove(0);
    assert_eq!(shown.route, "-");
    assert!(after.next().is_some(), "its time is limited");
}
