//! Routes of both kinds in one daemon: forwarded by the kernel, relayed by the daemon, and moved between the two.

use std::{
    io::Read,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use shunt_lab::{
    Lab, Shunt,
    dialog::echo,
    patiently,
    scripted::{Behaviour, TcpServer},
    wait_until, web,
};

const SOON: Duration = Duration::from_secs(10);

const COPY: &str = "engine = \"copy\"\ntimeouts = { drain = \"2s\" }";

fn to() -> SocketAddr {
    SocketAddr::from(([10, 88, 1, 1], 80))
}

/// The engines of the route's open connections, sorted.
fn engines(shunt: &Shunt) -> Result<Vec<String>> {
    let list = shunt.cli_json(&["connections", "--route", "web"])?;
    let open = |one: &&serde_json::Value| one["state"] == "established";
    let engine = |one: &serde_json::Value| Some(one["engine"].as_str()?.to_owned());
    let mut engines: Vec<String> = list.as_array().context("array")?.iter().filter(open).filter_map(engine).collect();
    engines.sort();
    Ok(engines)
}

#[test]
fn relayed_routes_alone_leave_the_kernels_tables_untouched() -> Result<()> {
    let lab = Lab::builder().forwarding(false).build()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let high = web(COPY).replace("10.88.1.1:80", "10.88.1.1:8080");
    let mut shunt = Shunt::start(&lab, &high)?;
    echo(&mut lab.client().connect(SocketAddr::from(([10, 88, 1, 1], 8080)))?, b"relayed")?;
    assert_eq!(lab.gateway().sh("nft list tables")?.trim(), "");
    assert_eq!(lab.gateway().sysctl("net.ipv4.ip_forward")?.trim(), "0");
    // The first route that needs it makes the table.
    shunt.reload(&(high + &web("").replace("\"web\"", "\"plain\"")))?;
    echo(&mut lab.client().connect(to())?, b"forwarded")?;
    assert_eq!(lab.gateway().sysctl("net.ipv4.ip_forward")?.trim(), "1");
    shunt.wait_route("plain", "counted", SOON, |r| (r["connections_total"] == 1).then_some(()))?;
    shunt.wait_route("web", "counted", SOON, |r| (r["connections_total"] == 1).then_some(()))?;
    ensure!(shunt.terminate(SOON)?.success());
    Ok(())
}

#[test]
fn a_route_moves_between_engines_under_load_and_no_connection_fails() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &web(""))?;
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let load = {
        let (client, stop, done) = (lab.client().clone(), Arc::clone(&stop), Arc::clone(&done));
        std::thread::spawn(move || -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                let round = done.fetch_add(1, Ordering::Relaxed);
                let mut fresh = client.connect_within(to(), SOON).with_context(|| format!("connect {round}"))?;
                echo(&mut fresh, b"fresh").with_context(|| format!("echo {round}"))?;
            }
            Ok(())
        })
    };
    let more = || {
        let from = done.load(Ordering::Relaxed);
        wait_until("the load goes on", SOON, || done.load(Ordering::Relaxed) >= from + 50 || load.is_finished())
    };
    let mut staying = Vec::new();
    for round in 0..6 {
        shunt.reload(&web(if round % 2 == 0 { COPY } else { "" }))?;
        more()?;
        staying.push(lab.client().connect(to())?);
        for stream in &mut staying {
            echo(stream, b"staying")?;
        }
    }
    stop.store(true, Ordering::Relaxed);
    load.join().expect("load")?;
    let found = engines(&shunt)?;
    ensure!(found == ["copy", "copy", "copy", "nft", "nft", "nft"], "{found:?}");
    wait_until("both engines are counted", SOON, || {
        let active = |engine| {
            shunt.metrics().map(|m| m.value("shunt_connections_active", &[("route", "web"), ("engine", engine)]))
        };
        ["copy", "nft"].into_iter().all(|engine| active(engine).is_ok_and(|active| active == 3.0))
    })
}

#[test]
fn a_socket_that_cannot_be_bound_refuses_the_whole_reload() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let _taken = lab.gateway().listen(SocketAddr::from(([10, 88, 1, 1], 81)))?;
    let shunt = Shunt::start(&lab, &web(""))?;
    let before = lab.gateway().sh("nft -s list table inet shunt")?;
    let other = web(COPY).replace("\"web\"", "\"other\"").replace("10.88.1.1:80", "10.88.1.1:81");
    shunt.write_config(&(web("allow = [\"10.99.0.0/16\"]") + &other))?;
    let refused = shunt.cli(&["reload"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(1) && said.contains("10.88.1.1:81") && said.contains("mend:"), "{said}");
    assert_eq!(lab.gateway().sh("nft -s list table inet shunt")?, before);
    echo(&mut lab.client().connect(to())?, b"as before")
}

#[test]
fn an_address_of_its_own_is_relayed_beside_a_forwarded_route_for_every_address() -> Result<()> {
    let lab = Lab::new()?;
    let _one = TcpServer::start(lab.backend(1), 80, Behaviour::Tagged("forwarded".into()))?;
    let _two = TcpServer::start(lab.backend(2), 80, Behaviour::Tagged("relayed".into()))?;
    let every = web("").replace("\"web\"", "\"every\"").replace("10.88.1.1:80", "0.0.0.0:80");
    let own = web(COPY).replace("10.88.2.2", "10.88.2.3");
    let shunt = Shunt::start(&lab, &(every.clone() + &own))?;
    let tag = || -> Result<String> {
        let mut stream = lab.client().connect(to())?;
        stream.set_read_timeout(Some(patiently(SOON)))?;
        let mut tag = [0; 16];
        let count = stream.read(&mut tag)?;
        Ok(String::from_utf8_lossy(&tag[..count]).trim().to_owned())
    };
    assert_eq!(tag()?, "relayed");
    shunt.reload(&every)?;
    assert_eq!(tag()?, "forwarded");
    shunt.reload(&(every + &own))?;
    assert_eq!(tag()?, "relayed");
    Ok(())
}

#[test]
fn a_relayed_route_that_is_gone_drains_and_is_forgotten() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let other = web(COPY).replace("\"web\"", "\"other\"").replace("10.88.1.1:80", "10.88.1.1:81");
    let shunt = Shunt::start(&lab, &(web(COPY) + &other))?;
    let mut held = lab.client().connect(to())?;
    echo(&mut held, b"held")?;
    shunt.reload(&other)?;
    ensure!(lab.client().connect(to()).is_err(), "nobody listens there any more");
    echo(&mut held, b"still")?;
    assert_eq!(shunt.route("web")?["state"], "draining");
    wait_until("the route is forgotten", SOON, || shunt.route("web").is_err())?;
    ensure!(matches!(held.read(&mut [0; 1]), Ok(0) | Err(_)), "cut when its drain was over");
    wait_until("its line is in the access log", SOON, || shunt.log().contains("reason=drained"))
}

#[test]
fn a_stopping_daemon_lets_relayed_connections_finish_and_answers_meanwhile() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let mut shunt = Shunt::start(&lab, &web("engine = \"copy\"\ntimeouts = { drain = \"1h\" }"))?;
    let mut held = lab.client().connect(to())?;
    echo(&mut held, b"held")?;
    shunt.signal(Signal::SIGTERM)?;
    wait_until("not ready", SOON, || shunt.cli_json(&["status"]).is_ok_and(|s| s["ready"] == false))?;
    wait_until("nothing new", SOON, || lab.client().connect(to()).is_err())?;
    echo(&mut held, b"goes on")?;
    assert_eq!(engines(&shunt)?, ["copy"]);
    ensure!(shunt.cli(&["reload"])?.status.code() == Some(1), "no reload while stopping");
    drop(held);
    ensure!(shunt.terminate(SOON)?.success(), "ends with its last connection");
    Ok(())
}

#[test]
fn a_second_signal_ends_the_daemon_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let mut shunt = Shunt::start(&lab, &web("engine = \"copy\"\ntimeouts = { drain = \"1h\" }"))?;
    let mut held = lab.client().connect(to())?;
    echo(&mut held, b"held")?;
    shunt.signal(Signal::SIGTERM)?;
    wait_until("not ready", SOON, || shunt.cli_json(&["status"]).is_ok_and(|s| s["ready"] == false))?;
    ensure!(shunt.terminate(SOON)?.success());
    Ok(())
}
