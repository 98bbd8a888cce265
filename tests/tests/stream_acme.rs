//! Certificates from a real ACME CA (Pebble), which looks at the names through the daemon's own listener.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use shunt_lab::{AcmeCa, AcmeOptions, Lab, Shunt, from_base64url, wait_until};

/// An order takes a second; a machine that does much else may take longer.
const ISSUED: Duration = Duration::from_secs(60);

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
    ensure!(reasons.get("challenge_answered").is_some_and(|count| *count >= 2), "{reasons:?}");
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

#[test]
fn certificates_are_renewed_while_clients_come_and_none_is_turned_away() -> Result<()> {
    let lab = Lab::new()?;
    let page = PAGE.replace("location", "location /large { alias /; } location");
    let _nginx = lab.nginx_with(lab.backend(1), &page, 8080)?;
    // Due for renewal after some ten seconds.
    let ca = lab.acme_ca(lab.backend(2), &AcmeOptions { validity: Some(16), ..Default::default() })?;
    let cache = lab.dir().join("cache");
    let shunt = Shunt::start(&lab, &format!("{}{}", ca.section(&cache), route("web", &["a.example"], "")))?;
    wait_issued(&shunt, &ca, 1.0)?;
    let (root, stop) = (ca.root()?, lab.dir().join("stop"));
    let first = serial(&lab, "a.example")?;
    let get = format!("curl -sS --max-time 5 --cacert {} --resolve a.example:443:10.88.1.1", root.display());
    // One after the other, each with a handshake of its own that verifies the certificate …
    let clients = format!(
        "n=0; until [ -e {} ]; do [ \"$({get} https://a.example/)\" = page ] || exit 1; n=$((n+1)); done; echo $n",
        stop.display()
    );
    // … and one connection that is there before the first renewal and after the second.
    let stays = format!(
        "(printf 'GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n'; until [ -e {} ]; do sleep 0.1; done; \
         printf 'GET / HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n'; sleep 0.5) | \
         timeout 60 openssl s_client -quiet -connect 10.88.1.1:443 -servername a.example 2>/dev/null | grep -c page",
        stop.display()
    );
    let (counts, answers) = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| lab.client().sh(&clients))).collect();
        let stays = scope.spawn(|| lab.client().sh(&stays));
        let renewed = wait_issued(&shunt, &ca, 3.0).and_then(|()| {
            wait_until("the last one is served", ISSUED, || serial(&lab, "a.example").is_ok_and(|now| now != first))
        });
        let stopped = fs::write(&stop, "");
        let counts: Result<Vec<String>> = clients.into_iter().map(|one| one.join().expect("no panic")).collect();
        let stays = stays.join().expect("no panic");
        renewed.and(stopped.context("stop")).and(counts).and_then(|counts| Ok((counts, stays?)))
    })
    .with_context(|| shunt.log())?;
    println!("handshakes of two clients through two renewals: {counts:?}");
    ensure!(answers.trim() == "2", "the connection that stayed: {answers}");
    let reasons = shunt.terminations("web")?;
    // A client that has its page may leave before it has read the last words of TLS: then its kernel sends a reset.
    let fine =
        |reason: &str| reason.starts_with("finished_") || ["challenge_answered", "reset_by_client"].contains(&reason);
    ensure!(reasons.keys().all(|reason| fine(reason)), "{reasons:?}");
    ensure!(Outcomes::of(&shunt)?.failed() == 0.0);
    Ok(())
}

/// `shunt_acme_orders_total` by result.
struct Outcomes(shunt_lab::Metrics);

impl Outcomes {
    fn of(shunt: &Shunt) -> Result<Self> {
        Ok(Self(shunt.metrics()?))
    }

    fn failed(&self) -> f64 {
        let all = self.0.value("shunt_acme_orders_total", &[]);
        all - self.0.value("shunt_acme_orders_total", &[("result", "ok")])
    }
}

#[test]
fn a_ca_that_is_down_is_asked_now_and_then_and_nobody_else_notices() -> Result<()> {
    let lab = Lab::new()?;
    let _nginx = lab.nginx_with(lab.backend(1), PAGE, 8080)?;
    let mut ca = lab.acme_ca(lab.backend(2), &AcmeOptions::default())?;
    ca.stop();
    let cache = lab.dir().join("cache");
    let plain = "[[route]]\nname = \"plain\"\nlisten = [\"10.88.1.1:443\"]\nbackends = [\"10.88.2.2:8080\"]\n";
    let config = format!("{}{}{plain}", ca.section(&cache), route("web", &["a.example", "b.example"], ""));
    let shunt = Shunt::start(&lab, &config)?;
    wait_until("it was tried", ISSUED, || orders(&shunt, "unreachable") == 1.0)?;
    let one = told(&shunt, "a.example")?;
    let again = one["next_order_seconds"].as_i64().context("next_order_seconds")?;
    ensure!((5..=13).contains(&again), "one name holds up both, for ten seconds and a quarter: {one}");
    ensure!(told(&shunt, "b.example")?["next_order_seconds"].as_i64().is_some_and(|other| (other - again).abs() <= 1));
    // Nobody waits in vain, and it is said why.
    let began = std::time::Instant::now();
    let refused = lab
        .client()
        .sh("curl -sS --max-time 10 -k --resolve a.example:443:10.88.1.1 https://a.example/ 2>&1 || true")?;
    ensure!(refused.contains("alert internal error") && began.elapsed() < Duration::from_secs(3), "{refused}");
    shunt.wait_ended("web", &[("certificate_pending", 1)], ISSUED)?;
    let status = shunt.cli_json(&["status"])?;
    let warnings = status["warnings"].to_string();
    ensure!(warnings.contains("\\\"a.example\\\" has no certificate yet: the CA cannot be talked to"), "{warnings}");
    ensure!(warnings.contains("Connection refused") && warnings.contains("tried again in"), "{warnings}");
    for _ in 0..50 {
        ensure!(lab.client().curl("http://10.88.1.1:443/")? == b"page");
    }
    ca.start(&lab)?;
    wait_issued(&shunt, &ca, 2.0)?;
    ensure!(orders(&shunt, "unreachable") <= 2.0, "it was not asked more often than it said");
    ensure!(curl(&lab, &ca.root()?, "a.example")? == "page");
    let warnings = shunt.cli_json(&["status"])?["warnings"].to_string();
    ensure!(!warnings.contains("certificate"), "{warnings}");
    Ok(())
}

#[test]
fn a_name_that_leads_elsewhere_is_told_with_the_words_of_the_ca_and_holds_up_no_other() -> Result<()> {
    let lab = Lab::new()?;
    let _nginx = lab.nginx_with(lab.backend(1), PAGE, 8080)?;
    let ca = lab.acme_ca(lab.backend(2), &AcmeOptions::default())?;
    ca.lead("a.example", "10.88.2.3")?;
    let cache = lab.dir().join("cache");
    // Nobody but these may be a client, and the CA is none of them.
    let config = format!(
        "{}{}",
        ca.section(&cache),
        route(
            "web",
            &[],
            "match = { sni = [\"a.example\", \"b.example\"], client = [\"10.88.1.0/24\"] }\nallow = [\"10.88.1.0/24\"]"
        )
    );
    let config = config.replace("match.sni = []\n", "");
    let shunt = Shunt::start(&lab, &config)?;
    wait_issued(&shunt, &ca, 1.0)?;
    ensure!(orders(&shunt, "challenge") == 1.0, "{}", shunt.log());
    ensure!(curl(&lab, &ca.root()?, "b.example")? == "page");
    let one = told(&shunt, "a.example")?;
    let problem = one["problem"].as_str().context("problem")?;
    ensure!(problem.contains("did not find it to be here") && problem.contains("10.88.2.3:443"), "{problem}");
    ensure!(problem.contains("port 443"), "how it is mended: {problem}");
    let again = one["next_order_seconds"].as_i64().context("next_order_seconds")?;
    ensure!((290..=375).contains(&again), "public CAs take five failures in an hour: {one}");
    Ok(())
}

#[test]
fn an_account_that_the_ca_refuses_is_one_clear_error_and_a_forgotten_one_is_made_again() -> Result<()> {
    let lab = Lab::new()?;
    let _nginx = lab.nginx_with(lab.backend(1), PAGE, 8080)?;
    let key = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
    let options = AcmeOptions { external: vec![("kid-1".to_owned(), key.to_owned())], ..Default::default() };
    let mut ca = lab.acme_ca(lab.backend(2), &options)?;
    let cache = lab.dir().join("cache");
    let config = |eab: &str, sni: &[&str]| format!("{}{eab}\n{}", ca.section(&cache), route("web", sni, ""));
    let wrong =
        config(&format!("eab = {{ key_id = \"kid-1\", hmac_key = \"AAAA{key}\" }}"), &["a.example", "b.example"]);
    let shunt = Shunt::start(&lab, &wrong)?;
    wait_until("it was tried", ISSUED, || orders(&shunt, "account") == 1.0)?;
    let log = shunt.log();
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    ensure!(errors.len() == 1 && errors[0].contains("the CA refuses the account"), "{errors:?}");
    ensure!(errors[0].contains("acme.eab") && !log.contains(key), "{errors:?}");
    // A file that is not there is said before anything runs; one that is right is taken by a reload, at once.
    let file = lab.dir().join("eab.key");
    let right = format!("eab = {{ key_id = \"kid-1\", hmac_key_file = {file:?} }}");
    shunt.write_config(&config(&right, &["a.example"]))?;
    let checked = shunt.command(&["check", &shunt.config_file().display().to_string()]).output()?;
    let said = String::from_utf8(checked.stderr)?;
    ensure!(checked.status.code() == Some(1) && said.contains("eab.key: No such file"), "{said}");
    fs::write(&file, format!("{key}\n"))?;
    let (one, both) = (config(&right, &["a.example"]), config(&right, &["a.example", "b.example"]));
    shunt.reload(&one)?;
    wait_issued(&shunt, &ca, 1.0)?;
    ensure!(curl(&lab, &ca.root()?, "a.example")? == "page");
    // A CA that has lost its memory does not know the account: the next order makes another.
    ca.stop();
    ca.start(&lab)?;
    shunt.reload(&both)?;
    wait_issued(&shunt, &ca, 2.0)?;
    ensure!(ca.orders() == 2 && curl(&lab, &ca.root()?, "b.example")? == "page", "{}", ca.log());
    Ok(())
}

#[test]
fn a_ca_that_wants_a_certificate_renewed_before_its_time_gets_its_way() -> Result<()> {
    let lab = Lab::new()?;
    let _nginx = lab.nginx_with(lab.backend(1), PAGE, 8080)?;
    // By themselves they would be renewed after twenty seconds; another one is not got within three.
    let ca = lab.acme_ca(lab.backend(2), &AcmeOptions { validity: Some(30), ..Default::default() })?;
    // Pebble of this version gives no renewal information: nginx in front of it does.
    let (front, section) =
        ca.with_advice(&lab, "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z", &lab.dir().join("cache"))?;
    let shunt = Shunt::start(&lab, &format!("{section}{}", route("web", &["a.example"], "")))?;
    wait_issued(&shunt, &ca, 1.0)?;
    let began = std::time::Instant::now();
    wait_issued(&shunt, &ca, 2.0).with_context(|| front.log())?;
    ensure!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    ensure!(began.elapsed() > Duration::from_secs(2), "one after the other: {:?}", began.elapsed());
    ensure!(Outcomes::of(&shunt)?.failed() == 0.0, "{}", shunt.log());
    // The CA is told what the second one comes after (RFC 9773 §5); since Pebble does not repeat it, it is ordered without.
    let ordered = ca.ordered()?;
    let replaces: Vec<_> = ordered.iter().take(3).map(|order| order["replaces"].as_str()).collect();
    let [None, Some(replaced), None] = replaces[..] else { bail!("{ordered:?}") };
    let (_, serial) = replaced.split_once('.').with_context(|| replaced.to_owned())?;
    let serial: String = from_base64url(serial)?.iter().map(|byte| format!("{byte:02x}")).collect();
    let first = ca.serials().into_iter().next().context("a serial number")?;
    ensure!(serial.trim_start_matches('0') == first.trim_start_matches('0'), "{serial} is not {first}");
    Ok(())
}
