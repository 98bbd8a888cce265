use std::time::Duration;

use proptest::prelude::*;

use super::*;

mod model;

const WHEN: When = When { bytes: 1000, age: Duration::from_millis(20) };
const WORTH: Event = Event::Turn { bytes: 1000, age: Duration::ZERO, held: false };

fn quiet() -> Both<Seen> {
    let socket = |write_seq, rcv_nxt| Seen { write_seq, rcv_nxt, ..Seen::default() };
    [socket(100, 2000), socket(u32::MAX - 5, 7)]
}

fn measured(sockets: Both<Seen>) -> Event {
    Event::Measured { sockets, established: true }
}

fn looked(sockets: Both<Seen>, settled: bool) -> Event {
    Event::Looked { sockets, acknowledged: [None; 2], settled }
}

fn committed() -> Handover {
    let mut one = Handover::new(true, Tick(0));
    assert_eq!(one.step(WORTH, &WHEN, Tick(1)), Action::Measure);
    assert!(matches!(one.step(measured(quiet()), &WHEN, Tick(1)), Action::Arm(_)));
    assert_eq!(one.step(measured(quiet()), &WHEN, Tick(1)), Action::Commit);
    one
}

#[test]
fn a_connection_that_carried_little_and_is_young_is_left_alone() {
    let mut one = Handover::new(true, Tick(0));
    let young = Event::Turn { bytes: 999, age: Duration::from_millis(19), held: false };
    assert_eq!(one.step(young, &WHEN, Tick(19)), Action::Nothing);
    let old = Event::Turn { bytes: 0, age: Duration::from_millis(20), held: false };
    assert_eq!(one.step(old, &WHEN, Tick(20)), Action::Measure);
}

#[test]
fn one_without_a_port_of_its_own_stays() {
    let mut one = Handover::new(false, Tick(0));
    assert_eq!((one.step(WORTH, &WHEN, Tick(9)), one.due(&WHEN, Tick(0))), (Action::Nothing, None));
    assert_eq!(one.state(), State::Never(Failure::NoPort));
}

#[test]
fn what_is_on_its_way_may_be_overtaken_when_it_is_little_and_its_reader_has_room() {
    let mut sockets = quiet();
    assert_eq!(Rest::of(&sockets), Rest::Little);
    (sockets[1].unread, sockets[1].announced) = (3_000, 20_000);
    (sockets[0].unsent, sockets[0].unacked) = (2_000, 6_000);
    sockets[0].window = 29_000;
    assert_eq!(Rest::of(&sockets), Rest::Little);
    // What overtakes it would not find room.
    sockets[0].window = 28_999;
    assert_eq!(Rest::of(&sockets), Rest::Shrinks);
    (sockets[0].unsent, sockets[0].unacked, sockets[0].window) = (0, 0, 22_999);
    assert_eq!(Rest::of(&sockets), Rest::Much);
    (sockets[0].window, sockets[1].unread) = (u32::MAX, Rest::MOST + 1);
    assert_eq!(Rest::of(&sockets), Rest::Much);
}

#[test]
fn reading_pauses_until_what_was_written_has_gone_and_no_longer() {
    let mut busy = quiet();
    (busy[0].unsent, busy[0].unacked) = (1, 1);
    let held = Event::Turn { bytes: 1000, age: Duration::ZERO, held: true };
    let mut one = Handover::new(true, Tick(0));
    assert_eq!(one.step(held, &WHEN, Tick(1)), Action::Pause);
    assert_eq!((one.step(held, &WHEN, Tick(2)), one.is_paused()), (Action::Nothing, true));
    assert_eq!(one.step(WORTH, &WHEN, Tick(3)), Action::Measure);
    assert_eq!(one.step(measured(busy), &WHEN, Tick(3)), Action::Pause);
    let why = Failure::Busy;
    let mut late = one;
    assert_eq!(late.step(held, &WHEN, Tick(21)), Action::Relay { armed: false, why });
    assert!(!late.is_paused());
    let mut late = one;
    assert_eq!(late.step(WORTH, &WHEN, Tick(21)), Action::Measure);
    assert_eq!(late.step(measured(busy), &WHEN, Tick(21)), Action::Relay { armed: false, why });
    let mut in_time = one;
    assert_eq!(in_time.step(WORTH, &WHEN, Tick(20)), Action::Measure);
    assert!(matches!(in_time.step(measured(quiet()), &WHEN, Tick(20)), Action::Arm(_)));
    assert_eq!(in_time.step(WORTH, &WHEN, Tick(20)), Action::Measure);
    assert_eq!(in_time.step(measured(busy), &WHEN, Tick(20)), Action::Pause);
    assert_eq!(in_time.step(held, &WHEN, Tick(21)), Action::Relay { armed: true, why });
}

#[test]
fn offsets_that_moved_are_never_used() {
    let mut one = Handover::new(true, Tick(0));
    one.step(WORTH, &WHEN, Tick(1));
    one.step(measured(quiet()), &WHEN, Tick(1));
    let mut moved = quiet();
    moved[0].rcv_nxt -= 1;
    let why = Failure::OffsetsMoved;
    assert_eq!(one.step(measured(moved), &WHEN, Tick(2)), Action::Relay { armed: true, why });
    assert_eq!(one.step(WORTH, &WHEN, Tick(9999)), Action::Nothing);
}

#[test]
fn a_busy_connection_is_tried_again_soon_and_then_rarely() {
    let mut one = Handover::new(true, Tick(0));
    let mut busy = quiet();
    // Its reader has taken everything, and takes no more.
    busy[0].unread = 1;
    let mut now = Tick(0);
    for attempt in 0..40 {
        assert_eq!(one.step(WORTH, &WHEN, now), Action::Measure, "attempt {attempt}");
        one.step(measured(busy), &WHEN, now);
        assert_eq!(one.step(WORTH, &WHEN, now), Action::Nothing, "at once after attempt {attempt}");
        let State::Relaying { not_before } = one.state() else { panic!("{one:?}") };
        now = not_before;
    }
    let State::Relaying { not_before } = one.state() else { panic!("{one:?}") };
    assert!(not_before.since(Tick(0)) > RARELY * 20, "{one:?}");
}

#[test]
fn sockets_stay_until_their_last_bytes_are_acknowledged_and_what_slipped_in_is_passed_on() {
    let mut one = committed();
    let mut sockets = quiet();
    sockets[1].unacked = 10;
    assert_eq!(one.step(looked(sockets, true), &WHEN, Tick(2)), Action::Look);
    sockets[0].unread = 3;
    assert_eq!(one.step(looked(sockets, true), &WHEN, Tick(3)), Action::PassOn);
    sockets[0].unread = 0;
    sockets[1].write_seq = sockets[1].write_seq.wrapping_add(3);
    // Acknowledged in packets that were not for the socket: not all of it, then all.
    let ack = |by: u32| [None, Some(quiet()[1].write_seq.wrapping_add(by))];
    let seen = |by| Event::Looked { sockets, acknowledged: ack(by), settled: true };
    assert_eq!(one.step(seen(2), &WHEN, Tick(4)), Action::Look);
    assert_eq!(one.step(seen(3), &WHEN, Tick(4)), Action::Leave);
    assert_eq!(one.step(looked(sockets, false), &WHEN, Tick(5)), Action::Look);
    assert_eq!(one.step(looked(sockets, true), &WHEN, Tick(6)), Action::Vanish);
    assert_eq!(one.step(looked(sockets, true), &WHEN, Tick(7)), Action::Nothing);
}

#[test]
fn a_peer_that_never_acknowledges_is_given_up() {
    let mut one = committed();
    let mut sockets = quiet();
    sockets[1].unacked = 10;
    let end = Tick(1).after(DRAIN);
    assert_eq!(one.step(looked(sockets, true), &WHEN, Tick(end.0 - 1)), Action::Look);
    assert_eq!(one.step(looked(sockets, true), &WHEN, end), Action::GiveUp);
}

#[test]
fn ends_whose_segments_do_not_fit_are_not_joined() {
    let facts = |announced_mss, peer_mss| Facts {
        established: true,
        timestamps: true,
        sack: true,
        ecn: false,
        timestamps_in_micros: false,
        peer_scale: 7,
        own_scale: 7,
        snd_mss: 1448,
        announced_mss,
        out_of_order: 0,
        peer_mss,
        window: 65_535,
        announced: 65_535,
        round_trip: Duration::ZERO,
    };
    assert_eq!(fit(&facts(1460, 1460), &facts(1460, 1460)), Ok(()));
    assert_eq!(fit(&facts(1460, 1400), &facts(1460, 1460)), Err(Unfit::ToClient { sent: 1460, taken: 1400 }));
    assert_eq!(fit(&facts(1460, 1460), &facts(1260, 1260)), Err(Unfit::ToBackend { sent: 1460, taken: 1260 }));
    let half = Facts { established: false, ..facts(1460, 1460) };
    assert_eq!(fit(&half, &facts(1460, 1460)), Err(Unfit::Finished));
}

/// What can happen to one direction of a relayed connection.
#[derive(Debug, Clone, Copy)]
enum Step {
    Receive(u16),
    Read(u16),
    Write(u16),
    Send(u16),
    Acknowledge(u16),
}

fn steps() -> impl Strategy<Value = Vec<(bool, Step)>> {
    let step = prop_oneof![
        any::<u16>().prop_map(Step::Receive),
        any::<u16>().prop_map(Step::Read),
        any::<u16>().prop_map(Step::Write),
        any::<u16>().prop_map(Step::Send),
        any::<u16>().prop_map(Step::Acknowledge),
    ];
    prop::collection::vec((any::<bool>(), step), 0..200)
}

fn relay(sockets: &mut Both<Seen>, upward: bool, step: Step) {
    let (this, other) = if upward { (0, 1) } else { (1, 0) };
    match step {
        Step::Receive(n) => {
            sockets[this].rcv_nxt = sockets[this].rcv_nxt.wrapping_add(n.into());
            sockets[this].unread += u32::from(n);
        }
        Step::Read(n) => {
            let n = sockets[this].unread.min(n.into());
            sockets[this].unread -= n;
            sockets[this].held += n;
        }
        Step::Write(n) => {
            let n = sockets[this].held.min(n.into());
            sockets[this].held -= n;
            sockets[other].write_seq = sockets[other].write_seq.wrapping_add(n);
            sockets[other].unsent += n;
            sockets[other].unacked += n;
        }
        Step::Send(n) => sockets[other].unsent -= sockets[other].unsent.min(n.into()),
        Step::Acknowledge(n) => {
            let sent = sockets[other].unacked - sockets[other].unsent;
            sockets[other].unacked -= sent.min(n.into());
        }
    }
}

proptest! {
    #[test]
    fn relaying_never_moves_the_offsets(start in any::<[u32; 4]>(), steps in steps()) {
        let socket = |write_seq, rcv_nxt| Seen { write_seq, rcv_nxt, ..Seen::default() };
        let mut sockets = [socket(start[0], start[1]), socket(start[2], start[3])];
        let offsets = Offsets::of(&sockets);
        for (upward, step) in steps {
            relay(&mut sockets, upward, step);
            prop_assert_eq!(Offsets::of(&sockets), offsets);
        }
    }
}
