use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
};

use proxy_core::{capability::Capabilities, config, plan::plan, reason::Reason};
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::stream::{RouteSpec, route::Listen};

/// A worker in the test's own thread, and where it listens: at a port that wants to know the name first.
fn worker() -> (Worker, TcpListener) {
    let text = "[[route]]\nname = \"web\"\nlisten = [\"127.0.0.1:443\"]\nbackends = [\"127.0.0.1:1\"]\n\
                match.sni = [\"web.example\"]\n";
    let config = config::parse(text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    let plan = plan(&config, &Capabilities::all());
    let spec = RouteSpec { id: 1, plan: Arc::clone(&plan.routes()[0]), endpoints: Vec::new(), names: Vec::new() };
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
    let mut worker = Worker::new(0, shared, wake, mpsc::channel().1, Arc::default(), 0).expect("a worker");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a flag");
    worker.listen_on(Listener {
        fd: listener.try_clone().expect("a descriptor").into(),
        address: listener.local_addr().expect("an address"),
        listen: Arc::new(Listen::new(&[&route])),
        is_group: false,
        segment: None,
    });
    (worker, listener)
}

#[test]
fn a_panic_in_a_connections_turn_is_the_end_of_that_connection_and_of_no_other() {
    let (mut worker, listener) = worker();
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
