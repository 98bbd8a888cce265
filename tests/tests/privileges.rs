//! A daemon that is not root and has `CAP_BPF` and `CAP_NET_ADMIN` alone: which engines serve, and what it says of the others.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shunt_lab::{
    GATEWAY, Lab, Shunt,
    dialog::echo,
    kernel,
    relay::{Relay, on_each},
    scripted::{Behaviour, TcpServer},
    shunt_binary, wait_until,
};

const SOON: Duration = Duration::from_secs(10);
/// `linux/capability.h`: bits of `CAP_NET_ADMIN` and `CAP_BPF`.
const BOTH: u64 = 1 << 12 | 1 << 39;

/// One route for each engine that these privileges are for.
fn routes() -> String {
    let joined = Relay::Joined.route_to(&[[10, 88, 2, 2].into()], "");
    format!(
        "{joined}[[route]]\nname = \"many\"\nlisten = [\"{GATEWAY}:20000-29999\"]\nengine = \"splice\"\nbackends = [\"10.88.2.2:7\"]\n\
         [[route]]\nname = \"fast\"\nlisten = [\"{GATEWAY}:80\"]\nengine = \"nft\"\nbackends = [\"10.88.2.2:7\"]\n"
    )
}

/// The daemon's program, run by a user who is nobody with the two privileges.
fn restricted(lab: &Lab) -> Result<PathBuf> {
    // Build and scratch folders may be closed to other users.
    fs::set_permissions(lab.dir(), fs::Permissions::from_mode(0o777))?;
    let program = lab.dir().join("program");
    fs::copy(shunt_binary()?, &program)?;
    let caps = "-all,+bpf,+net_admin";
    let script = format!(
        "#!/bin/sh\nexec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps={caps} --ambient-caps={caps} \
         --bounding-set={caps} {} \"$@\"\n",
        program.display()
    );
    executable(&lab.dir().join("restricted"), &script)
}

fn executable(path: &Path, text: &str) -> Result<PathBuf> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(path.to_owned())
}

#[test]
fn sockets_are_joined_ranges_led_and_packets_forwarded_without_root() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let _servers = [Relay::Joined.backend_port(), 7]
        .map(|port| TcpServer::start(lab.backend(1), port, Behaviour::Echo))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let shunt = Shunt::builder().binary(&restricted(&lab)?).start(&lab, &routes())?;
    let status = fs::read_to_string(format!("/proc/{}/status", shunt.pid()?))?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    ensure!(field("Uid:").is_some_and(|uid| uid.starts_with("65534")), "{status}");
    ensure!(field("CapEff:") == Some(&format!("{BOTH:016x}")), "{status}");
    // The sockets of a connection are joined by the kernel.
    on_each(&[Relay::Joined], |relay| echo(&mut relay.connect(&lab, &shunt)?, b"joined"))?;
    // 10,000 ports are led to one socket.
    for port in [20_000, 24_680, 29_999] {
        echo(&mut lab.client().connect((GATEWAY, port))?, b"led")?;
    }
    let explained = String::from_utf8(shunt.cli(&["explain", "many"])?.stdout)?;
    ensure!(explained.contains("led to one socket per worker (sk_lookup)"), "{explained}");
    // nftables forwards.
    echo(&mut lab.client().connect((GATEWAY, 80))?, b"forwarded")?;
    wait_until("it is counted", SOON, || shunt.route("fast").is_ok_and(|fast| fast["connections_total"] == 1))
}

#[test]
fn what_two_privileges_do_not_allow_is_named_by_doctor_and_plan() -> Result<()> {
    let lab = Lab::builder().backends(1).build()?;
    let binary = restricted(&lab)?;
    let report = lab.gateway().command(&binary).args(["doctor", "--json"]).output()?;
    let report: Value = serde_json::from_slice(&report.stdout).context("doctor --json")?;
    let checks = report["checks"].as_array().context("checks")?;
    let check = |name: &str| -> Result<(&str, &str)> {
        let check = checks.iter().find(|check| check["name"] == name).with_context(|| format!("{name}: {report}"))?;
        Ok((check["state"].as_str().unwrap_or_default(), check["found"].as_str().unwrap_or_default()))
    };
    for works in ["CAP_NET_ADMIN", "CAP_BPF", "eBPF"] {
        ensure!(check(works)?.0 == "ok", "{works}: {:?}", check(works));
    }
    // Older verifiers ask for a third: 6.1 takes a number on the stack for a pointer, 6.12 does not.
    for works in ["eBPF self-probe", "sockmap self-probe", "port ranges"] {
        let (state, found) = check(works)?;
        let excused = match works {
            "sockmap self-probe" => kernel::older_than(6, 1),
            _ => kernel::older_than(6, 12) && found.contains("CAP_PERFMON"),
        };
        ensure!(state == "ok" || excused, "{works}: {state} {found}");
    }
    let (state, why) = check("handoff")?;
    ensure!(state == "warn" && why.contains("CAP_NET_RAW"), "{state} {why}");

    let file = lab.dir().join("plan.toml");
    fs::write(&file, routes() + &Relay::Handoff.route_to(&[[10, 88, 2, 2].into()], ""))?;
    let planned = lab.gateway().command(&binary).arg("plan").arg(&file).output()?;
    let said = [planned.stdout, planned.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(planned.status.code() == Some(1), "{:?} {said}", planned.status);
    ensure!(said.contains("handoff") && said.contains("CAP_NET_RAW"), "{said}");
    ensure!(!said.contains("\"joined\": no engine") && !said.contains("\"many\": no engine"), "{said}");
    Ok(())
}
