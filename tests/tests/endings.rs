//! How connections end: half-closed ones live, long ones stay, every end has one reason (A9, B1–B3, B6, C3, C4).

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shunt_lab::{
    Lab, Shunt,
    dialog::echo,
    kernel, patiently, pattern,
    scripted::{Behaviour, Start, TcpServer},
    wait_for, wait_until, web,
};

const SOON: Duration = Duration::from_secs(5);
/// A connection that ended silently is noticed by a dump, and its bytes are final a dump later.
const REPORTED: Duration = Duration::from_secs(12);

fn to() -> SocketAddr {
    SocketAddr::from(([10, 88, 1, 1], 80))
}

fn reason(shunt: &Shunt, reason: &str, count: u64) -> Result<()> {
    shunt.wait_route("web", &format!("{reason} = {count}"), SOON, |r| {
        let total: u64 = r["terminations"].as_object()?.values().filter_map(Value::as_u64).sum();
        (r["terminations"][reason] == count && r["connections_total"] == total && r["connections_active"] == 0)
            .then_some(())
    })
}

#[test]
fn both_orders_of_finishing_and_both_resets_have_their_reason() -> Result<()> {
    let lab = Lab::new()?;
    let cases = [
        (Behaviour::Echo, "finished_client_first"),
        (Behaviour::Reply(b"bye".to_vec()), "finished_backend_first"),
        (Behaviour::ResetAfter(1), "reset_by_backend"),
    ];
    for (behaviour, expected) in cases {
        let _server = TcpServer::start(lab.backend(1), 80, behaviour)?;
        let mut shunt = Shunt::start(&lab, &web(""))?;
        let mut stream = lab.client().connect(to())?;
        stream.set_read_timeout(Some(patiently(SOON)))?;
        stream.write_all(b"x")?;
        if expected == "finished_client_first" {
            stream.read_exact(&mut [0])?;
            stream.shutdown(Shutdown::Write)?;
        }
        let end = stream.read_to_end(&mut Vec::new());
        ensure!(end.is_err() == (expected == "reset_by_backend"), "{expected}: the client saw {end:?}");
        drop(stream);
        reason(&shunt, expected, 1)?;
        // So that the next daemon begins from nothing.
        shunt.terminate(SOON)?;
        ensure!(shunt.cli(&["cleanup"])?.status.success());
    }
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &web(""))?;
    let stream = socket2_reset(lab.client().connect(to())?)?;
    drop(stream);
    reason(&shunt, "reset_by_client", 1)
}

/// Closing it sends a reset.
fn socket2_reset(stream: TcpStream) -> Result<TcpStream> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger)?;
    Ok(stream)
}

#[test]
fn a_closed_port_and_a_silent_backend_are_told_apart() -> Result<()> {
    let lab = Lab::new()?;
    let shunt = Shunt::start(&lab, &web(r#"timeouts = { connect = "1s" }"#))?;
    let refused = lab.client().connect_within(to(), SOON).expect_err("nobody listens");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    reason(&shunt, "connect_refused", 1)?;
    lab.backend(1).sh("nft 'add table ip t; add chain ip t i { type filter hook input priority 0; }; add rule ip t i tcp dport 80 drop'")?;
    let silent = lab.client().connect_within(to(), Duration::from_millis(500)).expect_err("SYNs are swallowed");
    assert_eq!(silent.kind(), std::io::ErrorKind::TimedOut);
    shunt.wait_route("web", "connect_timeout", REPORTED, |r| (r["terminations"]["connect_timeout"] == 1).then_some(()))
}

#[test]
fn the_same_client_port_again_at_once_is_a_second_connection() -> Result<()> {
    let lab = Lab::new()?;
    let server = TcpServer::start(lab.backend(1), 80, Behaviour::Reply(b"bye".to_vec()))?;
    let shunt = Shunt::start(&lab, &web(""))?;
    let from = SocketAddr::from(([10, 88, 1, 2], 40_000));
    for nth in 1..=5u64 {
        // The backend closes first, so the client's side has no TIME_WAIT and its port is free at once.
        let mut stream = lab.client().connect_from(from, to()).with_context(|| format!("connection {nth}"))?;
        stream.write_all(b"x")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        assert_eq!(answer, b"bye", "connection {nth} got its own bytes");
        assert_eq!(server.accepted(), nth);
    }
    shunt.wait_route("web", "five connections, five ends", REPORTED, |r| {
        (r["connections_total"] == 5
            && r["terminations"]["finished_backend_first"] == 5
            && r["connections_active"] == 0)
            .then_some(())
    })
}

#[test]
fn each_direction_flows_to_its_end_after_the_other_has_closed() -> Result<()> {
    const BYTES: u64 = 3 << 20;
    let lab = Lab::new()?;
    for start in [Start::AfterClientFinished, Start::AtOnce] {
        let server = TcpServer::start(lab.backend(1), 80, Behaviour::Exchange { seed: 7, bytes: BYTES, start })?;
        let _shunt = Shunt::start(&lab, &web(""))?;
        let mut stream = lab.client().connect(to())?;
        stream.set_read_timeout(Some(patiently(SOON)))?;
        let (received, sent) = if start == Start::AfterClientFinished {
            let sent = pattern::send(&mut stream, 3, 1000)?;
            stream.shutdown(Shutdown::Write)?;
            (pattern::receive(&mut stream)?, sent)
        } else {
            // The backend has finished before the client begins.
            let received = pattern::receive(&mut stream)?;
            let sent = pattern::send(&mut stream, 3, BYTES)?;
            stream.shutdown(Shutdown::Write)?;
            (received, sent)
        };
        let record = server.wait_records(1, SOON)?.remove(0);
        assert_eq!(record.received, sent, "client → backend");
        assert_eq!(received.bytes, BYTES);
        assert_eq!(received, pattern::send(&mut std::io::sink(), 7, BYTES)?, "backend → client");
    }
    Ok(())
}

#[test]
fn an_idle_connection_lives_as_long_as_its_limit_and_a_half_closed_one_as_long_as_its_own() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80"]
timeouts = { idle = "4s", half_closed = "2s" }
[[route]]
name = "day"
listen = ["10.88.1.1:81"]
backends = ["10.88.2.2:80"]
keepalive = "immortal"
timeouts = { idle = "1s" }
"#,
    )?;
    let mut day = lab.client().connect(SocketAddr::from(([10, 88, 1, 1], 81)))?;
    echo(&mut day, b"morning")?;
    let mut idle = lab.client().connect(to())?;
    let began = Instant::now();
    // Bytes before the limit start the timer anew.
    while began.elapsed() < Duration::from_secs(6) {
        echo(&mut idle, b"tick")?;
        let pause = Instant::now() + Duration::from_millis(1500);
        wait_until("a pause", SOON, || Instant::now() >= pause)?;
    }
    let hold = Instant::now();
    reason(&shunt, "idle_timeout", 1).or_else(|_| reason(&shunt, "idle_timeout", 1))?;
    ensure!(hold.elapsed() > Duration::from_secs(2), "ended after {:?}, too soon", hold.elapsed());
    // The flow is gone: the client's next packet is answered with a reset.
    idle.write_all(b"too late").ok();
    ensure!(idle.read(&mut [0; 8]).is_err(), "an ended connection answers nothing");
    echo(&mut day, b"evening")?;
    Ok(())
}

#[test]
fn extended_keepalive_multiplies_the_idle_limit_and_warns_before() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &web("keepalive = \"extended\"\ntimeouts = { idle = \"3s\" }"))?;
    let mut stream = lab.client().connect(to())?;
    echo(&mut stream, b"then silence")?;
    let since = Instant::now();
    let warning = format!("client={}", stream.local_addr()?);
    let warned = || shunt.log().lines().any(|line| line.contains("idle for long") && line.contains(&warning));
    // Silence is noticed by a dump, and known by the next.
    wait_until("a warning", Duration::from_secs(16), warned)?;
    ensure!(since.elapsed() > Duration::from_secs(2), "warned after {:?}", since.elapsed());
    wait_for("its end", Duration::from_secs(30), || reason(&shunt, "idle_timeout", 1).ok())?;
    ensure!(since.elapsed() > Duration::from_secs(17), "ended after {:?}", since.elapsed());
    Ok(())
}

#[test]
fn a_busy_connection_past_its_lifetime_ends_with_that_reason() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &web(r#"timeouts = { lifetime = "2s" }"#))?;
    let mut stream = lab.client().connect(to())?;
    let began = Instant::now();
    let ended = wait_for("the connection to be cut", Duration::from_secs(10), || echo(&mut stream, b"busy").err())?;
    println!("cut after {:?}: {ended}", began.elapsed());
    ensure!(began.elapsed() > Duration::from_millis(1900), "cut after {:?}", began.elapsed());
    reason(&shunt, "lifetime_exceeded", 1)
}

#[test]
fn a_killed_connection_is_reset_and_counted_once() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &web(""))?;
    let mut doomed = lab.client().connect(to())?;
    let mut other = lab.client().connect(to())?;
    echo(&mut doomed, b"hello")?;
    echo(&mut other, b"hello")?;
    let client = doomed.local_addr()?.to_string();
    let connections = shunt.cli_json(&["connections", "--route", "web"])?;
    let list = connections.as_array().context("an array")?;
    assert_eq!(list.len(), 2);
    let id = list
        .iter()
        .find(|c| c["client"] == client)
        .and_then(|c| c["id"].as_str())
        .context("the connection is listed")?;
    let explained = shunt.cli_json(&["explain", id])?;
    assert_eq!(explained["connection"]["client"], client);
    assert_eq!(shunt.cli_json(&["explain", &client])?["route"], "web");
    ensure!(shunt.cli(&["kill", id])?.status.success());
    wait_until("the client is reset", SOON, || echo(&mut doomed, b"anyone?").is_err())?;
    echo(&mut other, b"still here")?;
    shunt.wait_route("web", "one killed, one alive", SOON, |r| {
        (r["terminations"]["killed"] == 1 && r["connections_active"] == 1).then_some(())
    })?;
    ensure!(shunt.cli(&["kill", id])?.status.code() == Some(1), "it is gone");
    Ok(())
}

#[test]
fn the_access_log_says_what_the_sender_sent() -> Result<()> {
    let lab = Lab::new()?;
    // Without options in data packets every packet has 40 bytes of headers, and conntrack's bytes can be checked to the byte.
    for host in [lab.client(), lab.backend(1)] {
        for key in ["net.ipv4.tcp_timestamps", "net.ipv4.tcp_sack", "net.ipv4.tcp_window_scaling"] {
            host.set_sysctl(key, "0")?;
        }
    }
    let exchange = Behaviour::Exchange { seed: 9, bytes: 200_000, start: Start::AfterClientFinished };
    let _server = TcpServer::start(lab.backend(1), 80, exchange)?;
    let shunt = Shunt::start(&lab, &format!("[log]\nformat = \"json\"\n{}", web("")))?;
    let mut stream = lab.client().connect(to())?;
    let client = stream.local_addr()?.to_string();
    let id = wait_for("the connection is listed", SOON, || {
        let list = shunt.cli_json(&["connections"]).ok()?;
        Some(list.as_array()?.first()?["id"].as_str()?.to_owned())
    })?;
    pattern::send(&mut stream, 1, 50_000)?;
    stream.shutdown(Shutdown::Write)?;
    assert_eq!(pattern::receive(&mut stream)?.bytes, 200_000);
    drop(stream);
    let line = wait_for("the line of the connection", REPORTED, || {
        let log = shunt.log();
        log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()).find(|l| l["client"] == client)
    })?;
    println!("{line}");
    for (key, value) in [("id", id.as_str()), ("route", "web"), ("engine", "nft"), ("reason", "finished_client_first")]
    {
        assert_eq!(line[key], value, "{key}");
    }
    assert_eq!(line["backend"], "10.88.2.2:80");
    let number = |key: &str| line[key].as_u64().with_context(|| format!("{key} in {line}"));
    // 40 bytes of headers per packet, and 4 more (MSS) in each SYN.
    assert_eq!(number("bytes_in")? - 40 * number("packets_in")? - 4, 50_000);
    assert_eq!(number("bytes_out")? - 40 * number("packets_out")? - 4, 200_000);
    let seconds = line["duration"].as_f64().or_else(|| line["duration"].as_str()?.parse().ok()).context("duration")?;
    ensure!((0.0..10.0).contains(&seconds));
    Ok(())
}

#[test]
fn a_stopping_daemon_leaves_bytes_in_flight_alone_and_exits_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let server = TcpServer::start(lab.backend(1), 80, Behaviour::sink())?;
    let mut shunt = Shunt::start(&lab, &web(""))?;
    let mut stream = lab.client().connect(to())?;
    let sender = std::thread::spawn(move || -> Result<pattern::Digested> {
        let sent = pattern::send(&mut stream, 5, 200 << 20)?;
        stream.shutdown(Shutdown::Write)?;
        Ok(sent)
    });
    wait_until("bytes are flowing", SOON, || server.received() > 1 << 20)?;
    let began = Instant::now();
    let status = shunt.terminate(SOON)?;
    println!("exit after {:?}", began.elapsed());
    ensure!(status.success());
    let sent = sender.join().expect("sender")?;
    assert_eq!(server.wait_records(1, Duration::from_secs(30))?.remove(0).received, sent);
    ensure!(lab.client().connect(to()).is_ok(), "the kernel goes on forwarding");
    Ok(())
}

#[test]
fn a_removed_route_drains_and_then_is_cut() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &web("timeouts = { drain = \"2s\" }"))?;
    let mut stream = lab.client().connect(to())?;
    echo(&mut stream, b"before")?;
    let began = Instant::now();
    shunt.reload("[[route]]\nname = \"other\"\nlisten = [\"10.88.1.1:81\"]\nbackends = [\"10.88.2.2:80\"]\n")?;
    ensure!(lab.client().connect_within(to(), SOON).is_err(), "no new connections");
    echo(&mut stream, b"draining")?;
    assert_eq!(shunt.route("web")?["state"], "draining");
    wait_until("cut at the drain limit", Duration::from_secs(10), || echo(&mut stream, b"x").is_err())?;
    ensure!(began.elapsed() > Duration::from_millis(1900), "cut after {:?}", began.elapsed());
    wait_until("nothing is left of the route", REPORTED, || shunt.route("web").is_err())?;
    let listing = kernel::nft_ruleset(lab.gateway())?;
    ensure!(!listing.contains("\"web\""), "an element of the route is left:\n{listing}");
    Ok(())
}
