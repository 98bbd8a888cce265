use std::{sync::Arc, time::Duration};

use super::*;
use crate::{
    config::{MarkMask, Protocol},
    conntrack::{Entry, Event, TcpState, Traffic, Tuple},
    reason::Reason,
};

pub(super) const ROUTE: u32 = 7;
const SEEN_REPLY: u32 = 1 << 1;
const ASSURED: u32 = 1 << 2;

pub(super) fn layout() -> MarkLayout {
    MarkLayout::new(MarkMask::DEFAULT)
}

pub(super) fn at(seconds: u64) -> Now {
    Now { mono: Duration::from_secs(1_000_000 + seconds), wall: Duration::from_secs(1_700_000_000 + seconds) }
}

pub(super) fn mark(end: End) -> u32 {
    layout().route_mark(ROUTE).expect("fits") | layout().end_bits(end)
}

pub(super) fn traffic(packets: u64) -> Option<Traffic> {
    Some(Traffic { packets, bytes: packets * 100 })
}

/// A connection whose first packet has passed.
pub(super) fn syn(id: u32) -> Entry {
    let original = Tuple {
        source: format!("10.0.0.1:{}", 1000 + id % 60_000).parse().expect("address"),
        destination: "10.0.0.2:80".parse().expect("address"),
    };
    let reply = Tuple { source: "10.0.1.1:8080".parse().expect("address"), destination: original.source };
    Entry {
        id,
        protocol: Protocol::Tcp,
        original,
        reply,
        mark: mark(End::Open),
        status: 0,
        timeout: None,
        tcp_state: Some(TcpState::SynSent),
        traffic_in: None,
        traffic_out: None,
        started_ns: None,
        stopped_ns: None,
        event_ns: None,
    }
}

pub(super) fn udp(id: u32) -> Entry {
    Entry { protocol: Protocol::Udp, tcp_state: None, ..syn(id) }
}

/// The same connection past its handshake.
pub(super) fn established(id: u32, packets: u64) -> Entry {
    Entry {
        status: SEEN_REPLY | ASSURED,
        tcp_state: Some(TcpState::Established),
        traffic_in: traffic(packets),
        traffic_out: traffic(packets),
        ..syn(id)
    }
}

pub(super) fn ended_with(entry: Entry, end: End) -> Entry {
    Entry { mark: mark(end), ..entry }
}

pub(super) fn info() -> RouteInfo {
    RouteInfo {
        name: "web".into(),
        protocol: Protocol::Tcp,
        idle: Some(Duration::from_secs(60)),
        idle_warning: None,
        half_closed: Some(Duration::from_secs(30)),
        lifetime: None,
        kernel_timeouts: true,
        drain_until: None,
    }
}

pub(super) fn table_with(info: RouteInfo) -> FlowTable {
    let mut table = FlowTable::new(layout(), 1000);
    let cuts = table.set_routes(&RouteTable::from([(ROUTE, Arc::new(info))]), at(0));
    assert!(cuts.is_empty());
    dump(&mut table, DumpKind::Full, &[], 0);
    table
}

pub(super) fn table() -> FlowTable {
    table_with(info())
}

/// Dumps come every two seconds.
pub(super) fn dump(table: &mut FlowTable, kind: DumpKind, entries: &[Entry], second: u64) {
    table.begin_dump(kind, at(second + 2).mono, at(second));
    entries.iter().for_each(|entry| table.observe(entry, at(second)));
    table.end_dump(kind, at(second));
}

pub(super) fn ended(table: &mut FlowTable) -> Vec<Ended> {
    let mut ended = Vec::new();
    table.take_ended(&mut ended);
    ended
}

/// The one reason of the one connection that ended.
pub(super) fn reason(table: &mut FlowTable) -> Reason {
    let tally = table.tally(ROUTE).expect("route");
    let counted: u64 = tally.terminated_in_all();
    let ended = ended(table);
    assert_eq!((counted, ended.len()), (1, 1));
    assert_eq!(table.tally(ROUTE).expect("route").terminated(ended[0].reason), 1);
    assert_eq!(table.tally(ROUTE).expect("route").active, 0);
    ended[0].reason
}

fn destroyed_as(last: Entry, second: u64) -> Reason {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    table.apply(&Event::Destroy(last), at(second));
    reason(&mut table)
}

#[test]
fn a_connection_is_counted_when_it_ends_and_logged_when_its_bytes_are_final() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    assert_eq!(table.tally(ROUTE).map(|t| (t.active, t.seen)), Some((1, 1)));
    let mut done = ended_with(established(1, 0), End::FinishedClientFirst);
    (done.traffic_in, done.traffic_out) = (None, None);
    table.apply(&Event::Update(done), at(5));
    let tally = table.tally(ROUTE).expect("route");
    assert_eq!((tally.active, tally.terminated(Reason::FinishedClientFirst)), (0, 1));
    assert!(ended(&mut table).is_empty());
    table.apply(&Event::Destroy(ended_with(established(1, 9), End::FinishedClientFirst)), at(125));
    let lines = ended(&mut table);
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].duration, Duration::from_secs(4));
    assert_eq!(lines[0].at, at(5).wall);
    assert_eq!(lines[0].traffic_out.bytes, 900);
    assert_eq!(table.tally(ROUTE).expect("route").terminated(Reason::FinishedClientFirst), 1);
    assert!(table.is_empty());
}

#[test]
fn a_full_dump_a_second_after_the_end_has_the_final_bytes() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    table.apply(&Event::Update(ended_with(established(1, 0), End::ResetByClient)), at(5));
    let last = ended_with(established(1, 9), End::ResetByClient);
    dump(&mut table, DumpKind::Full, std::slice::from_ref(&last), 5);
    assert!(ended(&mut table).is_empty());
    dump(&mut table, DumpKind::Full, std::slice::from_ref(&last), 6);
    assert_eq!(ended(&mut table).len(), 1);
    table.apply(&Event::Destroy(last), at(20));
    assert!(ended(&mut table).is_empty());
}

#[test]
fn end_bits_tell_the_reason() {
    for (end, wanted) in [
        (End::FinishedClientFirst, Reason::FinishedClientFirst),
        (End::FinishedBackendFirst, Reason::FinishedBackendFirst),
        (End::ResetByClient, Reason::ResetByClient),
        (End::ResetByBackend, Reason::ResetByBackend),
        (End::Cut, Reason::Killed),
    ] {
        assert_eq!(destroyed_as(ended_with(established(1, 5), end), 3), wanted);
    }
}

#[test]
fn a_lone_reset_from_the_backend_is_a_refusal() {
    let refused = Entry { tcp_state: Some(TcpState::Close), traffic_in: traffic(1), traffic_out: traffic(1), ..syn(1) };
    assert_eq!(destroyed_as(refused.clone(), 2), Reason::ConnectRefused);
    assert_eq!(destroyed_as(ended_with(refused, End::ResetByBackend), 2), Reason::ConnectRefused);
}

#[test]
fn a_lone_reset_is_a_refusal_too_where_destroy_tells_no_state() {
    let refused = Entry { tcp_state: None, traffic_in: traffic(1), traffic_out: traffic(1), ..syn(1) };
    assert_eq!(destroyed_as(refused.clone(), 2), Reason::ConnectRefused);
    // Past its handshake, or never answered.
    assert_eq!(destroyed_as(Entry { status: SEEN_REPLY, ..refused.clone() }, 2), Reason::KernelExpired);
    assert_eq!(destroyed_as(Entry { traffic_out: traffic(0), ..refused }, 31), Reason::ConnectTimeout);
}

#[test]
fn a_client_that_resets_before_any_answer_was_not_refused() {
    let gone = Entry { tcp_state: Some(TcpState::Close), traffic_in: traffic(2), traffic_out: traffic(0), ..syn(1) };
    assert_eq!(destroyed_as(gone, 2), Reason::ResetByClient);
}

#[test]
fn a_reset_after_the_handshake_is_no_refusal_even_if_no_dump_saw_it_established() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    let reset = Entry { tcp_state: Some(TcpState::Close), ..ended_with(established(1, 3), End::ResetByBackend) };
    table.apply(&Event::Update(reset), at(1));
    assert_eq!(table.tally(ROUTE).expect("route").terminated(Reason::ResetByBackend), 1);
}

#[test]
fn an_unanswered_syn_that_expires_is_a_connect_timeout() {
    let entry = Entry { traffic_in: traffic(3), traffic_out: traffic(0), ..syn(1) };
    assert_eq!(destroyed_as(entry, 31), Reason::ConnectTimeout);
    let answered = Entry {
        status: SEEN_REPLY,
        tcp_state: Some(TcpState::SynRecv),
        traffic_in: traffic(1),
        traffic_out: traffic(1),
        ..syn(1)
    };
    assert_eq!(destroyed_as(answered, 61), Reason::KernelExpired);
}

#[test]
fn an_established_flow_that_the_kernel_drops_was_idle_or_lost() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 2);
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 60);
    table.apply(&Event::Destroy(established(1, 5)), at(61));
    assert_eq!(reason(&mut table), Reason::IdleTimeout);

    let mut table = self::table();
    table.apply(&Event::New(syn(1)), at(1));
    dump(&mut table, DumpKind::Full, &[established(1, 4)], 56);
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 58);
    table.apply(&Event::Destroy(established(1, 5)), at(61));
    assert_eq!(reason(&mut table), Reason::KernelExpired);
}

#[test]
fn packets_since_the_last_dump_were_not_silence() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 2);
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 50);
    table.apply(&Event::Destroy(established(1, 6)), at(63));
    assert_eq!(reason(&mut table), Reason::KernelExpired);
}

#[test]
fn a_half_closed_flow_ends_by_its_own_limit() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    let half = ended_with(established(1, 5), End::BackendFinished);
    dump(&mut table, DumpKind::Full, std::slice::from_ref(&half), 2);
    let id = FlowId::of(&half);
    assert_eq!(table.get(id).map(|record| record.state), Some(State::HalfClosed { first: Side::Backend }));
    dump(&mut table, DumpKind::Live, std::slice::from_ref(&half), 30);
    table.apply(&Event::Destroy(half), at(32));
    assert_eq!(reason(&mut table), Reason::HalfClosedTimeout);
}

#[test]
fn udp_ends_by_silence() {
    let mut table = table();
    table.apply(&Event::New(udp(1)), at(1));
    assert_eq!(table.records().next().map(|record| record.state), Some(State::Established));
    table.apply(&Event::Destroy(udp(1)), at(31));
    assert_eq!(reason(&mut table), Reason::IdleTimeout);
}

#[test]
fn the_same_tuple_used_again_makes_two_records() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    table.apply(&Event::Update(ended_with(established(1, 0), End::FinishedClientFirst)), at(2));
    table.apply(&Event::Destroy(ended_with(established(1, 9), End::FinishedClientFirst)), at(3));
    table.apply(&Event::New(syn(1)), at(3));
    table.apply(&Event::Destroy(ended_with(established(1, 4), End::ResetByClient)), at(5));
    let lines = ended(&mut table);
    assert_eq!(
        lines.iter().map(|e| (e.reason, e.traffic_in.packets)).collect::<Vec<_>>(),
        [(Reason::FinishedClientFirst, 9), (Reason::ResetByClient, 4)]
    );
    assert_eq!(table.tally(ROUTE).expect("route").seen, 2);
    assert_eq!(table.tally(ROUTE).expect("route").traffic_in.packets, 13);
}

/// A connection under id 1 that began and was reset at these seconds, as the kernel tells it at its end and afterwards.
fn reset_between(began: u64, ended: u64) -> [Entry; 2] {
    let ns = |second| Some(at(second).wall.as_nanos() as u64);
    let over = ended_with(established(1, 4), End::ResetByClient);
    [Entry { event_ns: ns(ended), ..over.clone() }, Entry { started_ns: ns(began), ..over }]
}

#[test]
fn the_next_connection_under_an_id_counts_although_the_last_word_of_the_one_before_was_lost() {
    let ([first_end, first], [second_end, second]) = (reset_between(1, 2), reset_between(3, 4));
    let mut unheard = table();
    unheard.apply(&Event::Update(first_end.clone()), at(2));
    unheard.apply(&Event::Update(second_end.clone()), at(4));
    unheard.apply(&Event::Destroy(second.clone()), at(14));
    assert_eq!(reason_counts(&unheard), (0, 2, 2));

    let mut dumped = table();
    dumped.apply(&Event::Update(first_end.clone()), at(2));
    dumped.apply(&Event::Lost, at(4));
    dump(&mut dumped, DumpKind::Full, std::slice::from_ref(&second), 5);
    dumped.apply(&Event::Destroy(second.clone()), at(14));
    assert_eq!(reason_counts(&dumped), (0, 2, 2));

    let mut heard_late = table();
    heard_late.apply(&Event::Update(first_end), at(2));
    heard_late.begin_dump(DumpKind::Full, at(7).mono, at(5));
    heard_late.observe(&second, at(5));
    heard_late.apply(&Event::Destroy(first), at(5));
    heard_late.apply(&Event::Update(second_end), at(5));
    heard_late.end_dump(DumpKind::Full, at(5));
    heard_late.apply(&Event::Destroy(second), at(14));
    assert_eq!(reason_counts(&heard_late), (0, 2, 2));
    assert!(unheard.is_empty() && dumped.is_empty() && heard_late.is_empty());
}

#[test]
fn a_dump_that_is_faster_than_its_event_counts_nothing_twice() {
    let mut table = table();
    table.begin_dump(DumpKind::Full, at(4).mono, at(2));
    table.observe(&established(1, 3), at(2));
    table.apply(&Event::New(syn(1)), at(2));
    table.end_dump(DumpKind::Full, at(2));
    assert_eq!(table.tally(ROUTE).map(|t| (t.active, t.seen)), Some((1, 1)));
}

#[test]
fn a_connection_over_before_a_dump_found_it_counts_once() {
    let mut table = table();
    table.begin_dump(DumpKind::Full, at(4).mono, at(2));
    table.observe(&ended_with(established(1, 6), End::FinishedClientFirst), at(2));
    table.apply(&Event::New(syn(1)), at(2));
    table.apply(&Event::Update(ended_with(established(1, 6), End::FinishedClientFirst)), at(2));
    table.end_dump(DumpKind::Full, at(2));
    table.apply(&Event::Destroy(ended_with(established(1, 6), End::FinishedClientFirst)), at(3));
    assert_eq!(reason_counts(&table), (0, 1, 1));
}

#[test]
fn an_end_that_the_first_dump_saw_before_its_event_counts_once_and_older_ends_do_not() {
    let mut table = FlowTable::new(layout(), 1000);
    table.set_routes(&RouteTable::from([(ROUTE, Arc::new(info()))]), at(0));
    let over = |id| ended_with(established(id, 4), End::FinishedClientFirst);
    dump(&mut table, DumpKind::Full, &[over(1), over(2)], 1);
    assert_eq!(reason_counts(&table), (0, 0, 0));
    // The first FIN is told before the second; the dump was faster than both.
    table.apply(&Event::Update(ended_with(established(1, 3), End::ClientFinished)), at(1));
    table.apply(&Event::Update(over(1)), at(1));
    table.apply(&Event::Update(over(1)), at(1));
    for id in [1, 2] {
        table.apply(&Event::Destroy(over(id)), at(61));
    }
    assert_eq!(reason_counts(&table), (0, 1, 1));
    assert!(table.is_empty());
}

#[test]
fn a_dump_of_the_next_connection_under_an_id_does_not_end_the_one_before_twice() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    dump(&mut table, DumpKind::Full, &[established(1, 50)], 2);
    table.begin_dump(DumpKind::Full, at(6).mono, at(4));
    table.observe(&Entry { traffic_in: traffic(1), traffic_out: traffic(0), ..syn(1) }, at(4));
    table.apply(&Event::Destroy(ended_with(established(1, 60), End::ResetByClient)), at(4));
    table.apply(&Event::New(syn(1)), at(4));
    table.end_dump(DumpKind::Full, at(4));
    assert_eq!(reason_counts(&table), (1, 1, 2));
}

/// Active, terminated, seen.
fn reason_counts(table: &FlowTable) -> (u64, u64, u64) {
    let tally = table.tally(ROUTE).expect("route");
    (tally.active, tally.terminated_in_all(), tally.seen)
}

#[test]
fn a_dump_heals_lost_events() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    table.apply(&Event::New(syn(2)), at(1));
    table.apply(&Event::Lost, at(2));
    assert!(table.is_stale());
    // A connection whose beginning was lost ends.
    table.apply(&Event::Destroy(ended_with(established(9, 3), End::FinishedClientFirst)), at(2));
    dump(&mut table, DumpKind::Full, &[established(2, 5), established(3, 5)], 3);
    assert!(!table.is_stale());
    assert_eq!(reason_counts(&table), (2, 2, 4));
    let reasons: Vec<Reason> = ended(&mut table).iter().map(|e| e.reason).collect();
    assert_eq!(reasons, [Reason::FinishedClientFirst, Reason::KernelExpired]);
}

#[test]
fn events_lost_while_a_dump_runs_ask_for_another() {
    let mut table = table();
    table.begin_dump(DumpKind::Full, at(4).mono, at(2));
    table.apply(&Event::Lost, at(2));
    table.end_dump(DumpKind::Full, at(2));
    assert!(table.is_stale());
}

#[test]
fn without_loss_one_dump_alone_ends_nothing() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    dump(&mut table, DumpKind::Full, &[], 2);
    assert_eq!(reason_counts(&table), (1, 0, 1));
    dump(&mut table, DumpKind::Live, &[], 3);
    assert_eq!(reason_counts(&table), (1, 0, 1));
    dump(&mut table, DumpKind::Full, &[], 4);
    assert_eq!(reason_counts(&table), (0, 1, 1));
}

#[test]
fn a_late_or_repeated_event_changes_nothing() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    table.apply(&Event::New(syn(1)), at(1));
    table.apply(&Event::Update(ended_with(established(1, 3), End::ResetByClient)), at(2));
    table.apply(&Event::Update(ended_with(established(1, 3), End::FinishedClientFirst)), at(2));
    table.apply(&Event::Destroy(ended_with(established(1, 3), End::ResetByClient)), at(2));
    assert_eq!(reason(&mut table), Reason::ResetByClient);
}

#[test]
fn a_connection_heard_of_only_at_its_end_is_counted_once_with_its_true_age() {
    let mut table = table();
    let began = at(10).wall.as_nanos() as u64;
    let over = ended_with(established(1, 5), End::FinishedClientFirst);
    table.apply(&Event::Update(Entry { traffic_in: None, traffic_out: None, ..over.clone() }), at(13));
    assert_eq!(reason_counts(&table), (0, 1, 1));
    assert_eq!(
        table.tally(ROUTE).expect("route").ages(),
        Some(&AgeHistogram::default()),
        "its beginning is not known yet"
    );
    dump(&mut table, DumpKind::Full, &[Entry { started_ns: Some(began), ..over.clone() }], 15);
    let ended = ended(&mut table);
    assert_eq!((ended[0].duration, ended[0].traffic_in.packets), (Duration::from_secs(3), 5));
    assert_eq!(table.tally(ROUTE).expect("route").ages().map(|ages| ages.sum_seconds), Some(3.0));
    table.apply(&Event::Destroy(Entry { started_ns: Some(began), ..over }), at(70));
    assert_eq!(reason_counts(&table), (0, 1, 1));
}

#[test]
fn a_dial_heard_of_only_when_it_is_refused_is_counted_as_that() {
    let mut table = table();
    let refused = Entry { tcp_state: Some(TcpState::Close), traffic_in: traffic(1), traffic_out: traffic(1), ..syn(1) };
    table.apply(&Event::Destroy(refused), at(1));
    assert_eq!(reason(&mut table), Reason::ConnectRefused);
    assert!(table.is_empty());
}

#[test]
fn flows_of_unknown_routes_and_foreign_marks_are_ignored() {
    let mut table = table();
    let foreign = Entry { mark: layout().route_mark(8).expect("fits"), ..syn(1) };
    table.apply(&Event::New(foreign), at(1));
    table.apply(&Event::New(Entry { mark: 0xff, ..syn(2) }), at(1));
    table.apply(&Event::Lost, at(1));
    table.apply(&Event::Destroy(Entry { mark: 0x7ff, ..syn(3) }), at(1));
    assert!(table.is_empty());
    assert_eq!(reason_counts(&table), (0, 0, 0));
}

#[test]
fn a_full_table_says_so_and_still_counts_the_ends() {
    let mut table = FlowTable::new(layout(), 2);
    table.set_routes(&RouteTable::from([(ROUTE, Arc::new(info()))]), at(0));
    dump(&mut table, DumpKind::Full, &[], 0);
    (1..=3).for_each(|id| table.apply(&Event::New(syn(id)), at(1)));
    assert_eq!((table.len(), table.counts().overflowed, table.untracked()), (2, 1, 1));
    table.apply(&Event::Destroy(ended_with(established(3, 3), End::ResetByClient)), at(2));
    assert_eq!(reason_counts(&table), (2, 1, 3));
    assert_eq!(table.untracked(), 0);
}
