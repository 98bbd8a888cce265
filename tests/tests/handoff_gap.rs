//! What an end says last comes at every moment of a handover: held back on a cable until the gate is where it is wanted.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    ops::AddAssign,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_abi::handoff::{HandoffFlow, gate};
use proxy_userspace::{
    handoff::folder,
    kernel::bpf::handoff::{Gate, HandoffStore, HandoffTable, Sizes},
};
use shunt_lab::{
    Lab, Shunt,
    cable::{Carry, Ends, Way},
    dialog::{End, read_to_end, reset},
    frame::{Segment, flag},
    pattern,
    relay::Relay,
};

const SOON: Duration = Duration::from_secs(10);
const TO: Relay = Relay::Handoff;
/// Until a moment was hit often enough, on a crowded machine.
const PATIENTLY: Duration = Duration::from_secs(60);
/// Connections that are under way at once.
const AT_ONCE: u64 = 4;
/// In the table: ended ones stay for ten seconds.
const FLOWS: u32 = 1024;
/// A handover that has not come by then is none.
const PATIENCE: Duration = Duration::from_secs(1);

/// How far a handover is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The entries are there, the gate is closed.
    Armed,
    /// The program translates, our sockets wait for the last acknowledgements.
    Open,
    /// Nothing is for the sockets any more.
    Alone,
}

impl Moment {
    const fn gate(self) -> u32 {
        match self {
            Self::Armed => gate::CLOSED,
            Self::Open => gate::OPEN,
            Self::Alone => gate::ALONE,
        }
    }
}

/// What was found out when it was let go.
#[derive(Debug, Clone, Copy, Default)]
struct Release {
    /// The gate stood where it was wanted before the packets came, and after the program and the stack were done with them.
    hit: bool,
    /// … and the connection was handed over all the same.
    handed_over: bool,
}

/// One end's last words.
struct Hold {
    /// Of the connection on this cable.
    port: u16,
    client_port: u16,
    moment: Moment,
    /// So much later.
    late: Duration,
    begun: Instant,
    frames: Vec<Vec<u8>>,
    /// Its flow in the table, and the flow's id.
    flow: Option<(Gate, u64)>,
    reached: Option<Instant>,
    released: Option<Release>,
    tell: Sender<Release>,
}

type Holds = Arc<Mutex<Vec<Hold>>>;

/// Carries everything but what is held.
struct HoldBack {
    table: Arc<HandoffTable>,
    /// Where the next flow is expected: gates are given in turn.
    next: u32,
    walked: Instant,
    daemon: Pid,
    holds: Holds,
    /// On another processor than the daemon, which else would never be seen at work.
    apart: bool,
}

impl Carry for HoldBack {
    fn take(&mut self, way: Way, frame: Vec<u8>, ends: &Ends) {
        if !std::mem::replace(&mut self.apart, true) {
            let mut others = CpuSet::new();
            // Where there is one processor only, moments are hit more rarely.
            let _ = others.set(1).and_then(|()| sched_setaffinity(Pid::from_raw(0), &others));
        }
        let mut holds = lock(&self.holds);
        let hold = Segment::of(&frame).filter(|_| way == Way::ToGateway).and_then(|segment| {
            let says = !segment.payload.is_empty() || segment.has(flag::FIN | flag::RST);
            // While a byte of ours is not acknowledged, the gate stays open.
            let of = |hold: &&mut Hold| [segment.from.port(), segment.to.port()].contains(&hold.port);
            holds.iter_mut().find(of).filter(|hold| (says || hold.moment == Moment::Open) && hold.released.is_none())
        });
        match hold {
            // What is sent again is there already.
            Some(hold) => hold.frames.push(frame),
            None => ends.put(way, &frame),
        }
    }

    fn tick(&mut self, ends: &Ends) {
        let holds = Arc::clone(&self.holds);
        let mut holds = lock(&holds);
        for hold in holds.iter_mut().filter(|hold| !hold.frames.is_empty() || hold.released.is_some()) {
            self.look(hold, ends);
        }
        holds.retain(|hold| match hold.released {
            Some(release) if hold.is_settled(&self.table) => {
                // Nobody waits any more where the test has failed.
                let _ = hold.tell.send(release);
                false
            }
            _ => true,
        });
    }

    fn due(&self) -> Option<Instant> {
        let busy = lock(&self.holds).iter().any(|hold| !hold.frames.is_empty() || hold.released.is_some());
        busy.then(Instant::now)
    }
}

impl HoldBack {
    fn look(&mut self, hold: &mut Hold, ends: &Ends) {
        if hold.flow.is_none() {
            hold.flow = self.find(hold.client_port);
        }
        let gate = hold.gate(&self.table);
        if let Some(release) = &mut hold.released {
            release.handed_over |= gate.is_some_and(|gate| gate != gate::CLOSED);
            return;
        }
        let now = Instant::now();
        if gate.is_some_and(|gate| gate >= hold.moment.gate()) {
            hold.reached.get_or_insert(now);
        }
        let is_time = hold.reached.is_some_and(|reached| now >= reached + hold.late);
        if !is_time && now < hold.begun + PATIENCE {
            return;
        }
        // Stopped, or the moment would be over in microseconds.
        let stopped = gate == Some(hold.moment.gate());
        if stopped {
            let _ = kill(self.daemon, Signal::SIGSTOP);
            // Its threads run until they are interrupted.
            let until = Instant::now() + Duration::from_micros(200);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        }
        let before = hold.gate(&self.table);
        for frame in hold.frames.drain(..) {
            ends.put(Way::ToGateway, &frame);
        }
        let after = hold.gate(&self.table);
        if stopped {
            let _ = kill(self.daemon, Signal::SIGCONT);
        }
        let hit = before == after && before == Some(hold.moment.gate());
        hold.released = Some(Release { hit, handed_over: after.is_some_and(|gate| gate != gate::CLOSED) });
    }
}

impl HoldBack {
    /// The flow of the client's port: at once where it is expected, now and then anywhere.
    fn find(&mut self, port: u16) -> Option<(Gate, u64)> {
        const AHEAD: u32 = 8;
        let of = |gate: Gate, flow: HandoffFlow| {
            let is_it = u16::from_be_bytes(flow.key.source.port_be) == port && flow.id != 0 && !flow.is_over();
            is_it.then_some((gate, flow.id))
        };
        let near = (0..AHEAD).map(|n| Gate((self.next + n) % FLOWS));
        let mut found = near.filter_map(|gate| of(gate, self.table.flow(gate))).next();
        if found.is_none() && self.walked.elapsed() > Duration::from_millis(2) {
            self.walked = Instant::now();
            found = self.table.walk().into_iter().find_map(|found| of(found.gate, found.flow));
        }
        // Others may be a little before it.
        self.next = found.map_or(self.next, |(gate, _)| (gate.0 + FLOWS - AHEAD / 2) % FLOWS);
        found
    }
}

impl Hold {
    /// `None` while it is not in the table.
    fn gate(&mut self, table: &HandoffTable) -> Option<u32> {
        let (gate, id) = self.flow?;
        let flow = table.flow(gate);
        if flow.id != id {
            self.flow = None;
            return None;
        }
        Some(flow.gate)
    }

    /// It is known whether it was handed over.
    fn is_settled(&self, table: &HandoffTable) -> bool {
        let handed_over = self.released.is_some_and(|release| release.handed_over);
        let is_there = self.flow.is_some_and(|(gate, id)| table.flow(gate).id == id);
        handed_over || !is_there || self.begun.elapsed() > PATIENCE * 2
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which end says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Backend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Fin,
    Rst,
}

struct Stage {
    lab: Lab,
    shunt: Shunt,
    listener: Mutex<TcpListener>,
    holds: Holds,
}

/// What is counted of many.
#[derive(Debug, Default)]
struct Tally {
    rounds: u64,
    hits: u64,
    handed_over: u64,
    bytes: [u64; 2],
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.rounds += other.rounds;
        self.hits += other.hits;
        self.handed_over += other.handed_over;
        self.bytes = [self.bytes[0] + other.bytes[0], self.bytes[1] + other.bytes[1]];
    }
}

impl Stage {
    fn new(side: Side) -> Result<Self> {
        let lab = Lab::builder().backends(1).cabled().build()?;
        let listener = Mutex::new(lab.backend(1).listen(([0, 0, 0, 0], TO.backend_port()))?);
        // The daemon takes over what is pinned, and the test looks into it.
        let sizes = Sizes { flows: FLOWS, events: 4096 };
        let socket = lab.dir().join("shunt.sock");
        let table = Arc::new(lab.gateway().run(|| HandoffTable::open(&folder(&socket), sizes))?);
        let shunt = Shunt::builder().processors("0").start(&lab, &TO.route_to(&[lab.backend(1).ip], ""))?;
        let (holds, daemon) = (Holds::default(), Pid::from_raw(shunt.pid()?.cast_signed()));
        let cable = if side == Side::Client { 0 } else { 1 };
        lab.cable(cable).carry(HoldBack {
            table,
            next: 0,
            walked: Instant::now(),
            daemon,
            holds: Arc::clone(&holds),
            apart: false,
        });
        Ok(Self { lab, shunt, listener, holds })
    }

    /// Both ends of a connection, after five bytes each way.
    fn connect(&self) -> Result<(TcpStream, TcpStream)> {
        let listener = lock(&self.listener);
        let mut client = self.lab.client().connect(TO.listen())?;
        let mut backend = listener.accept()?.0;
        drop(listener);
        for stream in [&client, &backend] {
            stream.set_read_timeout(Some(SOON))?;
            stream.set_nodelay(true)?;
        }
        let mut heard = [0; 5];
        client.write_all(b"hello")?;
        backend.read_exact(&mut heard)?;
        backend.write_all(&heard)?;
        client.read_exact(&mut heard)?;
        Ok((client, backend))
    }

    /// One connection whose last words, of `side`, come at that moment.
    fn one(&self, side: Side, word: Word, moment: Moment, random: u64) -> Result<Tally> {
        let (client, backend) = self.connect()?;
        let client_port = client.local_addr()?.port();
        let port = if side == Side::Client { client_port } else { backend.peer_addr()?.port() };
        let (tell, told) = channel();
        lock(&self.holds).push(Hold {
            port,
            client_port,
            moment,
            late: Duration::from_micros(random % if moment == Moment::Armed { 60 } else { 1000 }),
            begun: Instant::now(),
            frames: Vec::new(),
            flow: None,
            reached: None,
            released: None,
            tell,
        });
        let (mut first, mut second) = if side == Side::Client { (client, backend) } else { (backend, client) };
        if moment == Moment::Open {
            // Its acknowledgement is held.
            second.write_all(b"!")?;
            first.read_exact(&mut [0])?;
        }
        let said = match word {
            // With bytes before it, or alone.
            Word::Fin => [0, 1, 700, 9000][(random >> 20) as usize % 4],
            Word::Rst => 0,
        };
        let mut bytes = [said + 5, 5 + u64::from(moment == Moment::Open)];
        match word {
            Word::Fin => {
                let sent = pattern::send(&mut &first, random, said)?;
                first.shutdown(Shutdown::Write)?;
                let received = pattern::receive(&mut second).context("the other end")?;
                ensure!(received == sent, "{received:?} of {sent:?}");
                let back = [0, 1, 20_000][(random >> 24) as usize % 3];
                let sent = pattern::send(&mut &second, random + 1, back)?;
                drop(second);
                let received = pattern::receive(&mut &first).context("back")?;
                ensure!(received == sent, "back: {received:?} of {sent:?}");
                bytes[1] += back;
            }
            Word::Rst => {
                reset(first)?;
                let (rest, end) = read_to_end(&mut second, SOON)?;
                ensure!(rest.is_empty() && end == End::Reset, "{end:?} after {} bytes", rest.len());
            }
        }
        let Release { hit, handed_over } = told.recv_timeout(SOON).context("it was let go")?;
        if side == Side::Backend {
            bytes.reverse();
        }
        Ok(Tally { rounds: 1, hits: u64::from(hit), handed_over: u64::from(hit && handed_over), bytes })
    }

    /// Rounds until the moment was hit so often.
    fn many(&self, side: Side, word: Word, moment: Moment, enough: u64) -> Result<Tally> {
        let (mut all, began) = (Tally::default(), Instant::now());
        while all.handed_over < enough {
            ensure!(began.elapsed() < PATIENTLY, "{side:?} {word:?} {moment:?}: not hit often enough: {all:?}");
            let first = (all.rounds + 1) * 0x9e37_79b9 + word as u64 * 7919;
            thread::scope(|scope| -> Result<()> {
                let one =
                    |n: u64| move || self.one(side, word, moment, (first + n).wrapping_mul(0xd134_2543_de82_ef95));
                let threads: Vec<_> = (0..AT_ONCE).map(|n| scope.spawn(one(n))).collect();
                for thread in threads {
                    all += thread
                        .join()
                        .expect("a connection")
                        .with_context(|| format!("{side:?} {word:?} {moment:?}"))?;
                }
                Ok(())
            })?;
        }
        println!("{side:?} {word:?} {moment:?}: {all:?} in {:?}", began.elapsed());
        Ok(all)
    }

    /// Every moment, and everything counted right in the end.
    fn all(&self, side: Side) -> Result<()> {
        let (mut fins, mut resets) = (Tally::default(), Tally::default());
        for (moment, enough) in [(Moment::Armed, 2), (Moment::Open, 40), (Moment::Alone, 40)] {
            fins += self.many(side, Word::Fin, moment, enough)?;
            resets += self.many(side, Word::Rst, moment, enough)?;
        }
        let (finished, reset) = match side {
            Side::Client => ("finished_client_first", "reset_by_client"),
            Side::Backend => ("finished_backend_first", "reset_by_backend"),
        };
        self.shunt.wait_ended(TO.route(), &[(finished, fins.rounds), (reset, resets.rounds)], SOON)?;
        let route = self.shunt.route(TO.route())?;
        let [up, down] = [0, 1].map(|way| fins.bytes[way] + resets.bytes[way]);
        ensure!(route["bytes_in"] == up && route["bytes_out"] == down, "{up} and {down} bytes, counted: {route}");
        println!("{:?}", self.shunt.metrics()?.samples("shunt_handovers_total"));
        Ok(())
    }
}

#[test]
fn what_an_end_says_last_counts_at_every_moment_of_a_handover() -> Result<()> {
    for side in [Side::Client, Side::Backend] {
        Stage::new(side)?.all(side)?;
    }
    Ok(())
}
