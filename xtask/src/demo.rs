//! The demonstration: real servers, real clients, a daemon that may be killed.

mod acts;
mod show;
mod stage;
mod traffic;

use std::{path::PathBuf, thread, time::Duration};

use anyhow::{Result, bail};
use clap::Args;

use crate::{cargo, root, setup, stop, ui};
use acts::Finding;
use stage::Stage;

#[derive(Debug, Args)]
pub struct Options {
    /// End by itself after the last act, with a summary; exit code 1 when something broke
    #[arg(long)]
    once: bool,
    /// Configuration to start from
    #[arg(long, default_value = "deploy/demo.toml")]
    config: PathBuf,
    /// Neither look for system packages nor build: use what is there
    #[arg(long)]
    no_build: bool,
}

/// Builds, plays the acts, and stays unless told to end.
pub fn run(options: &Options) -> Result<()> {
    if !options.no_build {
        root::within_reach()?;
        setup::ensure_done()?;
        let args = ["build", "--locked", "--package", "proxy-userspace", "--bin", "shunt"];
        cargo::run("build: the daemon", &mut cargo::command(&args))?;
    }
    root::become_root()?;
    let mut stage = Stage::set(&cargo::workspace().join(&options.config))?;
    stage.print_map();
    let findings = acts::play(&mut stage)?;
    if !options.once && !stop::asked() {
        stay(&mut stage)?;
    }
    summarise(&findings)
}

/// Until Ctrl-C: live view, and a daemon that comes back when somebody kills it.
fn stay(stage: &mut Stage) -> Result<()> {
    ui::step("the demo stays until Ctrl-C");
    stage.print_hints();
    while !stop::asked() {
        show::watch(stage, Duration::from_secs(3600))?;
        if !stage.daemon_lives() {
            ui::note("the daemon is gone; traffic goes on without it. It is started again in 3 s");
            thread::sleep(Duration::from_secs(3));
            stage.shunt.kill9();
            stage.shunt.restart()?;
        }
    }
    Ok(())
}

fn summarise(findings: &[Finding]) -> Result<()> {
    println!();
    for finding in findings {
        let mark = if finding.kept { "kept  " } else { "BROKEN" };
        println!("{mark}  {}\n        {}", finding.promise, finding.seen);
    }
    let broken = findings.iter().filter(|finding| !finding.kept).count();
    if stop::asked() && broken == 0 {
        return Ok(());
    }
    if broken > 0 || findings.is_empty() {
        bail!("{broken} of {} promises broken", findings.len());
    }
    Ok(())
}
