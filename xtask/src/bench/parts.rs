//! What each part of the nft engine costs a new connection: the hand-written rule, and then shunt with parts taken away.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use comfy_table::Table;
use nix::sys::signal::Signal;
use serde::Serialize;
use shunt_lab::{GATEWAY, Lab, Shunt, kernel, load, run};

use super::{
    measure::CONNECTION_THREADS,
    paths,
    report::{new_table, right},
    results::Spread,
    services,
};
use crate::{stop, ui};

/// What forwards while one variant is measured.
#[derive(Debug, Clone, Copy)]
enum Variant {
    Rule(&'static str),
    /// The table with parts of it edited away; the daemon is dead, so no event is made for it.
    Table {
        sysctls: &'static [(&'static str, &'static str)],
        edit: &'static str,
    },
    /// Events are made and queued, and nobody reads them.
    Unread,
    Whole,
}

const ACCT: &str = "net.netfilter.nf_conntrack_acct";
const TIMESTAMP: &str = "net.netfilter.nf_conntrack_timestamp";

const VARIANTS: [(&str, Variant); 9] = [
    ("hand-written rule", Variant::Rule(paths::RULE)),
    ("… with accounting and counters", Variant::Rule(paths::RULE_COUNTED)),
    ("shunt", Variant::Whole),
    ("… events made, never read", Variant::Unread),
    ("… no events: the daemon is dead", Variant::Table { sysctls: &[], edit: "" }),
    ("… dead, no timestamps", Variant::Table { sysctls: &[(TIMESTAMP, "0")], edit: "" }),
    ("… dead, no accounting", Variant::Table { sysctls: &[(ACCT, "0")], edit: "" }),
    ("… dead, ends not marked", Variant::Table { sysctls: &[], edit: "flush chain inet shunt track\n" }),
    ("… dead, packets not counted", Variant::Table { sysctls: &[], edit: "flush chain inet shunt track-forward\n" }),
];

/// One line: microseconds of processor time per connection, and connections per second.
#[derive(Debug, Clone, Serialize)]
pub struct PartRow {
    pub title: &'static str,
    pub micros: Spread,
    /// To the first line's value of the same round.
    pub to_first: Spread,
    pub per_second: Spread,
}

impl PartRow {
    pub fn table(rows: &[Self]) -> Table {
        let mut table = new_table();
        table.set_header(["new connections", "processor time of one", "±", "to the rule", "rate"]);
        for row in rows {
            table.add_row([
                comfy_table::Cell::new(row.title),
                right(format!("{:.1} µs", row.micros.median)),
                right(format!("{:.0} %", row.micros.percent())),
                right(format!("{:.3} ({:.2}–{:.2})", row.to_first.median, row.to_first.min, row.to_first.max)),
                right(format!("{:.0} /s", row.per_second.median)),
            ]);
        }
        table
    }
}

/// Every variant once per round, each round beginning with another.
pub fn measure(lab: &Lab, shunt: &Path, duration: Duration, rounds: u16) -> Result<Vec<PartRow>> {
    let mut taken = vec![Vec::new(); VARIANTS.len()];
    for round in 0..usize::from(rounds) {
        ui::step(&format!("round {}/{rounds}: parts", round + 1));
        for turn in 0..VARIANTS.len() {
            stop::check()?;
            let index = (turn + round) % VARIANTS.len();
            let (title, variant) = VARIANTS[index];
            taken[index].push(one(lab, shunt, variant, duration).context(title)?);
        }
    }
    let first: Vec<f64> = taken[0].iter().map(|(micros, _)| *micros).collect();
    let row = |(samples, (title, _)): (&Vec<(f64, f64)>, &(&'static str, Variant))| {
        Some(PartRow {
            title,
            micros: Spread::of(samples.iter().map(|(micros, _)| *micros))?,
            to_first: Spread::of(samples.iter().zip(&first).map(|((micros, _), first)| micros / first))?,
            per_second: Spread::of(samples.iter().map(|(_, rate)| *rate))?,
        })
    };
    Ok(taken.iter().zip(&VARIANTS).filter_map(row).collect())
}

fn one(lab: &Lab, shunt: &Path, variant: Variant, duration: Duration) -> Result<(f64, f64)> {
    if let Variant::Rule(script) = variant {
        lab.gateway().set_sysctl(ACCT, if script == paths::RULE { "0" } else { "1" })?;
        lab.gateway().set_sysctl(TIMESTAMP, "0")?;
        kernel::nft_load(lab.gateway(), lab.dir(), script)?;
        let sample = sample(lab, None, duration)?;
        run(lab.gateway().command("nft").args(["delete", "table", "ip", "by_hand"]))?;
        kernel::conntrack_flush(lab.gateway())?;
        return Ok(sample);
    }
    let mut running = Shunt::builder().binary(shunt).start(lab, paths::SHUNT)?;
    let pid = running.pid()?;
    let sample = match variant {
        Variant::Table { sysctls, edit } => {
            running.kill9();
            for (key, value) in sysctls {
                lab.gateway().set_sysctl(key, value)?;
            }
            if !edit.is_empty() {
                kernel::nft_load(lab.gateway(), lab.dir(), edit)?;
            }
            sample(lab, None, duration)?
        }
        Variant::Unread => {
            running.signal(Signal::SIGSTOP)?;
            let taken = sample(lab, None, duration)?;
            running.signal(Signal::SIGCONT)?;
            taken
        }
        Variant::Whole | Variant::Rule(_) => sample(lab, Some(pid), duration)?,
    };
    if running.pid().is_ok() {
        running.terminate(Duration::from_secs(40))?;
    }
    run(&mut running.command(&["cleanup"])).context("shunt cleanup")?;
    kernel::conntrack_flush(lab.gateway())?;
    Ok(sample)
}

/// Microseconds per connection, connections per second.
fn sample(lab: &Lab, daemon: Option<u32>, duration: Duration) -> Result<(f64, f64)> {
    kernel::conntrack_flush(lab.gateway())?;
    let load = load::NewConnections {
        from: lab.client_addresses(),
        to: GATEWAY,
        ports: services::SHORT,
        each: load::Each::Answered,
        threads: CONNECTION_THREADS,
        rate: None,
        duration,
    };
    let used = || -> Result<f64> { Ok(kernel::own_cpu_seconds()? + daemon.map_or(Ok(0.0), kernel::cpu_seconds)?) };
    let before = used()?;
    let report = load::new_connections(lab.client(), &load)?;
    let used = used()? - before;
    anyhow::ensure!(report.failed == 0, "{} failed, first {:?}", report.failed, report.failure);
    Ok((1e6 * used / report.made.max(1) as f64, report.per_second()))
}
