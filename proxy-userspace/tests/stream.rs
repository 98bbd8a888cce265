//! The stream path on loopback: its own promises, without routes, views or a daemon around it.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use proxy_abi::{flow::IPV4, handoff::gate};
use proxy_core::{
    capability::Capabilities,
    config::{self, Engine},
    plan::plan,
    reason::Reason,
    ruleset::Endpoint,
};
use proxy_userspace::{
    control::ConnectionFilter,
    kernel::bpf::handoff::{Found, HandoffStore, MemoryHandoffs},
    stream::{
        Change, Ended, Options, RouteSpec, StreamCommand, StreamId, StreamPath, Streams,
        handed::Store,
        handover::{RESERVED, WHEN},
    },
};
use tokio::sync::{mpsc, oneshot};

const SOON: Duration = Duration::from_secs(5);

struct Served {
    runtime: tokio::runtime::Runtime,
    path: StreamPath,
    ended: mpsc::Receiver<Vec<Ended>>,
    drained: mpsc::Receiver<u32>,
    listen: SocketAddr,
}

/// A stream path with one route to `backends`.
fn serve(engine: Engine, backends: &[SocketAddr], extra: &str) -> Served {
    serve_and_tell(engine, backends, extra, 1024)
}

/// `told`: batches of ended connections that may wait.
fn serve_and_tell(engine: Engine, backends: &[SocketAddr], extra: &str, told: usize) -> Served {
    serve_with(engine, backends, extra, told, None)
}

fn serve_with(engine: Engine, backends: &[SocketAddr], extra: &str, told: usize, handoff: Option<Store>) -> Served {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (ended_tx, ended) = mpsc::channel(told);
    let (drained_tx, drained) = mpsc::channel(16);
    let (failed_dials, _) = mpsc::channel(16);
    let options = Options {
        workers: 2,
        failed_dials,
        drained: drained_tx,
        lock_tables: false,
        ended: ended_tx,
        handoff,
        begin_handoff: Box::new(|| panic!("its table is given at the start")),
    };
    let mut path = runtime.block_on(async { StreamPath::start(options) }).expect("it starts");
    let listen = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let prepared = path.prepare(change(engine, listen, backends, extra)).expect("it listens");
    path.commit(prepared);
    Served { runtime, path, ended, drained, listen }
}

fn change(engine: Engine, listen: SocketAddr, backends: &[SocketAddr], extra: &str) -> Change {
    let list: Vec<String> = backends.iter().map(|b| format!("\"{b}\"")).collect();
    let text =
        format!("[[route]]\nname = \"web\"\nlisten = [\"{listen}\"]\nbackends = [{}]\n{extra}\n", list.join(", "));
    let config = config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    let planned = plan(&config, &Capabilities::all());
    let mut route = (*planned.routes()[0]).clone();
    route.engine = Some(engine);
    let endpoint = |b: &SocketAddr| Endpoint { address: b.ip(), port: Some(b.port()), weight: 1, up: true };
    let spec = RouteSpec {
        id: 7,
        plan: Arc::new(route),
        endpoints: backends.iter().map(endpoint).collect(),
        names: Vec::new(),
    };
    Change { ports: vec![(listen, vec![7])], routes: vec![spec], gone: Vec::new() }
}

impl Served {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.listen).expect("it accepts");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        stream
    }

    /// The next connection that ends for `reason`.
    fn ended(&mut self, reason: Reason) -> Ended {
        let ended = &mut self.ended;
        let next = async {
            while let Some(batch) = ended.recv().await {
                if let Some(found) = batch.into_iter().find(|ended| ended.reason == reason) {
                    return Some(found);
                }
            }
            None
        };
        let found = self.runtime.block_on(async { tokio::time::timeout(SOON, next).await });
        found.ok().flatten().unwrap_or_else(|| panic!("no connection ended for {reason}"))
    }
}

fn echo_server() -> SocketAddr {
    echo_server_at("127.0.0.1:0")
}

fn echo_server_at(address: &str) -> SocketAddr {
    let listener = TcpListener::bind(address).expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut stream = stream;
                let mut buffer = vec![0; 65536];
                while let Ok(n) = stream.read(&mut buffer) {
                    if n == 0 || stream.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn bytes_arrive_both_ways_and_are_counted_once() {
    for engine in [Engine::Copy, Engine::Splice] {
        let mut served = serve(engine, &[echo_server()], "");
        let mut stream = served.connect();
        let data: Vec<u8> = (0..20_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let mut writer = stream.try_clone().expect("a clone");
        let sent = data.clone();
        let sender = thread::spawn(move || {
            writer.write_all(&sent).expect("written");
            writer.shutdown(Shutdown::Write).expect("finished");
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).expect("read");
        sender.join().expect("sent");
        assert!(back == data, "{engine}: came back different ({} of {} bytes)", back.len(), data.len());
        let ended = served.ended(Reason::FinishedClientFirst);
        assert_eq!((ended.bytes_in, ended.bytes_out), (data.len() as u64, data.len() as u64));
        assert_eq!(ended.engine, engine);
        let totals = served.path.reader.meters.get(7).expect("its meters").totals();
        let sum: u64 = totals.engines.iter().map(|(_, t)| t.bytes_in).sum();
        assert_eq!(sum, data.len() as u64);
        assert!(totals.engines.iter().all(|(_, t)| t.active == 0));
    }
}

#[test]
fn a_closed_backend_is_a_reset_for_the_client_and_another_is_tried_first() {
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let mut served = serve(Engine::Copy, &[closed], "");
    let mut stream = served.connect();
    assert!(stream.read(&mut [0; 1]).is_err(), "a reset");
    served.ended(Reason::ConnectRefused);
    let served = serve(Engine::Copy, &[closed, echo_server()], "");
    for _ in 0..4 {
        let mut stream = served.connect();
        stream.write_all(b"hello").expect("written");
        let mut back = [0; 5];
        stream.read_exact(&mut back).expect("an answer");
    }
}

#[test]
fn a_backend_that_is_slow_to_answer_has_another_asked_beside_it_and_may_still_win() {
    // A full queue drops SYNs until somebody accepts: the backend answers when its SYN is sent again.
    let slow = socket_with_a_full_queue();
    let address = slow.0.local_addr().expect("an address");
    let served = serve(Engine::Copy, &[address, echo_server()], "timeouts = { connect = \"8s\" }");
    let began = Instant::now();
    let mut streams: Vec<TcpStream> = (0..8).map(|_| served.connect()).collect();
    for stream in &mut streams {
        stream.write_all(b"x").expect("written");
        stream.read_exact(&mut [0]).expect("an answer");
    }
    let took = began.elapsed();
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(4), "{took:?}");
    let alone = serve(Engine::Copy, &[address], "timeouts = { connect = \"8s\" }");
    let mut stream = alone.connect();
    let (listener, waiting) = slow;
    thread::sleep(Duration::from_millis(1200));
    drop(waiting);
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(b"late");
        }
    });
    let mut word = [0; 4];
    stream.read_exact(&mut word).expect("the slow one has answered");
    assert_eq!(&word, b"late");
}

#[test]
fn a_name_with_addresses_of_both_families_has_the_other_asked_soon() {
    let slow = socket_with_a_full_queue();
    let backends = [slow.0.local_addr().expect("an address"), echo_server_at("[::1]:0")];
    let mut served = serve(Engine::Copy, &backends, "");
    let named = change(Engine::Copy, served.listen, &backends, "");
    let text = format!("[[route]]\nname = \"web\"\nlisten = [\"{}\"]\nbackends = [\"localhost:1\"]\n", served.listen);
    let config = config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    let plan = plan(&config, &Capabilities::all()).routes()[0].clone();
    let endpoints = named.routes[0].endpoints.clone();
    let spec = RouteSpec { id: 7, plan, endpoints, names: Vec::new() };
    let prepared = served.path.prepare(Change { routes: vec![spec], ..Change::default() }).expect("nothing can fail");
    served.path.commit(prepared);
    thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    // At least one of the workers has two of them, and begins one with each backend.
    let mut streams: Vec<TcpStream> = (0..8).map(|_| served.connect()).collect();
    for stream in &mut streams {
        stream.write_all(b"x").expect("written");
        stream.read_exact(&mut [0]).expect("an answer");
    }
    let took = began.elapsed();
    assert!(took > Duration::from_millis(240) && took < Duration::from_millis(900), "{took:?}");
}

#[test]
fn a_hearer_that_was_behind_hears_of_every_end_without_a_new_one() {
    const CONNECTIONS: usize = 6;
    let mut served = serve_and_tell(Engine::Copy, &[echo_server()], "", 1);
    for _ in 0..CONNECTIONS {
        drop(served.connect());
        // Longer than ends are kept to be told together.
        thread::sleep(Duration::from_millis(120));
    }
    let ended = &mut served.ended;
    let told = async {
        let mut told = 0;
        while told < CONNECTIONS {
            told += ended.recv().await.map_or(CONNECTIONS, |batch| batch.len());
        }
        told
    };
    let told = served.runtime.block_on(async { tokio::time::timeout(SOON, told).await });
    assert_eq!(told.expect("all are told in time"), CONNECTIONS);
}

/// The second connection to it is not answered.
fn socket_with_a_full_queue() -> (TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    rustix::net::listen(&listener, 0).expect("a queue of one");
    let address = listener.local_addr().expect("an address");
    let connect = |_| TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
    let waiting = (0..4).filter_map(connect).collect();
    (listener, waiting)
}

#[test]
fn a_route_that_is_told_apart_anew_is_so_without_a_new_listener() {
    let mut served = serve(Engine::Copy, &[echo_server()], "");
    let only_others = change(Engine::Copy, served.listen, &[echo_server()], "match = { client = [\"10.0.0.0/8\"] }");
    let only_others = Change { ports: Vec::new(), ..only_others };
    let prepared = served.path.prepare(only_others).expect("nothing can fail");
    served.path.commit(prepared);
    let deadline = Instant::now() + SOON;
    loop {
        let mut stream = served.connect();
        if stream.write_all(b"x").is_err() || stream.read_exact(&mut [0]).is_err() {
            break;
        }
        assert!(Instant::now() < deadline, "the client is not of the route any more");
    }
    served.ended(Reason::NoRoute);
}

#[test]
fn a_killed_connection_is_gone_for_both_sides() {
    let mut served = serve(Engine::Copy, &[echo_server()], "");
    let mut stream = served.connect();
    stream.write_all(b"x").expect("written");
    stream.read_exact(&mut [0]).expect("an answer");
    let commands = served.path.commands.clone();
    let list = served.runtime.block_on(async {
        let (reply, answer) = oneshot::channel();
        commands.send(StreamCommand::Connections { filter: ConnectionFilter::default(), reply }).await.expect("sent");
        answer.await.expect("answered").expect("a list")
    });
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].state.as_str(), list[0].bytes_in, list[0].bytes_out), ("established", 1, 1));
    let id: StreamId = list[0].id.parse().expect("an id");
    served.runtime.block_on(async {
        let (reply, answer) = oneshot::channel();
        commands.send(StreamCommand::Kill { id, reply }).await.expect("sent");
        answer.await.expect("answered").expect("killed");
    });
    assert!(stream.read(&mut [0; 1]).is_err(), "a reset");
    served.ended(Reason::Killed);
}

#[test]
fn a_route_that_is_gone_drains_and_a_stopping_path_waits_for_it() {
    let mut served = serve(Engine::Copy, &[echo_server()], "timeouts = { drain = \"1s\" }");
    let mut stream = served.connect();
    stream.write_all(b"x").expect("written");
    stream.read_exact(&mut [0]).expect("an answer");
    let gone = Change { gone: vec![7], ports: vec![(served.listen, Vec::new())], ..Change::default() };
    let prepared = served.path.prepare(gone).expect("nothing can fail");
    served.path.commit(prepared);
    let deadline = Instant::now() + SOON;
    while TcpStream::connect(served.listen).is_ok() {
        assert!(Instant::now() < deadline, "nobody listens any more");
        thread::sleep(Duration::from_millis(5));
    }
    stream.write_all(b"y").expect("it lives on");
    stream.read_exact(&mut [0]).expect("an answer");
    assert!(stream.read(&mut [0]).is_err(), "cut with a reset");
    served.ended(Reason::Drained);
    let drained = &mut served.drained;
    let id = served.runtime.block_on(async { tokio::time::timeout(SOON, drained.recv()).await });
    assert_eq!(id.expect("in time"), Some(7));
    let stopping = Instant::now();
    served.runtime.block_on(served.path.stop());
    assert!(stopping.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_connection_that_is_handed_over_leaves_without_a_word() {
    let store = Arc::new(MemoryHandoffs::new(16).expect("a table"));
    let served =
        serve_with(Engine::Handoff, &[echo_server()], "", 1024, Some(Store { table: store.clone(), on: None }));
    // Loopback's segments are larger than can be asked for: what the first clients teach each worker.
    for _ in 0..16 {
        let mut stream = served.connect();
        stream.write_all(b"hello").expect("it writes");
        thread::sleep(WHEN.age + Duration::from_millis(50));
        stream.shutdown(Shutdown::Both).expect("it ends");
    }
    let mut stream = served.connect();
    stream.write_all(b"hello").expect("it writes");
    stream.read_exact(&mut [0; 5]).expect("it echoes");
    let (client, listen) = (stream.local_addr().expect("an address"), served.listen);
    let deadline = Instant::now() + SOON;
    let found = loop {
        let alone = |found: &Found| found.flow.gate == gate::ALONE && found.flow.key.source.port() == client.port();
        if let Some(found) = store.walk().into_iter().find(alone) {
            break found;
        }
        assert!(Instant::now() < deadline, "{:?}", store.walk());
        thread::sleep(Duration::from_millis(1));
    };
    let there = store.entry(&found.flow.key).expect("an entry");
    let back = store.entry(&there.opposite_key(IPV4)).expect("its opposite");
    assert_eq!(found.flow.key.destination.port(), listen.port());
    assert!(RESERVED.contains(&there.source.port()), "{there:?}");
    assert_eq!((there.dseq, there.dack), (back.dack, back.dseq));
    // Nothing of ours is on the machine any more, and nobody was told.
    stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    let silence = stream.read(&mut [0; 1]).expect_err("neither FIN nor RST");
    assert!(matches!(silence.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut), "{silence}");
    stream.write_all(b"who is there").expect("it is sent");
    let reset = stream.read(&mut [0; 1]).expect_err("no socket answers");
    assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
}
