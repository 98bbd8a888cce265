//! What tcpdump sees of handovers, at the client and at the backend.

use std::{collections::HashMap, io::Write, net::Shutdown, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    capture::{Capture, Connection, Direction, Seen},
    dialog::{echo, exchange},
    pattern::Pattern,
    relay::{Relay, handed_over},
    scripted::{Behaviour, Start, TcpServer},
    wait_for,
};

const SOON: Duration = Duration::from_secs(20);
const TO: Relay = Relay::Handoff;
/// Around a handover, microseconds: what is sent again because of it passes within.
const BEFORE: u64 = 20_000;
const AFTER: u64 = 1_000_000;

/// The same stream on both of its connections.
struct Pair {
    there: Connection,
    here: Connection,
}

impl Pair {
    /// When the first packet passed that was translated.
    fn handover(&self) -> Option<u64> {
        [self.here.from_server.forwarded, self.there.from_client.forwarded].into_iter().flatten().min()
    }

    /// One SYN each, each byte once but for what is sent again, the same bytes on both links, sound, no RST, and no FIN before that of the
    /// end whose it is.
    fn check(&self) -> Result<()> {
        let Self { here, there } = self;
        for (name, way) in [
            ("client", &here.from_client),
            ("gateway to client", &here.from_server),
            ("gateway to backend", &there.from_client),
            ("backend", &there.from_server),
        ] {
            ensure!(way.syns == 1, "{name}: {} SYN", way.syns);
            ensure!(way.seen == Seen::default(), "{name}: {:?}", way.seen);
            ensure!(way.is_whole() && way.rst.is_none(), "{name}: a gap, or a RST: {:?}", way.rst);
        }
        ensure!(here.from_client.bytes == there.from_client.bytes, "client → backend");
        ensure!(there.from_server.bytes == here.from_server.bytes, "backend → client");
        for (name, said, passed_on) in
            [("client", &here.from_client, &there.from_client), ("backend", &there.from_server, &here.from_server)]
        {
            ensure!(said.fin.is_some() && passed_on.fin >= said.fin, "{name}: FIN {:?}, {:?}", said.fin, passed_on.fin);
        }
        Ok(())
    }

    /// Segments that had passed before, around the handover and in all: those of the client, to the client, of the backend, to it.
    fn again(&self) -> [[usize; 4]; 2] {
        let at = self.handover();
        let near = |time: &&u64| at.is_some_and(|at| (at.saturating_sub(BEFORE)..at + AFTER).contains(*time));
        let Self { here, there } = self;
        let ways = [&here.from_client, &here.from_server, &there.from_server, &there.from_client];
        [ways.map(|way: &Direction| way.again.iter().filter(near).count()), ways.map(|way| way.again.len())]
    }
}

/// The connections that were seen at both places once they are over, paired by what their clients said.
fn pairs(captures: &[Capture; 2], count: usize) -> Result<Vec<Pair>> {
    let over = |capture: &Capture, port: u16| -> Result<Vec<Connection>> {
        let mut last = Vec::new();
        let whole = |c: &Connection| c.is_over() && c.from_client.is_whole() && c.from_server.is_whole();
        let all = wait_for("all ends are seen", SOON, || {
            last = capture.connections(port).ok()?;
            (last.len() == count && last.iter().all(whole)).then(|| std::mem::take(&mut last))
        });
        let open: Vec<_> = last.iter().filter(|c| !whole(c)).collect();
        all.with_context(|| format!("{} of {count}, open: {open:#?}", last.len()))
    };
    let here = over(&captures[0], TO.listen().port())?;
    let there = over(&captures[1], TO.backend_port())?;
    let mut there: HashMap<Vec<u8>, Connection> =
        there.into_iter().map(|there| (there.from_client.bytes.clone(), there)).collect();
    let pair = |here: Connection| {
        let there = there.remove(&here.from_client.bytes);
        Ok(Pair { there: there.with_context(|| format!("{}: nothing like it at the backend", here.client))?, here })
    };
    here.into_iter().map(pair).collect()
}

/// Twenty connections that are silent when they are handed over; what each said at first tells it from the others.
fn idle(lab: &Lab, shunt: &Shunt) -> Result<()> {
    let mut streams = Vec::new();
    for n in 0..20 {
        let mut stream = lab.client().connect(TO.listen())?;
        echo(&mut stream, format!("the {n}th").as_bytes())?;
        streams.push(stream);
    }
    for stream in &mut streams {
        handed_over(shunt, stream)?;
        echo(stream, b"and then something")?;
        let mut piece = vec![0; 100_000];
        Pattern::new(7).fill(&mut piece);
        echo(stream, &piece)?;
        stream.shutdown(Shutdown::Write)?;
    }
    Ok(())
}

/// Sixteen connections that are busy from their first byte to their last.
fn busy(lab: &Lab) -> Result<()> {
    thread::scope(|scope| {
        let one = |n: u64| move || exchange(&lab.client().connect(TO.listen())?, 100 + n, 1 << 20);
        let threads: Vec<_> = (0..16).map(|n| scope.spawn(one(n))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a client").map(drop))
    })
}

/// Captures at both ends while `work` is done with a backend that behaves so; what was handed over is `most` or more of `count`.
fn watched(
    behaviour: Behaviour,
    count: usize,
    most: usize,
    work: impl Fn(&Lab, &Shunt) -> Result<()>,
) -> Result<Vec<Pair>> {
    // No offloads, and nothing overtakes anything, as between veths whose packets several processors have in hand.
    let lab = Lab::builder().backends(1).cabled().build()?;
    let _server = TcpServer::start(lab.backend(1), TO.backend_port(), behaviour)?;
    let shunt = Shunt::start(&lab, &TO.route_to(&[lab.backend(1).ip], ""))?;
    let captures =
        [Capture::start(lab.client(), "client", lab.dir())?, Capture::start(lab.backend(1), "backend", lab.dir())?];
    work(&lab, &shunt)?;
    let pairs = pairs(&captures, count)?;
    for capture in captures {
        let wrong = capture.stop()?;
        ensure!(wrong.is_empty(), "tcpdump does not like {wrong:#?}");
    }
    for pair in &pairs {
        pair.check().with_context(|| format!("the connection of {}", pair.here.client))?;
    }
    let done = pairs.iter().filter(|pair| pair.handover().is_some()).count();
    ensure!(done >= most, "{done} were handed over: {:?}", shunt.metrics()?.samples("shunt_handovers_total"));
    let sum = |which: usize| {
        let each = pairs.iter().map(|pair| pair.again()[which]);
        each.fold([0; 4], |sum, again| std::array::from_fn(|who| sum[who] + again[who]))
    };
    println!(
        "{done} of {count} handed over; passed again from and to the client, from and to the backend: {:?} then, {:?} in all",
        sum(0),
        sum(1)
    );
    let crossed = |pair: &Pair| pair.here.from_server.crossed + pair.there.from_client.crossed;
    println!("older acknowledgements of our socket behind newer ones: {}", pairs.iter().map(crossed).sum::<u32>());
    std::io::stdout().flush()?;
    Ok(pairs)
}

#[test]
fn nothing_of_a_handover_in_silence_shows_on_the_wire() -> Result<()> {
    for pair in watched(Behaviour::Echo, 20, 20, idle)? {
        // No end was ever said by the gateway itself: all of them came through it.
        let own = pair.here.from_server.own_ends + pair.there.from_client.own_ends;
        ensure!(own == 0, "{}: {own} ends of our own", pair.here.client);
    }
    Ok(())
}

#[test]
fn of_a_handover_in_the_middle_of_traffic_only_segments_sent_again_show() -> Result<()> {
    let behaviour = Behaviour::Exchange { seed: 6, bytes: 1 << 20, start: Start::AtOnce };
    watched(behaviour, 16, 1, |lab, _| busy(lab)).map(drop)
}
