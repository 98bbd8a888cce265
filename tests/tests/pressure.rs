//! More events than the daemon can hear, more connections than conntrack should hold (E6).

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt, time::Duration};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use shunt_lab::{
    Lab, Shunt, load,
    scripted::{Behaviour, TcpServer},
    shunt_binary, wait_until,
};

/// Some 52,000 events fit into the daemon's queue, and a connection makes one before it lingers.
const CONNECTIONS: u64 = 80_000;

#[test]
fn lost_events_are_said_aloud_and_the_numbers_come_right_again() -> Result<()> {
    let lab = Lab::builder().client_addresses(8).build()?;
    // Several, because masquerading has 64,512 ports towards each of them.
    let server = |port| TcpServer::start(lab.backend(1), port, Behaviour::Reply(b"bye".to_vec()));
    let _servers = (7010..7014).map(server).collect::<Result<Vec<_>>>()?;
    let holder = TcpServer::start(lab.backend(1), 81, Behaviour::Hold)?;
    let mut shunt = Shunt::start(
        &lab,
        r#"
[[route]]
name = "web"
listen = ["10.88.1.1:7010-7013"]
backends = ["10.88.2.2"]
[[route]]
name = "held"
listen = ["10.88.1.1:81"]
backends = ["10.88.2.2:81"]
[log]
access = "off"
"#,
    )?;
    let to = SocketAddr::from(([10, 88, 1, 1], 81));
    let held: Vec<_> = (0..20).map(|_| lab.client().connect(to)).collect::<Result<_, _>>()?;
    shunt.wait_route("held", "20 open", Duration::from_secs(5), |r| (r["connections_active"] == 20).then_some(()))?;
    // A daemon that gets no time at all: the kernel forwards, and its events find no room.
    shunt.signal(Signal::SIGSTOP)?;
    let mut made = 0;
    while made < CONNECTIONS {
        let load = load::NewConnections {
            from: lab.client_addresses(),
            to: [10, 88, 1, 1].into(),
            ports: 7010..7014,
            each: load::Each::Answered,
            threads: 2,
            rate: None,
            duration: Duration::from_secs(2),
        };
        made += load::new_connections(lab.client(), &load)?.made;
    }
    shunt.signal(Signal::SIGCONT)?;
    wait_until("the loss is counted", Duration::from_secs(60), || {
        shunt.metrics().is_ok_and(|m| m.value("shunt_conntrack_events_lost_total", &[]) > 0.0)
    })?;
    let warned =
        || Ok::<bool, anyhow::Error>(shunt.cli_json(&["status"])?["warnings"].to_string().contains("events were lost"));
    ensure!(warned()?, "`shunt status` says so");
    shunt.wait_route("web", "right again", Duration::from_secs(60), |r| {
        // Two clients on one port of the gateway make one of them dial twice: seldom, and rightly counted.
        let total = r["connections_total"].as_u64()?;
        ((made..=made + made / 100).contains(&total) && r["connections_active"] == 0).then_some(())
    })?;
    assert_eq!(shunt.route("held")?["connections_active"], 20);
    println!("{made} connections while stopped, every one counted; 20 open ones still known");
    drop(held);
    drop(holder);
    shunt.wait_route("held", "none open", Duration::from_secs(10), |r| (r["connections_active"] == 0).then_some(()))
}

/// The limit is the machine's, for all namespaces together: a test must not lower it. The daemon alone is shown a lower one,
/// by a mount that nobody else sees; entries are real.
#[test]
fn a_conntrack_table_that_is_nearly_full_is_said_aloud() -> Result<()> {
    const LIMIT: usize = 200;
    let lab = Lab::new()?;
    let holder = TcpServer::start(lab.backend(1), 81, Behaviour::Hold)?;
    let (shown, daemon) = (lab.dir().join("nf_conntrack_max"), lab.dir().join("shunt-in-its-own-mounts"));
    fs::write(&shown, LIMIT.to_string())?;
    let mount = format!("mount --bind {} /proc/sys/net/netfilter/nf_conntrack_max", shown.display());
    let binary = shunt_binary()?;
    fs::write(
        &daemon,
        format!("#!/bin/sh\nexec unshare -m sh -c '{mount} && exec {} \"$@\"' - \"$@\"\n", binary.display()),
    )?;
    fs::set_permissions(&daemon, fs::Permissions::from_mode(0o755))?;
    let shunt = Shunt::builder()
        .binary(&daemon)
        .start(&lab, "[[route]]\nname = \"held\"\nlisten = [\"10.88.1.1:81\"]\nbackends = [\"10.88.2.2:81\"]\n")?;
    let warned =
        || Ok::<bool, anyhow::Error>(shunt.cli_json(&["status"])?["warnings"].to_string().contains("nearly full"));
    ensure!(!warned()?, "nothing is full yet");

    let to = SocketAddr::from(([10, 88, 1, 1], 81));
    let held: Vec<_> = (0..LIMIT * 95 / 100).map(|_| lab.client().connect(to)).collect::<Result<_, _>>()?;
    wait_until("`shunt status` says so", Duration::from_secs(10), || warned().unwrap_or(false))?;
    let metrics = shunt.metrics()?;
    assert_eq!(metrics.value("shunt_conntrack_max", &[]), LIMIT as f64);
    ensure!(metrics.value("shunt_conntrack_entries", &[]) >= 0.9 * LIMIT as f64, "the metrics say so");
    ensure!(metrics.value("shunt_warnings", &[]) >= 1.0, "and that there is a warning");

    drop(held);
    holder.end_all(true);
    wait_until("the warning goes when there is room again", Duration::from_secs(20), || {
        warned().is_ok_and(|warned| !warned)
    })
}
