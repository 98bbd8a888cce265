//! Clients that break the rules of TLS, one rule each: `tests/conformance`, driven with tlslite-ng from PyPI.
//!
//! `cargo xtask test breaks_the_rules -- --ignored --nocapture`; with `SHUNT_BLESS=1` it writes `docs/tls-conformance.md`.

use std::{env, fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt, run,
    scripted::{Behaviour, TcpServer},
};

/// A Python with what `requirements.txt` pins, made once.
fn python(workspace: &Path) -> Result<String> {
    let (venv, wanted) = (workspace.join("target/conformance"), workspace.join("tests/conformance/requirements.txt"));
    let python = venv.join("bin/python").display().to_string();
    if !Path::new(&python).exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    }
    run(Command::new(&python).args(["-m", "pip", "install", "-q", "-r"]).arg(wanted))?;
    Ok(python)
}

#[test]
#[ignore = "needs a package of PyPI"]
fn a_client_that_breaks_the_rules_is_told_which() -> Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?;
    let python = python(workspace)?;
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    pki.issue("rsa", "rsa", "web.example")?;
    let _server = TcpServer::start(lab.backend(1), 7, Behaviour::Echo)?;
    let route = |name: &str, port: u16, more: &str| {
        let ends = pki.terminate(&["web", "rsa"], more);
        format!("[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:{port}\"]\nbackends = [\"10.88.2.2:7\"]\n{ends}")
    };
    let config = format!("{}{}", route("any", 443, ""), route("alpn", 444, "alpn = [\"h2\", \"http/1.1\"]"));
    let shunt = Shunt::start(&lab, &config)?;
    let mut command = lab.client().command(python);
    command.arg("run.py").args(["10.88.1.1", "443"]).current_dir(workspace.join("tests/conformance"));
    let output = command.output().context("the driver")?;
    let (table, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{table}{said}");
    ensure!(output.status.success(), "something is heard that nobody knows of");
    let internal = shunt.metrics()?.value("shunt_terminations_total", &[("reason", "internal_error")]);
    ensure!(internal == 0.0 && !shunt.log().contains("panicked"), "{}", shunt.log());
    if env::var_os("SHUNT_BLESS").is_some() {
        let head = include_str!("../conformance/head.md");
        fs::write(workspace.join("docs/tls-conformance.md"), format!("{head}\n{table}"))?;
    }
    Ok(())
}
