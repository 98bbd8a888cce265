//! The daemon dies, the table is flushed, the file changes: connections go on (E2, E3, E4).

use std::{
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    dialog::echo,
    kernel,
    scripted::{Behaviour, TcpServer},
    wait_until,
};
use shunt_tests::kernel_locks_tables;

const SOON: Duration = Duration::from_secs(10);

const WEB: &str = r#"
[[route]]
name = "web"
listen = ["10.88.1.1:80"]
backends = ["10.88.2.2:80", "10.88.2.3:80"]
"#;

fn to() -> SocketAddr {
    SocketAddr::from(([10, 88, 1, 1], 80))
}

/// Connects, echoes and closes in a loop, and echoes on one connection that stays, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    fn start(lab: &Lab) -> Result<Self> {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut threads = Vec::new();
        for nth in 0..2 {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            let client = lab.client().clone();
            let mut staying = lab.client().connect(to())?;
            threads.push(std::thread::spawn(move || {
                let mut rounds = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    rounds += 1;
                    echo(&mut staying, b"staying").with_context(|| format!("thread {nth}, staying, round {rounds}"))?;
                    let mut fresh =
                        client.connect_within(to(), SOON).with_context(|| format!("connect, round {rounds}"))?;
                    echo(&mut fresh, b"fresh").with_context(|| format!("fresh, round {rounds}"))?;
                    done.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        Ok(Self { stop, done, threads })
    }

    fn rounds(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn more(&self, count: u64) -> Result<()> {
        let from = self.rounds();
        wait_until("the load goes on", SOON, || self.rounds() >= from + count)
    }

    /// Fails if a single connection or byte went wrong.
    fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("load")?;
        }
        Ok(self.done.load(Ordering::Relaxed))
    }
}

fn servers(lab: &Lab) -> Result<Vec<TcpServer>> {
    [1, 2].map(|n| TcpServer::start(lab.backend(n), 80, Behaviour::Echo)).into_iter().collect()
}

#[test]
fn a_killed_daemon_is_not_missed_and_the_next_one_goes_on_counting() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab)?;
    let mut shunt = Shunt::start(&lab, WEB)?;
    let load = Load::start(&lab)?;
    load.more(200)?;
    let ids = |shunt: &Shunt| -> Result<Vec<String>> {
        let list = shunt.cli_json(&["connections", "--route", "web"])?;
        Ok(list.as_array().context("array")?.iter().filter_map(|c| Some(c["id"].as_str()?.to_owned())).collect())
    };
    let before = ids(&shunt)?;
    let counted = shunt.route("web")?["connections_total"].as_u64().context("total")?;
    shunt.kill9();
    load.more(200)?;
    shunt.restart()?;
    load.more(200)?;
    let after = ids(&shunt)?;
    let adopted = before.iter().filter(|id| after.contains(id)).count();
    ensure!(adopted >= 2, "the staying connections keep their ids: {before:?}, {after:?}");
    let rounds = load.finish()?;
    println!("{rounds} connections, none lost; {counted} were counted before the kill");
    // Both staying connections and every fresh one, each once, over both lives of the daemon.
    shunt.wait_route("web", "every connection counted, none ended twice", SOON, |r| {
        let ended = r["terminations"]["finished_client_first"].as_u64()?;
        (r["connections_total"] == rounds + 2 && ended <= rounds + 2).then_some(())
    })?;
    shunt.wait_route("web", "bytes go on from before", SOON, |r| {
        // 5 bytes each way and at least 4 packets of 52 bytes.
        (r["bytes_in"].as_u64()? > rounds * 200).then_some(())
    })
}

#[test]
fn a_flushed_ruleset_is_noticed_repaired_and_counted() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab)?;
    let shunt = Shunt::start(&lab, &format!("[kernel]\nlock_table = false\n{WEB}"))?;
    for n in 0..5 {
        echo(&mut lab.client().connect(to())?, format!("{n}").as_bytes())?;
    }
    shunt.wait_route("web", "five", SOON, |r| (r["connections_total"] == 5).then_some(()))?;
    for (nth, damage) in [
        "nft flush ruleset",
        "nft delete table inet shunt",
        "nft flush chain inet shunt routed",
        "nft flush map inet shunt exact4",
        "nft add rule inet shunt routed counter",
        "nft add set inet shunt stranger '{ type mark; }'",
    ]
    .into_iter()
    .enumerate()
    {
        let listing = kernel::nft_ruleset(lab.gateway())?;
        lab.gateway().sh(damage)?;
        wait_until(&format!("drift counted after `{damage}`"), SOON, || {
            shunt.metrics().is_ok_and(|m| m.value("shunt_kernel_drift_total", &[]) == (nth + 1) as f64)
        })?;
        echo(&mut lab.client().connect(to())?, b"repaired")?;
        let repaired = kernel::nft_ruleset(lab.gateway())?;
        assert_eq!(chains(&listing), chains(&repaired), "after `{damage}`");
        // Counters are read every second; what a deleted table counted since then is lost with it.
        let made = 6 + nth as u64;
        shunt.wait_route("web", "counters go on", SOON, |r| (r["connections_total"] == made).then_some(()))?;
    }
    shunt.wait_route("web", "counters went on", SOON, |r| (r["connections_total"] == 11).then_some(()))
}

/// The chains of a listing, without what comes before them: sets carry counters and have no order.
fn chains(listing: &str) -> Vec<String> {
    let mut chains: Vec<String> =
        listing.split("\n\t}\n").filter(|b| b.contains("\tchain ")).map(str::to_owned).collect();
    chains.sort();
    chains
}

#[test]
fn a_locked_table_survives_a_foreign_flush() -> Result<()> {
    if !kernel_locks_tables() {
        return Ok(());
    }
    let lab = Lab::new()?;
    let _servers = servers(&lab)?;
    let shunt = Shunt::start(&lab, WEB)?;
    let load = Load::start(&lab)?;
    load.more(50)?;
    lab.gateway().sh("nft flush ruleset")?;
    ensure!(lab.gateway().sh("nft delete table inet shunt").is_err(), "others may not delete it");
    load.more(50)?;
    load.finish()?;
    ensure!(shunt.metrics()?.value("shunt_kernel_drift_total", &[]) == 0.0);
    Ok(())
}

#[test]
fn changing_one_of_many_routes_disturbs_no_other() -> Result<()> {
    const ROUTES: usize = 10_000;
    let lab = Lab::new()?;
    let _servers = servers(&lab)?;
    let config = |changed: &str| {
        let many: String = (0..ROUTES)
            .map(|n| {
                format!(
                    "[[route]]\nname = \"r{n}\"\nlisten = [\"10.88.1.1:{}\"]\nbackends = [\"10.88.2.2:80\"]\n",
                    10_000 + n
                )
            })
            .collect();
        format!(
            "{many}[[route]]\nname = \"changing\"\nlisten = [\"10.88.1.1:81\"]\nbackends = [\"{changed}\"]\ntimeouts = {{ drain = \"1h\" }}\n{WEB}"
        )
    };
    let shunt = Shunt::start(&lab, &config("10.88.2.2:80"))?;
    let changing = SocketAddr::from(([10, 88, 1, 1], 81));
    let mut old = lab.client().connect(changing)?;
    echo(&mut old, b"old")?;
    // A sample of the others carries traffic all the time; each of the rest has a connection that must live.
    let load = Load::start(&lab)?;
    let mut others: Vec<TcpStream> = (0..200)
        .map(|n| Ok(lab.client().connect(SocketAddr::from(([10, 88, 1, 1], 10_000 + n * 50)))?))
        .collect::<Result<_>>()?;
    for round in 0..10 {
        let to = if round % 2 == 0 { "10.88.2.3:80" } else { "10.88.2.2:80" };
        let reload = shunt.reload(&config(to))?;
        assert_eq!(reload["changed"], serde_json::json!(["changing"]));
        assert_eq!(reload["unchanged"], ROUTES as u64 + 1);
        println!("one of {ROUTES} changed: {} messages in {} ms", reload["changes"], reload["apply_ms"]);
        load.more(20)?;
    }
    echo(&mut old, b"the old connection goes on")?;
    for stream in &mut others {
        echo(stream, b"undisturbed")?;
    }
    load.finish()?;
    Ok(())
}

#[test]
fn a_bad_file_changes_nothing_and_says_why() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab)?;
    let shunt = Shunt::start(&lab, WEB)?;
    let before = lab.gateway().sh("nft -s list table inet shunt")?;
    for bad in [
        "[[route]]\nname = \"web\"\nlisten = [\"10.88.1.1:0\"]\nbackends = [\"10.88.2.2:80\"]\n",
        "[[route]]\nname = \"web\"\nlisten = [\"10.88.1.1:80\"]\nbackends = [\"10.88.2.2:80\"]\nengine = \"nft\"\nproxy_protocol = { send = \"v2\" }\n",
        "nonsense",
    ] {
        shunt.write_config(bad)?;
        let output = shunt.cli(&["reload"])?;
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(said.contains("mend:") && said.lines().count() >= 2, "said: {said}");
    }
    assert_eq!(before, lab.gateway().sh("nft -s list table inet shunt")?);
    echo(&mut lab.client().connect(to())?, b"as before")?;
    let status = shunt.cli_json(&["status"])?;
    assert_eq!(status["reloads_failed"], 3);
    ensure!(status["warnings"].to_string().contains("reload"), "{status}");
    Ok(())
}
