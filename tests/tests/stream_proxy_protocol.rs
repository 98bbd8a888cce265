//! Who the client is, when another proxy says it: accepted only from where it is trusted, and told on to the next (A12).

use std::{
    io::Write,
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    dialog::{echo, end_of, read_some, read_to_end},
    hello::Hello,
    proxy_header::{Said, read, v1, v2, v2_local, v2_raw},
    relay::{Relay, on_each, on_every_relay, servers},
    scripted::{Behaviour, TcpServer},
};

const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);
const JSON_LOG: &str = "[log]\nformat = \"json\"\n";
/// The client's second address is a proxy that is believed.
const TRUSTING: &str = "proxy_protocol = { accept_from = [\"10.88.1.3/32\"] }";

fn trusted() -> SocketAddr {
    SocketAddr::from(([10, 88, 1, 3], 0))
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn lab() -> Result<Lab> {
    Lab::builder().client_addresses(3).build()
}

#[test]
fn a_trusted_header_of_either_version_names_the_client() -> Result<()> {
    let lab = lab()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &format!("{JSON_LOG}{}", Relay::routes(TRUSTING)))?;
    let (four, six) = (address("203.0.113.7:4242"), address("[2001:db8::7]:4343"));
    let (to4, to6) = (address("198.51.100.1:443"), address("[2001:db8::1]:443"));
    let tlvs: &[(u8, &[u8])] = &[(1, b"h2"), (2, b"shop.example.com"), (4, &[0; 200]), (0xe0, b"private")];
    let headers = [
        ("v1", v1(four, to4), Some(four)),
        ("v1 of IPv6", v1(six, to6), Some(six)),
        ("v1 UNKNOWN", b"PROXY UNKNOWN\r\n".to_vec(), None),
        ("v1 UNKNOWN with more", b"PROXY UNKNOWN ffff:f::f ffff:f::f 65535 65535\r\n".to_vec(), None),
        ("v2", v2(four, to4, &[]), Some(four)),
        ("v2 of IPv6", v2(six, to6, &[]), Some(six)),
        ("v2 with TLVs", v2(four, to4, tlvs), Some(four)),
        ("v2 LOCAL", v2_local(), None),
        ("v2 LOCAL with more", v2_raw(0x20, 0x11, &[1; 40]), None),
    ];
    on_every_relay(|relay| {
        for (what, header, client) in &headers {
            let mut stream = lab.client().connect_from(trusted(), relay.listen())?;
            let own = stream.local_addr()?;
            let client = client.unwrap_or(own);
            // The header and the first bytes in one segment.
            stream.write_all(&[header.as_slice(), b"hello"].concat())?;
            ensure!(read_some(&mut stream, 5)? == b"hello", "{what}: the payload begins after the header");
            let list = shunt.connections(relay.route())?;
            ensure!(list.len() == 1 && list[0]["client"] == client.to_string(), "{what}: listed {list:?}");
            relay_more(relay, &mut stream)?;
            drop(stream);
            let line = shunt.wait_access_line(&client.to_string(), SOON).with_context(|| *what)?;
            ensure!(line["reason"] == "finished_client_first", "{what}: {line}");
            shunt.wait_route(relay.route(), "closed", SOON, |r| (r["connections_active"] == 0).then_some(()))?;
        }
        let bytes = shunt.route(relay.route())?;
        let expected = headers.len() as u64 * (5 + more_bytes(relay));
        ensure!(bytes["bytes_in"] == expected && bytes["bytes_out"] == expected, "headers are no payload: {bytes}");
        Ok(())
    })
}

fn more_bytes(relay: Relay) -> u64 {
    if relay == Relay::Promoted { 8 << 20 } else { 0 }
}

fn relay_more(relay: Relay, stream: &mut TcpStream) -> Result<()> {
    (0..more_bytes(relay) >> 16).try_for_each(|_| echo(stream, &[3; 1 << 16]))
}

#[test]
fn a_header_may_come_in_pieces_and_before_a_client_hello() -> Result<()> {
    let lab = lab()?;
    let _server = TcpServer::start(lab.backend(1), 443, Behaviour::Echo)?;
    let config: String = Relay::ENGINES
        .iter()
        .map(|relay| {
            format!(
                "[[route]]\nname = \"{}\"\nlisten = [\"{}\"]\nengine = \"{}\"\nbackends = [\"10.88.2.2:443\"]\n\
                 match = {{ sni = [\"a.example\"] }}\ntls = {{ mode = \"passthrough\" }}\n{TRUSTING}\n",
                relay.route(),
                relay.listen(),
                relay.engine()
            )
        })
        .collect();
    let _shunt = Shunt::start(&lab, &config)?;
    let (client, to) = (address("203.0.113.7:4242"), address("198.51.100.1:443"));
    on_each(&Relay::ENGINES, |relay| {
        for header in [v1(client, to), v2(client, to, &[(4, &[0; 300])])] {
            let hello = Hello::to("a.example").post_quantum().build();
            let mut stream = lab.client().connect_from(trusted(), relay.listen())?;
            stream.set_nodelay(true)?;
            for byte in [header.as_slice(), &hello].concat().chunks(1) {
                stream.write_all(byte)?;
            }
            ensure!(read_some(&mut stream, hello.len())? == hello, "the backend got other bytes");
        }
        Ok(())
    })
}

#[test]
fn a_malformed_header_from_a_trusted_peer_is_refused_and_counted() -> Result<()> {
    let lab = lab()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes(&format!("{TRUSTING}\ntimeouts = {{ initial_data = \"30s\" }}")))?;
    let good = v2(address("203.0.113.7:4242"), address("198.51.100.1:443"), &[]);
    let mut bad: Vec<(&str, Vec<u8>)> = vec![
        ("no header", b"GET / HTTP/1.0\r\n\r\n".to_vec()),
        ("a ClientHello", Hello::to("a.example").build()),
        ("half a word", b"PROXX".to_vec()),
        ("lower case", b"proxy TCP4 203.0.113.7 198.51.100.1 4242 443\r\n".to_vec()),
        ("no such family", b"PROXY UDP4 203.0.113.7 198.51.100.1 4242 443\r\n".to_vec()),
        ("port too large", b"PROXY TCP4 203.0.113.7 198.51.100.1 70000 443\r\n".to_vec()),
        ("port missing", b"PROXY TCP4 203.0.113.7 198.51.100.1 4242\r\n".to_vec()),
        ("address of the other family", b"PROXY TCP4 2001:db8::7 198.51.100.1 4242 443\r\n".to_vec()),
        ("two blanks", b"PROXY  TCP4 203.0.113.7 198.51.100.1 4242 443\r\n".to_vec()),
        ("LF alone", b"PROXY TCP4 203.0.113.7 198.51.100.1 4242 443\n".to_vec()),
        ("a line too long", [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200], b"\r\n"].concat()),
        ("no end", [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 2000]].concat()),
        ("version 1 in version 2", v2_raw(0x11, 0x11, &[0; 12])),
        ("no such command", v2_raw(0x2f, 0x11, &[0; 12])),
        ("too short for its family", v2_raw(0x21, 0x11, &[0; 4])),
        ("too short for IPv6", v2_raw(0x21, 0x21, &[0; 12])),
        ("65535 bytes of nothing", v2_raw(0x21, 0x11, &vec![0xff; 65_535])),
    ];
    let mut flipped = good;
    flipped[5] ^= 1;
    bad.push(("signature with a flipped bit", flipped));
    on_each(&Relay::ENGINES, |relay| {
        for (what, header) in &bad {
            let mut stream = lab.client().connect_from(trusted(), relay.listen())?;
            // A long one may be refused before its last byte.
            let _ = stream.write_all(header);
            end_of(&mut stream, AT_ONCE).with_context(|| *what)?;
        }
        // From one who finishes before the header does.
        let mut stream = lab.client().connect_from(trusted(), relay.listen())?;
        stream.write_all(b"PROXY TCP4 203")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        end_of(&mut stream, AT_ONCE).context("half a header and FIN")?;
        Ok(())
    })?;
    let invalid = |name| {
        let metrics = shunt.metrics()?;
        anyhow::Ok(metrics.value(name, &[("reason", "proxy_header_invalid")]))
    };
    let counted = invalid("shunt_terminations_total")?;
    let each = Relay::ENGINES.len() * bad.len();
    println!("{counted} refused for their header, of {each} and 2 that finished half-way");
    ensure!(counted as usize >= each && counted as usize <= each + 2, "{counted} of {each}");
    ensure!(shunt.cli_json(&["status"])?["connections_active"] == 0);
    Ok(())
}

#[test]
fn a_header_from_anybody_else_is_just_bytes() -> Result<()> {
    let lab = lab()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes(&format!("{TRUSTING}\ndeny = [\"203.0.113.0/24\"]")))?;
    on_each(&Relay::ENGINES, |relay| {
        for header in [
            v1(address("203.0.113.7:4242"), address("198.51.100.1:443")),
            v2(address("192.0.2.1:4242"), address("198.51.100.1:443"), &[]),
        ] {
            let mut stream = lab.client().connect(relay.listen())?;
            stream.write_all(&header)?;
            ensure!(read_some(&mut stream, header.len())? == header, "the backend gets it as it is");
            let listed = shunt.connection_of(&stream)?.context("listed under its own address")?;
            ensure!(listed["bytes_in"] == header.len(), "{listed}");
        }
        Ok(())
    })
}

#[test]
fn the_header_decides_who_may_and_how_often() -> Result<()> {
    let lab = lab()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let rest = format!(
        "{TRUSTING}\nallow = [\"203.0.113.0/24\"]\ndeny = [\"203.0.113.66\"]\nlimits = {{ connections_per_client = 2 }}"
    );
    let shunt = Shunt::start(&lab, &Relay::routes(&rest))?;
    let to = address("198.51.100.1:443");
    on_each(&Relay::ENGINES, |relay| {
        let connect = |client: &str| -> Result<TcpStream> {
            let mut stream = lab.client().connect_from(trusted(), relay.listen())?;
            stream.write_all(&v2(address(client), to, &[]))?;
            Ok(stream)
        };
        end_of(&mut connect("203.0.113.66:1")?, AT_ONCE).context("denied")?;
        end_of(&mut connect("192.0.2.1:1")?, AT_ONCE).context("not allowed")?;
        let mut held = [connect("203.0.113.7:1")?, connect("203.0.113.7:2")?, connect("203.0.113.8:1")?];
        held.iter_mut().try_for_each(|stream| echo(stream, b"allowed"))?;
        end_of(&mut connect("203.0.113.7:3")?, AT_ONCE).context("a third of one client")?;
        held.iter_mut().try_for_each(|stream| echo(stream, b"still here"))?;
        drop(held);
        shunt.wait_ended(relay.route(), &[("denied", 2), ("limit_per_client", 1), ("finished_client_first", 3)], SOON)
    })
}

#[test]
fn the_backend_is_told_who_the_client_is_before_anything_else() -> Result<()> {
    let lab = lab()?;
    let listeners: Vec<_> =
        Relay::ALL.iter().map(|r| lab.backend(1).listen(([0, 0, 0, 0], r.backend_port()))).collect::<Result<_, _>>()?;
    for version in ["v1", "v2"] {
        let rest = format!("proxy_protocol = {{ accept_from = [\"10.88.1.3/32\"], send = \"{version}\" }}");
        let mut shunt = Shunt::start(&lab, &Relay::routes(&rest))?;
        on_each(&Relay::ENGINES, |relay| {
            // A client of its own, that waits for the server to speak.
            let mut stream = lab.client().connect(relay.listen())?;
            let (mut backend, _) = listeners[relay as usize].accept()?;
            backend.write_all(b"220 hello")?;
            ensure!(read_some(&mut stream, 9)? == b"220 hello");
            let client = stream.local_addr()?;
            drop(stream);
            let (header, _) = read_to_end(&mut backend, AT_ONCE)?;
            let said = read(&header).with_context(|| format!("{version}: {header:?}"))?;
            ensure!(said == Said { source: client, destination: relay.listen(), length: header.len() }, "{said:?}");
            ensure!(header.starts_with(b"PROXY") == (version == "v1"), "{version}: {header:?}");
            drop(backend);
            // A client behind a proxy, and bytes that were there before the dial.
            let client = address("203.0.113.7:4242");
            let mut stream = lab.client().connect_from(trusted(), relay.listen())?;
            stream
                .write_all(&[v2(client, address("198.51.100.1:443"), &[(4, b"noop")]).as_slice(), b"HELO"].concat())?;
            let (mut backend, _) = listeners[relay as usize].accept()?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let (all, _) = read_to_end(&mut backend, AT_ONCE)?;
            let said = read(&all).with_context(|| format!("{version}: {all:?}"))?;
            println!("{version}: {} bytes, {said:?}", all.len());
            ensure!(said.source == client && all[said.length..] == *b"HELO", "{version}: {said:?} {all:?}");
            drop((stream, backend));
            shunt.wait_route(relay.route(), "payload only is counted", SOON, |r| {
                (r["connections_active"] == 0 && r["bytes_in"] == 4 && r["bytes_out"] == 9).then_some(())
            })
        })?;
        ensure!(shunt.terminate(SOON)?.success());
        ensure!(shunt.cli(&["cleanup"])?.status.success());
    }
    Ok(())
}

#[test]
fn ipv6_clients_and_backends_are_told_too() -> Result<()> {
    let lab = lab()?;
    let listener = lab.backend(1).listen(address("[::]:9100"))?;
    let shunt = Shunt::start(
        &lab,
        "[[route]]\nname = \"six\"\nlisten = [\"[fd88:1::1]:8100\"]\nengine = \"splice\"\nbackends = [\"[fd88:2::2]:9100\"]\n\
         proxy_protocol = { send = \"v2\" }\n",
    )?;
    let stream = lab.client().connect(address("[fd88:1::1]:8100"))?;
    let (mut backend, from) = listener.accept()?;
    ensure!(from.ip() == IpAddr::from([0xfd88, 2, 0, 0, 0, 0, 0, 1]), "the gateway's own address, not {from}");
    let listed = shunt.connection_of(&stream)?.context("listed")?;
    ensure!(listed["backend"] == "[fd88:2::2]:9100" && listed["listen"] == "[fd88:1::1]:8100", "{listed}");
    let client = stream.local_addr()?;
    drop(stream);
    let said = read(&read_to_end(&mut backend, AT_ONCE)?.0)?;
    ensure!(said.source == client && said.destination == address("[fd88:1::1]:8100"), "{said:?}");
    Ok(())
}

const HAPROXY_SAYS: &str =
    "  mode http\n  http-request return status 200 content-type text/plain lf-string \"%[src]:%[src_port]\"\n";

#[test]
fn haproxy_and_nginx_behind_shunt_see_the_client() -> Result<()> {
    let lab = lab()?;
    let _haproxy = lab.haproxy(lab.backend(1), &format!("frontend f\n  bind :80 accept-proxy\n{HAPROXY_SAYS}"), 80)?;
    let http = "http { access_log off; set_real_ip_from 10.88.2.0/24; real_ip_header proxy_protocol;\n\
                server { listen 80 proxy_protocol; location / { return 200 \"$remote_addr:$remote_port\"; } } }";
    let _nginx = lab.nginx_with(lab.backend(2), http, 80)?;
    let mut config = String::new();
    for (n, relay) in Relay::ENGINES.iter().enumerate() {
        for (m, version) in ["v1", "v2"].iter().enumerate() {
            for backend in [2, 3] {
                let port = 7000 + 100 * backend + 10 * n + m;
                config += &format!(
                    "[[route]]\nname = \"r{port}\"\nlisten = [\"10.88.1.1:{port}\"]\nengine = \"{}\"\n\
                     backends = [\"10.88.2.{backend}:80\"]\nproxy_protocol = {{ send = \"{version}\" }}\n",
                    relay.engine()
                );
            }
        }
    }
    let _shunt = Shunt::start(&lab, &config)?;
    for backend in [2, 3] {
        for n in [0, 10, 1, 11] {
            let port = 7000 + 100 * backend + n;
            let local = 20_000 + port;
            let seen = lab.client().sh(&format!(
                "curl -sS --max-time 5 --interface 10.88.1.4 --local-port {local} http://10.88.1.1:{port}/"
            ))?;
            ensure!(seen == format!("10.88.1.4:{local}"), "port {port}: the server saw {seen:?}");
        }
    }
    Ok(())
}

#[test]
fn haproxy_and_nginx_in_front_of_shunt_are_believed() -> Result<()> {
    let lab = lab()?;
    let server = |relay: Relay| TcpServer::start(lab.backend(1), relay.backend_port(), Behaviour::Echo);
    let _servers = Relay::ENGINES.into_iter().map(server).collect::<Result<Vec<_>>>()?;
    // Both proxies are on the client's host and have its first address towards the gateway.
    let trusting = "proxy_protocol = { accept_from = [\"10.88.1.2/32\"] }";
    let config: String = Relay::ENGINES.iter().map(|r| r.route_to(&[[10, 88, 2, 2].into()], trusting)).collect();
    let shunt = Shunt::start(&lab, &config)?;
    let front = |port: u16, relay: Relay, how: &str| {
        format!("listen f{port}\n  bind 10.88.1.2:{port}\n  server s {} {how}\n", relay.listen())
    };
    let tlvs = "send-proxy-v2 proxy-v2-options crc32c,unique-id";
    let sections: String = Relay::ENGINES
        .iter()
        .flat_map(|&relay| {
            let base = 6000 + 10 * relay as u16;
            let tlv = front(base + 2, relay, tlvs).replace("  server", "  unique-id-format %pid-%rt\n  server");
            [front(base, relay, "send-proxy"), front(base + 1, relay, "send-proxy-v2"), tlv]
        })
        .collect();
    let _haproxy = lab.haproxy(lab.client(), &sections, 6000)?;
    let stream: String = Relay::ENGINES
        .iter()
        .map(|relay| {
            let port = 6003 + 10 * *relay as u16;
            format!("server {{ listen 10.88.1.2:{port}; proxy_pass {}; proxy_protocol on; }}\n", relay.listen())
        })
        .collect();
    let _nginx = lab.nginx_with(lab.client(), &format!("stream {{\n{stream}}}"), 6003)?;
    on_each(&Relay::ENGINES, |relay| {
        for n in 0..4 {
            let to = SocketAddr::from(([10, 88, 1, 2], 6000 + 10 * relay as u16 + n));
            let mut stream = lab.client().connect_from(([10, 88, 1, 4], 0), to)?;
            echo(&mut stream, b"hello through two").with_context(|| format!("front proxy at {to}"))?;
            let listed = shunt.connection_of(&stream)?;
            ensure!(listed.is_some(), "front proxy at {to}: {:?}", shunt.connections(relay.route())?);
        }
        Ok(())
    })
}
