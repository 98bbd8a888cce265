//! Conntrack as shunt hears it, on the real kernel: a client, a gateway with a hand-written ruleset, a backend.

use std::{
    collections::HashSet,
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};
use proxy_core::{
    config::{AccessLog as Filter, LogFormat, MarkMask, Protocol},
    conntrack::{Entry, Event, TcpState, Traffic},
    flow::{End, EntryKey, MarkLayout, RouteInfo, RouteTable},
    reason::Reason,
};
use proxy_userspace::{
    access_log::AccessLog,
    control::{ConnectionFilter, FlowCommand, FlowState},
    kernel::conntrack::{Conntrack, MarkFilter, NetlinkConntrack},
    track::{Clock, DropUdp, Input, Options, Tracker},
};
use tokio::sync::{mpsc, oneshot};

const ALL: &[MarkFilter] = &[MarkFilter { value: 0, mask: 0 }];
const TCP_ROUTE: u32 = 1;
const UDP_ROUTE: u32 = 2;
const PATIENCE: Duration = Duration::from_secs(10);
const BUFFER: usize = 32 << 20;

/// What the ruleset of the daemon does with marks and events, by hand.
const RULES: &str = "
table inet t {
  chain pre {
    type nat hook prerouting priority dstnat
    ip daddr 10.77.1.1 tcp dport 80 ct mark set 0x800 ct event set new,destroy dnat ip to 10.77.2.2:8080
    ip daddr 10.77.1.1 tcp dport 81 ct mark set 0x800 ct event set new,destroy dnat ip to 10.77.2.2:8081
    ip daddr 10.77.1.1 tcp dport 82 ct mark set 0x800 ct event set new,destroy dnat ip to 10.77.2.2:8082
    ip daddr 10.77.1.1 udp dport 53 ct mark set 0x1000 ct event set new,destroy dnat ip to 10.77.2.2:5353
    ip daddr 10.77.1.1 tcp dport 9 ct mark set 0xff ct event set new,destroy dnat ip to 10.77.2.2:8080
    ip6 daddr fd77:1::1 tcp dport 80 ct mark set 0x800 ct event set new,destroy dnat ip6 to [fd77:2::2]:8080
    ip6 daddr fd77:1::1 udp dport 53 ct mark set 0x1000 ct event set new,destroy dnat ip6 to [fd77:2::2]:5353
  }
  chain post { type nat hook postrouting priority srcnat; ct mark != 0 masquerade; }
  chain forw {
    type filter hook forward priority filter
    tcp flags & (syn|rst) == 0 ct mark and 0x700 == 0x700 reject with tcp reset
    ip daddr 10.77.2.2 tcp dport 8082 drop
    tcp flags & (fin|rst) == fin jump fin
    tcp flags & rst == rst ct mark and 0x700 <= 0x200 jump rst
  }
  chain fin {
    ct direction original ct mark and 0x700 == 0x000 ct mark set ct mark or 0x100 return
    ct direction reply ct mark and 0x700 == 0x000 ct mark set ct mark or 0x200 return
    ct direction reply ct mark and 0x700 == 0x100 ct mark set ct mark and 0xfffff8ff or 0x300 ct event set new,destroy,protoinfo
    ct direction original ct mark and 0x700 == 0x200 ct mark set ct mark and 0xfffff8ff or 0x400 ct event set new,destroy,protoinfo
  }
  chain rst {
    ct event set new,destroy,protoinfo
    ct direction original ct mark set ct mark and 0xfffff8ff or 0x500
    ct direction reply ct mark set ct mark and 0xfffff8ff or 0x600
  }
}";

fn layout() -> MarkLayout {
    MarkLayout::new(MarkMask::DEFAULT)
}

/// Three namespaces in a row; gone when dropped.
struct Lab {
    name: String,
}

impl Lab {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("t-track-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let lab = Self { name };
        let [client, gateway, backend] = ["c", "g", "b"].map(|role| lab.net(role));
        for net in [&client, &gateway, &backend] {
            run("ip", &["netns", "add", net]);
            run("ip", &["-n", net, "link", "set", "lo", "up"]);
        }
        for (net, side, far, number) in [(&client, "to-gw", "to-c", 1), (&backend, "to-gw", "to-b", 2)] {
            run(
                "ip",
                &["link", "add", "name", side, "netns", net, "type", "veth", "peer", "name", far, "netns", &gateway],
            );
            for (net, link, host) in [(net, side, 2), (&gateway, far, 1)] {
                run("ip", &["-n", net, "addr", "add", &format!("10.77.{number}.{host}/24"), "dev", link]);
                run("ip", &["-n", net, "addr", "add", &format!("fd77:{number}::{host}/64"), "dev", link, "nodad"]);
                run("ip", &["-n", net, "link", "set", link, "up"]);
            }
        }
        for (name, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("netfilter/nf_conntrack_acct", "1"),
            ("netfilter/nf_conntrack_events", "0"),
            ("netfilter/nf_conntrack_tcp_timeout_time_wait", "2"),
            ("netfilter/nf_conntrack_tcp_timeout_close", "2"),
            ("netfilter/nf_conntrack_tcp_timeout_syn_sent", "1"),
            ("netfilter/nf_conntrack_udp_timeout", "2"),
        ] {
            run("ip", &["netns", "exec", &gateway, "sh", "-c", &format!("echo {value} > /proc/sys/net/{name}")]);
        }
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &gateway, "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("nft");
        nft.stdin.take().expect("stdin").write_all(RULES.as_bytes()).expect("nft reads");
        assert!(nft.wait().expect("nft").success());
        lab
    }

    fn net(&self, role: &str) -> String {
        format!("{}{role}", self.name)
    }

    /// Runs on a thread inside a namespace.
    fn inside<R: Send>(&self, role: &str, work: impl FnOnce() -> R + Send) -> R {
        let net = self.net(role);
        thread::scope(|scope| {
            let entered = scope.spawn(move || {
                enter(&net);
                work()
            });
            match entered.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn gateway<R: Send>(&self, buffer: usize, work: impl FnOnce(&mut NetlinkConntrack) -> R + Send) -> R {
        self.inside("g", || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            let _inside = runtime.enter();
            let mut conntrack = NetlinkConntrack::open(layout().id_mask(), buffer).expect("conntrack sockets");
            work(&mut conntrack)
        })
    }

    fn connect(&self, to: &str) -> TcpStream {
        self.inside("c", || TcpStream::connect(to)).expect("connect")
    }

    /// Accepts on `address` for ever; each connection gets `serve` on a thread of its own.
    fn serve(&self, address: &str, serve: fn(TcpStream)) {
        let listener = self.inside("b", || TcpListener::bind(address)).expect("bind");
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || serve(stream));
            }
        });
    }

    fn serve_udp(&self, address: &str) {
        let socket = self.inside("b", || UdpSocket::bind(address)).expect("bind");
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((read, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..read], from);
            }
        });
    }

    fn udp(&self, to: &str) -> UdpSocket {
        let any = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let socket = self.inside("c", || UdpSocket::bind(any)).expect("bind");
        socket.connect(to).expect("connect");
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        socket
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for role in ["c", "g", "b"] {
            let _ = Command::new("ip").args(["netns", "del", &self.net(role)]).status();
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().expect("program starts");
    assert!(status.success(), "{program} {arguments:?}");
}

fn enter(net: &str) {
    let file = File::open(format!("/run/netns/{net}")).expect("namespace");
    setns(file, CloneFlags::CLONE_NEWNET).expect("setns");
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(read) = stream.read(&mut buffer) {
        if read == 0 || stream.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
}

fn round_trip(stream: &mut TcpStream, bytes: usize) {
    let out = vec![7; bytes];
    let mut back = vec![0; bytes];
    let mut writer = stream.try_clone().expect("clone");
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(&out).expect("write"));
        stream.read_exact(&mut back).expect("read");
    });
}

/// Collects events until `enough`; dumps on the way, which is what makes the kernel let expired entries go.
fn events_until(conntrack: &mut NetlinkConntrack, enough: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let mut seen = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while !enough(&seen) {
        assert!(Instant::now() < deadline, "waited in vain; saw {seen:#?}");
        conntrack.dump(ALL, &mut |_| {}).expect("dump");
        conntrack.drain(&mut |event| seen.push(event.clone())).expect("drain");
        thread::sleep(Duration::from_millis(10));
    }
    seen
}

fn dump(conntrack: &mut NetlinkConntrack, filters: &[MarkFilter]) -> Vec<Entry> {
    let mut entries = Vec::new();
    conntrack.dump(filters, &mut |entry| entries.push(entry.clone())).expect("dump");
    entries
}

fn destroyed(events: &[Event]) -> Option<&Entry> {
    events.iter().find_map(|event| match event {
        Event::Destroy(entry) => Some(entry),
        Event::New(_) | Event::Update(_) | Event::Lost => None,
    })
}

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
    let deadline = Instant::now() + PATIENCE;
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
        let open = [MarkFilter { value: 0, mask: layout().end_mask() }];
        let ids = |entries: Vec<Entry>| entries.iter().map(|entry| entry.id).collect::<Vec<_>>();
        assert_eq!(ids(dump(conntrack, &open)), [entries[1].id]);
        let marked = dump(conntrack, &[MarkFilter { value: cut, mask: layout().end_mask() }]);
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

fn route(name: &str, protocol: Protocol) -> Arc<RouteInfo> {
    Arc::new(RouteInfo {
        name: name.into(),
        protocol,
        idle: None,
        half_closed: None,
        lifetime: None,
        kernel_timeouts: true,
        drain_until: None,
    })
}

/// A tracker in the gateway.
struct Running {
    tracker: Option<Tracker>,
    runtime: tokio::runtime::Runtime,
    clock: Clock,
    drained: mpsc::Receiver<u32>,
    log: Page,
}

#[derive(Debug, Clone, Default)]
struct Page(Arc<std::sync::Mutex<Vec<u8>>>);

impl Write for Page {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("page").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Running {
    fn start(lab: &Lab) -> Self {
        let (drained_out, drained) = mpsc::channel(8);
        let (clock, log) = (Clock::start(), Page::default());
        let options = Options {
            layout: layout(),
            interval: Duration::from_millis(200),
            max_flows: 1000,
            clock,
            access_log: AccessLog::new(LogFormat::Text, Filter::All, log.clone()).expect("thread"),
            drained: drained_out,
        };
        let id_mask = layout().id_mask();
        let tracker = lab.inside("g", || Tracker::spawn(options, move || NetlinkConntrack::open(id_mask, BUFFER)));
        let tracker = Some(tracker.expect("tracker"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let running = Self { tracker, runtime, clock, drained, log };
        running.send(Input::Routes(Self::routes()));
        running
    }

    fn routes() -> RouteTable {
        RouteTable::from([(TCP_ROUTE, route("web", Protocol::Tcp)), (UDP_ROUTE, route("dns", Protocol::Udp))])
    }

    fn tracker(&self) -> &Tracker {
        self.tracker.as_ref().expect("running")
    }

    fn send(&self, input: Input) {
        self.runtime.block_on(self.tracker().inputs.send(input)).expect("tracker lives");
    }

    fn connections(&self) -> Vec<proxy_core::view::Connection> {
        let (reply, answer) = oneshot::channel();
        let command = FlowCommand::Connections { filter: ConnectionFilter::default(), reply };
        self.runtime.block_on(async {
            self.tracker().commands.send(command).await.expect("tracker lives");
            answer.await.expect("answer").expect("list")
        })
    }

    fn kill(&self, id: &str) -> Result<proxy_core::view::Killed, proxy_core::view::Failure> {
        let (reply, answer) = oneshot::channel();
        self.runtime.block_on(async {
            self.tracker().commands.send(FlowCommand::Kill { id: id.into(), reply }).await.expect("tracker lives");
            answer.await.expect("answer")
        })
    }

    fn state_until(&self, enough: impl Fn(&FlowState) -> bool) -> Arc<FlowState> {
        let mut state = self.tracker().state.clone();
        let found = self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, state.wait_for(|state| enough(state)))
                .await
                .map(|found| found.map(|s| s.clone()))
        });
        match found {
            Ok(state) => state.expect("tracker lives"),
            Err(_) => panic!("waited in vain: {:#?}", self.tracker().state.borrow()),
        }
    }

    fn terminated(&self, route: &str, reason: Reason, count: u64) -> Arc<FlowState> {
        self.state_until(|state| {
            state.routes.get(route).is_some_and(|route| {
                route.connections_active == 0 && route.terminations.get(&reason).copied() == Some(count)
            })
        })
    }

    /// What was logged, once the tracker has stopped.
    fn stop(mut self) -> String {
        let tracker = self.tracker.take().expect("running");
        self.runtime.block_on(tracker.stop());
        String::from_utf8(self.log.0.lock().expect("page").clone()).expect("UTF-8")
    }
}

#[test]
fn every_kind_of_end_gets_its_reason() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    let running = Running::start(&lab);

    let mut stream = lab.connect("10.77.1.1:80");
    round_trip(&mut stream, 10);
    drop(stream);
    running.terminated("web", Reason::FinishedClientFirst, 1);

    let mut stream = lab.connect("10.77.1.1:80");
    round_trip(&mut stream, 10);
    socket_reset(&stream);
    drop(stream);
    running.terminated("web", Reason::ResetByClient, 1);

    lab.inside("c", || TcpStream::connect("10.77.1.1:81")).expect_err("refused");
    running.terminated("web", Reason::ConnectRefused, 1);

    let swallowed = lab.inside("c", || {
        let address = "10.77.1.1:82".parse().expect("address");
        TcpStream::connect_timeout(&address, Duration::from_millis(500))
    });
    swallowed.expect_err("dropped");
    // A dropped first packet is never confirmed: conntrack, and so shunt, has no connection to tell of.
    let state = running.terminated("web", Reason::ConnectRefused, 1);
    assert_eq!(state.routes["web"].connections_total, 3);
    assert_eq!(running.stop().lines().count(), 3);
}

/// `SO_LINGER` 0: close sends a reset.
fn socket_reset(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger).expect("SO_LINGER");
}

#[test]
fn counters_of_a_long_flow_move_while_it_lives_and_the_log_line_agrees() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    let running = Running::start(&lab);
    let mut stream = lab.connect("10.77.1.1:80");
    for round in 1..=3 {
        round_trip(&mut stream, 50_000);
        let state = running.state_until(|state| state.routes.get("web").is_some_and(|r| r.bytes_out > round * 50_000));
        assert_eq!(state.routes["web"].connections_active, 1);
    }
    let listed = running.connections();
    assert_eq!((listed.len(), listed[0].state.as_str(), listed[0].route.as_str()), (1, "established", "web"));
    assert_eq!(listed[0].client, stream.local_addr().expect("address"));
    drop(stream);
    let ended = running.terminated("web", Reason::FinishedClientFirst, 1);
    assert!(ended.backends["web"].is_empty());
    // The entry is let go after its TIME_WAIT.
    let deadline = Instant::now() + PATIENCE;
    while !running.connections().is_empty() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(50));
    }
    let totals = running.state_until(|state| state.conntrack.dumps > 0).routes["web"].clone();
    let log = running.stop();
    assert_eq!(log.lines().count(), 1, "{log}");
    for part in [
        "reason=finished_client_first".to_owned(),
        format!("bytes_in={} bytes_out={} ", totals.bytes_in, totals.bytes_out),
    ] {
        assert!(log.contains(&part), "{part} in {log}");
    }
}

/// TCP connections of this namespace in the state ESTABLISHED.
fn established() -> usize {
    ["tcp", "tcp6"]
        .iter()
        .map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).expect("procfs"))
        .map(|table| table.lines().filter(|line| line.split_whitespace().nth(3) == Some("01")).count())
        .sum()
}

#[test]
fn a_killed_connection_is_reset_at_both_ends() {
    for (listen, server) in [("10.77.1.1:80", "10.77.2.2:8080"), ("[fd77:1::1]:80", "[fd77:2::2]:8080")] {
        kill_one(listen, server);
    }
}

fn kill_one(listen: &str, server: &str) {
    let lab = Lab::new();
    lab.serve(server, echo);
    let running = Running::start(&lab);
    let mut stream = lab.connect(listen);
    round_trip(&mut stream, 10);
    let id = running.connections()[0].id.clone();
    let killed = running.kill(&id).expect("killed");
    assert_eq!((killed.route.as_str(), killed.client), ("web", stream.local_addr().expect("address")));
    running.kill(&id).expect_err("dead already");
    running.kill("00000000000000zz").expect_err("no id");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    // Neither end has anything to say; and the entry is still there.
    let killed_at = Instant::now();
    let error = stream.read_exact(&mut [0]).expect_err("cut");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    lab.inside("b", || {
        let deadline = Instant::now() + PATIENCE;
        while established() > 0 {
            assert!(Instant::now() < deadline, "the backend was not told");
            thread::sleep(Duration::from_millis(10));
        }
    });
    assert!(killed_at.elapsed() < Duration::from_millis(900), "{:?}", killed_at.elapsed());
    running.terminated("web", Reason::Killed, 1);
    assert!(running.stop().contains("reason=killed"));
}

#[test]
fn udp_flows_of_a_lost_backend_choose_again() {
    let lab = Lab::new();
    lab.serve_udp("10.77.2.2:5353");
    let running = Running::start(&lab);
    let socket = lab.udp("10.77.1.1:53");
    socket.send(b"hello").expect("send");
    socket.recv(&mut [0; 16]).expect("echo");
    let other: IpAddr = "10.77.2.9".parse().expect("address");
    running.send(Input::DropUdp(DropUdp { route: UDP_ROUTE, backends: vec![(other, None)] }));
    assert_eq!(running.connections().iter().filter(|connection| connection.state != "closing").count(), 1);
    let lost: IpAddr = "10.77.2.2".parse().expect("address");
    running.send(Input::DropUdp(DropUdp { route: UDP_ROUTE, backends: vec![(lost, Some(5353))] }));
    running.terminated("dns", Reason::Drained, 1);
    assert!(running.connections().is_empty());
    socket.send(b"again").expect("send");
    socket.recv(&mut [0; 16]).expect("echo");
    running.state_until(|state| state.routes["dns"].connections_total == 2);
}

#[test]
fn a_removed_route_drains_and_is_reported() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    let mut running = Running::start(&lab);
    let mut stream = lab.connect("10.77.1.1:80");
    round_trip(&mut stream, 10);
    running.state_until(|state| state.routes.get("web").is_some_and(|route| route.connections_active == 1));
    let until = running.clock.at(Instant::now() + Duration::from_millis(500));
    let mut routes = Running::routes();
    let draining = RouteInfo { drain_until: Some(until), ..RouteInfo::clone(&routes[&TCP_ROUTE]) };
    routes.insert(TCP_ROUTE, Arc::new(draining));
    running.send(Input::Routes(routes));
    let Running { runtime, drained, .. } = &mut running;
    let told = runtime.block_on(async { tokio::time::timeout(PATIENCE, drained.recv()).await });
    assert_eq!(told.expect("in time"), Some(TCP_ROUTE));
    assert!(running.clock.now().mono >= until);
    running.terminated("web", Reason::Drained, 1);
    running.send(Input::Routes(RouteTable::from([(UDP_ROUTE, route("dns", Protocol::Udp))])));
    running.state_until(|state| !state.routes.contains_key("web"));
}

#[test]
fn a_new_tracker_adopts_the_flows_of_the_one_before() {
    let lab = Lab::new();
    lab.serve("10.77.2.2:8080", echo);
    let first = Running::start(&lab);
    let mut living = lab.connect("10.77.1.1:80");
    let mut ending = lab.connect("10.77.1.1:80");
    round_trip(&mut living, 10);
    round_trip(&mut ending, 10);
    let ids = |running: &Running| running.connections().into_iter().map(|c| c.id).collect::<HashSet<_>>();
    let before = ids(&first);
    assert_eq!(before.len(), 2);
    first.stop();
    drop(ending);
    let second = Running::start(&lab);
    let state = second.state_until(|state| {
        state.routes.get("web").is_some_and(|route| route.terminations.get(&Reason::FinishedClientFirst) == Some(&1))
    });
    assert_eq!(state.routes["web"].connections_active, 1);
    assert!(ids(&second).is_subset(&before));
    round_trip(&mut living, 10);
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
    let longer = "echo 100 > /proc/sys/net/netfilter/nf_conntrack_udp_timeout";
    run("ip", &["netns", "exec", &lab.net("g"), "sh", "-c", longer]);
    lab.gateway(BUFFER, |conntrack| {
        let (mut events, mut spent) = (0u32, 0.0);
        // As many at a time as ten milliseconds bring at 60,000 events/s.
        for first in (0..FLOWS).step_by(500) {
            lab.inside("c", || {
                for port in first..first + 500 {
                    let socket = UdpSocket::bind(("0.0.0.0", 20_000 + port)).expect("bind");
                    socket.send_to(b"x", "10.77.1.1:53").expect("send");
                }
            });
            let started = cpu();
            conntrack.drain(&mut |_| events += 1).expect("drain");
            spent += cpu() - started;
        }
        println!("{:.0} ns per event read ({events} of {FLOWS})", spent / f64::from(events));
        let (mut entries, started) = (0u32, cpu());
        conntrack.dump(ALL, &mut |_| entries += 1).expect("dump");
        println!("{:.0} ns per entry dumped ({entries})", (cpu() - started) / f64::from(entries.max(1)));
        let started = cpu();
        conntrack.dump(&[MarkFilter { value: 0x700, mask: 0x700 }], &mut |_| {}).expect("dump");
        println!("{:.1} ms per dump that the kernel filters to nothing", (cpu() - started) / 1e6);
        let keys: Vec<EntryKey> = dump(conntrack, ALL).iter().map(EntryKey::from).collect();
        let started = cpu();
        let found = conntrack.set_mark(&keys, 0x700, 0x700).expect("set mark");
        println!("{:.0} ns per mark set ({found})", (cpu() - started) / f64::from(found as u32));
        let started = cpu();
        let found = conntrack.delete(&keys).expect("delete");
        println!("{:.0} ns per delete ({found})", (cpu() - started) / f64::from(found as u32));
    });
}
