//! Whatever both sides do, in whatever order, every byte arrives and the FIN behind it (B3, D2).

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Dice, Lab, Shunt, link, patiently,
    pattern::{Digested, Pattern, Running},
    relay::{Relay, on_each},
};

const SOON: Duration = Duration::from_secs(10);
/// More than it takes for a connection to be moved to splice, now and then.
const MOST: u64 = 9 << 20;

/// Sends so many bytes of the pattern, in pieces and with pauses, then finishes.
fn send(mut stream: &TcpStream, seed: u64, bytes: u64, mut dice: Dice) -> Result<Digested> {
    let (mut pattern, mut digest, mut left) = (Pattern::new(seed), Running::default(), bytes);
    let mut buffer = vec![0; 1 << 18];
    while left > 0 {
        let piece = (dice.size(buffer.len() as u64 - 1) + 1).min(left) as usize;
        pattern.fill(&mut buffer[..piece]);
        digest.update(&buffer[..piece]);
        stream.write_all(&buffer[..piece])?;
        left -= piece as u64;
        if dice.one_in(12) {
            thread::sleep(Duration::from_micros(dice.roll(3000)));
        }
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(digest.finish())
}

/// Reads to the end, in pieces and with pauses.
fn receive(mut stream: &TcpStream, mut dice: Dice) -> Result<Digested> {
    let mut digest = Running::default();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let room = dice.size(buffer.len() as u64 - 1) as usize + 1;
        match stream.read(&mut buffer[..room])? {
            0 => return Ok(digest.finish()),
            n => digest.update(&buffer[..n]),
        }
        if dice.one_in(12) {
            thread::sleep(Duration::from_micros(dice.roll(3000)));
        }
    }
}

/// What one side does: its bytes, and when it begins.
#[derive(Debug, Clone, Copy)]
struct Part {
    bytes: u64,
    /// Only after the other side has finished.
    last: bool,
}

/// Both parts of the connection `seed`; at most one of them waits for the other.
fn parts(seed: u64) -> (Part, Part) {
    let mut dice = Dice::new(seed);
    let mut bytes = || if dice.one_in(4) { dice.roll(MOST) } else { dice.size(MOST) };
    let (up, down) = (bytes(), bytes());
    let waits = dice.roll(4);
    (Part { bytes: up, last: waits == 1 }, Part { bytes: down, last: waits == 2 })
}

/// Plays a part; what was sent and what was received.
fn play(stream: &TcpStream, part: Part, seed: u64) -> Result<(Digested, Digested)> {
    stream.set_read_timeout(Some(patiently(SOON)))?;
    stream.set_write_timeout(Some(patiently(SOON)))?;
    let (to_send, to_receive) = (Dice::new(seed + 1), Dice::new(seed + 2));
    if part.last {
        let received = receive(stream, to_receive)?;
        return Ok((send(stream, seed, part.bytes, to_send)?, received));
    }
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(stream, seed, part.bytes, to_send));
        let received = receive(stream, to_receive).context("receiving")?;
        Ok((sender.join().expect("sender").context("sending")?, received))
    })
}

const UP: u64 = 1 << 40;
const DOWN: u64 = 1 << 41;

/// The backend's side: the first eight bytes say which connection it is.
fn serve(mut stream: TcpStream) -> Result<(u64, Digested, Digested)> {
    let mut seed = [0; 8];
    stream.set_read_timeout(Some(patiently(SOON)))?;
    stream.read_exact(&mut seed)?;
    let seed = u64::from_be_bytes(seed);
    let (sent, received) = play(&stream, parts(seed).1, seed | DOWN)?;
    Ok((seed, sent, received))
}

fn client(lab: &Lab, relay: Relay, seed: u64) -> Result<(u64, Digested, Digested)> {
    let mut stream = lab.client().connect(relay.listen())?;
    stream.write_all(&seed.to_be_bytes())?;
    let (sent, received) = play(&stream, parts(seed).0, seed | UP)?;
    Ok((seed, sent, received))
}

#[test]
fn whatever_both_sides_do_every_byte_arrives() -> Result<()> {
    exchange_at_random(&Lab::new()?, 16)
}

#[test]
fn every_byte_arrives_over_a_network_that_loses_packets() -> Result<()> {
    let lab = Lab::new()?;
    for host in [lab.client(), lab.backend(1)] {
        link::offloads(host, "eth0", false)?;
        link::lose(host, 1)?;
    }
    exchange_at_random(&lab, 2)
}

fn exchange_at_random(lab: &Lab, rounds: u64) -> Result<()> {
    const AT_ONCE: u64 = 12;
    let listeners: Vec<TcpListener> =
        Relay::ALL.iter().map(|r| lab.backend(1).listen(([0, 0, 0, 0], r.backend_port()))).collect::<Result<_, _>>()?;
    let shunt = Shunt::start(lab, &Relay::routes(""))?;
    let first = std::process::id() as u64 * 1_000_000;
    on_each(&Relay::ENGINES, |relay| {
        let listener = &listeners[relay as usize];
        let (mut up, mut down) = (0, 0);
        for round in 0..rounds {
            let seeds: Vec<u64> = (0..AT_ONCE).map(|n| first + round * AT_ONCE + n).collect();
            let (clients, mut backends) = thread::scope(|scope| -> Result<_> {
                let clients: Vec<_> =
                    seeds.iter().map(|&seed| (seed, scope.spawn(move || client(lab, relay, seed)))).collect();
                let servers: Vec<_> = (0..AT_ONCE)
                    .map(|_| Ok(listener.accept()?.0))
                    .map(|stream| stream.map(|stream| scope.spawn(move || serve(stream))))
                    .collect::<Result<_>>()?;
                let clients = clients
                    .into_iter()
                    .map(|(seed, thread)| thread.join().expect("client").with_context(|| format!("client {seed}")))
                    .collect::<Result<Vec<_>>>()?;
                let backends = servers
                    .into_iter()
                    .map(|thread| thread.join().expect("backend").context("backend"))
                    .collect::<Result<Vec<_>>>()?;
                Ok((clients, backends))
            })?;
            backends.sort_by_key(|(seed, ..)| *seed);
            for ((seed, sent, received), (other, sent_back, received_there)) in clients.iter().zip(&backends) {
                ensure!(seed == other, "{seed} met {other}");
                ensure!(sent == received_there, "{seed} {:?}: client → backend", parts(*seed));
                ensure!(received == sent_back, "{seed} {:?}: backend → client", parts(*seed));
                up += sent.bytes + 8;
                down += received.bytes;
            }
        }
        println!("{relay:?}: {} connections, {up} bytes there and {down} back", AT_ONCE * rounds);
        shunt.wait_route(relay.route(), "each byte counted once, each end once", SOON, |r| {
            let finished: u64 = ["finished_client_first", "finished_backend_first"]
                .iter()
                .filter_map(|reason| r["terminations"][reason].as_u64())
                .sum();
            (r["bytes_in"] == up && r["bytes_out"] == down && finished == AT_ONCE * rounds).then_some(())
        })
    })
}
