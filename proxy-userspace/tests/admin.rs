//! The `shunt` command against the admin API on a real Unix socket, with owners that the tests play.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};

use proxy_core::{config::Engine, view};
use proxy_userspace::{
    admin::{Listeners, serve},
    control::{Control, FlowCommand, FlowState, RouteCommand, RouteState},
    stream::meter::Reader,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
};

/// A daemon without a kernel, on its own thread; ends with the value.
struct Daemon {
    folder: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Daemon {
    fn start(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("shunt-admin-{}-{name}", std::process::id()));
        let socket = folder.join("admin.sock");
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, bound) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async {
                let listeners = Listeners::bind(None, &socket).await.expect("bind");
                ready.send(()).expect("the test");
                serve(listeners, owners(), async { drop(stopped.await) }).await;
            });
        });
        bound.recv_timeout(Duration::from_secs(5)).expect("the socket");
        Self { folder, stop: Some(stop), thread: Some(thread) }
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("admin.sock")
    }

    fn shunt(&self, arguments: &str) -> Output {
        shunt(&self.socket(), arguments)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the daemon's thread");
        }
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

fn shunt(socket: &Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shunt"))
        .arg("--socket")
        .arg(socket)
        .args(arguments.split(' '))
        .output()
        .expect("shunt")
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

fn web() -> view::Route {
    view::Route {
        name: "web".into(),
        protocol: "tcp".into(),
        listen: vec!["10.9.9.9:80".into()],
        engine: Engine::Nft,
        balance: "round-robin".into(),
        state: view::RouteState::Active,
        mark: 0x100,
        backends: vec![backend(view::BackendAdmin::Ready)],
        stats: view::RouteStats::default(),
    }
}

fn backend(admin: view::BackendAdmin) -> view::Backend {
    view::Backend {
        name: "10.0.0.1:80".into(),
        addresses: vec![[10, 0, 0, 1].into()],
        weight: 1,
        up: true,
        admin,
        reason: None,
        connections_active: 0,
    }
}

fn connection(number: usize) -> view::Connection {
    view::Connection {
        id: format!("c{number}"),
        route: "web".into(),
        engine: Engine::Nft,
        protocol: "tcp".into(),
        client: "192.0.2.1:4711".parse().expect("address"),
        listen: "10.9.9.9:80".parse().expect("address"),
        backend: "10.0.0.1:80".parse().ok(),
        state: "established".into(),
        age_seconds: 1.0,
        idle_seconds: 0.5,
        expires_seconds: None,
        bytes_in: 1,
        bytes_out: 2,
        packets_in: 1,
        packets_out: 1,
        metered: true,
        not_handed_over: None,
    }
}

fn owners() -> Control {
    let (routes, mut route_commands) = mpsc::channel(8);
    let (flows, mut flow_commands) = mpsc::channel(8);
    let stats = view::RouteStats { connections_active: 2, ..Default::default() };
    let state = RouteState { ready: true, routes: vec![Arc::new(web())], ..Default::default() };
    let (_, route_state) = watch::channel(Arc::new(state));
    let (_, flow_state) =
        watch::channel(Arc::new(FlowState { routes: HashMap::from([("web".into(), stats)]), ..Default::default() }));
    tokio::spawn(async move {
        while let Some(command) = route_commands.recv().await {
            match command {
                RouteCommand::Reload { reply } => {
                    let failure = view::Failure { error: "a.toml:3: bad".into(), hint: Some("mend line 3".into()) };
                    reply.send(Err(failure)).ok();
                }
                RouteCommand::SetBackend { admin, reply, .. } => drop(reply.send(Ok(backend(admin)))),
                RouteCommand::Explain { route, reply } => {
                    let because = "decided by the first packet".to_owned();
                    let (refused, path) = (Vec::new(), vec!["client".to_owned()]);
                    let explain =
                        view::Explain { route, engine: Engine::Nft, because, refused, path, connection: None };
                    reply.send(Ok(explain)).ok();
                }
                RouteCommand::Ruleset { reply } => drop(reply.send(Ok("table inet shunt {}".into()))),
            }
        }
    });
    tokio::spawn(async move {
        while let Some(command) = flow_commands.recv().await {
            match command {
                FlowCommand::Connections { filter, reply } => {
                    // So many that the answer does not fit into a socket's buffer.
                    let count = if filter.limit == 0 { 20_000 } else { filter.limit.min(2) };
                    reply.send(Ok((0..count).map(connection).collect())).ok();
                }
                FlowCommand::Kill { id, reply } => {
                    let one = connection(1);
                    reply.send(Ok(view::Killed { id, route: one.route, client: one.client })).ok();
                }
            }
        }
    });
    // Nothing is relayed.
    let (streams, _) = mpsc::channel(1);
    let (_, relayed_rates) = watch::channel(Arc::default());
    let relayed = Reader::default();
    Control { routes, flows: Some(flows), streams, relayed, relayed_rates, route_state, flow_state }
}

#[test]
fn every_question_is_answered_for_people_and_as_json() {
    let daemon = Daemon::start("ask");
    for (arguments, expected) in [
        ("status", "2 open"),
        ("routes", "10.9.9.9:80/tcp"),
        ("routes web", "BACKEND"),
        ("connections --route web", "192.0.2.1:4711"),
        ("explain web", "decided by the first packet"),
        ("explain 192.0.2.1:4711", "established"),
    ] {
        let output = daemon.shunt(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments}: {}", err(&output));
        assert!(out(&output).contains(expected), "{arguments}: {}", out(&output));
        assert!(!out(&output).contains('\u{1b}'), "no colour into a pipe: {arguments}");
        let json = daemon.shunt(&format!("{arguments} --json"));
        serde_json::from_str::<serde_json::Value>(&out(&json)).unwrap_or_else(|error| panic!("{arguments}: {error}"));
    }
}

#[test]
fn changes_go_through_and_failures_exit_1_with_their_mend() {
    let daemon = Daemon::start("change");
    assert!(out(&daemon.shunt("backend web 10.0.0.1:80 drain")).contains("drain"));
    assert!(out(&daemon.shunt("kill c1")).contains("ended c1"));
    let reload = daemon.shunt("reload");
    assert_eq!(reload.status.code(), Some(1));
    assert_eq!(err(&reload), "error: a.toml:3: bad\n mend: mend line 3\n");
    assert_eq!(daemon.shunt("routes nowhere").status.code(), Some(1));
    let cleanup = daemon.shunt("cleanup");
    assert_eq!(cleanup.status.code(), Some(1), "a running daemon's table is not removed: {}", err(&cleanup));
}

#[test]
fn without_a_daemon_every_client_command_exits_3() {
    for arguments in ["status", "routes", "connections", "explain x", "reload", "backend a b down", "kill c1", "top"] {
        let output = shunt(Path::new("/nonexistent/admin.sock"), arguments);
        assert_eq!(output.status.code(), Some(3), "{arguments}: {}", err(&output));
        assert_eq!(err(&output).lines().count(), 2, "what, and how to mend it: {}", err(&output));
    }
}

#[test]
fn a_long_answer_arrives_whole_and_a_reader_that_leaves_is_no_error() {
    let daemon = Daemon::start("long");
    let output = daemon.shunt("connections --limit 0 --json");
    let found: Vec<view::Connection> = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(found.len(), 20_000);
    let shunt = env!("CARGO_BIN_EXE_shunt");
    let line = format!("({shunt} --socket {} connections --limit 0; echo $? >&2) | head -1", daemon.socket().display());
    let piped = Command::new("sh").args(["-c", &line]).output().expect("sh");
    assert_eq!((err(&piped).trim(), out(&piped).lines().count()), ("0", 1));
}

#[test]
fn silent_clients_are_let_go_and_do_not_keep_the_others_out() {
    let daemon = Daemon::start("silent");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let silent: Vec<_> = runtime.block_on(async {
        let mut silent = Vec::new();
        for _ in 0..64 {
            let mut stream = UnixStream::connect(daemon.socket()).await.expect("connect");
            stream.write_all(b"GET / HT").await.expect("half a request");
            silent.push(stream);
        }
        silent
    });
    // Every place is taken: the answer comes when the first of them is sent away.
    assert_eq!(daemon.shunt("status").status.code(), Some(0));
    runtime.block_on(async {
        for mut stream in silent {
            let mut rest = Vec::new();
            let end = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await;
            assert!(end.is_ok(), "still open");
        }
    });
}
