use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
};

use proxy_core::{capability::Capabilities, config, plan::plan, reason::Reason, ruleset::Endpoint};
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::{
    kernel::{capability::privileges, sockmap::Sockmap},
    stream::{RouteSpec, route::Listen},
};

/// A worker with one route, not running yet, and where it listens. `endpoints`: of the route.
fn worker(text: &str, endpoints: Vec<Endpoint>) -> (Worker, Arc<Route>, TcpListener, mpsc::Sender<Command>) {
    let config = config::parse(text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    let plan = plan(&config, &Capabilities::all());
    let spec = RouteSpec { id: 1, plan: Arc::clone(&plan.routes()[0]), endpoints, names: Vec::new() };
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
        handoff: None,
        challenges: Challenges::default(),
    };
    let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd"));
    let (commands, obeyed) = mpsc::channel();
    let mut worker = Worker::new(0, shared, wake, obeyed, Arc::default(), 4).expect("a worker");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a flag");
    worker.listen_on(Listener {
        fd: listener.try_clone().expect("a descriptor").into(),
        address: listener.local_addr().expect("an address"),
        listen: Arc::new(Listen::new(&[&route])),
        is_group: false,
        segment: None,
    });
    (worker, route, listener, commands)
}

#[test]
fn a_panic_in_a_connections_turn_is_the_end_of_that_connection_and_of_no_other() {
    // At a port that wants to know the name first.
    let text = "[[route]]\nname = \"web\"\nlisten = [\"127.0.0.1:443\"]\nbackends = [\"127.0.0.1:1\"]\n\
                match.sni = [\"web.example\"]\n";
    let (mut worker, _, listener, _) = worker(text, Vec::new());
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
    let text = format!(
        "[[route]]\nname = \"web\"\nlisten = [\"127.0.0.1:443\"]\nbackends = [\"{to}\"]\nengine = \"sockmap\"\n"
    );
    let endpoint = Endpoint { address: to.ip(), port: Some(to.port()), weight: 1, up: true };
    let (mut worker, route, listener, commands) = worker(&text, vec![endpoint]);
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
