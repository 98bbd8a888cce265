//! Many connections at once that are handed over: what each costs, and that the next daemon takes all of them over.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    dialog::{echo, vanish},
    kernel, load,
    relay::Relay,
    scripted::{Behaviour, TcpServer},
    wait_for,
};

const TO: Relay = Relay::Handoff;
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 88, 2, 2);
/// Under load, with a daemon that is not optimized.
const LONG: Duration = Duration::from_secs(300);
const CLIENT_ADDRESSES: u8 = 20;
/// Below those that the kernel gives out.
const FIRST_PORT: u16 = 10_000;

/// So many have sockets at once; of those before, neither end is there any more, and nobody has noticed.
const WAVE: usize = 4_000;

/// Connections through one route, all of them handed over.
struct Crowd {
    _lab: Lab,
    shunt: Shunt,
    /// All but one.
    count: usize,
    /// On a route of its own, and its other end echoes.
    echoing: TcpStream,
    /// Kept: what the last wave talks to.
    _servers: Vec<TcpServer>,
    _last_wave: Vec<TcpStream>,
}

/// What the daemon and its maps have in memory.
#[derive(Clone, Copy)]
struct Memory {
    daemon: u64,
    maps: u64,
}

impl Memory {
    fn of(shunt: &Shunt) -> Result<Self> {
        let pid = shunt.pid()?;
        let mut maps = 0;
        for file in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            let text = std::fs::read_to_string(file?.path()).unwrap_or_default();
            let memory = text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse::<u64>().ok());
            maps += memory.filter(|_| text.contains("map_type")).unwrap_or(0);
        }
        Ok(Self { daemon: kernel::resident_bytes(pid)?, maps })
    }
}

impl Crowd {
    fn gather(count: usize) -> Result<Self> {
        load::allow_descriptors(WAVE as u64 * 2 + 1_000)?;
        let lab = Lab::builder().client_addresses(CLIENT_ADDRESSES).build()?;
        // Source ports towards one address and port of a backend are some 20,000.
        let ports: Vec<u16> = (0..8).map(|n| 9_100 + n).collect();
        let mut servers: Vec<TcpServer> =
            ports.iter().map(|port| TcpServer::start(lab.backend(1), *port, Behaviour::Hold)).collect::<Result<_>>()?;
        servers.push(TcpServer::start(lab.backend(1), 9_099, Behaviour::Echo)?);
        let backends: Vec<String> = ports.iter().map(|port| format!("{BACKEND}:{port}")).collect();
        let (listen, beside) = (TO.listen(), SocketAddr::new(TO.listen().ip(), 7_099));
        let route = |name: &str, listen: SocketAddr, backends: &[String]| {
            format!(
                "[[route]]\nname = {name:?}\nlisten = [\"{listen}\"]\nengine = \"handoff\"\nbackends = {backends:?}\n"
            )
        };
        let config = [route("handoff", listen, &backends), route("echo", beside, &[format!("{BACKEND}:9099")])];
        let shunt = Shunt::start(&lab, &config.concat())?;
        let (before, began) = (Memory::of(&shunt)?, Instant::now());
        let mut echoing = lab.client().connect(beside)?;
        echo(&mut echoing, b"hello")?;
        let mut wave = Vec::with_capacity(WAVE);
        for n in 0..count {
            // Each port once: one that is used again asks whether the connection before is still there.
            let from = lab.client_addresses()[n % usize::from(CLIENT_ADDRESSES)];
            let port = FIRST_PORT + (n / usize::from(CLIENT_ADDRESSES)) as u16;
            wave.push(lab.client().connect_from((from, port), listen).with_context(|| format!("connection {n}"))?);
            if wave.len() == WAVE && n + 1 < count {
                wait_handed_over(&shunt, n + 2)?;
                wave.drain(..).try_for_each(vanish)?;
                servers.iter().take(ports.len()).try_for_each(|server| server.vanish_all().map(drop))?;
            }
        }
        wait_handed_over(&shunt, count + 1)?;
        let (took, after) = (began.elapsed(), Memory::of(&shunt)?);
        let each = |before: u64, after: u64| after.saturating_sub(before) / count as u64;
        println!(
            "{count} handed over in {took:?}; each: {} bytes in the daemon, {} bytes of maps that grow; sockets on the gateway: {}",
            each(before.daemon, after.daemon),
            each(before.maps, after.maps),
            kernel::tcp_sockets(lab.gateway(), &["established"])?,
        );
        Ok(Self { _lab: lab, shunt, count, echoing, _servers: servers, _last_wave: wave })
    }

    fn all(&self) -> usize {
        self.count + 1
    }

    /// Each is shown once; their ids.
    fn all_are_shown(&self) -> Result<HashSet<String>> {
        let (asked, before) = (Instant::now(), kernel::cpu_seconds(self.shunt.pid()?)?);
        let shown = self.shunt.cli_json(&["connections", "--limit", "0"])?;
        let (took, used) = (asked.elapsed(), kernel::cpu_seconds(self.shunt.pid()?)? - before);
        let shown = shown.as_array().context("a list of connections")?;
        ensure!(shown.len() == self.all(), "{} of {} are shown", shown.len(), self.all());
        ensure!(shown.iter().all(|one| one["engine"] == "handoff"), "one is not handed over");
        let ids: HashSet<String> = shown.iter().map(|one| one["id"].to_string()).collect();
        ensure!(ids.len() == self.all(), "{} ids", ids.len());
        println!("connections --json: {took:?}, {used:.2} s of them the daemon's processor time");
        Ok(ids)
    }

    fn all_are_counted(&self) -> Result<()> {
        let asked = Instant::now();
        let page = self.shunt.metrics()?;
        println!("a scrape: {:?}", asked.elapsed());
        let asked = Instant::now();
        self.shunt.cli_json(&["status"])?;
        println!("status: {:?}", asked.elapsed());
        let active = page.value("shunt_connections_active", &[("route", "handoff"), ("engine", "handoff")]);
        ensure!(active == self.count as f64, "{active} active");
        Ok(())
    }

    /// A daemon that knows nothing of the one before finds all of them, by their ids.
    fn survive_the_daemon(&mut self) -> Result<()> {
        let before = self.all_are_shown()?;
        self.shunt.kill9();
        echo(&mut self.echoing, b"nobody is at home")?;
        let began = Instant::now();
        self.shunt.restart()?;
        let adopted = wait_for("all are adopted", LONG, || {
            let status = self.shunt.cli_json(&["status"]).ok()?;
            (status["handoff"]["adopted"] == self.all()).then_some(began.elapsed())
        })?;
        let used = kernel::cpu_seconds(self.shunt.pid()?)?;
        println!("after kill -9 the next daemon has taken all over in {adopted:?}, with {used:.2} s of processor time");
        ensure!(self.all_are_shown()? == before, "others are shown than before");
        self.all_are_counted()?;
        echo(&mut self.echoing, b"somebody is at home again")
    }
}

fn wait_handed_over(shunt: &Shunt, count: usize) -> Result<()> {
    wait_for("all are handed over", LONG, || {
        (shunt.cli_json(&["status"]).ok()?["handoff"]["connections"] == count).then_some(())
    })
}

#[test]
fn two_thousand_are_each_shown_once_and_taken_over_by_the_next_daemon() -> Result<()> {
    let mut crowd = Crowd::gather(2_000)?;
    crowd.all_are_counted()?;
    crowd.survive_the_daemon()
}

/// `SHUNT_FLOWS`: so many connections, 100,000 by default.
#[test]
#[ignore = "takes minutes; prints what many handed-over connections cost"]
fn many_cost_little_and_idle_ones_no_time() -> Result<()> {
    const SILENCE: u64 = 60;
    let wanted: usize = std::env::var("SHUNT_FLOWS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    let mut crowd = Crowd::gather(wanted)?;
    let pid = crowd.shunt.pid()?;
    let before = kernel::cpu_seconds(pid)?;
    thread::sleep(Duration::from_secs(SILENCE));
    let used = (kernel::cpu_seconds(pid)? - before) / SILENCE as f64;
    println!("{:.3} % of a core over {SILENCE} s of silence", used * 100.0);
    crowd.all_are_counted()?;
    crowd.survive_the_daemon()?;
    ensure!(used < 0.02, "an idle daemon used {used} of a core");
    Ok(())
}
