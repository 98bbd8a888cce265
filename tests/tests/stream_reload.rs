//! The file changes, or the daemon stops, while relayed connections carry traffic (B6, E3).

use std::{
    io::{ErrorKind, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt, Stream,
    dialog::{echo, read_to_end},
    hello::Hello,
    pattern,
    relay::{Relay, on_each, on_every_relay, servers, servers_with_tls},
    scripted::{Behaviour, TcpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Echoes on a connection that stays, and connects, echoes and closes beside it, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Load {
    fn start(lab: &Lab, to: SocketAddr) -> Result<Self> {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (client, stopped, count) = (lab.client().clone(), Arc::clone(&stop), Arc::clone(&done));
        let mut staying = client.connect(to)?;
        let thread = std::thread::spawn(move || {
            let mut round = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                echo(&mut staying, format!("staying {round}").as_bytes())?;
                let mut fresh = client.connect(to)?;
                echo(&mut fresh, format!("fresh {round}").as_bytes())?;
                round = count.fetch_add(1, Ordering::Relaxed) + 1;
            }
            Ok(())
        });
        Ok(Self { stop, done, thread })
    }

    fn more(&self, rounds: u64) -> Result<()> {
        let until = self.done.load(Ordering::Relaxed) + rounds;
        wait_until("the load goes on", SOON, || self.thread.is_finished() || self.done.load(Ordering::Relaxed) >= until)
    }

    /// Fails if a single connection or byte went wrong.
    fn finish(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("load")
    }
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 88, 1, 1], port))
}

fn refused(lab: &Lab, to: SocketAddr) -> bool {
    lab.client().connect_within(to, SOON).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[test]
fn changing_one_of_many_relayed_routes_disturbs_no_other() -> Result<()> {
    const ROUTES: u16 = 300;
    let lab = Lab::new()?;
    let _one = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let _two = TcpServer::start(lab.backend(2), 80, Behaviour::Echo)?;
    let engine = |n: u16| if n.is_multiple_of(2) { "copy" } else { "splice" };
    let config = |changed: &str| {
        let route = |name: &str, port: u16, backend: &str| {
            format!(
                "[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:{port}\"]\nengine = \"{}\"\nbackends = [\"{backend}\"]\n\
                 timeouts = {{ drain = \"1h\" }}\n",
                engine(port)
            )
        };
        let many: String = (0..ROUTES).map(|n| route(&format!("r{n}"), 10_000 + n, "10.88.2.2:80")).collect();
        format!("{many}{}{}", route("changing-copy", 80, changed), route("changing-splice", 81, changed))
    };
    let shunt = Shunt::start(&lab, &config("10.88.2.2:80"))?;
    let mut old = [lab.client().connect(at(80))?, lab.client().connect(at(81))?];
    old.iter_mut().try_for_each(|stream| echo(stream, b"old"))?;
    let loads = [Load::start(&lab, at(10_000))?, Load::start(&lab, at(10_001))?];
    let mut others: Vec<TcpStream> =
        (0..ROUTES).map(|n| Ok(lab.client().connect(at(10_000 + n))?)).collect::<Result<_>>()?;
    others.iter_mut().try_for_each(|stream| echo(stream, b"before"))?;
    for round in 0..6 {
        let to = if round % 2 == 0 { "10.88.2.3:80" } else { "10.88.2.2:80" };
        let reload = shunt.reload(&config(to))?;
        ensure!(reload["changed"] == serde_json::json!(["changing-copy", "changing-splice"]), "{reload}");
        for port in [80, 81] {
            let mut stream = lab.client().connect(at(port))?;
            echo(&mut stream, b"new")?;
            let listed = shunt.connection_of(&stream)?.unwrap_or_default();
            ensure!(listed["backend"] == to, "round {round}, port {port}: {listed}");
        }
        loads.iter().try_for_each(|load| load.more(10))?;
    }
    old.iter_mut().try_for_each(|stream| echo(stream, b"the old connection goes on"))?;
    others.iter_mut().try_for_each(|stream| echo(stream, b"undisturbed"))?;
    loads.into_iter().try_for_each(Load::finish)?;
    for load in ["r0", "r1"] {
        ensure!(shunt.terminations(load)?.keys().all(|reason| reason == "finished_client_first"));
    }
    Ok(())
}

#[test]
fn listeners_come_and_go_with_the_file() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let route = |name: &str, listen: &str, engine: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\nlisten = [{listen}]\nengine = \"{engine}\"\nbackends = [\"10.88.2.2:80\"]\n"
        )
    };
    let shunt = Shunt::start(&lab, &route("a", "\"10.88.1.1:70\"", "copy"))?;
    let load = Load::start(&lab, at(70))?;
    // A second address of the same route, one of IPv6, a range, and a route beside it.
    let more = route("a", "\"10.88.1.1:70\", \"10.88.1.1:71\", \"[fd88:1::1]:70\", \"10.88.1.1:7000-7009\"", "copy");
    shunt.reload(&format!("{more}{}", route("b", "\"0.0.0.0:90\"", "splice")))?;
    let mut held = Vec::new();
    for to in ["10.88.1.1:71", "[fd88:1::1]:70", "10.88.1.1:7000", "10.88.1.1:7009", "10.88.1.1:90"] {
        let mut stream = lab.client().connect(to.parse::<SocketAddr>()?)?;
        echo(&mut stream, b"there")?;
        let listed = shunt.connection_of(&stream)?.unwrap_or_default();
        ensure!(listed["listen"] == to, "{to}: {listed}");
        held.push(stream);
    }
    load.more(5)?;
    // All but the first go again; their connections stay, as their route does.
    shunt.reload(&route("a", "\"10.88.1.1:70\"", "copy"))?;
    for port in [71, 7000, 7009, 90] {
        wait_until(&format!("nobody listens at {port}"), SOON, || refused(&lab, at(port)))?;
    }
    for stream in &mut held[..4] {
        echo(stream, b"still here")?;
    }
    load.more(5)?;
    // An address moves from one route to another, and to another engine.
    shunt.reload(&format!("{}{}", route("a", "\"10.88.1.1:71\"", "copy"), route("c", "\"10.88.1.1:70\"", "splice")))?;
    load.more(5)?;
    let mut stream = lab.client().connect(at(70))?;
    echo(&mut stream, b"moved")?;
    ensure!(shunt.connection_of(&stream)?.is_some_and(|c| c["route"] == "c"));
    load.finish()
}

#[test]
fn a_route_moves_between_the_kernel_and_the_stream_path() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let route = |engine: &str| {
        format!(
            "[[route]]\nname = \"a\"\nlisten = [\"10.88.1.1:70\"]\nengine = \"{engine}\"\nbackends = [\"10.88.2.2:80\"]\ntimeouts = {{ drain = \"1h\" }}\n"
        )
    };
    let shunt = Shunt::start(&lab, &route("nft"))?;
    let mut held: Vec<TcpStream> = Vec::new();
    for engine in ["nft", "copy", "splice", "nft", "splice", "copy", "nft"] {
        shunt.reload(&route(engine))?;
        let mut stream = lab.client().connect(at(70))?;
        echo(&mut stream, engine.as_bytes())?;
        wait_until(&format!("a new connection is of {engine}"), SOON, || {
            let found = shunt.engine_of(&stream).ok().flatten();
            found.as_deref() == Some(if engine == "nft" { "nft" } else { "copy" })
        })?;
        held.push(stream);
        for (nth, stream) in held.iter_mut().enumerate() {
            echo(stream, b"goes on").map_err(|e| e.context(format!("connection {nth}, now {engine}")))?;
        }
    }
    Ok(())
}

#[test]
fn a_removed_route_drains_and_then_is_cut() -> Result<()> {
    let lab = Lab::new()?;
    let servers = servers(&lab, &Behaviour::Echo)?;
    let other = "[[route]]\nname = \"other\"\nlisten = [\"10.88.1.1:81\"]\nengine = \"copy\"\nbackends = [\"10.88.2.2:9000\"]\n";
    let shunt = Shunt::start(&lab, &format!("{other}{}", Relay::routes("timeouts = { drain = \"2s\" }")))?;
    let mut streams: Vec<TcpStream> = Relay::ALL.iter().map(|r| r.connect(&lab, &shunt)).collect::<Result<_>>()?;
    let mut stays = lab.client().connect(at(81))?;
    let began = Instant::now();
    shunt.reload(other)?;
    let first = std::sync::Mutex::new(streams.drain(..).map(Some).collect::<Vec<_>>());
    on_every_relay(|relay| {
        let mut stream = first.lock().expect("lock")[relay as usize].take().expect("once");
        wait_until("no new connections", AT_ONCE, || refused(&lab, relay.listen()))?;
        echo(&mut stream, b"draining")?;
        ensure!(shunt.route(relay.route())?["state"] == "draining");
        read_to_end(&mut stream, SOON)?;
        let took = began.elapsed();
        ensure!(took > Duration::from_millis(1850) && took < Duration::from_secs(4), "cut after {took:?}");
        servers[relay as usize].wait_records(1, AT_ONCE)?;
        wait_until("nothing is left of the route", SOON, || shunt.route(relay.route()).is_err())
    })?;
    echo(&mut stays, b"undisturbed")?;
    // The same name again is a new route.
    shunt.reload(&format!("{other}{}", Relay::routes("")))?;
    on_every_relay(|relay| relay.connect(&lab, &shunt).map(drop))
}

#[test]
fn new_matches_on_a_shared_port_hold_from_the_next_connection_on() -> Result<()> {
    let lab = Lab::new()?;
    let _one = TcpServer::start(lab.backend(1), 443, Behaviour::Tagged("b1".into()))?;
    let _two = TcpServer::start(lab.backend(2), 443, Behaviour::Tagged("b2".into()))?;
    let config = |first: &str, second: &str| {
        let route = |relay: &Relay, name: &str, sni: &str, backend: &str| {
            format!(
                "[[route]]\nname = \"{name}-{e}\"\nlisten = [\"{}\"]\nengine = \"{e}\"\nbackends = [\"{backend}:443\"]\n\
                 match = {{ sni = [\"{sni}\"] }}\ntls = {{ mode = \"passthrough\" }}\n",
                relay.listen(),
                e = relay.engine()
            )
        };
        let both = |r: &Relay| route(r, "x", first, "10.88.2.2") + &route(r, "y", second, "10.88.2.3");
        Relay::ENGINES.iter().map(both).collect::<String>()
    };
    let shunt = Shunt::start(&lab, &config("a.example", "b.example"))?;
    let ask = |relay: Relay, sni: &str| -> Result<(TcpStream, String)> {
        let mut stream = lab.client().connect(relay.listen())?;
        stream.write_all(&Hello::to(sni).build())?;
        let name = shunt_lab::dialog::read_some(&mut stream, 3)?;
        Ok((stream, String::from_utf8_lossy(&name).trim_end().to_owned()))
    };
    for relay in Relay::ENGINES {
        // One that has said only half when the file changes.
        let hello = Hello::to("a.example").build();
        let mut half = lab.client().connect(relay.listen())?;
        half.write_all(&hello[..20])?;
        let (_held, name) = ask(relay, "a.example")?;
        ensure!(name == "b1");
        shunt.reload(&config("b.example", "a.example"))?;
        wait_until("the other way round", SOON, || ask(relay, "a.example").is_ok_and(|(_, name)| name == "b2"))?;
        ensure!(ask(relay, "b.example")?.1 == "b1");
        half.write_all(&hello[20..])?;
        let name = shunt_lab::dialog::read_some(&mut half, 3)?;
        ensure!(name == b"b1\n" || name == b"b2\n", "the half one came to {name:?}");
        shunt.reload(&config("a.example", "b.example"))?;
        wait_until("as it was", SOON, || ask(relay, "a.example").is_ok_and(|(_, name)| name == "b1"))?;
    }
    Ok(())
}

#[test]
fn a_listen_address_that_is_taken_changes_nothing_and_says_who() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let _taken = lab.gateway().listen(at(71))?;
    let route = |name: &str, port: u16| {
        format!(
            "[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:{port}\"]\nengine = \"copy\"\nbackends = [\"10.88.2.2:80\"]\n"
        )
    };
    let shunt = Shunt::start(&lab, &route("a", 70))?;
    shunt.write_config(&format!("{}{}{}", route("a", 72), route("c", 73), route("b", 71)))?;
    let output = shunt.cli(&["reload"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "exit {}", output.status);
    ensure!(said.contains("10.88.1.1:71") && said.contains("\"b\"") && said.contains("mend:"), "said: {said}");
    echo(&mut lab.client().connect(at(70))?, b"as before")?;
    ensure!(refused(&lab, at(72)) && refused(&lab, at(73)), "a part of the refused file is served");
    Ok(())
}

#[test]
fn a_stopping_daemon_delivers_what_is_in_flight_and_exits_when_it_is_through() -> Result<()> {
    const BYTES: u64 = 64 << 20;
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::sink())?;
    let mut shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "timeouts = { drain = \"20s\" }")?)?;
    let senders: Vec<_> = Relay::ENGINES_AND_TLS
        .iter()
        .map(|relay| {
            let mut stream = relay.open(&lab)?;
            Ok(std::thread::spawn(move || -> Result<pattern::Digested> {
                let sent = pattern::send(&mut stream, 5, BYTES)?;
                stream.shutdown(Shutdown::Write)?;
                read_to_end(&mut stream, Duration::from_secs(20))?;
                Ok(sent)
            }))
        })
        .collect::<Result<_>>()?;
    wait_until("bytes are flowing", SOON, || {
        Relay::ENGINES_AND_TLS.iter().all(|r| servers[*r as usize].received() > 1 << 20)
    })?;
    let began = Instant::now();
    let status = shunt.terminate(Duration::from_secs(22))?;
    println!("exit after {:?}", began.elapsed());
    ensure!(status.success(), "{status}");
    for (sender, relay) in senders.into_iter().zip(Relay::ENGINES_AND_TLS) {
        let sent = sender.join().expect("sender")?;
        let record = servers[relay as usize].wait_records(1, SOON)?.remove(0);
        ensure!(record.received == sent, "{relay:?}: {:?} of {sent:?}", record.received);
        ensure!(refused(&lab, relay.listen()), "somebody listens");
    }
    Ok(())
}

#[test]
fn a_stopping_daemon_cuts_what_is_not_through_in_time() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let mut shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "timeouts = { drain = \"1s\" }")?)?;
    let streams: Vec<Stream> = Relay::WITH_TLS.iter().map(|r| r.begin(&lab, &shunt)).collect::<Result<_>>()?;
    let log = shunt.process()?.log_path().to_owned();
    let began = Instant::now();
    let status = shunt.terminate(Duration::from_secs(4))?;
    let took = began.elapsed();
    ensure!(status.success() && took > Duration::from_millis(850), "{status} after {took:?}");
    let mut cut = 0;
    for (mut stream, relay) in streams.into_iter().zip(Relay::WITH_TLS) {
        if relay.outlives_the_daemon() {
            echo(&mut stream, b"it needs no daemon")?;
        } else {
            read_to_end(&mut stream, AT_ONCE)?;
            cut += 1;
        }
    }
    let said = std::fs::read_to_string(log)?;
    ensure!(said.matches("reason=drained").count() == cut, "the last lines of the access log: {said}");
    Ok(())
}

#[test]
fn an_idle_daemon_stops_at_once_and_a_route_drains_for_its_own_time() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let mut shunt = Shunt::start(&lab, &Relay::routes("timeouts = { drain = \"1h\" }"))?;
    on_each(&Relay::ENGINES, |relay| relay.connect(&lab, &shunt).map(drop))?;
    wait_until("none is open", SOON, || shunt.cli_json(&["status"]).is_ok_and(|s| s["connections_active"] == 0))?;
    let began = Instant::now();
    ensure!(shunt.terminate(SOON)?.success());
    println!("exit after {:?}", began.elapsed());
    ensure!(began.elapsed() < AT_ONCE, "only after {:?}", began.elapsed());
    Ok(())
}

#[test]
fn living_connections_take_the_timeouts_of_the_new_file() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let config = |idle: &str| Relay::routes(&format!("timeouts = {{ idle = \"{idle}\" }}"));
    let shunt = Shunt::start(&lab, &config("1h"))?;
    let mut early: Vec<TcpStream> = Relay::ENGINES.iter().map(|r| r.connect(&lab, &shunt)).collect::<Result<_>>()?;
    shunt.reload(&config("1s"))?;
    for stream in &mut early {
        read_to_end(stream, SOON).context("the limit has come down")?;
    }
    let mut late: Vec<TcpStream> = Relay::ENGINES.iter().map(|r| r.connect(&lab, &shunt)).collect::<Result<_>>()?;
    shunt.reload(&config("1h"))?;
    let due = Instant::now() + Duration::from_secs(2);
    wait_until("more than the old limit", SOON, || Instant::now() >= due)?;
    late.iter_mut().try_for_each(|stream| echo(stream, b"the limit has gone up"))
}

#[test]
fn a_killed_daemon_is_followed_by_one_that_serves_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let mut shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    let streams: Vec<Stream> = Relay::WITH_TLS.iter().map(|r| r.begin(&lab, &shunt)).collect::<Result<_>>()?;
    shunt.kill9();
    let mut alive = Vec::new();
    for (mut stream, relay) in streams.into_iter().zip(Relay::WITH_TLS) {
        if relay.outlives_the_daemon() {
            echo(&mut stream, b"it needs no daemon")?;
            alive.push(stream);
        } else {
            read_to_end(&mut stream, AT_ONCE).context("what a dead daemon relayed ends")?;
        }
    }
    shunt.restart()?;
    // What was adopted ends as one of this daemon's.
    drop(alive);
    wait_until("nothing is left of before", SOON, || {
        shunt.cli_json(&["status"]).is_ok_and(|status| status["connections_active"] == 0)
    })?;
    on_each(&Relay::WITH_TLS, |relay| {
        drop(relay.begin(&lab, &shunt)?);
        let before = u64::from(relay.outlives_the_daemon());
        shunt.wait_ended(relay.route(), &[("finished_client_first", 1 + before)], SOON)
    })
}

#[test]
fn what_is_not_yet_relayed_does_not_hold_a_stopping_daemon_up() -> Result<()> {
    let lab = Lab::new()?;
    shunt_lab::link::lose(lab.backend(1), 100)?;
    let tls = |relay: &Relay| {
        format!(
            "[[route]]\nname = \"tls-{e}\"\nlisten = [\"10.88.1.1:{}\"]\nengine = \"{e}\"\nbackends = [\"10.88.2.3:443\"]\n\
             match = {{ sni = [\"a.example\"] }}\ntls = {{ mode = \"passthrough\" }}\ntimeouts = {{ drain = \"1s\" }}\n",
            7000 + *relay as u16,
            e = relay.engine()
        )
    };
    let dialing = Relay::routes("timeouts = { drain = \"1s\", connect = \"1h\" }");
    let mut shunt = Shunt::start(&lab, &format!("{dialing}{}", Relay::ENGINES.iter().map(tls).collect::<String>()))?;
    let mut streams = Vec::new();
    for relay in Relay::ENGINES {
        streams.push(lab.client().connect(relay.listen())?);
        streams.push(lab.client().connect(at(7000 + relay as u16))?);
    }
    let all = 2 * Relay::ENGINES.len();
    wait_until("all are there", SOON, || shunt.cli_json(&["status"]).is_ok_and(|s| s["connections_active"] == all))?;
    let began = Instant::now();
    ensure!(shunt.terminate(Duration::from_secs(4))?.success());
    println!("exit after {:?}", began.elapsed());
    for stream in &mut streams {
        read_to_end(stream, AT_ONCE)?;
    }
    Ok(())
}
