//! A relayed connection whose backend is not there, or not yet, or whose client does not wait (A2, A4, A6, A7).

use std::{
    io::Write,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    dialog::{End, echo, end_of, read_some, reset, turned_away},
    kernel, link, pattern,
    relay::{Relay, on_each, servers},
    scripted::{Behaviour, Start, TcpServer},
    wait_for, wait_until,
};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 88, 1, 1);
const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);

#[test]
fn a_closed_port_is_told_at_once_and_counted_once() -> Result<()> {
    let lab = Lab::new()?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    on_each(&Relay::ENGINES, |relay| {
        let end = turned_away(lab.client(), lab.client().ip.into(), relay.listen(), AT_ONCE)?;
        ensure!(end == End::Reset, "the client saw {end:?}");
        shunt.wait_ended(relay.route(), &[("connect_refused", 1)], SOON)?;
        // The daemon lives.
        let _server = TcpServer::start(lab.backend(1), relay.backend_port(), Behaviour::Echo)?;
        wait_until("the next one is served", Duration::from_secs(20), || {
            lab.client().connect(relay.listen()).is_ok_and(|mut stream| echo(&mut stream, b"now").is_ok())
        })
    })
}

#[test]
fn a_backend_that_cannot_be_reached_is_told_at_once() -> Result<()> {
    let lab = Lab::new()?;
    // No route at all, a route that says no, and a host in between that says no.
    lab.gateway().sh("ip route add unreachable 203.0.113.0/24")?;
    let rule = "add table ip t; add chain ip t i { type filter hook input priority 0; }; \
                add rule ip t i tcp dport 9999 reject with icmp type host-unreachable";
    lab.backend(1).sh(&format!("nft '{rule}'"))?;
    let routes: String = [("none", "192.0.2.1:80", 70), ("refusing", "203.0.113.1:80", 80), ("icmp", "10.88.2.2:9999", 90)]
        .iter()
        .flat_map(|(name, backend, port)| {
            Relay::ENGINES.map(|relay| {
                format!(
                    "[[route]]\nname = \"{name}-{}\"\nlisten = [\"10.88.1.1:{}\"]\nengine = \"{}\"\nbackends = [\"{backend}\"]\n",
                    relay.route(),
                    port + relay as u16,
                    relay.engine()
                )
            })
        })
        .collect();
    let shunt = Shunt::start(&lab, &routes)?;
    on_each(&Relay::ENGINES, |relay| {
        for (name, port) in [("none", 70), ("refusing", 80), ("icmp", 90)] {
            let to = SocketAddr::from(([10, 88, 1, 1], port + relay as u16));
            let end = turned_away(lab.client(), lab.client().ip.into(), to, AT_ONCE).with_context(|| name)?;
            ensure!(end == End::Reset, "{name}: the client saw {end:?}");
            shunt.wait_ended(&format!("{name}-{}", relay.route()), &[("connect_unreachable", 1)], SOON)?;
        }
        Ok(())
    })
}

#[test]
fn a_backend_that_swallows_syns_ends_at_the_connect_timeout() -> Result<()> {
    const CLIENTS: u64 = 20;
    let lab = Lab::new()?;
    link::lose(lab.backend(1), 100)?;
    let shunt = Shunt::start(&lab, &Relay::routes("timeouts = { connect = \"1s\" }"))?;
    on_each(&Relay::ENGINES, |relay| {
        let began = Instant::now();
        let mut streams: Vec<TcpStream> =
            (0..CLIENTS).map(|_| Ok(lab.client().connect(relay.listen())?)).collect::<Result<_>>()?;
        // Bytes sent meanwhile are nobody's.
        streams.iter_mut().try_for_each(|stream| stream.write_all(b"hello?"))?;
        let listed = wait_for("they are seen dialing", AT_ONCE, || {
            let list = shunt.connections(relay.route()).ok()?;
            list.iter().all(|c| c["state"] == "dialing").then_some(list.len() as u64).filter(|n| *n > 0)
        })?;
        ensure!(listed <= CLIENTS, "{listed} records of {CLIENTS} clients");
        for stream in &mut streams {
            ensure!(end_of(stream, SOON)? == End::Reset);
        }
        let took = began.elapsed();
        ensure!(took >= Duration::from_millis(950) && took < Duration::from_secs(4), "ended after {took:?}");
        shunt.wait_ended(relay.route(), &[("connect_timeout", CLIENTS)], SOON)
    })?;
    wait_until("no dial is left", SOON, || kernel::tcp_sockets(lab.gateway(), &["syn-sent"]).is_ok_and(|n| n == 0))
}

#[test]
fn a_backend_that_speaks_first_need_not_wait_for_the_client() -> Result<()> {
    // After this the kernel sends a delayed acknowledgement by itself (`TCP_DELACK_MAX`).
    const DELAYED: Duration = Duration::from_millis(200);
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Tagged("220 ready".into()))?;
    let _shunt = Shunt::start(&lab, &Relay::routes(""))?;
    on_each(&Relay::ENGINES, |relay| {
        // The machine may be busy: once is enough.
        wait_until("it is greeted sooner than that", SOON, || {
            let began = Instant::now();
            let greeted = lab.client().connect(relay.listen()).is_ok_and(|mut s| read_some(&mut s, 9).is_ok());
            greeted && began.elapsed() < DELAYED
        })
    })
}

#[test]
fn a_slow_backend_may_still_answer_while_another_is_asked_beside_it() -> Result<()> {
    const DEAF: &str =
        "add table ip t; add chain ip t i { type filter hook input priority 0; }; add rule ip t i tcp flags syn drop";
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    lab.backend(1).sh(&format!("nft '{DEAF}'"))?;
    link::lose(lab.backend(2), 100)?;
    // By its weight the first is asked first.
    let route = "[[route]]\nname = \"slow\"\nlisten = [\"10.88.1.1:80\"]\nengine = \"copy\"\n\
                 backends = [{ address = \"10.88.2.2:80\", weight = 9 }, \"10.88.2.3:80\"]\n\
                 timeouts = { connect = \"20s\" }\n";
    let shunt = Shunt::start(&lab, route)?;
    let mut stream = lab.client().connect((GATEWAY, 80))?;
    let asked = |count| kernel::tcp_sockets(lab.gateway(), &["syn-sent"]).is_ok_and(|n| n == count);
    wait_until("the other one is asked too", SOON, || asked(2))?;
    // The next SYN to the first arrives.
    lab.backend(1).sh("nft delete table ip t")?;
    echo(&mut stream, b"here after all")?;
    wait_until("the other one is not asked any more", SOON, || asked(0))?;
    drop(stream);
    shunt.wait_ended("slow", &[("finished_client_first", 1)], SOON)
}

#[test]
fn a_client_that_leaves_while_its_backend_is_dialled_takes_the_dial_with_it() -> Result<()> {
    let lab = Lab::new()?;
    link::lose(lab.backend(1), 100)?;
    let shunt = Shunt::start(&lab, &Relay::routes("timeouts = { connect = \"20s\" }"))?;
    on_each(&Relay::ENGINES, |relay| {
        let mut streams: Vec<TcpStream> =
            (0..10).map(|_| Ok(lab.client().connect(relay.listen())?)).collect::<Result<_>>()?;
        streams[0].write_all(b"with bytes that nobody read")?;
        shunt
            .wait_route(relay.route(), "ten being dialled", SOON, |r| (r["connections_active"] == 10).then_some(()))?;
        streams.into_iter().try_for_each(reset)?;
        shunt.wait_ended(relay.route(), &[("reset_by_client", 10)], AT_ONCE)
    })?;
    wait_until("no dial is left", SOON, || kernel::tcp_sockets(lab.gateway(), &["syn-sent"]).is_ok_and(|n| n == 0))
}

#[test]
fn a_client_that_finished_while_its_backend_was_dialled_gets_its_answer() -> Result<()> {
    let lab = Lab::new()?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    // The first SYNs are lost; they are sent again after a second.
    let rule =
        "add table ip t; add chain ip t i { type filter hook input priority 0; }; add rule ip t i tcp flags syn drop";
    lab.backend(1).sh(&format!("nft '{rule}'"))?;
    let exchange = Behaviour::Exchange { seed: 3, bytes: 100_000, start: Start::AfterClientFinished };
    let _servers = servers(&lab, &exchange)?;
    on_each(&Relay::ENGINES, |relay| {
        let mut stream = lab.client().connect(relay.listen())?;
        pattern::send(&mut stream, 1, 100_000)?;
        stream.shutdown(Shutdown::Write)?;
        shunt.wait_route(relay.route(), "it is dialled", SOON, |r| (r["connections_active"] == 1).then_some(()))?;
        if relay == Relay::Copy {
            lab.backend(1).sh("nft delete table ip t")?;
        }
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        ensure!(pattern::receive(&mut stream)? == pattern::send(&mut std::io::sink(), 3, 100_000)?);
        shunt.wait_ended(relay.route(), &[("finished_client_first", 1)], SOON)
    })
}
