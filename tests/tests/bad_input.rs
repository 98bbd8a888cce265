//! One clear error each, the right exit code, the kernel untouched.

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt, process::Output, time::Duration};

use anyhow::{Result, ensure};
use shunt_lab::{
    Lab, Running, Shunt,
    scripted::{Behaviour, TcpServer},
    shunt_binary,
};

const WEB: &str = "[[route]]\nname = \"web\"\nlisten = [\"10.88.1.1:80\"]\nbackends = [\"10.88.2.2:80\"]\n";

/// Runs `shunt run` on the gateway with this text as its file.
fn run(lab: &Lab, name: &str, config: &str) -> Result<Output> {
    let file = lab.dir().join(format!("{name}.toml"));
    let socket = lab.dir().join(format!("{name}.sock"));
    let admin = format!("[admin]\nlisten = \"off\"\nsocket = {socket:?}\n");
    fs::write(&file, if config.contains("[admin]") { config.to_owned() } else { format!("{admin}{config}") })?;
    Ok(lab.gateway().command(shunt_binary()?).arg("run").arg("--config").arg(&file).output()?)
}

fn refused(output: &Output, code: i32, words: &[&str]) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code), "exit {:?}, wanted {code}: {said}", output.status.code());
    for word in words {
        ensure!(said.contains(word), "{word:?} is missing in: {said}");
    }
    ensure!(said.contains("mend:"), "how to mend it is missing in: {said}");
    ensure!(!said.contains("panicked"), "{said}");
    Ok(())
}

#[test]
fn a_file_that_cannot_be_served_leaves_the_kernel_untouched() -> Result<()> {
    let lab = Lab::builder().forwarding(false).build()?;
    let cases: [(&str, &str, &[&str]); 6] = [
        ("broken", "[[route]\n", &["broken.toml:4"]),
        ("unknown", &format!("{WEB}colour = \"red\"\n"), &["unknown.toml:8", "colour"]),
        ("overlap", &format!("{WEB}{}", WEB.replace("\"web\"", "\"web2\"")), &["\"web\"", "\"web2\"", "10.88.1.1:80"]),
        ("range", &WEB.replace(":80\"]\nb", ":70000\"]\nb"), &["70000", "65535"]),
        (
            "stream",
            &format!("{WEB}engine = \"nft\"\nproxy_protocol = {{ send = \"v2\" }}\n"),
            &["\"web\"", "proxy_protocol.send"],
        ),
        ("forced", &format!("{WEB}engine = \"handoff\"\nprotocol = \"udp\"\n"), &["\"web\"", "handoff", "TCP only"]),
    ];
    for (name, config, words) in cases {
        refused(&run(&lab, name, config)?, 1, words)?;
        // And before anybody runs it.
        let file = lab.dir().join(format!("{name}.toml"));
        refused(&lab.gateway().command(shunt_binary()?).arg("check").arg(file).output()?, 1, words)?;
    }
    ensure!(lab.gateway().sh("nft list ruleset")?.trim().is_empty(), "a table was made");
    assert_eq!(lab.gateway().sysctl("net.ipv4.ip_forward")?.trim(), "0");
    Ok(())
}

#[test]
fn a_missing_file_and_a_missing_daemon_have_their_exit_codes() -> Result<()> {
    let lab = Lab::new()?;
    let shunt = shunt_binary()?;
    let missing = lab.gateway().command(&shunt).args(["run", "--config", "/nonexistent/shunt.toml"]).output()?;
    refused(&missing, 1, &["/nonexistent/shunt.toml"])?;
    let nobody = lab.gateway().command(&shunt).args(["status", "--socket", "/nonexistent/admin.sock"]).output()?;
    refused(&nobody, 3, &["/nonexistent/admin.sock"])?;
    assert_eq!(lab.gateway().command(&shunt).arg("nonsense").output()?.status.code(), Some(2));
    Ok(())
}

#[test]
fn a_second_daemon_is_refused_and_the_first_is_not_disturbed() -> Result<()> {
    let lab = Lab::new()?;
    let first = Shunt::start(&lab, WEB)?;
    let before = lab.gateway().sh("nft -s list table inet shunt")?;
    // On the same socket.
    let again = lab.gateway().command(shunt_binary()?).arg("run").arg("--config").arg(first.config_file()).output()?;
    refused(&again, 1, &["another shunt daemon", &first.pid()?.to_string()])?;
    // On a socket of its own: the table has an owner.
    refused(&run(&lab, "second", &WEB.replace("web", "other"))?, 1, &["table inet shunt"])?;
    // The TCP address is taken.
    let taken = format!("[admin]\nlisten = \"127.0.0.1:9900\"\nsocket = {:?}\n{WEB}", lab.dir().join("third.sock"));
    refused(&run(&lab, "third", &taken)?, 1, &["127.0.0.1:9900"])?;
    assert_eq!(before, lab.gateway().sh("nft -s list table inet shunt")?);
    ensure!(first.cli_json(&["status"])?["ready"] == true);
    Ok(())
}

#[test]
fn without_privilege_it_says_which_and_exits_4() -> Result<()> {
    let lab = Lab::new()?;
    // Build and scratch folders may be closed to other users.
    let open = tempfile::tempdir()?;
    fs::set_permissions(open.path(), fs::Permissions::from_mode(0o777))?;
    let (binary, file) = (open.path().join("shunt"), open.path().join("shunt.toml"));
    fs::copy(shunt_binary()?, &binary)?;
    fs::write(&file, format!("[admin]\nlisten = \"off\"\nsocket = \"admin.sock\"\n{WEB}"))?;
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"];
    let mut command = lab.gateway().command("setpriv");
    let output = command.args(nobody).arg(&binary).arg("run").arg("--config").arg(&file).output()?;
    refused(&output, 4, &["CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"])
}

#[test]
fn relayed_routes_on_high_ports_need_no_privilege() -> Result<()> {
    let lab = Lab::new()?;
    let open = tempfile::tempdir()?;
    fs::set_permissions(open.path(), fs::Permissions::from_mode(0o777))?;
    let (binary, file, socket) =
        (open.path().join("shunt"), open.path().join("shunt.toml"), open.path().join("admin.sock"));
    fs::copy(shunt_binary()?, &binary)?;
    let high = WEB.replace("10.88.1.1:80", "10.88.1.1:8080");
    fs::write(&file, format!("[admin]\nlisten = \"off\"\nsocket = {socket:?}\n{high}"))?;
    let mut command = lab.gateway().command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
    command.arg(&binary).arg("run").arg("--config").arg(&file);
    let mut running = Running::start("shunt", command, lab.dir())?;
    let status = || {
        let asked = lab.gateway().command(&binary).args(["status", "--json", "--socket"]).arg(&socket).output();
        asked.map(|asked| String::from_utf8_lossy(&asked.stdout).into_owned()).unwrap_or_default()
    };
    running.wait_ready(Duration::from_secs(10), || status().contains("\"ready\": true"))?;
    ensure!(status().contains("CAP_NET_ADMIN is missing"), "it says that the kernel could do it: {}", status());
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    lab.client().connect_within(SocketAddr::from(([10, 88, 1, 1], 8080)), Duration::from_secs(5))?;
    ensure!(running.terminate(Duration::from_secs(5))?.success());
    Ok(())
}

#[test]
fn cap_net_admin_alone_is_enough() -> Result<()> {
    let lab = Lab::new()?;
    let open = tempfile::tempdir()?;
    fs::set_permissions(open.path(), fs::Permissions::from_mode(0o777))?;
    let (binary, file, socket) =
        (open.path().join("shunt"), open.path().join("shunt.toml"), open.path().join("admin.sock"));
    fs::copy(shunt_binary()?, &binary)?;
    fs::write(&file, format!("[admin]\nlisten = \"off\"\nsocket = {socket:?}\n{WEB}"))?;
    let caps = ["--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--bounding-set=-all,+net_admin"];
    let mut command = lab.gateway().command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).args(caps);
    let mut running = Running::start(
        "shunt",
        {
            command.arg(&binary).arg("run").arg("--config").arg(&file);
            command
        },
        lab.dir(),
    )?;
    let ready = || {
        let status = lab.gateway().command(&binary).args(["status", "--json", "--socket"]).arg(&socket).output();
        status.is_ok_and(|s| s.status.success() && String::from_utf8_lossy(&s.stdout).contains("\"ready\": true"))
    };
    running.wait_ready(Duration::from_secs(10), ready)?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    lab.client().connect_within(SocketAddr::from(([10, 88, 1, 1], 80)), Duration::from_secs(5))?;
    ensure!(running.terminate(Duration::from_secs(5))?.success());
    Ok(())
}

#[test]
fn cleanup_puts_back_what_was_changed_and_leaves_what_others_have() -> Result<()> {
    let lab = Lab::builder().forwarding(false).build()?;
    lab.gateway().sh("nft add table inet mine; nft add chain inet mine c")?;
    let mut shunt = Shunt::start(
        &lab,
        &format!("{WEB}[[route]]\nname = \"six\"\nlisten = [\"[fd88:1::1]:80\"]\nbackends = [\"[fd88:2::2]:80\"]\n"),
    )?;
    let keys = [
        "net.ipv4.ip_forward",
        "net.ipv6.conf.all.forwarding",
        "net.netfilter.nf_conntrack_acct",
        "net.netfilter.nf_conntrack_timestamp",
    ];
    for key in keys {
        assert_eq!(lab.gateway().sysctl(key)?.trim(), "1", "{key}");
    }
    let busy = shunt.cli(&["cleanup"])?;
    refused(&busy, 1, &["running"])?;
    shunt.terminate(Duration::from_secs(5))?;
    ensure!(lab.gateway().sh("nft list tables")?.contains("inet shunt"), "stopping leaves the table");
    let cleaned = shunt.cli(&["cleanup"])?;
    ensure!(cleaned.status.success(), "{}", String::from_utf8_lossy(&cleaned.stderr));
    println!("{}", String::from_utf8_lossy(&cleaned.stdout));
    assert_eq!(lab.gateway().sh("nft list tables")?.trim(), "table inet mine");
    for key in keys {
        assert_eq!(lab.gateway().sysctl(key)?.trim(), "0", "{key}");
    }
    let nothing = shunt.cli(&["cleanup"])?;
    ensure!(nothing.status.success());
    Ok(())
}
