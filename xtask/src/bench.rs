//! The benchmark: shunt's nft engine beside what it must not be slower than, and what it replaces.

mod measure;
mod metric;
mod paths;
mod plot;
mod report;
mod results;
mod scale;
mod services;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use metric::Group;
use paths::{PathKind, RunningPath};
pub use report::new_table;
use report::{Machine, Report};
use services::Services;
use shunt_lab::{Lab, load};

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
    let needs_shunt = paths.contains(&PathKind::Shunt) || options.scale || options.scale_only;
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

    let mut samples = results::Samples::default();
    if !options.scale_only {
        let groups = chosen(&options.only, &Group::ALL);
        for round in 0..rounds {
            for path in in_turn(&paths, round.into()) {
                ui::step(&format!("round {}/{rounds}: {path}", round + 1));
                let taken = one_path(&lab, &services, path, binary.as_deref(), &groups, duration);
                samples.add(path, taken.with_context(|| format!("{path}, round {}", round + 1))?);
            }
        }
    }
    let scale = match &binary {
        Some(binary) if options.scale || options.scale_only => scale::measure(&lab, binary, duration, options.quick)?,
        _ => Vec::new(),
    };

    let report = Report {
        machine: Machine::read()?,
        rounds: rounds.into(),
        seconds: duration.as_secs(),
        rows: Report::rows(samples.cells()),
        scale,
    };
    println!("{}", report.tables());
    write(&report, &cargo::workspace().join(&options.out))
}

fn one_path(
    lab: &Lab,
    services: &Services,
    kind: PathKind,
    shunt: Option<&Path>,
    groups: &[Group],
    duration: Duration,
) -> Result<Vec<measure::Sample>> {
    let path = RunningPath::start(kind, lab, shunt)?;
    let mut samples = Vec::new();
    for group in groups {
        stop::check()?;
        samples.extend(measure::Round { lab, services, path: &path, duration }.measure(*group)?);
    }
    path.stop(lab)?;
    Ok(samples)
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
    ensure!(!report.rows.is_empty() || !report.scale.is_empty(), "nothing was measured");
    if !report.rows.is_empty() {
        plot::write(report, &svg)?;
        root::give_back(&svg)?;
    }
    root::give_back(dir)?;
    root::give_back(&json)?;
    ui::step(&format!("written: {} and results.svg beside it", json.display()));
    Ok(())
}
