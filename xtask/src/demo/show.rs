//! The live view: what `shunt routes` says, once a second.

use std::{
    io::{self, IsTerminal, Write},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::Value;
use shunt_lab::Shunt;

use super::{stage::Stage, traffic::Traffic};
use crate::{bench::new_table, stop};

const TICK: Duration = Duration::from_secs(1);

/// Prints the state once a second, in place on a terminal, for `duration`, or until the daemon is gone or somebody asks
/// to stop.
pub fn watch(stage: &mut Stage, duration: Duration) -> Result<()> {
    let end = Instant::now() + duration;
    let in_place = io::stdout().is_terminal();
    let mut drawn = 0;
    while Instant::now() < end && !stop::asked() && stage.daemon_lives() {
        // A view is refreshed by the clock; nothing waits for it.
        thread::sleep(TICK.min(end.saturating_duration_since(Instant::now())));
        let text =
            routes(&stage.shunt, &stage.traffic).unwrap_or_else(|error| format!("no daemon to ask: {error:#}\n"));
        let mut out = io::stdout();
        if in_place && drawn > 0 {
            write!(out, "\x1b[{drawn}A\x1b[J")?;
        }
        write!(out, "{text}")?;
        out.flush()?;
        drawn = text.lines().count();
        if !in_place {
            // Into a file or a log one picture of each act is enough.
            return sleep_until(end);
        }
    }
    Ok(())
}

/// In pieces, so that Ctrl-C is heard.
fn sleep_until(end: Instant) -> Result<()> {
    while Instant::now() < end && !stop::asked() {
        thread::sleep(Duration::from_millis(100).min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

/// Which route runs on which engine, and what goes through it.
fn routes(shunt: &Shunt, traffic: &Traffic) -> Result<String> {
    let routes = shunt.cli_json(&["routes"])?;
    let mut table = new_table();
    table.set_header([
        "route",
        "engine",
        "active",
        "total",
        "new/s",
        "in",
        "out",
        "in total",
        "out total",
        "backends up",
    ]);
    for route in routes.as_array().context("`shunt routes --json` is not an array")? {
        let backends = route["backends"].as_array().map(Vec::as_slice).unwrap_or_default();
        let up = backends.iter().filter(|backend| backend["up"] == true).count();
        table.add_row([
            text(&route["name"]),
            text(&route["engine"]),
            route["connections_active"].to_string(),
            route["connections_total"].to_string(),
            format!("{:.0}", number(&route["connections_rate"])),
            bits(number(&route["bytes_in_rate"])),
            bits(number(&route["bytes_out_rate"])),
            bytes(number(&route["bytes_in"])),
            bytes(number(&route["bytes_out"])),
            format!("{up}/{}", backends.len()),
        ]);
    }
    let tally = traffic.tally();
    Ok(format!(
        "{table}\nclients: {} requests answered ({} by backend1, {} by backend2), {} failed · UDP {} back, {} lost\n\n",
        tally.requests(),
        tally.answered[0],
        tally.answered[1],
        tally.failed,
        tally.datagrams,
        tally.lost
    ))
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

fn bits(bytes_per_second: f64) -> String {
    format!("{}bit/s", scaled(bytes_per_second * 8.0))
}

fn bytes(count: f64) -> String {
    format!("{}B", scaled(count))
}

fn scaled(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{:.2} G", v / 1e9),
        v if v >= 1e6 => format!("{:.1} M", v / 1e6),
        v if v >= 1e3 => format!("{:.1} k", v / 1e3),
        v => format!("{v:.0} "),
    }
}
