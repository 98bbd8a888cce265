use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
};

use proxy_core::{
    capability::Capabilities,
    config,
    handoff::{Failure, When},
    plan::{RoutePlan, plan},
    pool::Pool,
    reason::Reason,
};
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::{
    control::ConnectionFilter,
    kernel::{
        bpf::handoff::{HandoffStore, MemoryHandoffs},
        capability::privileges,
        grace::Grace,
        repair,
        sockmap::Sockmap,
    },
    stream::{
        RouteSpec,
        handover::{HandedOver, HandoffEngine, SourcePorts},
        route::Listen,
    },
};

/// A worker that is not running yet, and where it listens.
struct Bench {
    worker: Worker,
    route: Arc<Route>,
    listener: TcpListener,
    commands: mpsc::Sender<Command>,
}

/// … with one route to `port` of this machine.
fn bench(rest: &str, port: u16, engine: Engine, handoff: Option<HandoffEngine>) -> Bench {
    let text =
        format!("[[route]]\nname = \"web\"\nlisten = [\"127.0.0.1:443\"]\nbackends = [\"127.0.0.1:{port}\"]\n{rest}\n");
    let config = config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    let plan = plan(&config, &Capabilities::all());
    let planned = RoutePlan { engine: Some(engine), ..(*plan.routes()[0]).clone() };
    let endpoints = Pool::new(&planned.route).endpoints();
    let spec = RouteSpec { id: 1, plan: Arc::new(planned), endpoints, names: Vec::new() };
    let route = Arc::new(Route::new(spec, None, 1).expect("a route"));
    let pressure = Arc::new(Pressure::default());
    pressure.max.store(100, std::sync::atomic::Ordering::Relaxed);
    let shared = Shared {
        open: Arc::default(),
        pressure,
        began: Instant::now(),
        failed_dials: tokio::sync::mpsc::channel(1).0,
        drained: tokio::sync::mpsc::channel(1).0,
        ended: tokio::sync::mpsc::channel(1).0,
        handoff,
        challenges: Challenges::default(),
    };
    let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd"));
    let (commands, obeyed) = mpsc::channel();
    let mut worker = Worker::new(0, shared, wake, obeyed, Arc::default(), 4).expect("a worker");
    if engine == Engine::Handoff {
        worker.apply(Applied { routes: vec![Arc::clone(&route)], ..Applied::default() });
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a flag");
    worker.listen_on(Listener {
        fd: listener.try_clone().expect("a descriptor").into(),
        address: listener.local_addr().expect("an address"),
        listen: Arc::new(Listen::new(&[&route])),
        is_group: false,
        segment: None,
    });
    Bench { worker, route, listener, commands }
}

#[test]
fn a_panic_in_a_connections_turn_is_the_end_of_that_connection_and_of_no_other() {
    // At a port that wants to know the name first.
    let Bench { mut worker, listener, .. } = bench("match.sni = [\"web.example\"]", 1, Engine::Copy, None);
    let mut events = Events::default();
    let mut clients = [0, 1].map(|_| {
        let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        worker.round(&mut events);
        client
    });
    assert_eq!(worker.flows.open(), 2);
    worker.with(0, |_, _| panic!("a defect that a test has put here"));
    let error = clients[0].read(&mut [0]).expect_err("it is over");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let reasons = |worker: &Worker| worker.told.iter().map(|ended| ended.reason).collect::<Vec<_>>();
    assert_eq!((worker.flows.open(), reasons(&worker)), (1, vec![Reason::InternalError]));
    // The other one is heard as before, and so is the next.
    clients[1].write_all(b"GET / HTTP/1.1\r\n\r\n").expect("written");
    worker.round(&mut events);
    assert_eq!((worker.flows.open(), reasons(&worker)), (0, vec![Reason::InternalError, Reason::NoRoute]));
    clients[0] = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
    worker.round(&mut events);
    assert_eq!(worker.flows.open(), 1);
    let meter = &worker.slots[NO_ROUTE].meter.engines[0];
    assert_eq!((meter.active.get(), worker.shared.open.load(std::sync::atomic::Ordering::Relaxed)), (1, 1));
}

/// Rounds until `is_so`.
fn until(worker: &mut Worker, events: &mut Events, what: &str, mut is_so: impl FnMut(&mut Worker) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so(worker) {
        assert!(Instant::now() < deadline, "{what}");
        worker.round(events);
    }
}

/// Needs root: sockets are held with `TCP_REPAIR`.
#[test]
fn a_connection_whose_owner_is_behind_is_relayed_until_there_is_room() {
    let backend = TcpListener::bind("127.0.0.1:0").expect("a port");
    // As on a wire: those of the loopback device are larger than can be agreed on.
    repair::limit_segments(&backend, 1400).expect("a limit");
    let port = backend.local_addr().expect("an address").port();
    let store = Arc::new(MemoryHandoffs::new(8).expect("a table"));
    let (owner, mut handed) = tokio::sync::mpsc::channel::<HandedOver>(1);
    // What is on its way to the owner fills the channel.
    let full = owner.clone().try_reserve_owned().expect("room");
    let when = When { bytes: 1 << 30, age: Duration::from_millis(1) };
    let engine = HandoffEngine {
        store: Arc::clone(&store) as _,
        owner,
        ports: SourcePorts::default(),
        grace: Grace::start().expect("a thread"),
        on: None,
        when,
    };
    let bench = bench("balance = \"least-connections\"", port, Engine::Handoff, Some(engine));
    let Bench { mut worker, listener, .. } = bench;
    repair::limit_segments(&listener, 1400).expect("a limit");
    let mut events = Events::default();
    let mut client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
    backend.set_nonblocking(true).expect("a flag");
    let mut server = None;
    until(&mut worker, &mut events, "the backend is dialled", |_| {
        server = backend.accept().ok().map(|(server, _)| server);
        server.is_some()
    });
    let mut server = server.expect("a connection");
    let refused = |worker: &Worker| {
        let slot = worker.slots.iter().find(|slot| &*slot.name == "web").expect("the route");
        slot.meter.not_handed_over[Failure::OwnerBusy as usize].get()
    };
    until(&mut worker, &mut events, "it is tried again and again", |worker| refused(worker) >= 3);
    let rows = worker.list(&ConnectionFilter::default());
    let why = rows[0].not_handed_over.as_deref();
    assert_eq!(why, Some("too many connections are being handed over at once; it is tried again"));
    assert_eq!(store.used().0, 0, "nothing of it is in the table");
    let mut got = [0; 7];
    client.write_all(b"relayed").expect("written");
    server.set_nonblocking(true).expect("a flag");
    until(&mut worker, &mut events, "bytes go on", |_| server.peek(&mut got).is_ok_and(|read| read == 7));
    server.read_exact(&mut got).expect("read");
    assert_eq!(&got, b"relayed");
    drop(full);
    let mut owned = None;
    until(&mut worker, &mut events, "it is handed over", |_| {
        owned = handed.try_recv().ok();
        owned.is_some()
    });
    let owned = owned.expect("handed over");
    assert_eq!((owned.bytes_in, owned.passed_on, worker.flows.open()), (7, [0, 0], 0));
    assert_eq!(owned.ends.client, client.local_addr().expect("an address"));
}

/// Sends pieces to a server that gives them back.
fn echo(client: &mut TcpStream, piece: &[u8], times: usize) {
    let mut back = vec![0; piece.len()];
    for _ in 0..times {
        client.write_all(piece).expect("written");
        client.read_exact(&mut back).expect("given back");
        assert!(back == piece);
    }
}

#[test]
fn connections_for_which_the_maps_have_no_room_are_copied_then_spliced_and_counted_as_such() {
    if !privileges::effective().bpf {
        eprintln!("skipped: needs CAP_BPF");
        return;
    }
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = server.local_addr().expect("an address");
    let bench = bench("engine = \"sockmap\"", to.port(), Engine::Sockmap, None);
    let Bench { mut worker, route, listener, commands } = bench;
    worker.serve(Arc::clone(&route));
    worker.take_maps(Sockmap::load(2).expect("maps with room for one connection"));
    let wake = Arc::clone(&worker.wake);
    let running = std::thread::spawn(move || worker.run());
    let mut clients = [0; 3].map(|_| {
        let mut client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        let (mut there, _) = server.accept().expect("a connection");
        std::thread::spawn(move || io::copy(&mut there.try_clone()?, &mut there));
        echo(&mut client, b"hello", 20);
        client
    });
    let open = || {
        let meter = &route.meters.workers[0];
        [Engine::Sockmap, Engine::Copy, Engine::Splice]
            .map(|one| meter.engines[ENGINES.iter().position(|engine| *engine == one).expect("an engine")].active.get())
    };
    assert_eq!(open(), [1, 2, 0]);
    echo(&mut clients[2], &[0x5a; 1 << 16], 80);
    assert_eq!(open(), [1, 1, 1], "what carries much is spliced");
    clients.iter_mut().for_each(|client| echo(client, b"still there", 3));
    drop(clients);
    commands.send(Command::Stop).expect("it is there");
    rustix::io::write(&wake, &1u64.to_ne_bytes()).expect("woken");
    running.join().expect("it ends");
    assert_eq!(open(), [0; 3]);
}
