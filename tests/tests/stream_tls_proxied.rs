//! TLS that ends in the daemon, and who the backend takes the client for: transparent routes, PROXY headers around TLS.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_core::sniff::proxy::{self, kind};
use shunt_lab::{
    Lab, Shunt, Stream,
    dialog::{End, echo, end_of},
    patiently, pattern, proxy_header,
    relay::{Relay, on_each, servers_with_tls},
    scripted::{Behaviour, Start},
    stream::Accept,
    tls::{self, NAME, Opening, Versions},
};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn the_backend_of_a_transparent_tls_route_sees_the_client_and_bytes_go_both_ways() -> Result<()> {
    const BYTES: u64 = 20 << 20;
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Exchange { seed: 7, bytes: BYTES, start: Start::AtOnce })?;
    let shunt = Shunt::start(&lab, &Relay::tls_routes(&lab, "source_address = \"client\"")?)?;
    on_each(&Relay::TLS, |relay| {
        let mut stream = relay.open(&lab)?;
        let mut reader = stream.try_clone()?;
        let got = thread::spawn(move || pattern::receive(&mut reader));
        let sent = pattern::send(&mut stream, 3, BYTES)?;
        stream.shutdown(Shutdown::Write)?;
        let got = got.join().expect("reader")?;
        ensure!(got == pattern::send(&mut std::io::sink(), 7, BYTES)?, "other bytes came back");
        let record = servers[relay as usize].wait_records(1, SOON)?.remove(0);
        let client = IpAddr::from(lab.client().ip);
        ensure!(record.peer.ip().to_canonical() == client, "the backend saw {}", record.peer);
        ensure!(record.received == sent, "the backend got other bytes");
        drop(stream);
        shunt.wait_route(relay.route(), "it has ended", SOON, |r| (r["connections_active"] == 0).then_some(()))
    })
}

/// Routes that believe 10.88.1.3, ask for a client's certificate, speak h2, and tell the backend with `send`.
fn routes(lab: &Lab, send: &str) -> Result<String> {
    let pki = &lab.tls()?.pki;
    let ends = pki.terminate(&["web"], &format!("alpn = [\"h2\"]\nclient_ca = \"{}\"", pki.file("ca.pem")));
    let route = |relay: Relay| {
        let again = if relay == Relay::Again { pki.again(NAME) } else { String::new() };
        let proxy = format!("proxy_protocol = {{ accept_from = [\"10.88.1.3/32\"], send = \"{send}\" }}");
        relay.route_to(&[Ipv4Addr::new(10, 88, 2, 2)], &format!("{proxy}\n{ends}{again}"))
    };
    Ok(Relay::TLS.map(route).concat())
}

/// Accepts at the backend: the header that comes first, and the rest by TLS where the way has it.
fn told(lab: &Lab, relay: Relay, listener: &TcpListener) -> Result<(proxy::Header, Stream)> {
    let (mut tcp, _) = listener.accept()?;
    tcp.set_read_timeout(Some(patiently(SOON)))?;
    let mut bytes = vec![0; 16];
    tcp.read_exact(&mut bytes)?;
    bytes.resize(16 + usize::from(u16::from_be_bytes([bytes[14], bytes[15]])), 0);
    tcp.read_exact(&mut bytes[16..])?;
    let (header, length) = proxy::parse(&bytes).ok().flatten().context("a header")?;
    ensure!(length == bytes.len(), "{length} of {}", bytes.len());
    Ok((header, if relay == Relay::Again { lab.tls()?.acceptor.accept(tcp)? } else { tcp.into() }))
}

/// Echoes once on both ends and closes.
fn through(client: &mut Stream, backend: &mut Stream) -> Result<()> {
    let echoing = thread::scope(|scope| -> Result<()> {
        let server = scope.spawn(|| -> Result<()> {
            let mut said = [0; 5];
            backend.read_exact(&mut said)?;
            Ok(backend.write_all(&said)?)
        });
        echo(client, b"hello")?;
        server.join().expect("server")
    });
    echoing?;
    client.shutdown(Shutdown::Write)?;
    ensure!(end_of(backend, SOON)? == End::Finished);
    backend.shutdown(Shutdown::Write)?;
    ensure!(end_of(client, SOON)? == End::Finished);
    Ok(())
}

#[test]
fn a_header_in_front_of_tls_names_the_client_and_the_one_to_the_backend_tells_of_tls_too() -> Result<()> {
    let lab = Lab::builder().client_addresses(2).build()?;
    let pki = &lab.tls()?.pki;
    pki.issue("alice", "ec", "alice")?;
    let listeners = Relay::TLS
        .map(|relay| lab.backend(1).listen(([0, 0, 0, 0], relay.backend_port())))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let shunt = Shunt::start(&lab, &routes(&lab, "v2")?)?;
    let real: SocketAddr = "203.0.113.7:4242".parse()?;
    let dialled: SocketAddr = "198.51.100.1:443".parse()?;
    on_each(&Relay::TLS, |relay| {
        let listener = &listeners[usize::from(relay == Relay::Again)];
        for (versions, name) in [(Versions::Only12, "TLSv1.2"), (Versions::Only13, "TLSv1.3")] {
            let mut config = tls::client_config(pki, versions, Some((pki, "alice")))?;
            config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
            let config = Arc::new(config);
            // By itself, and behind a proxy that speaks either version; all in one segment or not.
            let headers =
                [Vec::new(), proxy_header::v1(real, dialled), proxy_header::v2(real, dialled, &[(0xe0, b"own")])];
            for (nth, header) in headers.iter().enumerate() {
                let from: IpAddr = if nth == 0 { lab.client().ip.into() } else { "10.88.1.3".parse()? };
                let mut tcp: TcpStream = lab.client().connect_from((from, 0), relay.listen())?;
                let opening = Opening::new(&config, NAME)?;
                let begin = [header.as_slice(), opening.hello.as_slice()].concat();
                let at = [begin.len(), 9, header.len()][nth];
                tcp.write_all(&begin[..at])?;
                tcp.write_all(&begin[at..])?;
                let expected = if nth == 0 { tcp.local_addr()? } else { real };
                let mut client = opening.go_on(tcp).with_context(|| format!("header {nth}, {name}"))?;
                let (said, mut backend) = told(&lab, relay, listener)?;
                let ends = said.ends.context("addresses")?;
                ensure!(ends.source == expected, "the client is told as {}", ends.source);
                ensure!(ends.destination == if nth == 0 { relay.listen() } else { dialled }, "{}", ends.destination);
                let tlv = |kind| said.tlvs.get(kind).map(<[u8]>::to_vec).unwrap_or_default();
                ensure!(tlv(kind::ALPN) == b"h2" && tlv(kind::AUTHORITY) == NAME.as_bytes());
                // Flags, verified, and who and what it was.
                let ssl = [&[0x07, 0, 0, 0, 0, 0x21, 0, 7][..], name.as_bytes(), b"\x22\0\x05alice"].concat();
                ensure!(tlv(kind::SSL) == ssl, "{:?}", tlv(kind::SSL));
                ensure!(nth != 2 || tlv(0xe0) == b"own", "what another proxy has told is lost");
                let listed = shunt.connections(relay.route())?;
                ensure!(listed.len() == 1 && listed[0]["client"] == expected.to_string(), "{listed:?}");
                through(&mut client, &mut backend)?;
            }
        }
        shunt.wait_ended(relay.route(), &[("finished_client_first", 6)], SOON)?;
        let route = shunt.route(relay.route())?;
        ensure!(route["bytes_in"] == 30 && route["bytes_out"] == 30, "payload only is counted: {route}");
        Ok(())
    })
}
