//! Backends that come and go: checks, an operator's word, names, and UDP clients that must move (E5).

use std::{
    io::{Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    dialog::who,
    kernel, patiently,
    scripted::{Behaviour, TcpServer, UdpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(8);

#[test]
fn a_backend_that_fails_its_checks_gets_nothing_new_and_comes_back() -> Result<()> {
    let lab = Lab::new()?;
    let _one = TcpServer::start(lab.backend(1), 80, Behaviour::Tagged("b1".into()))?;
    let two = TcpServer::start(lab.backend(2), 80, Behaviour::Tagged("b2".into()))?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
health = { check = "tcp", interval = "200ms", timeout = "200ms", rise = 2, fall = 2 }
"#,
    )?;
    let up = |backend: &str| {
        shunt.metrics().is_ok_and(|m| m.value("shunt_backend_up", &[("route", "web"), ("backend", backend)]) == 1.0)
    };
    wait_until("both are up", SOON, || up("10.88.2.2:80") && up("10.88.2.3:80"))?;
    drop(two);
    let began = Instant::now();
    wait_until("the dead one is down", SOON, || !up("10.88.2.3:80"))?;
    println!("down after {:?}", began.elapsed());
    for _ in 0..20 {
        assert_eq!(who(lab.client(), "10.88.1.1:80")?, "b1");
    }
    let reason = shunt.route("web")?["backends"][1]["reason"].to_string();
    ensure!(reason.contains("refused"), "why it is down: {reason}");
    let _two = TcpServer::start(lab.backend(2), 80, Behaviour::Tagged("b2".into()))?;
    wait_until("it is back", SOON, || up("10.88.2.3:80"))?;
    let answers: Vec<String> = (0..4).map(|_| who(lab.client(), "10.88.1.1:80")).collect::<Result<_>>()?;
    ensure!(answers.contains(&"b2".to_owned()), "{answers:?}");
    Ok(())
}

#[test]
fn http_and_tls_checks_ask_more_than_a_port() -> Result<()> {
    let lab = Lab::new()?;
    let _nginx = lab.nginx(lab.backend(1), 80, &[("index.html", b"hello".to_vec())])?;
    let _mute = TcpServer::start(lab.backend(2), 80, Behaviour::Hold)?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
health = { check = "http", interval = "200ms", timeout = "300ms", rise = 1, fall = 2 }
[[route]]
name = "tls"
listen = ["10.88.1.1:443"]
backends = ["10.88.2.2:80"]
health = { check = "tls", interval = "200ms", timeout = "300ms", rise = 1, fall = 2 }
"#,
    )?;
    wait_until("a port that only accepts is not enough", SOON, || {
        shunt.route("web").is_ok_and(|r| r["backends"][0]["up"] == true && r["backends"][1]["up"] == false)
            && shunt.route("tls").is_ok_and(|r| r["backends"][0]["up"] == false)
    })
}

#[test]
fn drain_lets_connections_go_on_and_sends_new_ones_elsewhere() -> Result<()> {
    let lab = Lab::new()?;
    let _servers: Vec<TcpServer> = [1, 2]
        .map(|n| TcpServer::start(lab.backend(n), 80, Behaviour::Tagged(format!("b{n}"))))
        .into_iter()
        .collect::<Result<_>>()?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
"#,
    )?;
    let mut held: Vec<_> =
        (0..2).map(|_| lab.client().connect(SocketAddr::from(([10, 88, 1, 1], 80)))).collect::<Result<_, _>>()?;
    ensure!(shunt.cli(&["backend", "web", "10.88.2.3:80", "drain"])?.status.success());
    for _ in 0..10 {
        assert_eq!(who(lab.client(), "10.88.1.1:80")?, "b1");
    }
    for stream in &mut held {
        stream.set_read_timeout(Some(patiently(SOON)))?;
        stream.write_all(b"still\n")?;
        stream.read_exact(&mut [0; 9])?;
    }
    // An operator's word outlives a reload, and a daemon that does not know the backend says so.
    shunt.reload(
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80", "10.88.1.1:81"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
"#,
    )?;
    assert_eq!(who(lab.client(), "10.88.1.1:81")?, "b1");
    let wrong = shunt.cli(&["backend", "web", "10.88.2.9:80", "down"])?;
    assert_eq!(wrong.status.code(), Some(1));
    ensure!(String::from_utf8_lossy(&wrong.stderr).contains("10.88.2.9:80"));
    Ok(())
}

#[test]
fn udp_clients_of_a_dead_backend_reach_another_and_those_of_the_living_are_left_alone() -> Result<()> {
    let lab = Lab::builder().client_addresses(8).build()?;
    let one = UdpServer::start(lab.backend(1), 53, "b1")?;
    let _two = UdpServer::start(lab.backend(2), 53, "b2")?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "dns"
protocol = "udp"
listen = ["10.88.1.1:53"]
backends = ["10.88.2.2:53", "10.88.2.3:53"]
"#,
    )?;
    let sockets: Vec<_> = lab
        .client_addresses()
        .into_iter()
        .map(|ip| {
            let socket = lab.client().udp(SocketAddr::from((ip, 0)))?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            socket.connect("10.88.1.1:53")?;
            Ok(socket)
        })
        .collect::<Result<_>>()?;
    let ask = |socket: &std::net::UdpSocket| -> Option<String> {
        let mut answer = [0; 32];
        socket.send(b"?").ok()?;
        let length = socket.recv(&mut answer).ok()?;
        Some(String::from_utf8_lossy(&answer[..length]).into_owned())
    };
    let before: Vec<String> = sockets.iter().map(|s| ask(s).context("answered")).collect::<Result<_>>()?;
    ensure!(before.iter().any(|a| a == "b1:?") && before.iter().any(|a| a == "b2:?"), "{before:?}");
    drop(one);
    ensure!(shunt.cli(&["backend", "dns", "10.88.2.2:53", "down"])?.status.success());
    wait_until("every client reaches the other backend from the same socket", SOON, || {
        sockets.iter().all(|s| ask(s).as_deref() == Some("b2:?"))
    })?;
    let left = kernel::conntrack_list(lab.gateway(), "-p udp --reply-src 10.88.2.2")?;
    ensure!(left.is_empty(), "entries of the dead backend: {left:?}");
    Ok(())
}

#[test]
fn a_backend_may_be_a_name() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Tagged("b1".into()))?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["localhost.invalid:80", "10.88.2.2:80"]
"#,
    )?;
    wait_until("the name that does not resolve is no backend", SOON, || {
        shunt.route("web").is_ok_and(|r| r["backends"][0]["up"] == false && r["backends"][1]["up"] == true)
    })?;
    for _ in 0..4 {
        assert_eq!(who(lab.client(), "10.88.1.1:80")?, "b1");
    }
    Ok(())
}

#[test]
fn without_checks_a_backend_that_refuses_is_left_out_for_a_while() -> Result<()> {
    let lab = Lab::new()?;
    let _one = TcpServer::start(lab.backend(1), 80, Behaviour::Tagged("b1".into()))?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
"#,
    )?;
    wait_until("three refused connections take it out", SOON, || {
        // At once: they count when they come within ten seconds, in which a slow machine does not ask a daemon three times.
        (0..6).for_each(|_| drop(who(lab.client(), "10.88.1.1:80")));
        shunt.route("web").is_ok_and(|r| r["backends"][1]["up"] == false)
    })?;
    for _ in 0..10 {
        assert_eq!(who(lab.client(), "10.88.1.1:80")?, "b1");
    }
    let _two = TcpServer::start(lab.backend(2), 80, Behaviour::Tagged("b2".into()))?;
    wait_until("it is tried again", Duration::from_secs(20), || {
        who(lab.client(), "10.88.1.1:80").is_ok_and(|name| name == "b2")
    })
}
