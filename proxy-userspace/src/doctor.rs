//! `shunt doctor`: what this kernel and these privileges allow, and the command that mends each missing thing.
//! Looks only; the kernel may load its nf_tables and conntrack modules on the way.

mod conntrack;
mod features;
mod forward;
mod host;
mod privileges;
mod routes;
mod settings;

use std::path::Path;

use proxy_core::{capability::Capabilities, config::Config, plan::plan};
use serde::Serialize;

use crate::{
    kernel::{
        bpf, capability,
        sysctl::{Routes, Settings},
    },
    reconcile::task::routes_of,
    stream,
};

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub checks: Vec<Check>,
}

impl Report {
    /// Nothing that the routes need is missing; without a configuration, nothing that the `nft` engine needs.
    pub fn can_run(&self) -> bool {
        self.checks.iter().all(|check| check.state != State::Missing)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    /// shunt runs, with something less.
    Warn,
    /// shunt's nft engine cannot run, or the daemon cannot listen.
    Missing,
}

#[derive(Debug, Clone, Serialize)]
pub struct Check {
    pub name: String,
    pub state: State,
    /// What is the case, a few words.
    pub found: String,
    /// Why it matters, one sentence.
    pub why: &'static str,
    /// Commands or steps, any one of which mends it; empty when there is nothing to mend.
    pub mend: Vec<String>,
}

impl Check {
    fn of(name: impl Into<String>, why: &'static str) -> Unfound {
        Unfound { name: name.into(), why }
    }

    /// What is missing is for the nft engine, and no route is served by it.
    fn not_needed(&mut self) {
        if self.state == State::Missing {
            self.state = State::Ok;
            self.found += "; not needed: the daemon relays every route";
            self.mend.clear();
        }
    }
}

/// A check before its result.
#[derive(Debug)]
struct Unfound {
    name: String,
    why: &'static str,
}

impl Unfound {
    fn ok(self, found: impl Into<String>) -> Check {
        self.with(State::Ok, found.into(), Vec::new())
    }

    fn warn(self, found: impl Into<String>, mend: impl Into<String>) -> Check {
        self.with(State::Warn, found.into(), vec![mend.into()])
    }

    fn missing(self, found: impl Into<String>, mend: impl Into<String>) -> Check {
        self.with(State::Missing, found.into(), vec![mend.into()])
    }

    /// `ok` when `there`, otherwise a warning.
    fn either(self, there: bool, found: &str, absent: &str, mend: &str) -> Check {
        if there { self.ok(found) } else { self.warn(absent, mend) }
    }

    fn with(self, state: State, found: String, mend: Vec<String>) -> Check {
        Check { name: self.name, state, found, why: self.why, mend }
    }
}

/// Runs every check; with `config` also those its routes need. `socket`: where a running daemon would answer.
pub fn examine(config: Option<&Config>, socket: Option<&Path>) -> Report {
    // Where pins would be depends on it only where a BPF file system is mounted beside it.
    let beside = config.map(|config| config.admin.socket.as_path()).or(socket).unwrap_or(Path::new("admin.sock"));
    let handoff = capability::handoff::ask(beside);
    let probe = capability::Probe { handoff: handoff.clone(), ..capability::probe_details() };
    let settings = Settings::default();
    // What the routes want of the kernel, not what is left of it here.
    let sockmap = stream::trust_in_sockmap();
    let wanted = Capabilities { net_admin: true, sockmap: sockmap.clone(), ..probe.capabilities() };
    let plan = config.map(|config| plan(config, &wanted));
    let routes = plan.as_ref().map_or(Routes { ipv4: true, ipv6: true, relayed: true, handed: false }, |plan| {
        routes_of(plan.routes().iter())
    });
    let mut checks = privileges::checks(&probe);
    checks.push(host::kernel_version());
    checks.extend(features::checks(&probe));
    checks.extend(settings::checks(&settings, routes));
    checks.extend(conntrack::checks(&settings));
    if plan.as_ref().is_some_and(|plan| !plan.uses_nft()) {
        checks.iter_mut().for_each(Check::not_needed);
    }
    checks.extend(forward::checks());
    checks.extend(forward::passed_by(&probe.filters, plan.as_ref()));
    checks.push(settings::reverse_path(&settings, config));
    checks.push(features::ebpf(&capability::ebpf::features()));
    checks.push(features::own_object(bpf::self_probe()));
    checks.push(features::sockmap(&sockmap));
    checks.push(features::handoff(&handoff));
    checks.push(host::file_limit());
    checks.extend(socket.map(host::running_daemon));
    if let (Some(config), Some(plan)) = (config, &plan) {
        checks.extend(routes::checks(config, &Capabilities { sockmap, ..probe.capabilities() }));
        checks.extend(routes::way_back(plan, &settings));
        checks.push(privileges::low_ports(plan));
    }
    Report { checks }
}
