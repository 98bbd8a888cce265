//! How relayed connections end: each way of ending has one reason, is told at once, and leaves nothing (A1, A5, A9, C2, C4).

use std::{
    io::{ErrorKind, Write},
    net::{Shutdown, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shunt_lab::{
    Lab, Shunt, Stream,
    dialog::{End, echo, end_of, read_to_end, reset, turned_away},
    kernel, pattern,
    relay::{Relay, on_each, servers, servers_with_tls},
    scripted::{Behaviour, Start},
    wait_for, wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);
const JSON_LOG: &str = "[log]\nformat = \"json\"\n";

#[test]
fn a_thousand_clients_that_say_nothing_and_leave_are_gone_within_two_seconds() -> Result<()> {
    const CLIENTS: usize = 1000;
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    on_each(&Relay::ENGINES, |relay| {
        let begin = |n: usize| -> Result<()> {
            let stream = lab.client().connect(relay.listen()).with_context(|| format!("client {n}"))?;
            if n.is_multiple_of(4) {
                reset(stream)?
            }
            Ok(())
        };
        (0..CLIENTS).try_for_each(begin)?;
        shunt.wait_route(relay.route(), "all of them ended", AT_ONCE, |r| {
            let ended: u64 = r["terminations"].as_object()?.values().filter_map(Value::as_u64).sum();
            (r["connections_active"] == 0 && ended == CLIENTS as u64 && r["connections_total"] == ended).then_some(())
        })?;
        let reasons = shunt.terminations(relay.route())?;
        let expected = ["finished_client_first", "reset_by_client"];
        ensure!(reasons.keys().all(|reason| expected.contains(&reason.as_str())), "{reasons:?}");
        Ok(())
    })?;
    let left =
        kernel::tcp_sockets(lab.gateway(), &["established", "syn-sent", "close-wait", "fin-wait-1", "fin-wait-2"])?;
    assert_eq!(left, 0, "sockets left on the gateway");
    Ok(())
}

#[test]
fn what_was_held_for_connections_is_given_back() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    let round = |count: usize| -> Result<()> {
        on_each(&Relay::WITH_TLS, |relay| {
            let mut held: Vec<Stream> = (0..count).map(|_| relay.open(&lab)).collect::<Result<_>>()?;
            held.iter_mut().try_for_each(|stream| echo(stream, b"hello"))?;
            relay.prime(&shunt, &mut held[0])?;
            Ok(())
        })?;
        wait_until("none is open", SOON, || {
            shunt.cli_json(&["status"]).is_ok_and(|status| status["connections_active"] == 0)
        })
    };
    round(50)?;
    let before = kernel::holdings(shunt.pid()?)?;
    for _ in 0..5 {
        round(200)?;
    }
    let mut now = before;
    // A thread of tokio's for blocking calls stays for ten seconds.
    let settled = wait_until("sockets and threads are as before", Duration::from_secs(20), || {
        now = kernel::holdings(shunt.pid().unwrap_or_default()).unwrap_or(now);
        now.sockets <= before.sockets && now.others <= before.others && now.threads <= before.threads
    });
    settled.with_context(|| format!("before {before:?}, after {now:?}"))?;
    // Empty pipes are kept for the next: at most 32 by each worker.
    ensure!(now.pipes <= 2 * 32 * thread::available_parallelism()?.get(), "pipes: {now:?}");
    println!("before {before:?}, after {now:?}");
    ensure!(now.memory < before.memory + (24 << 20), "memory grew: {before:?}, {now:?}");
    Ok(())
}

#[test]
fn a_reset_by_the_backend_is_a_reset_for_the_client() -> Result<()> {
    let lab = Lab::new()?;
    let mut at_once = servers(&lab, &Behaviour::ResetAtOnce)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::ENGINES, |relay| {
        for n in 0..20 {
            let end = turned_away(lab.client(), lab.client().ip.into(), relay.listen(), AT_ONCE)
                .with_context(|| format!("connection {n}"))?;
            ensure!(end == End::Reset, "connection {n}: the client saw {end:?}");
        }
        shunt.wait_ended(relay.route(), &[("reset_by_backend", 20)], SOON)
    })?;
    at_once.clear();
    let echoing = servers_with_tls(&lab, &Behaviour::Echo)?;
    on_each(&Relay::WITH_TLS, |relay| {
        let mut stream = wait_for("a connection through the backend that was dead for a moment", SOON, || {
            relay.begin(&lab, &shunt).ok()
        })?;
        let before = shunt.terminations(relay.route())?.get("reset_by_backend").copied().unwrap_or(0);
        echoing[relay as usize].end_all(true);
        let end = end_of(&mut stream, AT_ONCE)?;
        ensure!(end == End::Reset, "in mid-life: the client saw {end:?}");
        shunt.wait_route(relay.route(), "counted", SOON, |r| {
            (r["terminations"]["reset_by_backend"] == before + 1 && r["connections_active"] == 0).then_some(())
        })
    })
}

#[test]
fn a_reset_behind_both_ends_of_tls_takes_nothing_away() -> Result<()> {
    const MANY: u64 = 50;
    let lab = Lab::new()?;
    let relay = Relay::Again;
    let listener = lab.backend(1).listen(([0, 0, 0, 0], relay.backend_port()))?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    for done in 1..=MANY {
        let mut client = relay.open(&lab)?;
        let mut backend = relay.accept(&lab, &listener)?;
        backend.set_nodelay(true)?;
        client.shutdown(Shutdown::Write)?;
        wait_until("the client's end is through", SOON, || {
            shunt.connection_of(&client).is_ok_and(|c| c.is_some_and(|c| c["state"] == "half_closed"))
        })?;
        backend.write_all(b"answer")?;
        // As a program that closes without reading the other's end.
        backend.say_end()?;
        reset(backend)?;
        let (answer, end) = read_to_end(&mut client, SOON)?;
        ensure!(answer == b"answer" && end == End::Finished, "{done}: {answer:?}, {end:?}");
        shunt.wait_ended(relay.route(), &[("finished_client_first", done)], SOON)?;
    }
    Ok(())
}

#[test]
fn a_reset_by_the_client_reaches_the_backend_as_one() -> Result<()> {
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::WITH_TLS, |relay| {
        reset(relay.begin(&lab, &shunt)?)?;
        let record = servers[relay as usize].wait_records(1, AT_ONCE)?.remove(0);
        let reset = shunt_lab::scripted::Ended::Failed(ErrorKind::ConnectionReset);
        ensure!(record.ended == reset, "the backend saw {:?}", record.ended);
        shunt.wait_ended(relay.route(), &[("reset_by_client", 1)], SOON)
    })
}

#[test]
fn whoever_finishes_first_is_the_reason() -> Result<()> {
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::WITH_TLS, |relay| {
        let mut stream = relay.begin(&lab, &shunt)?;
        stream.shutdown(Shutdown::Write)?;
        ensure!(end_of(&mut stream, AT_ONCE)? == End::Finished, "a clean end is passed on as one");
        shunt.wait_ended(relay.route(), &[("finished_client_first", 1)], SOON)?;
        let mut stream = relay.begin(&lab, &shunt)?;
        servers[relay as usize].end_all(false);
        ensure!(end_of(&mut stream, AT_ONCE)? == End::Finished, "a clean end is passed on as one");
        drop(stream);
        shunt.wait_ended(relay.route(), &[("finished_client_first", 1), ("finished_backend_first", 1)], SOON)
    })
}

#[test]
fn the_same_client_port_again_at_once_is_a_second_connection() -> Result<()> {
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Reply(b"bye".to_vec()))?;
    let shunt = Shunt::start(&lab, &format!("{JSON_LOG}{}", Relay::routes_with_tls(&lab, "")?))?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        let from = SocketAddr::from(([10, 88, 1, 2], 40_000 + relay as u16));
        for nth in 1..=5u64 {
            // The backend closes first, so the client's side has no TIME_WAIT and its port is free as soon as the last ACK
            // is there.
            let connect = || match lab.client().connect_from(from, relay.listen()) {
                Err(error) if error.kind() == ErrorKind::AddrNotAvailable => None,
                outcome => Some(outcome),
            };
            let tcp = wait_for("the port is free", SOON, connect)?.with_context(|| format!("connection {nth}"))?;
            let mut stream = relay.secure(&lab, tcp)?;
            stream.write_all(b"x")?;
            let (answer, end) = read_to_end(&mut stream, SOON)?;
            ensure!(answer == b"bye" && end == End::Finished, "connection {nth} got {answer:?}, {end:?}");
            ensure!(servers[relay as usize].accepted() == nth);
        }
        shunt.wait_ended(relay.route(), &[("finished_backend_first", 5)], SOON)?;
        let ids = || -> Vec<String> {
            let log = shunt.access_log();
            log.iter().filter(|l| l["client"] == from.to_string()).map(|l| l["id"].to_string()).collect()
        };
        wait_until("five lines of five ids", SOON, || {
            let mut ids = ids();
            ids.sort();
            ids.dedup();
            ids.len() == 5
        })
    })
}

#[test]
fn all_ends_at_once_are_one_end() -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(6);
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let routes = Relay::routes_with_tls(&lab, "timeouts = { idle = \"6s\" }")?;
    let shunt = Shunt::start(&lab, &format!("{JSON_LOG}{routes}"))?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        // All of them are there, handshakes too, long before the limit.
        let connections = if Relay::TLS.contains(&relay) { 60 } else { 200 };
        let mut streams: Vec<Stream> = (0..connections).map(|_| relay.open(&lab)).collect::<Result<_>>()?;
        if let Some(last) = streams.last() {
            relay.settle(&shunt, last)?;
        }
        let due = Instant::now() + LIMIT;
        streams.iter_mut().try_for_each(|stream| echo(stream, b"x"))?;
        // Just when the idle limit of the first ones comes: both ends close, by FIN or by RST.
        wait_until("the idle limit", LIMIT + SOON, || Instant::now() >= due)?;
        thread::scope(|scope| {
            scope.spawn(|| servers[relay as usize].end_all(true));
            for (n, stream) in streams.into_iter().enumerate() {
                if n % 2 == 0 {
                    let _ = reset(stream);
                }
            }
        });
        shunt.wait_route(relay.route(), "each has one end", SOON, |r| {
            let ended: u64 = r["terminations"].as_object()?.values().filter_map(Value::as_u64).sum();
            (r["connections_active"] == 0
                && r["connections_total"] == connections as u64
                && ended == connections as u64)
                .then_some(())
        })?;
        println!("{relay:?}: {:?}", shunt.terminations(relay.route())?);
        let mut ids = Vec::new();
        wait_until("a line of each", SOON, || {
            ids = shunt.access_log();
            ids.retain(|line| line["route"] == relay.route());
            ids.len() >= connections
        })?;
        let distinct: std::collections::BTreeSet<String> = ids.iter().map(|line| line["id"].to_string()).collect();
        ensure!(
            ids.len() == connections && distinct.len() == connections,
            "{} lines, {} ids",
            ids.len(),
            distinct.len()
        );
        Ok(())
    })
}

#[test]
fn the_access_log_says_what_the_sender_sent() -> Result<()> {
    let lab = Lab::new()?;
    let exchange = Behaviour::Exchange { seed: 9, bytes: 24_000_001, start: Start::AfterClientFinished };
    let _servers = servers_with_tls(&lab, &exchange)?;
    let shunt = Shunt::start(&lab, &format!("{JSON_LOG}{}", Relay::routes_with_tls(&lab, "")?))?;
    on_each(&Relay::WITH_TLS, |relay| {
        let mut stream = relay.open(&lab)?;
        let client = stream.local_addr()?.to_string();
        let listed = wait_for("it is listed", SOON, || shunt.connection_of(&stream).ok().flatten())?;
        let id = listed["id"].as_str().context("an id")?.to_owned();
        relay.settle(&shunt, &stream)?;
        ensure!(id.len() == 16 && id.starts_with('s') && id[1..].bytes().all(|b| b.is_ascii_hexdigit()), "id {id}");
        pattern::send(&mut stream, 1, 50_000)?;
        stream.shutdown(Shutdown::Write)?;
        ensure!(pattern::receive(&mut stream)?.bytes == 24_000_001);
        drop(stream);
        let line = shunt.wait_access_line(&client, SOON)?;
        println!("{line}");
        // A client that has finished cannot be joined any more.
        let engine = if relay == Relay::Joined { "splice" } else { relay.engine() };
        let told =
            [("id", id.as_str()), ("route", relay.route()), ("engine", engine), ("reason", "finished_client_first")];
        for (key, value) in told {
            ensure!(line[key] == value, "{key} is not {value}: {line}");
        }
        ensure!(
            line["listen"] == relay.listen().to_string()
                && line["backend"] == format!("10.88.2.2:{}", relay.backend_port()),
            "{line}"
        );
        ensure!(line["bytes_in"] == 50_000 && line["bytes_out"] == 24_000_001, "{line}");
        let seconds = line["duration"].as_f64().context("duration")?;
        ensure!(seconds > 0.0 && seconds < 30.0, "{seconds}");
        Ok(())
    })
}

#[test]
fn a_killed_connection_ends_for_both_sides_and_is_counted_once() -> Result<()> {
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::WITH_TLS, |relay| {
        let mut doomed = relay.begin(&lab, &shunt)?;
        let mut other = relay.begin(&lab, &shunt)?;
        let client = doomed.local_addr()?.to_string();
        let id = shunt.connection_of(&doomed)?.context("it is listed")?["id"].as_str().context("id")?.to_owned();
        let explained = shunt.cli_json(&["explain", &id])?;
        ensure!(explained["connection"]["client"] == client && explained["engine"] == relay.engine(), "{explained}");
        ensure!(shunt.cli_json(&["explain", &client])?["route"] == relay.route());
        ensure!(shunt.cli(&["kill", &id])?.status.success());
        let end = read_to_end(&mut doomed, AT_ONCE)?.1;
        println!("{relay:?}: the client of the killed connection saw {end:?}");
        servers[relay as usize].wait_records(1, AT_ONCE)?;
        echo(&mut other, b"still here")?;
        shunt.wait_route(relay.route(), "one killed, one alive", SOON, |r| {
            (r["terminations"]["killed"] == 1 && r["connections_active"] == 1).then_some(())
        })?;
        let again = shunt.cli(&["kill", &id])?;
        ensure!(again.status.code() == Some(1), "killed twice: {}", again.status);
        Ok(())
    })
}
