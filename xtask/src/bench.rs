//! The benchmark: shunt's engines beside what they must not be slower than, and what they replace.

mod flood;
mod measure;
mod metric;
mod parts;
mod paths;
mod plot;
mod report;
mod results;
mod scale;
mod services;
mod tls;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use metric::Group;
use paths::{PathKind, RunningPath};
pub use report::new_table;
use report::{Machine, Report};
use services::Services;
use shunt_lab::{Lab, kernel, load};

use crate::{cargo, root, setup, stop, ui};

/// Client addresses: ports enough for half a million connections before one is used again.
const CLIENT_ADDRESSES: u8 = 16;

#[derive(Debug, Args)]
pub struct Options {
    /// How often everything is measured; paths take turns within a round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// Length of each single measurement in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Only these measurements
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Group>,
    /// Only these paths
    #[arg(long, value_enum, value_delimiter = ',')]
    paths: Vec<PathKind>,
    /// One round of two seconds each: does it run at all?
    #[arg(long)]
    quick: bool,
    /// Also shunt with 10 to 50,000 routes
    #[arg(long)]
    scale: bool,
    /// Only shunt with 10 to 50,000 routes
    #[arg(long)]
    scale_only: bool,
    /// Also TLS ended in shunt, HAProxy and nginx
    #[arg(long)]
    tls: bool,
    /// Only TLS ended in shunt, HAProxy and nginx
    #[arg(long)]
    tls_only: bool,
    /// Also a ping-pong beside a flood of TLS handshakes, at shunt, HAProxy and nginx
    #[arg(long)]
    flood: bool,
    /// Only a ping-pong beside a flood of TLS handshakes, at shunt, HAProxy and nginx
    #[arg(long)]
    flood_only: bool,
    /// Only what each part of the nft engine costs a new connection
    #[arg(long)]
    parts_only: bool,
    /// Where results.json and results.svg go
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Neither look for system packages nor build: use what is there
    #[arg(long)]
    no_build: bool,
}

/// Builds, measures, prints, writes.
pub fn run(options: &Options) -> Result<()> {
    let paths = chosen(&options.paths, &PathKind::ALL);
    let (scale, tls) = (options.scale || options.scale_only, options.tls || options.tls_only);
    let flood = options.flood || options.flood_only;
    let needs_shunt = paths.iter().any(|path| path.is_shunt()) || scale || tls || flood || options.parts_only;
    if !options.no_build {
        setup::ensure_done()?;
        if needs_shunt {
            cargo::build_daemon_release()?;
        }
    }
    root::become_root()?;
    load::allow_descriptors(4 * measure::IDLE as u64)?;

    let binary = needs_shunt.then(cargo::daemon_release);
    let duration = Duration::from_secs(if options.quick { 2 } else { options.seconds });
    let rounds = if options.quick { 1 } else { options.rounds };
    let lab = Lab::builder().client_addresses(CLIENT_ADDRESSES).build()?;
    let services = Services::start(&lab)?;

    let background = background_percent()?;
    note_listeners();
    let samples = if options.scale_only || options.tls_only || options.flood_only || options.parts_only {
        results::Samples::default()
    } else {
        let groups = chosen(&options.only, &Group::ALL);
        Comparison { lab: &lab, services: &services, shunt: binary.as_deref(), duration }
            .run(rounds, &groups, &paths)?
    };
    let scale = match &binary {
        Some(binary) if scale => scale::measure(&lab, binary, options.quick)?,
        _ => Vec::new(),
    };
    let tls = match &binary {
        Some(binary) if tls => tls::measure(&lab, binary, duration, rounds)?,
        _ => Vec::new(),
    };
    let flood = match &binary {
        Some(binary) if flood => flood::measure(&lab, binary, duration, rounds)?,
        _ => Vec::new(),
    };
    let parts = match &binary {
        Some(binary) if options.parts_only => parts::measure(&lab, binary, duration, rounds)?,
        _ => Vec::new(),
    };

    let report = Report {
        machine: Machine::read(background)?,
        rounds: rounds.into(),
        seconds: duration.as_secs(),
        rows: Report::rows(samples.cells()),
        scale,
        tls,
        flood,
        parts,
    };
    println!("{}", report.tables());
    write(&report, &cargo::workspace().join(&options.out))
}

struct Comparison<'a> {
    lab: &'a Lab,
    services: &'a Services,
    shunt: Option<&'a Path>,
    duration: Duration,
}

impl Comparison<'_> {
    /// Each measurement is taken on one path right after the other: what disturbs the machine for a minute disturbs all.
    fn run(&self, rounds: u16, groups: &[Group], paths: &[PathKind]) -> Result<results::Samples> {
        let mut samples = results::Samples::default();
        for round in 0..rounds {
            for group in groups {
                ui::step(&format!("round {}/{rounds}: {}", round + 1, group.title()));
                for path in in_turn(paths, round.into()) {
                    stop::check()?;
                    let taken = self.one(path, *group);
                    samples
                        .add(path, taken.with_context(|| format!("{path}, {}, round {}", group.title(), round + 1))?);
                }
            }
        }
        Ok(samples)
    }

    fn one(&self, kind: PathKind, group: Group) -> Result<Vec<measure::Sample>> {
        let path = RunningPath::start(kind, self.lab, self.shunt)?;
        let round = measure::Round { lab: self.lab, services: self.services, path: &path, duration: self.duration };
        let samples = round.measure(group)?;
        path.stop(self.lab)?;
        Ok(samples)
    }
}

/// What other programs take of the processors, in percent of one; says so when it is enough to blur the result.
fn background_percent() -> Result<f64> {
    const LOOK: Duration = Duration::from_secs(1);
    let before = kernel::busy_seconds()?;
    thread::sleep(LOOK);
    let percent = 100.0 * (kernel::busy_seconds()? - before) / LOOK.as_secs_f64();
    if percent > 10.0 {
        ui::note(&format!("other programs use {percent:.0} % of a processor: expect noise"));
    }
    Ok(percent)
}

/// Says so when somebody on this machine hears conntrack events: the kernel then makes them for every path, which costs most
/// where nobody wanted them (`netlink_has_listeners` asks a table of all network namespaces).
fn note_listeners() {
    const NETLINK_NETFILTER: &str = "12";
    // NFNLGRP_CONNTRACK_NEW, _UPDATE, _DESTROY
    const CONNTRACK: u32 = 0b111;
    let hears = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let groups = fields.get(3).and_then(|groups| u32::from_str_radix(groups, 16).ok());
        fields.get(1) == Some(&NETLINK_NETFILTER) && groups.is_some_and(|groups| groups & CONNTRACK != 0)
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let sockets = processes.filter_map(|process| fs::read_to_string(process.join("net/netlink")).ok());
    if sockets.into_iter().any(|sockets| sockets.lines().any(hears)) {
        ui::note("somebody hears conntrack events: the hand-written rules pay for them, too");
    }
}

/// All, in their order, unless some were chosen.
fn chosen<T: Copy + PartialEq>(choice: &[T], all: &[T]) -> Vec<T> {
    all.iter().copied().filter(|one| choice.is_empty() || choice.contains(one)).collect()
}

/// Each round begins with another path, so that none is always the first after a pause.
fn in_turn(paths: &[PathKind], round: usize) -> Vec<PathKind> {
    let mut paths = paths.to_vec();
    let by = round % paths.len().max(1);
    paths.rotate_left(by);
    paths
}

fn write(report: &Report, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let (json, svg) = (dir.join("results.json"), dir.join("results.svg"));
    fs::write(&json, serde_json::to_vec_pretty(report)?).with_context(|| format!("write {}", json.display()))?;
    let measured = [report.rows.len(), report.scale.len(), report.tls.len(), report.flood.len(), report.parts.len()]
        .iter()
        .any(|count| *count > 0);
    ensure!(measured, "nothing was measured");
    if !report.rows.is_empty() {
        plot::write(report, &svg)?;
        root::give_back(&svg)?;
    }
    root::give_back(dir)?;
    root::give_back(&json)?;
    ui::step(&format!("written: {} and results.svg beside it", json.display()));
    Ok(())
}
