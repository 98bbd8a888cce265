//! The tracker in the gateway.

use std::{
    collections::HashSet,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use proxy_core::{
    config::{AccessLog as Filter, LogFormat, Protocol},
    flow::{RouteInfo, RouteTable},
    reason::Reason,
    view,
};
use proxy_userspace::{
    access_log::AccessLog,
    control::{ConnectionFilter, FlowCommand, FlowState},
    kernel::conntrack::{Hear, NetlinkConntrack},
    track::{Clock, DropUdp, INTERVAL, Input, Options, Tracker},
};
use tokio::sync::{mpsc, oneshot};

use crate::lab::{BUFFER, Lab, PATIENCE, TCP_ROUTE, UDP_ROUTE, echo, layout, round_trip};

fn route(name: &str, protocol: Protocol) -> Arc<RouteInfo> {
    Arc::new(RouteInfo {
        name: name.into(),
        protocol,
        idle: None,
        idle_warning: None,
        half_closed: None,
        lifetime: None,
        kernel_timeouts: true,
        drain_until: None,
    })
}

/// A tracker in the gateway.
struct Running {
    tracker: Option<Tracker>,
    runtime: tokio::runtime::Runtime,
    clock: Clock,
    drained: mpsc::Receiver<u32>,
    log: Page,
}

#[derive(Debug, Clone, Default)]
struct Page(Arc<Mutex<Vec<u8>>>);

impl Write for Page {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("page").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Running {
    fn start(lab: &Lab) -> Self {
        Self::start_with(lab, Duration::from_millis(200))
    }

    fn start_with(lab: &Lab, interval: Duration) -> Self {
        let (drained_out, drained) = mpsc::channel(8);
        let (clock, log) = (Clock::start(), Page::default());
        let options = Options {
            layout: layout(),
            interval,
            max_flows: 262_144,
            clock,
            access_log: AccessLog::new(LogFormat::Text, Filter::All, log.clone()).expect("thread"),
            drained: drained_out,
            failed_dials: mpsc::channel(1).0,
        };
        let id_mask = layout().id_mask();
        let tracker = lab.inside("g", || {
            Tracker::spawn(options, move || NetlinkConntrack::open(id_mask, BUFFER, Hear::as_needed()))
        });
        let tracker = Some(tracker.expect("tracker"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let running = Self { tracker, runtime, clock, drained, log };
        running.send(Input::Routes(Self::routes()));
        running
    }

    fn routes() -> RouteTable {
        RouteTable::from([(TCP_ROUTE, route("web", Protocol::Tcp)), (UDP_ROUTE, route("dns", Protocol::Udp))])
    }

    fn tracker(&self) -> &Tracker {
        self.tracker.as_ref().expect("running")
    }

    fn send(&self, input: Input) {
        self.runtime.block_on(self.tracker().inputs.send(input)).expect("tracker lives");
    }

    fn connections(&self) -> Vec<view::Connection> {
        let (reply, answer) = oneshot::channel();
        let command = FlowCommand::Connections { filter: ConnectionFilter::default(), reply };
        self.runtime.block_on(async {
            self.tracker().commands.send(command).await.expect("tracker lives");
            answer.await.expect("answer").expect("list")
        })
    }

    fn kill(&self, id: &str) -> Result<view::Killed, view::Failure> {
        let (reply, answer) = oneshot::channel();
        self.runtime.block_on(async {
            self.tracker().commands.send(FlowCommand::Kill { id: id.into(), reply }).await.expect("tracker lives");
            answer.await.expect("answer")
        })
    }

    fn state_until(&self, enough: impl Fn(&FlowState) -> bool) -> Arc<FlowState> {
        let mut state = self.tracker().state.clone();
        let found = self.runtime.block_on(async {
            tokio::time::timeout(shunt_lab::patiently(PATIENCE), state.wait_for(|state| enough(state)))
                .await
                .map(|found| found.map(|s| s.clone()))
        });
        match found {
            Ok(state) => state.expect("tracker lives"),
            Err(_) => panic!("waited in vain: {:#?}", self.tracker().state.borrow()),
        }
    }

    fn terminated(&self, route: &str, reason: Reason, count: u64) -> Arc<FlowState> {
        self.state_until(|state| {
            state.routes.get(route).is_some_and(|route| {
                route.connections_active == 0 && route.terminations.get(&reason).copied() == Some(count)
            })
        })
    }

    /// What was logged, once the tracker has stopped.
    fn stop(mut self) -> String {
        let tracker = self.tracker.take().expect("running");
        self.runtime.block_on(tracker.stop());
        String::from_utf8(self.log.0.lock().expect("page").clone()).expect("UTF-8")
    }
}

#[test]
fn silence_ends_a_flow_by_the_limit_of_its_state() {
    let lab = Lab::new();
    for state in ["established", "fin_wait", "close_wait"] {
        lab.sysctl(&format!("netfilter/nf_conntrack_tcp_timeout_{state}"), "1");
    }
    lab.serve("10.77.2.2:8080", |mut stream| {
        // Reads to the end and says nothing more.
        let _ = stream.read_to_end(&mut Vec::new());
        thread::park();
    });
    let running = Running::start(&lab);
    let limit = Some(Duration::from_secs(1));
    let info = RouteInfo { idle: limit, half_closed: limit, ..RouteInfo::clone(&Running::routes()[&TCP_ROUTE]) };
    running.send(Input::Routes(RouteTable::from([(TCP_ROUTE, Arc::new(info))])));
    let idle = lab.connect("10.77.1.1:80");
    running.terminated("web", Reason::IdleTimeout, 1);
    let half = lab.connect("10.77.1.1:80");
    half.shutdown(std::net::Shutdown::Write).expect("FIN");
    running.terminated("web", Reason::HalfClosedTimeout, 1);
    drop((idle, half));
}

#[test]
fn every_kind_of_end_gets_its_reason() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    let running = Running::start(&lab);

    let mut stream = lab.connect("10.77.1.1:80");
    round_trip(&mut stream, 10);
    drop(stream);
    running.terminated("web", Reason::FinishedClientFirst, 1);

    let mut stream = lab.connect("10.77.1.1:80");
    round_trip(&mut stream, 10);
    socket_reset(&stream);
    drop(stream);
    running.terminated("web", Reason::ResetByClient, 1);

    lab.inside("c", || TcpStream::connect("10.77.1.1:81")).expect_err("refused");
    running.terminated("web", Reason::ConnectRefused, 1);

    let swallowed = lab.inside("c", || {
        let address = "10.77.1.1:82".parse().expect("address");
        TcpStream::connect_timeout(&address, Duration::from_millis(500))
    });
    swallowed.expect_err("dropped");
    running.terminated("web", Reason::ConnectTimeout, 1);
    let log = running.stop();
    assert_eq!(log.lines().count(), 4, "{log}");
}

/// `SO_LINGER` 0: close sends a reset.
fn socket_reset(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger).expect("SO_LINGER");
}

#[test]
fn counters_of_a_long_flow_move_while_it_lives_and_the_log_line_agrees() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    let running = Running::start(&lab);
    let mut stream = lab.connect("10.77.1.1:80");
    for round in 1..=3 {
        round_trip(&mut stream, 50_000);
        let state = running.state_until(|state| state.routes.get("web").is_some_and(|r| r.bytes_out > round * 50_000));
        assert_eq!(state.routes["web"].connections_active, 1);
    }
    let listed = running.connections();
    assert_eq!((listed.len(), listed[0].state.as_str(), listed[0].route.as_str()), (1, "established", "web"));
    assert_eq!(listed[0].client, stream.local_addr().expect("address"));
    drop(stream);
    let ended = running.terminated("web", Reason::FinishedClientFirst, 1);
    assert!(ended.backends["web"].is_empty());
    // The entry is let go after its TIME_WAIT.
    let deadline = Instant::now() + shunt_lab::patiently(PATIENCE);
    while !running.connections().is_empty() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(50));
    }
    let totals = running.state_until(|state| state.conntrack.dumps > 0).routes["web"].clone();
    let log = running.stop();
    assert_eq!(log.lines().count(), 1, "{log}");
    for part in [
        "reason=finished_client_first".to_owned(),
        format!("bytes_in={} bytes_out={} ", totals.bytes_in, totals.bytes_out),
    ] {
        assert!(log.contains(&part), "{part} in {log}");
    }
}

/// TCP connections of this namespace in the state ESTABLISHED.
fn established() -> usize {
    ["tcp", "tcp6"]
        .iter()
        .map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).expect("procfs"))
        .map(|table| table.lines().filter(|line| line.split_whitespace().nth(3) == Some("01")).count())
        .sum()
}

#[test]
fn a_killed_connection_is_reset_at_both_ends() {
    for (listen, server) in [("10.77.1.1:80", "10.77.2.2:8080"), ("[fd77:1::1]:80", "[fd77:2::2]:8080")] {
        kill_one(listen, server);
    }
}

fn kill_one(listen: &str, server: &str) {
    let lab = Lab::new();
    lab.serve(server, echo);
    let running = Running::start(&lab);
    let mut stream = lab.connect(listen);
    round_trip(&mut stream, 10);
    let id = running.connections()[0].id.clone();
    let killed = running.kill(&id).expect("killed");
    assert_eq!((killed.route.as_str(), killed.client), ("web", stream.local_addr().expect("address")));
    running.kill(&id).expect_err("dead already");
    running.kill("00000000000000zz").expect_err("no id");
    stream.set_read_timeout(Some(shunt_lab::patiently(PATIENCE))).expect("timeout");
    // Neither end has anything to say; and the entry is still there.
    let killed_at = Instant::now();
    let error = stream.read_exact(&mut [0]).expect_err("cut");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    lab.inside("b", || {
        let deadline = Instant::now() + shunt_lab::patiently(PATIENCE);
        while established() > 0 {
            assert!(Instant::now() < deadline, "the backend was not told");
            thread::sleep(Duration::from_millis(10));
        }
    });
    assert!(killed_at.elapsed() < Duration::from_millis(900), "{:?}", killed_at.elapsed());
    running.terminated("web", Reason::Killed, 1);
    assert!(running.stop().contains("reason=killed"));
}

#[test]
fn udp_flows_of_a_lost_backend_choose_again() {
    let lab = Lab::new();
    lab.serve_udp("10.77.2.2:5353");
    let running = Running::start(&lab);
    let socket = lab.udp("10.77.1.1:53");
    socket.send(b"hello").expect("send");
    socket.recv(&mut [0; 16]).expect("echo");
    let other: IpAddr = "10.77.2.9".parse().expect("address");
    running.send(Input::DropUdp(DropUdp { route: UDP_ROUTE, backends: vec![(other, None)] }));
    assert_eq!(running.connections().iter().filter(|connection| connection.state != "closing").count(), 1);
    let lost: IpAddr = "10.77.2.2".parse().expect("address");
    running.send(Input::DropUdp(DropUdp { route: UDP_ROUTE, backends: vec![(lost, Some(5353))] }));
    running.terminated("dns", Reason::Drained, 1);
    assert!(running.connections().is_empty());
    socket.send(b"again").expect("send");
    socket.recv(&mut [0; 16]).expect("echo");
    running.state_until(|state| state.routes["dns"].connections_total == 2);
}

#[test]
fn a_removed_route_drains_and_is_reported() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    let mut running = Running::start(&lab);
    let mut stream = lab.connect("10.77.1.1:80");
    round_trip(&mut stream, 10);
    running.state_until(|state| state.routes.get("web").is_some_and(|route| route.connections_active == 1));
    let until = running.clock.at(Instant::now() + Duration::from_millis(500));
    let mut routes = Running::routes();
    let draining = RouteInfo { drain_until: Some(until), ..RouteInfo::clone(&routes[&TCP_ROUTE]) };
    routes.insert(TCP_ROUTE, Arc::new(draining));
    running.send(Input::Routes(routes));
    let Running { runtime, drained, .. } = &mut running;
    let told = runtime.block_on(async { tokio::time::timeout(shunt_lab::patiently(PATIENCE), drained.recv()).await });
    assert_eq!(told.expect("in time"), Some(TCP_ROUTE));
    assert!(running.clock.now().mono >= until);
    running.terminated("web", Reason::Drained, 1);
    running.send(Input::Routes(RouteTable::from([(UDP_ROUTE, route("dns", Protocol::Udp))])));
    running.state_until(|state| !state.routes.contains_key("web"));
}

#[test]
fn a_new_tracker_adopts_the_flows_of_the_one_before() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    let first = Running::start(&lab);
    let mut living = lab.connect("10.77.1.1:80");
    let mut ending = lab.connect("10.77.1.1:80");
    round_trip(&mut living, 10);
    round_trip(&mut ending, 10);
    let ids = |running: &Running| running.connections().into_iter().map(|c| c.id).collect::<HashSet<_>>();
    let before = ids(&first);
    assert_eq!(before.len(), 2);
    first.stop();
    // Both have finished before anybody listens again.
    ending.shutdown(std::net::Shutdown::Write).expect("a FIN");
    assert_eq!(ending.read(&mut [0]).expect("the other FIN"), 0);
    let second = Running::start(&lab);
    let state = second.state_until(|state| state.routes.get("web").is_some_and(|route| route.connections_active == 1));
    // What had ended before it looked may have been counted by the one before.
    assert!(state.routes["web"].terminations.is_empty());
    assert!(ids(&second).is_subset(&before));
    round_trip(&mut living, 10);
}

/// Nanoseconds the tracker's thread has run.
fn tracker_cpu() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs").map_while(Result::ok);
    let track = tasks
        .map(|task| task.path())
        .find(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "track"));
    let text = std::fs::read_to_string(track.expect("thread").join("schedstat")).expect("schedstat");
    text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("number")
}

/// Prints what a connection costs the tracker; and whatever the rate, none is missed or counted twice.
#[test]
#[ignore = "a measurement, alone on its machine"]
fn many_short_connections_are_all_counted() {
    const EACH: u64 = 10_000;
    const CLIENTS: u64 = 3;
    let lab = Lab::new();
    let listener = lab.inside("b", || std::net::TcpListener::bind("10.77.2.2:8080")).expect("bind");
    thread::spawn(move || listener.incoming().for_each(drop));
    let running = Running::start_with(&lab, INTERVAL);
    let (before, started) = (tracker_cpu(), Instant::now());
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                lab.inside("c", || {
                    for _ in 0..EACH {
                        let mut stream = TcpStream::connect("10.77.1.1:80").expect("connect");
                        assert_eq!(stream.read(&mut [0]).expect("end"), 0);
                    }
                });
            });
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    let total = EACH * CLIENTS;
    let state = running.state_until(|state| {
        state
            .routes
            .get("web")
            .is_some_and(|r| r.connections_active == 0 && r.terminations.values().sum::<u64>() == total)
    });
    println!(
        "{:.0} connections/s; {:.1} µs of the tracker each; {} events, {} lost; {:?}",
        total as f64 / seconds,
        (tracker_cpu() - before) / 1e3 / total as f64,
        state.conntrack.events,
        state.conntrack.events_lost,
        state.routes["web"].terminations,
    );
    assert_eq!(state.routes["web"].connections_total, total);
    assert_eq!(running.stop().lines().count() as u64, total);
}
