//! Who may use a relayed route, how often and how many at once: the same as in the kernel (A15).

use std::{
    io::{ErrorKind, Read},
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    dialog::{End, echo, read_to_end, turned_away},
    relay::{Relay, on_each, on_every_relay, servers},
    scripted::Behaviour,
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Connects from the client's address 10.88.1.`from`.
/// `None`: reset before connect had returned.
fn connect(lab: &Lab, relay: Relay, from: u8) -> Result<Option<TcpStream>> {
    match lab.client().connect_from((Ipv4Addr::new(10, 88, 1, from), 0), relay.listen()) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn refused(lab: &Lab, relay: Relay, from: u8) -> Result<()> {
    let end = turned_away(lab.client(), Ipv4Addr::new(10, 88, 1, from).into(), relay.listen(), AT_ONCE)?;
    ensure!(end == End::Reset, "refused with {end:?}");
    Ok(())
}

fn served(lab: &Lab, relay: Relay, from: u8) -> Result<TcpStream> {
    let mut stream = connect(lab, relay, from)?.context("it was turned away")?;
    echo(&mut stream, b"hello")?;
    Ok(stream)
}

#[test]
fn deny_wins_over_allow_and_refusals_are_counted() -> Result<()> {
    let lab = Lab::builder().client_addresses(4).build()?;
    let servers = servers(&lab, &Behaviour::Echo)?;
    let rest = "allow = [\"10.88.1.0/30\", \"10.88.1.5\"]\ndeny = [\"10.88.1.3/32\"]";
    let shunt = Shunt::start(&lab, &Relay::routes(rest))?;
    on_each(&Relay::ENGINES, |relay| {
        served(&lab, relay, 2)?;
        refused(&lab, relay, 3)?;
        refused(&lab, relay, 4)?;
        served(&lab, relay, 5)?;
        ensure!(servers[relay as usize].accepted() == 2, "the backend saw the refused ones");
        shunt.wait_ended(relay.route(), &[("denied", 2), ("finished_client_first", 2)], SOON)
    })
}

#[test]
fn at_the_connection_limit_the_next_is_refused_and_the_old_ones_live() -> Result<()> {
    let lab = Lab::builder().client_addresses(3).build()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes("limits = { connections = 4, connections_per_client = 3 }"))?;
    on_every_relay(|relay| {
        let mut held: Vec<TcpStream> = (0..3).map(|_| served(&lab, relay, 2)).collect::<Result<_>>()?;
        relay.prime(&shunt, &mut held[0])?;
        refused(&lab, relay, 2)?;
        held.push(served(&lab, relay, 3)?);
        refused(&lab, relay, 4)?;
        held.iter_mut().try_for_each(|stream| echo(stream, b"still here"))?;
        shunt.wait_route(relay.route(), "each refusal under its reason", SOON, |r| {
            let reasons = &r["terminations"];
            (reasons["limit_per_client"] == 1 && reasons["limit_connections"] == 1 && r["connections_active"] == 4)
                .then_some(())
        })?;
        drop(held.remove(0));
        wait_until("room for one more", SOON, || served(&lab, relay, 4).is_ok())
    })
}

#[test]
fn limits_hold_when_everybody_comes_at_once() -> Result<()> {
    const CLIENTS: usize = 200;
    const LIMIT: usize = 25;
    let lab = Lab::new()?;
    let servers = servers(&lab, &Behaviour::Hold)?;
    let shunt = Shunt::start(&lab, &Relay::routes(&format!("limits = {{ connections = {LIMIT} }}")))?;
    on_each(&Relay::ENGINES, |relay| {
        // From many threads: they are accepted by all workers at the same time.
        let streams: Vec<TcpStream> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        (0..CLIENTS / 8).filter_map(|_| connect(&lab, relay, 2).transpose()).collect::<Result<Vec<_>>>()
                    })
                })
                .collect();
            let all: Result<Vec<Vec<TcpStream>>> = threads.into_iter().map(|t| t.join().expect("client")).collect();
            all.map(|all| all.into_iter().flatten().collect())
        })?;
        shunt.wait_route(relay.route(), "exactly as many as allowed", SOON, |r| {
            let refused = (CLIENTS - LIMIT) as u64;
            (r["connections_active"] == LIMIT && r["terminations"]["limit_connections"] == refused).then_some(())
        })?;
        wait_until("the backend has them", SOON, || servers[relay as usize].open() == LIMIT)?;
        ensure!(servers[relay as usize].accepted() as usize == LIMIT, "no other was ever dialled");
        drop(streams);
        Ok(())
    })
}

#[test]
fn a_client_above_its_rate_is_refused_and_another_is_not() -> Result<()> {
    let lab = Lab::builder().client_addresses(2).build()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes("limits = { rate_per_client = \"5/hour\" }"))?;
    on_each(&Relay::ENGINES, |relay| {
        for _ in 0..5 {
            served(&lab, relay, 2)?;
        }
        refused(&lab, relay, 2)?;
        served(&lab, relay, 3)?;
        shunt.wait_ended(relay.route(), &[("limit_rate", 1), ("finished_client_first", 6)], SOON)
    })
}

#[test]
fn a_rate_fills_up_again_with_time() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes("limits = { rate_per_client = \"2/second\" }"))?;
    on_each(&Relay::ENGINES, |relay| {
        wait_until("above the rate", SOON, || {
            let _ = served(&lab, relay, 2);
            shunt.terminations(relay.route()).is_ok_and(|r| r.contains_key("limit_rate"))
        })?;
        wait_until("and within it again", SOON, || served(&lab, relay, 2).is_ok())
    })
}

#[test]
fn short_connections_one_after_another_are_not_counted_as_many_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Reply(b"ok".to_vec()))?;
    let shunt = Shunt::start(&lab, &Relay::routes("limits = { connections_per_client = 20 }"))?;
    on_each(&Relay::ENGINES, |relay| {
        for n in 0..200 {
            let mut stream = connect(&lab, relay, 2)?.context("it was turned away")?;
            std::io::Write::write_all(&mut stream, b"x")?;
            let (answer, end) = read_to_end(&mut stream, SOON)?;
            ensure!(answer == b"ok" && end == End::Finished, "connection {n}: {answer:?} {end:?}");
        }
        shunt.wait_ended(relay.route(), &[("finished_backend_first", 200)], SOON)
    })
}

#[test]
fn raising_a_limit_takes_effect_and_counts_those_that_are_there() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let config = |n: u32| Relay::routes(&format!("limits = {{ connections = {n} }}"));
    let shunt = Shunt::start(&lab, &config(2))?;
    let mut held = Vec::new();
    for relay in Relay::ENGINES {
        held.extend([served(&lab, relay, 2)?, served(&lab, relay, 2)?]);
        refused(&lab, relay, 2)?;
    }
    shunt.reload(&config(3))?;
    for relay in Relay::ENGINES {
        held.push(served(&lab, relay, 2)?);
        refused(&lab, relay, 2)?;
    }
    for stream in &mut held {
        echo(stream, b"undisturbed")?;
        stream.set_read_timeout(Some(Duration::from_millis(1)))?;
        ensure!(stream.read(&mut [0]).is_err(), "nothing else comes");
    }
    Ok(())
}
