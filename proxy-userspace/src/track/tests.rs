use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use proxy_core::{
    config::{AccessLog as Filter, LogFormat, MarkMask, Protocol},
    conntrack::{Entry, Event, TcpState, Traffic, Tuple},
    flow::{End, FlowId, MarkLayout, RouteInfo, RouteTable},
    reason::Reason,
    view,
};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Clock, DropUdp, Input, KernelCounters, Options, RouteCounters, tracker::Task};
use crate::{
    access_log::AccessLog,
    control::{ConnectionFilter, FlowCommand, FlowState},
    kernel::conntrack::twin::TwinConntrack,
};

const INTERVAL: Duration = Duration::from_millis(20);

fn layout() -> MarkLayout {
    MarkLayout::new(MarkMask::DEFAULT)
}

fn mark(route: u32, end: End) -> u32 {
    layout().route_mark(route).expect("fits") | layout().end_bits(end)
}

fn flow(id: u32, route: u32) -> Entry {
    let client = ([10, 0, 0, 1], 1000 + id as u16).into();
    Entry {
        id,
        protocol: Protocol::Tcp,
        original: Tuple { source: client, destination: ([10, 0, 0, 2], 80).into() },
        reply: Tuple { source: ([10, 0, 1, 1], 8080).into(), destination: client },
        mark: mark(route, End::Open),
        status: 0b110,
        timeout: Some(100),
        tcp_state: Some(TcpState::Established),
        traffic_in: Some(Traffic { packets: 1, bytes: 60 }),
        traffic_out: Some(Traffic { packets: 1, bytes: 60 }),
        started_ns: None,
        stopped_ns: None,
        event_ns: None,
    }
}

fn info(name: &str) -> RouteInfo {
    RouteInfo {
        name: name.into(),
        protocol: Protocol::Tcp,
        idle: None,
        idle_warning: None,
        half_closed: None,
        lifetime: None,
        kernel_timeouts: true,
        drain_until: None,
    }
}

fn routes(infos: impl IntoIterator<Item = (u32, RouteInfo)>) -> Input {
    Input::Routes(infos.into_iter().map(|(id, info)| (id, Arc::new(info))).collect::<RouteTable>())
}

#[derive(Debug, Clone, Default)]
struct Page(Arc<Mutex<Vec<u8>>>);

impl io::Write for Page {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("page").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a test holds of the task, which runs beside it on the same thread.
struct Bench {
    kernel: TwinConntrack,
    clock: Clock,
    inputs: mpsc::Sender<Input>,
    commands: mpsc::Sender<FlowCommand>,
    state: watch::Receiver<Arc<FlowState>>,
    drained: mpsc::Receiver<u32>,
}

impl Bench {
    async fn send(&self, input: Input) {
        self.inputs.send(input).await.expect("task lives");
    }

    async fn until(&mut self, enough: impl Fn(&FlowState) -> bool) -> Arc<FlowState> {
        let found = tokio::time::timeout(Duration::from_secs(5), self.state.wait_for(|state| enough(state))).await;
        match found {
            Ok(state) => state.expect("task lives").clone(),
            Err(_) => panic!("waited in vain"),
        }
    }

    async fn route(&mut self, name: &str, enough: impl Fn(&view::RouteStats) -> bool) -> view::RouteStats {
        self.until(|state| state.routes.get(name).is_some_and(&enough)).await.routes[name].clone()
    }

    async fn kill(&self, id: String) -> Result<view::Killed, view::Failure> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(FlowCommand::Kill { id, reply }).await.expect("task lives");
        answer.await.expect("answer")
    }

    async fn list(&self, filter: ConnectionFilter) -> Vec<view::Connection> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(FlowCommand::Connections { filter, reply }).await.expect("task lives");
        answer.await.expect("answer").expect("list")
    }

    /// Polls the kernel's side.
    async fn kernel_until(&self, enough: impl Fn(&TwinConntrack) -> bool) -> Duration {
        let start = Instant::now();
        while !enough(&self.kernel) {
            assert!(start.elapsed() < Duration::from_secs(5), "waited in vain");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        start.elapsed()
    }
}

/// Runs `body` beside the task; returns what was logged.
fn run(body: impl AsyncFnOnce(&mut Bench)) -> String {
    run_with(4, body)
}

fn run_with(max_flows: usize, body: impl AsyncFnOnce(&mut Bench)) -> String {
    let page = Page::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let (kernel, clock) = (TwinConntrack::default(), Clock::start());
        let (drained_out, drained) = mpsc::channel(4);
        let (inputs, input_queue) = mpsc::channel(8);
        let (commands, command_queue) = mpsc::channel(8);
        let (publish, state) = watch::channel(Arc::default());
        let options = Options {
            layout: layout(),
            interval: INTERVAL,
            max_flows,
            clock,
            access_log: AccessLog::new(LogFormat::Text, Filter::All, page.clone()).expect("thread"),
            drained: drained_out,
            failed_dials: mpsc::channel(1).0,
        };
        let task = Task::new(options, kernel.clone(), publish);
        let mut bench = Bench { kernel, clock, inputs, commands, state, drained };
        tokio::join!(task.run(command_queue, input_queue), async {
            body(&mut bench).await;
            bench.send(Input::Stop).await;
        });
    });
    let bytes = page.0.lock().expect("page").clone();
    String::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn who_asks_is_answered_with_the_routes_that_were_told_before() {
    // Were it chance, it would be one of two each time.
    for _ in 0..16 {
        run(async |bench| {
            bench.kernel.begin(flow(1, 1));
            bench.send(routes([(1, info("web"))])).await;
            assert_eq!(bench.list(ConnectionFilter::default()).await.len(), 1);
        });
    }
}

#[test]
fn an_end_told_before_the_routes_are_known_is_counted_once_they_are() {
    run(async |bench| {
        bench.kernel.begin(flow(1, 1));
        bench.kernel.change(1, true, |entry| entry.mark = mark(1, End::ResetByClient));
        // The task has its chance to read them.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        bench.send(routes([(1, info("web"))])).await;
        bench.route("web", |route| route.terminations.get(&Reason::ResetByClient) == Some(&1)).await;
    });
}

#[test]
fn a_flow_is_followed_from_new_to_its_line() {
    let log = run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        bench.kernel.begin(flow(1, 1));
        bench.route("web", |route| route.connections_active == 1).await;
        let backend = bench.until(|state| !state.backends.is_empty()).await.backends["web"].clone();
        assert_eq!(backend, HashMap::from([(([10, 0, 1, 1], 8080).into(), 1)]));
        bench.kernel.change(1, false, |entry| entry.traffic_out = Some(Traffic { packets: 9, bytes: 9000 }));
        bench.route("web", |route| route.bytes_out == 9000 && route.bytes_out_rate > 0.0).await;
        // A rate falls back to zero when nothing moves.
        bench.route("web", |route| route.bytes_out_rate == 0.0 && route.bytes_out == 9000).await;
        bench.kernel.change(1, true, |entry| entry.mark = mark(1, End::FinishedBackendFirst));
        bench.route("web", |route| route.terminations.get(&Reason::FinishedBackendFirst) == Some(&1)).await;
        bench.kernel.destroy(1);
        bench.until(|state| state.conntrack.events == 3 && state.conntrack.entries == 0).await;
        assert_eq!(bench.state.borrow().ages["web"].counts.iter().sum::<u64>(), 1);
    });
    assert_eq!(log.lines().count(), 1);
    assert!(log.contains("route=web") && log.contains("bytes_out=9000"), "{log}");
}

#[test]
fn a_killed_flow_is_marked_at_once_and_deleted_after_its_grace() {
    let log = run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        bench.kernel.begin(flow(1, 1));
        bench.route("web", |route| route.connections_active == 1).await;
        let killed = bench.kill(FlowId::of(&flow(1, 1)).to_string()).await.expect("killed");
        assert_eq!(killed.client, flow(1, 1).client());
        assert_eq!(bench.kernel.get(1).map(|entry| layout().end(entry.mark)), Some(End::Cut));
        assert!(bench.kill(killed.id).await.is_err());
        assert!(bench.kill("nonsense".into()).await.is_err());
        let waited = bench.kernel_until(|kernel| kernel.get(1).is_none()).await;
        assert!(waited >= Duration::from_millis(900), "{waited:?}");
        bench.route("web", |route| route.terminations.get(&Reason::Killed) == Some(&1)).await;
    });
    assert_eq!(log.matches("reason=killed").count(), 1, "{log}");
}

#[test]
fn a_lifetime_is_kept_between_dumps() {
    run(async |bench| {
        let lifetime = Some(Duration::from_millis(150));
        bench.send(routes([(1, RouteInfo { lifetime, ..info("web") })])).await;
        bench.until(|state| state.conntrack.dumps > 0).await;
        bench.kernel.begin(flow(1, 1));
        let waited = bench.kernel_until(|kernel| kernel.get(1).is_none_or(|e| layout().end(e.mark) == End::Cut)).await;
        assert!((Duration::from_millis(100)..Duration::from_millis(400)).contains(&waited), "{waited:?}");
        bench.route("web", |route| route.terminations.get(&Reason::LifetimeExceeded) == Some(&1)).await;
    });
}

#[test]
fn lost_events_are_said_and_healed_by_a_dump() {
    run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        bench.kernel.begin(flow(1, 1));
        bench.route("web", |route| route.connections_active == 1).await;
        bench.kernel.push(Event::Lost);
        let state = bench.until(|state| state.conntrack.events_lost == 1).await;
        assert!(state.warnings.iter().any(|warning| warning.contains("lost")), "{:?}", state.warnings);
        bench.until(|state| state.warnings.iter().any(|warning| warning.contains("right"))).await;
    });
}

#[test]
fn kernel_counters_and_refusals_are_merged_with_the_records() {
    run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        bench.kernel.begin(flow(1, 1));
        bench.route("web", |route| route.connections_active == 1).await;
        let counters = |connections, bytes| {
            let traffic = Traffic { packets: 3, bytes };
            let refused = vec![(Reason::Denied, 4), (Reason::LimitRate, 0)];
            let counters = RouteCounters { connections, traffic_in: traffic, traffic_out: traffic, refused };
            Input::Counters(KernelCounters { routes: HashMap::from([(1, counters), (9, RouteCounters::default())]) })
        };
        bench.send(counters(5, 1000)).await;
        let stats = bench.route("web", |route| route.connections_total == 5).await;
        assert_eq!((stats.bytes_in, stats.packets_out, stats.connections_active), (1000, 3, 1));
        assert_eq!(stats.terminations, [(Reason::Denied, 4)].into());
        tokio::time::sleep(Duration::from_millis(50)).await;
        bench.send(counters(6, 11_000)).await;
        let stats = bench.route("web", |route| route.bytes_in == 11_000).await;
        assert!((20_000.0..=200_000.0).contains(&stats.bytes_in_rate), "{}", stats.bytes_in_rate);
        tokio::time::sleep(Duration::from_millis(50)).await;
        bench.send(counters(6, 11_000)).await;
        bench.route("web", |route| route.bytes_in_rate == 0.0).await;
    });
}

#[test]
fn a_flood_that_is_let_go_early_leaves_room_for_what_others_tell() {
    // Few enough for every dump to be a full one.
    const FLOWS: u64 = 9_000;
    run_with(FLOWS as usize, async |bench| {
        bench.kernel.limit(FLOWS / 2);
        bench.send(routes([(1, info("web"))])).await;
        for id in 1..=FLOWS as u32 {
            bench.kernel.begin(flow(id, 1));
            bench.kernel.change(id, true, |entry| entry.mark = mark(1, End::ResetByClient));
        }
        let most = FLOWS / 4;
        let stats = bench.route("web", |route| route.terminations.values().sum::<u64>() == FLOWS).await;
        bench.kernel_until(|kernel| kernel.entries() <= most).await;
        assert!(bench.kernel.most_deleted() <= 4096, "{}", bench.kernel.most_deleted());
        bench.until(|state| state.conntrack.entries <= most).await;
        assert_eq!((stats.connections_total, stats.connections_active), (FLOWS, 0));
    });
}

#[test]
fn a_route_moves_as_long_as_it_has_connections_and_until_its_last_numbers_are_out() {
    run(async |bench| {
        bench.send(routes([(1, info("web")), (2, info("mail"))])).await;
        bench.kernel.begin(flow(1, 1));
        bench.until(|state| state.moving == [1]).await;
        bench.kernel.destroy(1);
        bench.route("web", |route| route.connections_active == 0).await;
        let traffic = Traffic { packets: 3, bytes: 1000 };
        let told = |connections| {
            let counters =
                RouteCounters { connections, traffic_in: traffic, traffic_out: traffic, refused: Vec::new() };
            Input::Counters(KernelCounters { routes: HashMap::from([(1, counters)]) })
        };
        for connections in [1, 2, 2] {
            bench.send(told(connections)).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        bench.route("web", |route| route.connections_total == 2 && route.connections_rate == 0.0).await;
        bench.until(|state| state.moving.is_empty()).await;
    });
}

#[test]
fn counters_that_begin_again_take_nothing_back() {
    run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        (1..=3).for_each(|id| bench.kernel.begin(flow(id, 1)));
        bench.route("web", |route| route.connections_total == 3).await;
        // The table was deleted before anybody had read its counters.
        let traffic = Traffic { packets: 1, bytes: 1000 };
        let counters = RouteCounters { connections: 1, traffic_in: traffic, traffic_out: traffic, refused: Vec::new() };
        bench.send(Input::Counters(KernelCounters { routes: HashMap::from([(1, counters)]) })).await;
        let stats = bench.route("web", |route| route.bytes_out == 1000).await;
        assert_eq!(stats.connections_total, 3);
    });
}

#[test]
fn only_routes_that_exist_are_published() {
    run(async |bench| {
        bench.send(routes([(1, info("web")), (2, info("mail"))])).await;
        bench.until(|state| state.conntrack.dumps > 0).await;
        bench.kernel.begin(flow(1, 1));
        bench.kernel.begin(flow(2, 2));
        bench.until(|state| state.routes.len() == 2).await;
        bench.send(routes([(2, info("mail")), (3, info("new"))])).await;
        for _ in 0..4 {
            let dumps = bench.state.borrow().conntrack.dumps;
            let state = bench.until(|state| state.conntrack.dumps > dumps + 1).await;
            let mut names: Vec<&str> = state.routes.keys().map(String::as_str).collect();
            names.sort_unstable();
            // A route without a number is not there.
            assert_eq!(names, ["mail"]);
            assert!(!state.backends.contains_key("web"));
        }
    });
}

#[test]
fn a_route_name_that_comes_back_under_another_id_starts_afresh() {
    run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        bench.kernel.begin(flow(1, 1));
        bench.route("web", |route| route.connections_total == 1).await;
        bench.send(routes([(2, info("web"))])).await;
        bench.kernel.begin(flow(2, 2));
        bench.kernel.begin(flow(3, 2));
        bench.route("web", |route| route.connections_total == 2 && route.terminations.is_empty()).await;
    });
}

#[test]
fn a_draining_route_is_told_once_it_is_empty() {
    run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        bench.kernel.begin(flow(1, 1));
        bench.route("web", |route| route.connections_active == 1).await;
        let far = Some(bench.clock.at(Instant::now() + Duration::from_secs(60)));
        bench.send(routes([(1, RouteInfo { drain_until: far, ..info("web") })])).await;
        bench.kernel.change(1, true, |entry| entry.mark = mark(1, End::FinishedClientFirst));
        let told = tokio::time::timeout(Duration::from_secs(5), bench.drained.recv()).await;
        assert_eq!(told.expect("in time"), Some(1));
    });
}

#[test]
fn a_list_is_fresh_and_filtered() {
    run(async |bench| {
        bench.send(routes([(1, info("web")), (2, info("mail"))])).await;
        bench.kernel.begin(flow(1, 1));
        bench.kernel.begin(flow(2, 2));
        bench.until(|state| state.routes.values().map(|route| route.connections_active).sum::<u64>() == 2).await;
        bench.kernel.change(1, false, |entry| entry.traffic_in = Some(Traffic { packets: 5, bytes: 555 }));
        let all = bench.list(ConnectionFilter::default()).await;
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].bytes_in, all[0].expires_seconds.map(|left| left > 90.0)), (555, Some(true)));
        let mail = bench.list(ConnectionFilter { route: Some("mail".into()), ..Default::default() }).await;
        assert_eq!((mail.len(), mail[0].client.port()), (1, 1002));
        let port = bench.list(ConnectionFilter { client_port: Some(1001), ..Default::default() }).await;
        assert_eq!((port.len(), &port[0].id), (1, &all[0].id));
        let id = bench.list(ConnectionFilter { id: Some(all[1].id.clone()), ..Default::default() }).await;
        assert_eq!((id.len(), id[0].route.as_str()), (1, "mail"));
        assert_eq!(bench.list(ConnectionFilter { limit: 1, ..Default::default() }).await.len(), 1);
    });
}

#[test]
fn udp_flows_of_a_dead_backend_go_at_once() {
    run(async |bench| {
        bench.send(routes([(1, RouteInfo { protocol: Protocol::Udp, ..info("dns") })])).await;
        bench.kernel.begin(Entry { protocol: Protocol::Udp, tcp_state: None, ..flow(1, 1) });
        bench.send(Input::DropUdp(DropUdp { route: 1, backends: vec![([10, 0, 1, 1].into(), None)] })).await;
        bench.kernel_until(|kernel| kernel.get(1).is_none()).await;
        bench.route("dns", |route| route.terminations.get(&Reason::Drained) == Some(&1)).await;
    });
}

#[test]
fn a_full_flow_table_says_so() {
    run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        bench.until(|state| state.conntrack.dumps > 0).await;
        (1..=5).for_each(|id| bench.kernel.begin(flow(id, 1)));
        let state = bench.until(|state| !state.warnings.is_empty()).await;
        assert!(state.warnings[0].contains("full"), "{:?}", state.warnings);
    });
}

#[test]
fn what_ended_is_logged_when_the_tracker_stops() {
    let log = run(async |bench| {
        bench.send(routes([(1, info("web"))])).await;
        bench.until(|state| state.conntrack.dumps > 0).await;
        bench.kernel.begin(flow(1, 1));
        bench.kernel.begin(flow(2, 1));
        bench.kernel.change(1, true, |entry| entry.mark = mark(1, End::ResetByBackend));
        bench.route("web", |route| route.connections_active == 1).await;
    });
    assert_eq!(log.lines().count(), 1);
    assert!(log.contains("reason=reset_by_backend"), "{log}");
}
