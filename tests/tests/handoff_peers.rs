//! Whoever the two ends of a handed-over connection are: other options, other addresses, other programs, and gone without a word.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    GATEWAY, GATEWAY6, Host, Lab, Shunt, Talk,
    dialog::{End, echo, end_of, exchange},
    kernel, link,
    pattern::{self, Pattern},
    relay::{Relay, handed_over},
    scripted::{Behaviour, Ended, Start, TcpServer},
    tls::NAME,
    wait_for, wait_until, wire,
};

const SOON: Duration = Duration::from_secs(10);
const TO: Relay = Relay::Handoff;

/// A route that hands over.
fn route(name: &str, listen: SocketAddr, backend: SocketAddr, rest: &str) -> String {
    format!(
        "[[route]]\nname = \"{name}\"\nlisten = [\"{listen}\"]\nengine = \"handoff\"\nbackends = [\"{backend}\"]\n{rest}\n"
    )
}

/// Settings of one host, by dots.
type Settings = &'static [(&'static str, &'static str)];

/// A pair of ends, and what each agrees to with the gateway: as `ss -oi` says it.
struct Kind {
    name: &'static str,
    client: Settings,
    backend: Settings,
    /// While the backend is dialled.
    gateway: Settings,
    agreed: [&'static str; 2],
}

const ALL: &str = "ts sack wscale";
const NO_TIMESTAMPS: Settings = &[("net.ipv4.tcp_timestamps", "0")];
const NO_SACK: Settings = &[("net.ipv4.tcp_sack", "0")];
const NO_SCALES: Settings = &[("net.ipv4.tcp_window_scaling", "0")];
const SMALL_SCALE: Settings = &[("net.ipv4.tcp_rmem", "4096 65536 131072")];
const BARE: Settings =
    &[("net.ipv4.tcp_timestamps", "0"), ("net.ipv4.tcp_sack", "0"), ("net.ipv4.tcp_window_scaling", "0")];
const ECN: Settings = &[("net.ipv4.tcp_ecn", "1")];

const PLAIN: Kind = Kind { name: "two plain ones", client: &[], backend: &[], gateway: &[], agreed: [ALL, ALL] };
const KINDS: [Kind; 13] = [
    Kind { name: "a client without timestamps", client: NO_TIMESTAMPS, agreed: ["sack wscale", ALL], ..PLAIN },
    Kind { name: "a backend without timestamps", backend: NO_TIMESTAMPS, agreed: [ALL, "sack wscale"], ..PLAIN },
    Kind { name: "a client without SACK", client: NO_SACK, agreed: ["ts wscale", ALL], ..PLAIN },
    Kind { name: "a backend without SACK", backend: NO_SACK, agreed: [ALL, "ts wscale"], ..PLAIN },
    Kind { name: "a client without window scales", client: NO_SCALES, agreed: ["ts sack", ALL], ..PLAIN },
    Kind { name: "a backend without window scales", backend: NO_SCALES, agreed: [ALL, "ts sack"], ..PLAIN },
    Kind { name: "a client with a small window scale", client: SMALL_SCALE, ..PLAIN },
    Kind { name: "a backend with a small window scale", backend: SMALL_SCALE, ..PLAIN },
    Kind { name: "a client without any option", client: BARE, agreed: ["", ALL], ..PLAIN },
    Kind { name: "a backend without any option", backend: BARE, agreed: [ALL, ""], ..PLAIN },
    Kind { name: "a client with ECN", client: ECN, agreed: ["ts sack ecn wscale", ALL], ..PLAIN },
    Kind { name: "a backend with ECN", gateway: ECN, agreed: [ALL, "ts sack ecn wscale"], ..PLAIN },
    Kind { name: "both with ECN", client: ECN, gateway: ECN, agreed: ["ts sack ecn wscale"; 2], ..PLAIN },
];

/// Does something while `host` has these settings.
fn with<T>(host: &Host, settings: Settings, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = settings.iter().map(|(key, _)| host.sysctl(key)).collect::<Result<Vec<_>>>()?;
    settings.iter().try_for_each(|(key, value)| host.set_sysctl(key, value))?;
    let outcome = work();
    settings.iter().zip(before).try_for_each(|((key, _), value)| host.set_sysctl(key, value.trim()))?;
    outcome
}

/// What the connection of `host` that `filter` finds has agreed to with the gateway.
fn agreed(host: &Host, filter: &str) -> Result<String> {
    let shown = host.sh(&format!("ss -Htnoi '{filter}'"))?;
    let known = |word: &&str| ["ts", "sack", "ecn", "wscale"].contains(word);
    let words = shown.split_whitespace().map(|word| word.split(':').next().unwrap_or(word)).filter(known);
    Ok(words.collect::<Vec<_>>().join(" "))
}

#[test]
fn peers_of_every_kind_talk_to_each_other() -> Result<()> {
    const BYTES: u64 = 4 << 20;
    let lab = Lab::builder().backends(KINDS.len() as u8).build()?;
    let port = |nth: usize| 8100 + nth as u16;
    let behaviour = Behaviour::Exchange { seed: 6, bytes: BYTES, start: Start::AfterClientFinished };
    let serve = |(nth, kind): (usize, &Kind)| -> Result<TcpServer> {
        let host = lab.backend(nth + 1);
        kind.backend.iter().try_for_each(|(key, value)| host.set_sysctl(key, value))?;
        TcpServer::start(host, port(nth), behaviour.clone())
    };
    let servers = KINDS.iter().enumerate().map(serve).collect::<Result<Vec<_>>>()?;
    let one = |nth: usize| {
        let backend = SocketAddr::new(lab.backend(nth + 1).ip.into(), port(nth));
        route(&format!("kind-{nth}"), (GATEWAY, port(nth)).into(), backend, "")
    };
    let shunt = Shunt::start(&lab, &(0..KINDS.len()).map(one).collect::<String>())?;
    wire::watch_ends(lab.client())?;
    // What was agreed to at the beginning holds for ever.
    let connect = |(nth, kind): (usize, &Kind)| -> Result<TcpStream> {
        let connected = || -> Result<TcpStream> {
            let stream = lab.client().connect((GATEWAY, port(nth)))?;
            wait_until("the backend has it", SOON, || servers[nth].open() == 1)?;
            Ok(stream)
        };
        let stream = with(lab.gateway(), kind.gateway, || with(lab.client(), kind.client, connected))?;
        let there = [
            agreed(lab.client(), &format!("( sport = :{} )", stream.local_addr()?.port()))?,
            agreed(lab.backend(nth + 1), &format!("( sport = :{} )", port(nth)))?,
        ];
        ensure!(there == kind.agreed, "{}: {there:?} is agreed to", kind.name);
        Ok(stream)
    };
    let streams = KINDS.iter().enumerate().map(connect).collect::<Result<Vec<_>>>()?;
    let expected = pattern::send(&mut std::io::sink(), 6, BYTES)?;
    let carry = |nth: usize, stream: &TcpStream| -> Result<()> {
        handed_over(&shunt, stream)?;
        let (sent, received) = exchange(stream, 5, BYTES)?;
        ensure!(received == expected, "backend → client: {received:?}");
        let record = servers[nth].wait_records(1, SOON)?.remove(0);
        ensure!(record.received == sent, "client → backend: {:?} of {sent:?}", record.received);
        shunt.wait_ended(&format!("kind-{nth}"), &[("finished_client_first", 1)], SOON)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = streams.iter().enumerate().map(|(n, s)| scope.spawn(move || carry(n, s))).collect();
        let mut outcomes = threads.into_iter().zip(&KINDS);
        outcomes.try_for_each(|(thread, kind)| thread.join().expect("a pair").context(kind.name))
    })?;
    ensure!(wire::ends_seen(lab.client())?.1 == 0, "a reset was seen");
    Ok(())
}

#[test]
fn ipv6_is_handed_over_and_two_families_are_not() -> Result<()> {
    const BYTES: u64 = 8 << 20;
    let lab = Lab::new()?;
    let backend = lab.backend(1);
    let exchanging = Behaviour::Exchange { seed: 6, bytes: BYTES, start: Start::AfterClientFinished };
    let much = TcpServer::start(backend, 9100, exchanging)?;
    let echoing = TcpServer::start(backend, 9101, Behaviour::Echo)?;
    let at6 = |port: u16| SocketAddr::from((GATEWAY6, port));
    let there6 = |port: u16| SocketAddr::new(backend.ip6.into(), port);
    let config = [
        route("much", at6(8100), there6(9100), ""),
        route("echo", at6(8101), there6(9101), "timeouts = { idle = \"1m\" }"),
        route("six-four", at6(8102), SocketAddr::new(backend.ip.into(), 9101), ""),
        route("four-six", (GATEWAY, 8103).into(), there6(9101), ""),
    ];
    let shunt = Shunt::start(&lab, &config.concat())?;
    for host in [lab.client(), backend] {
        wire::watch_ends(host)?;
    }
    let stream = lab.client().connect(at6(8100))?;
    let mut doomed = lab.client().connect(at6(8101))?;
    echo(&mut doomed, b"hello")?;
    for stream in [&stream, &doomed] {
        handed_over(&shunt, stream)?;
    }
    wait_until("both have no socket here any more", SOON, || {
        kernel::tcp_sockets(lab.gateway(), &["established"]).is_ok_and(|n| n == 0)
    })?;
    let (sent, received) = exchange(&stream, 5, BYTES)?;
    ensure!(received == pattern::send(&mut std::io::sink(), 6, BYTES)?, "backend → client: {received:?}");
    ensure!(much.wait_records(1, SOON)?[0].received == sent, "client → backend");
    shunt.wait_ended("much", &[("finished_client_first", 1)], SOON)?;
    let counted = shunt.route("much")?;
    ensure!(counted["bytes_in"] == BYTES && counted["bytes_out"] == BYTES, "{counted}");
    for host in [lab.client(), backend] {
        // Of its one end, which says it again where its acknowledgement is late.
        let (fins, resets) = wire::ends_seen(host)?;
        ensure!(fins > 0 && resets == 0, "FIN and RST at {}: {fins}, {resets}", host.name());
    }
    let id = shunt.connection_of(&doomed)?.context("listed")?["id"].as_str().context("id")?.to_owned();
    ensure!(shunt.cli(&["kill", &id])?.status.success());
    ensure!(end_of(&mut doomed, SOON)? == End::Reset, "the client");
    let record = echoing.wait_records(1, SOON)?.remove(0);
    ensure!(matches!(record.ended, Ended::Failed(_)), "the backend saw {:?}", record.ended);
    for (name, to) in [("six-four", at6(8102)), ("four-six", (GATEWAY, 8103).into())] {
        let mut stream = lab.client().connect(to)?;
        echo(&mut stream, b"hello")?;
        wait_for("it is decided", SOON, || {
            let labels = [("route", name), ("result", "address_families")];
            (shunt.metrics().ok()?.value("shunt_handovers_total", &labels) == 1.0).then_some(())
        })?;
        echo(&mut stream, b"still relayed")?;
        ensure!(shunt.engine_of(&stream)?.as_deref() != Some("handoff"));
    }
    Ok(())
}

#[test]
fn tls_behind_a_proxy_header_passes_through_to_its_server() -> Result<()> {
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    let mut page = vec![0; 8 << 20];
    Pattern::new(4).fill(&mut page);
    std::fs::create_dir(lab.dir().join("www"))?;
    std::fs::write(lab.dir().join("www/page"), &page)?;
    pki.sh("cat web.pem web.key > both.pem")?;
    let seen = "%[src]:%[src_port]";
    let haproxy = format!(
        "frontend f\n  bind :443 accept-proxy ssl crt {}\n  mode http\n  \
         http-request return status 200 content-type text/plain string \"ok\" hdr x-client \"{seen}\"\n",
        pki.file("both.pem")
    );
    let nginx = format!(
        "http {{ access_log off; server {{ listen 443 ssl proxy_protocol; ssl_certificate {0}.pem; ssl_certificate_key {0}.key;\n\
         root {1}/www; add_header X-Client $proxy_protocol_addr:$proxy_protocol_port always; }} }}",
        pki.file("web"),
        lab.dir().display()
    );
    let _servers = [lab.haproxy(lab.backend(1), &haproxy, 443)?, lab.nginx_with(lab.backend(2), &nginx, 443)?];
    let rest = format!(
        "match = {{ sni = [\"{NAME}\"] }}\ntls = {{ mode = \"passthrough\" }}\nproxy_protocol = {{ send = \"v2\" }}"
    );
    let programs = [("haproxy", 8443, lab.backend(1)), ("nginx", 8444, lab.backend(2))];
    let config = programs
        .map(|(name, port, host)| route(name, (GATEWAY, port).into(), SocketAddr::new(host.ip.into(), 443), &rest));
    let shunt = Shunt::start(&lab, &config.concat())?;
    let ca = pki.file("ca.pem");
    let talk = |name: &str, port: u16| -> Result<()> {
        let mut openssl = lab.client().command("openssl");
        openssl.args(["s_client", "-quiet", "-crlf", "-verify_return_error", "-CAfile", &ca, "-servername", NAME]);
        let mut client = Talk::start({
            openssl.args(["-connect", &format!("{GATEWAY}:{port}")]);
            openssl
        })?;
        let address = wait_for("openssl's connection is handed over", SOON, || {
            let listed = shunt.connections(name).ok()?;
            let one = listed.first().filter(|one| one["engine"] == "handoff")?;
            Some(one["client"].as_str()?.to_owned())
        })?;
        for _ in 0..3 {
            client.say(&format!("GET / HTTP/1.1\nHost: {NAME}\n"))?;
            let heard = client.hear_until(&address, SOON)?.to_lowercase();
            ensure!(heard.contains(&format!("x-client: {address}")), "{heard}");
        }
        drop(client);
        // The second request comes a second later, on the same connection.
        let url = format!("https://{NAME}:{port}");
        let body = lab.dir().join(format!("body-{name}"));
        let said = lab.client().sh(&format!(
            "curl -sS --max-time 20 --rate 1/s --cacert {ca} --resolve {NAME}:{port}:{GATEWAY} \
             -w '%{{num_connects}} %{{local_ip}}:%{{local_port}} %header{{x-client}}\\n' \
             -o /dev/null {url}/ -o {} {url}/page",
            body.display()
        ))?;
        let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
        ensure!(lines.len() == 2 && lines[0][0] == "1" && lines[1][0] == "0", "one connection, two requests: {said}");
        ensure!(lines.iter().all(|line| line[1] == line[2]), "the server saw another: {said}");
        ensure!(name != "nginx" || std::fs::read(&body)? == page, "another page");
        let labels = [("route", name), ("result", "done")];
        let handed = shunt.metrics()?.value("shunt_handovers_total", &labels);
        ensure!(handed == 2.0, "{handed} of 2 were handed over");
        shunt.wait_route(name, "both have ended", SOON, |r| (r["connections_active"] == 0).then_some(()))
    };
    thread::scope(|scope| {
        let threads = programs.map(|(name, port, _)| (name, scope.spawn(move || talk(name, port))));
        threads.into_iter().try_for_each(|(name, thread)| thread.join().expect("a program").context(name))
    })
}

#[test]
fn an_immortal_one_is_asked_whether_its_ends_are_there_and_ends_when_one_is_not() -> Result<()> {
    let lab = Lab::new()?;
    for (key, value) in [("time", "2"), ("intvl", "1"), ("probes", "3")] {
        lab.gateway().set_sysctl(&format!("net.ipv4.tcp_keepalive_{key}"), value)?;
    }
    let server = TcpServer::start(lab.backend(1), TO.backend_port(), Behaviour::Echo)?;
    let rest = "keepalive = \"immortal\"\ntimeouts = { idle = \"1s\" }";
    let six = SocketAddr::from((GATEWAY6, 8100));
    let config = [
        TO.route_to(&[Ipv4Addr::new(10, 88, 2, 2)], rest),
        route("six", six, SocketAddr::new(lab.backend(1).ip6.into(), TO.backend_port()), rest),
    ];
    let shunt = Shunt::start(&lab, &config.concat())?;
    let mut streams = [lab.client().connect(TO.listen())?, lab.client().connect(six)?];
    for stream in &mut streams {
        echo(stream, b"hello")?;
    }
    for stream in &streams {
        handed_over(&shunt, stream)?;
        let shown = || shunt.connection_of(stream).ok().flatten();
        // In silence, whatever an end sends is an answer.
        let packets = |way: &str| shown().and_then(|shown| shown[way].as_u64());
        let before = ["packets_in", "packets_out"].map(packets);
        wait_until("both ends have answered twice", SOON, || {
            let now = ["packets_in", "packets_out"].map(packets);
            now.iter().zip(before).all(|(now, before)| *now >= before.map(|before| before + 2))
        })?;
        let shown = shown().context("it lives")?;
        ensure!(shown["bytes_in"] == 5 && shown["bytes_out"] == 5, "a probe is no byte: {shown}");
    }
    for stream in &mut streams {
        echo(stream, b"still here")?;
    }
    link::lose(lab.client(), 100)?;
    for record in server.wait_records(2, SOON * 3)? {
        ensure!(matches!(record.ended, Ended::Failed(_)), "the backend saw {:?}", record.ended);
    }
    for name in [TO.route(), "six"] {
        shunt.wait_ended(name, &[("reset_by_client", 1)], SOON)?;
    }
    Ok(())
}
