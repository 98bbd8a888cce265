//! What can be observed is what docs/observing.md says, to the letter.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use proxy_core::reason::Reason;
use shunt_lab::{
    Lab, Shunt,
    dialog::echo,
    relay::{Relay, servers_with_tls},
    scripted::{Behaviour, TcpServer},
    web,
};

const MANUAL: &str = include_str!("../../docs/observing.md");

/// The cells of the table's rows below a heading.
fn rows(heading: &str) -> Result<Vec<Vec<String>>> {
    let section = MANUAL.split("\n## ").find(|section| section.lines().next() == Some(heading)).context("heading")?;
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect();
    Ok(section.lines().filter(|line| line.starts_with("| `")).map(cells).collect())
}

/// Name, type and labels of every metric on the page.
fn shown(page: &str) -> Result<BTreeSet<[String; 3]>> {
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    types
        .map(|(family, kind)| {
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                "histogram" => "_count",
                _ => "",
            };
            let series = format!("{family}{suffix}");
            let sample = page.lines().find_map(|line| line.strip_prefix(&series)?.rsplit_once(' '));
            let (labels, _) = sample.with_context(|| format!("no sample of {series}"))?;
            let labels = labels.trim_matches(['{', '}']).split(',').filter_map(|label| Some(label.split_once('=')?.0));
            let name = if kind == "histogram" { family.to_owned() } else { series };
            Ok([name, kind.to_owned(), labels.collect::<Vec<_>>().join(", ")])
        })
        .collect()
}

/// A configuration that has something of everything: each engine, TLS, and names that a CA issues for.
fn everything(lab: &Lab) -> Result<String> {
    let acme = "[acme]\ndirectory = \"https://10.88.2.3:14000/dir\"\n";
    let issued = "[[route]]\nname = \"issued\"\nlisten = [\"10.88.1.1:443\"]\nbackends = [\"10.88.2.2:80\"]\n\
                  match.sni = [\"a.example\"]\ntls = { mode = \"terminate\", certificates = \"acme\" }\n";
    let cache = lab.dir().join("acme").display().to_string();
    Ok(format!("{acme}cache = {cache:?}\n{}{issued}{}", web(""), Relay::routes_with_tls(lab, "")?))
}

#[test]
fn every_metric_is_in_the_manual_with_its_type_and_labels_and_none_besides() -> Result<()> {
    let lab = Lab::new()?;
    let _forwarded = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let _relayed = servers_with_tls(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &everything(&lab)?)?;
    echo(&mut lab.client().connect(([10, 88, 1, 1], 80))?, b"forwarded")?;
    // A reason has a line once it was given.
    shunt.wait_route("web", "its end", Duration::from_secs(20), |route| {
        (route["terminations"]["finished_client_first"] == 1).then_some(())
    })?;
    let _open = Relay::WITH_TLS.iter().map(|relay| relay.begin(&lab, &shunt)).collect::<Result<Vec<_>>>()?;
    let page = lab.gateway().curl("http://127.0.0.1:9900/metrics")?;
    let shown = shown(&String::from_utf8(page)?)?;
    let told = rows("Metrics")?.into_iter().map(|row| [row[0].clone(), row[1].clone(), row[2].clone()]).collect();
    let (missing, beyond): (Vec<_>, Vec<_>) = (shown.difference(&told).collect(), told.difference(&shown).collect());
    ensure!(missing.is_empty() && beyond.is_empty(), "not in the manual: {missing:?}\nonly in the manual: {beyond:?}");
    Ok(())
}

#[test]
fn every_reason_is_in_the_manual_and_none_besides() -> Result<()> {
    let told: Vec<String> = rows("Reasons")?.into_iter().map(|row| row[0].clone()).collect();
    assert_eq!(told, Reason::ALL.iter().map(|reason| reason.label()).collect::<Vec<_>>());
    Ok(())
}
