//! Certificates from a real ACME CA (Pebble), which looks at the names through the daemon's own listener.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use shunt_lab::{AcmeCa, AcmeOptions, Lab, Shunt, wait_for, wait_until};

/// An order takes a second; a machine that does much else may take longer.
const ISSUED: Duration = Duration::from_secs(30);

const PAGE: &str = "http { access_log off; server { listen 8080; location / { return 200 'page'; } } }";

/// A route on port 443 whose certificates come from the CA.
fn route(name: &str, sni: &[&str], more: &str) -> String {
    let also = if more.contains("match.") { String::new() } else { format!("match.sni = {sni:?}\n") };
    format!(
        "[[route]]\nname = \"{name}\"\nlisten = [\"10.88.1.1:443\"]\nbackends = [\"10.88.2.2:8080\"]\n{also}{more}\n\
         tls = {{ mode = \"terminate\", certificates = \"acme\" }}\n"
    )
}

fn curl(lab: &Lab, root: &Path, name: &str) -> Result<String> {
    let root = root.display();
    lab.client().sh(&format!("curl -sS --max-time 10 --cacert {root} --resolve {name}:443:10.88.1.1 https://{name}/"))
}

fn orders(shunt: &Shunt, result: &str) -> f64 {
    shunt.metrics().map_or(-1.0, |metrics| metrics.value("shunt_acme_orders_total", &[("result", result)]))
}

fn serial(lab: &Lab, name: &str) -> Result<String> {
    let seen = lab.client().sh(&format!(
        "echo | timeout 5 openssl s_client -connect 10.88.1.1:443 -servername {name} 2>/dev/null | openssl x509 -noout -serial"
    ))?;
    Ok(seen.trim().to_owned())
}

/// The status of `name`, as `shunt status --json` has it.
fn told(shunt: &Shunt, name: &str) -> Result<serde_json::Value> {
    let status = shunt.cli_json(&["status"])?;
    let names = status["acme"].as_array().context("acme")?;
    names.iter().find(|one| one["name"] == name).cloned().with_context(|| format!("no {name}: {status}"))
}

fn wait_issued(shunt: &Shunt, ca: &AcmeCa, count: f64) -> Result<()> {
    wait_until("it is issued", ISSUED, || orders(shunt, "ok") >= count)
        .with_context(|| format!("{}\n--- the CA wrote:\n{}", shunt.log(), ca.log()))
}

#[test]
fn a_file_and_nothing_else_makes_a_site_that_curl_trusts() -> Result<()> {
    let lab = Lab::new()?;
    let _nginx = lab.nginx_with(lab.backend(1), PAGE, 8080)?;
    let ca = lab.acme_ca(lab.backend(2), &AcmeOptions::default())?;
    let cache = lab.dir().join("cache");
    // The second one has no certificate when its challenge comes, and is told apart by a protocol that a CA does not speak.
    let config = [
        ca.section(&cache),
        "contact = [\"mailto:admin@example.com\"]\n".to_owned(),
        route("web", &["a.example", "b.example"], ""),
        route("h2", &[], "match.sni = [\"c.example\"]\nmatch.alpn = [\"h2\", \"http/1.1\"]"),
        "[[route]]\nname = \"rest\"\nlisten = [\"10.88.1.1:443\"]\nbackends = [\"10.88.2.2:8080\"]\n".to_owned(),
    ];
    let mut shunt = Shunt::start(&lab, &config.concat())?;
    wait_issued(&shunt, &ca, 3.0)?;
    let root = ca.root()?;
    for name in ["a.example", "b.example", "c.example"] {
        ensure!(curl(&lab, &root, name)? == "page", "{name}");
        let told = told(&shunt, name)?;
        ensure!(told["expires"].is_i64() && told["problem"].is_null(), "{told}");
    }
    ensure!(lab.client().curl("http://10.88.1.1:443/")? == b"page", "the others on the port are as they were");
    // The CA has been counted as what it was.
    let reasons = shunt.terminations("web")?;
    ensure!(reasons.get("challenge_answered") == Some(&2), "{reasons:?}");
    let expires = shunt.metrics()?.get("shunt_tls_certificate_expiry_seconds", &[]);
    ensure!(expires.is_some_and(|sum| sum > 3.0 * 1.7e9), "{expires:?}");
    // It answers a CA only while one looks.
    let after = lab.client().sh(
        "echo | timeout 5 openssl s_client -connect 10.88.1.1:443 -servername a.example -alpn acme-tls/1 2>&1 | \
         openssl x509 -noout -ext 1.3.6.1.5.5.7.1.31 2>&1 || true",
    )?;
    ensure!(!after.contains("critical"), "{after}");
    let mode = |path: &Path| fs::metadata(path).map(|found| found.permissions().mode() & 0o777);
    ensure!(mode(&cache)? == 0o700);
    for file in fs::read_dir(cache.join("10.88.2.3-14000-dir"))? {
        ensure!(mode(&file?.path())? == 0o600);
    }
    // A restart uses what is there, without a word to the CA.
    let (before, asked) = (serial(&lab, "a.example")?, ca.requests());
    shunt.terminate(Duration::from_secs(40))?;
    shunt.restart()?;
    ensure!(curl(&lab, &root, "c.example")? == "page");
    wait_until("all three are told", ISSUED, || told(&shunt, "b.example").is_ok_and(|one| one["expires"].is_i64()))?;
    ensure!(serial(&lab, "a.example")? == before && ca.requests() == asked, "{}", ca.log());
    let text = String::from_utf8(shunt.cli(&["status"])?.stdout)?;
    ensure!(text.contains("3 of 3 certificates issued"), "{text}");
    Ok(())
}
