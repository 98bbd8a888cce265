use std::{sync::Arc, time::Duration};

use super::{
    table_tests::{ROUTE, at, dump, ended, ended_with, established, info, layout, reason, syn, table, table_with, udp},
    *,
};
use crate::{
    conntrack::{Entry, Event},
    reason::Reason,
};

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
fn a_flow_that_a_dump_finds_with_unacknowledged_data_is_as_old_as_the_kernel_says() {
    let mut table = table();
    let started = Some(at(1).wall.as_nanos() as u64);
    let young = Entry { started_ns: started, timeout: Some(20), ..established(1, 5) };
    dump(&mut table, DumpKind::Full, std::slice::from_ref(&young), 3);
    let record = table.records().next().expect("record");
    assert_eq!((record.start, record.last_activity), (at(1).mono, at(1).mono));
    table.apply(&Event::Destroy(ended_with(young, End::ResetByClient)), at(4));
    let line = &ended(&mut table)[0];
    assert_eq!(line.duration, Duration::from_secs(3));
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
fn a_silence_is_warned_of_once_and_again_when_a_packet_came_in_between() {
    let mut table = table_with(RouteInfo { idle_warning: Some(Duration::from_secs(10)), ..info() });
    table.apply(&Event::New(syn(1)), at(1));
    for (second, packets, warned) in [(2, 5, 0), (11, 5, 0), (12, 5, 1), (14, 5, 0), (16, 6, 0), (25, 6, 0), (26, 6, 1)]
    {
        dump(&mut table, DumpKind::Live, &[established(1, packets)], second);
        assert_eq!(table.take_silent().len(), warned, "second {second}");
    }
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
