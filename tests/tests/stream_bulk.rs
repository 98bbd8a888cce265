//! Much through few connections, and many connections one after another: nothing is lost, nothing piles up (C5, D2, E1).

use std::{
    io::{Read, Write},
    net::Shutdown,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt, Stream,
    dialog::{echo, reset},
    kernel::{self, Holdings},
    load, pattern,
    relay::{Relay, on_each, servers, servers_with_tls},
    scripted::{Behaviour, Start, TcpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(10);
const BIG: u64 = 256 << 20;
/// Said there and back before that.
const FIRST: usize = 2000;

/// Runs `work` and gives what the daemon held at most meanwhile.
fn watched<T>(pid: u32, work: impl FnOnce() -> Result<T>) -> Result<(T, Holdings)> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| -> Result<Holdings> {
            let mut most = kernel::holdings(pid)?;
            while !over.load(Ordering::Relaxed) {
                let now = kernel::holdings(pid)?;
                most.memory = most.memory.max(now.memory);
                thread::sleep(Duration::from_millis(5));
            }
            Ok(most)
        });
        let outcome = work();
        over.store(true, Ordering::Relaxed);
        let most = watcher.join().expect("watcher")?;
        Ok((outcome?, most))
    })
}

/// Reads to the end, slowly for the first bytes: pauses while megabytes wait.
fn read_slowly(stream: &mut Stream, mut look: impl FnMut()) -> Result<pattern::Digested> {
    let mut digest = pattern::Running::default();
    let mut buffer = vec![0; 64 * 1024];
    let mut reads = 0;
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(digest.finish());
        }
        digest.update(&buffer[..n]);
        reads += 1;
        if reads < 200 {
            thread::sleep(Duration::from_millis(10));
        }
        if reads % 50 == 0 && reads < 250 {
            look();
        }
    }
}

/// Sends and slowly receives at the same time. What waits in the kernel meanwhile is what its sockets may hold.
fn exchange(lab: &Lab, shunt: &Shunt, relay: Relay) -> Result<()> {
    let mut stream = relay.open(lab)?;
    // Some engines take a connection that is quiet for a moment, or not at all.
    (0..FIRST / 100).try_for_each(|_| echo(&mut stream, &[1; 100]))?;
    if [Relay::Joined, Relay::Handoff].contains(&relay) {
        wait_until("it is in its engine", SOON, || {
            shunt.engine_of(&stream).is_ok_and(|engine| engine.as_deref() == Some(relay.engine()))
        })?;
    }
    stream.write_all(b"!")?;
    let mut writer = stream.try_clone()?;
    let sender = thread::spawn(move || -> Result<pattern::Digested> {
        let sent = pattern::send(&mut writer, 11, BIG)?;
        writer.shutdown(Shutdown::Write)?;
        Ok(sent)
    });
    let mut held = 0;
    let look = || held = held.max(kernel::queued_bytes(lab.gateway()).unwrap_or(u64::MAX));
    let received = read_slowly(&mut stream, look).context("receiving")?;
    let most = kernel::socket_buffers(lab.gateway())?;
    println!("{relay:?}: {} KiB in the gateway's sockets at most; two may hold {} KiB", held >> 10, (2 * most) >> 10);
    // One that is handed over has no socket there.
    ensure!((held > 0 || relay == Relay::Handoff) && held < 2 * most, "{held} bytes queued on the gateway");
    let sent = sender.join().expect("sender").context("sending")?;
    ensure!(received == pattern::send(&mut std::io::sink(), 12, BIG)?, "backend → client: {received:?}");
    ensure!(sent.bytes == BIG);
    Ok(())
}

#[test]
fn a_quarter_gibibyte_each_way_at_once_arrives_whole_though_one_side_reads_slowly() -> Result<()> {
    // The daemon holds a buffer per direction and worker, and what a slow reader has not taken of one.
    const BOUND: u64 = 16 << 20;
    let lab = Lab::new()?;
    let servers =
        servers_with_tls(&lab, &Behaviour::Exchange { seed: 12, bytes: BIG, start: Start::AfterSayingBack(FIRST) })?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    let before = kernel::holdings(shunt.pid()?)?;
    let expected = pattern::send(&mut std::io::sink(), 11, BIG)?;
    for relay in Relay::ENGINES_AND_TLS {
        let began = Instant::now();
        let ((), most) = watched(shunt.pid()?, || exchange(&lab, &shunt, relay).with_context(|| shunt.log()))?;
        let seconds = began.elapsed().as_secs_f64();
        let record = servers[relay as usize].wait_records(1, SOON)?.remove(0);
        ensure!(record.received == expected, "{relay:?}: client → backend: {:?}", record.received);
        let grown = most.memory.saturating_sub(before.memory);
        println!("{relay:?}: {seconds:.1} s, memory +{} KiB at most", grown >> 10);
        ensure!(grown < BOUND, "{relay:?}: memory grew by {grown} bytes: {before:?} {most:?}");
        let route = shunt.route(relay.route())?;
        let all = BIG + FIRST as u64;
        ensure!(route["bytes_in"] == all + 1 && route["bytes_out"] == all, "counted: {route}");
        wait_until("it has got to its engine, and ended there", SOON, || {
            ended_in_its_engine(&shunt, relay).is_ok_and(|ended| ended == 1.0)
        })
        .with_context(|| format!("{relay:?}"))?;
    }
    Ok(())
}

/// Connections of a way that ended in the engine that it is about.
fn ended_in_its_engine(shunt: &Shunt, relay: Relay) -> Result<f64> {
    let labels = [("route", relay.route()), ("engine", relay.engine())];
    Ok(shunt.metrics()?.value("shunt_terminations_total", &labels))
}

/// Readers that take some megabytes, so that their connections are moved to splice where that is the engine, and no more.
/// Then, when nothing flows any more, `look` and let them read on.
fn stall(lab: &Lab, shunt: &Shunt, relay: Relay, readers: usize, look: impl FnOnce() -> Result<()>) -> Result<()> {
    let streams = load::idle(lab.client(), relay.listen(), readers)?;
    let barrier = Barrier::new(readers + 1);
    let outcomes: Vec<Result<pattern::Digested>> = thread::scope(|scope| -> Result<_> {
        let threads: Vec<_> = streams
            .into_iter()
            .map(|mut stream| {
                let barrier = &barrier;
                scope.spawn(move || -> Result<pattern::Digested> {
                    let first = pattern::receive_first(&mut stream, 6 << 20);
                    barrier.wait();
                    stream.shutdown(Shutdown::Write)?;
                    Ok(pattern::receive_rest(first?, &mut stream)?)
                })
            })
            .collect();
        let mut last = (0, Instant::now());
        let still = wait_until("the flow has come to a stand", Duration::from_secs(30), || {
            let bytes = shunt.route(relay.route()).ok().and_then(|r| r["bytes_out"].as_u64()).unwrap_or(0);
            if bytes != last.0 {
                last = (bytes, Instant::now());
            }
            bytes >= (readers as u64 * 6) << 20 && last.1.elapsed() > Duration::from_secs(1)
        });
        let looked = still.and_then(|()| look());
        barrier.wait();
        let outcomes = threads.into_iter().map(|thread| thread.join().expect("reader")).collect();
        looked.map(|()| outcomes)
    })?;
    let expected = pattern::send(&mut std::io::sink(), STALLED.0, STALLED.1)?;
    for outcome in outcomes {
        let received = outcome?;
        ensure!(received == expected, "{relay:?}: {received:?}");
    }
    // Either side may have been the first.
    shunt.wait_route(relay.route(), "all have finished", SOON, |r| {
        let of = |reason: &str| r["terminations"][reason].as_u64().unwrap_or(0);
        let finished = of("finished_client_first") + of("finished_backend_first");
        (r["connections_active"] == 0 && r["connections_total"] == readers && finished == readers as u64).then_some(())
    })
}

/// Seed and bytes that a stalled reader shall get.
const STALLED: (u64, u64) = (5, 16 << 20);

fn senders(lab: &Lab) -> Result<Vec<TcpServer>> {
    servers(lab, &Behaviour::Exchange { seed: STALLED.0, bytes: STALLED.1, start: Start::AtOnce })
}

#[test]
fn many_slow_readers_hold_a_bounded_share_of_memory() -> Result<()> {
    const READERS: usize = 60;
    let lab = Lab::new()?;
    let _servers = senders(&lab)?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    for relay in Relay::ENGINES {
        let before = kernel::holdings(shunt.pid()?)?;
        stall(&lab, &shunt, relay, READERS, || {
            let now = kernel::holdings(shunt.pid()?)?;
            let each = now.memory.saturating_sub(before.memory) / READERS as u64;
            println!("{relay:?}: {READERS} readers that do not read: {} KiB each, {now:?}", each >> 10);
            ensure!(each < 160 << 10, "{relay:?}: {each} bytes each");
            // Some have all they lack in the sockets.
            let spliced = now.pipes > 10;
            // Empty pipes are kept, and splice had its turn before the last ones.
            ensure!(
                matches!(relay, Relay::Joined | Relay::Handoff) || spliced == (relay == Relay::Splice),
                "{relay:?}: bytes wait in pipes: {now:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn without_pipes_for_all_some_are_copied_and_every_byte_arrives() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = senders(&lab)?;
    // 388 descriptors are for connections, an eighth of those for pipes: 24 pipes.
    let shunt = Shunt::builder().descriptors(900).start(&lab, &Relay::routes(""))?;
    stall(&lab, &shunt, Relay::Splice, 60, || {
        let now = kernel::holdings(shunt.pid()?)?;
        println!("{now:?}");
        ensure!(now.pipes > 10 && now.pipes <= 2 * 24 + 2, "pipes: {now:?}");
        Ok(())
    })
}

#[test]
fn counters_move_while_a_long_connection_lives_and_each_byte_counts_once() -> Result<()> {
    const CHUNK: u64 = 3 << 20;
    let lab = Lab::new()?;
    let servers = servers_with_tls(&lab, &Behaviour::sink())?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        let mut stream = relay.open(&lab)?;
        for nth in 1..=4 {
            pattern::send(&mut stream, 9, CHUNK)?;
            wait_until("it has arrived", SOON, || servers[relay as usize].received() == nth * CHUNK)?;
            shunt.wait_route(relay.route(), "the route has it", SOON, |r| {
                (r["bytes_in"] == nth * CHUNK).then_some(())
            })?;
            let listed = shunt.connection_of(&stream)?.context("listed")?;
            ensure!(listed["bytes_in"] == nth * CHUNK && listed["metered"] == true, "{listed}");
            let bytes = [("route", relay.route()), ("direction", "in")];
            let told = shunt.metrics()?.value("shunt_bytes_total", &bytes);
            ensure!(told == (nth * CHUNK) as f64, "metrics: {told} of {}", nth * CHUNK);
            let active = shunt.metrics()?.value("shunt_connections_active", &[("route", relay.route())]);
            ensure!(active == 1.0, "active: {active}, over all engines");
            let total = shunt.metrics()?.value("shunt_connections_total", &[("route", relay.route())]);
            ensure!(total == 1.0, "total: {total}, over all engines");
        }
        let by_engine = |engine| {
            let labels = [("route", relay.route()), ("engine", engine)];
            shunt.metrics().map(|m| m.value("shunt_connections_active", &labels))
        };
        ensure!(by_engine(relay.engine())? == 1.0, "it is counted under the engine it has");
        Ok(())
    })
}

#[test]
fn under_steady_load_the_rate_is_what_it_is() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Reply(vec![b'r'; 1000]))?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    on_each(&Relay::ENGINES, |relay| {
        let began = Instant::now();
        let (mut made, mut rates, mut next) = (Vec::new(), Vec::new(), Duration::from_secs(3));
        while began.elapsed() < Duration::from_secs(8) {
            let mut stream = lab.client().connect(relay.listen())?;
            stream.write_all(b"GET")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            ensure!(answer.len() == 1000);
            made.push(began.elapsed());
            if began.elapsed() > next {
                let shown = shunt.route(relay.route())?["connections_rate"].as_f64().context("rate")?;
                rates.push((began.elapsed(), shown));
                next += Duration::from_secs(1);
            }
            let due = began + Duration::from_millis(made.len() as u64 * 20);
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        println!("{relay:?}: {} connections; rates shown: {rates:?}", made.len());
        for (at, shown) in &rates {
            let (slowest, fastest) = paces(&made, *at);
            let true_then = slowest * 0.8 - 2.0..fastest * 1.2 + 2.0;
            ensure!(true_then.contains(shown), "shown {shown}/s at {at:?}, it was {slowest}/s to {fastest}/s");
        }
        let made = made.len() as u64;
        shunt.wait_ended(relay.route(), &[("finished_backend_first", made)], SOON)?;
        let route = shunt.route(relay.route())?;
        ensure!(route["bytes_in"] == 3 * made && route["bytes_out"] == 1000 * made, "{route}");
        Ok(())
    })
}

/// Connections per second, the fewest and the most, in the intervals of two seconds that a daemon asked at `at` may speak of.
fn paces(made: &[Duration], at: Duration) -> (f64, f64) {
    const INTERVAL: Duration = Duration::from_secs(2);
    let pace = |back: u64| {
        let end = at.saturating_sub(Duration::from_millis(back));
        made.iter().filter(|t| **t <= end && **t + INTERVAL > end).count() as f64 / INTERVAL.as_secs_f64()
    };
    let paces = (0..=2500).step_by(50).map(pace);
    paces.fold((f64::MAX, 0.0), |(least, most), pace| (least.min(pace), most.max(pace)))
}

/// `idle` connections at once, then `short` ones in mixed ways; all holdings must come back.
fn come_and_go(relays: &[Relay], idle: usize, short: usize) -> Result<()> {
    load::allow_descriptors(idle as u64 * 2 + 2000)?;
    let lab = Lab::builder().client_addresses(8).build()?;
    let hold = TcpServer::start(lab.backend(2), 9100, Behaviour::Hold)?;
    let _servers = servers_with_tls(&lab, &Behaviour::Echo)?;
    let to_hold = "[[route]]\nname = \"idle\"\nlisten = [\"10.88.1.1:8100\"]\nengine = \"splice\"\nbackends = [\"10.88.2.3:9100\"]\n";
    let routes = Relay::routes_with_tls(&lab, "")?;
    let shunt = Shunt::start(&lab, &format!("[log]\naccess = \"off\"\n{to_hold}{routes}"))?;
    let closed = || {
        wait_until("none is open", Duration::from_secs(30), || {
            shunt.cli_json(&["status"]).is_ok_and(|status| status["connections_active"] == 0)
        })
    };
    // Threads have their stacks and stores their spares after a first round.
    short_ones(&lab, relays, 200)?;
    closed()?;
    let before = kernel::holdings(shunt.pid()?)?;
    let began = Instant::now();
    let streams = load::idle(lab.client(), ([10, 88, 1, 1], 8100).into(), idle)?;
    wait_until("all idle ones are through", SOON, || hold.open() == idle)?;
    let full = kernel::holdings(shunt.pid()?)?;
    println!("before {before:?}");
    println!(
        "{idle} idle after {:?}: {full:?}, {} bytes each",
        began.elapsed(),
        full.memory.saturating_sub(before.memory) / idle as u64
    );
    ensure!(full.threads == before.threads, "threads: {before:?} {full:?}");
    drop(streams);
    hold.end_all(false);
    closed()?;
    let began = Instant::now();
    short_ones(&lab, relays, short)?;
    println!("{short} short ones in {:?}", began.elapsed());
    closed()?;
    let mut after = before;
    let settled = wait_until("as before", SOON, || {
        after = kernel::holdings(shunt.pid().unwrap_or_default()).unwrap_or(after);
        after.sockets <= before.sockets
            && after.others <= before.others
            && after.pipes <= before.pipes + 128
            && after.threads <= before.threads
            && after.memory < before.memory + (8 << 20)
    });
    println!("after {after:?}");
    settled.with_context(|| format!("before {before:?}, after {after:?}"))?;
    if relays.contains(&Relay::Joined) {
        // Three of six ways.
        let (joined, most) = (ended_in_its_engine(&shunt, Relay::Joined)?, (short / relays.len() / 2) as f64);
        println!("{joined} were joined, of {most} that could be");
        ensure!(joined > 0.9 * most, "{joined} of {most} were joined");
    }
    // Also those that ended before their route was known.
    let metrics = shunt.metrics()?;
    let (all, made) = (metrics.value("shunt_terminations_total", &[]), short + idle + 200);
    ensure!(all == made as f64, "{all} ended of {made}");
    ensure!(metrics.value("shunt_terminations_total", &[("reason", "internal_error")]) == 0.0, "an internal error");
    Ok(())
}

/// Connections that come and go in every way, from four threads.
fn short_ones(lab: &Lab, relays: &[Relay], count: usize) -> Result<()> {
    let addresses = lab.client_addresses();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|nth| {
                let addresses = &addresses;
                scope.spawn(move || -> Result<()> {
                    for n in (nth..count).step_by(4) {
                        let relay = relays[n % relays.len()];
                        let from = addresses[n % addresses.len()];
                        let tcp = lab.client().connect_from((from, 0), relay.listen())?;
                        let way = n / relays.len() % 6;
                        if way == 5 {
                            // In the middle of what is to be a ClientHello.
                            (&tcp).write_all(&[0x16, 3, 1, 2, 0, 1])?;
                            continue;
                        }
                        let mut stream = relay.secure(lab, tcp)?;
                        if relay == Relay::Joined && way > 1 {
                            // What is joined shall end in all these ways.
                            (0..20).try_for_each(|_| echo(&mut stream, b"?"))?;
                        }
                        match way {
                            0 => {}
                            1 => reset(stream)?,
                            2 => echo(&mut stream, b"hello")?,
                            3 => {
                                echo(&mut stream, b"hello")?;
                                stream.shutdown(Shutdown::Write)?;
                                stream.read_to_end(&mut Vec::new())?;
                            }
                            _ => {
                                echo(&mut stream, &[1; 4000])?;
                                reset(stream)?;
                            }
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("client"))
    })
}

#[test]
fn many_idle_and_many_short_connections_leave_nothing() -> Result<()> {
    come_and_go(&Relay::ALL, 500, 5000)
}

#[test]
fn many_tls_connections_that_end_in_every_way_leave_nothing() -> Result<()> {
    come_and_go(&Relay::TLS, 100, 4000)
}

/// Minutes long: `cargo xtask test two_hundred_thousand -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement that takes minutes"]
fn eight_thousand_idle_and_two_hundred_thousand_short_connections_leave_nothing() -> Result<()> {
    come_and_go(&Relay::ALL, 8000, 200_000)
}
