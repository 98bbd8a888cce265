//! The report of `shunt doctor`.

use std::fmt::Write;

use super::{
    BAD, BOLD, DIM, GOOD, WARN,
    table::{Cell, Column, Table},
};
use crate::doctor::{Report, State};

pub(in crate::cli) fn doctor(report: &Report) -> String {
    let mut table = Table::new(&[Column::left(""), Column::left("CHECK"), Column::left("FOUND")]);
    for check in &report.checks {
        let state = match check.state {
            State::Ok => Cell::styled("ok", GOOD),
            State::Warn => Cell::styled("warn", WARN),
            State::Missing => Cell::styled("missing", BAD),
        };
        table.row([state, Cell::from(&check.name), Cell::from(&check.found)]);
    }
    let mut text = table.render();
    for check in report.checks.iter().filter(|check| check.state != State::Ok) {
        // Writing to a String does not fail.
        let _ = write!(text, "\n{BOLD}{}{BOLD:#}: {}\n", check.name, check.why);
        for mend in &check.mend {
            let _ = writeln!(text, "  {DIM}mend:{DIM:#} {mend}");
        }
    }
    let verdict = match report.can_run() {
        true => format!("{GOOD}shunt can run its nft engine here{GOOD:#}"),
        false => format!("{BAD}shunt cannot run its nft engine here{BAD:#}"),
    };
    let _ = write!(text, "\n{verdict}\n");
    text
}
