//! The daemon from start to stop, top-down.
//!
//! Start: configuration, admin socket (which a second daemon cannot have), probes, plan; only then the kernel is touched:
//! settings, the event socket, listen sockets, and one batch for the table. A configuration whose routes the daemon relays
//! itself touches neither settings nor table, and needs no privilege for them.
//!
//! Stop: nothing new is accepted, relayed connections finish within their `timeouts.drain` while the admin API answers,
//! then it goes too. The table stays: what the kernel forwards it goes on forwarding.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_core::{
    capability::{Capabilities, Handoff},
    config::{self, Config, Engine},
    diff::Change,
    flow::MarkLayout,
    plan::{Capability, Plan, Refusal as Refused, RoutePlan, Unserved, plan},
    view,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinHandle,
};

use crate::{
    access_log::{self, AccessLog},
    acme,
    admin::{self, Listeners},
    control::{Control, RouteCommand, RouteState},
    handoff,
    health::Checks,
    kernel::{
        bpf::handoff::HandoffError,
        capability,
        conntrack::{Hear, NetlinkConntrack},
        memory,
        nft::{KernelNft, Nft, NftError, NftMonitor},
        return_path,
        sysctl::{self, Restored, Settings},
    },
    logging,
    reconcile::{
        ReconcileError, Reconciler,
        announce::Announcer,
        task::{Inputs, Task, failure, load, needed},
    },
    resolve::Names,
    stream::{
        self, StreamError, StreamPath,
        handed::{Begun, Store},
    },
    track::{self, FailedDial, Tracker},
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
    let result = runtime.block_on(start(config_file));
    // Not for relayed connections that a second signal has cut.
    runtime.shutdown_background();
    result
}

async fn start(config_file: &Path) -> Result<(), Refusal> {
    let config = load(config_file).map_err(|f| Refusal::refused(f.error, f.hint))?;
    let log = logging::init(&config.log).map_err(|e| Refusal::refused(e, None))?;
    let listeners =
        Listeners::bind(config.admin.listen, &config.admin.socket).await.map_err(|e| Refusal::refused(&e, e.mend()))?;
    let mut capabilities = capability::probe(&config, stream::trust_in_sockmap());
    let plan = plan(&config, &capabilities);
    let unserved = plan.unserved();
    if !unserved.is_empty() {
        return Err(refuse_unserved(&unserved));
    }
    let (plan, handoff) = bring_up(&config, plan, &mut capabilities)?;
    let warnings = degraded(&plan, &capabilities).into_iter().collect();
    let store = handoff.as_ref().map(|begun| begun.store.clone());
    let daemon = Daemon::install(config_file, config, &plan, capabilities, log, warnings, store).await?;
    handoff.into_iter().for_each(Begun::keep);
    drop(plan);
    daemon.serve(listeners).await;
    Ok(())
}

/// What connections are handed over with, where a route does so or a daemon before this one did. Where it cannot be had, routes
/// that do not insist on it are served without.
fn bring_up(config: &Config, first: Plan, capabilities: &mut Capabilities) -> Result<(Plan, Option<Begun>), Refusal> {
    let error = match handoff::begin_where_needed(&first, &config.admin.socket) {
        Ok(begun) => return Ok((first, begun)),
        Err(error) => error,
    };
    capabilities.handoff = Handoff::NotBroughtUp(error.to_string());
    let without = plan(config, capabilities);
    if !without.unserved().is_empty() {
        return Err(refuse_streams(error));
    }
    tracing::warn!(mend = error.mend(), "{error}");
    Ok((without, None))
}

/// What the whole engine nft stands on, not a feature of it.
fn is_basic(capability: Capability) -> bool {
    matches!(capability, Capability::NetAdmin | Capability::NftNat | Capability::Conntrack)
}

fn refuse_unserved(unserved: &[Unserved]) -> Refusal {
    let what = unserved.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let mut refused = unserved.iter().flat_map(|route| &route.refused);
    let lacking = refused.find_map(|(_, refusal)| match refusal {
        Refused::Lacks(capability) if is_basic(*capability) => Some(*capability),
        _ => None,
    });
    match lacking {
        Some(Capability::NetAdmin) => Refusal::missing(
            what,
            "run as root, or give the service AmbientCapabilities=CAP_NET_ADMIN; `shunt doctor` shows more",
        ),
        Some(_) => Refusal::missing(what, "`shunt doctor` shows what is there and what is missing"),
        None => Refusal::refused(what, "`shunt plan` shows every route and what rules its engines out".to_owned()),
    }
}

/// Routes that the kernel could forward, and that the daemon relays for want of something.
fn degraded(plan: &Plan, capabilities: &Capabilities) -> Option<String> {
    if forwards(capabilities) {
        return None;
    }
    let only_basics = |route: &&Arc<RoutePlan>| {
        let mut nft = route.refused.iter().filter(|(engine, _)| *engine == Engine::Nft).peekable();
        nft.peek().is_some() && nft.all(|(_, refusal)| matches!(refusal, Refused::Lacks(c) if is_basic(*c)))
    };
    let routes: Vec<&Arc<RoutePlan>> = plan.routes().iter().filter(only_basics).collect();
    let (_, lacking) = routes.first()?.refused.first()?;
    let counted = match routes.len() {
        1 => "1 route is".to_owned(),
        more => format!("{more} routes are"),
    };
    Some(format!("{lacking}: {counted} relayed by the daemon that the kernel could forward"))
}

/// Whether nftables and conntrack can be used here at all.
fn forwards(capabilities: &Capabilities) -> bool {
    capabilities.net_admin && capabilities.nft_nat && capabilities.conntrack_netlink
}

/// Everything that runs, before it is served.
struct Daemon {
    task: Task<KernelNft, StreamPath>,
    inputs: Inputs,
    control: Control,
    reload: mpsc::Sender<()>,
    tracker: Option<Tracker>,
    /// Ends with the last relayed connection.
    relayed_log: JoinHandle<()>,
}

/// What the parts tell the owner of the routes by, made before them.
struct Channels {
    drained: (mpsc::Sender<u32>, mpsc::Receiver<u32>),
    relayed: (mpsc::Sender<u32>, mpsc::Receiver<u32>),
    failed_dials: (mpsc::Sender<FailedDial>, mpsc::Receiver<FailedDial>),
    access: watch::Sender<config::AccessLog>,
}

impl Daemon {
    async fn install(
        config_file: &Path,
        config: Config,
        plan: &Plan,
        capabilities: Capabilities,
        log: logging::LogHandle,
        mut warnings: Vec<String>,
        handoff: Option<Store>,
    ) -> Result<Self, Refusal> {
        let record = sysctl::record_beside(&config.admin.socket);
        let recorded_before = record.exists();
        let settings = Settings::default();
        let needed = needed(plan.routes().iter());
        let applied = settings.apply(&needed, &record).map_err(|e| Refusal::missing(&e, e.mend()))?;
        warnings.extend(applied.warnings);
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        let installed = Self::routes(config_file, config, capabilities, log, &record, warnings, handoff).await;
        if installed.is_err() && !recorded_before {
            // Nothing was here before this start: leave nothing behind.
            drop(sysctl::restore(&settings, &record));
        }
        installed
    }

    /// Before the table: no connection ends unheard.
    fn tracker(config: &Config, clock: track::Clock, channels: &Channels) -> Result<Tracker, Refusal> {
        let layout = MarkLayout::new(config.kernel.mark_mask);
        let options = track::Options {
            layout,
            interval: REPORTING,
            max_flows: max_flows(),
            clock,
            access_log: access_log(config)?,
            drained: channels.drained.0.clone(),
            failed_dials: channels.failed_dials.0.clone(),
        };
        Tracker::spawn(options, move || NetlinkConntrack::open(layout.id_mask(), EVENT_QUEUE, Hear::as_needed()))
            .map_err(|e| Refusal::missing(&e, "`shunt doctor` shows what is missing"))
    }

    fn streams(
        config: &Config,
        capabilities: &Capabilities,
        channels: &Channels,
        handoff: Option<Store>,
    ) -> Result<(StreamPath, JoinHandle<()>), Refusal> {
        let (ended, told) = mpsc::channel(REPORTS);
        let options = stream::Options {
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            failed_dials: channels.failed_dials.0.clone(),
            drained: channels.relayed.0.clone(),
            lock_tables: config.kernel.lock_table && capabilities.nft_owner_persist,
            ended,
            handoff,
            begin_handoff: {
                let socket = config.admin.socket.clone();
                Box::new(move || handoff::begin(&socket))
            },
        };
        let streams = StreamPath::start(options).map_err(refuse_streams)?;
        let (log, pressure) = (access_log(config)?, Arc::clone(&streams.reader.pressure));
        let log = tokio::spawn(access_log::write_relayed(log, told, channels.access.subscribe(), pressure));
        Ok((streams, log))
    }

    async fn routes(
        config_file: &Path,
        config: Config,
        capabilities: Capabilities,
        log: logging::LogHandle,
        record: &Path,
        warnings: Vec<String>,
        handoff: Option<Store>,
    ) -> Result<Self, Refusal> {
        let channels = Channels {
            drained: mpsc::channel(REPORTS),
            relayed: mpsc::channel(REPORTS),
            failed_dials: mpsc::channel(REPORTS),
            access: watch::channel(config.log.access).0,
        };
        let clock = track::Clock::start();
        let (nft, tracker) = match forwards(&capabilities) {
            true => (Some(KernelNft::open().map_err(refuse_nft)?), Some(Self::tracker(&config, clock, &channels)?)),
            false => (None, None),
        };
        let port_id = nft.as_ref().map(KernelNft::port_id);
        let (streams, relayed_log) = Self::streams(&config, &capabilities, &channels, handoff)?;
        let adopter = streams.adopter();
        let (stream_commands, relayed) = (streams.commands.clone(), streams.reader.clone());
        let inputs = tracker.as_ref().map(|tracker| tracker.inputs.clone());
        let mut announcer = Announcer::new(inputs, clock, capabilities.nft_ct_timeout);
        let (mut reconciler, found) =
            Reconciler::open(nft, streams, config, capabilities, Instant::now()).map_err(|e| refuse_route(&e))?;
        announcer.announce(&found.serves).await;
        let outcome = reconciler.install(&found).map_err(|e| refuse_route(&e))?;
        if let Some(owner) = adopter {
            let _ = owner.send(stream::handed::Command::Adopt);
        }
        let adopted = found.adopted.clone();
        drop(found);
        // After the install, which it would be told element by element; verified before anything is served.
        let monitor = match port_id.filter(|_| !reconciler.is_locked()) {
            None => None,
            Some(port_id) => {
                let monitor = NftMonitor::open(port_id).map_err(refuse_nft)?.into_async();
                Some(monitor.map_err(|e| Refusal::refused(format!("cannot watch nftables: {e}"), None))?)
            }
        };
        let apply_ms = view::milliseconds(outcome.apply);
        let (routes, changes) = (outcome.added.len(), outcome.changes);
        match reconciler.has_table() {
            true => tracing::info!(
                routes,
                adopted = adopted.routes,
                draining = adopted.draining,
                changes,
                apply_ms,
                "table inet shunt is in the kernel"
            ),
            false => {
                tracing::info!(routes, apply_ms, "the daemon relays every route; table inet shunt is not needed")
            }
        }
        let (commands_tx, commands) = mpsc::channel::<RouteCommand>(COMMANDS);
        let (reports_tx, reports) = mpsc::channel(REPORTS);
        let (resolved_tx, resolved) = mpsc::channel(REPORTS);
        let (reload_tx, reload) = mpsc::channel(1);
        let (published, route_state) = watch::channel(Arc::new(RouteState::default()));
        let (rates, relayed_rates) = watch::channel(Arc::default());
        tokio::spawn(stream::rates::sample(relayed.clone(), REPORTING, rates));
        let Channels { drained, relayed: gone, failed_dials, access } = channels;
        let acme = acme::Handle::start(relayed.acme.clone(), relayed.tls.clone());
        let flow_state = tracker.as_ref().map_or_else(|| watch::channel(Arc::default()).1, |t| t.state.clone());
        let mut task = Task {
            reconciler,
            config_file: config_file.to_owned(),
            settings_record: record.to_owned(),
            log,
            checks: Checks::new(reports_tx),
            names: Names::new(resolved_tx),
            track: announcer,
            flows: flow_state.clone(),
            access,
            acme,
            published,
            reloads_ok: 0,
            reloads_failed: 0,
            last_problem: None,
            setting_warnings: warnings,
        };
        task.begin(outcome.effects).await;
        let control = Control {
            routes: commands_tx,
            flows: tracker.as_ref().map(|tracker| tracker.commands.clone()),
            streams: stream_commands,
            relayed,
            relayed_rates,
            route_state,
            flow_state,
        };
        let inputs = Inputs {
            commands,
            reports,
            resolved,
            failed_dials: failed_dials.1,
            drained: drained.1,
            relayed: gone.1,
            reload,
            monitor,
        };
        Ok(Self { task, inputs, control, reload: reload_tx, tracker, relayed_log })
    }

    async fn serve(mut self, listeners: Listeners) {
        self.verify();
        let Some(mut signals) = Signals::new() else { return };
        let (stop_tx, stop) = watch::channel(false);
        let (end_tx, mut end) = watch::channel(false);
        let api = tokio::spawn(admin::serve(listeners, self.control, async move { drop(end.changed().await) }));
        let routes = tokio::spawn(self.task.run(self.inputs, stop));
        notify(&[sd_notify::NotifyState::Ready]);
        tracing::info!("ready");
        signals.stop(Some(&self.reload)).await;
        notify(&[sd_notify::NotifyState::Stopping]);
        stop_tx.send_replace(true);
        let drained = async {
            drop(routes.await);
            end_tx.send_replace(true);
            drop(api.await);
            // These wait for the last lines of the access log.
            drop(tokio::time::timeout(stream::STOP_GRACE, self.relayed_log).await);
            if let Some(tracker) = self.tracker {
                tracker.stop().await;
            }
        };
        tokio::select! {
            () = drained => {}
            () = signals.stop(None) => tracing::warn!("asked to stop a second time: relayed connections are cut"),
        }
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

fn access_log(config: &Config) -> Result<AccessLog, Refusal> {
    AccessLog::stdout(config.log.format, config.log.access)
        .map_err(|e| Refusal::refused(format!("cannot write the access log: {e}"), None))
}

fn refuse_nft(error: NftError) -> Refusal {
    Refusal { what: error.to_string(), mend: error.mend(), code: error.exit_code() }
}

fn refuse_handoff(error: HandoffError) -> Refusal {
    Refusal::missing(format!("connections cannot be handed over: {error}"), error.mend())
}

fn refuse_streams(error: StreamError) -> Refusal {
    Refusal { what: error.to_string(), mend: error.mend(), code: error.exit_code() }
}

fn refuse_route(error: &ReconcileError) -> Refusal {
    let told = failure(error);
    let code = match error {
        ReconcileError::Nft(error) => error.exit_code(),
        ReconcileError::Streams(error) => error.exit_code(),
        _ => 1,
    };
    Refusal { what: told.error, mend: told.hint, code }
}

/// What the daemon listens to from outside.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Option<Self> {
        let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()));
        let (Ok(terminate), Ok(interrupt), Ok(hangup)) = signals else {
            tracing::error!("signals cannot be handled: stopping");
            return None;
        };
        Some(Self { terminate, interrupt, hangup })
    }

    /// Until SIGTERM or SIGINT. `reload`: told of SIGHUP.
    async fn stop(&mut self, reload: Option<&mpsc::Sender<()>>) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                // One reload that has not begun yet stands for all that come meanwhile.
                _ = self.hangup.recv() => drop(reload.map(|reload| reload.try_send(()))),
            }
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
    let mut nft = KernelNft::open().map_err(refuse_nft)?;
    let table = nft.snapshot().map_err(refuse_nft)?.table;
    if let Some(table) = table {
        // An orphan of a daemon that locked it must be taken over before it can be deleted.
        let adopt = Change::AddTable { lock: true };
        let changes = if table.locked { vec![adopt, Change::DeleteTable] } else { vec![Change::DeleteTable] };
        nft.apply(&changes).map_err(refuse_nft)?;
        done.push("deleted table inet shunt: what it forwarded ends".into());
    }
    done.extend(handoff::remove(socket).map_err(refuse_handoff)?);
    done.extend(return_path::remove().map_err(|e| refuse_streams(e.into()))?);
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
