//! The result as a table and as JSON.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result};
use comfy_table::{Cell as TableCell, CellAlignment, Table, presets};
use serde::Serialize;
use shunt_lab::run;

use super::{
    metric::Metric,
    parts::PartRow,
    paths::PathKind,
    results::{Cell, Spread},
    scale::ScaleRow,
    tls,
};

/// All that a run found; `results.json`.
#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub rounds: usize,
    /// Of each single measurement.
    pub seconds: u64,
    pub rows: Vec<Row>,
    pub scale: Vec<ScaleRow>,
    pub tls: Vec<tls::Row>,
    pub flood: Vec<tls::Row>,
    pub parts: Vec<PartRow>,
}

#[derive(Debug, Serialize)]
pub struct Row {
    pub metric: Metric,
    pub title: &'static str,
    pub unit: &'static str,
    pub more_is_better: bool,
    pub paths: BTreeMap<PathKind, Cell>,
}

/// Where the numbers come from.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub kernel: String,
    pub processor: String,
    pub processors: usize,
    pub haproxy: String,
    pub nginx: String,
    /// What other programs took before the first measurement, in percent of one processor.
    pub background_percent: f64,
}

impl Machine {
    pub fn read(background_percent: f64) -> Result<Self> {
        let line = |program: &str, args: &[&str]| -> Result<String> {
            let output =
                std::process::Command::new(program).args(args).output().with_context(|| format!("start {program}"))?;
            // nginx -v writes to stderr
            let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
            Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
        };
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processor.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        Ok(Self {
            kernel: run(std::process::Command::new("uname").arg("-r"))?.trim().to_owned(),
            processor: processor.trim_start_matches([' ', '\t', ':']).to_owned(),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            haproxy: line("haproxy", &["-v"])?,
            nginx: line("nginx", &["-v"])?,
            background_percent,
        })
    }
}

impl Report {
    pub fn rows(cells: BTreeMap<Metric, BTreeMap<PathKind, Cell>>) -> Vec<Row> {
        let row = |(metric, paths): (Metric, _)| Row {
            metric,
            title: metric.title(),
            unit: metric.unit(),
            more_is_better: metric.more_is_better(),
            paths,
        };
        cells.into_iter().map(row).collect()
    }

    /// For the terminal, as Markdown: the values, their ratios, the scale.
    pub fn tables(&self) -> String {
        let measured = |path| self.rows.iter().any(|row| row.paths.contains_key(&path));
        let mut tables = Vec::new();
        if !self.rows.is_empty() {
            let title = format!("Median of {} rounds of {} s each ± half the range", self.rounds, self.seconds);
            tables.push((title, self.table(|cell| Some(value_text(cell.value)))));
        }
        if measured(PathKind::Rule) {
            let table = self.table(|cell| cell.to_rule.map(ratio_text));
            tables.push(("Ratio to the hand-written nft rule".to_owned(), table));
        }
        if measured(PathKind::Plain) {
            tables.push(("Ratio to plain routing".to_owned(), self.table(|cell| cell.to_plain.map(ratio_text))));
        }
        if PathKind::PEERS.into_iter().any(measured) {
            let table = self.table(|cell| cell.to_peer.map(ratio_text));
            tables.push(("Ratio to the best of HAProxy and nginx".to_owned(), table));
        }
        if !self.scale.is_empty() {
            tables.push(("shunt with many routes".to_owned(), ScaleRow::table(&self.scale)));
        }
        if !self.parts.is_empty() {
            let title =
                format!("What parts of the nft engine cost: median of {} rounds of {} s", self.rounds, self.seconds);
            tables.push((title, PartRow::table(&self.parts)));
        }
        if !self.tls.is_empty() {
            tables.push(("TLS ended in the proxy".to_owned(), tls::table(&self.tls)));
        }
        if !self.flood.is_empty() {
            let title = "Ping-pong over TLS without and with a flood of full handshakes (RSA 2048, TLS 1.3)";
            tables.push((title.to_owned(), tls::table(&self.flood)));
        }
        tables.iter().map(|(title, table)| format!("{title}\n\n{table}\n\n")).collect()
    }

    fn table(&self, show: impl Fn(&Cell) -> Option<String>) -> Table {
        let paths: Vec<PathKind> =
            PathKind::ALL.into_iter().filter(|path| self.rows.iter().any(|row| row.paths.contains_key(path))).collect();
        let mut table = new_table();
        let titles = paths.iter().map(|path| path.title().to_owned());
        table.set_header(["".to_owned(), "unit".to_owned()].into_iter().chain(titles));
        for row in &self.rows {
            let cells: Vec<Option<String>> = paths.iter().map(|path| show(row.paths.get(path)?)).collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let unit = if row.more_is_better { format!("{} ↑", row.unit) } else { format!("{} ↓", row.unit) };
            let cells = cells.into_iter().map(|cell| right(cell.unwrap_or_default()));
            table.add_row([TableCell::new(row.title), TableCell::new(unit)].into_iter().chain(cells));
        }
        table
    }
}

pub fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table
}

pub fn right(text: String) -> TableCell {
    TableCell::new(text).set_alignment(CellAlignment::Right)
}

/// Three significant digits are more than one round repeats.
pub fn number_text(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

pub fn value_text(spread: Spread) -> String {
    if spread.min == spread.max {
        return number_text(spread.median);
    }
    format!("{} ±{:.0}%", number_text(spread.median), spread.percent())
}

fn ratio_text(spread: Spread) -> String {
    if spread.min == spread.max {
        return format!("{:.2}", spread.median);
    }
    format!("{:.2} ({:.2}–{:.2})", spread.median, spread.min, spread.max)
}
