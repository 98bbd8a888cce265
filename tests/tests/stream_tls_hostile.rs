//! Clients and backends that do not keep to TLS: they are told, counted, and nobody else notices.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt, Talk,
    dialog::{End, echo, end_of, read_to_end},
    kernel, patiently,
    pattern::Pattern,
    relay::{Relay, on_each, servers_with_tls},
    scripted::{Behaviour, Ended},
    tls::{self, NAME, Opening, Versions},
    wait_until,
};

const SOON: Duration = Duration::from_secs(10);

/// A record of application data that nobody can decipher.
fn noise(length: u16) -> Vec<u8> {
    let mut record = vec![0; usize::from(length) + 5];
    Pattern::new(3).fill(&mut record);
    record[..5].copy_from_slice(&[23, 3, 3, (length >> 8) as u8, length as u8]);
    record
}

#[test]
fn a_damaged_record_is_an_alert_for_its_sender_and_a_reset_for_the_other_side() -> Result<()> {
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::TLS, |relay| {
        for versions in [Versions::Only12, Versions::Only13] {
            let config = Arc::new(tls::client_config(&lab.tls()?.pki, versions, None)?);
            let mut stream = tls::connect(&config, NAME, lab.client().connect(relay.listen())?)?;
            echo(&mut stream, b"hello")?;
            stream.tcp().write_all(&noise(200))?;
            let error = stream.read(&mut [0]).err().context("it was read")?;
            ensure!(error.to_string().contains("BadRecordMac"), "{versions:?}: {error}");
            // Behind the alert comes a FIN: a reset might have overtaken it.
            ensure!(read_to_end(&mut stream.tcp(), SOON)? == (Vec::new(), End::Finished), "{versions:?}");
        }
        let records = servers[relay as usize].wait_records(2, SOON)?;
        let reset = Ended::Failed(ErrorKind::ConnectionReset);
        ensure!(records.iter().all(|record| record.ended == reset), "the backend saw {records:?}");
        shunt.wait_ended(relay.route(), &[("reset_by_client", 2)], SOON)
    })
}

/// Who writes for long before it reads anything.
fn writes_on(mut tcp: &TcpStream) -> Result<()> {
    tcp.set_read_timeout(Some(patiently(SOON)))?;
    ensure!(tcp.peek(&mut [0])? == 1, "not a word");
    (0..10).try_for_each(|_| tcp.write_all(&noise(16_000))).context("it may not write on")
}

#[test]
fn who_goes_on_writing_still_reads_why_it_is_over_but_not_for_ever() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::TLS, |relay| relay.begin(&lab, &shunt).map(drop))?;
    let before = kernel::holdings(shunt.pid()?)?;
    on_each(&Relay::TLS, |relay| {
        let connect = || lab.client().connect(relay.listen());
        for versions in [Versions::Only12, Versions::Only13] {
            let config = Arc::new(tls::client_config(&lab.tls()?.pki, versions, None)?);
            let hello = Opening::new(&config, NAME)?.hello;
            // Before there is a route, in the middle of the handshake, and behind it.
            for nonsense in [&[22, 3, 1, 0xff, 0xff][..], &[hello, noise(200)].concat()] {
                let mut tcp = connect()?;
                tcp.write_all(nonsense)?;
                writes_on(&tcp)?;
                let (said, end) = read_to_end(&mut tcp, SOON)?;
                ensure!(said.len() >= 7 && end == End::Finished, "{versions:?}: {said:02x?}, {end:?}");
            }
            let mut stream = tls::connect(&config, NAME, connect()?)?;
            echo(&mut stream, b"hello")?;
            stream.tcp().write_all(&noise(200))?;
            writes_on(stream.tcp())?;
            let error = stream.read(&mut [0]).err().context("it was read")?;
            ensure!(error.to_string().contains("BadRecordMac"), "{versions:?}: {error}");
            ensure!(read_to_end(&mut stream.tcp(), SOON)? == (Vec::new(), End::Finished), "{versions:?}");
        }
        // One that does not stop is stopped.
        let mut tcp = connect()?;
        tcp.write_all(&[22, 3, 1, 0xff, 0xff])?;
        let began = Instant::now();
        while tcp.write_all(&noise(16_000)).is_ok() {
            ensure!(began.elapsed() < SOON, "it writes still");
        }
        Ok(())
    })?;
    wait_until("sockets as before", SOON, || {
        kernel::holdings(shunt.pid().unwrap_or_default()).is_ok_and(|now| now.sockets <= before.sockets)
    })
}

#[test]
fn an_alert_comes_behind_what_was_to_be_said_before_it() -> Result<()> {
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    let ends = pki.terminate(&["web"], "alpn = [\"h2\"]");
    let route =
        format!("[[route]]\nname = \"web\"\nlisten = [\"10.88.1.1:443\"]\nbackends = [\"10.88.2.2:80\"]\n{ends}");
    let shunt = Shunt::start(&lab, &route)?;
    // In TLS 1.3 the protocol is chosen when the ServerHello is written already.
    for versions in [Versions::Only12, Versions::Only13] {
        let mut config = tls::client_config(pki, versions, None)?;
        config.alpn_protocols = vec![b"nobody".to_vec()];
        let refused = tls::connect(&Arc::new(config), NAME, lab.client().connect(([10, 88, 1, 1], 443))?);
        let error = refused.err().context("it was served")?;
        ensure!(error.to_string().contains("NoApplicationProtocol"), "{versions:?}: {error}");
    }
    shunt.wait_ended("web", &[("tls_handshake_failed", 2)], SOON)?;
    let told = [("route", "web"), ("result", "incompatible")];
    ensure!(shunt.metrics()?.value("shunt_tls_handshakes_total", &told) == 2.0);
    Ok(())
}

#[test]
fn old_versions_are_refused_by_name_and_renegotiation_is_not_taken_up() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    let s_client = |relay: Relay, how: &str| {
        let mut command = lab.client().command("bash");
        let line = format!("exec openssl s_client -connect {} -servername {NAME} {how} 2>&1", relay.listen());
        command.args(["-c", &line]);
        Talk::start(command)
    };
    on_each(&Relay::TLS, |relay| {
        for old in ["-tls1", "-tls1_1"] {
            let mut client = s_client(relay, &format!("{old} -cipher ALL@SECLEVEL=0"))?;
            // 70: the version. A client of TLS 1.0 offers no signature algorithm either, which rustls misses first (40).
            let seen = client.hear_until("SSL alert number", SOON)?;
            ensure!(seen.contains("number 70") || seen.contains("number 40"), "{old}: {seen}");
        }
        for (version, command, answer) in
            [("-tls1_2", "R", "RENEGOTIATING"), ("-tls1_3", "K", "KEYUPDATE"), ("-tls1_3", "k", "KEYUPDATE")]
        {
            let mut client = s_client(relay, version)?;
            client.say("first line")?;
            client.hear_until("first line", SOON)?;
            client.say(command)?;
            client.hear_until(answer, SOON)?;
            if command == "R" {
                client.hear_until("no renegotiation", SOON)?;
            } else {
                // Keys may change in TLS 1.3: that is no renegotiation.
                client.say("second line")?;
                client.hear_until("second line", SOON)?;
            }
        }
        let told = [("route", relay.route()), ("result", "incompatible")];
        ensure!(shunt.metrics()?.value("shunt_tls_handshakes_total", &told) == 2.0, "not counted as incompatible");
        shunt.wait_route(relay.route(), "all have ended", SOON, |r| (r["connections_active"] == 0).then_some(()))
    })
}

/// What strangers may send to a port of TLS, the `nth` of many ways.
fn nonsense(nth: usize, hello: &[u8]) -> Vec<u8> {
    let mut random = vec![0; 1 + nth * 677 % 60_000];
    Pattern::new(nth as u64).fill(&mut random);
    match nth % 8 {
        0 => random,
        // A record that is longer than any may be.
        1 => [&[22, 3, 1, 0xff, 0xff], random.as_slice()].concat(),
        // A message that is longer than any may be.
        2 => [&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff], random.as_slice()].concat(),
        // A hello, and then noise.
        3 => [hello, &noise(1 + nth as u16 * 31 % 16_000)].concat(),
        4 => [hello, random.as_slice()].concat(),
        // A message in records of one byte, without end.
        5 => [22, 3, 1, 0, 1, 1].repeat(2000),
        6 => hello[..hello.len() - 1].iter().copied().chain([0xff]).chain(random).collect(),
        _ => b"GET / HTTP/1.1\r\nHost: web.example\r\n\r\n".repeat(1 + nth % 50),
    }
}

#[test]
fn garbage_of_every_kind_costs_little_and_disturbs_nobody() -> Result<()> {
    const STRANGERS: usize = 800;
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let timeouts = "timeouts = { initial_data = \"2s\", tls_handshake = \"2s\" }";
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, timeouts)?)?;
    let mut good = Relay::TLS.iter().map(|relay| relay.open(&lab)).collect::<Result<Vec<_>>>()?;
    good.iter_mut().try_for_each(|stream| echo(stream, b"before"))?;
    let config = Arc::new(tls::client_config(&lab.tls()?.pki, Versions::Both, None)?);
    let before = kernel::holdings(shunt.pid()?)?;
    let began = Instant::now();
    let mut strangers = Vec::new();
    for nth in 0..STRANGERS {
        let mut tcp = lab.client().connect(Relay::TLS[nth % 2].listen())?;
        // It may be refused in the middle.
        let _ = tcp.write_all(&nonsense(nth, &Opening::new(&config, NAME)?.hello));
        strangers.push(tcp);
        if nth % 50 == 0 {
            good.iter_mut().try_for_each(|stream| echo(stream, b"meanwhile")).context("a good client")?;
        }
    }
    let most = kernel::holdings(shunt.pid()?)?;
    println!("{STRANGERS} strangers in {:?}: {before:?}, {most:?}", began.elapsed());
    ensure!(most.memory < before.memory + (STRANGERS as u64) * (80 << 10), "memory: {before:?}, {most:?}");
    for (nth, stream) in strangers.iter_mut().enumerate() {
        read_to_end(stream, SOON).with_context(|| format!("stranger {nth} is still there"))?;
    }
    good.iter_mut().try_for_each(|stream| echo(stream, b"after")).context("a good client")?;
    drop(good);
    wait_until("sockets as before", SOON, || {
        kernel::holdings(shunt.pid().unwrap_or_default()).is_ok_and(|now| now.sockets + 4 <= before.sockets)
    })?;
    let metrics = shunt.metrics()?;
    let ended = |reason| metrics.value("shunt_terminations_total", &[("reason", reason)]);
    println!(
        "failed {}, timeouts {} and {}, no route {}",
        ended("tls_handshake_failed"),
        ended("initial_data_timeout"),
        ended("tls_handshake_timeout"),
        ended("no_route")
    );
    ensure!(ended("internal_error") == 0.0, "an internal error: {}", shunt.log());
    Ok(())
}

#[test]
fn many_that_stall_in_the_middle_of_the_handshake_end_in_time_and_hold_little() -> Result<()> {
    const STALLED: usize = 1000;
    let lab = Lab::new()?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "timeouts = { tls_handshake = \"4s\" }")?)?;
    on_each(&Relay::TLS, |relay| relay.begin(&lab, &shunt).map(drop))?;
    let before = kernel::holdings(shunt.pid()?)?;
    let config = Arc::new(tls::client_config(&lab.tls()?.pki, Versions::Both, None)?);
    let mut stalled = Vec::new();
    for nth in 0..STALLED {
        let mut tcp = lab.client().connect(Relay::TLS[nth % 2].listen())?;
        tcp.write_all(&Opening::new(&config, NAME)?.hello)?;
        stalled.push((Instant::now(), tcp));
    }
    let most = kernel::holdings(shunt.pid()?)?;
    let each = most.memory.saturating_sub(before.memory) / STALLED as u64;
    println!("{STALLED} stalled handshakes: {each} bytes each");
    ensure!(each < 24 << 10, "{each} bytes each");
    on_each(&Relay::TLS, |relay| relay.begin(&lab, &shunt).map(drop))?;
    for (since, mut stream) in stalled {
        read_to_end(&mut stream, SOON)?;
        ensure!(since.elapsed() > Duration::from_millis(3850), "ended after {:?}", since.elapsed());
    }
    wait_until("each has ended for it", SOON, || {
        let reason = [("reason", "tls_handshake_timeout")];
        shunt.metrics().is_ok_and(|m| m.value("shunt_terminations_total", &reason) == STALLED as f64)
    })
}

/// What a backend that should speak TLS does with a connection.
fn bad_backend(nth: usize, mut stream: TcpStream) -> Result<()> {
    let mut hello = [0; 4096];
    let _ = stream.read(&mut hello)?;
    match nth {
        0 => stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")?,
        1 => stream.shutdown(Shutdown::Both)?,
        2 => socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?,
        // A fatal alert: handshake_failure.
        3 => stream.write_all(&[21, 3, 3, 0, 2, 2, 40])?,
        _ => {
            // Until it is given up.
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
    Ok(())
}

#[test]
fn a_backend_that_does_not_speak_tls_is_counted_and_its_client_told() -> Result<()> {
    const RESULTS: [&str; 5] =
        ["backend_failed", "backend_closed", "backend_closed", "backend_alert", "backend_timeout"];
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    let route = |nth: usize| {
        format!(
            "[[route]]\nname = \"bad-{nth}\"\nlisten = [\"10.88.1.1:{}\"]\nbackends = [\"10.88.2.2:{}\"]\n\
             timeouts = {{ tls_handshake = \"1s\" }}\n{}{}",
            700 + nth,
            800 + nth,
            pki.terminate(&["web"], ""),
            pki.again(NAME)
        )
    };
    let listeners =
        (0..5).map(|nth| lab.backend(1).listen(([0, 0, 0, 0], 800 + nth))).collect::<Result<Vec<_>, _>>()?;
    let shunt = Shunt::start(&lab, &(0..5).map(route).collect::<String>())?;
    for (nth, listener) in listeners.iter().enumerate() {
        let tcp = lab.client().connect(SocketAddr::from(([10, 88, 1, 1], 700 + nth as u16)))?;
        let mut client = tls::connect(&lab.tls()?.client, NAME, tcp)?;
        let (stream, _) = listener.accept()?;
        let backend = thread::spawn(move || bad_backend(nth, stream));
        let end = end_of(&mut client, SOON)?;
        ensure!(end == End::Reset, "{nth}: its client saw {end:?}");
        backend.join().expect("backend")?;
        let name = format!("bad-{nth}");
        let told = [("route", name.as_str()), ("result", RESULTS[nth])];
        wait_until(&format!("{told:?} is counted"), SOON, || {
            shunt.metrics().is_ok_and(|m| m.value("shunt_tls_handshakes_total", &told) == 1.0)
        })?;
        shunt.wait_route(&name, "it has ended", SOON, |r| (r["connections_active"] == 0).then_some(()))?;
        println!("{name}: {:?}", shunt.terminations(&name)?);
    }
    Ok(())
}
