//! What the daemon answered, for people. Styled always: the output stream takes the styles out where they do not belong
//! (no terminal, `NO_COLOR`).

mod details;
mod doctor;
mod plan;
mod table;
pub(super) mod units;

use anstyle::{AnsiColor, Style};
pub(super) use details::{backend, explain, killed, reload, route, routes_counted, status};
pub(super) use doctor::doctor;
pub(super) use plan::{plan, plan_json};
use proxy_core::view;
use table::{Cell, Column, Table};
use units::{bytes, count, rate, seconds};

pub(super) const GOOD: Style = AnsiColor::Green.on_default();
pub(super) const BAD: Style = AnsiColor::Red.on_default();
pub(super) const WARN: Style = AnsiColor::Yellow.on_default();
pub(super) const DIM: Style = Style::new().dimmed();
pub(super) const BOLD: Style = Style::new().bold();

/// The routes as a table.
pub(super) fn routes(routes: &[view::Route]) -> String {
    let mut table = Table::new(&[
        Column::left("ROUTE"),
        Column::left("LISTENS ON"),
        Column::left("ENGINE"),
        Column::right("OPEN"),
        Column::right("TOTAL"),
        Column::right("NEW/S"),
        Column::right("IN"),
        Column::right("OUT"),
        Column::right("UP"),
        Column::left("STATE"),
    ]);
    for route in routes {
        let up = route.backends.iter().filter(|backend| backend.up).count();
        let up_style = match up {
            0 => BAD,
            some if some < route.backends.len() => WARN,
            _ => GOOD,
        };
        table.row([
            Cell::from(&route.name),
            Cell::from(listens(route)),
            Cell::from(route.engine.as_str()),
            Cell::from(count(route.stats.connections_active)),
            Cell::from(count(route.stats.connections_total)),
            Cell::from(rate(route.stats.connections_rate)),
            Cell::from(format!("{}/s", bytes(route.stats.bytes_in_rate))),
            Cell::from(format!("{}/s", bytes(route.stats.bytes_out_rate))),
            Cell::styled(format!("{up}/{}", route.backends.len()), up_style),
            route_state(route.state),
        ]);
    }
    if routes.is_empty() { "no routes\n".to_owned() } else { table.render() }
}

fn route_state(state: view::RouteState) -> Cell {
    match state {
        view::RouteState::Active => Cell::styled("active", GOOD),
        view::RouteState::Draining => Cell::styled("draining", WARN),
    }
}

/// The first address and how many more there are.
pub(super) fn listens(route: &view::Route) -> String {
    match route.listen.as_slice() {
        [] => "-".to_owned(),
        [only] => format!("{only}/{}", route.protocol),
        [first, more @ ..] => format!("{first}/{} +{}", route.protocol, more.len()),
    }
}

/// The connections as a table.
pub(super) fn connections(connections: &[view::Connection]) -> String {
    let mut table = Table::new(&[
        Column::left("ID"),
        Column::left("ROUTE"),
        Column::left("ENGINE"),
        Column::left("CLIENT"),
        Column::left("DIALLED"),
        Column::left("BACKEND"),
        Column::left("STATE"),
        Column::right("AGE"),
        Column::right("IDLE"),
        Column::right("ENDS IN"),
        Column::right("IN"),
        Column::right("OUT"),
    ]);
    for one in connections {
        let metered = |value: u64| if one.metered { bytes(value as f64) } else { "?".to_owned() };
        table.row([
            Cell::from(&one.id),
            Cell::from(&one.route),
            Cell::from(one.engine.as_str()),
            Cell::from(format!("{}/{}", one.client, one.protocol)),
            Cell::from(one.listen.to_string()),
            Cell::from(one.backend.map_or("-".to_owned(), |backend| backend.to_string())),
            Cell::from(&one.state),
            Cell::from(seconds(one.age_seconds)),
            Cell::from(seconds(one.idle_seconds)),
            Cell::from(one.expires_seconds.map_or("-".to_owned(), seconds)),
            Cell::from(metered(one.bytes_in)),
            Cell::from(metered(one.bytes_out)),
        ]);
    }
    if connections.is_empty() { "no connections\n".to_owned() } else { table.render() }
}

#[cfg(test)]
mod tests;
