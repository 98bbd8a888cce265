//! The engine `sockmap` where it could do harm: lost packets, readers that do not read, many connections that say nothing.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    GATEWAY, GATEWAY6, Lab, Shunt, dialog, kernel, link, patiently,
    pattern::{self, Digested},
    relay::{Relay, servers},
    scripted::{Behaviour, TcpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(10);
/// A stream on a lossy link waits for its retransmission timer now and then.
const LATE: Duration = Duration::from_secs(120);

/// Enough for most to be joined: two turns each, unless several came at once.
const GREETINGS: u64 = 10;

/// Sizes of the stream `seed`, there and back.
fn sizes(seed: u64) -> [u64; 2] {
    let roll = |n: u64| seed.wrapping_add(n).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    [roll(1) % 600_000, roll(2) % 600_000]
}

/// Says its bytes and hears the others at the same time, each to its end.
fn exchange(stream: &TcpStream, seed: u64, bytes: u64) -> Result<(Digested, Digested)> {
    stream.set_read_timeout(Some(patiently(LATE)))?;
    stream.set_write_timeout(Some(patiently(LATE)))?;
    thread::scope(|scope| {
        let sender = scope.spawn(move || -> Result<Digested> {
            let mut to = stream;
            let sent = pattern::send(&mut to, seed, bytes)?;
            stream.shutdown(Shutdown::Write)?;
            Ok(sent)
        });
        let mut from = stream;
        let received = pattern::receive(&mut from).context("receiving")?;
        Ok((sender.join().expect("sender").context("sending")?, received))
    })
}

fn serve(mut stream: TcpStream) -> Result<(u64, Digested, Digested)> {
    let mut seed = [0; 8];
    stream.set_read_timeout(Some(patiently(LATE)))?;
    for _ in 0..GREETINGS {
        stream.read_exact(&mut seed)?;
        stream.write_all(&seed)?;
    }
    let seed = u64::from_be_bytes(seed);
    let (sent, received) = exchange(&stream, seed | 1 << 41, sizes(seed)[1])?;
    Ok((seed, sent, received))
}

fn dial(lab: &Lab, seed: u64) -> Result<(u64, Digested, Digested)> {
    let mut stream = lab.client().connect(Relay::Joined.listen())?;
    stream.set_read_timeout(Some(patiently(LATE)))?;
    for _ in 0..GREETINGS {
        stream.write_all(&seed.to_be_bytes())?;
        stream.read_exact(&mut [0; 8])?;
    }
    let (sent, received) = exchange(&stream, seed | 1 << 40, sizes(seed)[0])?;
    Ok((seed, sent, received))
}

/// `streams` through a network without offloads that loses `percent` of the packets each way.
fn lose(streams: u64, at_once: u64, percent: u32) -> Result<()> {
    let lab = Lab::new()?;
    for (host, device) in
        [(lab.client(), "eth0"), (lab.backend(1), "eth0"), (lab.gateway(), "clients"), (lab.gateway(), "backend1")]
    {
        link::offloads(host, device, false)?;
    }
    // What reaches an end is lost on its way there: data of one direction and acknowledgements of the other.
    for host in [lab.client(), lab.backend(1)] {
        link::lose(host, percent)?;
    }
    let listener = lab.backend(1).listen(([0, 0, 0, 0], Relay::Joined.backend_port()))?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    let first = u64::from(std::process::id()) * 1_000_000;
    let (next, (mut up, mut down)) = (AtomicU64::new(0), (0, 0));
    let (lab, next, began) = (&lab, &next, Instant::now());
    let (clients, mut backends) = thread::scope(|scope| -> Result<_> {
        let backends = scope.spawn(|| accept_all(&listener, streams));
        let worker = move || -> Result<Vec<_>> {
            let mut done = Vec::new();
            loop {
                let nth = next.fetch_add(1, Relaxed);
                if nth >= streams {
                    return Ok(done);
                }
                done.push(dial(lab, first + nth).with_context(|| format!("stream {}", first + nth))?);
            }
        };
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(worker)).collect();
        let done = workers.into_iter().map(|w| w.join().expect("client")).collect::<Result<Vec<_>>>()?;
        Ok((done.concat(), backends.join().expect("backends")?))
    })?;
    backends.sort_by_key(|(seed, ..)| *seed);
    let mut clients = clients;
    clients.sort_by_key(|(seed, ..)| *seed);
    for ((seed, sent, received), (other, sent_back, received_there)) in clients.iter().zip(&backends) {
        ensure!(seed == other, "{seed} met {other}");
        ensure!(sent == received_there, "{seed}: client → backend: {sent:?}, {received_there:?}");
        ensure!(received == sent_back, "{seed}: backend → client: {sent_back:?}, {received:?}");
        up += sent.bytes + 8 * GREETINGS;
        down += received.bytes + 8 * GREETINGS;
    }
    ensure!(clients.len() as u64 == streams && backends.len() as u64 == streams);
    shunt.wait_route("joined", "each byte is counted once", SOON, |r| {
        (r["bytes_in"] == up && r["bytes_out"] == down && r["connections_active"] == 0).then_some(())
    })?;
    let joined = ended_joined(&shunt)?;
    let took = began.elapsed().as_secs_f64();
    println!("{percent} % lost: {streams} streams, {joined} joined, {up} bytes there and {down} back, {took:.1} s");
    ensure!(joined > streams as f64 / 2.0, "{joined} of {streams} were joined");
    Ok(())
}

fn accept_all(listener: &TcpListener, streams: u64) -> Result<Vec<(u64, Digested, Digested)>> {
    thread::scope(|scope| {
        let serving: Vec<_> =
            (0..streams).map(|_| Ok(scope.spawn(serve_accepted(listener.accept()?.0)))).collect::<Result<_>>()?;
        serving.into_iter().map(|thread| thread.join().expect("backend").context("backend")).collect()
    })
}

fn serve_accepted(stream: TcpStream) -> impl FnOnce() -> Result<(u64, Digested, Digested)> {
    move || serve(stream)
}

/// Connections that were joined when they ended.
fn ended_joined(shunt: &Shunt) -> Result<f64> {
    let labels = [("route", "joined"), ("engine", "sockmap")];
    Ok(shunt.metrics()?.value("shunt_terminations_total", &labels))
}

#[test]
fn every_byte_arrives_when_packets_are_lost_in_both_directions() -> Result<()> {
    lose(60, 12, 3)?;
    lose(24, 12, 10)
}

#[test]
#[ignore = "a measurement: minutes"]
fn a_thousand_streams_through_a_lossy_network() -> Result<()> {
    lose(400, 32, 3)?;
    lose(300, 32, 5)?;
    lose(300, 32, 10)
}

/// Writes until nothing has been taken for a while; how much was.
fn write_until_it_stops(stream: &mut TcpStream, most: u64) -> Result<u64> {
    const STOPPED: Duration = Duration::from_secs(2);
    stream.set_nonblocking(true)?;
    let (piece, mut written, mut moved) = (vec![0x77; 256 << 10], 0, Instant::now());
    while moved.elapsed() < STOPPED && written < most {
        match stream.write(&piece) {
            Ok(n) => (written, moved) = (written + n as u64, Instant::now()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(written)
}

#[test]
fn readers_that_do_not_read_hold_the_writer_back_and_lose_nothing() -> Result<()> {
    const FAR_TOO_MUCH: u64 = 1 << 30;
    for both in [false, true] {
        let lab = Lab::new()?;
        let listener = lab.backend(1).listen(([0, 0, 0, 0], Relay::Joined.backend_port()))?;
        let shunt = Shunt::start(&lab, &Relay::routes(""))?;
        let mut client = lab.client().connect(Relay::Joined.listen())?;
        let (mut backend, _) = listener.accept()?;
        join(&shunt, &mut client, &mut backend)?;
        let before = kernel::resident_bytes(shunt.pid()?)?;
        let (there, back) = thread::scope(|scope| -> Result<_> {
            let back = scope.spawn(|| if both { write_until_it_stops(&mut backend, FAR_TOO_MUCH) } else { Ok(0) });
            let there = write_until_it_stops(&mut client, FAR_TOO_MUCH)?;
            Ok((there, back.join().expect("backend")?))
        })?;
        let queued = kernel::queued_bytes(lab.gateway())?;
        let grown = kernel::resident_bytes(shunt.pid()?)?.saturating_sub(before);
        println!("both {both}: {there} bytes there, {back} back; in sockets of the gateway {queued}; daemon +{grown}");
        // Four sockets' buffers and the grant of each direction.
        let most = 2 * kernel::socket_buffers(lab.gateway())? + (10 << 20);
        ensure!(there < most && back < most, "{there} and {back} bytes were taken, expected at most {most}");
        client.shutdown(Shutdown::Write)?;
        backend.shutdown(Shutdown::Write)?;
        let [at_backend, at_client] = thread::scope(|scope| -> Result<_> {
            let at_client = scope.spawn(|| count_to_end(&mut client));
            Ok([count_to_end(&mut backend)?, at_client.join().expect("client")?])
        })?;
        ensure!((at_backend, at_client) == (there, back), "{at_backend} of {there}, {at_client} of {back}");
        ensure!(ended_joined(&shunt)? <= 1.0);
    }
    Ok(())
}

fn count_to_end(stream: &mut TcpStream) -> Result<u64> {
    stream.set_read_timeout(Some(patiently(SOON)))?;
    let (mut buffer, mut count) = (vec![0; 1 << 20], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(count),
            n => {
                ensure!(buffer[..n].iter().all(|b| *b == 0x77), "a byte that nobody sent");
                count += n as u64;
            }
        }
    }
}

/// Questions and answers until the sockets are joined.
fn join(shunt: &Shunt, client: &mut TcpStream, backend: &mut TcpStream) -> Result<()> {
    for _ in 0..200 {
        question(client, backend)?;
        if shunt.engine_of(client)?.as_deref() == Some("sockmap") {
            // Each direction is under way from its first byte on.
            return (0..3).try_for_each(|_| question(client, backend));
        }
    }
    anyhow::bail!("200 questions were not enough to be joined")
}

fn question(client: &mut TcpStream, backend: &mut TcpStream) -> Result<()> {
    say(client, backend)?;
    say(backend, client)
}

fn say(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    let mut byte = [0];
    from.write_all(b"?")?;
    to.set_read_timeout(Some(patiently(SOON)))?;
    to.read_exact(&mut byte)?;
    ensure!(&byte == b"?", "{byte:?}");
    Ok(())
}

#[test]
fn of_what_comes_right_before_a_reset_the_beginning_arrives_or_nothing_and_no_clean_end() -> Result<()> {
    const ANSWER: usize = 800;
    let lab = Lab::new()?;
    let listener = lab.backend(1).listen(([0, 0, 0, 0], Relay::Joined.backend_port()))?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    let mut answer = [0; ANSWER];
    pattern::Pattern::new(1).fill(&mut answer);
    let rounds = 8;
    for _ in 0..rounds {
        let mut client = lab.client().connect(Relay::Joined.listen())?;
        let (mut backend, _) = listener.accept()?;
        // The backend is silent: what it says before it resets are the first bytes of its direction since the join.
        (0..16).try_for_each(|_| say(&mut client, &mut backend))?;
        wait_until("joined", SOON, || {
            say(&mut client, &mut backend).is_ok()
                && shunt.engine_of(&client).is_ok_and(|engine| engine.as_deref() == Some("sockmap"))
        })?;
        backend.write_all(&answer)?;
        dialog::reset(&backend)?;
        drop(backend);
        let (heard, end) = dialog::read_to_end(&mut client, SOON)?;
        ensure!(answer.starts_with(&heard), "{} bytes that are not how the answer begins: {heard:?}", heard.len());
        ensure!(end == dialog::End::Reset, "{end:?} after {} bytes", heard.len());
    }
    shunt.wait_ended("joined", &[("reset_by_backend", rounds)], SOON)
}

/// When the connection ended for its reader: behind nothing.
fn ended_after(stream: &mut TcpStream, since: Instant) -> Result<Duration> {
    dialog::end_of(stream, SOON)?;
    Ok(since.elapsed())
}

/// B1, B4, B5, C1: nobody tells the daemon of bytes that the kernel moves, and its clocks must know all the same.
#[test]
fn a_joined_connection_has_the_limits_of_its_state_and_every_byte_starts_them_over() -> Result<()> {
    const IDLE: Duration = Duration::from_secs(2);
    const HALF_CLOSED: Duration = Duration::from_secs(1);
    const LATE_AT_MOST: Duration = Duration::from_secs(6);
    let lab = Lab::new()?;
    let routes: String = ["standard", "extended", "immortal"]
        .iter()
        .zip(8200..)
        .map(|(keepalive, port)| {
            format!(
                "[[route]]\nname = \"{keepalive}\"\nlisten = [\"{GATEWAY}:{port}\"]\nengine = \"sockmap\"\nkeepalive = \"{keepalive}\"\n\
                 backends = [\"10.88.2.2:{port}\"]\ntimeouts = {{ idle = \"2s\", half_closed = \"1s\" }}\n"
            )
        })
        .collect();
    let listeners =
        (8200..8203).map(|port| lab.backend(1).listen(([0, 0, 0, 0], port))).collect::<Result<Vec<_>, _>>()?;
    let shunt = Shunt::start(&lab, &routes)?;
    let joined = |nth: u16| -> Result<(TcpStream, TcpStream)> {
        let mut client = lab.client().connect((GATEWAY, 8200 + nth))?;
        let (mut backend, _) = listeners[usize::from(nth)].accept()?;
        join(&shunt, &mut client, &mut backend)?;
        Ok((client, backend))
    };
    let in_time = |took: Duration, limit: Duration| {
        ensure!(
            took > limit - Duration::from_millis(50) && took < limit + patiently(LATE_AT_MOST),
            "after {took:?}, not {limit:?}"
        );
        Ok(())
    };
    let ((mut immortal, mut other), (mut extended, _far)) = (joined(2)?, joined(1)?);
    let last_byte = Instant::now();
    let (mut client, mut backend) = joined(0)?;
    // In one direction alone, for longer than the limit.
    for _ in 0..6 {
        thread::sleep(IDLE / 4);
        say(&mut client, &mut backend)?;
    }
    in_time(ended_after(&mut client, Instant::now())?, IDLE)?;
    let (mut client, mut backend) = joined(0)?;
    let since = Instant::now();
    client.shutdown(Shutdown::Write)?;
    dialog::end_of(&mut backend, SOON)?;
    in_time(ended_after(&mut client, since)?, HALF_CLOSED)?;
    in_time(ended_after(&mut extended, last_byte)?, 6 * IDLE)?;
    question(&mut immortal, &mut other)?;
    shunt.wait_ended("standard", &[("idle_timeout", 1), ("half_closed_timeout", 1)], SOON)?;
    shunt.wait_ended("extended", &[("idle_timeout", 1)], SOON)?;
    ensure!(shunt.engine_of(&immortal)?.as_deref() == Some("sockmap"));
    Ok(())
}

/// What the daemon takes for the largest window that a socket has, …
const WINDOW: usize = 512 << 10;
/// … what the kernel may have under way of it (`GRANT`), …
const GRANT: usize = 1 << 20;
/// … and how much may wait beyond the window (`BEYOND`).
const BEYOND: usize = 8 << 20;

/// A daemon, with one worker, on a kernel that does not keep to the bounds that it relies on: windows are larger than it was told
/// when it loaded its maps, and what is redirected is not taken, so that all the rest waits.
fn on_a_kernel_that_takes_too_much(lab: &Lab) -> Result<Shunt> {
    let gateway = lab.gateway();
    // The kernel is trusted at the start, and the maps are loaded for the first route that needs them.
    let shunt = Shunt::builder().processors("0").start(lab, &Relay::Splice.route_to(&[[10, 88, 2, 2].into()], ""))?;
    gateway.set_sysctl("net.ipv4.tcp_rmem", &format!("4096 67108864 {WINDOW}"))?;
    shunt.reload(&Relay::routes(""))?;
    gateway.set_sysctl("net.ipv4.tcp_rmem", "4096 67108864 67108864")?;
    gateway.set_sysctl("net.ipv4.tcp_notsent_lowat", "16384")?;
    Ok(shunt)
}

/// Both ends of a connection that is joined.
fn joined(lab: &Lab, shunt: &Shunt, listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let mut client = lab.client().connect(Relay::Joined.listen())?;
    let (mut backend, _) = listener.accept()?;
    // Asking after each question would take longer than they do.
    (0..16).try_for_each(|_| question(&mut client, &mut backend))?;
    join(shunt, &mut client, &mut backend)?;
    Ok((client, backend))
}

fn overflows(shunt: &Shunt, bound: &str) -> Result<f64> {
    Ok(shunt.metrics()?.value("shunt_sockmap_overflows_total", &[("bound", bound)]))
}

#[test]
fn a_connection_of_which_too_much_waits_is_ended_and_counted_and_its_neighbour_is_not() -> Result<()> {
    let lab = Lab::new()?;
    let listener = lab.backend(1).listen(([0, 0, 0, 0], Relay::Joined.backend_port()))?;
    let shunt = on_a_kernel_that_takes_too_much(&lab)?;
    let (mut client, mut backend) = joined(&lab, &shunt, &listener)?;
    let (mut neighbour, mut other) = joined(&lab, &shunt, &listener)?;
    client.set_write_timeout(Some(patiently(SOON)))?;
    let written = client.write_all(&vec![0x77; 2 * (GRANT + WINDOW + BEYOND)]);
    ensure!(written.is_err() || count_to_end(&mut client).is_err(), "the writer was not told");
    ensure!(count_to_end(&mut backend).is_err(), "the reader was told of an end");
    wait_until("it is counted", SOON, || overflows(&shunt, "connection").is_ok_and(|n| n == 1.0))?;
    ensure!(shunt.terminations("joined")?.get("killed") == Some(&1), "{:?}", shunt.terminations("joined"));
    ensure!(overflows(&shunt, "worker")? == 0.0);
    question(&mut neighbour, &mut other)
}

#[test]
fn connections_of_which_too_much_waits_together_are_ended_with_the_worst_first_until_the_rest_fits() -> Result<()> {
    const FLOWS: usize = 14;
    // Within what one may have, and beyond its window.
    const EACH: usize = GRANT + WINDOW + BEYOND - (1 << 20);
    let lab = Lab::new()?;
    let listener = lab.backend(1).listen(([0, 0, 0, 0], Relay::Joined.backend_port()))?;
    let shunt = on_a_kernel_that_takes_too_much(&lab)?;
    let mut flows =
        (0..FLOWS).map(|_| joined(&lab, &shunt, &listener)).collect::<Result<Vec<(TcpStream, TcpStream)>>>()?;
    let bytes = vec![0x77; EACH];
    for (nth, (client, backend)) in flows.iter_mut().enumerate() {
        client.set_write_timeout(Some(patiently(SOON)))?;
        backend.set_write_timeout(Some(patiently(SOON)))?;
        match nth {
            // As much in both directions.
            0 => client.write_all(&bytes).and_then(|()| backend.write_all(&bytes)).context("the first")?,
            // It may be one of those that are ended.
            _ => drop(client.write_all(&bytes)),
        }
    }
    wait_until("one is ended", SOON, || overflows(&shunt, "worker").is_ok_and(|n| n >= 1.0))?;
    let (mut worst, _) = flows.remove(0);
    ensure!(count_to_end(&mut worst).is_err(), "the worst is still there");
    // Those that are left lose nothing when their readers read.
    let whole = flows.into_iter().filter_map(|(client, mut backend)| {
        client.shutdown(Shutdown::Write).ok()?;
        (count_to_end(&mut backend).ok()? == EACH as u64).then_some(client)
    });
    let whole = whole.count();
    let ended = overflows(&shunt, "worker")?;
    println!("{FLOWS} connections: {ended} ended, {whole} left and whole");
    ensure!(whole as f64 + ended == FLOWS as f64, "{ended} ended, {whole} whole");
    ensure!(whole > FLOWS / 3, "only {whole} of {FLOWS} were left");
    ensure!(shunt.terminations("joined")?.get("killed").copied().unwrap_or_default() as f64 == ended);
    ensure!(overflows(&shunt, "connection")? == 0.0);
    Ok(())
}

#[test]
fn the_daemon_sleeps_while_the_kernel_passes_messages_on_over_both_families() -> Result<()> {
    const MESSAGES: u64 = 3000;
    let lab = Lab::new()?;
    let port = 8100;
    let backend: SocketAddr = (lab.backend(1).ip6, 9100).into();
    let v6 = format!(
        "[[route]]\nname = \"v6\"\nlisten = [\"[{GATEWAY6}]:{port}\"]\nengine = \"sockmap\"\nbackends = [\"{backend}\"]\n"
    );
    let listeners =
        [lab.backend(1).listen(([0, 0, 0, 0], Relay::Joined.backend_port()))?, lab.backend(1).listen(backend)?];
    let shunt = Shunt::start(&lab, &format!("{}{v6}", Relay::routes("")))?;
    for (to, listener) in
        [(Relay::Joined.listen(), &listeners[0]), ((IpAddr::V6(GATEWAY6), port).into(), &listeners[1])]
    {
        let mut client = lab.client().connect(to)?;
        let (mut backend, _) = listener.accept()?;
        join(&shunt, &mut client, &mut backend)?;
        let before = kernel::sleeps(shunt.pid()?)?;
        for _ in 0..MESSAGES {
            question(&mut client, &mut backend)?;
        }
        let woken = kernel::sleeps(shunt.pid()?)? - before;
        println!("{to}: {MESSAGES} messages each way, the daemon was woken {woken} times");
        ensure!(woken < MESSAGES / 10, "{to}: woken {woken} times by {MESSAGES} messages each way");
        let listed = shunt.connection_of(&client)?.context("listed")?;
        let bytes = listed["bytes_in"].as_u64().context("bytes_in")?;
        ensure!(bytes > MESSAGES && listed["bytes_out"] == bytes, "counted while it lives: {listed}");
        ensure!(listed["idle_seconds"].as_f64().is_some_and(|idle| idle < 5.0), "{listed}");
    }
    Ok(())
}

#[test]
#[ignore = "a measurement: 16,000 sockets"]
fn eight_thousand_idle_connections_cost_memory_and_no_time() -> Result<()> {
    const FLOWS: usize = 8000;
    const QUIET: Duration = Duration::from_secs(20);
    for relay in [Relay::Copy, Relay::Splice, Relay::Joined] {
        let lab = Lab::builder().client_addresses(4).build()?;
        let _servers: Vec<TcpServer> = servers(&lab, &Behaviour::Echo)?;
        let shunt = Shunt::start(&lab, &Relay::routes(""))?;
        let before = kernel::resident_bytes(shunt.pid()?)?;
        let mut flows = Vec::with_capacity(FLOWS);
        for _ in 0..FLOWS {
            let mut stream = lab.client().connect(relay.listen())?;
            let times = if relay == Relay::Joined { 20 } else { 1 };
            (0..times).try_for_each(|_| dialog::echo(&mut stream, b"hello"))?;
            flows.push(stream);
        }
        // Without so much a spliced connection is one that is copied.
        let engine = if relay == Relay::Splice { "copy" } else { relay.engine() };
        let labels = [("route", relay.route()), ("engine", engine)];
        let there = || shunt.metrics().is_ok_and(|m| m.value("shunt_connections_active", &labels) == FLOWS as f64);
        wait_until("all are moved as the route says", SOON, there)?;
        let (cpu, slept) = (kernel::cpu_seconds(shunt.pid()?)?, kernel::sleeps(shunt.pid()?)?);
        thread::sleep(QUIET);
        let (cpu, slept) = (kernel::cpu_seconds(shunt.pid()?)? - cpu, kernel::sleeps(shunt.pid()?)? - slept);
        let each = kernel::resident_bytes(shunt.pid()?)?.saturating_sub(before) / FLOWS as u64;
        println!(
            "{relay:?}: {FLOWS} idle: {each} bytes of the daemon each; in {QUIET:?} {cpu:.2} s of processor time, woken {slept} times"
        );
        flows.iter_mut().step_by(100).try_for_each(|stream| dialog::echo(stream, b"still there"))?;
    }
    Ok(())
}
