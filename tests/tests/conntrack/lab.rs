//! Three namespaces in a row, and a hand-written ruleset in the middle one.

use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};
use proxy_core::{
    config::MarkMask,
    conntrack::{Entry, Event},
    flow::MarkLayout,
};
use proxy_userspace::kernel::conntrack::{Conntrack, Hear, MarkFilter, NetlinkConntrack};

pub const ALL: MarkFilter = MarkFilter { value: 0, mask: 0 };
pub const TCP_ROUTE: u32 = 1;
pub const UDP_ROUTE: u32 = 2;
pub const PATIENCE: Duration = Duration::from_secs(10);
pub const BUFFER: usize = 32 << 20;

/// What the ruleset of the daemon does with marks and events, by hand. Event mask 0x85 is new, destroy and mark: the end
/// is told by the very packet that sets it, and nothing after it is (`protoinfo` would tell TIME_WAIT as well). nft 1.0.6
/// cannot spell `mark` here.
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
    tcp flags & (syn|rst) == 0 ct mark and 0x700 == 0x300 reject with tcp reset
    tcp flags & (fin|rst) == fin jump fin
    tcp flags & rst == rst ct mark and 0x700 <= 0x200 jump rst
  }
  chain fin {
    ct direction original ct mark and 0x700 == 0x000 ct mark set ct mark or 0x100 return
    ct direction reply ct mark and 0x700 == 0x000 ct mark set ct mark or 0x200 return
    ct direction reply ct mark and 0x700 == 0x100 ct event set 0x85 ct mark set ct mark and 0xfffff8ff or 0x400
    ct direction original ct mark and 0x700 == 0x200 ct event set 0x85 ct mark set ct mark and 0xfffff8ff or 0x500
  }
  chain rst {
    ct event set 0x85
    ct direction original ct mark set ct mark and 0xfffff8ff or 0x600
    ct direction reply ct mark set ct mark and 0xfffff8ff or 0x700
  }
}";

pub fn layout() -> MarkLayout {
    MarkLayout::new(MarkMask::DEFAULT)
}

/// Three namespaces in a row; gone when dropped.
pub struct Lab {
    name: String,
}

impl Lab {
    pub fn new() -> Self {
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
            ("netfilter/nf_conntrack_timestamp", "1"),
            ("netfilter/nf_conntrack_tcp_timeout_time_wait", "2"),
            ("netfilter/nf_conntrack_tcp_timeout_close", "2"),
            ("netfilter/nf_conntrack_tcp_timeout_syn_sent", "1"),
            ("netfilter/nf_conntrack_udp_timeout", "2"),
        ] {
            lab.sysctl(name, value);
        }
        lab.nft("g", RULES);
        lab.nft("b", "table inet t { chain in { type filter hook input priority filter; tcp dport 8082 drop; }; }");
        lab
    }

    fn net(&self, role: &str) -> String {
        format!("{}{role}", self.name)
    }

    fn nft(&self, role: &str, script: &str) {
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &self.net(role), "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("nft");
        nft.stdin.take().expect("stdin").write_all(script.as_bytes()).expect("nft reads");
        assert!(nft.wait().expect("nft").success());
    }

    /// Of the gateway; `name` is a path below `/proc/sys/net`.
    pub fn sysctl(&self, name: &str, value: &str) {
        let script = format!("echo {value} > /proc/sys/net/{name}");
        run("ip", &["netns", "exec", &self.net("g"), "sh", "-c", &script]);
    }

    /// Runs on a thread inside a namespace.
    pub fn inside<R: Send>(&self, role: &str, work: impl FnOnce() -> R + Send) -> R {
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

    pub fn gateway<R: Send>(&self, buffer: usize, work: impl FnOnce(&mut NetlinkConntrack) -> R + Send) -> R {
        self.inside("g", || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            let _inside = runtime.enter();
            let mut conntrack =
                NetlinkConntrack::open(layout().id_mask(), buffer, Hear::BeginningsAndEnds).expect("conntrack sockets");
            work(&mut conntrack)
        })
    }

    pub fn connect(&self, to: &str) -> TcpStream {
        self.inside("c", || TcpStream::connect(to)).expect("connect")
    }

    /// Accepts on `address` for ever; each connection gets `serve` on a thread of its own.
    pub fn serve(&self, address: &str, serve: fn(TcpStream)) {
        let listener = self.inside("b", || TcpListener::bind(address)).expect("bind");
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || serve(stream));
            }
        });
    }

    pub fn serve_udp(&self, address: &str) {
        let socket = self.inside("b", || UdpSocket::bind(address)).expect("bind");
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((read, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..read], from);
            }
        });
    }

    pub fn udp(&self, to: &str) -> UdpSocket {
        let any = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let socket = self.inside("c", || UdpSocket::bind(any)).expect("bind");
        socket.connect(to).expect("connect");
        socket.set_read_timeout(Some(shunt_lab::patiently(PATIENCE))).expect("timeout");
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

pub fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(read) = stream.read(&mut buffer) {
        if read == 0 || stream.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
}

pub fn round_trip(stream: &mut TcpStream, bytes: usize) {
    let out = vec![7; bytes];
    let mut back = vec![0; bytes];
    let mut writer = stream.try_clone().expect("clone");
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(&out).expect("write"));
        stream.read_exact(&mut back).expect("read");
    });
}

/// Collects events until `enough`; dumps on the way, which is what makes the kernel let expired entries go.
pub fn events_until(conntrack: &mut NetlinkConntrack, enough: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let mut seen = Vec::new();
    let deadline = Instant::now() + shunt_lab::patiently(PATIENCE);
    while !enough(&seen) {
        assert!(Instant::now() < deadline, "waited in vain; saw {seen:#?}");
        conntrack.dump(ALL, &mut |_| {}).expect("dump");
        conntrack.drain(&mut |event| seen.push(event.clone())).expect("drain");
        thread::sleep(Duration::from_millis(10));
    }
    seen
}

pub fn dump(conntrack: &mut NetlinkConntrack, filter: MarkFilter) -> Vec<Entry> {
    let mut entries = Vec::new();
    conntrack.dump(filter, &mut |entry| entries.push(entry.clone())).expect("dump");
    entries
}

pub fn destroyed(events: &[Event]) -> Option<&Entry> {
    events.iter().find_map(|event| match event {
        Event::Destroy(entry) => Some(entry),
        Event::New(_) | Event::Update(_) | Event::Lost => None,
    })
}
