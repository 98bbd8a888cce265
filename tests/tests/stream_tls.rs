//! TLS that ends and begins in the daemon, with the clients and servers people use: curl, openssl, nginx, HAProxy, wrk.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt, Talk,
    pki::Pki,
    scripted::{Behaviour, TcpServer},
    wait_for, wait_until,
};

const SOON: Duration = Duration::from_secs(10);

fn route(name: &str, port: u16, backend: u16, more: &str) -> String {
    format!(
        "[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:{port}\"]\nbackends = [\"10.88.2.2:{backend}\"]\n{more}\n"
    )
}

/// The body, and which version of HTTP it came by.
fn curl(lab: &Lab, pki: &Pki, name: &str, port: u16, more: &str) -> Result<String> {
    let ca = pki.file("ca.pem");
    lab.client().sh(&format!(
        "curl -sS --max-time 10 --cacert {ca} --resolve {name}:{port}:10.88.1.1 -w ' %{{http_version}}' {more} https://{name}:{port}/page"
    ))
}

/// What `openssl s_client` writes when it sends a line and reads the echo.
fn s_client(lab: &Lab, pki: &Pki, name: &str, port: u16, more: &str) -> Result<String> {
    let ca = pki.file("ca.pem");
    lab.client().sh(&format!(
        "(echo hello; sleep 0.4) | timeout 5 openssl s_client -connect 10.88.1.1:{port} -servername {name} -CAfile {ca} {more} 2>&1 || true"
    ))
}

const NGINX: &str =
    "http { access_log off; default_type text/plain; server { LISTEN; location / { return 200 'BODY'; } } }";

fn nginx(listen: &str, body: &str) -> String {
    NGINX.replace("LISTEN", listen).replace("BODY", body)
}

#[test]
fn browsers_protocols_are_ended_and_begun_again_and_counted() -> Result<()> {
    let lab = Lab::new()?;
    let pki = Pki::new(&lab)?;
    pki.issue("web", "ec", "web.example")?;
    pki.issue("inner", "rsa", "inner.example")?;
    let backend = lab.backend(1);
    let _h1 = lab.nginx_with(backend, &nginx("listen 8080", "one"), 8080)?;
    let _h2 = lab.nginx_with(backend, &nginx("listen 8081 http2", "two"), 8081)?;
    let tls = format!(
        "listen 8443 ssl http2; ssl_certificate {}; ssl_certificate_key {}",
        pki.file("inner.pem"),
        pki.file("inner.key")
    );
    let _tls = lab.nginx_with(backend, &nginx(&tls, "inner $server_protocol"), 8443)?;
    let again = format!("[route.backend_tls]\nca = \"{}\"\nserver_name = \"inner.example\"\n", pki.file("ca.pem"));
    let both = pki.terminate(&["web"], "alpn = [\"h2\", \"http/1.1\"]");
    let config = [
        route("h1", 443, 8080, &pki.terminate(&["web"], "alpn = [\"http/1.1\"]")),
        route("h2", 444, 8081, &pki.terminate(&["web"], "alpn = [\"h2\"]")),
        route("again", 445, 8443, &format!("{both}{again}")),
    ];
    let shunt = Shunt::start(&lab, &config.concat())?;
    ensure!(curl(&lab, &pki, "web.example", 443, "")? == "one 1.1");
    ensure!(curl(&lab, &pki, "web.example", 444, "--http2")? == "two 2");
    ensure!(curl(&lab, &pki, "web.example", 445, "--http2")? == "inner HTTP/2.0 2");
    ensure!(curl(&lab, &pki, "web.example", 445, "--http1.1 --tls-max 1.2")? == "inner HTTP/1.1 1.1");
    shunt.wait_ended("h1", &[("finished_client_first", 1)], SOON)?;
    for (name, count) in [("h2", 1), ("again", 2)] {
        // An HTTP/2 server says good-bye to a client that has closed, which answers with a reset.
        shunt.wait_route(name, "all ended", SOON, |r| {
            (r["connections_active"] == 0 && r["connections_total"] == count).then_some(())
        })?;
        let reasons = shunt.terminations(name)?;
        ensure!(reasons.keys().all(|r| r.starts_with("finished_") || r == "reset_by_client"), "{reasons:?}");
    }
    let metrics = shunt.metrics()?;
    let shaken = |result: &str| metrics.value("shunt_tls_handshakes_total", &[("route", "again"), ("result", result)]);
    ensure!(shaken("full") == 2.0 && shaken("backend_full") + shaken("backend_resumed") == 2.0);
    let expires = metrics.value("shunt_tls_certificate_expiry_seconds", &[("name", &pki.file("web.pem"))]);
    ensure!(expires > 1.7e9, "{expires}");
    let explained = String::from_utf8(shunt.cli(&["explain", "again"])?.stdout)?;
    ensure!(explained.contains("TLS with the client ends in it") && explained.contains("begins TLS"), "{explained}");
    Ok(())
}

#[test]
fn openssl_resumes_in_both_versions_and_gets_the_key_it_can_check() -> Result<()> {
    let lab = Lab::new()?;
    let pki = Pki::new(&lab)?;
    pki.issue("ec", "ec", "web.example")?;
    pki.issue("rsa", "rsa", "web.example")?;
    let _server = TcpServer::start(lab.backend(1), 7, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &route("web", 443, 7, &pki.terminate(&["ec", "rsa"], "")))?;
    for version in ["-tls1_2", "-tls1_3"] {
        let session = pki.file(&format!("session{version}"));
        let first = s_client(&lab, &pki, "web.example", 443, &format!("{version} -sess_out {session}"))?;
        ensure!(first.contains("New, TLSv1") && first.contains("Verify return code: 0 (ok)"), "{first}");
        ensure!(first.contains("hello"), "no echo: {first}");
        let second = s_client(&lab, &pki, "web.example", 443, &format!("{version} -sess_in {session}"))?;
        ensure!(second.contains("Reused, TLSv1"), "{version}: {second}");
    }
    for (sigalgs, told) in [("ECDSA+SHA256", "ECDSA"), ("RSA-PSS+SHA256", "RSA-PSS")] {
        for version in ["-tls1_2", "-tls1_3"] {
            let seen = s_client(&lab, &pki, "web.example", 443, &format!("{version} -sigalgs {sigalgs}"))?;
            ensure!(seen.contains(&format!("Peer signature type: {told}")), "{version} {sigalgs}: {seen}");
        }
    }
    let metrics = shunt.metrics()?;
    let shaken = |result: &str| metrics.value("shunt_tls_handshakes_total", &[("route", "web"), ("result", result)]);
    ensure!(shaken("resumed") == 2.0 && shaken("full") == 6.0, "{} {}", shaken("resumed"), shaken("full"));
    Ok(())
}

#[test]
fn one_port_passes_one_name_through_and_ends_tls_of_another() -> Result<()> {
    let lab = Lab::new()?;
    let pki = Pki::new(&lab)?;
    pki.issue("ended", "ec", "ended.example")?;
    pki.issue("passed", "ec", "passed.example")?;
    let _plain = lab.nginx_with(lab.backend(1), &nginx("listen 8080", "ended"), 8080)?;
    let tls = format!(
        "listen 8443 ssl; ssl_certificate {}; ssl_certificate_key {}",
        pki.file("passed.pem"),
        pki.file("passed.key")
    );
    let _tls = lab.nginx_with(lab.backend(1), &nginx(&tls, "passed"), 8443)?;
    let config = [
        route("passed", 443, 8443, "match = { sni = [\"passed.example\"] }\ntls = { mode = \"passthrough\" }"),
        route(
            "ended",
            443,
            8080,
            &format!("match = {{ sni = [\"ended.example\"] }}\n{}", pki.terminate(&["ended"], "")),
        ),
    ];
    let shunt = Shunt::start(&lab, &config.concat())?;
    ensure!(curl(&lab, &pki, "passed.example", 443, "")?.starts_with("passed"));
    ensure!(curl(&lab, &pki, "ended.example", 443, "")?.starts_with("ended"));
    shunt.wait_route("passed", "ended", SOON, |r| (r["connections_total"] == 1).then_some(()))?;
    shunt.wait_ended("ended", &[("finished_client_first", 1)], SOON)
}

#[test]
fn a_client_certificate_is_asked_for_and_its_absence_counted() -> Result<()> {
    let lab = Lab::new()?;
    let pki = Pki::new(&lab)?;
    pki.issue("web", "ec", "web.example")?;
    pki.issue("alice", "rsa", "alice")?;
    let _nginx = lab.nginx_with(lab.backend(1), &nginx("listen 8080", "in"), 8080)?;
    let mutual = pki.terminate(&["web"], &format!("client_ca = \"{}\"", pki.file("ca.pem")));
    let shunt = Shunt::start(&lab, &route("web", 443, 8080, &mutual))?;
    ensure!(curl(&lab, &pki, "web.example", 443, "").is_err());
    let with = format!("--cert {} --key {}", pki.file("alice.pem"), pki.file("alice.key"));
    ensure!(curl(&lab, &pki, "web.example", 443, &with)?.starts_with("in"));
    shunt.wait_ended("web", &[("tls_handshake_failed", 1), ("finished_client_first", 1)], SOON)?;
    let told = &[("route", "web"), ("result", "no_certificate")];
    ensure!(shunt.metrics()?.value("shunt_tls_handshakes_total", told) == 1.0);
    Ok(())
}

#[test]
fn certificates_are_renewed_under_load_and_bad_ones_are_not_taken() -> Result<()> {
    let lab = Lab::new()?;
    let pki = Pki::new(&lab)?;
    pki.issue("web", "ec", "web.example")?;
    let _nginx = lab.nginx_with(lab.backend(1), &nginx("listen 8080", "page"), 8080)?;
    let config = route("web", 443, 8080, &pki.terminate(&["web"], ""));
    let shunt = Shunt::start(&lab, &config)?;
    let serial = || {
        let seen = s_client(&lab, &pki, "web.example", 443, "| openssl x509 -noout -serial")?;
        Ok::<_, anyhow::Error>(seen.lines().find(|l| l.starts_with("serial=")).map(str::to_owned))
    };
    let before = serial()?.context("a serial number")?;
    let reloads = |result: &str| {
        shunt.metrics().map(|m| m.value("shunt_tls_certificate_reloads_total", &[("result", result)])).unwrap_or(-1.0)
    };
    // Every request is a handshake.
    let load = "wrk -t1 -c4 -d6s --timeout 10s -H 'Connection: close' -H 'Host: web.example' https://10.88.1.1:443/page";
    let report = std::thread::scope(|scope| {
        let load = scope.spawn(|| lab.client().sh(load));
        for round in 1..=2 {
            // As a renewal does it: written beside, then renamed.
            pki.issue("next", "ec", "web.example")?;
            pki.sh("mv next.pem web.pem; sleep 0.05; mv next.key web.key")?;
            wait_until("it is taken", SOON, || reloads("ok") >= f64::from(round))?;
        }
        load.join().expect("no panic")
    })?;
    ensure!(!report.contains("Socket errors") && !report.contains("Non-2xx"), "{report}");
    println!("{report}");
    let after = serial()?.context("a serial number")?;
    ensure!(after != before, "still {before}");
    pki.sh("openssl ecparam -name prime256v1 -genkey -noout -out web.key")?;
    wait_until("the stranger's key is refused", SOON, || reloads("failed") == 1.0)?;
    ensure!(serial()?.as_ref() == Some(&after));
    let status = shunt.cli_json(&["status"])?.to_string();
    ensure!(status.contains("is not the key of the first certificate"), "{status}");
    let checked = shunt.command(&["check", &shunt.config_file().display().to_string()]).output()?;
    ensure!(checked.status.code() == Some(1), "{checked:?}");
    // A reload that does not change the route does not stumble over it; one that does is refused.
    ensure!(shunt.reload(&config).is_ok());
    ensure!(shunt.reload(&config.replace("mode = ", "min_version = \"1.3\"\nmode = ")).is_err());
    ensure!(serial()?.as_ref() == Some(&after));
    pki.issue("web", "ec", "web.example")?;
    wait_until("a good pair is taken again", SOON, || reloads("ok") >= 3.0)?;
    shunt.reload(&config)?;
    let status = shunt.cli_json(&["status"])?.to_string();
    ensure!(!status.contains("is not the key"), "{status}");
    Ok(())
}

#[test]
fn a_proxy_in_front_and_one_behind_learn_who_the_client_is() -> Result<()> {
    let lab = Lab::new()?;
    let pki = Pki::new(&lab)?;
    pki.issue("web", "ec", "web.example")?;
    let _nginx = lab.nginx_with(lab.backend(1), &nginx("listen 8080 proxy_protocol", "$proxy_protocol_addr"), 8080)?;
    let _tls = lab.nginx_with(
        lab.backend(1),
        &nginx(
            &format!(
                "listen 8443 ssl proxy_protocol; ssl_certificate {}; ssl_certificate_key {}",
                pki.file("web.pem"),
                pki.file("web.key")
            ),
            "$proxy_protocol_addr",
        ),
        8443,
    )?;
    let proxy = "proxy_protocol = { accept_from = [\"10.88.1.1/32\"], send = \"v2\" }\n";
    let again = format!("[route.backend_tls]\nca = \"{}\"\nserver_name = \"web.example\"\n", pki.file("ca.pem"));
    let ends = pki.terminate(&["web"], "");
    let config = [
        route("plain", 443, 8080, &format!("{proxy}{ends}")),
        route("again", 444, 8443, &format!("{proxy}{ends}{again}")),
    ];
    let shunt = Shunt::start(&lab, &config.concat())?;
    let sections = "listen a\n  bind 10.88.1.1:9443\n  server s 10.88.1.1:443 send-proxy-v2\nlisten b\n  bind 10.88.1.1:9444\n  \
                    server s 10.88.1.1:444 send-proxy";
    let _haproxy = lab.haproxy(lab.gateway(), sections, 9443)?;
    let client = lab.client().ip.to_string();
    for port in [9443, 9444] {
        let seen = curl(&lab, &pki, "web.example", port, "").with_context(|| shunt.log())?;
        ensure!(seen == format!("{client} 1.1"), "{port}: {seen}");
    }
    Ok(())
}

#[test]
fn much_goes_through_two_encryptions_byte_for_byte_with_bounded_memory() -> Result<()> {
    let lab = Lab::new()?;
    let pki = Pki::new(&lab)?;
    pki.issue("web", "ec", "web.example")?;
    pki.sh("head -c 268435456 /dev/urandom > page && chmod 644 page && chmod 755 . ..")?;
    let root = pki.file("");
    let server = format!(
        "http {{ access_log off; server {{ listen 8443 ssl; ssl_certificate {}; ssl_certificate_key {}; root {root}; }} }}",
        pki.file("web.pem"),
        pki.file("web.key")
    );
    let _nginx = lab.nginx_with(lab.backend(1), &server, 8443)?;
    let again = format!("[route.backend_tls]\nca = \"{}\"\nserver_name = \"web.example\"\n", pki.file("ca.pem"));
    let mut shunt = Shunt::start(&lab, &route("web", 443, 8443, &format!("{}{again}", pki.terminate(&["web"], ""))))?;
    let rss = |pid: u32| -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("VmRSS")?;
        Ok(line.split_whitespace().nth(1).context("kB")?.parse()?)
    };
    let pid = shunt.process()?.pid();
    let before = rss(pid)?;
    let expected = pki.sh("sha256sum < page")?;
    let ca = pki.file("ca.pem");
    // Four at once; one of them reads slowly for a while.
    let seen = lab.client().sh(&format!(
        "for n in 1 2 3; do curl -sS --max-time 120 --cacert {ca} --resolve web.example:443:10.88.1.1 https://web.example/page | sha256sum & done; \
         curl -sS --max-time 120 --cacert {ca} --resolve web.example:443:10.88.1.1 https://web.example/page | (sleep 2; cat) | sha256sum; wait"
    ))?;
    ensure!(seen.lines().count() == 4 && seen.lines().all(|line| line == expected.trim()), "{seen} {expected}");
    let grown = rss(pid)?.saturating_sub(before);
    println!("grown by {grown} kB");
    ensure!(grown < 16 * 1024, "grown by {grown} kB");
    wait_for("the route's end", SOON, || {
        let route = shunt.route("web").ok()?;
        (route["connections_active"] == 0 && route["bytes_out"].as_u64() > Some(4 << 28)).then_some(())
    })
}

const IDLE_CLIENT: &str = r#"
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
held = []
for n in range(1000):
    stream = context.wrap_socket(socket.create_connection(("10.88.1.1", 443)), server_hostname="web.example")
    stream.sendall(b"x" * 50000)
    left = 50000
    while left:
        left -= len(stream.recv(65536))
    held.append(stream)
print("held", flush=True)
sys.stdin.readline()
for stream in held:
    stream.sendall(b"y")
    assert stream.recv(1) == b"y"
    stream.unwrap()
print("alive", flush=True)
"#;

#[test]
fn a_connection_that_is_silent_holds_no_buffer_and_lives_on() -> Result<()> {
    const CONNECTIONS: u64 = 1000;
    let lab = Lab::new()?;
    let pki = Pki::new(&lab)?;
    pki.issue("web", "ec", "web.example")?;
    let _server = TcpServer::start(lab.backend(1), 7, Behaviour::Echo)?;
    let mut shunt = Shunt::start(&lab, &route("web", 443, 7, &pki.terminate(&["web"], "")))?;
    let resident = |pid: u32| shunt_lab::kernel::resident_bytes(pid);
    let pid = shunt.process()?.pid();
    ensure!(
        curl(&lab, &pki, "web.example", 443, "--max-time 1").is_err(),
        "an echo is no HTTP; its buffers are there now"
    );
    let before = resident(pid)?;
    let mut command = lab.client().command("/usr/bin/python3");
    command.args(["-u", "-c", IDLE_CLIENT, &pki.file("ca.pem")]);
    let mut client = Talk::start(command)?;
    ensure!(client.hear(SOON * 6)? == "held");
    let each = resident(pid)?.saturating_sub(before) / CONNECTIONS;
    println!("{each} bytes per idle connection");
    // A buffer for one record alone would be 16 KiB.
    ensure!(each < 12 * 1024, "{each} bytes per idle connection");
    client.say("")?;
    ensure!(client.hear(SOON * 3)? == "alive");
    shunt.wait_route("web", "all ended", SOON, |r| (r["connections_active"] == 0).then_some(()))
}
