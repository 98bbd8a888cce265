//! Who may connect, how often, and how many at once (scenario A15).

use std::{io::ErrorKind, net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use shunt_lab::{
    Lab, Shunt, patiently,
    scripted::{Behaviour, TcpServer},
    wait_until, web,
};

const SOON: Duration = Duration::from_secs(5);

fn refused(lab: &Lab, from: u8, to: &str) -> Result<bool> {
    let from = SocketAddr::from(([10, 88, 1, from], 0));
    match lab.client().connect_from(from, to.parse::<SocketAddr>()?) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[test]
fn deny_wins_over_allow_and_refusals_are_counted() -> Result<()> {
    let lab = Lab::builder().client_addresses(4).build()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80", "[fd88:1::1]:80"]
backends = ["10.88.2.2:80", "[fd88:2::2]:80"]
allow = ["10.88.1.0/30", "10.88.1.5"]
deny = ["10.88.1.3/32"]
"#,
    )?;
    ensure!(!refused(&lab, 2, "10.88.1.1:80")?, ".2 is allowed");
    ensure!(refused(&lab, 3, "10.88.1.1:80")?, ".3 is allowed and denied: denied");
    ensure!(refused(&lab, 4, "10.88.1.1:80")?, ".4 is in neither list");
    ensure!(!refused(&lab, 5, "10.88.1.1:80")?, ".5 is allowed as a single address");
    let v6 = lab.client().connect_within("[fd88:1::1]:80".parse::<SocketAddr>()?, SOON);
    assert_eq!(v6.expect_err("no IPv6 network is allowed").kind(), ErrorKind::ConnectionRefused);
    shunt.wait_route("web", "3 denied of 5", SOON, |r| {
        (r["terminations"]["denied"] == 3 && r["connections_total"] == 5).then_some(())
    })
}

#[test]
fn at_the_connection_limit_the_next_is_refused_and_the_old_ones_live() -> Result<()> {
    let lab = Lab::builder().client_addresses(3).build()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &web("limits = { connections = 4, connections_per_client = 3 }"))?;
    let to: SocketAddr = "10.88.1.1:80".parse()?;
    let mut held: Vec<_> = (0..3)
        .map(|_| lab.client().connect_from(SocketAddr::from(([10, 88, 1, 2], 0)), to))
        .collect::<Result<_, _>>()?;
    ensure!(refused(&lab, 2, "10.88.1.1:80")?, "a fourth of one client");
    held.push(lab.client().connect_from(SocketAddr::from(([10, 88, 1, 3], 0)), to)?);
    ensure!(refused(&lab, 4, "10.88.1.1:80")?, "a fifth on the route");
    for stream in &mut held {
        use std::io::{Read, Write};
        stream.set_read_timeout(Some(patiently(SOON)))?;
        stream.write_all(b"still here")?;
        stream.read_exact(&mut [0; 10])?;
    }
    shunt.wait_route("web", "each refusal under its reason", SOON, |r| {
        let reasons = &r["terminations"];
        (reasons["limit_per_client"] == 1 && reasons["limit_connections"] == 1 && r["connections_active"] == 4)
            .then_some(())
    })?;
    held.clear();
    wait_until("room again once they are gone", SOON, || refused(&lab, 2, "10.88.1.1:80").is_ok_and(|refused| !refused))
}

/// `ct count` forgets ended connections at most once per timer tick (`nf_conncount_gc_list`): more than the limit within one
/// tick would be refused, which takes a client with tens of thousands of connections a second.
#[test]
fn short_connections_one_after_another_are_not_counted_as_many_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Reply(b"ok".to_vec()))?;
    let shunt = Shunt::start(&lab, &web("limits = { connections_per_client = 100 }"))?;
    let to: SocketAddr = "10.88.1.1:80".parse()?;
    for _ in 0..300 {
        use std::io::{Read, Write};
        let mut stream = lab.client().connect(to)?;
        stream.write_all(b"x")?;
        stream.read_to_end(&mut Vec::new())?;
    }
    shunt.wait_route("web", "300 connections, none refused", SOON, |r| {
        (r["connections_total"] == 300 && r["terminations"]["limit_per_client"].as_u64().unwrap_or(0) == 0)
            .then_some(())
    })
}

#[test]
fn a_client_above_its_rate_is_refused_and_another_is_not() -> Result<()> {
    let lab = Lab::builder().client_addresses(2).build()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &web(r#"limits = { rate_per_client = "5/hour" }"#))?;
    for nth in 1..=5 {
        ensure!(!refused(&lab, 2, "10.88.1.1:80")?, "connection {nth} of 5");
    }
    ensure!(refused(&lab, 2, "10.88.1.1:80")?, "the sixth");
    ensure!(!refused(&lab, 3, "10.88.1.1:80")?, "another client");
    shunt.wait_route("web", "limit_rate", SOON, |r| (r["terminations"]["limit_rate"] == 1).then_some(()))
}
