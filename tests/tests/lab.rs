//! The lab itself keeps its promises. Everything else here stands on it.

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr},
    panic, thread,
    time::Duration,
};

use anyhow::{Context, Result};
use shunt_lab::{
    BACKEND_SIDE, CLIENT, GATEWAY, Lab, Talk, dialog,
    hello::Hello,
    kernel, link, patiently, pattern,
    scripted::{Behaviour, Ended, Start, TcpServer, UdpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);

fn namespaces_of(stem: &str) -> Vec<String> {
    let entries = fs::read_dir("/run/netns").expect("/run/netns exists once a lab has been made");
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(stem))
        .collect()
}

/// `shunt-<pid>-<n>-` of a lab.
fn stem(lab: &Lab) -> String {
    lab.client().name().trim_end_matches("client").to_owned()
}

#[test]
fn the_client_reaches_every_backend_through_the_gateway_on_both_families() -> Result<()> {
    let lab = Lab::builder().backends(3).build()?;
    for backend in lab.backends() {
        lab.client().sh(&format!("ping -c1 -W2 {}", backend.ip))?;
        lab.client().sh(&format!("ping -6 -c1 -W2 {}", backend.ip6))?;
    }
    let route = lab.client().sh(&format!("ip route get {}", lab.backend(1).ip))?;
    assert!(route.contains(&format!("via {GATEWAY}")), "{route}");
    Ok(())
}

#[test]
fn backends_reach_each_other_and_the_gateway() -> Result<()> {
    let lab = Lab::new()?;
    lab.backend(1).sh(&format!("ping -c1 -W2 {}", lab.backend(2).ip))?;
    lab.backend(1).sh(&format!("ping -6 -c1 -W2 {}", lab.backend(2).ip6))?;
    lab.gateway().sh(&format!("ping -c1 -W2 {}", lab.backend(2).ip))?;
    lab.backend(1).sh(&format!("ping -c1 -W2 {BACKEND_SIDE}"))?;
    Ok(())
}

#[test]
fn a_lab_leaves_no_namespace_and_no_file_behind() -> Result<()> {
    let lab = Lab::new()?;
    let (stem, dir) = (stem(&lab), lab.dir().to_owned());
    assert_eq!(namespaces_of(&stem).len(), 4);
    drop(lab);
    assert_eq!(namespaces_of(&stem), Vec::<String>::new());
    assert!(!dir.exists());
    Ok(())
}

#[test]
fn a_lab_goes_away_when_its_test_panics_and_its_servers_with_it() -> Result<()> {
    let outcome = panic::catch_unwind(|| {
        let lab = Lab::new().expect("lab");
        let server = lab.redis(lab.backend(1), 6379).expect("redis");
        let found = (stem(&lab), server.pid());
        panic::panic_any(found);
    });
    let panicked = outcome.expect_err("it panicked");
    let (stem, pid) = panicked.downcast_ref::<(String, u32)>().context("what it panicked with")?;
    assert_eq!(namespaces_of(stem), Vec::<String>::new());
    assert!(!fs::exists(format!("/proc/{pid}"))?);
    Ok(())
}

#[test]
fn two_labs_at_once_do_not_meet() -> Result<()> {
    let (one, two) = (Lab::new()?, Lab::new()?);
    let _server = TcpServer::start(one.backend(1), 7000, Behaviour::Echo)?;
    one.client().connect((one.backend(1).ip, 7000))?;
    let refused = two.client().connect((two.backend(1).ip, 7000));
    assert_eq!(refused.map(drop).map_err(|e| e.kind()), Err(io::ErrorKind::ConnectionRefused));
    Ok(())
}

#[test]
fn a_hand_written_rule_forwards_a_download_and_conntrack_sees_it() -> Result<()> {
    let lab = Lab::new()?;
    let page = vec![b'x'; 100_000];
    let _web = lab.nginx(lab.backend(1), 80, &[("page", page.clone())])?;
    let script = format!(
        "table ip handmade {{
           chain pre {{ type nat hook prerouting priority dstnat; ip daddr {GATEWAY} tcp dport 8080 dnat to {}:80; }}
           chain post {{ type nat hook postrouting priority srcnat; ct status dnat masquerade; }}
         }}",
        lab.backend(1).ip
    );
    kernel::nft_load(lab.gateway(), lab.dir(), &script)?;
    assert_eq!(lab.client().curl(&format!("http://{GATEWAY}:8080/page"))?, page);
    assert!(kernel::nft_ruleset(lab.gateway())?.contains("table ip handmade"));
    let entries = kernel::conntrack_list(lab.gateway(), "-p tcp --orig-port-dst 8080")?;
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert!(entries[0].contains(&format!("dst={BACKEND_SIDE}")), "{entries:?}");
    kernel::conntrack_flush(lab.gateway())?;
    assert_eq!(kernel::conntrack_count(lab.gateway())?, 0);
    Ok(())
}

#[test]
fn real_servers_answer() -> Result<()> {
    let lab = Lab::new()?;
    let backend = lab.backend(1);
    let _echo4 = lab.socat_tcp_echo(backend, 4, 7004)?;
    let _echo6 = lab.socat_tcp_echo(backend, 6, 7006)?;
    let _udp = lab.socat_udp_echo(backend, 4, 7007)?;
    let _redis = lab.redis(backend, 6379)?;
    let _iperf = lab.iperf3(backend, 5201)?;
    let client = lab.client();
    assert_eq!(client.sh(&format!("echo hi | socat -t2 - TCP:{}:7004", backend.ip))?, "hi\n");
    assert_eq!(client.sh(&format!("echo hi | socat -t2 - TCP6:[{}]:7006", backend.ip6))?, "hi\n");
    assert_eq!(client.sh(&format!("echo hi | socat -t2 - UDP:{}:7007", backend.ip))?, "hi\n");
    assert_eq!(client.sh(&format!("redis-cli -h {} ping", backend.ip))?, "PONG\n");
    let report = lab.iperf3_client((backend.ip, 5201), "-n 1M")?;
    assert!(report["end"]["sum_sent"]["bytes"].as_u64() >= Some(1 << 20), "{report}");
    Ok(())
}

#[test]
fn a_real_tls_server_answers_every_hello_that_is_built_here() -> Result<()> {
    let lab = Lab::new()?;
    let certificate = lab.certificate(&["a.example"])?;
    let (cert, key) = (certificate.cert.display(), certificate.key.display());
    let http = format!(
        "http {{ ssl_certificate {cert}; ssl_certificate_key {key}; ssl_protocols TLSv1.2 TLSv1.3;\n\
                server {{ listen 443 ssl; }} }}"
    );
    let _nginx = lab.nginx_with(lab.backend(1), &http, 443)?;
    let hello = Hello::to("a.example");
    for hello in [
        Hello::anonymous(),
        hello.clone().alpn(&["http/1.1"]),
        hello.clone().post_quantum(),
        hello.clone().padding(14_000),
        hello.in_records_of(100),
    ] {
        let mut stream = lab.client().connect((lab.backend(1).ip, 443))?;
        stream.write_all(&hello.build())?;
        let answer = dialog::read_some(&mut stream, 7)?;
        assert!(answer[..3] == [0x16, 3, 3] && answer[5] == 2, "no ServerHello to {hello:?}: {answer:?}");
    }
    Ok(())
}

#[test]
fn real_proxies_and_a_database_answer() -> Result<()> {
    let lab = Lab::new()?;
    let backend = lab.backend(1);
    let to = "listen l\n  bind :81\n  server s 127.0.0.1:80 send-proxy-v2\n";
    let http = "frontend f\n  bind :80 accept-proxy\n  mode http\n  http-request return status 200 content-type text/plain \
                lf-string \"%[src]\"\n";
    let _haproxy = lab.haproxy(backend, &format!("{to}{http}"), 80)?;
    assert_eq!(lab.client().curl(&format!("http://{}:81/", backend.ip))?, CLIENT.to_string().as_bytes());
    let stream = "stream { server { listen 82; proxy_pass 127.0.0.1:80; proxy_protocol on; } }";
    let _nginx = lab.nginx_with(backend, stream, 82)?;
    assert_eq!(lab.client().curl(&format!("http://{}:82/", backend.ip))?, CLIENT.to_string().as_bytes());
    let _postgres = lab.postgres(backend, 5432)?;
    let mut psql = lab.client().command("psql");
    psql.args(["-h", &backend.ip.to_string(), "-U", "postgres", "-Atq"]);
    let mut session = Talk::start(psql)?;
    session.say("select 6 * 7;")?;
    assert_eq!(session.hear(SOON)?, "42");
    Ok(())
}

#[test]
fn a_scripted_exchange_is_recorded_to_the_byte() -> Result<()> {
    let lab = Lab::new()?;
    let exchange = Behaviour::Exchange { seed: 2, bytes: 300_000, start: Start::AtOnce };
    let server = TcpServer::start(lab.backend(1), 7001, exchange)?;
    let mut stream = lab.client().connect((lab.backend(1).ip, 7001))?;
    let mut upstream = stream.try_clone()?;
    let sender = thread::spawn(move || -> io::Result<_> {
        let sent = pattern::send(&mut upstream, 1, 500_000)?;
        upstream.shutdown(Shutdown::Write)?;
        Ok(sent)
    });
    let received = pattern::receive(&mut stream)?;
    let sent = sender.join().expect("sender")?;
    assert_eq!(received, pattern::send(&mut io::sink(), 2, 300_000)?);
    let record = server.wait_records(1, SOON)?.remove(0);
    assert_eq!((record.received, record.sent, record.ended), (sent, 300_000, Ended::ClientFinished));
    assert_eq!(record.peer.ip().to_canonical(), CLIENT);
    Ok(())
}

#[test]
fn scripted_servers_reset_hold_and_reply_as_told() -> Result<()> {
    let lab = Lab::new()?;
    let (client, backend) = (lab.client(), lab.backend(1));

    let _reset = TcpServer::start(backend, 7002, Behaviour::ResetAtOnce)?;
    // The reset may be there before connect has returned.
    let outcome = client.connect((backend.ip, 7002)).and_then(|mut stream| stream.read(&mut [0]));
    assert_eq!(outcome.map_err(|e| e.kind()), Err(io::ErrorKind::ConnectionReset));

    let hold = TcpServer::start(backend, 7003, Behaviour::Hold)?;
    let held = (0..50).map(|_| client.connect((backend.ip, 7003))).collect::<Result<Vec<_>, _>>()?;
    wait_until("50 held", SOON, || hold.open() == 50)?;
    drop(held);

    let reply = TcpServer::start(backend, 7004, Behaviour::Reply(b"bye".to_vec()))?;
    let mut stream = client.connect((backend.ip, 7004))?;
    stream.write_all(b"hello")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    assert_eq!((answer.as_str(), reply.received()), ("bye", 5));
    Ok(())
}

#[test]
fn a_server_told_to_reset_its_connections_does() -> Result<()> {
    let lab = Lab::new()?;
    for behaviour in [Behaviour::Echo, Behaviour::Hold] {
        let server = TcpServer::start(lab.backend(1), 7000, behaviour)?;
        let mut stream = lab.client().connect((lab.backend(1).ip, 7000))?;
        wait_until("accepted", SOON, || server.open() == 1)?;
        server.end_all(true);
        let outcome = stream.read(&mut [0]).map_err(|e| e.kind());
        assert_eq!(outcome, Err(io::ErrorKind::ConnectionReset));
    }
    Ok(())
}

#[test]
fn a_udp_server_names_itself_on_both_families() -> Result<()> {
    let lab = Lab::new()?;
    let server = UdpServer::start(lab.backend(2), 5300, "two")?;
    let addresses: [IpAddr; 2] = [lab.backend(2).ip.into(), lab.backend(2).ip6.into()];
    for ip in addresses {
        let socket = lab.client().udp((lab.client().address_like(ip), 0))?;
        socket.set_read_timeout(Some(patiently(SOON)))?;
        socket.send_to(b"ping", SocketAddr::new(ip, 5300))?;
        let mut buffer = [0; 64];
        let n = socket.recv(&mut buffer)?;
        assert_eq!(&buffer[..n], b"two:ping");
    }
    assert_eq!((server.datagrams(), server.bytes()), (2, 8));
    Ok(())
}

#[test]
fn a_link_can_be_slowed_where_the_kernel_can() -> Result<()> {
    let lab = Lab::new()?;
    if !link::has_netem(lab.backend(1)) {
        eprintln!("no netem in this kernel: nothing to see");
        return Ok(());
    }
    link::netem(lab.backend(1), "eth0", "delay 60ms")?;
    let ping = lab.client().sh(&format!("ping -c1 -W2 {}", lab.backend(1).ip))?;
    let milliseconds = ping.split("time=").nth(1).and_then(|t| t.split(' ').next()?.parse::<f64>().ok());
    assert!(milliseconds.is_some_and(|ms| ms >= 60.0), "{ping}");
    link::netem_off(lab.backend(1), "eth0")
}

#[test]
fn a_host_can_lose_packets_and_a_link_its_offloads() -> Result<()> {
    let lab = Lab::new()?;
    link::offloads(lab.backend(1), "eth0", false)?;
    let features = lab.backend(1).sh("ethtool -k eth0")?;
    assert!(features.contains("tcp-segmentation-offload: off"), "{features}");
    link::lose(lab.backend(1), 100)?;
    assert!(lab.client().sh(&format!("ping -c1 -W1 {}", lab.backend(1).ip)).is_err());
    lab.client().sh(&format!("ping -c1 -W2 {}", lab.backend(2).ip))?;
    Ok(())
}

#[test]
fn every_client_address_is_usable() -> Result<()> {
    let lab = Lab::builder().client_addresses(3).build()?;
    let server = TcpServer::start(lab.backend(1), 7000, Behaviour::sink())?;
    for ip in lab.client_addresses() {
        lab.client().connect_from((ip, 0), (lab.backend(1).ip, 7000))?;
    }
    let mut peers: Vec<_> = server.wait_records(3, SOON)?.iter().map(|r| r.peer.ip().to_canonical()).collect();
    peers.sort();
    assert_eq!(peers, [2, 3, 4].map(|n| IpAddr::from(Ipv4Addr::new(10, 88, 1, n))));
    Ok(())
}

#[test]
fn a_sysctl_of_a_host_stays_inside_it() -> Result<()> {
    let lab = Lab::new()?;
    let outside = fs::read_to_string("/proc/sys/net/ipv4/tcp_fin_timeout")?;
    lab.backend(1).set_sysctl("net.ipv4.tcp_fin_timeout", "7")?;
    assert_eq!(lab.backend(1).sysctl("net.ipv4.tcp_fin_timeout")?, "7");
    assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/tcp_fin_timeout")?, outside);
    Ok(())
}
