//! Programs that people use, over TLS that ends in the daemon: load over HTTP/2, client certificates, a browser.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use shunt_lab::{Lab, Running, Shunt, Talk, pki::Pki, relay::Relay, tls::NAME};

const SOON: Duration = Duration::from_secs(10);

/// One page for each protocol and each way: plain or TLS towards the backend.
struct Site {
    _servers: Vec<Running>,
    shunt: Shunt,
}

/// HTTP/1.1, HTTP/2.
const PROTOCOLS: [(&str, &str); 2] = [("h1", "http/1.1"), ("h2", "h2")];

fn port(relay: Relay, protocol: usize) -> u16 {
    (if relay == Relay::Again { 8443 } else { 443 }) + protocol as u16
}

/// `location`: what nginx does with every request.
fn site(lab: &Lab, location: &str) -> Result<Site> {
    let pki = &lab.tls()?.pki;
    let (mut servers, mut config) = (Vec::new(), String::new());
    for (nth, (name, alpn)) in PROTOCOLS.into_iter().enumerate() {
        for relay in Relay::TLS {
            let again = relay == Relay::Again;
            let backend = port(relay, nth);
            let pair = format!("ssl_certificate {0}.pem; ssl_certificate_key {0}.key;", pki.file("web"));
            let (tls, pair) = if again { ("ssl", pair.as_str()) } else { ("", "") };
            let http2 = if alpn == "h2" { "http2" } else { "" };
            let server = format!(
                "http {{ access_log off; default_type text/html; keepalive_requests 1000000; \
                 server {{ listen {backend} {tls} {http2}; {pair} location / {{ {location} }} }} }}"
            );
            servers.push(lab.nginx_with(lab.backend(1), &server, backend)?);
            config.push_str(&format!(
                "[[route]]\nname = \"{}-{name}\"\nlisten = [\"10.88.1.1:{backend}\"]\nbackends = [\"10.88.2.2:{backend}\"]\n{}{}",
                relay.route(),
                pki.terminate(&["web"], &format!("alpn = [\"{alpn}\"]")),
                if again { pki.again(NAME) } else { String::new() }
            ));
        }
    }
    Ok(Site { _servers: servers, shunt: Shunt::start(lab, &config)? })
}

#[test]
fn load_of_http_2_and_http_1_has_no_error() -> Result<()> {
    const REQUESTS: u32 = 6000;
    let lab = Lab::new()?;
    let body = "x".repeat(3000);
    let site = site(&lab, &format!("return 200 '{body}';"))?;
    for relay in Relay::TLS {
        for (nth, (name, _)) in PROTOCOLS.into_iter().enumerate() {
            let port = port(relay, nth);
            let protocol = if name == "h1" { "--h1" } else { "" };
            let report = lab.client().sh(&format!(
                "timeout 60 h2load {protocol} -n {REQUESTS} -c 20 -m 10 --connect-to=10.88.1.1:{port} https://{NAME}:{port}/"
            ))?;
            let of = |what: &str| report.lines().find(|line| line.starts_with(what)).unwrap_or_default().to_owned();
            println!("{relay:?} {name}: {}", of("finished in"));
            let all = format!("{REQUESTS} succeeded, 0 failed, 0 errored, 0 timeout");
            ensure!(of("requests:").contains(&all), "{report}");
            ensure!(of("Application protocol:").ends_with(PROTOCOLS[nth].1), "{report}");
            let route = format!("{}-{name}", relay.route());
            site.shunt.wait_route(&route, "all have ended", SOON, |r| (r["connections_active"] == 0).then_some(()))?;
        }
    }
    Ok(())
}

#[test]
fn openssl_shows_its_certificate_and_resumes_without_showing_it_again() -> Result<()> {
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    pki.issue("alice", "ec", "alice")?;
    let strange = Pki::named(&lab, "strange")?;
    strange.issue("mallory", "rsa", "mallory")?;
    let _server = shunt_lab::scripted::TcpServer::start(lab.backend(1), 7, shunt_lab::scripted::Behaviour::Echo)?;
    let mutual = pki.terminate(&["web"], &format!("client_ca = \"{}\"", pki.file("ca.pem")));
    let config =
        format!("[[route]]\nname = \"web\"\nlisten = [\"10.88.1.1:443\"]\nbackends = [\"10.88.2.2:7\"]\n{mutual}");
    let shunt = Shunt::start(&lab, &config)?;
    let s_client = |how: &str| {
        let mut command = lab.client().command("bash");
        let (ca, to) = (pki.file("ca.pem"), "10.88.1.1:443");
        command
            .args(["-c", &format!("exec openssl s_client -connect {to} -servername {NAME} -CAfile {ca} {how} 2>&1")]);
        Talk::start(command)
    };
    let with = |pki: &Pki, stem: &str| {
        format!("-cert {} -key {}", pki.file(&format!("{stem}.pem")), pki.file(&format!("{stem}.key")))
    };
    let echoes = |client: &mut Talk| -> Result<()> {
        client.say("hello")?;
        client.hear_until("hello", SOON).map(drop)
    };
    for version in ["-tls1_2", "-tls1_3"] {
        let session = pki.file(&format!("session{version}"));
        let mut client = s_client(&format!("{version} {} -sess_out {session}", with(pki, "alice")))?;
        client.hear_until("Acceptable client certificate CA names", SOON)?;
        echoes(&mut client)?;
        client.finish();
        client.hear_until("DONE", SOON)?;
        let mut client = s_client(&format!("{version} -sess_in {session}"))?;
        client.hear_until("Reused, TLSv1", SOON)?;
        echoes(&mut client)?;
        for how in [String::new(), with(&strange, "mallory")] {
            let mut client = s_client(&format!("{version} {how}"))?;
            client.hear_until("SSL alert number", SOON).with_context(|| format!("{version} {how}"))?;
        }
    }
    let metrics = shunt.metrics()?;
    let counted = ["full", "resumed", "no_certificate", "bad_certificate"]
        .map(|result| metrics.value("shunt_tls_handshakes_total", &[("route", "web"), ("result", result)]));
    ensure!(counted == [2.0; 4], "{counted:?}");
    Ok(())
}

const PAGE: &str = r#"<html><body><p id=said>nothing yet</p><script>
const protocol = performance.getEntriesByType("navigation")[0].nextHopProtocol;
Promise.all([1, 2, 3].map(n => fetch("/data?" + n).then(answer => answer.text()))).then(texts => {
  document.getElementById("said").textContent = "loaded by " + protocol + ", " + texts.map(t => t.length);
});
</script></body></html>"#;

/// `apt-get install --no-install-recommends chromium` (400 MB, and none of Ubuntu's), then
/// `cargo xtask test a_browser -- --ignored --nocapture`.
#[test]
#[ignore = "needs a browser"]
fn a_browser_loads_a_page_and_what_it_asks_for() -> Result<()> {
    ensure!(Path::new("/usr/bin/chromium").exists(), "no chromium: apt-get install --no-install-recommends chromium");
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    let page = format!(
        "if ($request_uri ~ data) {{ return 200 '{}'; }} return 200 '{}';",
        "x".repeat(2000),
        PAGE.replace('\n', " ")
    );
    let site = site(&lab, &page.replace("$request_uri ~ data", "$request_uri ~ /data"))?;
    let key = pki.sh("openssl x509 -in web.pem -pubkey -noout | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64")?;
    for relay in Relay::TLS {
        for (nth, (name, alpn)) in PROTOCOLS.into_iter().enumerate() {
            let port = port(relay, nth);
            let profile = lab.dir().join(format!("profile-{port}"));
            let dom = lab.client().sh(&format!(
                "timeout 60 chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
                 --disable-background-networking --disable-component-update --disable-sync --user-data-dir={} \
                 --ignore-certificate-errors-spki-list={} --host-resolver-rules='MAP {NAME} 10.88.1.1' \
                 --virtual-time-budget=10000 --dump-dom https://{NAME}:{port}/ 2>/dev/null",
                profile.display(),
                key.trim()
            ))?;
            let said = dom.split("id=\"said\">").nth(1).and_then(|rest| rest.split('<').next()).context(dom.clone())?;
            println!("{relay:?} {name}: {said}");
            ensure!(said == format!("loaded by {alpn}, 2000,2000,2000"), "{dom}");
            let route = format!("{}-{name}", relay.route());
            let bytes = site.shunt.route(&route)?["bytes_out"].as_u64();
            ensure!(bytes > Some(6000), "it did not pass through the daemon: {bytes:?}");
        }
    }
    Ok(())
}

/// The lengths of the records of application data that a client gets with a page, in their order.
fn records(lab: &Lab, port: u16, path: &str) -> Result<Vec<usize>> {
    let seen = lab.client().sh(&format!(
        "printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' | timeout 20 openssl s_client -connect 10.88.1.1:{port} -tls1_3 -msg -quiet 2>&1 \
         | grep -a -A1 '<<< .*RecordHeader' | grep -a -o '17 03 03 .. ..' || true"
    ))?;
    let length = |line: &str| usize::from_str_radix(&line.get(9..)?.replace(' ', ""), 16).ok();
    Ok(seen.lines().filter_map(length).collect())
}

#[test]
fn the_first_records_fit_into_a_segment_and_the_rest_are_full() -> Result<()> {
    /// A full record, its type and its tag.
    const FULL: usize = (16 << 10) + 1 + 16;
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    let _nginx = lab.nginx(lab.backend(1), 80, &[("page", vec![b'x'; 4 << 20])])?;
    let config = format!(
        "[[route]]\nname = \"web\"\nlisten = [\"10.88.1.1:443\"]\nbackends = [\"10.88.2.2:80\"]\n{}",
        pki.terminate(&["web"], "")
    );
    let _shunt = Shunt::start(&lab, &config)?;
    let all = records(&lab, 443, "/page")?;
    // The handshake's own are small, and look the same.
    let begin = all.iter().position(|length| *length > 1300).context("no record of the page")?;
    let page = &all[begin..];
    let small = page.iter().take_while(|length| **length <= 1500).count();
    let full = page.iter().filter(|length| **length == FULL).count();
    println!("{} records: {small} small ones, then {full} full ones of {}", page.len(), page.len() - small);
    ensure!((6..=10).contains(&small), "{:?}", &page[..12]);
    ensure!(full * 10 > (page.len() - small) * 8, "{full} of {} are full", page.len() - small);
    Ok(())
}
