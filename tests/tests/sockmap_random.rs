//! Joined connections at random: small windows, readers that pause, ends and resets after any byte, over a network that loses packets.
//! Whatever comes out at one end is what went in at the other, up to the end or to the reset.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use shunt_lab::{CLIENT, Dice, Lab, Shunt, dialog::reset, link, patiently, pattern::Pattern, relay::Relay, wait_for};
use socket2::SockRef;

const SOON: Duration = Duration::from_secs(10);
/// A stream on a lossy link waits for its retransmission timer now and then.
const LATE: Duration = Duration::from_secs(90);
const MOST: u64 = 2 << 20;
/// More than all sockets between a writer and a reader that does not read have room for; where little is lost.
const FAR_MORE: u64 = 16 << 20;
/// Bits of a seed that tell the connections of a round apart.
const IN_ROUND: u32 = 10;
/// Enough for most to be joined before anything else happens.
const GREETINGS: u64 = 20;
const AT_ONCE: u64 = 24;

/// Mostly none.
fn pause(dice: &mut Dice) {
    match dice.roll(400) {
        0 => thread::sleep(Duration::from_millis(dice.roll(400))),
        1..40 => thread::sleep(Duration::from_micros(dice.roll(3000))),
        _ => {}
    }
}

/// What one side does.
#[derive(Debug, Clone, Copy)]
struct Part {
    seed: u64,
    bytes: u64,
    /// Only after the other side has finished.
    last: bool,
    /// Resets the connection when it has sent so many of its bytes.
    resets_at: Option<u64>,
    /// `SO_RCVBUF`.
    window: Option<usize>,
    /// Reads nothing at first.
    stalls: Option<Duration>,
}

/// Both parts of the connection `seed`; at most one of them waits for the other, and one in four ends in a reset.
fn parts(seed: u64) -> [Part; 2] {
    let mut dice = Dice::new(seed);
    let most = if Network::of(seed).lost <= 1 && dice.one_in(6) { FAR_MORE } else { MOST };
    let waits = dice.roll(4);
    let resets = dice.roll(8);
    [0, 1].map(|side| {
        let bytes = if dice.one_in(4) { dice.roll(most) } else { dice.size(most) };
        Part {
            seed: seed << 1 | side,
            bytes,
            last: waits == side,
            resets_at: (resets == side).then(|| dice.roll(bytes + 1)),
            window: dice.one_in(3).then(|| 2048 << dice.roll(6)),
            stalls: dice.one_in(6).then(|| Duration::from_millis(dice.roll(1500))),
        }
    })
}

/// How a side has seen the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    received: u64,
    /// Told of the end of the stream, not of a reset.
    finished: bool,
}

/// Sends its bytes, in pieces and with pauses, then finishes. True: it was told of a reset, and nobody else of this end will be.
fn send(mut stream: &TcpStream, part: Part) -> Result<bool> {
    let mut dice = Dice::new(part.seed + 1);
    let (mut pattern, mut sent) = (Pattern::new(part.seed), 0);
    let mut whole = vec![0; part.bytes as usize];
    pattern.fill(&mut whole);
    let last = part.resets_at.unwrap_or(part.bytes);
    while sent < last {
        let piece = (dice.size(1 << 18) + 1).min(last - sent);
        match stream.write(&whole[sent as usize..(sent + piece) as usize]) {
            Ok(n) => sent += n as u64,
            Err(error) if is_reset(&error) => return Ok(true),
            Err(error) => return Err(error).with_context(|| format!("sending, after {sent} of {last}")),
        }
        pause(&mut dice);
    }
    if part.resets_at.is_some() {
        return Ok(false);
    }
    match stream.shutdown(Shutdown::Write) {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == ErrorKind::NotConnected => Ok(true),
        Err(error) => Err(error).context("finishing"),
    }
}

fn is_reset(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// Reads to the end, in pieces and with pauses. Every byte must be the one that the other side sends there.
fn receive(mut stream: &TcpStream, own: Part, from: Part) -> Result<Seen> {
    let mut dice = Dice::new(from.seed + 2);
    thread::sleep(own.stalls.unwrap_or_default());
    let mut expected = vec![0; from.bytes as usize];
    Pattern::new(from.seed).fill(&mut expected);
    let (mut buffer, mut received) = (vec![0; 1 << 18], 0);
    loop {
        let room = dice.size(buffer.len() as u64 - 1) as usize + 1;
        match stream.read(&mut buffer[..room]) {
            Ok(0) => return Ok(Seen { received: received as u64, finished: true }),
            Ok(n) => {
                let due = expected.get(received..received + n);
                ensure!(due == Some(&buffer[..n]), "{n} bytes behind {received} are not those that were sent");
                received += n;
            }
            Err(error) if is_reset(&error) => return Ok(Seen { received: received as u64, finished: false }),
            Err(error) => return Err(error).with_context(|| format!("receiving, after {received} of {}", from.bytes)),
        }
        pause(&mut dice);
    }
}

fn play(stream: TcpStream, own: Part, other: Part) -> Result<Seen> {
    stream.set_read_timeout(Some(patiently(LATE)))?;
    stream.set_write_timeout(Some(patiently(LATE)))?;
    if own.last {
        let seen = receive(&stream, own, other)?;
        send(&stream, own)?;
        if own.resets_at.is_some() {
            reset(&stream)?;
        }
        return Ok(seen);
    }
    thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<bool> {
            let told = send(&stream, own)?;
            if own.resets_at.is_some() {
                // The reader is told, too: `shutdown` alone says nothing to the other side, the close behind it resets.
                reset(&stream)?;
                let _ = stream.shutdown(Shutdown::Read);
            }
            Ok(told)
        });
        let seen = receive(&stream, own, other);
        let told = sender.join().expect("sender");
        let (seen, told) = (seen?, told?);
        Ok(Seen { finished: seen.finished && !told, ..seen })
    })
}

/// The backend's side: the first bytes say which connection it is.
fn serve(mut stream: TcpStream) -> Result<(u64, Seen)> {
    let mut seed = [0; 8];
    stream.set_read_timeout(Some(patiently(LATE)))?;
    for _ in 0..GREETINGS {
        stream.read_exact(&mut seed).context("greeting")?;
        stream.write_all(&seed)?;
    }
    let seed = u64::from_be_bytes(seed);
    let [client, own] = parts(seed);
    // Until its last answer has arrived a reset would end the greeting.
    match stream.read_exact(&mut [0; 8]) {
        Err(error) if is_reset(&error) => return Ok((seed, Seen { received: 0, finished: false })),
        heard => heard.context("the last greeting")?,
    }
    narrow(&stream, own)?;
    Ok((seed, play(stream, own, client).with_context(|| format!("backend of {seed}: {own:?} and {client:?}"))?))
}

fn dial(lab: &Lab, seed: u64) -> Result<(SocketAddr, Seen)> {
    let [own, backend] = parts(seed);
    // Lines of the access log are told apart by it.
    let port = 10_000 + (seed % (1 << IN_ROUND)) as u16;
    let mut stream = lab.client().connect_from((CLIENT, port), Relay::Joined.listen())?;
    stream.set_read_timeout(Some(patiently(LATE)))?;
    for _ in 0..GREETINGS {
        stream.write_all(&seed.to_be_bytes())?;
        stream.read_exact(&mut [0; 8]).with_context(|| format!("greeting {seed}"))?;
    }
    stream.write_all(&seed.to_be_bytes())?;
    narrow(&stream, own)?;
    let local = stream.local_addr()?;
    Ok((local, play(stream, own, backend).with_context(|| format!("client of {seed}: {own:?} and {backend:?}"))?))
}

fn narrow(stream: &TcpStream, part: Part) -> Result<()> {
    SockRef::from(stream).set_keepalive(true)?;
    if let Some(window) = part.window {
        SockRef::from(stream).set_recv_buffer_size(window)?;
    }
    Ok(())
}

/// What a network does to the packets of a round.
#[derive(Debug, Clone, Copy)]
struct Network {
    /// Percent of the packets, at each host.
    lost: u32,
    offloads: bool,
}

impl Network {
    /// Of the round that the connection `seed` is of.
    fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed >> IN_ROUND);
        Self { lost: [0, 0, 1, 3, 5, 10][dice.roll(6) as usize], offloads: dice.one_in(3) }
    }

    fn spoil(self, lab: &Lab) -> Result<()> {
        let links =
            [(lab.client(), "eth0"), (lab.backend(1), "eth0"), (lab.gateway(), "clients"), (lab.gateway(), "backend1")];
        for (host, device) in links.into_iter().filter(|_| !self.offloads) {
            link::offloads(host, device, false)?;
        }
        for host in [lab.client(), lab.backend(1), lab.gateway()].into_iter().filter(|_| self.lost > 0) {
            link::lose_all_but_resets(host, self.lost)?;
        }
        Ok(())
    }
}

/// One daemon, `count` connections, each checked.
fn round(seed: u64, count: u64) -> Result<()> {
    let lab = Lab::new()?;
    let network = Network::of(seed);
    network.spoil(&lab)?;
    let listener = lab.backend(1).listen(([0, 0, 0, 0], Relay::Joined.backend_port()))?;
    let shunt =
        Shunt::start(&lab, &format!("[log]\nformat = \"json\"\n{}", Relay::routes("keepalive = \"immortal\"")))?;
    let began = Instant::now();
    // A reset behind something lost is answered by a question, which may be lost as well: then somebody has to ask again.
    for host in [lab.client(), lab.backend(1), lab.gateway()] {
        host.set_sysctl("net.ipv4.tcp_keepalive_time", "2")?;
        host.set_sysctl("net.ipv4.tcp_keepalive_intvl", "1")?;
        host.set_sysctl("net.ipv4.tcp_keepalive_probes", "30")?;
    }
    let outcome = connections(&lab, &listener, seed, count);
    let list = shunt.connections("joined");
    let seen = outcome.with_context(|| format!("round {seed}, {network:?}; open: {list:?}; {}", shunt.log()))?;
    let lines = wait_for("a line of each in the access log", SOON, || {
        let lines: HashMap<String, Value> = shunt
            .access_log()
            .into_iter()
            .filter_map(|line| Some((line["client"].as_str()?.to_owned(), line)))
            .collect();
        seen.iter().all(|(address, ..)| lines.contains_key(&address.to_string())).then_some(lines)
    })
    .with_context(|| format!("round {seed}, {network:?}: {:?}", shunt.connections("joined")))?;
    let mut joined = 0;
    for (address, seed, client, backend) in &seen {
        let line = &lines[&address.to_string()];
        judge(*seed, *client, *backend, line).with_context(|| format!("round {seed}, {network:?}: {line}"))?;
        joined += u64::from(line["engine"] == "sockmap");
    }
    let metrics = shunt.metrics()?;
    let bad = metrics.value("shunt_terminations_total", &[("reason", "internal_error")])
        + metrics.value("shunt_sockmap_overflows_total", &[]);
    ensure!(bad == 0.0, "round {seed}: {bad} internal errors or overflows");
    println!("round {seed}: {network:?}; {count} connections, {joined} joined, {:.1} s", began.elapsed().as_secs_f64());
    ensure!(joined > count / 2, "round {seed}: {joined} of {count} were joined");
    Ok(())
}

/// What both ends have seen of it, and what is written down.
fn judge(seed: u64, client: Seen, backend: Seen, line: &Value) -> Result<()> {
    let [up, down] = parts(seed);
    let reason = line["reason"].as_str().unwrap_or_default();
    if let (None, None) = (up.resets_at, down.resets_at) {
        ensure!(client == Seen { received: down.bytes, finished: true }, "the client of {seed}: {client:?}, {down:?}");
        ensure!(backend == Seen { received: up.bytes, finished: true }, "the backend of {seed}: {backend:?}, {up:?}");
        let greetings = 8 * GREETINGS;
        let counted = line["bytes_in"] == up.bytes + greetings + 8 && line["bytes_out"] == down.bytes + greetings;
        ensure!(counted, "{seed} is not counted: {up:?}, {down:?}");
        ensure!(["finished_client_first", "finished_backend_first"].contains(&reason), "{reason}");
        return Ok(());
    }
    let (reset_by, other, mover) =
        if up.resets_at.is_some() { (up, backend, "client") } else { (down, client, "backend") };
    ensure!(!other.finished, "{mover} of {seed} reset, the other was told of an end: {other:?}, {reset_by:?}");
    ensure!(reason == format!("reset_by_{mover}"), "{mover} reset: {reason}");
    Ok(())
}

type Played = (SocketAddr, u64, Seen, Seen);

fn connections(lab: &Lab, listener: &TcpListener, first: u64, count: u64) -> Result<Vec<Played>> {
    let next = &std::sync::atomic::AtomicU64::new(0);
    let (clients, backends) = thread::scope(|scope| -> Result<_> {
        let backends = scope.spawn(move || {
            thread::scope(|scope| -> Result<HashMap<u64, Seen>> {
                let accepted = (0..count).map(|_| Ok(listener.accept()?.0));
                let serving: Vec<_> =
                    accepted.map(|s: Result<_>| s.map(|s| scope.spawn(move || serve(s)))).collect::<Result<_>>()?;
                serving.into_iter().map(|thread| thread.join().expect("backend")).collect()
            })
        });
        let worker = move || -> Result<Vec<(u64, SocketAddr, Seen)>> {
            let mut done = Vec::new();
            loop {
                let nth = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if nth >= count {
                    return Ok(done);
                }
                let (address, seen) = dial(lab, first + nth)?;
                done.push((first + nth, address, seen));
            }
        };
        let workers: Vec<_> = (0..AT_ONCE.min(count)).map(|_| scope.spawn(worker)).collect();
        let clients: Vec<Result<Vec<_>>> = workers.into_iter().map(|w| w.join().expect("client")).collect();
        let failed: Vec<String> = clients.iter().filter_map(|c| Some(format!("{:#}", c.as_ref().err()?))).collect();
        if !failed.is_empty() {
            // The backends may wait for those that do not come any more.
            bail!("{}", failed.join("\n"));
        }
        let clients: Vec<_> = clients.into_iter().collect::<Result<Vec<_>>>()?.concat();
        Ok((clients, backends.join().expect("backends")?))
    })?;
    let played = |(seed, address, client): (u64, SocketAddr, Seen)| {
        let backend = backends.get(&seed).with_context(|| format!("{seed} has not come through"))?;
        Ok((address, seed, client, *backend))
    };
    clients.into_iter().map(played).collect()
}

fn seed() -> u64 {
    u64::from(std::process::id()) << (2 * IN_ROUND)
}

#[test]
fn what_comes_out_is_what_went_in_up_to_the_end_or_the_reset() -> Result<()> {
    let with = |lost| (0..).map(|nth| seed() + (nth << IN_ROUND)).find(|seed| Network::of(*seed).lost == lost);
    [0, 3].into_iter().filter_map(with).try_for_each(|seed| round(seed, 60))
}

#[test]
#[ignore = "a hunt: as many minutes as `SHUNT_HUNT_MINUTES` says"]
fn what_comes_out_is_what_went_in_for_as_long_as_one_likes() -> Result<()> {
    let minutes = std::env::var("SHUNT_HUNT_MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    let mut nth = 0;
    while Instant::now() < until {
        round(seed() + (nth << IN_ROUND), 240)?;
        nth += 1;
    }
    Ok(())
}
