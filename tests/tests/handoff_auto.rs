//! `engine = "auto"` and the engine `handoff`: where it is taken, where it is not and who is told, and that nothing which is
//! missing for it keeps a daemon from serving.

use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_userspace::handoff::folder;
use serde_json::Value;
use shunt_lab::{
    GATEWAY, Lab, Shunt,
    dialog::echo,
    relay::handed_over,
    scripted::{Behaviour, TcpServer},
    shunt_binary, wait_until, web,
};

const SOON: Duration = Duration::from_secs(10);
/// A route that needs a decision for each connection, and nothing else of the daemon.
const DECIDES: &str = "balance = \"least-connections\"";

fn to() -> SocketAddr {
    SocketAddr::from((GATEWAY, 80))
}

fn stage() -> Result<(Lab, TcpServer)> {
    let lab = Lab::builder().backends(1).build()?;
    let server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    Ok((lab, server))
}

fn connect(lab: &Lab) -> Result<TcpStream> {
    let mut stream = lab.client().connect(to())?;
    echo(&mut stream, b"hello")?;
    Ok(stream)
}

/// What `shunt explain` says: of a route why not `handoff`, or of a connection.
fn why_not(shunt: &Shunt, route: &str) -> Result<String> {
    let explained = shunt.cli_json(&["explain", route])?;
    let refused = explained["refused"].as_array().context("refused")?;
    let reasons: Vec<&str> =
        refused.iter().filter(|one| one["engine"] == "handoff").filter_map(|one| one["reason"].as_str()).collect();
    Ok(reasons.join("; "))
}

fn engine(shunt: &Shunt) -> Result<Value> {
    Ok(shunt.route("web")?["engine"].clone())
}

/// Where the daemon pins what it hands connections over with.
fn pins(lab: &Lab) -> PathBuf {
    let socket = lab.dir().join("shunt.sock");
    lab.gateway().run(|| folder(&socket))
}

#[test]
fn auto_hands_over_until_somebody_filters_and_again_when_nobody_does_and_no_connection_notices() -> Result<()> {
    let (lab, _server) = stage()?;
    let shunt = Shunt::start(&lab, &web(DECIDES))?;
    let mut first = connect(&lab)?;
    handed_over(&shunt, &first)?;
    lab.gateway().sh(
        "nft 'add table ip firewall; add chain ip firewall fw { type filter hook forward priority 7; policy drop; }'",
    )?;
    // Until it is told to look, the daemon knows of nothing, and says so.
    let reload = shunt.reload(&web(DECIDES))?;
    ensure!(reload["changed"] == serde_json::json!(["web"]) && engine(&shunt)? == "splice", "{reload}");
    let chain = "chain fw of table ip firewall (hook forward, priority 7)";
    let why = why_not(&shunt, "web")?;
    ensure!(why.contains(chain) && why.contains("engine = \"handoff\""), "{why}");
    let config = shunt.config_file().to_str().context("path")?;
    let planned = shunt.cli(&["plan", config])?;
    let planned = String::from_utf8_lossy(&planned.stdout).into_owned();
    ensure!(planned.contains("not be seen by") && planned.contains(chain), "{planned}");
    let doctor = shunt.cli(&["doctor", "--json", "--config", config])?;
    let doctor: Value = serde_json::from_slice(&doctor.stdout)?;
    let checks = doctor["checks"].as_array().context("checks")?;
    let check = checks.iter().find(|check| check["name"] == "firewall and handoff").context("no check of it")?;
    let found = check["found"].as_str().unwrap_or_default();
    ensure!(check["state"] == "warn" && found.contains(chain), "{check}");
    ensure!(check["mend"][0].as_str().is_some_and(|mend| mend.contains("engine = \"handoff\"")), "{check}");
    let mut second = connect(&lab)?;
    echo(&mut first, b"handed over before, and it goes on")?;
    // Somebody who asks for it gets it all the same.
    shunt.reload(&web(&format!("{DECIDES}\nengine = \"handoff\"")))?;
    let mut third = connect(&lab)?;
    handed_over(&shunt, &third)?;
    shunt.reload(&web(DECIDES))?;
    lab.gateway().sh("nft delete table ip firewall")?;
    shunt.reload(&web(DECIDES))?;
    ensure!(engine(&shunt)? == "handoff");
    let mut fourth = connect(&lab)?;
    handed_over(&shunt, &fourth)?;
    for stream in [&mut first, &mut second, &mut third, &mut fourth] {
        echo(stream, b"goes on")?;
    }
    let second = shunt.connection_of(&second)?.context("it is not shown")?;
    ensure!(second["engine"] != "handoff", "{second}");
    let explained = shunt.cli(&["explain", second["id"].as_str().context("id")?])?;
    let explained = String::from_utf8_lossy(&explained.stdout).into_owned();
    ensure!(explained.contains("not handed over: it began before its route handed connections over"), "{explained}");
    Ok(())
}

#[test]
fn a_connection_that_cannot_be_handed_over_says_why_when_asked() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _server = TcpServer::start(lab.gateway(), 81, Behaviour::Echo)?;
    let here = web(DECIDES).replace("10.88.2.2:80", "10.88.1.1:81");
    let shunt = Shunt::start(&lab, &here)?;
    ensure!(engine(&shunt)? == "handoff", "an address of this machine shows when it is dialled");
    let stream = connect(&lab)?;
    let id = shunt.connection_of(&stream)?.context("it is not shown")?["id"].clone();
    let id = id.as_str().context("id")?;
    wait_until("explain says why", SOON, || {
        let explained = shunt.cli_json(&["explain", id]);
        explained.is_ok_and(|explained| {
            let why = explained["connection"]["not_handed_over"].as_str();
            why == Some("one end is on this machine: its packets come by no interface")
        })
    })
}

#[test]
fn without_a_bpf_file_system_auto_relays_and_who_insists_is_refused() -> Result<()> {
    let (lab, _server) = stage()?;
    let script = format!(
        "#!/bin/sh\nexec unshare -m sh -c 'umount {}; mount -t tmpfs none /sys/fs/bpf; exec {} \"$@\"' sh \"$@\"\n",
        lab.dir().join("bpf").display(),
        shunt_binary()?.display()
    );
    let binary = lab.dir().join("without-bpf");
    fs::write(&binary, script)?;
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755))?;
    let shunt = Shunt::builder().binary(&binary).start(&lab, &web(DECIDES))?;
    ensure!(engine(&shunt)? == "splice");
    let why = why_not(&shunt, "web")?;
    ensure!(why.contains("mount -t bpf bpf /sys/fs/bpf"), "{why}");
    let mut stream = connect(&lab)?;
    // Nor does a reload mind; one that insists is refused, and changes nothing.
    shunt.reload(&web(&format!("{DECIDES}\nallow = [\"10.88.0.0/16\"]")))?;
    shunt.write_config(&web("engine = \"handoff\""))?;
    let refused = shunt.cli(&["reload"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(1) && said.contains("no BPF file system"), "{said}");
    echo(&mut stream, b"goes on")?;
    connect(&lab).map(drop)
}

#[test]
fn what_cannot_be_brought_up_though_the_kernel_could_is_no_reason_to_refuse_either() -> Result<()> {
    let (lab, _server) = stage()?;
    // Something of somebody else is where the pins would be.
    let in_the_way = pins(&lab).join("ABI");
    fs::create_dir_all(&in_the_way)?;
    let shunt = Shunt::start(&lab, &web(DECIDES))?;
    let not_brought_up = |shunt: &Shunt| -> Result<()> {
        let why = why_not(shunt, "web")?;
        ensure!(engine(shunt)? == "splice" && why.contains("it could not be brought up"), "{why}");
        connect(&lab).map(drop)
    };
    not_brought_up(&shunt)?;
    ensure!(shunt.log().contains("connections cannot be handed over"), "{}", shunt.log());
    // Nor by a reload.
    shunt.reload(&web("engine = \"copy\""))?;
    let mut staying = connect(&lab)?;
    shunt.reload(&web(DECIDES))?;
    not_brought_up(&shunt)?;
    shunt.write_config(&web("engine = \"handoff\""))?;
    let refused = shunt.cli(&["reload"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(1) && said.contains("connections cannot be handed over"), "{said}");
    // The next one finds what was in the way gone.
    fs::remove_dir(&in_the_way)?;
    shunt.reload(&web(DECIDES))?;
    handed_over(&shunt, &connect(&lab)?)?;
    echo(&mut staying, b"relayed all the time")
}

/// A process that has `table inet shunt` for itself, so that no other can change it.
fn occupy(lab: &Lab) -> Result<Child> {
    let mut nft = lab.gateway().command("nft").arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let stdin = nft.stdin.as_mut().context("stdin")?;
    stdin.write_all(b"add table inet shunt { flags owner; }\n")?;
    stdin.flush()?;
    wait_until("the table is taken", SOON, || {
        lab.gateway().sh("nft list tables").is_ok_and(|tables| tables.contains("inet shunt"))
    })?;
    Ok(nft)
}

#[test]
fn a_reload_that_fails_takes_away_again_what_it_brought_up_to_hand_over_with() -> Result<()> {
    const RESERVED: &str = "net.ipv4.ip_local_reserved_ports";
    let (lab, _server) = stage()?;
    let copy = web("engine = \"copy\"");
    let shunt = Shunt::start(&lab, &copy)?;
    let threads = || -> Result<Vec<String>> {
        let tasks = fs::read_dir(format!("/proc/{}/task", shunt.pid()?))?;
        let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
        let mut names: Vec<String> = names.map(|name| name.trim().to_owned()).collect();
        // Of the pool for blocking calls, which come and go.
        names.retain(|name| !name.starts_with("tokio"));
        names.sort();
        Ok(names)
    };
    let before = (threads()?, lab.gateway().sysctl(RESERVED)?, lab.gateway().sysctl("net.ipv4.ip_forward")?);
    let mut held = connect(&lab)?;
    // The table cannot be made, which shows when everything else is ready.
    let mut nft = occupy(&lab)?;
    let forwarded = web("").replace("\"web\"", "\"plain\"").replace("10.88.1.1:80", "10.88.1.1:81");
    let wanted = web(DECIDES) + &forwarded;
    shunt.write_config(&wanted)?;
    let refused = shunt.cli(&["reload"])?;
    ensure!(refused.status.code() == Some(1), "{}", String::from_utf8_lossy(&refused.stderr));
    ensure!(lab.pins().left()?.is_empty(), "{:?}", lab.pins().left()?);
    ensure!(shunt.cli_json(&["status"])?["handoff"].is_null(), "{}", shunt.cli_json(&["status"])?);
    let settings = (lab.gateway().sysctl(RESERVED)?, lab.gateway().sysctl("net.ipv4.ip_forward")?);
    ensure!(settings == (before.1, before.2), "{settings:?}");
    wait_until("its threads are gone", SOON, || threads().is_ok_and(|now| now == before.0))
        .with_context(|| format!("{:?} and now {:?}", before.0, threads()))?;
    echo(&mut held, b"goes on")?;
    // The same once more, and then nothing is in its way.
    ensure!(shunt.cli(&["reload"])?.status.code() == Some(1));
    drop(nft.stdin.take());
    nft.wait()?;
    shunt.reload(&wanted)?;
    handed_over(&shunt, &connect(&lab)?)?;
    ensure!(!lab.pins().left()?.is_empty());
    echo(&mut held, b"goes on")
}

#[test]
fn what_a_daemon_before_handed_over_is_taken_over_by_the_reload_that_can() -> Result<()> {
    let (lab, _server) = stage()?;
    let mut shunt = Shunt::start(&lab, &web(DECIDES))?;
    let mut stream = connect(&lab)?;
    handed_over(&shunt, &stream)?;
    let id = shunt.connection_of(&stream)?.context("it is not shown")?["id"].clone();
    shunt.kill9();
    let (pins, away) = (pins(&lab), pins(&lab).with_file_name("away"));
    fs::rename(&pins, &away)?;
    fs::create_dir_all(pins.join("ABI"))?;
    shunt.restart()?;
    ensure!(engine(&shunt)? == "splice" && shunt.connection_of(&stream)?.is_none());
    echo(&mut stream, b"it needs no daemon")?;
    fs::remove_dir_all(&pins)?;
    fs::rename(&away, &pins)?;
    shunt.reload(&web(DECIDES))?;
    handed_over(&shunt, &stream)?;
    let shown = shunt.connection_of(&stream)?.context("it is not shown")?;
    ensure!(shown["id"] == id && shown["route"] == "web", "{shown}, before {id}");
    echo(&mut stream, b"and goes on")
}
