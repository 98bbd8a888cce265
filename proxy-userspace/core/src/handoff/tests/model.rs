//! Two peers, two sockets and a network that loses, delays and reorders, driven in any order: whatever the moment of the
//! handover, every byte reaches the other end once.

use proptest::prelude::*;

use super::{super::*, WHEN};

/// Bytes from one end to the other; positions count the bytes of the stream, without the header of our own.
#[derive(Debug, Clone, Default)]
struct Direction {
    /// By the sender.
    sent: u32,
    /// The sender will never send these again.
    forgotten: u32,
    /// By our socket to the sender, in order.
    received: u32,
    read: u32,
    /// To our other socket, the header in front of it not counted.
    written: u32,
    /// … and sent by it, whatever became of that.
    transmitted: u32,
    /// What our other socket will not send again.
    released: u32,
    /// By the other end, in order.
    arrived: u32,
    /// Packets on their way to our machine: position and length.
    wire: Vec<(u32, u32)>,
    /// … past the program while the gate was closed, not yet at the socket.
    inside: Vec<(u32, u32)>,
    /// The last acknowledgement of the other end, as far as it is noted in its record …
    acknowledged: u32,
    /// … and up to where these are our socket's …
    own: u32,
    /// … as it was known at commit.
    own_at_commit: u32,
}

impl Direction {
    fn is_drained(&self) -> bool {
        self.acknowledged >= self.own
    }
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Send(u8),
    /// The packet at that place of the wire arrives, or is lost.
    Arrive(u8),
    Lose(u8),
    Inside(u8),
    Read(u8),
    Write(u8),
    /// Our other socket sends what it has.
    Transmit,
    /// The other end acknowledges, with or without bytes of its own in the packet.
    Acknowledge(bool),
    Retransmit,
    Drive,
}

struct World {
    directions: Both<Direction>,
    /// First sequence numbers: client's, our socket's to it, backend's, our socket's to it.
    isn: [u32; 4],
    header: u32,
    /// What each end takes.
    window: u32,
    handover: Handover,
    action: Action,
    offsets: Option<Offsets>,
    alone: bool,
    vanished: bool,
    now: u64,
}

impl World {
    fn new(isn: [u32; 4], header: u32, window: u32) -> Self {
        Self {
            directions: Default::default(),
            isn,
            header,
            window,
            handover: Handover::new(true, Tick(0)),
            action: Action::Nothing,
            offsets: None,
            alone: false,
            vanished: false,
            now: 0,
        }
    }

    fn open(&self) -> bool {
        self.handover.is_committed()
    }

    /// Where the first byte of a direction is, as its sender numbers it, and as our socket to the receiver does.
    fn origins(&self, from: usize) -> (u32, u32) {
        let header = if from == 0 { self.header } else { 0 };
        match from {
            0 => (self.isn[0], self.isn[3].wrapping_add(header)),
            _ => (self.isn[2], self.isn[1]),
        }
    }

    fn sockets(&self) -> Both<Seen> {
        [0, 1].map(|end| {
            let (to, back) = (&self.directions[end], &self.directions[1 - end]);
            let (theirs, _) = self.origins(end);
            let (_, ours) = self.origins(1 - end);
            Seen {
                write_seq: ours.wrapping_add(back.written),
                rcv_nxt: theirs.wrapping_add(to.received),
                unread: to.received - to.read,
                unacked: back.written - back.released,
                unsent: back.written - back.transmitted,
                held: to.read - to.written,
                window: self.window,
                ..Seen::default()
            }
        })
    }

    fn turn(&self) -> Event {
        let held = self.directions.iter().any(|one| one.read > one.written);
        Event::Turn { bytes: WHEN.bytes, age: Duration::ZERO, held }
    }

    fn op(&mut self, from: usize, op: Op) {
        if let Op::Drive = op {
            return self.drive();
        }
        let (open, alone, vanished) = (self.open(), self.alone, self.vanished);
        let paused = self.handover.is_paused();
        let back = &self.directions[1 - from];
        let (back_is_drained, back_is_new) = (back.is_drained(), back.forgotten <= back.received);
        let (theirs, ours) = self.origins(from);
        let offset = self.offsets.map(|Offsets(by)| by[from]);
        let one = &mut self.directions[from];
        let pick = |packets: &mut Vec<(u32, u32)>, n: u8| {
            (!packets.is_empty()).then(|| packets.swap_remove(usize::from(n) % packets.len()))
        };
        match op {
            Op::Send(n) => {
                let n = u32::from(n % 16) + 1;
                one.wire.push((one.sent, n));
                one.sent += n;
            }
            Op::Arrive(n) => {
                let Some((at, length)) = pick(&mut one.wire, n) else { return };
                match offset.filter(|_| open) {
                    Some(by) => {
                        // As the program does it: on the numbers of the packet.
                        let there = theirs.wrapping_add(at).wrapping_add(by).wrapping_sub(ours);
                        arrive(&mut one.arrived, there, length);
                    }
                    None => one.inside.push((at, length)),
                }
            }
            Op::Lose(n) => drop(pick(&mut one.wire, n)),
            Op::Inside(n) => {
                let Some((at, length)) = pick(&mut one.inside, n) else { return };
                assert!(!vanished, "a packet finds no socket");
                arrive(&mut one.received, at, length);
                one.forgotten = one.forgotten.max(one.received);
            }
            Op::Read(n) if !open && !paused => one.read += (one.received - one.read).min(n.into()),
            Op::Write(n) if !open => one.written += (one.read - one.written).min(n.into()),
            Op::Transmit if !vanished => {
                one.transmitted = one.written;
                // Its acknowledgement must not be older than the one before by more than a window (RFC 5961 §5.2). What slipped in
                // at the last moment is sent within microseconds, in which nobody is told of so much.
                if back_is_new || one.own > one.own_at_commit {
                    one.arrived = one.arrived.max(one.written);
                }
            }
            Op::Acknowledge(_) if !open => {
                one.released = one.released.max(one.arrived);
                one.acknowledged = one.arrived;
            }
            Op::Acknowledge(with_bytes) => {
                let was_drained = one.is_drained();
                one.acknowledged = one.acknowledged.max(one.arrived);
                let beyond = one.arrived > one.own || one.arrived == one.own && was_drained;
                if alone || back_is_drained && beyond {
                    one.forgotten = one.forgotten.max(one.arrived);
                } else if with_bytes {
                    one.forgotten = one.forgotten.max(one.own);
                } else if !vanished {
                    one.released = one.released.max(one.arrived.min(one.written));
                }
            }
            Op::Retransmit if one.forgotten < one.sent => one.wire.push((one.forgotten, one.sent - one.forgotten)),
            Op::Read(_) | Op::Write(_) | Op::Transmit | Op::Retransmit | Op::Drive => {}
        }
    }

    /// Does what was asked for last, or says that it is quiet.
    fn drive(&mut self) {
        let sockets = self.sockets();
        let acknowledged = [0, 1].map(|end| {
            let (_, ours) = self.origins(1 - end);
            Some(ours.wrapping_add(self.directions[1 - end].acknowledged))
        });
        let settled = self.directions.iter().all(|one| one.inside.is_empty());
        // What is held is passed on like what is unread.
        let left = |sockets: Both<Seen>| sockets.map(|seen| Seen { unread: seen.unread + seen.held, ..seen });
        let looked = Event::Looked { sockets: left(sockets), acknowledged, settled };
        let event = match self.action {
            Action::Nothing | Action::Relay { .. } | Action::Pause => self.turn(),
            Action::Measure => Event::Measured { sockets, established: true },
            Action::Arm(offsets) => {
                self.offsets = Some(offsets);
                Event::Measured { sockets, established: true }
            }
            Action::PassOn => {
                for one in &mut self.directions {
                    (one.read, one.written, one.own) = (one.received, one.received, one.received);
                }
                Event::Looked { sockets: left(self.sockets()), acknowledged, settled }
            }
            Action::Commit | Action::Look => looked,
            Action::Leave => {
                self.alone = true;
                looked
            }
            Action::Vanish => return,
            Action::GiveUp => unreachable!("no time passes"),
        };
        self.now += 1;
        self.action = self.handover.step(event, &WHEN, Tick(self.now));
        if self.action == Action::Commit {
            for one in &mut self.directions {
                (one.own, one.own_at_commit) = (one.received, one.received);
            }
        }
        self.vanished = self.action == Action::Vanish;
    }
}

fn arrive(up_to: &mut u32, at: u32, length: u32) {
    if at <= *up_to {
        *up_to = (*up_to).max(at + length);
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        any::<u8>().prop_map(Op::Send),
        any::<u8>().prop_map(Op::Arrive),
        any::<u8>().prop_map(Op::Lose),
        any::<u8>().prop_map(Op::Inside),
        any::<u8>().prop_map(Op::Read),
        any::<u8>().prop_map(Op::Write),
        Just(Op::Transmit),
        any::<bool>().prop_map(Op::Acknowledge),
        Just(Op::Retransmit),
        Just(Op::Drive),
        Just(Op::Drive),
        Just(Op::Drive),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_byte_is_lost_or_doubled_whenever_it_is_handed_over(
        isn in any::<[u32; 4]>(),
        header in 0u32..60,
        window in Rest::ANNOUNCED..Rest::ANNOUNCED + 200,
        ops in prop::collection::vec((0usize..2, op()), 0..300),
    ) {
        let mut world = World::new(isn, header, window);
        for (from, op) in ops {
            world.op(from, op);
            for one in &world.directions {
                prop_assert!(one.arrived <= one.sent, "more arrived than was sent");
                prop_assert!(one.forgotten <= one.arrived.max(one.received), "forgotten by its sender, and nobody has it");
            }
        }
        // Nothing is lost any more, and time enough for all.
        for _ in 0..60 {
            for from in 0..2 {
                for op in [Op::Retransmit, Op::Arrive(0), Op::Arrive(0), Op::Inside(0), Op::Inside(0), Op::Read(255)] {
                    world.op(from, op);
                }
                for op in [Op::Write(255), Op::Transmit, Op::Acknowledge(false), Op::Drive] {
                    world.op(from, op);
                }
                world.directions[from].wire.truncate(8);
            }
        }
        for one in &world.directions {
            prop_assert_eq!(one.arrived, one.sent);
        }
    }
}
