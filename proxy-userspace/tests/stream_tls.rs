//! TLS that ends and begins in the daemon, on loopback.

mod tls;

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use proxy_core::{
    reason::Reason,
    sniff::proxy::{self, kind},
};
use rustls::{HandshakeKind, version};

use tls::{Authority, Files, SOON, Served, TlsBackend, echo_server, pattern};

fn terminate(files: &Files, more: &str) -> String {
    format!(
        "[route.tls]\nmode = \"terminate\"\ncertificates = [{{ cert = \"{}\", key = \"{}\" }}]\n{more}\n",
        files.cert.display(),
        files.key.display()
    )
}

#[test]
fn plaintext_arrives_whole_both_ways_in_both_versions_and_is_what_is_counted() {
    let authority = Authority::new("both");
    let files = authority.issue("web", &["web.example"]);
    for version in [&version::TLS13, &version::TLS12] {
        let mut served = Served::new(&[echo_server()], &terminate(&files, ""));
        let mut client = served.tls(&authority, "web.example", &[version]);
        let data = pattern(20_000_000);
        let back = client.echo(&data);
        assert!(back == data, "{:?}: came back different ({} bytes)", version.version, back.len());
        assert_eq!(client.connection().protocol_version(), Some(version.version));
        let ended = served.ended(Reason::FinishedClientFirst);
        assert_eq!((ended.bytes_in, ended.bytes_out), (data.len() as u64, data.len() as u64));
        let totals = served.totals();
        assert_eq!(totals.handshakes, [("full", 1)]);
        assert_eq!((totals.engines[0].1.active, totals.engines[0].1.bytes_in), (0, data.len() as u64));
    }
}

#[test]
fn a_session_is_resumed_in_both_versions_and_alpn_is_chosen_by_the_route() {
    let authority = Authority::new("resume");
    let files = authority.issue("web", &["web.example"]);
    let served = Served::new(&[echo_server()], &terminate(&files, "alpn = [\"h2\", \"http/1.1\"]"));
    for version in [&version::TLS13, &version::TLS12] {
        let config = authority.client(&[version], None, &[b"http/1.1", b"h2"]);
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Resumed] {
            let mut client = served.tls_with(config.clone(), "web.example");
            assert_eq!(client.echo(b"hello"), b"hello");
            assert_eq!(client.connection().handshake_kind(), Some(kind), "{version:?}");
            assert_eq!(client.connection().alpn_protocol(), Some(&b"h2"[..]));
        }
    }
    assert_eq!(served.totals().handshakes, [("full", 2), ("resumed", 4)]);
}

#[test]
fn key_exchange_is_post_quantum_where_the_client_can() {
    let authority = Authority::new("pq");
    let files = authority.issue("web", &["web.example"]);
    let served = Served::new(&[echo_server()], &terminate(&files, ""));
    let mut client = served.tls(&authority, "web.example", &[&version::TLS13]);
    client.echo(b"x");
    let group = client.connection().negotiated_key_exchange_group().expect("a group").name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
}

#[test]
fn min_version_shuts_out_older_clients_with_an_alert() {
    let authority = Authority::new("min");
    let files = authority.issue("web", &["web.example"]);
    let mut served = Served::new(&[echo_server()], &terminate(&files, "min_version = \"1.3\""));
    let mut client = served.tls(&authority, "web.example", &[&version::TLS12]);
    let error = client.write_all(b"x").and_then(|()| client.read_exact(&mut [0])).expect_err("refused");
    assert!(error.to_string().contains("ProtocolVersion"), "{error}");
    served.ended(Reason::TlsHandshakeFailed);
    assert_eq!(served.totals().handshakes, [("incompatible", 1)]);
}

#[test]
fn without_a_certificate_of_the_right_authority_no_client_comes_in() {
    let authority = Authority::new("mutual");
    let stranger = Authority::new("mutual-stranger");
    let files = authority.issue("web", &["web.example"]);
    let settings = terminate(&files, &format!("client_ca = \"{}\"", authority.file.display()));
    for version in [&version::TLS13, &version::TLS12] {
        let mut served = Served::new(&[echo_server()], &settings);
        let try_with = |identity: Option<&Files>| {
            let config = authority.client(&[version], identity, &[]);
            let mut client = served.tls_with(config, "web.example");
            client.write_all(b"x").and_then(|()| client.read_exact(&mut [0])).is_ok()
        };
        assert!(!try_with(None));
        assert!(!try_with(Some(&stranger.issue("eve", &["eve"]))));
        assert!(try_with(Some(&authority.issue("alice", &["alice"]))));
        served.ended(Reason::TlsHandshakeFailed);
        let counted = served.totals().handshakes;
        assert_eq!(counted, [("full", 1), ("no_certificate", 1), ("bad_certificate", 1)]);
    }
}

#[test]
fn a_stalled_handshake_and_one_that_is_no_tls_have_their_reasons() {
    let authority = Authority::new("stall");
    let files = authority.issue("web", &["web.example"]);
    let limits = "timeouts = { initial_data = \"300ms\", tls_handshake = \"400ms\" }\n";
    let mut served = Served::new(&[echo_server()], &format!("{limits}{}", terminate(&files, "")));
    // Half a hello.
    let mut half = served.connect();
    half.write_all(&[22, 3, 1, 2, 0, 1, 0]).expect("written");
    served.ended(Reason::InitialDataTimeout);
    // A whole one, and then silence.
    let mut stalled = served.tls(&authority, "web.example", &[&version::TLS13]);
    let mut hello = Vec::new();
    stalled.conn.write_tls(&mut hello).expect("a hello");
    stalled.sock.write_all(&hello).expect("written");
    served.ended(Reason::TlsHandshakeTimeout);
    // … and then something else.
    let mut other = served.tls(&authority, "web.example", &[&version::TLS13]);
    hello.clear();
    other.conn.write_tls(&mut hello).expect("a hello");
    hello.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
    other.sock.write_all(&hello).expect("written");
    served.ended(Reason::TlsHandshakeFailed);
    assert_eq!(served.totals().handshakes, [("timeout", 1), ("failed", 1)]);
    let mut plain = served.connect();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("written");
    served.ended(Reason::NoRoute);
}

#[test]
fn close_notify_is_a_half_close_in_both_directions() {
    let authority = Authority::new("half");
    let files = authority.issue("web", &["web.example"]);
    // The backend answers only after the client's end.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let backend = listener.local_addr().expect("an address");
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut asked = Vec::new();
        stream.read_to_end(&mut asked).expect("the client's FIN");
        thread::sleep(Duration::from_millis(200));
        stream.write_all(&asked).expect("written");
    });
    let mut served = Served::new(&[backend], &terminate(&files, ""));
    let mut client = served.tls(&authority, "web.example", &[&version::TLS13]);
    client.write_all(b"question").expect("written");
    client.conn.send_close_notify();
    client.flush().expect("flushed");
    let mut answer = Vec::new();
    // An end without close_notify would be an error here.
    client.read_to_end(&mut answer).expect("an answer, and close_notify behind it");
    assert_eq!(answer, b"question");
    served.ended(Reason::FinishedClientFirst);
}

#[test]
fn a_stream_cut_without_close_notify_is_a_reset_for_the_backend_and_counted() {
    let authority = Authority::new("cut");
    let files = authority.issue("web", &["web.example"]);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut served = Served::new(&[listener.local_addr().expect("an address")], &terminate(&files, ""));
    let mut client = served.tls(&authority, "web.example", &[&version::TLS13]);
    client.write_all(b"amount: 10").expect("written");
    let (mut backend, _) = listener.accept().expect("a connection");
    backend.set_read_timeout(Some(SOON)).expect("a timeout");
    backend.read_exact(&mut [0; 10]).expect("what came before");
    client.sock.shutdown(Shutdown::Write).expect("a FIN alone");
    let error = backend.read(&mut [0]).expect_err("not an end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    served.ended(Reason::ResetByClient);
    assert_eq!(served.totals().truncated, [1, 0]);
}

#[test]
fn what_is_encrypted_again_is_checked_resumed_and_keeps_its_protocol() {
    let authority = Authority::new("again");
    let files = authority.issue("web", &["web.example"]);
    let backend = TlsBackend::start(&authority, &authority.issue("inner", &["inner.example"]), &[b"h2", b"http/1.1"]);
    let again = |authority: &Authority, name: &str| {
        let identity = authority.issue("gateway", &["gateway"]);
        format!(
            "{}[route.backend_tls]\nca = \"{}\"\nserver_name = \"{name}\"\ncert = \"{}\"\nkey = \"{}\"\n",
            terminate(&files, "alpn = [\"http/1.1\"]"),
            authority.file.display(),
            identity.cert.display(),
            identity.key.display()
        )
    };
    let mut served = Served::new(&[backend.address], &again(&authority, "inner.example"));
    let config = authority.client(&[&version::TLS13], None, &[b"http/1.1"]);
    let data = pattern(5_000_000);
    for _ in 0..3 {
        let mut client = served.tls_with(config.clone(), "web.example");
        assert!(client.echo(&data) == data, "came back different");
        let ended = served.ended(Reason::FinishedClientFirst);
        assert_eq!((ended.bytes_in, ended.bytes_out), (data.len() as u64, data.len() as u64));
    }
    let counted = served.totals().handshakes;
    assert_eq!(counted, [("full", 1), ("resumed", 2), ("backend_full", 1), ("backend_resumed", 2)]);
    assert_eq!(backend.told(), Some((Some(b"http/1.1".to_vec()), true)), "protocol, and a client certificate");
    for bad in [again(&authority, "other.example"), again(&Authority::new("again-stranger"), "inner.example")] {
        let mut served = Served::new(&[backend.address], &bad);
        let mut client = served.tls_with(config.clone(), "web.example");
        assert!(client.write_all(b"x").and_then(|()| client.read_exact(&mut [0])).is_err());
        served.ended(Reason::TlsHandshakeFailed);
        let counted = served.totals().handshakes;
        assert!(counted.contains(&("backend_bad_certificate", 1)), "{counted:?}");
    }
}

#[test]
fn a_plain_client_can_have_an_encrypted_backend() {
    let authority = Authority::new("begin");
    let backend = TlsBackend::start(&authority, &authority.issue("inner", &["127.0.0.1"]), &[]);
    let settings = format!("backend_tls = {{ ca = \"{}\" }}", authority.file.display());
    let mut served = Served::new(&[backend.address], &settings);
    let mut client = served.connect();
    let data = pattern(3_000_000);
    let mut writer = client.try_clone().expect("a clone");
    let sent = data.clone();
    let sender = thread::spawn(move || {
        writer.write_all(&sent).expect("written");
        writer.shutdown(Shutdown::Write).expect("finished");
    });
    let mut back = Vec::new();
    client.read_to_end(&mut back).expect("read");
    sender.join().expect("sent");
    assert!(back == data, "came back different");
    served.ended(Reason::FinishedClientFirst);
}

#[test]
fn a_plain_backend_is_told_of_the_clients_tls_in_a_proxy_header() {
    let authority = Authority::new("told");
    let files = authority.issue("web", &["web.example"]);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let backend = listener.local_addr().expect("an address");
    let settings = terminate(&files, &format!("alpn = [\"h2\"]\nclient_ca = \"{}\"", authority.file.display()));
    let served = Served::new(&[backend], &format!("proxy_protocol = {{ send = \"v2\" }}\n{settings}"));
    let config = authority.client(&[&version::TLS13], Some(&authority.issue("alice", &["alice"])), &[b"h2"]);
    let mut client = served.tls_with(config, "web.example");
    client.write_all(b"hello").expect("written");
    let (mut stream, _) = listener.accept().expect("a connection");
    let mut received = vec![0; 16];
    stream.read_exact(&mut received).expect("a header");
    let rest = usize::from(u16::from_be_bytes([received[14], received[15]])) + 5;
    received.resize(16 + rest, 0);
    stream.read_exact(&mut received[16..]).expect("the rest, and the payload");
    let (header, length) = proxy::parse(&received).expect("a header").expect("all of it");
    assert_eq!(&received[length..], b"hello");
    let told = |kind| header.tlvs.get(kind).map(<[u8]>::to_vec);
    assert_eq!(told(kind::ALPN), Some(b"h2".to_vec()));
    assert_eq!(told(kind::AUTHORITY), Some(b"web.example".to_vec()));
    let ssl = [&[0x07, 0, 0, 0, 0][..], b"\x21\x00\x07TLSv1.3", b"\x22\x00\x05alice"].concat();
    assert_eq!(told(kind::SSL), Some(ssl));
    assert_eq!(header.ends.map(|ends| ends.source), client.sock.local_addr().ok());
}

#[test]
fn a_slow_reader_slows_the_sender_down_and_gets_every_byte() {
    let authority = Authority::new("slow");
    let files = authority.issue("web", &["web.example"]);
    let data = pattern(30_000_000);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let backend = listener.local_addr().expect("an address");
    let sent = data.clone();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(&sent).expect("written");
    });
    let mut served = Served::new(&[backend], &terminate(&files, ""));
    let mut client = served.tls(&authority, "web.example", &[&version::TLS13]);
    client.flush().expect("shaken");
    thread::sleep(Duration::from_millis(300));
    let mut back = Vec::new();
    client.read_to_end(&mut back).expect("read");
    assert!(back == data, "came back different ({} bytes)", back.len());
    drop(client);
    let ended = served.ended(Reason::FinishedBackendFirst);
    assert_eq!(ended.bytes_out, data.len() as u64);
}

#[test]
fn a_certificate_swapped_under_load_fails_no_handshake() {
    let authority = Authority::new("swap");
    let files = authority.issue("web", &["web.example"]);
    let served = Served::new(&[echo_server()], &terminate(&files, ""));
    let deadline = Instant::now() + Duration::from_secs(15);
    let seen = |client: &mut tls::Client| client.connection().peer_certificates().map(|c| c[0].to_vec());
    let (mut certificates, mut issued) = (Vec::new(), 0);
    loop {
        if issued < certificates.len() {
            issued += 1;
            // In place, file by file: the pair does not match for a moment.
            authority.issue("web", &["web.example"]);
        }
        let mut client = served.tls(&authority, "web.example", &[&version::TLS13]);
        assert_eq!(client.echo(b"hello"), b"hello");
        let certificate = seen(&mut client).expect("a certificate");
        if !certificates.contains(&certificate) {
            certificates.push(certificate);
        }
        if certificates.len() >= 3 {
            break;
        }
        assert!(Instant::now() < deadline, "the certificate is not renewed: {} seen", certificates.len());
        thread::sleep(Duration::from_millis(5));
    }
    let totals = served.totals();
    assert!(totals.handshakes.iter().all(|(result, _)| *result == "full"), "{:?}", totals.handshakes);
    assert!(served.path.reader.tls.reloads().0 >= 2);
}

#[test]
fn a_file_that_cannot_be_served_is_refused_before_anything_listens() {
    let authority = Authority::new("refused");
    let (a, b) = (authority.issue("a", &["a.example"]), authority.issue("b", &["b.example"]));
    let mixed = Files { cert: a.cert.clone(), key: b.key.clone() };
    let listen = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let error = Served::try_new(listen, &[echo_server()], &terminate(&mixed, "")).err().expect("refused");
    assert!(error.starts_with("route \"web\": "), "{error}");
    assert!(error.contains("is not the key of the first certificate"), "{error}");
    assert!(TcpStream::connect(listen).is_err());
}

#[test]
fn bytes_start_the_idle_limit_over_and_a_finished_side_has_its_own() {
    let authority = Authority::new("idle");
    let files = authority.issue("web", &["web.example"]);
    let limits = "timeouts = { idle = \"900ms\", half_closed = \"300ms\" }\n";
    let mut served = Served::new(&[echo_server()], &format!("{limits}{}", terminate(&files, "")));
    let mut client = served.tls(&authority, "web.example", &[&version::TLS13]);
    for _ in 0..4 {
        thread::sleep(Duration::from_millis(450));
        client.write_all(b"x").and_then(|()| client.read_exact(&mut [0])).expect("it lives");
    }
    let ended = served.ended(Reason::IdleTimeout);
    assert!(ended.duration >= Duration::from_millis(2600), "{:?}", ended.duration);
    let end = client.read(&mut [0]);
    assert!(end.is_err(), "cut, and not ended: {end:?}");
    // A backend that never ends.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let backend = listener.local_addr().expect("an address");
    let mut served = Served::new(&[backend], &format!("{limits}{}", terminate(&files, "")));
    let mut client = served.tls(&authority, "web.example", &[&version::TLS12]);
    client.write_all(b"x").expect("written");
    client.conn.send_close_notify();
    client.flush().expect("flushed");
    let ended = served.ended(Reason::HalfClosedTimeout);
    assert!(ended.duration < Duration::from_millis(900), "{:?}", ended.duration);
}
