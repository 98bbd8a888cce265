//! shunt behind shunt: the outer one follows the inner one, whatever that does (A3, A8, A13).

use std::{
    io::Write,
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shunt_lab::{
    Lab, Shunt,
    dialog::{echo, read_to_end, turned_away},
    kernel,
    relay::{Relay, on_each, on_every_relay},
    scripted::{Behaviour, TcpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Listens on backend 1, where the outer daemon's routes lead, and goes on to backend 2.
fn inner_routes(rest: &str) -> String {
    let route = |relay: &Relay| {
        let port = relay.backend_port();
        format!(
            "[[route]]\nname = \"{}\"\nlisten = [\"10.88.2.2:{port}\"]\nengine = \"{}\"\nbackends = [\"10.88.2.3:{port}\"]\n{rest}\n",
            relay.route(),
            relay.engine()
        )
    };
    Relay::ALL.iter().map(route).collect()
}

fn inner(lab: &Lab, rest: &str) -> Result<Shunt> {
    Shunt::builder().name("inner").on(lab.backend(1)).start(lab, &inner_routes(rest))
}

fn last_servers(lab: &Lab, behaviour: &Behaviour) -> Result<Vec<TcpServer>> {
    Relay::ALL.iter().map(|r| TcpServer::start(lab.backend(2), r.backend_port(), behaviour.clone())).collect()
}

fn active(shunt: &Shunt, relay: Relay) -> Option<u64> {
    shunt.route(relay.route()).ok()?["connections_active"].as_u64()
}

#[test]
fn the_outer_count_follows_the_inner_and_both_go_back_to_zero() -> Result<()> {
    const CLIENTS: usize = 60;
    let lab = Lab::new()?;
    let servers = last_servers(&lab, &Behaviour::Hold)?;
    let inner = inner(&lab, "")?;
    let outer = Shunt::start(&lab, &Relay::routes(""))?;
    on_each(&Relay::ENGINES, |relay| {
        let server = &servers[relay as usize];
        let both = |n: usize, what: &str| {
            wait_until(&format!("{n} in both: {what}"), AT_ONCE, || {
                active(&outer, relay) == Some(n as u64) && active(&inner, relay) == Some(n as u64)
            })
            .with_context(|| format!("outer {:?}, inner {:?}", active(&outer, relay), active(&inner, relay)))
        };
        let mut clients: Vec<TcpStream> =
            (0..CLIENTS).map(|_| Ok(lab.client().connect(relay.listen())?)).collect::<Result<_>>()?;
        clients.iter_mut().try_for_each(|stream| stream.write_all(b"take your time"))?;
        wait_until("all have come through", SOON, || server.open() == CLIENTS)?;
        both(CLIENTS, "all are there")?;
        for stream in clients.drain(..CLIENTS / 2) {
            shunt_lab::dialog::reset(stream)?;
        }
        both(CLIENTS / 2, "half of them have gone")?;
        server.end_all(true);
        for stream in &mut clients {
            read_to_end(stream, AT_ONCE)?;
        }
        both(0, "the backend has ended the rest")?;
        let half = CLIENTS as u64 / 2;
        outer.wait_ended(relay.route(), &[("reset_by_client", half), ("reset_by_backend", half)], SOON)?;
        inner.wait_ended(relay.route(), &[("reset_by_client", half), ("reset_by_backend", half)], SOON)
    })
}

#[test]
fn what_is_half_closed_is_half_closed_all_along_the_chain() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = last_servers(&lab, &Behaviour::Echo)?;
    let inner = inner(&lab, "")?;
    let outer = Shunt::start(&lab, &Relay::routes(""))?;
    on_every_relay(|relay| {
        let mut stream = relay.connect(&lab, &outer)?;
        let sent = vec![7; 1 << 20];
        let mut writer = stream.try_clone()?;
        let all = sent.clone();
        let sender = std::thread::spawn(move || -> Result<()> {
            writer.write_all(&all)?;
            Ok(writer.shutdown(Shutdown::Write)?)
        });
        let (back, end) = read_to_end(&mut stream, SOON)?;
        sender.join().expect("sender")?;
        ensure!(back == sent && end == shunt_lab::dialog::End::Finished, "{} bytes, {end:?}", back.len());
        outer.wait_ended(relay.route(), &[("finished_client_first", 1)], SOON)?;
        inner.wait_ended(relay.route(), &[("finished_client_first", 1)], SOON)?;
        let (outer, inner) = (outer.route(relay.route())?, inner.route(relay.route())?);
        for way in ["bytes_in", "bytes_out"] {
            ensure!(outer[way] == inner[way], "{way}: {} outside, {} inside", outer[way], inner[way]);
        }
        Ok(())
    })
}

#[test]
fn a_restart_in_the_middle_ends_what_was_there_and_the_next_are_served() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = last_servers(&lab, &Behaviour::Echo)?;
    let mut inner = inner(&lab, "timeouts = { drain = \"500ms\" }")?;
    let outer = Shunt::start(&lab, &Relay::routes(""))?;
    let mut held: Vec<TcpStream> =
        Relay::ENGINES.iter().map(|relay| relay.connect(&lab, &outer)).collect::<Result<_>>()?;
    wait_until("it is handed over inside too", SOON, || {
        let inside = inner.connections(Relay::Handoff.route());
        inside.is_ok_and(|inside| inside.len() == 1 && inside[0]["engine"] == "handoff")
    })?;
    ensure!(inner.terminate(SOON)?.success());
    for (stream, relay) in held.iter_mut().zip(Relay::ENGINES) {
        if relay.outlives_the_daemon() {
            echo(stream, b"nobody is in the middle")?;
        } else {
            read_to_end(stream, AT_ONCE).context("a connection of the stopped daemon")?;
        }
    }
    inner.restart()?;
    on_each(&Relay::ENGINES, |relay| {
        let left = u64::from(relay.outlives_the_daemon());
        outer.wait_route(relay.route(), "the old one has ended", SOON, |r| {
            (r["connections_active"] == left && r["terminations"]["internal_error"].is_null()).then_some(())
        })?;
        // Nobody was refused meanwhile, so the backend is not left out.
        echo(&mut lab.client().connect(relay.listen())?, b"after the restart")
    })
}

#[test]
fn a_middle_that_is_away_for_a_moment_is_used_again_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = last_servers(&lab, &Behaviour::Echo)?;
    let mut inner = inner(&lab, "timeouts = { drain = \"100ms\" }")?;
    let _outer = Shunt::start(&lab, &Relay::routes(""))?;
    ensure!(inner.terminate(SOON)?.success());
    on_each(&Relay::ENGINES, |relay| {
        for _ in 0..5 {
            turned_away(lab.client(), lab.client().ip.into(), relay.listen(), AT_ONCE)
                .context("refused at once, however often")?;
        }
        Ok(())
    })?;
    inner.restart()?;
    on_each(&Relay::ENGINES, |relay| {
        let served = || lab.client().connect(relay.listen()).is_ok_and(|mut s| echo(&mut s, b"back").is_ok());
        // A backend whose dials failed is left out for a while, the only one too.
        wait_until("served again", Duration::from_secs(20), served)
    })
}

#[test]
fn members_that_disagree_about_the_proxy_header_end_cleanly_with_a_reason() -> Result<()> {
    let lab = Lab::new()?;
    let servers = last_servers(&lab, &Behaviour::Echo)?;
    // The inner one demands headers, the outer one sends none.
    let demanding = "proxy_protocol = { accept_from = [\"10.88.2.1/32\"] }\ntimeouts = { initial_data = \"1s\" }";
    let mut inner_daemon = inner(&lab, demanding)?;
    let mut outer = Shunt::start(&lab, &Relay::routes(""))?;
    on_each(&Relay::ENGINES, |relay| {
        for n in 0..20 {
            let mut stream = lab.client().connect(relay.listen())?;
            if n % 2 == 0 {
                stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            }
            read_to_end(&mut stream, Duration::from_secs(4)).with_context(|| format!("client {n}"))?;
        }
        inner_daemon.wait_route(relay.route(), "nothing is left inside", SOON, |r| {
            (r["connections_active"] == 0 && r["terminations"]["proxy_header_invalid"] == 10).then_some(())
        })?;
        outer.wait_route(relay.route(), "nothing is left outside", SOON, |r| {
            let ended: u64 = r["terminations"].as_object()?.values().filter_map(Value::as_u64).sum();
            (r["connections_active"] == 0 && ended == 20 && r["terminations"]["internal_error"].is_null()).then_some(())
        })?;
        ensure!(servers[relay as usize].accepted() == 0, "nothing came through");
        Ok(())
    })?;
    // The outer one sends headers that the inner one does not know.
    ensure!(inner_daemon.terminate(SOON)?.success() && outer.terminate(SOON)?.success());
    inner_daemon.write_config(&inner_routes(""))?;
    outer.write_config(&Relay::routes("proxy_protocol = { send = \"v1\" }"))?;
    inner_daemon.restart()?;
    outer.restart()?;
    on_each(&Relay::ENGINES, |relay| {
        let mut stream = lab.client().connect(relay.listen())?;
        stream.write_all(b"hello")?;
        stream.shutdown(Shutdown::Write)?;
        let (all, _) = read_to_end(&mut stream, SOON)?;
        let said = shunt_lab::proxy_header::read(&all)?;
        ensure!(
            said.source == stream.local_addr()? && all[said.length..] == *b"hello",
            "the last server echoes it all"
        );
        drop(stream);
        for daemon in [&inner_daemon, &outer] {
            daemon.wait_route(relay.route(), "closed", SOON, |r| (r["connections_active"] == 0).then_some(()))?;
        }
        Ok(())
    })
}

#[test]
fn the_shorter_timeout_of_a_chain_ends_it_everywhere() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = last_servers(&lab, &Behaviour::Echo)?;
    for (short, long) in [("inner", "outer"), ("outer", "inner")] {
        let rest = |who: &str| format!("timeouts = {{ idle = {:?} }}", if who == short { "1s" } else { "1m" });
        let mut inner = inner(&lab, &rest("inner"))?;
        let mut outer = Shunt::start(&lab, &Relay::routes(&rest("outer")))?;
        on_each(&Relay::ENGINES, |relay| {
            let mut streams: Vec<TcpStream> =
                (0..20).map(|_| Ok(lab.client().connect(relay.listen())?)).collect::<Result<_>>()?;
            streams.iter_mut().try_for_each(|stream| echo(stream, b"hello"))?;
            relay.prime(&outer, &mut streams[19])?;
            for stream in &mut streams {
                read_to_end(stream, Duration::from_secs(4))?;
            }
            drop(streams);
            for (daemon, name) in [(&inner, "inner"), (&outer, "outer")] {
                daemon.wait_route(relay.route(), &format!("the {name} one has ended all"), SOON, |r| {
                    let ended: u64 = r["terminations"].as_object()?.values().filter_map(Value::as_u64).sum();
                    let timed_out = r["terminations"]["idle_timeout"].as_u64().unwrap_or(0);
                    let right = if name == short { timed_out == 20 } else { timed_out == 0 };
                    (r["connections_active"] == 0 && ended == 20 && right).then_some(())
                })?;
            }
            Ok(())
        })
        .with_context(|| format!("{short} is shorter than {long}"))?;
        for (daemon, host) in [(&mut inner, lab.backend(1)), (&mut outer, lab.gateway())] {
            ensure!(daemon.terminate(SOON)?.success());
            wait_until("no socket is left", SOON, || {
                kernel::tcp_sockets(host, &["established", "close-wait", "fin-wait-2", "syn-sent"])
                    .is_ok_and(|n| n == 0)
            })?;
        }
    }
    Ok(())
}

#[test]
fn headers_pass_through_a_chain_that_agrees() -> Result<()> {
    let lab = Lab::builder().client_addresses(2).build()?;
    let _servers = last_servers(&lab, &Behaviour::Echo)?;
    let inner = inner(&lab, "proxy_protocol = { accept_from = [\"10.88.2.1/32\"] }")?;
    let outer = Shunt::start(&lab, &Relay::routes("proxy_protocol = { send = \"v2\" }"))?;
    on_every_relay(|relay| {
        let mut stream = lab.client().connect_from(SocketAddr::from(([10, 88, 1, 3], 0)), relay.listen())?;
        echo(&mut stream, b"hello")?;
        relay.prime(&outer, &mut stream)?;
        ensure!(inner.connection_of(&stream)?.is_some(), "inside: {:?}", inner.connections(relay.route())?);
        drop(stream);
        for daemon in [&inner, &outer] {
            daemon.wait_ended(relay.route(), &[("finished_client_first", 1)], SOON)?;
        }
        let (outer, inner) = (outer.route(relay.route())?, inner.route(relay.route())?);
        ensure!(outer["bytes_in"] == inner["bytes_in"], "headers are no payload: {outer} {inner}");
        Ok(())
    })
}
