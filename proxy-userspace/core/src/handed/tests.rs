use std::time::Duration;

use super::*;
use crate::session::How;

const LIMITS: Limits = Limits {
    initial_data: Duration::ZERO,
    tls_handshake: Duration::ZERO,
    connect: Duration::ZERO,
    idle: Some(Duration::from_secs(10)),
    idle_warning: None,
    half_closed: Some(Duration::from_secs(5)),
    lifetime: Some(Duration::from_secs(100)),
};

/// Accepted at 1 s, handed over at 2 s, after 100 and 200 bytes.
fn handed() -> Handed {
    Handed::new(Session::established(Tick(1_000), Tick(2_000)), [100, 200], [0, 0])
}

fn moved(bytes: [u64; 2], last: u64) -> Look {
    Look { bytes, last: Tick(last), ..Look::default() }
}

fn ended(reason: Reason, how: How) -> Action {
    Action::End { reason, how }
}

#[test]
fn bytes_are_counted_once_and_over_the_whole_life() {
    let mut flow = handed();
    assert_eq!(flow.look(moved([10, 0], 3_000), &LIMITS, Tick(3_500)), ([10, 0], Action::Nothing));
    assert_eq!(flow.look(moved([10, 5], 4_000), &LIMITS, Tick(4_500)), ([0, 5], Action::Nothing));
    assert_eq!(flow.look(moved([9, 5], 4_000), &LIMITS, Tick(4_600)).0, [0, 0], "read while it was written");
    assert_eq!(flow.bytes(), [110, 205]);
}

#[test]
fn what_was_passed_on_at_the_last_moment_is_not_counted_again() {
    let mut flow = Handed::new(Session::established(Tick(1_000), Tick(2_000)), [100, 200], [7, 0]);
    assert_eq!(flow.bytes(), [107, 200]);
    assert_eq!(flow.look(moved([0, 0], 0), &LIMITS, Tick(3_000)).0, [0, 0]);
    assert_eq!(flow.look(moved([9, 0], 3_000), &LIMITS, Tick(3_000)).0, [2, 0]);
    assert_eq!(flow.bytes(), [109, 200]);
}

#[test]
fn only_bytes_keep_it_from_being_idle() {
    let mut flow = handed();
    flow.look(moved([1, 0], 8_000), &LIMITS, Tick(9_000));
    assert_eq!(flow.session.deadline(&LIMITS), Some(Tick(18_000)));
    // A keepalive probe: seen, without a byte.
    flow.look(moved([1, 0], 17_000), &LIMITS, Tick(17_500));
    assert_eq!(flow.tick(&LIMITS, Tick(17_999)), Action::Nothing);
    assert_eq!(flow.tick(&LIMITS, Tick(18_000)), ended(Reason::IdleTimeout, How::Reset));
}

#[test]
fn its_lifetime_is_counted_from_when_it_was_accepted() {
    let mut flow = handed();
    flow.look(moved([1, 0], 100_000), &LIMITS, Tick(100_500));
    assert_eq!(flow.tick(&LIMITS, Tick(100_999)), Action::Nothing);
    assert_eq!(flow.tick(&LIMITS, Tick(101_000)), ended(Reason::LifetimeExceeded, How::Reset));
}

#[test]
fn who_finished_first_is_told_also_when_both_were_seen_at_once() {
    let ending = |ending| Look { ending, ..Look::default() };
    let mut slowly = handed();
    assert_eq!(slowly.look(ending(Ending::HalfClosed(Side::Backend)), &LIMITS, Tick(3_000)).1, Action::Nothing);
    assert_eq!(slowly.session.deadline(&LIMITS), Some(Tick(8_000)), "half-closed");
    assert_eq!(
        slowly.look(ending(Ending::Finished(Side::Backend)), &LIMITS, Tick(4_000)).1,
        ended(Reason::FinishedBackendFirst, How::Finished)
    );
    let mut at_once = handed();
    assert_eq!(
        at_once.look(ending(Ending::Finished(Side::Client)), &LIMITS, Tick(3_000)).1,
        ended(Reason::FinishedClientFirst, How::Finished)
    );
}

#[test]
fn it_ends_once() {
    let mut flow = handed();
    let reset = Look { ending: Ending::Reset(Side::Client), ..Look::default() };
    assert_eq!(flow.look(reset, &LIMITS, Tick(3_000)).1, ended(Reason::ResetByClient, How::Reset));
    assert_eq!(flow.look(reset, &LIMITS, Tick(3_000)).1, Action::Nothing);
    assert_eq!(flow.cut(Reason::Killed, &LIMITS, Tick(3_000)), Action::Nothing);
    assert_eq!(flow.tick(&LIMITS, Tick(900_000)), Action::Nothing);
}

#[test]
fn what_is_kept_for_the_next_daemon_reads_back() {
    for client in ["10.1.2.3:4567", "[fd00::1]:1"] {
        let client = client.parse().expect("an address");
        let record = Record { route: route_hash("shop"), client, began: 7, relayed: [8, u64::MAX] };
        assert_eq!(Record::decode(&record.encode()), Some(record));
    }
    assert_eq!(Record::decode(&[0; RECORD_BYTES]), None);
    assert_ne!(route_hash("shop"), route_hash("shot"));
}
