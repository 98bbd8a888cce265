//! One thing at a time: the daemon, a route, an explanation, the answer to a change.

use std::fmt::Write;

use proxy_core::view;

use super::{
    BAD, BOLD, DIM, GOOD, WARN,
    table::{Cell, Column, Table},
    units::{bytes, count, counted, rate, seconds},
};

pub(in crate::cli) fn routes_counted(routes: usize) -> String {
    counted(routes as u64, "route")
}

pub(in crate::cli) fn status(status: &view::Status) -> String {
    let view::Status { reconcile, conntrack, handoff, .. } = status;
    let mut text = String::new();
    let ready = if status.ready { format!("{GOOD}ready{GOOD:#}") } else { format!("{BAD}not ready{BAD:#}") };
    let up = seconds(status.uptime_seconds);
    line(&mut text, "shunt", &format!("{}, pid {}, up {up}, {ready}", status.version, status.pid));
    let reloads =
        format!("{}, {} failed", counted(status.reloads_ok + status.reloads_failed, "reload"), status.reloads_failed);
    line(&mut text, "config", &format!("{} ({reloads})", status.config_file));
    line(&mut text, "routes", &status.routes.to_string());
    let (open, total) = (count(status.connections_active), count(status.connections_total));
    line(&mut text, "connections", &format!("{open} open, {total} in all"));
    let applied = format!(
        "{} applied, {} failed, {} repaired",
        counted(reconcile.ok, "change"),
        reconcile.failed,
        counted(reconcile.drift, "foreign change")
    );
    line(&mut text, "ruleset", &applied);
    line(
        &mut text,
        "",
        &format!("last: {} in {:.1} ms", counted(reconcile.last_changes as u64, "message"), reconcile.last_apply_ms),
    );
    if let Some(error) = &reconcile.last_error {
        line(&mut text, "", &format!("{BAD}{error}{BAD:#}"));
    }
    // Without a limit nobody has read it: the daemon relays every route.
    if conntrack.max > 0 {
        let entries = format!("{} of {} entries", count(conntrack.entries), count(conntrack.max));
        let events = format!("{} events, {} lost", count(conntrack.events), count(conntrack.events_lost));
        line(&mut text, "conntrack", &format!("{entries}, {events}, last dump {:.1} ms", conntrack.last_dump_ms));
    }
    if let Some(handoff) = handoff {
        let entries = format!("{} of {} entries", count(handoff.entries), count(handoff.max));
        let of_earlier = match handoff.adopted {
            0 => String::new(),
            adopted => format!(", {} taken over at start", count(adopted)),
        };
        line(&mut text, "handed over", &format!("{} open, {entries}{of_earlier}", count(handoff.connections)));
        let results: Vec<String> =
            handoff.results.iter().map(|(result, times)| format!("{result} {}", count(*times))).collect();
        if !results.is_empty() {
            line(&mut text, "handovers", &results.join(", "));
        }
    }
    if let Some(acme) = acme(&status.acme) {
        line(&mut text, "acme", &acme);
    }
    for warning in &status.warnings {
        line(&mut text, "warning", &format!("{WARN}{warning}{WARN:#}"));
    }
    text
}

/// How many names have a certificate, and what is next. `None`: none is to have one from a CA.
fn acme(names: &[view::AcmeCertificate]) -> Option<String> {
    let next = names.iter().min_by_key(|one| one.next_order_seconds)?;
    let issued = names.iter().filter(|one| one.expires.is_some()).count();
    let counted = format!("{issued} of {} certificates issued", names.len());
    let then = match next.next_order_seconds {
        ..=0 => format!("\"{}\" is being ordered", next.name),
        rest => format!("next order for \"{}\" in {}", next.name, seconds(rest as f64)),
    };
    Some(format!("{counted}, {then}"))
}

fn line(text: &mut String, label: &str, value: &str) {
    // Writing to a String does not fail.
    let _ = writeln!(text, "{DIM}{label:<12}{DIM:#}{value}");
}

/// One route with its backends and the reasons its connections ended for.
pub(in crate::cli) fn route(route: &view::Route) -> String {
    let stats = &route.stats;
    let mut text = String::new();
    let state = match route.state {
        view::RouteState::Active => String::new(),
        view::RouteState::Draining => format!(", {WARN}draining{WARN:#}"),
    };
    line(&mut text, "route", &format!("{BOLD}{}{BOLD:#}{state}", route.name));
    line(&mut text, "listens on", &format!("{} ({})", route.listen.join(", "), route.protocol));
    // Only what the kernel forwards has one.
    let mark = if route.mark == 0 { String::new() } else { format!(", mark {:#x}", route.mark) };
    line(&mut text, "engine", &format!("{}, {}{mark}", route.engine, route.balance));
    let (open, total) = (count(stats.connections_active), count(stats.connections_total));
    let oldest = match stats.oldest_seconds {
        // Nothing is open, or the daemon relays it: its counters do not say.
        0.0 => String::new(),
        _ => format!(" (oldest {})", seconds(stats.oldest_seconds)),
    };
    let new = rate(stats.connections_rate);
    line(&mut text, "connections", &format!("{open} open{oldest}, {total} in all, {new} new/s"));
    for (label, total, rate) in
        [("in", stats.bytes_in, stats.bytes_in_rate), ("out", stats.bytes_out, stats.bytes_out_rate)]
    {
        line(&mut text, label, &format!("{}, {}/s", bytes(total as f64), bytes(rate)));
    }
    let ended: Vec<_> =
        stats.terminations.iter().map(|(reason, times)| format!("{reason} {}", count(*times))).collect();
    line(&mut text, "ended", if ended.is_empty() { "-".to_owned() } else { ended.join(", ") }.as_str());
    text.push('\n');
    text.push_str(&backends(&route.backends));
    text
}

fn backends(backends: &[view::Backend]) -> String {
    let mut table = Table::new(&[
        Column::left("BACKEND"),
        Column::left("STATE"),
        Column::right("WEIGHT"),
        Column::right("OPEN"),
        Column::left("ADDRESSES"),
        Column::left("WHY"),
    ]);
    for backend in backends {
        let addresses: Vec<_> = backend.addresses.iter().map(ToString::to_string).collect();
        table.row([
            Cell::from(&backend.name),
            backend_state(backend),
            Cell::from(backend.weight.to_string()),
            Cell::from(count(backend.connections_active)),
            Cell::from(if addresses.is_empty() { "-".to_owned() } else { addresses.join(" ") }),
            Cell::from(backend.reason.clone().unwrap_or_default()),
        ]);
    }
    table.render()
}

fn backend_state(backend: &view::Backend) -> Cell {
    match (backend.admin, backend.up) {
        (view::BackendAdmin::Drain, _) => Cell::styled("drain", WARN),
        (view::BackendAdmin::Down, _) => Cell::styled("down (set)", WARN),
        (view::BackendAdmin::Ready, true) => Cell::styled("up", GOOD),
        (view::BackendAdmin::Ready, false) => Cell::styled("down", BAD),
    }
}

pub(in crate::cli) fn explain(explain: &view::Explain) -> String {
    let mut text = String::new();
    line(&mut text, "route", &format!("{BOLD}{}{BOLD:#}", explain.route));
    line(&mut text, "engine", &format!("{BOLD}{}{BOLD:#}: {}", explain.engine, explain.because));
    for refused in &explain.refused {
        line(&mut text, "not", &format!("{}: {}", refused.engine, refused.reason));
    }
    for (index, hop) in explain.path.iter().enumerate() {
        line(&mut text, if index == 0 { "path" } else { "" }, hop);
    }
    if let Some(one) = &explain.connection {
        let backend = one.backend.map_or("no backend yet".to_owned(), |backend| backend.to_string());
        line(&mut text, "connection", &format!("{}: {} → {} → {backend}", one.id, one.client, one.listen));
        let ends = one
            .expires_seconds
            .map_or("no timeout".to_owned(), |left| format!("ends in {} if nothing comes", seconds(left)));
        let (age, idle) = (seconds(one.age_seconds), seconds(one.idle_seconds));
        line(&mut text, "", &format!("{}, {age} old, idle for {idle}, {ends}", one.state));
        let carried = match one.metered {
            true => format!("{} in, {} out", bytes(one.bytes_in as f64), bytes(one.bytes_out as f64)),
            false => "bytes not known: it began before accounting was on".to_owned(),
        };
        line(&mut text, "", &carried);
        if let Some(why) = &one.not_handed_over {
            line(&mut text, "", &format!("not handed over: {why}"));
        }
    }
    text
}

pub(in crate::cli) fn reload(reload: &view::Reload) -> String {
    let mut text = format!(
        "reloaded: {} added, {} changed, {} removed, {} unchanged; {} in {:.1} ms\n",
        reload.added.len(),
        reload.changed.len(),
        reload.removed.len(),
        reload.unchanged,
        counted(reload.changes as u64, "message"),
        reload.apply_ms
    );
    for (sign, names) in [("+", &reload.added), ("~", &reload.changed), ("-", &reload.removed)] {
        for name in names.iter().take(20) {
            let _ = writeln!(text, "  {sign} {name}");
        }
        if names.len() > 20 {
            let _ = writeln!(text, "  {sign} and {} more", names.len() - 20);
        }
    }
    text
}

pub(in crate::cli) fn backend(backend: &view::Backend) -> String {
    backends(std::slice::from_ref(backend))
}

pub(in crate::cli) fn killed(killed: &view::Killed) -> String {
    format!("ended {} of route {}, client {}\n", killed.id, killed.route, killed.client)
}
