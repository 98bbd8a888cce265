//! What is counted is what was sent, while it is sent (D1, D2); and how long it took.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Metrics, Shunt,
    dialog::echo,
    patiently, pattern,
    scripted::{Behaviour, Start, TcpServer, UdpServer},
    wait_for, wait_until, web,
};

const SOON: Duration = Duration::from_secs(6);

#[test]
fn udp_bytes_equal_what_the_peers_sent_and_received() -> Result<()> {
    let lab = Lab::new()?;
    let server = UdpServer::start(lab.backend(1), 53, "dns")?;
    let shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "dns"
protocol = "udp"
listen = ["10.88.1.1:53", "[fd88:1::1]:53"]
backends = ["10.88.2.2:53", "[fd88:2::2]:53"]
"#,
    )?;
    for (bind, to, header) in [("0.0.0.0:0", "10.88.1.1:53", 28), ("[::]:0", "[fd88:1::1]:53", 48)] {
        let before = shunt.route("dns")?;
        let count = |v: &serde_json::Value, key: &str| v[key].as_u64().unwrap_or(0);
        let (mut sent, mut received) = (0, 0);
        let socket = lab.client().udp(bind.parse::<SocketAddr>()?)?;
        socket.set_read_timeout(Some(patiently(SOON)))?;
        for size in [1usize, 17, 512, 1000, 1300] {
            sent += socket.send_to(&vec![b'x'; size], to.parse::<SocketAddr>()?)? as u64;
            received += socket.recv(&mut [0; 2048])? as u64;
        }
        shunt.wait_route("dns", "the payload of five datagrams each way", SOON, |now| {
            let grown = |key: &str| count(now, key) - count(&before, key);
            (grown("bytes_in") == sent + 5 * header
                && grown("bytes_out") == received + 5 * header
                && grown("packets_in") == 5
                && grown("connections_total") == 1)
                .then_some(())
        })?;
    }
    assert_eq!(server.datagrams(), 10);
    Ok(())
}

#[test]
fn the_counters_of_a_long_connection_move_while_it_lives_and_end_exact() -> Result<()> {
    const CHUNK: u64 = 1 << 20;
    let lab = Lab::new()?;
    // 40 bytes of headers in every packet: the payload can be told from packets and bytes.
    for host in [lab.client(), lab.backend(1)] {
        for key in ["net.ipv4.tcp_timestamps", "net.ipv4.tcp_sack", "net.ipv4.tcp_window_scaling"] {
            host.set_sysctl(key, "0")?;
        }
    }
    let server = TcpServer::start(
        lab.backend(1),
        80,
        Behaviour::Exchange { seed: 1, bytes: 3_000_000, start: Start::AfterClientFinished },
    )?;
    let shunt = Shunt::start(&lab, &web(""))?;
    let mut stream = lab.client().connect("10.88.1.1:80".parse::<SocketAddr>()?)?;
    stream.set_nodelay(true)?;
    let payload = |v: &serde_json::Value, way: &str| -> Option<u64> {
        v[format!("bytes_{way}")].as_u64()?.checked_sub(40 * v[format!("packets_{way}")].as_u64()? + 4)
    };
    for nth in 1..=3 {
        pattern::send(&mut stream, 9, CHUNK)?;
        wait_until("it has arrived", SOON, || server.received() == nth * CHUNK)?;
        shunt.wait_route("web", "the route has it", SOON, |r| (payload(r, "in")? == nth * CHUNK).then_some(()))?;
        let flows = shunt.cli_json(&["connections"])?;
        let flow = flows.as_array().and_then(|l| l.first()).context("the flow is listed")?;
        assert_eq!(payload(flow, "in"), Some(nth * CHUNK), "and so has the connection");
        assert_eq!(flow["metered"], true);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    assert_eq!(pattern::receive(&mut stream)?.bytes, 3_000_000);
    drop(stream);
    shunt.wait_route("web", "both directions to the byte", SOON, |r| {
        (payload(r, "in")? == 3 * CHUNK && payload(r, "out")? == 3_000_000).then_some(())
    })?;
    let metrics = shunt.metrics()?;
    let labels = [("route", "web"), ("engine", "nft")];
    let route = shunt.route("web")?;
    wait_until("the metrics agree", SOON, || {
        shunt.metrics().is_ok_and(|m| {
            m.value("shunt_bytes_total", &[labels[0], labels[1], ("direction", "in")])
                == route["bytes_in"].as_f64().unwrap_or(-1.0)
                && m.value("shunt_connections_total", &labels) == 1.0
        })
    })?;
    ensure!(metrics.get("shunt_build_info", &[]).is_some());
    Ok(())
}

#[test]
fn under_steady_load_each_connection_and_byte_is_counted_once() -> Result<()> {
    let lab = Lab::builder().client_addresses(4).build()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Reply(vec![b'r'; 1000]))?;
    let shunt = Shunt::start(&lab, &web(""))?;
    let to: SocketAddr = "10.88.1.1:80".parse()?;
    let began = Instant::now();
    let mut made = 0u64;
    let mut rates = Vec::new();
    let mut next = Duration::from_secs(3);
    // 100 connections a second for 12 seconds.
    while began.elapsed() < Duration::from_secs(12) {
        let mut stream = lab.client().connect_from(SocketAddr::from(([10, 88, 1, 2 + (made % 4) as u8], 0)), to)?;
        stream.write_all(b"GET")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        ensure!(answer.len() == 1000);
        made += 1;
        if began.elapsed() > next {
            rates.push(shunt.route("web")?["connections_rate"].as_f64().context("rate")?);
            next += Duration::from_secs(2);
        }
        let due = began + Duration::from_millis(made * 10);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    println!("{made} connections; rates shown: {rates:?}");
    // The middle one: a machine that stalls makes fewer for a while.
    rates.sort_by(f64::total_cmp);
    ensure!((60.0..140.0).contains(&rates[rates.len() / 2]), "the rate was 100/s, shown: {rates:?}");
    shunt.wait_route("web", "each once", Duration::from_secs(25), |r| {
        let ended: u64 = r["terminations"].as_object()?.values().filter_map(|n| n.as_u64()).sum();
        (r["connections_total"] == made && ended == made && r["connections_active"] == 0).then_some(())
    })
}

/// Both histograms against a clock beside them. The backend misses the first SYN; the next comes after a second
/// (RFC 6298 §2).
#[test]
fn the_time_to_connect_and_the_age_at_the_end_are_what_a_clock_says() -> Result<()> {
    const MISSED: &str = "table ip t {}; delete table ip t; table ip t { chain i { type filter hook input priority 0; \
                          tcp flags & (syn | ack) == syn limit rate 1/hour burst 1 packets drop; }; }";
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let relayed = "[[route]]\nname = \"relayed\"\nlisten = [\"10.88.1.1:81\"]\nbackends = [\"10.88.2.2:80\"]\n\
                   engine = \"copy\"";
    let shunt = Shunt::start(&lab, &web(relayed))?;
    let talk = |port: u16| -> Result<f64> {
        let began = Instant::now();
        let mut stream = lab.client().connect(SocketAddr::from(([10, 88, 1, 1], port)))?;
        echo(&mut stream, b"at last")?;
        Ok(began.elapsed().as_secs_f64())
    };
    let told = |name: &str, route: &str, count: f64| {
        let (counts, sums) = (format!("{name}_count"), format!("{name}_sum"));
        let all = |m: &Metrics| {
            Some(m.value(&sums, &[("route", route)])).filter(|_| m.value(&counts, &[("route", route)]) == count)
        };
        wait_for(&format!("{name} of {count} at {route}"), Duration::from_secs(20), || {
            let metrics = shunt.metrics().ok()?;
            Some((all(&metrics)?, metrics))
        })
    };

    for (route, port) in [("web", 80), ("relayed", 81)] {
        lab.backend(1).sh(&format!("nft '{MISSED}'"))?;
        let began = Instant::now();
        let connected = talk(port)?;
        ensure!(connected > 0.9, "the SYN was not lost: {connected} s");
        shunt.wait_ended(route, &[("finished_client_first", 1)], SOON)?;
        let ended = began.elapsed().as_secs_f64();

        let (age, metrics) = told("shunt_connection_age_seconds", route, 1.0)?;
        ensure!((0.9..=ended).contains(&age), "{route}: {age} s old, ended within {ended} s");
        let observed = |name: &str, most| metrics.observed(name, &[("route", route)], most);
        let ages = [0.1, f64::INFINITY].map(|most| observed("shunt_connection_age_seconds", most));
        assert_eq!(ages, [Some(0.0), Some(1.0)], "{route}");
        if route == "web" {
            // The kernel forwards the SYN itself: nobody measures that.
            assert_eq!(observed("shunt_connect_seconds", f64::INFINITY), None);
            continue;
        }
        let (took, _) = told("shunt_connect_seconds", route, 1.0)?;
        ensure!((0.9..=connected).contains(&took), "connected in {took} s, answered after {connected} s");
        assert_eq!([0.2, 5.0].map(|most| observed("shunt_connect_seconds", most)), [Some(0.0), Some(1.0)]);
        let answered = talk(port)?;
        let more = told("shunt_connect_seconds", route, 2.0)?.0 - took;
        ensure!((0.0..=answered).contains(&more), "connected in {more} s, answered after {answered} s");
    }
    Ok(())
}
