//! TLS while much goes on: certificates are renewed, and what is established does not notice.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt, Stream,
    dialog::echo,
    load,
    relay::{Relay, servers_with_tls},
    scripted::Behaviour,
    tls::{self, NAME, Versions},
    wait_until,
};

const SOON: Duration = Duration::from_secs(20);

/// Handshakes one after the other, on each way in turn, until told to stop.
fn come_and_go(lab: &Lab, versions: Versions, resume: bool, stop: &AtomicBool, made: &AtomicU64) -> Result<()> {
    let config = || -> Result<_> {
        let config = tls::client_config(&lab.tls()?.pki, versions, None)?;
        Ok(Arc::new(if resume { config } else { tls::without_resumption(config) }))
    };
    // A ticket is of one route.
    let configs = [config()?, config()?];
    for nth in 0.. {
        if stop.load(Relaxed) {
            break;
        }
        let relay = Relay::TLS[nth % 2];
        let what = || format!("handshake {nth}, {relay:?}, {versions:?}");
        let mut stream =
            tls::connect(&configs[nth % 2], NAME, lab.client().connect(relay.listen())?).with_context(what)?;
        echo(&mut stream, b"served").with_context(what)?;
        made.fetch_add(1, Relaxed);
    }
    Ok(())
}

/// Renews the certificate, each time in another way, and waits until it is what clients see.
fn renew(lab: &Lab, nth: usize) -> Result<()> {
    let material = lab.tls()?;
    let pki = &material.pki;
    let kind = ["rsa", "ec"][nth % 2];
    if nth % 4 < 2 {
        // In place, file by file: the pair does not match for a while.
        pki.issue("web", kind, NAME)?;
    } else {
        pki.issue("next", kind, NAME)?;
        pki.sh("mv next.pem web.pem && sleep 0.05 && mv next.key web.key")?;
    }
    pki.sh("openssl x509 -in web.pem -outform DER -out web.der")?;
    let new = fs::read(pki.file("web.der"))?;
    let probe = Arc::new(tls::without_resumption(tls::client_config(pki, Versions::Both, None)?));
    wait_until(&format!("renewal {nth} is served"), SOON, || {
        Relay::TLS.iter().all(|relay| {
            let stream = lab.client().connect(relay.listen()).and_then(|tcp| tls::connect(&probe, NAME, tcp));
            stream.is_ok_and(|stream| stream.peer_certificate().as_ref() == Some(&new))
        })
    })
}

#[test]
fn certificates_swapped_under_a_thousand_connections_fail_no_handshake() -> Result<()> {
    const HELD: usize = 1000;
    const RENEWALS: usize = 6;
    load::allow_descriptors(8000)?;
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &format!("[log]\naccess = \"off\"\n{}", Relay::routes_with_tls(&lab, "")?))?;
    let open = |nth: usize| Relay::TLS[nth % 2].open(&lab).with_context(|| format!("connection {nth}"));
    let mut held: Vec<Stream> = (0..HELD).map(open).collect::<Result<_>>()?;
    let (stop, made, said) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let outcome = thread::scope(|scope| -> Result<()> {
        let (lab, stop, made, said) = (&lab, &stop, &made, &said);
        let kinds =
            [(Versions::Only13, false), (Versions::Only12, false), (Versions::Only13, true), (Versions::Only12, true)];
        let load: Vec<_> = kinds
            .map(|(versions, resume)| scope.spawn(move || come_and_go(lab, versions, resume, stop, made)))
            .into_iter()
            .collect();
        let held = &mut held;
        let talk = scope.spawn(move || -> Result<()> {
            while !stop.load(Relaxed) {
                for (nth, stream) in held.iter_mut().enumerate() {
                    echo(stream, b"alive").with_context(|| format!("held connection {nth}"))?;
                    said.fetch_add(1, Relaxed);
                }
            }
            Ok(())
        });
        let renewed = (0..RENEWALS).try_for_each(|nth| renew(lab, nth));
        stop.store(true, Relaxed);
        load.into_iter().chain([talk]).try_for_each(|thread| thread.join().expect("no panic"))?;
        renewed
    });
    let (made, said, seconds) = (made.load(Relaxed), said.load(Relaxed), began.elapsed().as_secs_f64());
    println!("{RENEWALS} renewals, {made} handshakes and {said} messages on {HELD} held connections in {seconds:.1} s");
    outcome?;
    ensure!(made > 100, "only {made} handshakes");
    held.iter_mut().try_for_each(|stream| echo(stream, b"still alive"))?;
    let metrics = shunt.metrics()?;
    for relay in Relay::TLS {
        let value =
            |result: &str| metrics.value("shunt_tls_handshakes_total", &[("route", relay.route()), ("result", result)]);
        let all = metrics.value("shunt_tls_handshakes_total", &[("route", relay.route())]);
        let good: f64 = ["full", "resumed", "backend_full", "backend_resumed"].into_iter().map(value).sum();
        println!("{relay:?}: {} full, {} resumed, {all} in all", value("full"), value("resumed"));
        ensure!(all == good && value("resumed") > 0.0, "{relay:?}: {good} of {all} handshakes were good");
    }
    Ok(())
}

/// What a trace says of one system call: how often, and the bytes at the median and in all.
fn sizes(trace: &str, call: &str) -> (usize, u64, u64) {
    let of_line = |line: &str| line.contains(call).then(|| line.rsplit("= ").next()?.trim().parse().ok()).flatten();
    let mut all: Vec<u64> = trace.lines().filter_map(of_line).collect();
    all.sort_unstable();
    (all.len(), all.get(all.len() / 2).copied().unwrap_or_default(), all.iter().sum())
}

/// `cargo xtask test asks_the_kernel -- --ignored --nocapture`; needs strace.
#[test]
#[ignore = "a measurement: needs strace"]
fn what_a_download_over_tls_asks_the_kernel_for() -> Result<()> {
    const PAGE: usize = 128 << 20;
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    let _nginx = lab.nginx(lab.backend(1), 80, &[("page", vec![b'x'; PAGE])])?;
    let again = "http { server { listen 81 ssl; ssl_certificate PAIR.pem; ssl_certificate_key PAIR.key; location / { proxy_pass http://127.0.0.1:80; } } }";
    let _tls = lab.nginx_with(lab.backend(1), &again.replace("PAIR", &pki.file("web")), 81)?;
    let route = |name: &str, port: u16, rest: &str| {
        let ends = pki.terminate(&["web"], "");
        format!(
            "[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:{port}\"]\nbackends = [\"10.88.2.2:{port}\"]\n{ends}{rest}\n"
        )
    };
    let shunt = Shunt::start(&lab, &format!("{}{}", route("ends", 80, ""), route("again", 81, &pki.again(NAME))))?;
    for port in [80, 81] {
        let file = lab.dir().join(format!("trace-{port}"));
        let mut strace = lab.gateway().command("strace");
        strace.args(["-f", "-qq", "-e", "trace=recvfrom,sendto,sendmsg,writev", "-o"]).arg(&file);
        let mut strace = strace.args(["-p", &shunt.pid()?.to_string()]).spawn()?;
        wait_until("it is traced", SOON, || {
            let status = fs::read_to_string(format!("/proc/{}/status", shunt.pid().unwrap_or_default()));
            status.is_ok_and(|status| !status.contains("TracerPid:\t0"))
        })?;
        lab.client().sh(&format!("curl -sk --max-time 120 -o /dev/null https://10.88.1.1:{port}/page"))?;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(strace.id().cast_signed()),
            nix::sys::signal::Signal::SIGINT,
        )?;
        strace.wait()?;
        let trace = fs::read_to_string(&file)?;
        for call in ["recvfrom(", "sendto(", "sendmsg(", "writev("] {
            let (count, median, all) = sizes(&trace, call);
            println!(
                "{port}: {call} {count} calls, {median} bytes at the median, {} on average",
                all / count.max(1) as u64
            );
        }
    }
    Ok(())
}
