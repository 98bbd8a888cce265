//! How long a relayed connection may take, and that every state has its own limit (A16, B1, B4, B5, C1, C3).

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shunt_lab::{
    Lab, Shunt, Stream,
    dialog::{echo, read_to_end},
    hello::Hello,
    link,
    relay::{Relay, on_each, servers, servers_with_tls},
    scripted::{Behaviour, TcpServer},
    tls::NAME,
    wait_for, wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// Past its due time an end may come later on a busy machine; before it, never.
const LATE: Duration = Duration::from_secs(2);

fn pause(time: Duration) -> Result<()> {
    let due = Instant::now() + time;
    wait_until("a pause", time + SOON, || Instant::now() >= due)
}

/// Waits for the end of `stream`; it must come `after` so long since `since`, and not much later.
fn ends_after(stream: &mut (impl Read + AsFd), since: Instant, after: Duration) -> Result<()> {
    read_to_end(stream, (after + LATE).saturating_sub(since.elapsed()))?;
    let took = since.elapsed();
    // Timers are rounded to a tick.
    ensure!(took + Duration::from_millis(150) >= after, "ended after {took:?}, too soon: the limit is {after:?}");
    println!("ended after {took:?}; the limit is {after:?}");
    Ok(())
}

#[test]
fn an_idle_connection_ends_at_the_limit_and_every_byte_starts_it_over() -> Result<()> {
    const LIMIT: Duration = Duration::from_millis(1500);
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "timeouts = { idle = \"1500ms\" }")?)?;
    on_each(&Relay::WITH_TLS, |relay| {
        let mut stream = relay.begin(&lab, &shunt)?;
        for _ in 0..4 {
            // Just before the limit.
            pause(LIMIT * 2 / 3)?;
            echo(&mut stream, b"tick")?;
        }
        ends_after(&mut stream, Instant::now(), LIMIT)?;
        servers[relay as usize].wait_records(1, LATE).context("the backend is told")?;
        shunt.wait_ended(relay.route(), &[("idle_timeout", 1)], SOON)
    })
}

#[test]
fn a_byte_in_one_direction_alone_keeps_a_connection_alive() -> Result<()> {
    const LIMIT: Duration = Duration::from_millis(1500);
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::sink())?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "timeouts = { idle = \"1500ms\" }")?)?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        let mut stream = relay.open(&lab)?;
        let last = (1..=5).try_fold(Instant::now(), |_, n| -> Result<Instant> {
            let written = Instant::now();
            stream.write_all(b".")?;
            wait_until("it arrives", SOON, || servers[relay as usize].received() == n)?;
            if n == 3 {
                relay.settle(&shunt, &stream)?;
            } else {
                pause(LIMIT * 2 / 3)?;
            }
            Ok(written)
        })?;
        ends_after(&mut stream, last, LIMIT)?;
        shunt.wait_ended(relay.route(), &[("idle_timeout", 1)], SOON)
    })
}

#[test]
fn keepalive_multiplies_the_idle_limit_or_lifts_it() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let tls = lab.tls()?;
    let _tls = TcpServer::start_tls(lab.backend(1), 443, Behaviour::Echo, tls.acceptor.clone())?;
    let kinds = [("standard", 1), ("extended", 6), ("immortal", 0)];
    let backend = |relay: Relay| if relay == Relay::Again { 443 } else { 80 };
    let route = |(nth, (kind, _)): (usize, &(&str, u32)), relay: Relay| {
        format!(
            "[[route]]\nname = \"{kind}-{relay}\"\nlisten = [\"10.88.1.1:{port}\"]\nbackends = [\"10.88.2.2:{backend}\"]\n\
             engine = \"{engine}\"\nkeepalive = \"{kind}\"\ntimeouts = {{ idle = \"1s\" }}\n{ends}{again}",
            relay = relay.route(),
            engine = relay.engine(),
            port = 7000 + 10 * nth + relay as usize,
            backend = backend(relay),
            ends = if Relay::TLS.contains(&relay) { tls.pki.terminate(&["web"], "") } else { String::new() },
            again = if relay == Relay::Again { tls.pki.again(NAME) } else { String::new() },
        )
    };
    let routes: String =
        kinds.iter().enumerate().flat_map(|nth| Relay::ENGINES_AND_TLS.map(|relay| route(nth, relay))).collect();
    let shunt = Shunt::start(&lab, &routes)?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        let open = |nth: usize| -> Result<(Stream, Instant)> {
            let tcp = lab.client().connect(([10, 88, 1, 1], (7000 + 10 * nth + relay as usize) as u16))?;
            let mut stream = relay.secure(&lab, tcp)?;
            let since = Instant::now();
            echo(&mut stream, b"morning")?;
            Ok((stream, since))
        };
        let ((mut standard, begun), (mut extended, since), (mut immortal, _)) = (open(0)?, open(1)?, open(2)?);
        // Where nothing else ends it, the kernel asks both ends now and then whether they are there.
        let port = immortal.local_addr()?.port();
        let probed = |filter: &str| {
            let seen = lab.gateway().sh(&format!("ss -Htno state established '{filter}'"));
            seen.is_ok_and(|seen| seen.contains("timer:(keepalive"))
        };
        let there = format!("10.88.2.2:{}", backend(relay));
        ensure!(shunt.connection_of(&immortal)?.context("listed")?["backend"] == there, "not at {there}");
        // While bytes are on their way, another timer is shown.
        let probes = |whom: &str, filter: String| {
            wait_until(&format!("the {whom} of an immortal connection is probed"), SOON, || probed(&filter))
        };
        if relay.outlives_the_daemon() {
            // It has no socket: tests/handoff_peers.rs sees who asks.
            relay.settle(&shunt, &immortal)?;
        } else {
            probes("client", format!("( dport = :{port} )"))?;
            probes("backend", format!("( dst {there} )"))?;
        }
        let other = extended.local_addr()?.port();
        ensure!(!probed(&format!("( dport = :{other} )")), "a connection with an idle limit needs no probes");
        ends_after(&mut standard, begun, Duration::from_secs(1))?;
        ends_after(&mut extended, since, Duration::from_secs(6))?;
        let warned = format!("client={}", extended.local_addr()?);
        ensure!(shunt.log().lines().any(|line| line.contains("idle for long") && line.contains(&warned)), "no warning");
        pause(Duration::from_secs(1))?;
        echo(&mut immortal, b"evening")?;
        shunt.wait_ended(&format!("standard-{}", relay.route()), &[("idle_timeout", 1)], SOON)?;
        shunt.wait_ended(&format!("extended-{}", relay.route()), &[("idle_timeout", 1)], SOON)
    })
}

#[test]
fn a_half_closed_connection_whose_other_side_is_idle_ends_at_its_own_limit() -> Result<()> {
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Hold)?;
    let limits = "timeouts = { idle = \"2s\", half_closed = \"4s\" }";
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, limits)?)?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        let mut stream = relay.open(&lab)?;
        wait_until("it has reached the backend", SOON, || servers[relay as usize].open() == 1)?;
        relay.settle(&shunt, &stream)?;
        stream.shutdown(Shutdown::Write)?;
        ends_after(&mut stream, Instant::now(), Duration::from_secs(4))?;
        shunt.wait_ended(relay.route(), &[("half_closed_timeout", 1)], SOON)
    })
}

#[test]
fn a_half_closed_connection_that_still_moves_bytes_is_not_idle() -> Result<()> {
    let lab = Lab::new()?;
    let listeners: Vec<_> = Relay::WITH_TLS
        .map(|r| lab.backend(1).listen(([0, 0, 0, 0], r.backend_port())))
        .into_iter()
        .collect::<Result<_, _>>()?;
    let limits = "timeouts = { idle = \"1500ms\", half_closed = \"1500ms\" }";
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, limits)?)?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        let mut client = relay.open(&lab)?;
        relay.settle(&shunt, &client)?;
        client.shutdown(Shutdown::Write)?;
        let mut backend = relay.accept(&lab, &listeners[relay as usize])?;
        for _ in 0..4 {
            pause(Duration::from_secs(1))?;
            backend.write_all(b"more")?;
        }
        drop(backend);
        let (bytes, _) = read_to_end(&mut client, SOON)?;
        ensure!(bytes == b"moremoremoremore", "{bytes:?}");
        shunt.wait_ended(relay.route(), &[("finished_client_first", 1)], SOON)
    })
}

#[test]
fn a_busy_connection_past_its_lifetime_ends_with_that_reason() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "timeouts = { lifetime = \"2s\" }")?)?;
    on_each(&Relay::WITH_TLS, |relay| {
        let began = Instant::now();
        let mut stream = relay.begin(&lab, &shunt)?;
        wait_for("the connection is cut", SOON, || echo(&mut stream, b"busy").err())?;
        let took = began.elapsed();
        ensure!(took > Duration::from_millis(1850) && took < Duration::from_secs(4), "cut after {took:?}");
        shunt.wait_ended(relay.route(), &[("lifetime_exceeded", 1)], SOON)
    })
}

#[test]
fn a_client_that_says_nothing_where_it_must_ends_at_the_initial_data_limit() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let rest =
        "match = { sni = [\"a.example\"] }\ntls = { mode = \"passthrough\" }\ntimeouts = { initial_data = \"1s\" }";
    let shunt = Shunt::start(&lab, &Relay::routes(rest))?;
    on_each(&Relay::ENGINES, |relay| {
        let hello = Hello::to("a.example").build();
        for part in [0, 1, hello.len() / 2, hello.len() - 1] {
            let since = Instant::now();
            let mut stream = lab.client().connect(relay.listen())?;
            stream.write_all(&hello[..part])?;
            ends_after(&mut stream, since, Duration::from_secs(1)).with_context(|| format!("{part} bytes"))?;
        }
        Ok(())
    })?;
    // Nothing was read that names a route.
    let metrics = shunt.metrics()?;
    let ended = metrics.value("shunt_terminations_total", &[("reason", "initial_data_timeout")]);
    let expected = 4 * Relay::ENGINES.len();
    ensure!(ended == expected as f64, "initial_data_timeout: {ended} of {expected}");
    Ok(())
}

#[test]
fn every_state_is_visible_with_a_limit_of_its_own() -> Result<()> {
    let lab = Lab::new()?;
    link::lose(lab.backend(2), 100)?;
    let _servers = servers(&lab, &Behaviour::Hold)?;
    let timeouts = "timeouts = { connect = \"31s\", initial_data = \"41s\", idle = \"51s\", half_closed = \"61s\" }";
    let more: String = Relay::ENGINES
        .iter()
        .flat_map(|relay| {
            let (engine, n) = (relay.engine(), *relay as u16);
            [
                format!("[[route]]\nname = \"mute-{engine}\"\nlisten = [\"10.88.1.1:{}\"]\nengine = \"{engine}\"\nbackends = [\"10.88.2.3:80\"]\n{timeouts}\n", 7000 + n),
                format!("[[route]]\nname = \"tls-{engine}\"\nlisten = [\"10.88.1.1:{}\"]\nengine = \"{engine}\"\nbackends = [\"10.88.2.2:80\"]\nmatch = {{ sni = [\"a.example\"] }}\ntls = {{ mode = \"passthrough\" }}\n{timeouts}\n", 7010 + n),
            ]
        })
        .collect();
    let shunt = Shunt::start(&lab, &format!("{}{more}", Relay::routes(timeouts)))?;
    on_each(&Relay::ENGINES, |relay| {
        let n = relay as u16;
        let classifying = lab.client().connect(([10, 88, 1, 1], 7010 + n))?;
        let dialing = lab.client().connect(([10, 88, 1, 1], 7000 + n))?;
        let established = lab.client().connect(relay.listen())?;
        let half_closed = lab.client().connect(relay.listen())?;
        relay.settle(&shunt, &established)?;
        relay.settle(&shunt, &half_closed)?;
        half_closed.shutdown(Shutdown::Write)?;
        let cases = [
            (&classifying, None, 41.0),
            (&dialing, Some("dialing"), 31.0),
            (&established, Some("established"), 51.0),
            (&half_closed, Some("half_closed"), 61.0),
        ];
        for (stream, state, limit) in cases {
            let mut last = Value::Null;
            let seen = wait_until(&format!("seen {state:?} with {limit} s"), SOON, || {
                last = shunt.connection_of(stream).ok().flatten().unwrap_or_default();
                let expires = last["expires_seconds"].as_f64().unwrap_or(-1.0);
                state.is_none_or(|state| last["state"] == state) && expires <= limit && expires > limit - 9.0
            });
            seen.with_context(|| format!("last seen as {last}"))?;
            println!("{relay:?}: {} expires in {} s", last["state"], last["expires_seconds"]);
        }
        Ok(())
    })
}

#[test]
fn a_long_quiet_connection_is_alive_both_ways_when_it_is_needed() -> Result<()> {
    let lab = Lab::new()?;
    let listeners: Vec<_> = Relay::WITH_TLS
        .map(|r| lab.backend(1).listen(([0, 0, 0, 0], r.backend_port())))
        .into_iter()
        .collect::<Result<_, _>>()?;
    // A day at a limit of an hour and pings every half hour, a hundred thousand times as fast would be less than a tick.
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "timeouts = { idle = \"1s\" }")?)?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        let mut client = relay.open(&lab)?;
        let mut backend = relay.accept(&lab, &listeners[relay as usize])?;
        for n in 0..16 {
            pause(Duration::from_millis(500))?;
            let (from, to) = if n % 2 == 0 { (&mut client, &mut backend) } else { (&mut backend, &mut client) };
            from.write_all(b"ping")?;
            ensure!(shunt_lab::dialog::read_some(to, 4)? == b"ping", "ping {n}");
        }
        let listed = shunt.connection_of(&client)?.context("it is listed")?;
        ensure!(listed["bytes_in"] == 32 && listed["bytes_out"] == 32, "{listed}");
        ensure!(relay != Relay::Handoff || listed["engine"] == "handoff", "{listed}");
        Ok(())
    })
}
