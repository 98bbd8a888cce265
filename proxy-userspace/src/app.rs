//! The daemon from start to stop, top-down.
//!
//! Start: configuration, admin socket (which a second daemon cannot have), probes, plan; only then the kernel is touched:
//! settings, the event socket, and one batch for the table. Stop: the admin API goes, the table stays: what the
//! kernel forwards it goes on forwarding.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_core::{capability::Capabilities, config::Config, diff::Change, flow::MarkLayout, plan::plan};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    access_log::AccessLog,
    admin::{self, Listeners},
    control::{Control, RouteCommand, RouteState},
    health::Checks,
    kernel::{
        capability,
        conntrack::{Hear, NetlinkConntrack},
        memory,
        nft::{KernelNft, Nft, NftError, NftMonitor},
        sysctl::{self, Restored, Settings},
    },
    logging,
    reconcile::{
        ReconcileError, Reconciler,
        announce::Announcer,
        task::{Inputs, Task, failure, load, needed},
    },
    resolve::Names,
    track::{self, Tracker},
};

/// Why the daemon does not start or a command fails: what is wrong, how to mend it, and the exit code.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Refusal {
    pub what: String,
    pub mend: Option<String>,
    /// 1: refused; 4: missing privilege or kernel feature.
    pub code: u8,
}

impl Refusal {
    fn refused(what: impl ToString, mend: impl Into<Option<String>>) -> Self {
        Self { what: what.to_string(), mend: mend.into(), code: 1 }
    }

    fn missing(what: impl ToString, mend: impl Into<String>) -> Self {
        Self { what: what.to_string(), mend: Some(mend.into()), code: 4 }
    }
}

/// Commands waiting for the owner of the routes, at most.
const COMMANDS: usize = 64;
/// Health reports, names and drained routes waiting for it, at most.
const REPORTS: usize = 1024;

/// From one dump of conntrack to the next, when that is cheap.
const REPORTING: Duration = Duration::from_secs(2);

/// Bytes of conntrack events that may wait: some 52,000 of them.
const EVENT_QUEUE: usize = 32 << 20;

/// As many flows as conntrack can hold.
fn max_flows() -> usize {
    let max = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").ok();
    max.and_then(|max| max.trim().parse().ok()).unwrap_or(262_144)
}

/// Runs the daemon until SIGTERM or SIGINT.
pub fn run(config_file: &Path) -> Result<(), Refusal> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Refusal::refused(format!("cannot start: {e}"), None))?;
    runtime.block_on(start(config_file))
}

async fn start(config_file: &Path) -> Result<(), Refusal> {
    let config = load(config_file).map_err(|f| Refusal::refused(f.error, f.hint))?;
    let log = logging::init(&config.log).map_err(|e| Refusal::refused(e, None))?;
    let listeners =
        Listeners::bind(config.admin.listen, &config.admin.socket).await.map_err(|e| Refusal::refused(&e, e.mend()))?;
    let capabilities = probe()?;
    let unserved = plan(&config, &capabilities).unserved();
    if let Some(first) = unserved.first() {
        let all: Vec<String> = unserved.iter().map(ToString::to_string).collect();
        tracing::debug!(route = %first.route, "no engine");
        return Err(Refusal::refused(
            all.join("\n"),
            Some("`shunt plan` shows every route and what rules its engines out".into()),
        ));
    }
    let daemon = Daemon::install(config_file, config, capabilities, log).await?;
    daemon.serve(listeners).await;
    Ok(())
}

fn probe() -> Result<Capabilities, Refusal> {
    let has = capability::probe();
    let doctor = "`shunt doctor` shows what is there and what is missing";
    if !has.net_admin {
        let mend = "run as root, or give the service AmbientCapabilities=CAP_NET_ADMIN; `shunt doctor` shows more";
        return Err(Refusal::missing("CAP_NET_ADMIN is missing: without it nothing can be put into the kernel", mend));
    }
    if !has.nft_nat {
        return Err(Refusal::missing("this kernel has no nf_tables with NAT in the inet family", doctor));
    }
    if !has.conntrack_netlink {
        return Err(Refusal::missing("this kernel has no conntrack over netlink (nf_conntrack_netlink)", doctor));
    }
    Ok(has)
}

/// Everything that runs, before it is served.
struct Daemon {
    task: Task<KernelNft>,
    inputs: Inputs,
    control: Control,
    reload: mpsc::Sender<()>,
    tracker: Tracker,
}

impl Daemon {
    async fn install(
        config_file: &Path,
        config: Config,
        capabilities: Capabilities,
        log: logging::LogHandle,
    ) -> Result<Self, Refusal> {
        let record = sysctl::record_beside(&config.admin.socket);
        let recorded_before = record.exists();
        let settings = Settings::default();
        let applied = settings.apply(&needed(&config), &record).map_err(|e| Refusal::missing(&e, e.mend()))?;
        for warning in &applied.warnings {
            tracing::warn!("{warning}");
        }
        let installed = Self::table(config_file, config, capabilities, log, &record, applied.warnings).await;
        if installed.is_err() && !recorded_before {
            // Nothing was here before this start: leave nothing behind.
            drop(sysctl::restore(&settings, &record));
        }
        installed
    }

    async fn table(
        config_file: &Path,
        config: Config,
        capabilities: Capabilities,
        log: logging::LogHandle,
        record: &Path,
        warnings: Vec<String>,
    ) -> Result<Self, Refusal> {
        let refuse = |e: NftError| Refusal { what: e.to_string(), mend: e.mend(), code: e.exit_code() };
        let nft = KernelNft::open().map_err(refuse)?;
        let port_id = nft.port_id();
        let layout = MarkLayout::new(config.kernel.mark_mask);
        let (drained_tx, drained) = mpsc::channel(REPORTS);
        let (failed_tx, failed_dials) = mpsc::channel(REPORTS);
        let clock = track::Clock::start();
        let access_log = AccessLog::stdout(config.log.format, config.log.access)
            .map_err(|e| Refusal::refused(format!("cannot write the access log: {e}"), None))?;
        let interval = REPORTING;
        let options = track::Options {
            layout,
            interval,
            max_flows: max_flows(),
            clock,
            access_log,
            drained: drained_tx,
            failed_dials: failed_tx,
        };
        // Before the table: no connection ends unheard.
        let tracker =
            Tracker::spawn(options, move || NetlinkConntrack::open(layout.id_mask(), EVENT_QUEUE, Hear::as_needed()))
                .map_err(|e| Refusal::missing(&e, "`shunt doctor` shows what is missing"))?;
        let mut announcer = Announcer::new(tracker.inputs.clone(), clock, capabilities.nft_ct_timeout);
        let refuse_route = |error: ReconcileError| {
            let told = failure(&error);
            let code = if let ReconcileError::Nft(e) = &error { e.exit_code() } else { 1 };
            Refusal { what: told.error, mend: told.hint, code }
        };
        let (mut reconciler, found) =
            Reconciler::open(nft, config, capabilities, Instant::now()).map_err(refuse_route)?;
        announcer.announce(&found.serves).await;
        let outcome = reconciler.install(&found).map_err(refuse_route)?;
        let adopted = found.adopted.clone();
        drop(found);
        // After the install, which it would be told element by element; verified before anything is served.
        let monitor = match reconciler.is_locked() {
            true => None,
            false => {
                let monitor = NftMonitor::open(port_id).map_err(refuse)?.into_async();
                Some(monitor.map_err(|e| Refusal::refused(format!("cannot watch nftables: {e}"), None))?)
            }
        };
        tracing::info!(
            routes = outcome.added.len(),
            adopted = adopted.routes,
            draining = adopted.draining,
            changes = outcome.changes,
            apply_ms = outcome.apply.as_secs_f64() * 1e3,
            "table inet shunt is in the kernel"
        );
        let (commands_tx, commands) = mpsc::channel::<RouteCommand>(COMMANDS);
        let (reports_tx, reports) = mpsc::channel(REPORTS);
        let (resolved_tx, resolved) = mpsc::channel(REPORTS);
        let (reload_tx, reload) = mpsc::channel(1);
        let (published, route_state) = watch::channel(Arc::new(RouteState::default()));
        let mut task = Task {
            reconciler,
            config_file: config_file.to_owned(),
            settings_record: record.to_owned(),
            log,
            checks: Checks::new(reports_tx),
            names: Names::new(resolved_tx),
            track: announcer,
            published,
            reloads_ok: 0,
            reloads_failed: 0,
            last_problem: None,
            setting_warnings: warnings,
        };
        task.begin(outcome.effects).await;
        let control = Control {
            routes: commands_tx,
            flows: tracker.commands.clone(),
            route_state,
            flow_state: tracker.state.clone(),
        };
        let inputs = Inputs { commands, reports, resolved, failed_dials, drained, reload, monitor };
        Ok(Self { task, inputs, control, reload: reload_tx, tracker })
    }

    async fn serve(mut self, listeners: Listeners) {
        self.verify();
        let (stop_tx, stop) = watch::channel(false);
        let mut admin_stop = stop.clone();
        let api = tokio::spawn(admin::serve(listeners, self.control, async move { drop(admin_stop.changed().await) }));
        let routes = tokio::spawn(self.task.run(self.inputs, stop));
        notify(&[sd_notify::NotifyState::Ready]);
        tracing::info!("ready");
        wait_for_signals(&self.reload).await;
        notify(&[sd_notify::NotifyState::Stopping]);
        tracing::info!("stopping; the kernel goes on forwarding, `shunt cleanup` would end that");
        stop_tx.send_replace(true);
        drop(tokio::join!(api, routes));
        // Waits for the last lines of the access log.
        self.tracker.stop().await;
    }

    /// The kernel took the batch whole or not at all; reading it back guards against defects, and against others while the
    /// table is not locked. A large locked table is not worth the second it takes.
    fn verify(&mut self) {
        if self.task.reconciler.is_locked() && self.task.reconciler.plan().routes().len() > 5_000 {
            return memory::give_back();
        }
        match self.task.reconciler.verify() {
            Ok(0) => {}
            Ok(differences) => tracing::error!(differences, "the kernel's table is not what was asked for"),
            Err(error) => tracing::warn!(%error, "the table could not be read back"),
        }
        memory::give_back();
    }
}

async fn wait_for_signals(reload: &mpsc::Sender<()>) {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()));
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = signals else {
        tracing::error!("signals cannot be handled: stopping");
        return;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => return,
            _ = interrupt.recv() => return,
            // One reload that has not begun yet stands for all that come meanwhile.
            _ = hangup.recv() => drop(reload.try_send(())),
        }
    }
}

fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// What `shunt cleanup` did, one line each.
pub fn cleanup(socket: &Path) -> Result<Vec<String>, Refusal> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Refusal::refused(format!("cannot start: {e}"), None))?;
    // Held to the end: no daemon starts meanwhile, and none is running.
    let held = runtime
        .block_on(Listeners::bind(None, socket))
        .map_err(|e| Refusal::refused(&e, Some("stop the daemon first: systemctl stop shunt".to_owned())))?;
    let mut done = Vec::new();
    let refuse = |e: NftError| Refusal { what: e.to_string(), mend: e.mend(), code: e.exit_code() };
    let mut nft = KernelNft::open().map_err(refuse)?;
    let table = nft.snapshot().map_err(refuse)?.table;
    if let Some(table) = table {
        // An orphan of a daemon that locked it must be taken over before it can be deleted.
        let adopt = Change::AddTable { lock: true };
        let changes = if table.locked { vec![adopt, Change::DeleteTable] } else { vec![Change::DeleteTable] };
        nft.apply(&changes).map_err(refuse)?;
        done.push("deleted table inet shunt: what it forwarded ends".into());
    }
    let restored = sysctl::restore(&Settings::default(), &sysctl::record_beside(socket));
    for setting in restored.map_err(|e| Refusal::missing(&e, e.mend()))? {
        done.push(match setting {
            Restored::PutBack { name, from, to } => format!("{name}: {from} -> {to}, as before shunt"),
            Restored::Foreign { name, value, ours } => {
                format!("{name} is {value}: shunt had set it to {ours}, somebody has changed it since; left alone")
            }
            Restored::Gone { name } => format!("{name} is gone; nothing to put back"),
        });
    }
    drop(held);
    Ok(done)
}
