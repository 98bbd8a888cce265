//! Routes, neighbours and interfaces that change under connections that have no socket any more.

use std::{
    net::{SocketAddrV6, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_userspace::{
    handoff::folder,
    kernel::bpf::handoff::{HandoffTable, Sizes},
};
use shunt_lab::{
    BACKEND_SIDE, BACKEND_SIDE6, GATEWAY6, Lab, Shunt,
    cable::{Carry, Ends, Way},
    dialog::{echo, exchange},
    frame::Segment,
    kernel, link,
    pattern::{self, Pattern},
    relay::{Relay, handed_over},
    scripted::{Behaviour, Start, TcpServer},
    wait_for, wait_until, wire,
};

const SOON: Duration = Duration::from_secs(20);
const TO: Relay = Relay::Handoff;

/// A connection that was handed over, and whose packets are watched for ends.
struct Stage {
    lab: Lab,
    _server: TcpServer,
    shunt: Shunt,
    table: HandoffTable,
}

impl Stage {
    fn new(lab: Lab, behaviour: Behaviour) -> Result<Self> {
        let server = TcpServer::start(lab.backend(1), TO.backend_port(), behaviour)?;
        // What the daemon takes over is looked into.
        let (socket, sizes) = (lab.dir().join("shunt.sock"), Sizes { flows: 64, events: 4096 });
        let table = lab.gateway().run(|| HandoffTable::open(&folder(&socket), sizes))?;
        let shunt = Shunt::start(&lab, &TO.route_to(&[lab.backend(1).ip], ""))?;
        for host in [lab.client(), lab.backend(1)] {
            wire::watch_ends(host)?;
        }
        Ok(Self { lab, _server: server, shunt, table })
    }

    fn echoing() -> Result<(Self, TcpStream)> {
        let stage = Self::new(Lab::builder().backends(1).build()?, Behaviour::Echo)?;
        let stream = TO.connect(&stage.lab, &stage.shunt)?;
        Ok((stage, stream))
    }

    /// Much goes there and back; no FIN or RST was seen.
    fn goes_on(&self, stream: &mut TcpStream, what: &str) -> Result<()> {
        let mut piece = vec![0; 30_000];
        Pattern::new(3).fill(&mut piece);
        for _ in 0..3 {
            echo(stream, &piece).with_context(|| what.to_owned())?;
        }
        for host in [self.lab.client(), self.lab.backend(1)] {
            let seen = wire::ends_seen(host)?;
            ensure!(seen == (0, 0), "{what}: FIN and RST at {}: {seen:?}", host.name());
        }
        Ok(())
    }

    fn outcome(&self, name: &str) -> Result<u64> {
        let all = self.table.outcomes()?;
        all.into_iter().find(|(other, _)| *other == name).map(|(_, n)| n).context("an outcome")
    }

    /// Whether the program is on that interface of the gateway.
    fn is_on(&self, device: &str) -> bool {
        let number = self.lab.gateway().run(|| nix::net::if_::if_nametoindex(device));
        number.is_ok_and(|number| self.table.attached().contains(&number))
    }
}

#[test]
fn a_next_hop_that_is_forgotten_or_has_another_address_is_found_again() -> Result<()> {
    let (stage, mut stream) = Stage::echoing()?;
    let (gateway, backend) = (stage.lab.gateway(), stage.lab.backend(1));
    gateway.sh("ip neighbour flush all")?;
    stage.goes_on(&mut stream, "without a neighbour")?;
    ensure!(stage.outcome("neighbour")? > 0, "nobody asked");
    // As whoever takes an address over does.
    backend.set_sysctl("net.ipv4.conf.eth0.arp_notify", "1")?;
    backend.sh("ip link set eth0 address 02:00:00:00:00:77")?;
    stage.goes_on(&mut stream, "the backend's address is another")?;
    for device in ["clients", "backend1"] {
        gateway.set_sysctl(&format!("net.ipv4.conf.{device}.arp_notify"), "1")?;
    }
    gateway.sh("ip link set clients address 02:00:00:00:00:88; ip link set backend1 address 02:00:00:00:00:99")?;
    stage.goes_on(&mut stream, "the gateway's addresses are others")
}

#[test]
fn a_next_hop_that_is_another_without_a_word_is_noticed_as_for_forwarded_packets() -> Result<()> {
    const LISTEN6: SocketAddrV6 = SocketAddrV6::new(GATEWAY6, 8100, 0, 0);
    let (stage, stream) = Stage::echoing()?;
    let (gateway, backend) = (stage.lab.gateway(), stage.lab.backend(1));
    let six = format!(
        "[[route]]\nname = \"six\"\nlisten = [\"{LISTEN6}\"]\nengine = \"handoff\"\nbackends = [\"[{}]:{}\"]\n",
        backend.ip6,
        TO.backend_port()
    );
    stage.shunt.reload(&format!("{}{six}", TO.route_to(&[backend.ip], "")))?;
    let mut stream6 = stage.lab.client().connect(LISTEN6)?;
    echo(&mut stream6, b"hello")?;
    handed_over(&stage.shunt, &stream6)?;
    let mut ends = [
        ("ipv4", backend.ip.to_string(), BACKEND_SIDE.to_string(), stream),
        ("ipv6", backend.ip6.to_string(), BACKEND_SIDE6.to_string(), stream6),
    ];
    for (family, there, here, stream) in &mut ends {
        // Five seconds, then three probes of a second each, are long for a test.
        gateway.set_sysctl(&format!("net.{family}.neigh.backend1.delay_first_probe_time"), "1")?;
        gateway.set_sysctl(&format!("net.{family}.neigh.backend1.retrans_time_ms"), "200")?;
        // The backend knows the gateway, and has no reason to ask; the gateway knows what was right long ago.
        let address = gateway.sh("ip -o link show backend1 | sed 's/.*link.ether \\([0-9a-f:]*\\) .*/\\1/'")?;
        backend.sh(&format!("ip neighbour replace {here} dev eth0 nud permanent lladdr {}", address.trim()))?;
        gateway.sh(&format!("ip neighbour replace {there} lladdr 02:00:00:00:00:66 dev backend1 nud stale"))?;
        stage.goes_on(stream, family)?;
        let now = gateway.sh(&format!("ip neighbour show {there}"))?;
        ensure!(!now.contains("00:00:66"), "{now}");
    }
    Ok(())
}

#[test]
fn a_route_through_a_new_interface_is_followed_in_the_middle_of_a_transfer() -> Result<()> {
    const BYTES: u64 = 24 << 20;
    let behaviour = Behaviour::Exchange { seed: 6, bytes: BYTES, start: Start::AtOnce };
    let stage = Stage::new(Lab::builder().backends(1).build()?, behaviour)?;
    let (gateway, backend) = (stage.lab.gateway(), stage.lab.backend(1));
    gateway.set_sysctl("net.ipv4.conf.all.rp_filter", "1")?;
    let stream = stage.lab.client().connect(TO.listen())?;
    thread::scope(|scope| -> Result<()> {
        let transfer = scope.spawn(|| exchange(&stream, 5, BYTES));
        let is_handed_over = || {
            let labels = [("route", TO.route()), ("result", "done")];
            stage.shunt.metrics().is_ok_and(|page| page.value("shunt_handovers_total", &labels) == 1.0)
        };
        wait_until("it is handed over", SOON, is_handed_over)?;
        for nth in 0..3 {
            let (here, there) = (format!("more{nth}"), format!("eth{}", nth + 1));
            gateway.sh(&format!("ip link add {here} type veth peer name {there} netns {}", backend.name()))?;
            wait_until("the program is on it", SOON, || stage.is_on(&here))?;
            backend.sh(&format!("ip link set {there} up"))?;
            gateway.sh(&format!("ip link set {here} up && ip address add 10.88.2.1/32 dev {here}"))?;
            // One way first, so that for a moment each direction has its own.
            gateway.sh(&format!("ip route replace {}/32 dev {here} src 10.88.2.1", backend.ip))?;
            backend.sh(&format!("ip route replace 10.88.2.1/32 dev {there}"))?;
        }
        let (sent, received) = transfer.join().expect("a transfer")?;
        ensure!(received == pattern::send(&mut std::io::sink(), 6, BYTES)?, "backend → client: {received:?}");
        ensure!(stage._server.wait_records(1, SOON)?[0].received == sent, "client → backend");
        Ok(())
    })?;
    for host in [stage.lab.client(), backend] {
        // A FIN may be sent again.
        ensure!(wire::ends_seen(host)?.1 == 0, "FIN and RST at {}: {:?}", host.name(), wire::ends_seen(host)?);
    }
    stage.shunt.wait_route(TO.route(), "each byte counted once", SOON, |route| {
        (route["bytes_in"] == BYTES && route["bytes_out"] == BYTES).then_some(())
    })
}

#[test]
fn an_interface_that_goes_down_and_comes_back_is_as_before() -> Result<()> {
    let (stage, mut stream) = Stage::echoing()?;
    let (gateway, backend) = (stage.lab.gateway(), stage.lab.backend(1));
    for _ in 0..3 {
        // Its routes go with it.
        link::set_up(gateway, "backend1", false)?;
        wait_until("no way leads there", SOON, || gateway.sh(&format!("ip route get {}", backend.ip)).is_err())?;
        let way = format!("ip route add {}/32 dev backend1 src 10.88.2.1", backend.ip);
        gateway.sh(&format!("ip link set backend1 up && {way}"))?;
        stage.goes_on(&mut stream, "down and up")?;
    }
    // And one that is another with the same number.
    let number =
        gateway.sh("cat /sys/class/net/backend1/ifindex 2>/dev/null || ip -o link show backend1 | cut -d: -f1")?;
    gateway.sh("ip link delete backend1")?;
    wait_until("the program has gone with it", SOON, || {
        !stage.table.attached().contains(&number.trim().parse().unwrap_or(0))
    })?;
    gateway.sh(&format!(
        "ip link add backend1 index {} type veth peer name eth0 netns {}",
        number.trim(),
        backend.name()
    ))?;
    wait_until("the program is on it", SOON, || stage.is_on("backend1"))?;
    backend.sh(&format!(
        "ip address add {}/32 dev eth0 && ip link set eth0 up && ip route add 10.88.2.1/32 dev eth0 && ip route replace default via 10.88.2.1",
        backend.ip
    ))?;
    gateway.sh(&format!(
        "ip address add 10.88.2.1/32 dev backend1 && ip link set backend1 up && ip route add {}/32 dev backend1 src 10.88.2.1",
        backend.ip
    ))?;
    stage.goes_on(&mut stream, "another with its number")
}

/// A router behind the gateway that takes small packets only, and says so.
struct Narrow {
    most: usize,
    refused: Arc<AtomicU64>,
}

impl Carry for Narrow {
    fn take(&mut self, way: Way, frame: Vec<u8>, ends: &Ends) {
        const ETHERNET: usize = 14;
        if way == Way::ToGateway || frame.len() - ETHERNET <= self.most || Segment::of(&frame).is_none() {
            return ends.put(way, &frame);
        }
        self.refused.fetch_add(1, Relaxed);
        ends.put(Way::ToGateway, &too_big(&frame, self.most as u16));
    }
}

/// RFC 1191 §4, from a router that nobody knows.
fn too_big(frame: &[u8], mtu: u16) -> Vec<u8> {
    let mut error = [&frame[6..12], &frame[..6], &[0x08, 0x00]].concat();
    let mut ip = vec![0x45, 0, 0, 56, 0, 0, 0, 0, 64, 1, 0, 0, 192, 0, 2, 1];
    ip.extend_from_slice(&frame[26..30]);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    let mut icmp = vec![3, 4, 0, 0, 0, 0];
    icmp.extend(mtu.to_be_bytes());
    icmp.extend_from_slice(&frame[14..42]);
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    error.extend(ip);
    error.extend(icmp);
    error
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[test]
fn a_path_that_becomes_narrow_tells_the_end_whose_packets_do_not_fit() -> Result<()> {
    let stage = Stage::new(Lab::builder().backends(1).cabled().build()?, Behaviour::Echo)?;
    let mut stream = TO.connect(&stage.lab, &stage.shunt)?;
    let refused = [0, 1].map(|number| {
        let refused = Arc::new(AtomicU64::new(0));
        stage.lab.cable(number).carry(Narrow { most: 1300, refused: Arc::clone(&refused) });
        refused
    });
    // What a socket of the gateway's own has been told of the path is no reason to drop what others send without a word.
    let (gateway, backend) = (stage.lab.gateway(), stage.lab.backend(1).ip);
    let mut own = gateway.connect((backend, TO.backend_port()))?;
    echo(&mut own, &[7; 30_000])?;
    let way = || gateway.sh(&format!("ip route get {backend}"));
    wait_until("the gateway knows of it", SOON, || way().is_ok_and(|way| way.contains("mtu 1300")))?;
    stage.goes_on(&mut stream, "through 1300 bytes")?;
    let [to_client, to_backend] = refused.map(|refused| refused.load(Relaxed));
    ensure!(to_client > 0 && to_backend > 0, "not narrow: {to_client} and {to_backend} were refused");
    let told = stage.outcome("icmp_translated")?;
    ensure!(told >= 2, "{told} were told of {to_client} and {to_backend}");
    ensure!(stage.outcome("too_big")? == 0);
    Ok(())
}

#[test]
fn an_unreachable_host_is_told_of_and_survived() -> Result<()> {
    let (stage, mut stream) = Stage::echoing()?;
    let backend = stage.lab.backend(1);
    let reject = |kind: &str| {
        format!(
            "table ip unreachable {{ chain in {{ type filter hook input priority 0; tcp dport {} reject with icmp type {kind}; }}; }}",
            TO.backend_port()
        )
    };
    kernel::nft_load(backend, stage.lab.dir(), &reject("host-unreachable"))?;
    let heard = || wire::stack_counter(stage.lab.client(), "IcmpInDestUnreachs");
    let client = stream.try_clone()?;
    std::io::Write::write_all(&mut &client, b"is anybody there?")?;
    wait_until("the client has heard it", SOON, || heard().is_ok_and(|n| n > 0))?;
    ensure!(stage.outcome("icmp_translated")? > 0);
    backend.sh("nft delete table ip unreachable")?;
    let mut back = [0; 17];
    stream.set_read_timeout(Some(SOON))?;
    std::io::Read::read_exact(&mut stream, &mut back)?;
    ensure!(&back == b"is anybody there?");
    stage.goes_on(&mut stream, "reachable again")?;
    wait_for("it is one connection still", SOON, || {
        (stage.shunt.route(TO.route()).ok()?["connections_active"] == 1).then_some(())
    })
}
