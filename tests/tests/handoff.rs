//! Connections that are handed over to the packet level: nobody notices, and nothing of them is left in the daemon.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    cable::Weather,
    dialog::{End, echo, end_of, exchange, reset},
    kernel, patiently,
    pattern::{self, Digested},
    relay::{Relay, handed_over},
    scripted::{Behaviour, Start, TcpServer},
    wait_for, wait_until, wire,
};

const SOON: Duration = Duration::from_secs(10);
/// On a machine that is crowded.
const LONG: Duration = Duration::from_secs(60);
const TO: Relay = Relay::Handoff;

fn route(rest: &str) -> String {
    TO.route_to(&[std::net::Ipv4Addr::new(10, 88, 2, 2)], rest)
}

fn serve(lab: &Lab, behaviour: Behaviour) -> Result<TcpServer> {
    TcpServer::start(lab.backend(1), TO.backend_port(), behaviour)
}

/// How often the daemon has handed a connection over.
fn handovers(shunt: &Shunt) -> Result<f64> {
    Ok(shunt.metrics()?.value("shunt_handovers_total", &[("route", TO.route()), ("result", "done")]))
}

/// `count` connections at once, busy in both directions from their first byte.
fn carry_while_busy(lab: &Lab, server: &TcpServer, count: u64, bytes: u64) -> Result<()> {
    let expected = pattern::send(&mut io::sink(), 6, bytes)?;
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..count)
            .map(|n| {
                scope.spawn(move || {
                    let stream = lab.client().connect(TO.listen())?;
                    exchange(&stream, 100 + n, bytes)
                })
            })
            .collect();
        for (n, thread) in threads.into_iter().enumerate() {
            let (_, received) = thread.join().expect("a client").with_context(|| format!("client {n}"))?;
            ensure!(received == expected, "backend → client {n}: {received:?}");
        }
        Ok(())
    })?;
    let mut arrived: Vec<Digested> =
        server.wait_records(count as usize, SOON)?.into_iter().map(|record| record.received).collect();
    let sent: Result<Vec<Digested>, _> = (0..count).map(|n| pattern::send(&mut io::sink(), 100 + n, bytes)).collect();
    let mut sent = sent?;
    arrived.sort_by(|a, b| a.sha256.cmp(&b.sha256));
    sent.sort_by(|a, b| a.sha256.cmp(&b.sha256));
    ensure!(arrived == sent, "client → backend");
    Ok(())
}

#[test]
fn a_connection_that_was_handed_over_has_neither_socket_nor_descriptor() -> Result<()> {
    let lab = Lab::new()?;
    let server = serve(&lab, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &route(""))?;
    for host in [lab.client(), lab.backend(1)] {
        wire::watch_ends(host)?;
    }
    let mut stream = lab.client().connect(TO.listen())?;
    echo(&mut stream, b"hello")?;
    handed_over(&shunt, &stream)?;
    let sockets = || kernel::tcp_sockets(lab.gateway(), &["established"]);
    wait_until("its sockets are gone", SOON, || sockets().is_ok_and(|n| n == 0))?;
    for n in 0..100 {
        echo(&mut stream, format!("round {n}").as_bytes())?;
    }
    for host in [lab.client(), lab.backend(1)] {
        ensure!(wire::ends_seen(host)? == (0, 0), "FIN and RST at {}: {:?}", host.name(), wire::ends_seen(host)?);
    }
    for host in [lab.client(), lab.gateway(), lab.backend(1)] {
        let again = wire::stack_counter(host, "TcpRetransSegs")?;
        println!("{}: {again} segments sent again", host.name());
    }
    stream.shutdown(Shutdown::Write)?;
    ensure!(end_of(&mut stream, SOON)? == End::Finished);
    ensure!(server.wait_records(1, SOON)?.len() == 1);
    shunt.wait_ended(TO.route(), &[("finished_client_first", 1)], SOON)?;
    let bytes: u64 = 5 + (0..100).map(|n| format!("round {n}").len() as u64).sum::<u64>();
    let counted = shunt.route(TO.route())?;
    ensure!(counted["bytes_in"] == bytes && counted["bytes_out"] == bytes, "{bytes} bytes, counted: {counted}");
    Ok(())
}

#[test]
fn busy_ones_lose_nothing_handed_over_or_not() -> Result<()> {
    let lab = Lab::new()?;
    let server = serve(&lab, Behaviour::Exchange { seed: 6, bytes: 64 << 20, start: Start::AtOnce })?;
    let shunt = Shunt::start(&lab, &route(""))?;
    for host in [lab.client(), lab.backend(1)] {
        wire::watch_ends(host)?;
    }
    carry_while_busy(&lab, &server, 8, 64 << 20)?;
    println!(
        "{} of 8 were handed over; {:?}; {:?}",
        handovers(&shunt)?,
        told(&lab)?,
        shunt.metrics()?.samples("shunt_handovers_total")
    );
    shunt.wait_route(TO.route(), "each byte counted once", SOON, |r| {
        (r["bytes_in"] == 8u64 * (64 << 20) && r["bytes_out"] == 8u64 * (64 << 20)).then_some(())
    })?;
    ensure!(wire::ends_seen(lab.client())?.1 == 0 && wire::ends_seen(lab.backend(1))?.1 == 0, "a reset was seen");
    Ok(())
}

/// Segments sent again by each host.
fn told(lab: &Lab) -> Result<Vec<(&str, u64)>> {
    let hosts = [("client", lab.client()), ("gateway", lab.gateway()), ("backend", lab.backend(1))];
    hosts.into_iter().map(|(name, host)| Ok((name, wire::stack_counter(host, "TcpRetransSegs")?))).collect()
}

#[test]
fn most_of_five_hundred_busy_ones_are_handed_over_and_lose_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let server = serve(&lab, Behaviour::Exchange { seed: 6, bytes: 2 << 20, start: Start::AtOnce })?;
    let shunt = Shunt::start(&lab, &route(""))?;
    carry_while_busy(&lab, &server, 500, 2 << 20)?;
    let handed_over = handovers(&shunt)?;
    let failures = shunt.metrics()?.samples("shunt_handovers_total");
    println!("{handed_over} of 500 were handed over; sent again: {:?}; {failures:?}", told(&lab)?);
    shunt.wait_route(TO.route(), "each byte counted once", SOON, |r| {
        (r["bytes_in"] == 1000u64 << 20 && r["bytes_out"] == 1000u64 << 20 && r["connections_active"] == 0)
            .then_some(())
    })?;
    // Alone on its machine some 495; fewer where they are over before they had a chance.
    ensure!(handed_over > 250.0, "{handed_over} of 500: {failures:?}");
    let ends = &shunt.route(TO.route())?["terminations"];
    let finished = |which: &str| ends[which].as_u64().unwrap_or_default();
    ensure!(finished("finished_client_first") + finished("finished_backend_first") == 500, "they ended by {ends}");
    Ok(())
}

/// Sends all but the last byte, and that one when it is time: so it is under way until then, however fast the machine.
struct HeldBack<'a> {
    stream: &'a TcpStream,
    left: u64,
    until: &'a AtomicBool,
}

impl Write for HeldBack<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left - 1).unwrap_or(usize::MAX).min(from.len());
        while most == 0 && !self.until.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
        let written = self.stream.write(&from[..most.max(1)])?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_daemon_that_is_killed_takes_no_transfer_with_it() -> Result<()> {
    const COUNT: usize = 100;
    const BYTES: u64 = 4 << 20;
    let lab = Lab::new()?;
    let server = serve(&lab, Behaviour::Exchange { seed: 6, bytes: BYTES, start: Start::AfterClientFinished })?;
    let mut shunt = Shunt::start(&lab, &route(""))?;
    let streams: Vec<TcpStream> = (0..COUNT).map(|_| Ok(lab.client().connect(TO.listen())?)).collect::<Result<_>>()?;
    wait_for("all are handed over", SOON, || (handovers(&shunt).ok()? == COUNT as f64).then_some(()))?;
    let expected = pattern::send(&mut io::sink(), 6, BYTES)?;
    let (begun, killed) = (Barrier::new(COUNT + 1), AtomicBool::new(false));
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = streams
            .iter()
            .enumerate()
            .map(|(n, stream)| {
                let (begun, killed) = (&begun, &killed);
                scope.spawn(move || -> Result<Digested> {
                    begun.wait();
                    stream.set_read_timeout(Some(patiently(LONG)))?;
                    pattern::send(&mut HeldBack { stream, left: BYTES, until: killed }, 100 + n as u64, BYTES)?;
                    stream.shutdown(Shutdown::Write)?;
                    Ok(pattern::receive(&mut &*stream)?)
                })
            })
            .collect();
        begun.wait();
        wait_until("they are under way", SOON, || server.received() > BYTES)?;
        shunt.kill9();
        shunt.restart()?;
        let adopted = wait_until("all are taken over", SOON, || {
            shunt.cli_json(&["status"]).is_ok_and(|status| status["handoff"]["adopted"] == COUNT)
        });
        killed.store(true, Ordering::Relaxed);
        adopted?;
        for (n, thread) in threads.into_iter().enumerate() {
            let received = thread.join().expect("a client").with_context(|| format!("client {n}"))?;
            ensure!(received == expected, "backend → client {n}: {received:?}");
        }
        Ok(())
    })?;
    let mut arrived: Vec<String> =
        server.wait_records(COUNT, SOON)?.into_iter().map(|record| record.received.sha256).collect();
    let mut sent: Vec<String> =
        (0..COUNT as u64).map(|n| Ok(pattern::send(&mut io::sink(), 100 + n, BYTES)?.sha256)).collect::<Result<_>>()?;
    arrived.sort();
    sent.sort();
    ensure!(arrived == sent, "client → backend");
    shunt.wait_ended(TO.route(), &[("finished_client_first", COUNT as u64)], LONG)
}

#[test]
fn a_network_that_loses_delays_and_reorders_loses_no_byte() -> Result<()> {
    const MILLISECOND: Duration = Duration::from_millis(1);
    let lab = Lab::builder().backends(1).cabled().build()?;
    for (cable, seed) in lab.cables().iter().zip(1..) {
        cable.carry(Weather::new(2 * MILLISECOND, MILLISECOND, 20, seed));
    }
    let server = serve(&lab, Behaviour::Exchange { seed: 6, bytes: 1 << 20, start: Start::AtOnce })?;
    let shunt = Shunt::start(&lab, &route(""))?;
    carry_while_busy(&lab, &server, 30, 1 << 20)?;
    let (handed_over, failures) = (handovers(&shunt)?, shunt.metrics()?.samples("shunt_handovers_total"));
    println!("{handed_over} of 30 were handed over; sent again: {:?}; {failures:?}", told(&lab)?);
    ensure!(handed_over > 0.0, "none was handed over: {failures:?}");
    Ok(())
}

#[test]
fn a_reset_of_either_side_reaches_the_other() -> Result<()> {
    let lab = Lab::new()?;
    let server = serve(&lab, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &route(""))?;
    let stream = TO.connect(&lab, &shunt)?;
    reset(stream)?;
    wait_until("the backend sees it", SOON, || server.records().len() == 1)?;
    let mut stream = TO.connect(&lab, &shunt)?;
    server.end_all(true);
    ensure!(end_of(&mut stream, SOON)? == End::Reset);
    shunt.wait_ended(TO.route(), &[("reset_by_client", 1), ("reset_by_backend", 1)], SOON)
}

#[test]
fn a_slow_reader_holds_its_sender_up_and_gets_every_byte() -> Result<()> {
    const BYTES: u64 = 32 << 20;
    let lab = Lab::new()?;
    let _server = serve(&lab, Behaviour::Exchange { seed: 6, bytes: BYTES, start: Start::AtOnce })?;
    let shunt = Shunt::start(&lab, &route(""))?;
    let mut stream = lab.client().connect(TO.listen())?;
    let mut running = pattern::Running::default();
    let mut buffer = vec![0; 64 * 1024];
    let mut reads = 0;
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        running.update(&buffer[..n]);
        reads += 1;
        if reads < 100 {
            thread::sleep(Duration::from_millis(10));
        }
    }
    let received = running.finish();
    ensure!(received == pattern::send(&mut io::sink(), 6, BYTES)?, "{received:?}");
    println!("{} handed over: {:?}", handovers(&shunt)?, shunt.metrics()?.samples("shunt_handovers_total"));
    stream.shutdown(Shutdown::Write)?;
    shunt.wait_ended(TO.route(), &[("finished_backend_first", 1)], SOON)
}

#[test]
fn a_backend_behind_a_smaller_mtu_is_learnt_and_the_next_client_fits() -> Result<()> {
    let lab = Lab::new()?;
    lab.backend(1).sh("ip link set eth0 mtu 1300")?;
    let server = serve(&lab, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &route(""))?;
    let mut first = lab.client().connect(TO.listen())?;
    echo(&mut first, b"hello")?;
    let refused = |shunt: &Shunt| {
        shunt.metrics().map(|m| m.value("shunt_handovers_total", &[("route", TO.route()), ("result", "segment_size")]))
    };
    // One of the workers has learnt it; every one has to, for itself.
    let began = Instant::now();
    let mut streams = vec![first];
    while handovers(&shunt)? == 0.0 {
        ensure!(began.elapsed() < SOON, "not one fits: {}", shunt.log());
        let mut next = lab.client().connect(TO.listen())?;
        echo(&mut next, b"hello")?;
        streams.push(next);
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(refused(&shunt)? >= 1.0, "the first fitted");
    for stream in &mut streams {
        stream.set_nodelay(true)?;
        let text = vec![7; 64 * 1024];
        stream.write_all(&text)?;
        let mut back = vec![0; text.len()];
        stream.set_read_timeout(Some(patiently(SOON)))?;
        stream.read_exact(&mut back)?;
        ensure!(back == text);
    }
    ensure!(server.open() == streams.len());
    Ok(())
}

#[test]
fn the_same_client_port_again_is_a_connection_of_its_own() -> Result<()> {
    let lab = Lab::new()?;
    let server = serve(&lab, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &route(""))?;
    for round in 0..5 {
        let mut stream = lab
            .client()
            .connect_from((lab.client().ip, 4711), TO.listen())
            .with_context(|| format!("round {round}"))?;
        echo(&mut stream, format!("round {round}").as_bytes())?;
        handed_over(&shunt, &stream)?;
        echo(&mut stream, b"again")?;
        stream.shutdown(Shutdown::Write)?;
        ensure!(end_of(&mut stream, SOON)? == End::Finished, "round {round}");
    }
    ensure!(server.wait_records(5, SOON)?.len() == 5);
    shunt.wait_ended(TO.route(), &[("finished_client_first", 5)], SOON)
}
