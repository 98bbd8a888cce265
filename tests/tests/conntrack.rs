//! Conntrack as shunt hears it, on the real kernel: a client, a gateway with a hand-written ruleset, a backend.

#[path = "conntrack/lab.rs"]
mod lab;
#[path = "conntrack/tracker.rs"]
mod tracker;

use std::{
    collections::HashSet,
    io::{ErrorKind, Read},
    net::{Shutdown, SocketAddr, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use lab::{ALL, BUFFER, Lab, PATIENCE, TCP_ROUTE, destroyed, dump, echo, events_until, layout, round_trip};
use proxy_core::{
    config::Protocol,
    conntrack::{Entry, Event, TcpState, Traffic},
    flow::{End, EntryKey},
};
use proxy_userspace::kernel::conntrack::{Conntrack, Hear, MarkFilter, NetlinkConntrack};

#[test]
fn a_connection_is_told_from_its_first_packet_to_its_last_byte() {
    let lab = Lab::new();
    for (listen, backend, server) in [
        ("10.77.1.1:80", "10.77.2.2:8080", "10.77.2.2:8080"),
        ("[fd77:1::1]:80", "[fd77:2::2]:8080", "[fd77:2::2]:8080"),
    ] {
        lab.serve(server, echo);
        lab.gateway(BUFFER, |conntrack| {
            let mut stream = lab.connect(listen);
            let client = stream.local_addr().expect("address");
            round_trip(&mut stream, 100_000);
            let seen = events_until(conntrack, |seen| !seen.is_empty());
            let [Event::New(new)] = &seen[..] else { panic!("{seen:?}") };
            assert_eq!((new.client(), new.listen().to_string()), (client, listen.into()));
            assert_eq!((new.backend().to_string(), new.protocol), (backend.into(), Protocol::Tcp));
            assert_eq!((new.mark, layout().route_id(new.mark)), (0x800, Some(TCP_ROUTE)));

            let live = dump(conntrack, ALL);
            assert_eq!(live.len(), 1);
            assert_eq!((live[0].id, live[0].tcp_state), (new.id, Some(TcpState::Established)));
            assert!(live[0].traffic_in.is_some_and(|traffic| traffic.bytes > 100_000));

            stream.shutdown(Shutdown::Write).expect("FIN");
            assert_eq!(stream.read(&mut [0]).expect("end"), 0);
            let seen = events_until(conntrack, |seen| seen.iter().any(|event| matches!(event, Event::Update(_))));
            let Some(Event::Update(update)) = seen.first() else { panic!("{seen:?}") };
            assert_eq!((update.id, layout().end(update.mark)), (new.id, End::FinishedClientFirst));

            let last = settled(conntrack, new.id);
            let seen = events_until(conntrack, |seen| destroyed(seen).is_some());
            let gone = destroyed(&seen).expect("destroy");
            assert_eq!((gone.id, gone.mark), (new.id, update.mark));
            assert!(gone.started_ns.is_some() && gone.started_ns < gone.stopped_ns);
            assert_eq!((gone.traffic_in, gone.traffic_out), last);
            let payload = |traffic: Option<Traffic>, header: u64| {
                traffic.map_or(0, |traffic| traffic.bytes - traffic.packets * header)
            };
            // 12 bytes of TCP timestamps on all but the SYN, which has 8 more.
            let header = if new.is_ipv4() { 20 + 32 } else { 40 + 32 };
            // Selective acknowledgements take some more.
            for traffic in [gone.traffic_in, gone.traffic_out] {
                assert!((100_008..102_000).contains(&payload(traffic, header)), "{traffic:?}");
            }
        });
    }
}

/// The counters of an entry once they have stopped.
fn settled(conntrack: &mut NetlinkConntrack, id: u32) -> (Option<Traffic>, Option<Traffic>) {
    let deadline = Instant::now() + shunt_lab::patiently(PATIENCE);
    let mut last = (None, None);
    loop {
        let entries = dump(conntrack, ALL);
        let entry = entries.iter().find(|entry| entry.id == id).expect("still there");
        let now = (entry.traffic_in, entry.traffic_out);
        if now == last && entry.tcp_state == Some(TcpState::TimeWait) {
            return now;
        }
        assert!(Instant::now() < deadline);
        last = now;
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_refusal_is_a_destroy_with_one_packet_back() {
    let lab = Lab::new();
    lab.gateway(BUFFER, |conntrack| {
        let error = lab.inside("c", || TcpStream::connect("10.77.1.1:81")).expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        let seen = events_until(conntrack, |seen| destroyed(seen).is_some());
        let gone = destroyed(&seen).expect("destroy");
        assert_eq!(gone.traffic_out.map(|traffic| traffic.packets), Some(1));
        assert_eq!(gone.tcp_state, Some(TcpState::Close));
        assert!(matches!(layout().end(gone.mark), End::Open | End::ResetByBackend));
    });
}

#[test]
fn an_entry_is_marked_and_deleted_alone() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    lab.gateway(BUFFER, |conntrack| {
        let streams = [lab.connect("10.77.1.1:80"), lab.connect("10.77.1.1:80")];
        let entries = dump(conntrack, ALL);
        assert_eq!(entries.len(), 2);
        let key = EntryKey::from(&entries[0]);
        let stranger = EntryKey { id: key.id ^ 1, ..key };

        let cut = layout().end_bits(End::Cut);
        assert_eq!(conntrack.set_mark(&[key], cut, layout().end_mask()).expect("set mark"), 1);
        let open = MarkFilter { value: 0, mask: layout().end_mask() };
        let ids = |entries: Vec<Entry>| entries.iter().map(|entry| entry.id).collect::<Vec<_>>();
        assert_eq!(ids(dump(conntrack, open)), [entries[1].id]);
        let marked = dump(conntrack, MarkFilter { value: cut, mask: layout().end_mask() });
        assert_eq!((marked[0].id, marked[0].mark), (key.id, 0x800 | cut));

        assert_eq!(conntrack.set_timeout(&[key], 77).expect("set timeout"), 1);
        let timeout = dump(conntrack, ALL).iter().find(|entry| entry.id == key.id).and_then(|entry| entry.timeout);
        assert!(timeout.is_some_and(|left| (70..=77).contains(&left)), "{timeout:?}");

        assert_eq!(conntrack.delete(&[stranger]).expect("not an error"), 0);
        assert_eq!(conntrack.delete(&[stranger, key]).expect("delete"), 1);
        assert_eq!(ids(dump(conntrack, ALL)), [entries[1].id]);
        assert_eq!(conntrack.delete(&[key]).expect("gone is not an error"), 0);
        let seen = events_until(conntrack, |seen| destroyed(seen).is_some());
        assert_eq!(destroyed(&seen).map(|entry| entry.id), Some(key.id));
        drop(streams);
    });
}

#[test]
fn udp_flows_are_told_in_both_families() {
    let lab = Lab::new();
    lab.serve_udp("10.77.2.2:5353");
    lab.serve_udp("[fd77:2::2]:5353");
    lab.gateway(BUFFER, |conntrack| {
        for (listen, header) in [("10.77.1.1:53", 28), ("[fd77:1::1]:53", 48)] {
            let socket = lab.udp(listen);
            socket.send(b"hello").expect("send");
            assert_eq!(socket.recv(&mut [0; 16]).expect("echo"), 5);
            let seen = events_until(conntrack, |seen| destroyed(seen).is_some());
            let Some(Event::New(new)) = seen.first() else { panic!("{seen:?}") };
            assert_eq!(new.client().port(), socket.local_addr().expect("address").port());
            assert_eq!((new.listen().to_string(), new.protocol), (listen.into(), Protocol::Udp));
            let gone = destroyed(&seen).expect("destroy");
            assert_eq!(gone.traffic_in, Some(Traffic { packets: 1, bytes: 5 + header }));
            assert_eq!(gone.traffic_out, Some(Traffic { packets: 1, bytes: 5 + header }));
        }
    });
}

#[test]
fn flows_of_other_marks_are_not_seen() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    lab.gateway(BUFFER, |conntrack| {
        let foreign = lab.connect("10.77.1.1:9");
        let ours = lab.connect("10.77.1.1:80");
        let seen = events_until(conntrack, |seen| !seen.is_empty());
        let client = ours.local_addr().expect("address");
        assert!(seen.iter().all(|event| matches!(event, Event::New(entry) if entry.client() == client)), "{seen:?}");
        assert_eq!(dump(conntrack, ALL).len(), 1);
        drop(foreign);
    });
}

#[test]
fn what_others_forward_takes_no_room_from_what_is_told() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    // Room for a few events.
    lab.gateway(1, |conntrack| {
        let foreign: Vec<TcpStream> = (0..100).map(|_| lab.connect("10.77.1.1:9")).collect();
        let ours = lab.connect("10.77.1.1:80");
        let seen = events_until(conntrack, |seen| !seen.is_empty());
        let [Event::New(new)] = &seen[..] else { panic!("{seen:?}") };
        assert_eq!(new.client(), ours.local_addr().expect("address"));
        drop(foreign);
    });
}

#[test]
fn lost_events_are_noticed() {
    let lab = Lab::new();
    lab.gateway(1, |conntrack| {
        let sockets: Vec<UdpSocket> = (0..200).map(|_| lab.udp("10.77.1.1:53")).collect();
        sockets.iter().for_each(|socket| assert_eq!(socket.send(b"x").expect("send"), 1));
        let seen = events_until(conntrack, |seen| seen.contains(&Event::Lost));
        assert!(seen.len() < 200, "{}", seen.len());
        let clients: HashSet<SocketAddr> = dump(conntrack, ALL).iter().map(Entry::client).collect();
        assert_eq!(clients.len(), 200);
    });
}

#[test]
fn ends_that_come_while_a_dump_runs_are_not_lost() {
    const FLOWS: u16 = 6000;
    let lab = Lab::new();
    lab.sysctl("netfilter/nf_conntrack_udp_timeout", "100");
    // Room for less than half of them.
    lab.gateway(1 << 20, |conntrack| {
        datagrams(&lab, FLOWS, || assert!(!conntrack.drain(&mut |_| {}).expect("drain").more));
        let mut other = NetlinkConntrack::open(layout().id_mask(), 1, Hear::Ends).expect("conntrack sockets");
        let mut deleted = 0;
        let each = &mut |entry: &Entry| deleted += other.delete(&[EntryKey::from(entry)]).expect("delete");
        conntrack.dump(ALL, each).expect("dump");
        assert_eq!(deleted, usize::from(FLOWS));
        let mut told = HashSet::new();
        let mut each = |event: &Event| match event {
            Event::Destroy(entry) => drop(told.insert(entry.client())),
            other => panic!("{other:?}"),
        };
        conntrack.drain(&mut each).expect("drain");
        assert_eq!(told.len(), deleted);
    });
}

/// One datagram from each of so many ports; `between` is called now and then, before events find no room.
fn datagrams(lab: &Lab, ports: u16, mut between: impl FnMut()) {
    for first in (0..ports).step_by(500) {
        lab.inside("c", || {
            for port in first..first + 500 {
                let socket = UdpSocket::bind(("0.0.0.0", 20_000 + port)).expect("bind");
                socket.send_to(b"x", "10.77.1.1:53").expect("send");
            }
        });
        between();
    }
}

/// Nanoseconds this thread has run.
fn cpu() -> f64 {
    let spent = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("clock");
    Duration::from(spent).as_nanos() as f64
}

/// Prints what events and dumps cost, the kernel's share included; run with optimisation to learn something.
#[test]
#[ignore = "a measurement"]
fn cost_of_events_and_dumps() {
    const FLOWS: u16 = 20_000;
    let lab = Lab::new();
    lab.sysctl("netfilter/nf_conntrack_udp_timeout", "100");
    lab.gateway(BUFFER, |conntrack| {
        let (mut events, mut spent) = (0u32, 0.0);
        // As many at a time as ten milliseconds bring at 60,000 events/s.
        datagrams(&lab, FLOWS, || {
            let started = cpu();
            conntrack.drain(&mut |_| events += 1).expect("drain");
            spent += cpu() - started;
        });
        println!("{:.0} ns per event read ({events} of {FLOWS})", spent / f64::from(events));
        let (mut entries, started) = (0u32, cpu());
        conntrack.dump(ALL, &mut |_| entries += 1).expect("dump");
        println!("{:.0} ns per entry dumped ({entries})", (cpu() - started) / f64::from(entries.max(1)));
        let started = cpu();
        conntrack.dump(MarkFilter { value: 0x300, mask: 0x700 }, &mut |_| {}).expect("dump");
        println!("{:.1} ms per dump that the kernel filters to nothing", (cpu() - started) / 1e6);
        let keys: Vec<EntryKey> = dump(conntrack, ALL).iter().map(EntryKey::from).collect();
        let started = cpu();
        let found = conntrack.set_mark(&keys, 0x300, 0x700).expect("set mark");
        println!("{:.0} ns per mark set ({found})", (cpu() - started) / f64::from(found as u32));
        let started = cpu();
        let found = conntrack.delete(&keys).expect("delete");
        println!("{:.0} ns per delete ({found})", (cpu() - started) / f64::from(found as u32));
    });
}
