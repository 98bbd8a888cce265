//! What a route is for: connections arrive at a backend, whatever the address, family, port or place of the client.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Result, ensure};
use shunt_lab::{
    Host, Lab, Shunt,
    dialog::who,
    patiently,
    scripted::{Behaviour, TcpServer, UdpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);

fn tagged(lab: &Lab, port: u16) -> Result<Vec<TcpServer>> {
    (0..lab.backends().len())
        .map(|i| TcpServer::start(lab.backend(i + 1), port, Behaviour::Tagged(format!("b{}", i + 1))))
        .collect()
}

fn ask_udp(client: &Host, from: &str, to: &str) -> Result<String> {
    let socket = client.udp(from.parse::<SocketAddr>()?)?;
    socket.set_read_timeout(Some(patiently(SOON)))?;
    socket.send_to(b"who", to.parse::<SocketAddr>()?)?;
    let mut answer = [0; 64];
    let (length, _) = socket.recv_from(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

#[test]
fn tcp_and_udp_of_both_families_reach_a_backend_and_the_port_is_translated() -> Result<()> {
    let lab = Lab::builder().forwarding(false).build()?;
    let _servers = tagged(&lab, 8080)?;
    let _udp = UdpServer::start(lab.backend(2), 5353, "u2")?;
    let _shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80", "[fd88:1::1]:80"]
backends = ["10.88.2.2:8080", "[fd88:2::2]:8080"]
[[route]]
name = "dns"
protocol = "udp"
listen = ["10.88.1.1:53", "[fd88:1::1]:53"]
backends = ["10.88.2.3:5353", "[fd88:2::3]:5353"]
"#,
    )?;
    assert_eq!(who(lab.client(), "10.88.1.1:80")?, "b1");
    assert_eq!(who(lab.client(), "[fd88:1::1]:80")?, "b1");
    assert_eq!(ask_udp(lab.client(), "0.0.0.0:0", "10.88.1.1:53")?, "u2:who");
    assert_eq!(ask_udp(lab.client(), "[::]:0", "[fd88:1::1]:53")?, "u2:who");
    Ok(())
}

#[test]
fn a_wildcard_listens_on_every_address_of_its_family_and_an_exact_address_wins() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = tagged(&lab, 80)?;
    let _shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "any"
listen = ["0.0.0.0:80", "[::]:80"]
backends = ["10.88.2.2:80", "[fd88:2::2]:80"]
[[route]]
name = "one"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.3:80"]
"#,
    )?;
    assert_eq!(who(lab.client(), "10.88.1.1:80")?, "b2");
    assert_eq!(who(lab.client(), "10.88.2.1:80")?, "b1", "the gateway's other address is covered by 0.0.0.0");
    assert_eq!(who(lab.client(), "[fd88:1::1]:80")?, "b1");
    // What only passes through is not shunt's: the backend itself answers on its own address.
    assert_eq!(who(lab.client(), "10.88.2.3:80")?, "b2");
    Ok(())
}

#[test]
fn a_port_range_keeps_the_dialled_port_or_leads_to_one() -> Result<()> {
    let lab = Lab::new()?;
    let _kept: Vec<TcpServer> = [30000, 30017, 30999]
        .into_iter()
        .map(|port| TcpServer::start(lab.backend(1), port, Behaviour::Tagged(format!("port {port}"))))
        .collect::<Result<_>>()?;
    let _one = TcpServer::start(lab.backend(2), 7777, Behaviour::Tagged("one".into()))?;
    let _shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "kept"
listen = ["10.88.1.1:30000-30999", "[fd88:1::1]:30000-30999"]
backends = ["10.88.2.2", "fd88:2::2"]
[[route]]
name = "one"
listen = ["10.88.1.1:31000-31999"]
backends = ["10.88.2.3:7777"]
[[route]]
name = "any"
listen = ["0.0.0.0:40000-40009"]
backends = ["10.88.2.3:7777"]
"#,
    )?;
    for port in [30000, 30017, 30999] {
        assert_eq!(who(lab.client(), &format!("10.88.1.1:{port}"))?, format!("port {port}"));
        assert_eq!(who(lab.client(), &format!("[fd88:1::1]:{port}"))?, format!("port {port}"));
    }
    assert_eq!(who(lab.client(), "10.88.1.1:31000")?, "one");
    assert_eq!(who(lab.client(), "10.88.1.1:31999")?, "one");
    assert_eq!(who(lab.client(), "10.88.2.1:40009")?, "one");
    ensure!(who(lab.client(), "10.88.1.1:32000").is_err(), "a port past the range is not served");
    Ok(())
}

#[test]
fn clients_on_the_gateway_itself_are_served_and_counted() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = tagged(&lab, 80)?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80", "0.0.0.0:81"]
backends = ["10.88.2.2:80"]
"#,
    )?;
    assert_eq!(who(lab.gateway(), "10.88.1.1:80")?, "b1");
    assert_eq!(who(lab.gateway(), "10.88.2.1:81")?, "b1");
    shunt.wait_route("web", "two connections, bytes both ways", SOON, |r| {
        (r["connections_total"] == 2 && r["bytes_in"].as_u64()? > 0 && r["bytes_out"].as_u64()? > 0).then_some(())
    })
}

#[test]
fn a_backend_that_dials_its_own_service_is_answered() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = tagged(&lab, 80)?;
    for source in ["gateway", "client"] {
        let _shunt = Shunt::start(
            &lab,
            &format!(
                r#"
[[route]]
name = "web"
listen = ["10.88.2.1:80"]
backends = ["10.88.2.2:80"]
source_address = "{source}"
"#
            ),
        )?;
        assert_eq!(who(lab.backend(1), "10.88.2.1:80")?, "b1", "source_address = {source}");
    }
    Ok(())
}

#[test]
fn the_backend_sees_the_gateway_or_the_client_as_the_route_says() -> Result<()> {
    let lab = Lab::new()?;
    let server = TcpServer::start(lab.backend(1), 80, Behaviour::sink())?;
    let _shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "masked"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80"]
[[route]]
name = "shown"
listen = ["10.88.1.1:81"]
backends = ["10.88.2.2:80"]
source_address = "client"
"#,
    )?;
    for port in [80, 81] {
        drop(lab.client().connect(SocketAddr::from(([10, 88, 1, 1], port)))?);
    }
    let peers: Vec<IpAddr> = server.wait_records(2, SOON)?.iter().map(|r| r.peer.ip().to_canonical()).collect();
    let mut sorted = peers.clone();
    sorted.sort();
    assert_eq!(sorted, ["10.88.1.2".parse::<IpAddr>()?, "10.88.2.1".parse()?]);
    Ok(())
}

/// How often each backend answers in `count` connections, by its name.
fn shares(client: &Host, to: &str, count: usize) -> Result<BTreeMap<String, usize>> {
    let mut shares = BTreeMap::new();
    for _ in 0..count {
        *shares.entry(who(client, to)?).or_default() += 1;
    }
    Ok(shares)
}

#[test]
fn round_robin_is_exact_by_weight_and_not_disturbed_by_other_routes() -> Result<()> {
    let lab = Lab::builder().backends(3).build()?;
    let _servers = tagged(&lab, 80)?;
    let _shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "weighted"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", { address = "10.88.2.3:80", weight = 2 }, { address = "10.88.2.4:80", weight = 3 }]
[[route]]
name = "left"
listen = ["10.88.1.1:81"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
[[route]]
name = "right"
listen = ["10.88.1.1:82"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
"#,
    )?;
    let weighted = shares(lab.client(), "10.88.1.1:80", 36)?;
    assert_eq!(weighted, BTreeMap::from([("b1".into(), 6), ("b2".into(), 12), ("b3".into(), 18)]));
    // Taking turns on two routes: a counter shared by both would give each only one backend.
    let mut left = BTreeMap::<String, usize>::new();
    for _ in 0..10 {
        *left.entry(who(lab.client(), "10.88.1.1:81")?).or_default() += 1;
        who(lab.client(), "10.88.1.1:82")?;
    }
    assert_eq!(left, BTreeMap::from([("b1".into(), 5), ("b2".into(), 5)]));
    Ok(())
}

#[test]
fn hashed_clients_stay_with_their_backend_and_all_backends_have_some() -> Result<()> {
    let lab = Lab::builder().backends(3).client_addresses(60).build()?;
    let _servers = tagged(&lab, 80)?;
    for balance in ["source-hash", "maglev"] {
        let shunt = Shunt::start(
            &lab,
            &format!(
                r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", "10.88.2.3:80", "10.88.2.4:80"]
balance = "{balance}"
"#
            ),
        )?;
        let ask = || -> Result<Vec<String>> {
            lab.client_addresses()
                .into_iter()
                .map(|from| {
                    let to: SocketAddr = "10.88.1.1:80".parse()?;
                    let mut stream = lab.client().connect_from(SocketAddr::from((from, 0)), to)?;
                    stream.set_read_timeout(Some(patiently(SOON)))?;
                    let mut name = [0; 2];
                    stream.write_all(b"\n")?;
                    stream.read_exact(&mut name)?;
                    Ok(String::from_utf8(name.into())?)
                })
                .collect()
        };
        let first = ask()?;
        assert_eq!(first, ask()?, "{balance}: the same clients go to the same backends");
        for backend in ["b1", "b2", "b3"] {
            let share = first.iter().filter(|name| *name == backend).count();
            ensure!((5..=40).contains(&share), "{balance}: {backend} has {share} of 60 clients");
        }
        // When one goes, only its clients move (maglev: and few others).
        ensure!(shunt.cli(&["backend", "web", "10.88.2.3:80", "down"])?.status.success());
        let second = ask()?;
        let needless = first.iter().zip(&second).filter(|(a, b)| *a != "b2" && a != b).count();
        println!("{balance}: {needless} of 60 clients moved although their backend stayed");
        ensure!(needless <= if balance == "maglev" { 6 } else { 0 }, "{balance}: {needless} moved needlessly");
        ensure!(!second.contains(&"b2".to_owned()));
    }
    Ok(())
}

#[test]
fn random_balance_reaches_every_backend() -> Result<()> {
    let lab = Lab::builder().backends(3).build()?;
    let _servers = tagged(&lab, 80)?;
    let _shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", "10.88.2.3:80", "10.88.2.4:80"]
balance = "random"
"#,
    )?;
    let shares = shares(lab.client(), "10.88.1.1:80", 90)?;
    ensure!(shares.len() == 3 && shares.values().all(|&n| n >= 12), "{shares:?}");
    Ok(())
}

#[test]
fn routes_on_one_port_are_told_apart_by_the_clients_network() -> Result<()> {
    let lab = Lab::builder().backends(3).client_addresses(3).build()?;
    let _servers = tagged(&lab, 80)?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "net"
listen = ["10.88.1.1:80"]
match = { client = ["10.88.0.0/16"] }
backends = ["10.88.2.2:80"]
[[route]]
name = "host"
listen = ["10.88.1.1:80"]
match = { client = ["10.88.1.3/32"] }
backends = ["10.88.2.3:80"]
[[route]]
name = "rest"
listen = ["10.88.1.1:80", "10.88.1.1:81"]
backends = ["10.88.2.4:80"]
[[route]]
name = "only"
listen = ["10.88.1.1:81"]
match = { client = ["192.0.2.0/24"] }
backends = ["10.88.2.2:80"]
[[route]]
name = "closed"
listen = ["10.88.1.1:82"]
match = { client = ["192.0.2.0/24"] }
backends = ["10.88.2.2:80"]
"#,
    )?;
    let from = |host: u8, port: u16| -> Result<String> {
        let mut stream = lab
            .client()
            .connect_from(SocketAddr::from(([10, 88, 1, host], 0)), SocketAddr::from(([10, 88, 1, 1], port)))?;
        stream.set_read_timeout(Some(patiently(SOON)))?;
        stream.write_all(b"\n")?;
        let mut name = [0; 2];
        stream.read_exact(&mut name)?;
        Ok(String::from_utf8(name.into())?)
    };
    assert_eq!(from(2, 80)?, "b1");
    assert_eq!(from(3, 80)?, "b2");
    assert_eq!(from(2, 81)?, "b3");
    ensure!(from(2, 82).is_err(), "no route matches this client");
    shunt.wait_route("closed", "no_route is counted", SOON, |r| (r["terminations"]["no_route"] == 1).then_some(()))
}

#[test]
fn without_a_healthy_backend_clients_are_told_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = tagged(&lab, 80)?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
[[route]]
name = "dns"
protocol = "udp"
listen = ["10.88.1.1:53"]
backends = ["10.88.2.2:53"]
"#,
    )?;
    for (route, backend) in [("web", "10.88.2.2:80"), ("web", "10.88.2.3:80"), ("dns", "10.88.2.2:53")] {
        ensure!(shunt.cli(&["backend", route, backend, "down"])?.status.success());
    }
    let refused = lab.client().connect_within("10.88.1.1:80".parse::<SocketAddr>()?, SOON).expect_err("no backend");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let socket = lab.client().udp("0.0.0.0:0".parse::<SocketAddr>()?)?;
    socket.set_read_timeout(Some(patiently(SOON)))?;
    socket.connect("10.88.1.1:53")?;
    socket.send(b"who")?;
    assert_eq!(socket.recv(&mut [0; 8]).expect_err("ICMP").kind(), std::io::ErrorKind::ConnectionRefused);
    shunt.wait_route("web", "no_backend is counted", SOON, |r| (r["terminations"]["no_backend"] == 1).then_some(()))?;
    ensure!(shunt.cli(&["backend", "web", "10.88.2.3:80", "ready"])?.status.success());
    assert_eq!(who(lab.client(), "10.88.1.1:80")?, "b2");
    wait_until("metrics know the backend is up", SOON, || {
        shunt.metrics().is_ok_and(|m| {
            m.value("shunt_backend_up", &[("route", "web"), ("backend", "10.88.2.3:80")]) == 1.0
                && m.value("shunt_backend_up", &[("route", "web"), ("backend", "10.88.2.2:80")]) == 0.0
        })
    })
}
