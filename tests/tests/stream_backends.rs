//! Which backend a relayed connection gets, and that a dead one is not noticed while another lives.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    dialog::{End, read_some, turned_away},
    link,
    relay::{Relay, on_each},
    scripted::{Behaviour, TcpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);
const BACKENDS: [Ipv4Addr; 3] = [Ipv4Addr::new(10, 88, 2, 2), Ipv4Addr::new(10, 88, 2, 3), Ipv4Addr::new(10, 88, 2, 4)];

/// Servers on backend `number` that say `b<number>`, one for each way.
fn tagged(lab: &Lab, number: usize) -> Result<Vec<TcpServer>> {
    let behaviour = Behaviour::Tagged(format!("b{number}"));
    Relay::ALL.iter().map(|r| TcpServer::start(lab.backend(number), r.backend_port(), behaviour.clone())).collect()
}

fn who(lab: &Lab, relay: Relay) -> Result<(TcpStream, String)> {
    let mut stream = lab.client().connect(relay.listen())?;
    let name = String::from_utf8(read_some(&mut stream, 3)?)?;
    ensure!(name.len() == 3, "no answer: {name:?}");
    Ok((stream, name.trim_end().to_owned()))
}

/// How many of `count` connections, all held open, each backend got.
fn spread(lab: &Lab, relay: Relay, count: usize) -> Result<(Vec<TcpStream>, BTreeMap<String, usize>)> {
    let mut spread = BTreeMap::new();
    let mut held = Vec::new();
    for _ in 0..count {
        let (stream, name) = who(lab, relay)?;
        *spread.entry(name).or_default() += 1;
        held.push(stream);
    }
    Ok((held, spread))
}

#[test]
fn least_connections_fills_up_the_emptiest() -> Result<()> {
    let lab = Lab::builder().backends(3).build()?;
    let _servers: Vec<_> = (1..=3).map(|n| tagged(&lab, n)).collect::<Result<_>>()?;
    let shunt = Shunt::start(&lab, &Relay::routes_to(&BACKENDS, "balance = \"least-connections\""))?;
    on_each(&Relay::ENGINES, |relay| {
        let (held, first) = spread(&lab, relay, 30)?;
        ensure!(first.values().all(|n| *n == 10), "thirty over three: {first:?}");
        // One of them loses all it has.
        let mut stay = Vec::new();
        for stream in held {
            let backend = shunt.connection_of(&stream)?.context("listed")?["backend"].to_string();
            if backend.contains("10.88.2.3") {
                drop(stream);
            } else {
                stay.push(stream);
            }
        }
        shunt.wait_route(relay.route(), "ten have gone", SOON, |r| (r["connections_active"] == 20).then_some(()))?;
        let active = |name: &str| {
            let labels = [("route", relay.route()), ("backend", name)];
            shunt.metrics().map(|m| m.value("shunt_backend_connections_active", &labels))
        };
        let emptied = format!("10.88.2.3:{}", relay.backend_port());
        ensure!(active(&emptied)? == 0.0, "{emptied} has {}", active(&emptied)?);
        let (_more, second) = spread(&lab, relay, 10)?;
        ensure!(second == BTreeMap::from([("b2".to_owned(), 10)]), "the next ten went to {second:?}");
        ensure!(active(&emptied)? == 10.0);
        Ok(())
    })
}

#[test]
fn weights_and_sources_are_respected() -> Result<()> {
    let lab = Lab::builder().backends(3).client_addresses(8).build()?;
    let _servers: Vec<_> = (1..=3).map(|n| tagged(&lab, n)).collect::<Result<_>>()?;
    let weighted = |relay: Relay, balance: &str, port: u16| {
        let to = relay.backend_port();
        format!(
            "[[route]]\nname = \"{balance}-{}\"\nlisten = [\"10.88.1.1:{port}\"]\nengine = \"{}\"\nbalance = \"{balance}\"\n\
             backends = [{{ address = \"10.88.2.2:{to}\", weight = 3 }}, \"10.88.2.3:{to}\"]\n",
            relay.route(),
            relay.engine(),
        )
    };
    let kinds = ["round-robin", "random", "least-connections", "source-hash", "maglev"];
    let port = |relay: Relay, kind: usize| 7000 + 10 * kind as u16 + relay as u16;
    let config: String = Relay::ENGINES
        .iter()
        .flat_map(|&relay| kinds.iter().enumerate().map(move |(n, kind)| weighted(relay, kind, port(relay, n))))
        .collect();
    let _shunt = Shunt::start(&lab, &config)?;
    on_each(&Relay::ENGINES, |relay| {
        let ask = |kind: usize, from: Ipv4Addr| -> Result<(TcpStream, String)> {
            let mut stream = lab.client().connect_from((from, 0), ([10, 88, 1, 1], port(relay, kind)))?;
            let name = String::from_utf8(read_some(&mut stream, 3)?)?;
            Ok((stream, name))
        };
        for (n, kind) in kinds.iter().enumerate().take(3) {
            let mut held = Vec::new();
            let mut first = 0;
            for _ in 0..80 {
                let (stream, name) = ask(n, BACKENDS_CLIENT)?;
                first += usize::from(name == "b1\n");
                held.push(stream);
            }
            let exact = *kind != "random";
            let right = if exact { (59..=61).contains(&first) } else { (44..=74).contains(&first) };
            ensure!(right, "{kind}: {first} of 80 went to the backend of weight 3");
        }
        for (n, kind) in kinds.iter().enumerate().skip(3) {
            let mut all = BTreeMap::<String, usize>::new();
            for from in lab.client_addresses() {
                let name = ask(n, from)?.1;
                *all.entry(name.clone()).or_default() += 1;
                for _ in 0..4 {
                    ensure!(ask(n, from)?.1 == name, "{kind}: {from} goes to another backend");
                }
            }
            println!("{relay:?} {kind}: {all:?}");
        }
        Ok(())
    })
}

const BACKENDS_CLIENT: Ipv4Addr = Ipv4Addr::new(10, 88, 1, 2);

#[test]
fn a_client_does_not_notice_that_one_backend_refuses() -> Result<()> {
    let lab = Lab::builder().backends(3).build()?;
    let _one = tagged(&lab, 1)?;
    let shunt = Shunt::start(&lab, &Relay::routes_to(&BACKENDS, ""))?;
    on_each(&Relay::ENGINES, |relay| {
        for n in 0..30 {
            let (_, name) = who(&lab, relay).with_context(|| format!("connection {n}"))?;
            ensure!(name == "b1", "connection {n} came to {name}");
        }
        shunt.wait_route(relay.route(), "the dead ones are left out", SOON, |r| {
            (r["backends"][1]["up"] == false && r["backends"][2]["up"] == false).then_some(())
        })?;
        shunt.wait_ended(relay.route(), &[("finished_client_first", 30)], SOON)
    })?;
    let _two = tagged(&lab, 2)?;
    on_each(&Relay::ENGINES, |relay| {
        wait_until("one that has come back is tried again", Duration::from_secs(20), || {
            who(&lab, relay).is_ok_and(|(_, name)| name == "b2")
        })
    })
}

#[test]
fn a_backend_that_swallows_syns_is_given_up_in_time_for_another() -> Result<()> {
    let lab = Lab::new()?;
    let _one = tagged(&lab, 1)?;
    link::lose(lab.backend(2), 100)?;
    let shunt = Shunt::start(&lab, &Relay::routes_to(&BACKENDS[..2], "timeouts = { connect = \"4s\" }"))?;
    on_each(&Relay::ENGINES, |relay| {
        let began = Instant::now();
        for n in 0..2 {
            let (_, name) = who(&lab, relay).with_context(|| format!("connection {n}"))?;
            ensure!(name == "b1", "connection {n} came to {name}");
        }
        println!("{relay:?}: both served after {:?}", began.elapsed());
        ensure!(began.elapsed() < Duration::from_secs(5), "only after {:?}", began.elapsed());
        shunt.wait_ended(relay.route(), &[("finished_client_first", 2)], SOON)
    })
}

#[test]
fn without_a_backend_that_is_up_the_client_is_told_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let _one = tagged(&lab, 1)?;
    let health = "health = { check = \"tcp\", interval = \"200ms\", timeout = \"200ms\", rise = 1, fall = 1 }";
    let shunt = Shunt::start(&lab, &Relay::routes_to(&BACKENDS[..1], health))?;
    on_each(&Relay::ENGINES, |relay| {
        let (held, _) = who(&lab, relay)?;
        let backend = format!("10.88.2.2:{}", relay.backend_port());
        ensure!(shunt.cli(&["backend", relay.route(), &backend, "down"])?.status.success());
        let end = turned_away(lab.client(), lab.client().ip.into(), relay.listen(), AT_ONCE)?;
        ensure!(end == End::Reset, "{end:?}");
        shunt.wait_route(relay.route(), "counted", SOON, |r| {
            (r["terminations"]["no_backend"] == 1 && r["connections_active"].as_u64()? <= 1).then_some(())
        })?;
        drop(held);
        ensure!(shunt.cli(&["backend", relay.route(), &backend, "ready"])?.status.success());
        wait_until("served again", SOON, || who(&lab, relay).is_ok())
    })
}

#[test]
fn drain_lets_connections_go_on_and_sends_new_ones_elsewhere() -> Result<()> {
    let lab = Lab::new()?;
    let _servers: Vec<_> = (1..=2).map(|n| tagged(&lab, n)).collect::<Result<_>>()?;
    let shunt = Shunt::start(&lab, &Relay::routes_to(&BACKENDS[..2], ""))?;
    on_each(&Relay::ENGINES, |relay| {
        let (mut held, spread) = spread(&lab, relay, 4)?;
        ensure!(spread.len() == 2, "{spread:?}");
        let backend = format!("10.88.2.3:{}", relay.backend_port());
        ensure!(shunt.cli(&["backend", relay.route(), &backend, "drain"])?.status.success());
        for _ in 0..10 {
            ensure!(who(&lab, relay)?.1 == "b1");
        }
        held.iter_mut().try_for_each(|stream| shunt_lab::dialog::echo(stream, b"still here"))
    })
}

#[test]
fn a_backend_that_fails_its_checks_gets_nothing_new() -> Result<()> {
    let lab = Lab::new()?;
    let _one = tagged(&lab, 1)?;
    let mut two = tagged(&lab, 2)?;
    let health = "health = { check = \"tcp\", interval = \"200ms\", timeout = \"200ms\", rise = 2, fall = 2 }";
    let shunt = Shunt::start(&lab, &Relay::routes_to(&BACKENDS[..2], health))?;
    on_each(&Relay::ENGINES, |relay| {
        let (_, spread) = spread(&lab, relay, 4)?;
        ensure!(spread.len() == 2, "{spread:?}");
        Ok(())
    })?;
    two.clear();
    on_each(&Relay::ENGINES, |relay| {
        shunt.wait_route(relay.route(), "down", SOON, |r| (r["backends"][1]["up"] == false).then_some(()))?;
        for _ in 0..10 {
            ensure!(who(&lab, relay)?.1 == "b1");
        }
        Ok(())
    })
}

#[test]
fn a_backend_without_a_port_is_dialled_at_the_clients() -> Result<()> {
    let lab = Lab::new()?;
    let _servers: Vec<TcpServer> = [7003, 7104]
        .into_iter()
        .map(|port| TcpServer::start(lab.backend(1), port, Behaviour::Tagged(port.to_string())))
        .collect::<Result<_>>()?;
    let route = |(name, range, engine): (&str, &str, &str)| {
        format!(
            "[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:{range}\"]\nengine = \"{engine}\"\nbackends = [\"10.88.2.2\"]\n"
        )
    };
    let config = [("a", "7000-7099", "copy"), ("b", "7100-7199", "splice")].map(route).concat();
    let shunt = Shunt::start(&lab, &config)?;
    for port in [7003, 7104] {
        let mut stream = lab.client().connect(([10, 88, 1, 1], port))?;
        ensure!(read_some(&mut stream, 5)? == format!("{port}\n").as_bytes());
        let listed = shunt.connection_of(&stream)?.context("listed")?;
        ensure!(listed["backend"] == format!("10.88.2.2:{port}"), "{listed}");
    }
    let away = turned_away(lab.client(), lab.client().ip.into(), ([10, 88, 1, 1], 7099).into(), AT_ONCE)?;
    ensure!(away == End::Reset);
    shunt.wait_ended("a", &[("finished_client_first", 1), ("connect_refused", 1)], SOON)
}

/// A host that is gone is found out by the kernel after three seconds (`mcast_solicit`), while the next one is asked already.
#[test]
fn hosts_that_are_gone_do_not_hide_one_that_lives() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _one = tagged(&lab, 1)?;
    let gone = [Ipv4Addr::new(10, 88, 2, 50), Ipv4Addr::new(10, 88, 2, 51)];
    for ip in gone {
        lab.gateway().sh(&format!("ip route add {ip}/32 dev backend1 src 10.88.2.1"))?;
    }
    let shunt =
        Shunt::start(&lab, &Relay::routes_to(&[gone[0], gone[1], BACKENDS[0]], "timeouts = { connect = \"12s\" }"))?;
    on_each(&Relay::ENGINES, |relay| {
        // One that begins with each.
        let mut streams: Vec<TcpStream> =
            (0..12).map(|_| Ok(lab.client().connect(relay.listen())?)).collect::<Result<_>>()?;
        let began = Instant::now();
        for (n, stream) in streams.iter_mut().enumerate() {
            let name = read_some(stream, 3).with_context(|| format!("connection {n} after {:?}", began.elapsed()))?;
            ensure!(name == b"b1\n", "connection {n} after {:?}: {name:?}", began.elapsed());
        }
        println!("{relay:?}: all served after {:?}", began.elapsed());
        drop(streams);
        shunt.wait_ended(relay.route(), &[("finished_client_first", 12)], SOON)
    })?;
    // And where nobody lives, that is told.
    let none = gone.map(|ip| format!("\"{ip}:80\"")).join(", ");
    let route = |r: &Relay| {
        format!(
            "[[route]]\nname = \"none-{e}\"\nlisten = [\"10.88.1.1:{}\"]\nengine = \"{e}\"\nbackends = [{none}]\ntimeouts = {{ connect = \"12s\" }}\n",
            70 + *r as u16,
            e = r.engine()
        )
    };
    shunt.reload(&Relay::ENGINES.iter().map(route).collect::<String>())?;
    on_each(&Relay::ENGINES, |relay| {
        let mut stream = lab.client().connect(([10, 88, 1, 1], 70 + relay as u16))?;
        let end = shunt_lab::dialog::end_of(&mut stream, Duration::from_secs(14))?;
        ensure!(end == End::Reset, "{end:?}");
        shunt.wait_ended(&format!("none-{}", relay.engine()), &[("connect_unreachable", 1)], SOON)
    })
}
