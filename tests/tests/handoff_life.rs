//! What becomes of a connection after it has been handed over: it is counted, limited, ended and taken over as before.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_userspace::{
    handoff::folder,
    kernel::bpf::handoff::{HandoffTable, Sizes},
};
use serde_json::Value;
use shunt_lab::{
    Lab, Shunt,
    dialog::{End, echo, end_of, turned_away},
    kernel, patiently,
    relay::{Relay, handed_over},
    scripted::{Behaviour, Ended, TcpServer},
    wait_for, wait_until,
};

const SOON: Duration = Duration::from_secs(10);
const TO: Relay = Relay::Handoff;
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 88, 2, 2);

/// A lab, an echoing backend and a daemon whose route hands over.
struct Stage {
    lab: Lab,
    server: TcpServer,
    shunt: Shunt,
}

impl Stage {
    fn new(extra: &str) -> Result<Self> {
        let lab = Lab::new()?;
        let server = TcpServer::start(lab.backend(1), TO.backend_port(), Behaviour::Echo)?;
        let shunt = Shunt::start(&lab, &config(extra))?;
        Ok(Self { lab, server, shunt })
    }

    /// A connection that has been handed over after five bytes each way.
    fn connect(&self) -> Result<TcpStream> {
        TO.connect(&self.lab, &self.shunt)
    }

    fn shown(&self, stream: &TcpStream) -> Result<Value> {
        self.shunt.connection_of(stream)?.context("it is not shown")
    }

    fn id(&self, stream: &TcpStream) -> Result<String> {
        Ok(self.shown(stream)?["id"].as_str().context("no id")?.to_owned())
    }
}

fn config(extra: &str) -> String {
    format!("[log]\nformat = \"json\"\n{}", TO.route_to(&[BACKEND], extra))
}

/// Both ends see a reset, and the flow ends for this reason.
fn ends_with_resets(stage: &Stage, stream: &mut TcpStream, reason: &str) -> Result<()> {
    ensure!(end_of(stream, SOON)? == End::Reset, "the client");
    let record = stage.server.wait_records(1, SOON)?.remove(0);
    ensure!(matches!(record.ended, Ended::Failed(_)), "the backend saw {:?}", record.ended);
    stage.shunt.wait_ended(TO.route(), &[(reason, 1)], SOON)
}

#[test]
fn every_byte_is_counted_while_it_lives_and_told_at_its_end() -> Result<()> {
    let stage = Stage::new("")?;
    let mut stream = stage.connect()?;
    let id = stage.id(&stream)?;
    echo(&mut stream, &[7; 1000])?;
    let shown = wait_for("its bytes are shown", SOON, || {
        let shown = stage.shown(&stream).ok()?;
        (shown["bytes_in"] == 1005 && shown["bytes_out"] == 1005).then_some(shown)
    })?;
    ensure!(shown["engine"] == "handoff" && shown["state"] == "established" && shown["id"] == id, "{shown}");
    ensure!(shown["packets_in"].as_u64() > Some(0), "{shown}");
    let route = stage.shunt.route(TO.route())?;
    ensure!(route["bytes_in"] == 1005 && route["connections_active"] == 1, "{route}");
    let explained = stage.shunt.cli_json(&["explain", &id])?;
    ensure!(explained["connection"]["engine"] == "handoff", "{explained}");
    let client = stream.local_addr()?.to_string();
    stream.shutdown(std::net::Shutdown::Write)?;
    ensure!(end_of(&mut stream, SOON)? == End::Finished);
    stage.shunt.wait_ended(TO.route(), &[("finished_client_first", 1)], SOON)?;
    let line = stage.shunt.wait_access_line(&client, SOON)?;
    ensure!(line["id"] == id && line["engine"] == "handoff", "{line}");
    ensure!(line["bytes_in"] == 1005 && line["bytes_out"] == 1005, "{line}");
    let metrics = stage.shunt.metrics()?;
    let active = metrics.value("shunt_connections_active", &[("route", TO.route()), ("engine", "handoff")]);
    ensure!(active == 0.0, "{active} active");
    ensure!(metrics.value("shunt_handover_entries_max", &[]) > 0.0, "the table is shown");
    Ok(())
}

#[test]
fn silence_ends_it_at_both_ends_and_a_keepalive_probe_is_silence() -> Result<()> {
    // On a slow machine a second passes between a question and its answer.
    let moment = patiently(Duration::from_secs(1));
    let stage = Stage::new(&format!("timeouts = {{ idle = \"{}s\" }}", 2 * moment.as_secs()))?;
    let mut stream = stage.connect()?;
    socket2::SockRef::from(&stream).set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(moment))?;
    let began = Instant::now();
    for _ in 0..3 {
        std::thread::sleep(moment);
        echo(&mut stream, b"still here").context("bytes keep it")?;
    }
    let quiet = Instant::now();
    ends_with_resets(&stage, &mut stream, "idle_timeout")?;
    ensure!(began.elapsed() >= 4 * moment && quiet.elapsed() < 5 * moment, "{quiet:?}");
    Ok(())
}

#[test]
fn its_lifetime_ends_it_at_both_ends() -> Result<()> {
    let stage = Stage::new("timeouts = { lifetime = \"3s\" }")?;
    let mut stream = stage.connect()?;
    ends_with_resets(&stage, &mut stream, "lifetime_exceeded")
}

#[test]
fn a_half_closed_one_is_shown_and_has_its_own_limit() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), TO.backend_port(), Behaviour::Hold)?;
    let shunt = Shunt::start(&lab, &config("timeouts = { half_closed = \"2s\" }"))?;
    let mut stream = lab.client().connect(TO.listen())?;
    handed_over(&shunt, &stream)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    wait_until("it is shown as half-closed", SOON, || {
        shunt.connection_of(&stream).is_ok_and(|shown| shown.is_some_and(|shown| shown["state"] == "half_closed"))
    })?;
    ensure!(end_of(&mut stream, SOON)? == End::Reset);
    shunt.wait_ended(TO.route(), &[("half_closed_timeout", 1)], SOON)
}

#[test]
fn kill_resets_both_ends_also_when_they_are_silent() -> Result<()> {
    let stage = Stage::new("")?;
    let mut stream = stage.connect()?;
    echo(&mut stream, b"and then silence")?;
    let id = stage.id(&stream)?;
    let killed = stage.shunt.cli(&["kill", &id])?;
    ensure!(killed.status.success(), "{}", String::from_utf8_lossy(&killed.stderr));
    ends_with_resets(&stage, &mut stream, "killed")?;
    ensure!(!stage.shunt.cli(&["kill", &id])?.status.success(), "it is gone");
    Ok(())
}

#[test]
fn limits_hold_until_the_real_end() -> Result<()> {
    let stage = Stage::new("limits = { connections_per_client = 1 }")?;
    let mut stream = stage.connect()?;
    let backend =
        |stage: &Stage| stage.shunt.route(TO.route()).map(|route| route["backends"][0]["connections_active"].clone());
    ensure!(backend(&stage)? == 1);
    let client_ip = stage.lab.client().ip.into();
    ensure!(turned_away(stage.lab.client(), client_ip, TO.listen(), SOON)? == End::Reset, "one too many");
    stream.shutdown(std::net::Shutdown::Write)?;
    ensure!(end_of(&mut stream, SOON)? == End::Finished);
    wait_until("there is room again", SOON, || {
        let Ok(mut stream) = stage.lab.client().connect(TO.listen()) else { return false };
        echo(&mut stream, b"hello").is_ok()
    })
}

#[test]
fn a_route_that_is_removed_drains_what_it_has_handed_over() -> Result<()> {
    let stage = Stage::new("timeouts = { drain = \"2s\" }")?;
    let mut stream = stage.connect()?;
    stage.shunt.write_config(&Relay::Copy.route_to(&[BACKEND], ""))?;
    let reloaded = stage.shunt.cli(&["reload"])?;
    ensure!(reloaded.status.success(), "{}", String::from_utf8_lossy(&reloaded.stderr));
    echo(&mut stream, b"it has its time")?;
    ensure!(end_of(&mut stream, SOON)? == End::Reset);
    wait_until("the route is forgotten", SOON, || stage.shunt.route(TO.route()).is_err())
}

#[test]
fn a_daemon_that_stops_leaves_it_alone_and_the_next_one_goes_on() -> Result<()> {
    let mut stage = Stage::new("timeouts = { drain = \"1s\" }")?;
    let mut stream = stage.connect()?;
    let id = stage.id(&stream)?;
    stage.shunt.terminate(SOON)?;
    echo(&mut stream, b"nobody is at home")?;
    stage.shunt.restart()?;
    goes_on(&stage, &mut stream, &id, 5 + 17)
}

#[test]
fn a_daemon_that_is_killed_is_not_noticed_and_the_next_one_goes_on() -> Result<()> {
    let mut stage = Stage::new("limits = { connections_per_client = 1 }")?;
    let mut stream = stage.connect()?;
    let id = stage.id(&stream)?;
    stage.shunt.kill9();
    for _ in 0..10 {
        echo(&mut stream, b"nobody is at home")?;
    }
    stage.shunt.restart()?;
    goes_on(&stage, &mut stream, &id, 5 + 170)?;
    let client = stream.local_addr()?.to_string();
    let client_ip = stage.lab.client().ip.into();
    ensure!(turned_away(stage.lab.client(), client_ip, TO.listen(), SOON)? == End::Reset, "it counts as before");
    let killed = stage.shunt.cli(&["kill", &id])?;
    ensure!(killed.status.success(), "{}", String::from_utf8_lossy(&killed.stderr));
    ensure!(end_of(&mut stream, SOON)? == End::Reset);
    let line = stage.shunt.wait_access_line(&client, SOON)?;
    ensure!(line["id"] == id && line["reason"] == "killed" && line["bytes_in"] == 5 + 170 + 9, "{line}");
    Ok(())
}

/// The daemon shows the connection under the id it had, with `bytes` each way, and goes on counting.
fn goes_on(stage: &Stage, stream: &mut TcpStream, id: &str, bytes: u64) -> Result<()> {
    let shown = stage.shown(stream)?;
    ensure!(shown["id"] == id && shown["engine"] == "handoff" && shown["route"] == TO.route(), "{shown}");
    ensure!(shown["bytes_in"] == bytes && shown["bytes_out"] == bytes, "{bytes} bytes: {shown}");
    echo(stream, b"and so on")?;
    wait_until("its bytes are counted on", SOON, || {
        stage.shown(stream).is_ok_and(|shown| shown["bytes_in"] == bytes + 9 && shown["bytes_out"] == bytes + 9)
    })?;
    ensure!(stage.shunt.cli_json(&["status"])?["handoff"]["adopted"] == 1);
    let active =
        stage.shunt.metrics()?.value("shunt_connections_active", &[("route", TO.route()), ("engine", "handoff")]);
    ensure!(active == 1.0, "{active} active");
    Ok(())
}

#[test]
fn cleanup_ends_what_is_left_and_leaves_nothing() -> Result<()> {
    let mut stage = Stage::new("")?;
    let mut stream = stage.connect()?;
    ensure!(!stage.lab.pins().left()?.is_empty(), "something is pinned");
    let reserved = "net.ipv4.ip_local_reserved_ports";
    ensure!(stage.lab.gateway().sysctl(reserved)?.trim() == "12288-32767");
    stage.shunt.kill9();
    let cleaned = stage.shunt.cli(&["cleanup"])?;
    let told = String::from_utf8_lossy(&cleaned.stdout).into_owned();
    ensure!(cleaned.status.success(), "{told} {}", String::from_utf8_lossy(&cleaned.stderr));
    ensure!(told.contains("handed-over connections; 1 were reset"), "{told}");
    ensure!(end_of(&mut stream, SOON)? == End::Reset);
    ensure!(matches!(stage.server.wait_records(1, SOON)?[0].ended, Ended::Failed(_)));
    ensure!(stage.lab.pins().left()?.is_empty(), "{:?}", stage.lab.pins().left()?);
    ensure!(stage.lab.gateway().sysctl(reserved)?.trim().is_empty(), "the ports are given back");
    // Links of tcx go with their pins.
    let queues = stage.lab.gateway().sh("tc qdisc show")?;
    ensure!(!queues.contains("clsact"), "{queues}");
    Ok(())
}

#[test]
fn a_client_on_the_gateway_itself_is_relayed_to_the_end() -> Result<()> {
    let stage = Stage::new("")?;
    let mut stream = stage.lab.gateway().connect(TO.listen())?;
    echo(&mut stream, b"hello")?;
    // Its segments are those of the loopback interface, which may be what is noticed first.
    wait_for("it is decided", SOON, || {
        let metrics = stage.shunt.metrics().ok()?;
        let counted = |result| metrics.value("shunt_handovers_total", &[("route", TO.route()), ("result", result)]);
        (counted("on_this_machine") + counted("segment_size") >= 1.0).then_some(())
    })?;
    echo(&mut stream, b"still relayed")?;
    ensure!(stage.shunt.engine_of(&stream)?.as_deref() != Some("handoff"));
    Ok(())
}

#[test]
fn one_behind_somebodys_nat_is_relayed_to_the_end() -> Result<()> {
    let stage = Stage::new("")?;
    let script = format!(
        "table ip other {{ chain pre {{ type nat hook prerouting priority dstnat; tcp dport 7999 dnat to {}; }}; }}",
        TO.listen()
    );
    kernel::nft_load(stage.lab.gateway(), stage.lab.dir(), &script)?;
    let to = SocketAddr::new(TO.listen().ip(), 7999);
    let mut stream = stage.lab.client().connect(to)?;
    echo(&mut stream, b"hello")?;
    wait_for("it is decided", SOON, || {
        let labels = [("route", TO.route()), ("result", "translated")];
        (stage.shunt.metrics().ok()?.value("shunt_handovers_total", &labels) >= 1.0).then_some(())
    })?;
    echo(&mut stream, b"still relayed")
}

#[test]
fn an_interface_that_comes_later_is_found() -> Result<()> {
    let stage = Stage::new("")?;
    let gateway = stage.lab.gateway();
    gateway.sh(
        "ip link add late type veth peer name late-peer && ip address add 10.99.0.1/24 dev late && ip link set late up",
    )?;
    let number = gateway.sh("cat /sys/class/net/late/ifindex || ip -o link show late | cut -d: -f1")?;
    let number = number.trim().to_owned();
    wait_until("the program is on it", SOON, || {
        let pins = stage.lab.pins().left().unwrap_or_default();
        let links = pins.iter().filter_map(|folder| std::fs::read_dir(folder.join("links")).ok()).flatten();
        links.flatten().any(|link| link.file_name().to_string_lossy().contains(&number))
    })
}

#[test]
fn conntrack_forgets_what_is_handed_over() -> Result<()> {
    let stage = Stage::new("")?;
    // Somebody tracks connections here.
    let script = "table ip other { chain in { type filter hook input priority 0; ct state established counter; }; }";
    kernel::nft_load(stage.lab.gateway(), stage.lab.dir(), script)?;
    let mut stream = stage.connect()?;
    wait_until("both entries are gone", SOON, || {
        let of = |port: u16| kernel::conntrack_list(stage.lab.gateway(), &format!("-p tcp --dport {port}"));
        [TO.listen().port(), TO.backend_port()].into_iter().all(|port| of(port).is_ok_and(|list| list.is_empty()))
    })?;
    echo(&mut stream, b"and it goes on")
}

#[test]
fn a_full_table_leaves_a_connection_with_the_daemon_until_there_is_room() -> Result<()> {
    let mut stage = Stage::new("")?;
    stage.shunt.terminate(SOON)?;
    ensure!(stage.shunt.cli(&["cleanup"])?.status.success());
    // The next daemon takes over what is pinned, with its sizes.
    let (pins, small) = (|| folder(stage.shunt.socket()), Sizes { flows: 2, events: 4096 });
    stage.lab.gateway().run(|| HandoffTable::open(&pins(), small).map(drop))?;
    stage.shunt.restart()?;
    let first = stage.connect()?;
    let _second = stage.connect()?;
    let mut third = stage.lab.client().connect(TO.listen())?;
    echo(&mut third, b"hello")?;
    let labels = [("route", TO.route()), ("result", "table_full")];
    wait_until("it is counted", SOON, || {
        stage.shunt.metrics().is_ok_and(|page| page.value("shunt_handovers_total", &labels) >= 1.0)
    })?;
    echo(&mut third, b"still relayed")?;
    ensure!(stage.shunt.engine_of(&third)?.as_deref() != Some("handoff"));
    ensure!(stage.shunt.cli(&["kill", &stage.id(&first)?])?.status.success());
    handed_over(&stage.shunt, &third)?;
    echo(&mut third, b"and now it is")
}

#[test]
fn the_first_route_that_hands_over_may_come_with_a_reload_which_is_refused_where_it_cannot() -> Result<()> {
    let lab = Lab::new()?;
    let _server = TcpServer::start(lab.backend(1), TO.backend_port(), Behaviour::Echo)?;
    let _other = TcpServer::start(lab.backend(1), Relay::Copy.backend_port(), Behaviour::Echo)?;
    let before = Relay::Copy.route_to(&[BACKEND], "");
    let both = format!("{before}{}", TO.route_to(&[BACKEND], ""));
    let mut shunt = Shunt::start(&lab, &before)?;
    let mut relayed = Relay::Copy.connect(&lab, &shunt)?;
    ensure!(lab.pins().left()?.is_empty() && shunt.cli_json(&["status"])?["handoff"].is_null(), "nothing needs it");
    let pins = shunt.socket().with_file_name("bpf");
    let mode = |mode: &str| lab.gateway().sh(&format!("mount -o remount,{mode} {}", pins.display()));
    mode("ro")?;
    shunt.write_config(&both)?;
    let refused = shunt.cli(&["reload"])?;
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && told.contains("connections cannot be handed over: mkdir"), "{told}");
    ensure!(lab.client().connect(TO.listen()).is_err(), "half of the reload is served");
    echo(&mut relayed, b"it goes on")?;
    mode("rw")?;
    shunt.reload(&both)?;
    let mut stream = TO.connect(&lab, &shunt)?;
    echo(&mut relayed, b"it goes on")?;
    let id = shunt.connection_of(&stream)?.context("it is not shown")?["id"].clone();
    ensure!(shunt.cli_json(&["status"])?["handoff"]["connections"] == 1);
    shunt.kill9();
    shunt.restart()?;
    ensure!(shunt.connection_of(&stream)?.context("it is not taken over")?["id"] == id);
    ensure!(shunt.cli(&["kill", id.as_str().context("no id")?])?.status.success());
    ensure!(end_of(&mut stream, SOON)? == End::Reset);
    Ok(())
}
