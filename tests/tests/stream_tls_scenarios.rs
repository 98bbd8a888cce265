//! What must be shown of TLS that ends in the daemon, beyond what every relay has to show: A10, A11, D3.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt, Stream,
    dialog::{End, echo, end_of, read_to_end},
    kernel,
    pki::Pki,
    relay::{Relay, on_each, servers_with_tls},
    scripted::{Behaviour, TcpServer},
    tls::{self, NAME, Opening, Versions},
    wait_until,
};

const SOON: Duration = Duration::from_secs(10);
const LATE: Duration = Duration::from_secs(2);

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 88, 1, 1], port))
}

/// What a client of A10 speaks on the port that all of them share.
#[derive(Debug, Clone, Copy)]
enum Speaks {
    /// TLS that ends in the daemon.
    Ended,
    /// TLS that the daemon passes on.
    Passed,
    Plain,
}

impl Speaks {
    const ALL: [Self; 3] = [Self::Ended, Self::Passed, Self::Plain];

    fn connect(self, lab: &Lab) -> Result<Stream> {
        let tcp = lab.client().connect(at(443))?;
        let name = match self {
            Self::Plain => return Ok(tcp.into()),
            Self::Ended => "ended.example",
            Self::Passed => NAME,
        };
        Ok(tls::connect(&lab.tls()?.client, name, tcp)?)
    }
}

/// Bytes that only client `nth` sends.
fn own(speaks: Speaks, nth: usize, round: usize) -> Vec<u8> {
    format!("{speaks:?} {nth} {round};").repeat(1 + (nth * 131 + round * 17) % 1500).into_bytes()
}

#[test]
fn tls_plain_and_keep_alive_clients_of_one_port_each_get_their_own_bytes_back() -> Result<()> {
    const CLIENTS: usize = 60;
    let lab = Lab::new()?;
    let material = lab.tls()?;
    material.pki.issue("ended", "ec", "ended.example")?;
    let _plain = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let _tls = TcpServer::start_tls(lab.backend(1), 443, Behaviour::Echo, material.acceptor.clone())?;
    let route = |name: &str, backend: u16, rest: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:443\"]\nbackends = [\"10.88.2.2:{backend}\"]\n{rest}\n"
        )
    };
    let ends = material.pki.terminate(&["ended"], "");
    let config = [
        route("ended", 80, &format!("match = {{ sni = [\"ended.example\"] }}\n{ends}")),
        route("passed", 443, &format!("match = {{ sni = [\"{NAME}\"] }}\ntls = {{ mode = \"passthrough\" }}")),
        route("plain", 80, ""),
    ];
    let shunt = Shunt::start(&lab, &config.concat())?;
    let before = kernel::holdings(shunt.pid()?)?;
    let one = |speaks: Speaks, nth: usize| -> Result<()> {
        // Every third stays for many rounds, the others come again for each.
        let (rounds, again) = if nth.is_multiple_of(3) { (12, false) } else { (4, true) };
        let mut stream = speaks.connect(&lab)?;
        for round in 0..rounds {
            if again && round > 0 {
                stream = speaks.connect(&lab)?;
            }
            echo(&mut stream, &own(speaks, nth, round))?;
        }
        stream.shutdown(Shutdown::Write)?;
        ensure!(end_of(&mut stream, SOON)? == End::Finished);
        Ok(())
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .flat_map(|nth| Speaks::ALL.map(|speaks| (speaks, nth)))
            .map(|(speaks, nth)| (speaks, nth, scope.spawn(move || one(speaks, nth))))
            .collect();
        clients.into_iter().try_for_each(|(speaks, nth, client)| {
            client.join().expect("client").with_context(|| format!("{speaks:?} {nth}"))
        })
    })?;
    let connections = (CLIENTS / 3 + CLIENTS / 3 * 2 * 4) as u64;
    for name in ["ended", "passed", "plain"] {
        shunt.wait_route(name, "all of them ended", SOON, |r| {
            (r["connections_active"] == 0 && r["connections_total"] == connections).then_some(())
        })?;
        let reasons = shunt.terminations(name)?;
        ensure!(reasons.keys().all(|r| r.starts_with("finished_") || r == "reset_by_client"), "{name}: {reasons:?}");
    }
    wait_until("sockets as before", SOON, || {
        kernel::holdings(shunt.pid().unwrap_or_default()).is_ok_and(|now| now.sockets <= before.sockets)
    })
}

/// `hello`, in pieces of so many bytes, each in a segment of its own.
fn in_pieces(stream: &mut TcpStream, hello: &[u8], size: usize) -> Result<()> {
    stream.set_nodelay(true)?;
    hello.chunks(size).try_for_each(|piece| stream.write_all(piece)).context("writing the hello")
}

#[test]
fn hellos_of_every_shape_lead_to_a_handshake() -> Result<()> {
    let lab = Lab::new()?;
    let material = lab.tls()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    let with_protocols = |count: usize| -> Result<Arc<_>> {
        let mut config = tls::client_config(&material.pki, Versions::Both, None)?;
        config.alpn_protocols = (0..count).map(|n| vec![b'a' + n as u8 % 26; 250]).collect();
        Ok(Arc::new(config))
    };
    let old = Arc::new(tls::client_config(&material.pki, Versions::Only12, None)?);
    let (small, large) = (with_protocols(0)?, with_protocols(58)?);
    on_each(&Relay::TLS, |relay| {
        for (what, config, pieces) in [
            ("whole", &small, usize::MAX),
            ("byte by byte", &small, 1),
            ("byte by byte, TLS 1.2", &old, 1),
            ("post-quantum in two segments", &small, 1200),
            ("16 KiB", &large, usize::MAX),
            ("16 KiB in pieces", &large, 1000),
        ] {
            let opening = Opening::new(config, NAME)?;
            println!("{relay:?}: {what}: {} bytes", opening.hello.len());
            ensure!(what != "post-quantum in two segments" || opening.hello.len() > 1200, "{}", opening.hello.len());
            ensure!(!what.starts_with("16 KiB") || opening.hello.len() > 16_000, "{}", opening.hello.len());
            let mut tcp = lab.client().connect(relay.listen())?;
            in_pieces(&mut tcp, &opening.hello, pieces)?;
            let mut stream = opening.go_on(tcp).with_context(|| what.to_owned())?;
            echo(&mut stream, b"hello").with_context(|| what.to_owned())?;
        }
        shunt.wait_ended(relay.route(), &[("finished_client_first", 6)], SOON)
    })
}

#[test]
fn a_stalled_hello_ends_in_time_and_many_hold_little_memory() -> Result<()> {
    const STALLED: usize = 1000;
    let lab = Lab::new()?;
    let mut config = tls::client_config(&lab.tls()?.pki, Versions::Both, None)?;
    config.alpn_protocols = vec![vec![b'a'; 250]; 56];
    let hello = Opening::new(&Arc::new(config), NAME)?.hello;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "timeouts = { initial_data = \"2s\" }")?)?;
    // A first of each kind: what is there for all is there.
    on_each(&Relay::TLS, |relay| relay.begin(&lab, &shunt).map(drop))?;
    let before = kernel::holdings(shunt.pid()?)?;
    let began = Instant::now();
    let mut stalled = Vec::new();
    for nth in 0..STALLED {
        let mut tcp = lab.client().connect(Relay::TLS[nth % 2].listen())?;
        // Nothing, a byte, almost all.
        tcp.write_all(&hello[..[0, 1, hello.len() / 2, hello.len() - 1][nth % 4]])?;
        stalled.push(tcp);
    }
    let opened = began.elapsed();
    let most = kernel::holdings(shunt.pid()?)?;
    let each = most.memory.saturating_sub(before.memory) / STALLED as u64;
    println!("{STALLED} stalled hellos of up to {} bytes: {each} bytes each", hello.len());
    ensure!(each < 24 << 10, "{each} bytes each");
    // The others are served meanwhile.
    on_each(&Relay::TLS, |relay| relay.begin(&lab, &shunt).map(drop))?;
    for stream in &mut stalled {
        read_to_end(stream, Duration::from_secs(2) + opened + LATE).context("a stalled one ends")?;
    }
    ensure!(began.elapsed() > Duration::from_millis(1850), "too soon: {:?}", began.elapsed());
    wait_until("each has ended for it", SOON, || {
        let reason = [("reason", "initial_data_timeout")];
        shunt.metrics().is_ok_and(|m| m.value("shunt_terminations_total", &reason) == STALLED as f64)
    })
}

/// Routes on which every way a handshake can end can be had.
fn picky(lab: &Lab) -> Result<String> {
    let pki = &lab.tls()?.pki;
    let mutual = pki.terminate(&["web"], &format!("client_ca = \"{}\"", pki.file("ca.pem")));
    let new = pki.terminate(&["web"], "min_version = \"1.3\"");
    let stranger = pki.again("nobody.example");
    let routes =
        [("mutual", 701, mutual), ("new", 702, new), ("stranger", 703, pki.terminate(&["web"], "") + &stranger)];
    let route = |(name, port, rest): (&str, u16, String)| {
        let backend = if name == "stranger" { Relay::Again } else { Relay::Terminated }.backend_port();
        format!(
            "[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:{port}\"]\nbackends = [\"10.88.2.2:{backend}\"]\n{rest}\n"
        )
    };
    Ok(routes.map(route).concat())
}

#[test]
fn each_way_a_handshake_can_end_has_its_own_count() -> Result<()> {
    let lab = Lab::new()?;
    let material = lab.tls()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let timeouts = "timeouts = { tls_handshake = \"1s\" }";
    let config = format!("{}{}", Relay::routes_with_tls(&lab, timeouts)?, picky(&lab)?);
    let shunt = Shunt::start(&lab, &config)?;
    let counted = |route: &str, result: &str| {
        let labels = [("route", route), ("result", result)];
        shunt.metrics().map(|m| m.value("shunt_tls_handshakes_total", &labels)).unwrap_or(-1.0)
    };
    let wait_counted = |route: &str, result: &str, n: f64| {
        wait_until(&format!("{route}: {n} × {result}"), SOON, || counted(route, result) == n)
    };
    on_each(&Relay::TLS, |relay| {
        let (route, to) = (relay.route(), relay.listen());
        let config = Arc::new(tls::client_config(&material.pki, Versions::Both, None)?);
        for nth in 0..2 {
            let mut stream = tls::connect(&config, NAME, lab.client().connect(to)?)?;
            echo(&mut stream, b"a ticket comes with it")?;
            drop(stream);
            wait_counted(route, ["full", "resumed"][nth], 1.0)?;
        }
        // Leaves behind its hello.
        let opening = Opening::new(&config, NAME)?;
        let mut tcp = lab.client().connect(to)?;
        tcp.write_all(&opening.hello)?;
        drop(tcp);
        wait_counted(route, "closed", 1.0)?;
        // Says nothing more behind its hello.
        let mut silent = lab.client().connect(to)?;
        silent.write_all(&opening.hello)?;
        wait_counted(route, "timeout", 1.0)?;
        // Says something else.
        let mut other = lab.client().connect(to)?;
        other.write_all(&opening.hello)?;
        other.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
        wait_counted(route, "failed", 1.0)?;
        // Does not believe the certificate.
        let strange = Pki::named(&lab, &format!("strange-{route}"))?;
        let config = Arc::new(tls::client_config(&strange, Versions::Both, None)?);
        ensure!(tls::connect(&config, NAME, lab.client().connect(to)?).is_err(), "it believes anybody");
        wait_counted(route, "alert", 1.0)?;
        shunt.wait_route(route, "nothing is left", SOON, |r| (r["connections_active"] == 0).then_some(()))
    })?;
    ensure!(counted("again", "backend_full") + counted("again", "backend_resumed") == 2.0, "once for each client");
    // TLS 1.3 clients learn of it when they read.
    let fails = |config, port: u16| -> Result<()> {
        let stream = tls::connect(&Arc::new(config), NAME, lab.client().connect(at(port))?);
        let end = stream.and_then(|mut stream| stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])));
        ensure!(end.is_err(), "{port}: it was served");
        Ok(())
    };
    let pki = &material.pki;
    fails(tls::client_config(pki, Versions::Both, None)?, 701)?;
    wait_counted("mutual", "no_certificate", 1.0)?;
    let strange = Pki::named(&lab, "strange")?;
    strange.issue("mallory", "ec", "mallory")?;
    fails(tls::client_config(pki, Versions::Both, Some((&strange, "mallory")))?, 701)?;
    wait_counted("mutual", "bad_certificate", 1.0)?;
    fails(tls::client_config(pki, Versions::Only12, None)?, 702)?;
    wait_counted("new", "incompatible", 1.0)?;
    fails(tls::client_config(pki, Versions::Both, None)?, 703)?;
    wait_counted("stranger", "backend_bad_certificate", 1.0)?;
    for (route, ended) in [("mutual", 2), ("new", 1), ("stranger", 1)] {
        shunt.wait_ended(route, &[("tls_handshake_failed", ended)], SOON)?;
    }
    Ok(())
}

#[test]
fn the_counters_of_a_whole_tls_life_rise_and_its_active_ones_return_to_zero() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::TLS, |relay| {
        let route = relay.route();
        let value = |name: &str, more: (&str, &str)| {
            shunt.metrics().map(|m| m.value(name, &[("route", route), more])).unwrap_or(-1.0)
        };
        let seen = |handshakes: f64, active: f64, bytes: f64| {
            let what = format!("{route}: {handshakes} handshakes, {active} active, {bytes} bytes");
            wait_until(&what, SOON, || {
                let backend = if relay == Relay::Again { handshakes } else { 0.0 };
                value("shunt_tls_handshakes_total", ("result", "full")) == handshakes
                    && value("shunt_tls_handshakes_total", ("result", "backend_full")) == backend
                    && value("shunt_connections_active", ("engine", "copy")) == active
                    && value("shunt_bytes_total", ("direction", "in")) == bytes
                    && value("shunt_bytes_total", ("direction", "out")) == bytes
                    && shunt.route(route).is_ok_and(|r| r["connections_active"] == active)
            })
        };
        seen(0.0, 0.0, 0.0)?;
        let mut stream = relay.open(&lab)?;
        seen(1.0, 1.0, 0.0)?;
        for n in 1..=3 {
            echo(&mut stream, &vec![n; 100_000])?;
            // The plaintext, not the records.
            seen(1.0, 1.0, 100_000.0 * f64::from(n))?;
        }
        stream.shutdown(Shutdown::Write)?;
        ensure!(end_of(&mut stream, SOON)? == End::Finished);
        seen(1.0, 0.0, 300_000.0)?;
        shunt.wait_ended(route, &[("finished_client_first", 1)], SOON)
    })
}
