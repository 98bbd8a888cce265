use std::{sync::Arc, time::Duration};

use super::*;
use crate::{
    config::{MarkMask, Protocol},
    conntrack::{Entry, Event, TcpState, Traffic, Tuple},
    reason::Reason,
};

const ROUTE: u32 = 7;
const SEEN_REPLY: u32 = 1 << 1;
const ASSURED: u32 = 1 << 2;

fn layout() -> MarkLayout {
    MarkLayout::new(MarkMask::DEFAULT)
}

fn at(seconds: u64) -> Now {
    Now { mono: Duration::from_secs(1_000_000 + seconds), wall: Duration::from_secs(1_700_000_000 + seconds) }
}

fn mark(end: End) -> u32 {
    layout().route_mark(ROUTE).expect("fits") | layout().end_bits(end)
}

fn traffic(packets: u64) -> Option<Traffic> {
    Some(Traffic { packets, bytes: packets * 100 })
}

/// A connection whose first packet has passed.
fn syn(id: u32) -> Entry {
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

fn udp(id: u32) -> Entry {
    Entry { protocol: Protocol::Udp, tcp_state: None, ..syn(id) }
}

/// The same connection past its handshake.
fn established(id: u32, packets: u64) -> Entry {
    Entry {
        status: SEEN_REPLY | ASSURED,
        tcp_state: Some(TcpState::Established),
        traffic_in: traffic(packets),
        traffic_out: traffic(packets),
        ..syn(id)
    }
}

fn ended_with(entry: Entry, end: End) -> Entry {
    Entry { mark: mark(end), ..entry }
}

fn info() -> RouteInfo {
    RouteInfo {
        name: "web".into(),
        protocol: Protocol::Tcp,
        idle: Some(Duration::from_secs(60)),
        half_closed: Some(Duration::from_secs(30)),
        lifetime: None,
        kernel_timeouts: true,
        drain_until: None,
    }
}

fn table_with(info: RouteInfo) -> FlowTable {
    let mut table = FlowTable::new(layout(), 1000);
    let cuts = table.set_routes(&RouteTable::from([(ROUTE, Arc::new(info))]), at(0));
    assert!(cuts.is_empty());
    dump(&mut table, DumpKind::Full, &[], 0);
    table
}

fn table() -> FlowTable {
    table_with(info())
}

/// Dumps come every two seconds.
fn dump(table: &mut FlowTable, kind: DumpKind, entries: &[Entry], second: u64) {
    table.begin_dump(kind, at(second + 2).mono, at(second));
    entries.iter().for_each(|entry| table.observe(entry, at(second)));
    table.end_dump(kind, at(second));
}

fn ended(table: &mut FlowTable) -> Vec<Ended> {
    let mut ended = Vec::new();
    table.take_ended(&mut ended);
    ended
}

/// The one reason of the one connection that ended.
fn reason(table: &mut FlowTable) -> Reason {
    let tally = table.tally(ROUTE).expect("route");
    let counted: u64 = tally.terminations.iter().sum();
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
    (tally.active, tally.terminations.iter().sum(), tally.seen)
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
    table.apply(&Event::Destroy(ended_with(established(1, 3), End::ResetByClient)), at(2));
    table.apply(&Event::Update(ended_with(established(1, 3), End::FinishedClientFirst)), at(2));
    table.apply(&Event::Destroy(ended_with(established(1, 3), End::ResetByClient)), at(2));
    assert_eq!(reason(&mut table), Reason::ResetByClient);
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

#[test]
fn an_adopted_flow_has_been_idle_for_as_long_as_its_timeout_ran() {
    let mut table = table();
    let old = Entry { timeout: Some(20), ..established(1, 5) };
    dump(&mut table, DumpKind::Full, std::slice::from_ref(&old), 1);
    let record = table.records().next().expect("record");
    assert_eq!(at(1).mono - record.last_activity, Duration::from_secs(40));
    table.apply(&Event::Destroy(old), at(21));
    assert_eq!(reason(&mut table), Reason::IdleTimeout);
}

#[test]
fn lifetimes_end_flows_on_time_and_hold_no_timer_long_before() {
    let mut table = table_with(RouteInfo { lifetime: Some(Duration::from_secs(10)), ..info() });
    table.apply(&Event::New(syn(1)), at(1));
    assert_eq!(table.next_expiry(), None);
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 10);
    assert_eq!(table.next_expiry(), Some(at(11).mono));
    assert!(table.expire(Now { mono: at(11).mono - Duration::from_nanos(1), ..at(10) }).is_empty());
    assert_eq!(table.expire(at(11)).len(), 1);
    assert_eq!(table.expire(at(12)).len(), 0);
    table.apply(&Event::Destroy(ended_with(established(1, 5), End::Cut)), at(12));
    assert_eq!(reason(&mut table), Reason::LifetimeExceeded);
}

#[test]
fn idle_flows_are_cut_where_the_kernel_has_no_timeout_of_ours() {
    let mut table = table_with(RouteInfo { kernel_timeouts: false, ..info() });
    table.apply(&Event::New(syn(1)), at(1));
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 2);
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 61);
    assert_eq!(table.expire(at(62)).len(), 1);
    assert_eq!(table.tally(ROUTE).expect("route").terminated(Reason::IdleTimeout), 1);
}

#[test]
fn a_byte_just_before_the_limit_starts_the_idle_timer_over() {
    let mut table = table_with(RouteInfo { kernel_timeouts: false, ..info() });
    table.apply(&Event::New(syn(1)), at(1));
    dump(&mut table, DumpKind::Full, &[established(1, 5)], 2);
    dump(&mut table, DumpKind::Full, &[established(1, 6)], 61);
    assert!(table.expire(at(63)).is_empty());
}

#[test]
fn a_draining_route_ends_with_its_last_flow_or_at_its_deadline() {
    let mut table = table();
    (1..=2).for_each(|id| table.apply(&Event::New(syn(id)), at(1)));
    let draining = RouteInfo { drain_until: Some(at(30).mono), ..info() };
    table.set_routes(&RouteTable::from([(ROUTE, Arc::new(draining))]), at(2));
    assert!(table.drained().is_empty());
    table.apply(&Event::Destroy(ended_with(established(1, 5), End::FinishedClientFirst)), at(3));
    assert_eq!(table.next_expiry(), Some(at(30).mono));
    let cut = table.expire(at(30));
    assert_eq!(cut.len(), 1);
    assert_eq!(cut[0].id, 2);
    assert_eq!(table.drained(), [ROUTE]);
    assert_eq!(table.tally(ROUTE).expect("route").terminated(Reason::Drained), 1);
}

#[test]
fn a_route_that_is_gone_takes_its_flows_along() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    let cut = table.set_routes(&RouteTable::new(), at(2));
    assert_eq!(cut.len(), 1);
    let lines = ended(&mut table);
    assert_eq!((lines.len(), lines[0].reason, &*lines[0].route), (1, Reason::Drained, "web"));
    assert!(table.is_empty());
}

#[test]
fn only_udp_flows_of_the_lost_backend_are_dropped() {
    let mut table = table();
    table.apply(&Event::New(udp(1)), at(1));
    table.apply(&Event::New(syn(2)), at(1));
    let mut other = udp(3);
    other.reply.source = "10.0.1.2:8080".parse().expect("address");
    table.apply(&Event::New(other), at(1));
    let backend = "10.0.1.1".parse().expect("address");
    assert!(table.drop_udp(ROUTE, (backend, Some(1)), at(2)).is_empty());
    let cut = table.drop_udp(ROUTE, (backend, None), at(2));
    assert_eq!(cut.iter().map(|key| key.id).collect::<Vec<_>>(), [1]);
}

#[test]
fn active_connections_are_counted_per_backend() {
    let mut table = table();
    (1..=3).for_each(|id| table.apply(&Event::New(syn(id)), at(1)));
    let backend = syn(1).reply.source;
    assert_eq!(table.tally(ROUTE).expect("route").backends.get(&backend), Some(&3));
    (1..=3).for_each(|id| table.apply(&Event::Destroy(established(id, 3)), at(2)));
    assert!(table.tally(ROUTE).expect("route").backends.is_empty());
}

#[test]
fn a_flow_without_counters_is_unmetered() {
    let mut table = table();
    table.apply(&Event::New(syn(1)), at(1));
    let bare = Entry { traffic_in: None, traffic_out: None, ..established(1, 0) };
    dump(&mut table, DumpKind::Full, std::slice::from_ref(&bare), 2);
    assert!(table.records().all(|record| !record.metered));
}

#[test]
fn kernel_timestamps_are_exact() {
    let mut table = table();
    let started = at(1).wall - Duration::from_micros(1500);
    table.apply(&Event::New(Entry { started_ns: Some(started.as_nanos() as u64), ..syn(1) }), at(1));
    let stopped = started + Duration::from_micros(700);
    let last = Entry {
        started_ns: Some(started.as_nanos() as u64),
        stopped_ns: Some(stopped.as_nanos() as u64),
        ..ended_with(established(1, 5), End::ResetByClient)
    };
    table.apply(&Event::Destroy(last), at(1));
    let line = &ended(&mut table)[0];
    assert_eq!((line.duration, line.at), (Duration::from_micros(700), stopped));
}

/// Nanoseconds this thread has run.
fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("number")
}

/// Prints what one event and one entry of a dump cost; run with optimisation to learn something.
#[test]
#[ignore = "a measurement"]
fn cost_of_events_and_dumps() {
    const FLOWS: u32 = 200_000;
    let mut table = FlowTable::new(layout(), 262_144);
    table.set_routes(&RouteTable::from([(ROUTE, Arc::new(info()))]), at(0));
    dump(&mut table, DumpKind::Full, &[], 0);
    // Ids are a keyed hash.
    let id = |n: u32| n.wrapping_mul(0x9e37_79b9);
    let events: Vec<[Event; 3]> = (1..=FLOWS)
        .map(|n| {
            let update = ended_with(established(id(n), 0), End::FinishedClientFirst);
            let last = ended_with(established(id(n), 5), End::FinishedClientFirst);
            [Event::New(syn(id(n))), Event::Update(update), Event::Destroy(last)]
        })
        .collect();
    let mut lines = Vec::new();
    let per = |name: &str, count: u32, work: &mut dyn FnMut()| {
        let started = cpu();
        work();
        println!("{:.0} ns per {name}", (cpu() - started) / f64::from(count));
    };
    per("event, few flows", FLOWS * 3, &mut || {
        for (n, three) in events.iter().enumerate() {
            three.iter().for_each(|event| table.apply(event, at(1)));
            if n % 1000 == 0 {
                table.take_ended(&mut lines);
                lines.clear();
            }
        }
    });
    per("first New, many flows", FLOWS, &mut || events.iter().for_each(|[new, ..]| table.apply(new, at(1))));
    let entries: Vec<Entry> = (1..=FLOWS).map(|n| established(id(n), 3)).collect();
    per("entry of a dump", FLOWS, &mut || dump(&mut table, DumpKind::Full, &entries, 2));
    // As in the middle of a long run: the oldest goes, the next comes.
    per("event, many flows", FLOWS * 3, &mut || {
        for (n, [new, update, last]) in events.iter().enumerate() {
            table.apply(update, at(3));
            table.apply(last, at(3));
            table.apply(new, at(3));
            if n % 1000 == 0 {
                table.take_ended(&mut lines);
                lines.clear();
            }
        }
    });
}
