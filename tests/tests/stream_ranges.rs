//! A relayed route on 50,000 ports: one socket per worker, and everything else as with a socket for each port.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::ExitStatusExt,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    GATEWAY, GATEWAY6, Lab, Shunt,
    dialog::{echo, read_some},
    hello::Hello,
    kernel,
    scripted::{Behaviour, TcpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);
const FIRST: u16 = 10_000;
const LAST: u16 = 59_999;

/// Least-connections on 50,000 ports of both families, to an echo.
fn range(rest: &str) -> String {
    format!(
        "[[route]]\nname = \"many\"\nlisten = [\"10.88.1.1:{FIRST}-{LAST}\", \"[fd88:1::1]:{FIRST}-{LAST}\"]\n\
         balance = \"least-connections\"\nengine = \"splice\"\nbackends = [\"10.88.2.2:7\"]\ntimeouts = {{ drain = \"1s\" }}\n{rest}\n"
    )
}

fn echo_server(lab: &Lab) -> Result<TcpServer> {
    TcpServer::start(lab.backend(1), 7, Behaviour::Echo)
}

/// Ports all over the range, both ends among them, the same in every run.
fn some_ports(count: usize) -> Vec<u16> {
    let mut state = 0x2545_f491_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        FIRST + (state >> 33) as u16 % (LAST - FIRST + 1)
    };
    let mut ports = vec![FIRST, LAST];
    ports.resize_with(count, &mut next);
    ports
}

fn served(lab: &Lab, to: impl Into<SocketAddr>) -> Result<TcpStream> {
    let to = to.into();
    let mut stream = lab.client().connect(to).with_context(|| format!("connect to {to}"))?;
    echo(&mut stream, format!("to {to}").as_bytes()).with_context(|| format!("through {to}"))?;
    Ok(stream)
}

fn refused(lab: &Lab, to: impl Into<SocketAddr>) -> bool {
    lab.client().connect(to).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

#[test]
fn fifty_thousand_ports_of_both_families_take_one_socket_per_worker_and_each_knows_what_was_dialled() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = echo_server(&lab)?;
    let idle = Shunt::start(
        &lab,
        "[[route]]\nname = \"one\"\nlisten = [\"10.88.1.1:80\"]\nengine = \"splice\"\nbackends = [\"10.88.2.2:7\"]\n",
    )?;
    let before = kernel::holdings(idle.pid()?)?;
    drop(idle);
    let begin = Instant::now();
    let shunt = Shunt::start(&lab, &range(""))?;
    let started = begin.elapsed();
    let after = kernel::holdings(shunt.pid()?)?;
    println!(
        "100,000 listen addresses: ready after {started:?}; {} sockets ({} with one port), {} descriptors, {:.1} MiB resident ({:.1})",
        after.sockets,
        before.sockets,
        after.sockets + after.others + after.pipes,
        after.memory as f64 / 1048576.0,
        before.memory as f64 / 1048576.0
    );
    ensure!(after.sockets <= before.sockets + 8, "{before:?}, {after:?}");

    let mut kept = Vec::new();
    let mut slowest = Duration::ZERO;
    for ip in [IpAddr::from(GATEWAY), GATEWAY6.into()] {
        for port in some_ports(100) {
            let begin = Instant::now();
            let stream = served(&lab, (ip, port))?;
            slowest = slowest.max(begin.elapsed());
            let connection = shunt.connection_of(&stream)?.context("the connection")?;
            ensure!(connection["listen"] == SocketAddr::new(ip, port).to_string(), "{connection}");
            kept.push(stream);
        }
    }
    println!("200 connections to ports all over the range; the slowest took {slowest:?} to connect and echo");
    ensure!(refused(&lab, (GATEWAY, FIRST - 1)) && refused(&lab, (GATEWAY, LAST + 1)), "beside the range");
    let homes = kernel_listeners(&lab)?;
    ensure!(homes.iter().all(|home| home.ip().is_loopback()), "{homes:?}");
    for home in homes.iter().filter(|home| home.is_ipv4() && home.port() != 9900) {
        let dialled = lab.gateway().connect(*home);
        ensure!(dialled.is_err(), "where the group is bound, {home}, nobody answers");
    }
    let explained = shunt.cli(&["explain", "many"])?;
    let explained = String::from_utf8(explained.stdout)?;
    ensure!(explained.contains("100000 ports are led to one socket per worker (sk_lookup)"), "{explained}");
    Ok(())
}

/// Who listens on the gateway.
fn kernel_listeners(lab: &Lab) -> Result<Vec<SocketAddr>> {
    let listing = lab.gateway().sh("ss -Htln")?;
    listing.lines().map(|line| Ok(line.split_whitespace().nth(3).context("address")?.parse()?)).collect()
}

#[test]
fn both_workers_accept_what_is_led_to_one_socket() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = echo_server(&lab)?;
    let shunt = Shunt::start(&lab, &range(""))?;
    let kept: Vec<TcpStream> =
        some_ports(64).into_iter().map(|port| served(&lab, (GATEWAY, port))).collect::<Result<_>>()?;
    let rows = shunt.connections("many")?;
    ensure!(rows.len() == kept.len(), "{} of {}", rows.len(), kept.len());
    let mut by_worker = BTreeMap::<&str, usize>::new();
    for row in &rows {
        *by_worker.entry(row["id"].as_str().and_then(|id| id.get(..3)).context("id")?).or_default() += 1;
    }
    println!("connections by worker: {by_worker:?}");
    let workers = std::thread::available_parallelism()?.get();
    ensure!(by_worker.len() >= workers.min(2), "{by_worker:?}");
    Ok(())
}

#[test]
fn a_reload_adds_and_takes_ports_and_touches_no_connection() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = echo_server(&lab)?;
    let shunt = Shunt::start(&lab, &range(""))?;
    let mut stays = served(&lab, (GATEWAY, FIRST))?;
    let mut goes_on = served(&lab, (GATEWAY, 30_000))?;
    let smaller =
        range("").replace(&format!("10.88.1.1:{FIRST}-"), "10.88.1.1:10001-").replace(&LAST.to_string(), "60100");
    let begin = Instant::now();
    shunt.reload(&smaller)?;
    println!("reload of a range that moves by 100 ports: {:?}", begin.elapsed());
    ensure!(refused(&lab, (GATEWAY, FIRST)), "a port that was given up");
    drop(served(&lab, (GATEWAY, 60_100))?);
    drop(served(&lab, (GATEWAY6, FIRST))?);
    echo(&mut stays, b"its port is gone, it is not")?;
    echo(&mut goes_on, b"nor is this one")?;
    // Other routes in the middle: its own socket.
    let with_name = format!(
        "{smaller}[[route]]\nname = \"named\"\nlisten = [\"10.88.1.1:30000\"]\nmatch = {{ sni = [\"a.example\"] }}\n\
         tls = {{ mode = \"passthrough\" }}\nbackends = [\"10.88.2.2:8\"]\n"
    );
    let _named = TcpServer::start(lab.backend(1), 8, Behaviour::Tagged("n1".into()))?;
    shunt.reload(&with_name)?;
    let mut named = lab.client().connect((GATEWAY, 30_000))?;
    std::io::Write::write_all(&mut named, &Hello::to("a.example").build())?;
    ensure!(read_some(&mut named, 2)? == b"n1", "the name on that port has its own route");
    drop(served(&lab, (GATEWAY, 30_000))?);
    drop(served(&lab, (GATEWAY, 30_001))?);
    shunt.reload(&smaller)?;
    drop(served(&lab, (GATEWAY, 30_000))?);
    echo(&mut goes_on, b"and it goes on")?;
    shunt.reload(&range(""))?;
    drop(served(&lab, (GATEWAY, FIRST))?);
    ensure!(refused(&lab, (GATEWAY, 60_100)), "a port that was given up");
    echo(&mut stays, b"still here")?;
    Ok(())
}

#[test]
fn connections_made_while_the_range_is_reloaded_are_all_served() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = echo_server(&lab)?;
    let shunt = Shunt::start(&lab, &range(""))?;
    let client = lab.client().clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<u32> {
            let mut done = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let mut stream = client.connect((GATEWAY, 20_000 + (done % 1000) as u16))?;
                echo(&mut stream, b"served")?;
                done += 1;
            }
            Ok(done)
        });
        for round in 0..6 {
            let last = LAST - 77 * (round % 2 + 1);
            shunt.reload(&range("").replace(&LAST.to_string(), &last.to_string()))?;
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let done = load.join().expect("load")?;
        println!("{done} connections during 6 reloads of the range, none refused");
        ensure!(done > 20, "only {done} connections");
        Ok(())
    })
}

#[test]
fn a_killed_daemon_leaves_no_port_led_to_nowhere_and_the_next_one_serves_them_again() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = echo_server(&lab)?;
    let mut shunt = Shunt::start(&lab, &range(""))?;
    drop(served(&lab, (GATEWAY, 44_444))?);
    shunt.kill9();
    wait_until("the ports are free", SOON, || refused(&lab, (GATEWAY, 44_444)))?;
    let other = lab.gateway().listen((GATEWAY, 44_444))?;
    lab.client().connect((GATEWAY, 44_444)).context("somebody else can have the port now")?;
    drop(other);
    shunt.restart()?;
    drop(served(&lab, (GATEWAY, 44_444))?);
    drop(served(&lab, (GATEWAY6, 44_444))?);
    Ok(())
}

#[test]
fn a_port_on_which_somebody_else_listens_is_not_taken_away() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = echo_server(&lab)?;
    let foreign: Vec<SocketAddr> =
        vec![(GATEWAY, 33_333).into(), ([0, 0, 0, 0], 33_333).into(), (GATEWAY6, 33_333).into()];
    for address in foreign {
        let theirs: TcpListener = lab.gateway().listen(address)?;
        let mut shunt = Shunt::builder().without_waiting().start(&lab, &range(""))?;
        let status = shunt.process()?.wait(SOON * 4)?;
        ensure!(status.code() == Some(1), "{status:?} {:?}", status.signal());
        let said = shunt.log();
        ensure!(said.contains(":33333 (route \"many\")") && said.contains("in use"), "{address}: {said}");
        drop(theirs);
    }
    // One that is not in the way.
    let _theirs = lab.gateway().listen(([127, 0, 0, 1], 33_333))?;
    let shunt = Shunt::start(&lab, &range(""))?;
    drop(served(&lab, (GATEWAY, 33_333))?);
    // On a reload too: it is refused, and all stays.
    let _in_the_way = lab.gateway().listen((GATEWAY, 60_050))?;
    let reloaded = shunt.reload(&range("").replace(&LAST.to_string(), "60100"));
    ensure!(reloaded.is_err(), "{reloaded:?}");
    drop(served(&lab, (GATEWAY, 33_333))?);
    Ok(())
}

#[test]
fn an_exact_port_of_another_route_keeps_its_own_socket_inside_a_range_of_all_addresses() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = echo_server(&lab)?;
    let _other = TcpServer::start(lab.backend(1), 8, Behaviour::Tagged("o1".into()))?;
    let config = range("").replace("10.88.1.1:", "0.0.0.0:")
        + "[[route]]\nname = \"exact\"\nlisten = [\"10.88.1.1:22222\"]\nengine = \"splice\"\nbackends = [\"10.88.2.2:8\"]\n";
    let _shunt = Shunt::start(&lab, &config)?;
    let mut exact = lab.client().connect((GATEWAY, 22_222))?;
    ensure!(read_some(&mut exact, 2)? == b"o1", "the exact port is another route's");
    drop(served(&lab, (GATEWAY, 22_223))?);
    let mut local = lab.gateway().connect(([127, 0, 0, 1], 22_222))?;
    echo(&mut local, b"at another address the range has it")?;
    Ok(())
}

#[test]
fn without_the_privilege_a_range_has_a_socket_per_port_up_to_the_limit() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = echo_server(&lab)?;
    let few = range("").replace(&LAST.to_string(), "10499");
    // Without CAP_BPF and CAP_SYS_ADMIN.
    let wrapper = lab.dir().join("unprivileged");
    let binary = shunt_lab::shunt_binary()?;
    let script = format!(
        "#!/bin/sh\nexec setpriv --bounding-set -bpf,-sys_admin --inh-caps -bpf,-sys_admin {} \"$@\"\n",
        binary.display()
    );
    std::fs::write(&wrapper, script)?;
    std::fs::set_permissions(&wrapper, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let shunt = Shunt::builder().binary(&wrapper).start(&lab, &few)?;
    drop((served(&lab, (GATEWAY, 10_499))?, served(&lab, (GATEWAY6, 10_499))?));
    ensure!(kernel::holdings(shunt.pid()?)?.sockets >= 1000, "a socket for each port");
    let explained = String::from_utf8(shunt.cli(&["explain", "many"])?.stdout)?;
    ensure!(explained.contains("lack sk_lookup"), "{explained}");
    drop(shunt);
    let mut refused = Shunt::builder().binary(&wrapper).without_waiting().start(&lab, &range(""))?;
    let status = refused.process()?.wait(SOON * 4)?;
    ensure!(status.code() == Some(1), "{status:?}");
    ensure!(refused.log().contains("without sk_lookup"), "{}", refused.log());
    Ok(())
}
