//! Routes that share a port are told apart by the first bytes, which reach the backend as they were sent (A10, A11).

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt, Talk,
    dialog::{End, end_of, read_some, read_to_end},
    hello::Hello,
    kernel, patiently,
    relay::{Relay, on_each},
    scripted::{Behaviour, TcpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);
const JSON_LOG: &str = "[log]\nformat = \"json\"\n";

/// The shared port of an engine.
fn port(relay: Relay) -> SocketAddr {
    SocketAddr::from(([10, 88, 1, 1], 443 + relay as u16))
}

/// One route on the shared port of `relay`, to `backend` (`2` is backend 1's last octet).
fn route(relay: Relay, name: &str, backend: &str, rest: &str) -> String {
    format!(
        "[[route]]\nname = \"{name}-{engine}\"\nlisten = [\"{}\"]\nengine = \"{engine}\"\nbackends = [\"{backend}\"]\n{rest}\n",
        port(relay),
        engine = relay.engine(),
    )
}

fn sni(names: &str) -> String {
    format!("match = {{ sni = [{names}] }}\ntls = {{ mode = \"passthrough\" }}")
}

/// Sends a ClientHello; who answers, and that it got the very bytes.
fn who(lab: &Lab, relay: Relay, hello: &[u8]) -> Result<String> {
    let mut stream = lab.client().connect(port(relay))?;
    stream.write_all(hello)?;
    answer(&mut stream, hello)
}

/// The name a tagged server answers with, before it echoes `sent`.
fn answer(stream: &mut TcpStream, sent: &[u8]) -> Result<String> {
    let mut got = read_some(stream, 3 + sent.len())?;
    ensure!(got.len() == 3 + sent.len(), "only {} bytes came back, of {}", got.len(), 3 + sent.len());
    let echoed = got.split_off(3);
    ensure!(echoed == sent, "the backend got other bytes");
    Ok(String::from_utf8(got)?.trim_end().to_owned())
}

/// Servers b1, b2, b3 that say their name and echo.
fn tagged(lab: &Lab) -> Result<Vec<TcpServer>> {
    (1..=3).map(|n| TcpServer::start(lab.backend(n), 443, Behaviour::Tagged(format!("b{n}")))).collect()
}

#[test]
fn the_most_specific_match_wins_and_the_rest_goes_to_the_default() -> Result<()> {
    let lab = Lab::builder().backends(3).client_addresses(2).build()?;
    let _servers = tagged(&lab)?;
    let config: String = Relay::ENGINES
        .iter()
        .flat_map(|&relay| {
            [
                route(relay, "wild", "10.88.2.2:443", &sni("\"*.example.com\"")),
                route(relay, "shop", "10.88.2.3:443", &sni("\"shop.example.com\"")),
                route(relay, "default", "10.88.2.4:443", ""),
            ]
        })
        .collect();
    let shunt = Shunt::start(&lab, &config)?;
    on_each(&Relay::ENGINES, |relay| {
        let cases = [
            (Hello::to("shop.example.com"), "b2"),
            (Hello::to("SHOP.Example.COM"), "b2"),
            (Hello::to("www.example.com"), "b1"),
            (Hello::to("example.com"), "b3"),
            (Hello::to("other.example"), "b3"),
            (Hello::anonymous(), "b3"),
        ];
        for (hello, expected) in &cases {
            let got = who(&lab, relay, &hello.build()).with_context(|| format!("{hello:?}"))?;
            ensure!(got == *expected, "{hello:?} came to {got}, not {expected}");
        }
        // Not TLS at all.
        ensure!(who(&lab, relay, b"GET / HTTP/1.0\r\n\r\n")? == "b3", "plain bytes go to the default");
        for (name, count) in [("shop", 2), ("wild", 1), ("default", 4)] {
            let name = format!("{name}-{}", relay.engine());
            shunt.wait_route(&name, "counted", SOON, |r| {
                (r["connections_total"] == count && r["connections_active"] == 0).then_some(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn alpn_and_the_clients_address_choose_too() -> Result<()> {
    let lab = Lab::builder().backends(3).client_addresses(2).build()?;
    let _servers = tagged(&lab)?;
    let tls = "tls = { mode = \"passthrough\" }";
    let config: String = Relay::ENGINES
        .iter()
        .flat_map(|&relay| {
            let h2 = format!("match = {{ sni = [\"a.example\"], alpn = [\"h2\"] }}\n{tls}");
            let client = format!("match = {{ sni = [\"a.example\"], client = [\"10.88.1.3/32\"] }}\n{tls}");
            [
                route(relay, "any", "10.88.2.2:443", &sni("\"a.example\"")),
                route(relay, "h2", "10.88.2.3:443", &h2),
                route(relay, "client", "10.88.2.4:443", &client),
            ]
        })
        .collect();
    let _shunt = Shunt::start(&lab, &config)?;
    on_each(&Relay::ENGINES, |relay| {
        let plain = Hello::to("a.example");
        ensure!(who(&lab, relay, &plain.build())? == "b1");
        ensure!(who(&lab, relay, &plain.clone().alpn(&["http/1.1"]).build())? == "b1");
        ensure!(who(&lab, relay, &plain.clone().alpn(&["h2", "http/1.1"]).build())? == "b2");
        let mut other = lab.client().connect_from(([10, 88, 1, 3], 0), port(relay))?;
        other.write_all(&plain.build())?;
        let got = answer(&mut other, &plain.build())?;
        ensure!(got == "b3", "the client of that address came to {got}");
        Ok(())
    })
}

#[test]
fn hellos_of_every_shape_find_their_route_and_arrive_unchanged() -> Result<()> {
    let lab = Lab::builder().backends(3).build()?;
    let _servers = tagged(&lab)?;
    let config: String = Relay::ENGINES
        .iter()
        .flat_map(|&relay| {
            [
                route(relay, "default", "10.88.2.2:443", ""),
                route(relay, "shop", "10.88.2.3:443", &sni("\"shop.example.com\"")),
            ]
        })
        .collect();
    let _shunt = Shunt::start(&lab, &config)?;
    let hello = Hello::to("shop.example.com").alpn(&["h2", "http/1.1"]);
    let post_quantum = hello.clone().post_quantum().build();
    on_each(&Relay::ENGINES, |relay| {
        let shapes = [
            ("16 KiB", hello.clone().padding(15_800).build()),
            ("post-quantum", post_quantum.clone()),
            ("many records", hello.clone().in_records_of(100).build()),
            ("post-quantum in two records", hello.clone().post_quantum().in_records_of(1200).build()),
            ("with early data behind it", [hello.build(), vec![0x17; 30_000]].concat()),
        ];
        for (shape, bytes) in &shapes {
            let got = who(&lab, relay, bytes).with_context(|| *shape)?;
            ensure!(got == "b2", "{shape} came to {got}");
        }
        // In pieces, each a segment of its own.
        for (shape, piece) in [("1-byte writes", 1), ("two segments", post_quantum.len() / 2 + 1)] {
            let mut stream = lab.client().connect(port(relay))?;
            stream.set_nodelay(true)?;
            for part in post_quantum.chunks(piece) {
                stream.write_all(part)?;
                if piece > 1 {
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            let got = answer(&mut stream, &post_quantum).with_context(|| shape)?;
            ensure!(got == "b2", "{shape} came to {got}");
        }
        Ok(())
    })
}

#[test]
fn a_stalled_hello_ends_in_time_and_holds_little_memory() -> Result<()> {
    const CLIENTS: usize = 1200;
    let lab = Lab::new()?;
    let config: String = Relay::ENGINES
        .iter()
        .map(|&relay| {
            route(
                relay,
                "shop",
                "10.88.2.2:443",
                &format!("{}\ntimeouts = {{ initial_data = \"2s\" }}", sni("\"a.example\"")),
            )
        })
        .collect();
    let shunt = Shunt::start(&lab, &config)?;
    let before = kernel::holdings(shunt.pid()?)?;
    // 15 KiB are announced and 12 KB come.
    let hello = Hello::to("a.example").padding(15_000).build();
    let stalled: Vec<TcpStream> = Relay::ENGINES
        .iter()
        .flat_map(|&relay| (0..CLIENTS / Relay::ENGINES.len()).map(move |_| relay))
        .map(|relay| {
            let mut stream = lab.client().connect(port(relay))?;
            stream.write_all(&hello[..12_000])?;
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    let mut most = before;
    let waited = wait_until("each has ended for it", Duration::from_secs(15), || {
        let now = kernel::holdings(shunt.pid().unwrap_or_default()).unwrap_or(before);
        most.memory = most.memory.max(now.memory);
        let ended = |m: shunt_lab::Metrics| m.value("shunt_terminations_total", &[("reason", "initial_data_timeout")]);
        shunt.metrics().is_ok_and(|m| ended(m) == CLIENTS as f64)
    });
    waited
        .with_context(|| format!("{:?}", Relay::ENGINES.map(|r| shunt.terminations(&format!("shop-{}", r.route())))))?;
    let each = (most.memory - before.memory) / CLIENTS as u64;
    println!("{CLIENTS} stalled hellos: {each} bytes each at most");
    ensure!(each < 80 << 10, "{each} bytes for each stalled hello");
    for mut stream in stalled {
        end_of(&mut stream, AT_ONCE)?;
    }
    Ok(())
}

#[test]
fn bytes_that_no_route_wants_are_told_so_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let config: String = Relay::ENGINES
        .iter()
        .flat_map(|&relay| {
            ["shop", "api"].map(|name| route(relay, name, "10.88.2.2:443", &sni(&format!("\"{name}.example.com\""))))
        })
        .collect();
    let shunt = Shunt::start(&lab, &format!("{JSON_LOG}{config}"))?;
    on_each(&Relay::ENGINES, |relay| {
        for plain in [
            &b"GET / HTTP/1.0\r\n\r\n"[..],
            b"SSH-2.0-OpenSSH\r\n",
            &[0; 100],
            &[0x16, 3, 1, 0xff, 0xff, 7, 7, 7, 7, 7],
        ] {
            let mut stream = lab.client().connect(port(relay))?;
            let client = stream.local_addr()?.to_string();
            stream.write_all(plain)?;
            let (told, _) = read_to_end(&mut stream, AT_ONCE).with_context(|| format!("{plain:?}"))?;
            // Who began a TLS record may be told in TLS.
            ensure!(told.is_empty() || plain[0] == 0x16 && told[0] == 0x15, "{plain:?} was told {told:?}");
            let line = shunt.wait_access_line(&client, SOON)?;
            let reason = if plain[0] == 0x16 { "tls_handshake_failed" } else { "no_route" };
            ensure!(line["reason"] == reason && line["route"] == "-", "{line}");
        }
        for hello in [Hello::to("other.example"), Hello::anonymous()] {
            let mut stream = lab.client().connect(port(relay))?;
            let client = stream.local_addr()?.to_string();
            stream.write_all(&hello.build())?;
            let (alert, _) = read_to_end(&mut stream, AT_ONCE)?;
            // Fatal, unrecognized_name (RFC 6066 §3), in a record of its own.
            ensure!(alert.len() == 7 && alert[..2] == [0x15, 3] && alert[3..] == [0, 2, 2, 112], "alert {alert:?}");
            let line = shunt.wait_access_line(&client, SOON)?;
            ensure!(line["reason"] == "no_route" && line["backend"] == "-" || line["backend"].is_null(), "{line}");
        }
        Ok(())
    })?;
    let lost = shunt.metrics()?.value("shunt_terminations_total", &[("reason", "no_route")]);
    let expected = 5 * Relay::ENGINES.len();
    ensure!(lost == expected as f64, "no_route: {lost} of {expected}");
    Ok(())
}

#[test]
fn a_server_that_speaks_first_is_heard_where_nothing_needs_to_be_read() -> Result<()> {
    let lab = Lab::builder().backends(3).build()?;
    let _servers = tagged(&lab)?;
    let config: String = Relay::ENGINES.iter().map(|&relay| route(relay, "smtp", "10.88.2.2:443", "")).collect();
    let _shunt = Shunt::start(&lab, &config)?;
    on_each(&Relay::ENGINES, |relay| {
        let mut stream = lab.client().connect(port(relay))?;
        ensure!(read_some(&mut stream, 3)? == b"b1\n");
        Ok(())
    })
}

#[test]
fn tls_plain_and_keep_alive_clients_on_one_port_each_get_their_own() -> Result<()> {
    let lab = Lab::new()?;
    let names = ["shop.example.com", "api.example.com"];
    let certificate = lab.certificate(&names)?;
    let (cert, key) = (certificate.cert.display(), certificate.key.display());
    let http = format!(
        "http {{ access_log off; ssl_certificate {cert}; ssl_certificate_key {key}; ssl_protocols TLSv1.2 TLSv1.3;\n\
         server {{ listen 443 ssl http2; location / {{ return 200 \"tls $ssl_server_name $request_uri $server_protocol\"; }} }}\n\
         server {{ listen 80; location / {{ return 200 \"plain $request_uri\"; }} }} }}"
    );
    let _nginx = lab.nginx_with(lab.backend(1), &http, 443)?;
    let config: String = Relay::ENGINES
        .iter()
        .flat_map(|&relay| {
            [route(relay, "tls", "10.88.2.2:443", &sni("\"*.example.com\"")), route(relay, "plain", "10.88.2.2:80", "")]
        })
        .collect();
    let shunt = Shunt::start(&lab, &config)?;
    on_each(&Relay::ENGINES, |relay| {
        let at = port(relay);
        let curl = |arguments: String| lab.client().sh(&format!("curl -sS --max-time 10 {arguments}"));
        for round in 0..5 {
            for (name, version, protocol) in [(names[0], "--http2", "HTTP/2.0"), (names[1], "--http1.1", "HTTP/1.1")] {
                // Several requests on one connection.
                let url = format!("https://{name}:{}", at.port());
                let args =
                    format!("--cacert {cert} {version} --connect-to ::{}:{} {url}/{round}[a-c]", at.ip(), at.port());
                let got = curl(args)?;
                let expected: String = ["a", "b", "c"].map(|n| format!("tls {name} /{round}{n} {protocol}")).concat();
                ensure!(got == expected, "{got:?}");
            }
            ensure!(
                curl(format!("http://{at}/{round}[a-c]"))? == format!("plain /{round}aplain /{round}bplain /{round}c")
            );
        }
        for (name, count) in [("tls", 10), ("plain", 5)] {
            let name = format!("{name}-{}", relay.engine());
            shunt.wait_route(&name, "each connection once, none left", SOON, |r| {
                (r["connections_active"] == 0 && r["connections_total"] == count).then_some(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_real_tls_server_answers_a_real_client_and_a_post_quantum_hello() -> Result<()> {
    let lab = Lab::new()?;
    let certificate = lab.certificate(&["shop.example.com"])?;
    let (cert, key) = (certificate.cert.to_string_lossy(), certificate.key.to_string_lossy());
    let _server = lab.serve(
        lab.backend(1),
        "s_server",
        "openssl",
        &["s_server", "-accept", "443", "-cert", &cert, "-key", &key, "-rev", "-quiet"],
        443,
    )?;
    let config: String = Relay::ENGINES
        .iter()
        .map(|&relay| route(relay, "shop", "10.88.2.2:443", &sni("\"shop.example.com\"")))
        .collect();
    let _shunt = Shunt::start(&lab, &config)?;
    // It serves one client at a time.
    for relay in Relay::ENGINES {
        let mut command = lab.client().command("openssl");
        command.args(["s_client", "-connect", &port(relay).to_string(), "-servername", "shop.example.com"]);
        command.args(["-CAfile", &cert, "-verify_return_error", "-quiet"]);
        let mut client = Talk::start(command)?;
        client.say("hello")?;
        let said = client.hear(SOON)?;
        ensure!(said == "olleh", "the server's answer was {said:?}");
        drop(client);
        let mut stream = lab.client().connect(port(relay))?;
        stream.write_all(&Hello::to("shop.example.com").post_quantum().build())?;
        let answer = read_some(&mut stream, 6)?;
        ensure!(answer[..3] == [0x16, 3, 3] && answer[5] == 2, "no ServerHello: {answer:?}");
    }
    Ok(())
}

#[test]
fn a_client_that_leaves_in_the_middle_of_its_hello_leaves_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let config: String =
        Relay::ENGINES.iter().map(|&relay| route(relay, "shop", "10.88.2.2:443", &sni("\"a.example\""))).collect();
    let shunt = Shunt::start(&lab, &format!("{JSON_LOG}{config}"))?;
    on_each(&Relay::ENGINES, |relay| {
        let hello = Hello::to("a.example").build();
        for finishes in [true, false] {
            let mut stream = lab.client().connect(port(relay))?;
            let client = stream.local_addr()?.to_string();
            stream.write_all(&hello[..hello.len() / 2])?;
            if finishes {
                stream.shutdown(std::net::Shutdown::Write)?;
                let end = end_of(&mut stream, AT_ONCE)?;
                println!("{relay:?}: half a hello and FIN ends with {end:?}");
            } else {
                shunt_lab::dialog::reset(stream)?;
            }
            let line = shunt.wait_access_line(&client, AT_ONCE)?;
            println!("{relay:?}: {}", line["reason"]);
            ensure!(finishes || line["reason"] == "reset_by_client", "{line}");
        }
        Ok(())
    })
}

#[test]
fn the_backend_gets_all_of_what_came_while_it_was_dialled() -> Result<()> {
    const BYTES: usize = 300_000;
    let lab = Lab::builder().backends(3).build()?;
    let _servers = tagged(&lab)?;
    let config: String =
        Relay::ENGINES.iter().map(|&relay| route(relay, "shop", "10.88.2.3:443", &sni("\"a.example\""))).collect();
    let _shunt = Shunt::start(&lab, &config)?;
    on_each(&Relay::ENGINES, |relay| {
        let mut sent = Hello::to("a.example").build();
        let mut pattern = vec![0; BYTES];
        shunt_lab::pattern::Pattern::new(8).fill(&mut pattern);
        sent.extend(pattern);
        let mut stream = lab.client().connect(port(relay))?;
        let mut writer = stream.try_clone()?;
        let all = sent.clone();
        let sender = std::thread::spawn(move || writer.write_all(&all));
        let mut got = vec![0; 3 + sent.len()];
        stream.set_read_timeout(Some(patiently(SOON)))?;
        match stream.read_exact(&mut got) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => anyhow::bail!("bytes are missing"),
            Err(error) => return Err(error.into()),
        }
        sender.join().expect("sender")?;
        ensure!(got[..3] == *b"b2\n" && got[3..] == sent, "other bytes");
        stream.shutdown(std::net::Shutdown::Write)?;
        ensure!(end_of(&mut stream, AT_ONCE)? == End::Finished);
        Ok(())
    })
}
