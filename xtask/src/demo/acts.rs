//! What is shown, act by act.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde_json::Value;
use shunt_lab::{GATEWAY, Shunt, wait_until};

use super::{
    show,
    stage::{Stage, WEB},
    traffic::Tally,
};
use crate::{stop, ui};

/// A promise, and whether it was kept before your eyes.
#[derive(Debug)]
pub struct Finding {
    pub promise: &'static str,
    pub kept: bool,
    pub seen: String,
}

/// Plays all acts; ends early when somebody asks to stop.
pub fn play(stage: &mut Stage) -> Result<Vec<Finding>> {
    let acts: [fn(&mut Stage) -> Result<Finding>; 5] =
        [steady, a_backend_dies, a_backend_returns, the_daemon_is_killed, a_route_is_added];
    let mut findings = Vec::new();
    for act in acts {
        if stop::asked() {
            break;
        }
        findings.push(act(stage)?);
    }
    findings.push(the_long_connection(stage));
    Ok(findings)
}

fn steady(stage: &mut Stage) -> Result<Finding> {
    ui::step("act 1: traffic flows, the kernel forwards it, the daemon counts");
    show::watch(stage, Duration::from_secs(5))?;
    let page = stage.lab.client().curl(&format!("http://{GATEWAY}:{WEB}/who"))?;
    let tally = stage.traffic.tally();
    Ok(Finding {
        promise: "requests go to both backends, none fails",
        kept: tally.failed == 0 && tally.answered.iter().all(|n| *n > 0) && page.starts_with(b"backend"),
        seen: describe(&tally),
    })
}

fn a_backend_dies(stage: &mut Stage) -> Result<Finding> {
    ui::step("act 2: nginx on backend2 is killed");
    let before = stage.traffic.tally();
    stage.web[1].kill();
    let killed = Instant::now();
    wait_until("shunt takes backend2 out", Duration::from_secs(10), || backends_up(&stage.shunt) == Some(2))?;
    let (noticed, out) = (killed.elapsed(), stage.traffic.tally());
    show::watch(stage, Duration::from_secs(3))?;
    let after = stage.traffic.tally().since(&out);
    Ok(Finding {
        promise: "a dead backend is taken out, the next requests reach the other",
        kept: after.failed == 0 && after.answered[0] > 0 && after.answered[1] == 0,
        seen: format!(
            "out after {} ms ({} requests refused until then); after that {}",
            noticed.as_millis(),
            out.since(&before).failed,
            describe(&after)
        ),
    })
}

fn a_backend_returns(stage: &mut Stage) -> Result<Finding> {
    ui::step("act 3: nginx on backend2 is started again");
    let before = stage.traffic.tally();
    stage.revive(2)?;
    let revived = Instant::now();
    wait_until("shunt takes backend2 back", Duration::from_secs(10), || backends_up(&stage.shunt) == Some(4))?;
    let noticed = revived.elapsed();
    wait_until("backend2 answers", Duration::from_secs(5), || stage.traffic.tally().since(&before).answered[1] > 20)?;
    let after = stage.traffic.tally().since(&before);
    Ok(Finding {
        promise: "a backend that returns gets connections again",
        kept: after.failed == 0,
        seen: format!("back after {} ms; {}", noticed.as_millis(), describe(&after)),
    })
}

fn the_daemon_is_killed(stage: &mut Stage) -> Result<Finding> {
    ui::step("act 4: wrk loads the gateway, and the daemon is killed with SIGKILL");
    let mut wrk = stage.lab.client().command("wrk");
    wrk.args(["-t1", "-c32", "-d8s", &format!("http://{GATEWAY}:{WEB}/index.html")]);
    let mut wrk = shunt_lab::Running::start("wrk", wrk, stage.lab.dir())?;
    show::watch(stage, Duration::from_secs(2))?;
    let (counted, before) = (total(&stage.shunt)?, stage.traffic.tally());
    stage.shunt.kill9();
    ui::note("killed; nobody is there but the kernel, for three seconds");
    thread::sleep(Duration::from_secs(3));
    let without = stage.traffic.tally().since(&before);
    stage.shunt.restart()?;
    ui::note("a new daemon has taken over the table and the flows");
    show::watch(stage, Duration::from_secs(2))?;
    wrk.wait(Duration::from_secs(20))?;
    let report = wrk.log();
    let after = stage.traffic.tally().since(&before);
    let goes_on = || total(&stage.shunt).is_ok_and(|now| now >= counted + after.requests());
    let counts = wait_until("the counters go on", Duration::from_secs(5), goes_on).is_ok();
    let clean = !report.contains("Socket errors") && report.contains("Requests/sec");
    let rate = report.lines().find_map(|line| line.strip_prefix("Requests/sec:")).unwrap_or("?").trim();
    Ok(Finding {
        promise: "kill -9 of the daemon under load: no request fails, counters go on",
        kept: clean && counts && after.failed == 0 && after.broken == 0 && after.lost == 0 && without.requests() > 0,
        seen: format!(
            "without a daemon: {}; in all: {}; {} broken; wrk {rate} requests/s, {}; counted {counted} → {}",
            describe(&without),
            describe(&after),
            after.broken,
            if clean { "no socket errors" } else { "SOCKET ERRORS" },
            total(&stage.shunt)?
        ),
    })
}

fn a_route_is_added(stage: &mut Stage) -> Result<Finding> {
    ui::step("act 5: one more route in the file, then SIGHUP");
    let before = stage.traffic.tally();
    let more = "\n[[route]]\nname = \"more\"\nlisten = [\"10.88.1.1:8081\"]\nbackends = [\"10.88.2.3:80\"]\n";
    stage.shunt.write_config(&format!("{}{more}", stage.config))?;
    stage.shunt.signal(Signal::SIGHUP)?;
    let begin = Instant::now();
    let url = format!("http://{GATEWAY}:8081/who");
    wait_until("the new route answers", Duration::from_secs(5), || stage.lab.client().curl(&url).is_ok())?;
    let took = begin.elapsed();
    let page = String::from_utf8_lossy(&stage.lab.client().curl(&url)?).trim().to_owned();
    show::watch(stage, Duration::from_secs(2))?;
    let after = stage.traffic.tally().since(&before);
    Ok(Finding {
        promise: "a reload adds a route, the others do not notice",
        kept: page == "backend2" && after.failed == 0 && after.broken == 0 && after.lost == 0,
        seen: format!("{page} answers after {} ms; meanwhile {}", took.as_millis(), describe(&after)),
    })
}

fn the_long_connection(stage: &mut Stage) -> Finding {
    let ended = stage.bulk.ended();
    let seen = stage.shunt.route("bulk").ok().and_then(|route| route["bytes_in"].as_u64()).unwrap_or(0);
    Finding {
        promise: "the one long connection lived through all of it, and its bytes were counted",
        kept: ended.is_none() && seen > 0,
        seen: match ended {
            None => format!("iperf3 still sends; {:.1} MB counted", seen as f64 / 1e6),
            Some(status) => format!("iperf3 ended: {status}: {}", stage.bulk.log().lines().last().unwrap_or_default()),
        },
    }
}

/// Backends of `web` that take connections.
fn backends_up(shunt: &Shunt) -> Option<usize> {
    let route = shunt.route("web").ok()?;
    Some(route["backends"].as_array()?.iter().filter(|backend| backend["up"] == true).count())
}

/// Connections of `web` so far.
fn total(shunt: &Shunt) -> Result<u64> {
    let route: Value = shunt.route("web")?;
    route["connections_total"].as_u64().context("connections_total")
}

fn describe(tally: &Tally) -> String {
    let [one, two] = tally.answered;
    format!(
        "{} requests ({one} + {two}), {} failed, UDP {} of {}",
        one + two,
        tally.failed,
        tally.datagrams,
        tally.datagrams + tally.lost
    )
}
