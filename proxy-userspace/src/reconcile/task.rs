//! The task around the [`Reconciler`]: one loop, one event at a time.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_core::{
    capability::Handoff,
    config::{self, Config, Engine, RouteName, Target},
    plan::RoutePlan,
    view,
};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};

use super::{Carrier, Effect, Outcome, Prepared, ReconcileError, Reconciler, announce::Announcer};
use crate::{
    acme,
    control::{FlowState, Reply, RouteCommand, RouteState},
    health::{Checks, Report},
    kernel::{
        capability, firewall,
        nft::{MonitorNews, Nft, NftError, NftMonitor},
        sysctl::{self, Settings, SysctlError},
    },
    logging::LogHandle,
    resolve::{Names, Resolved},
    stream::{STOP_GRACE, Streams},
    track::FailedDial,
};

/// What the loop listens to.
#[derive(Debug)]
pub struct Inputs {
    pub commands: mpsc::Receiver<RouteCommand>,
    pub reports: mpsc::Receiver<Report>,
    pub resolved: mpsc::Receiver<Resolved>,
    /// Dials that came to nothing.
    pub failed_dials: mpsc::Receiver<FailedDial>,
    /// Ids of draining routes that have no connection left in the kernel …
    pub drained: mpsc::Receiver<u32>,
    /// … and in the daemon.
    pub relayed: mpsc::Receiver<u32>,
    /// SIGHUP.
    pub reload: mpsc::Receiver<()>,
    /// `None` for a locked table: nobody else can change it, and the kernel would tell of our own changes one by one.
    pub monitor: Option<AsyncFd<NftMonitor>>,
}

/// The owner of the routes at work.
#[derive(Debug)]
pub struct Task<N, S> {
    pub reconciler: Reconciler<N, S>,
    pub config_file: PathBuf,
    pub settings_record: PathBuf,
    pub log: LogHandle,
    pub checks: Checks,
    pub names: Names,
    pub track: Announcer,
    /// Which routes move, from the owner of the flow table.
    pub flows: watch::Receiver<Arc<FlowState>>,
    /// `log.access`, for the log of relayed connections.
    pub access: watch::Sender<config::AccessLog>,
    pub acme: acme::Handle,
    pub published: watch::Sender<Arc<RouteState>>,
    pub reloads_ok: u64,
    pub reloads_failed: u64,
    pub last_problem: Option<String>,
    pub setting_warnings: Vec<String>,
}

/// Kernel counters are read so often, or less often when that would cost more than a fiftieth of a core.
const COUNTERS: Duration = Duration::from_secs(1);
/// But not further apart than this: on a busy machine it is waiting that takes long, and numbers are looked at just then.
const COUNTERS_AT_LEAST: Duration = Duration::from_secs(20);

impl<N: Nft, S: Streams> Task<N, S> {
    /// Works until `stop` changes, and then until what the daemon relays has drained. The table is left as it is: the
    /// kernel goes on forwarding.
    pub async fn run(mut self, mut inputs: Inputs, mut stop: watch::Receiver<bool>) {
        let mut counters = interval(COUNTERS);
        counters.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rest_until = Instant::now();
        loop {
            tokio::select! {
                biased;
                _ = stop.changed() => return self.stop(inputs).await,
                Some(command) = inputs.commands.recv() => self.command(command).await,
                Some(()) = inputs.reload.recv() => drop(self.reload().await),
                Some(report) = inputs.reports.recv() => self.report(&report).await,
                Some(resolved) = inputs.resolved.recv() => self.resolved(resolved).await,
                Some(failed) = inputs.failed_dials.recv() => self.dial_failed(&failed).await,
                Some(id) = inputs.drained.recv() => self.drained(id, Carrier::Kernel).await,
                Some(id) = inputs.relayed.recv() => self.drained(id, Carrier::Daemon).await,
                news = news_of(&mut inputs.monitor) => self.foreign_hand(news),
                _ = counters.tick() => {
                    let began = Instant::now();
                    let effects = self.reconciler.readmit(began);
                    self.settle(effects).await;
                    if began >= rest_until {
                        self.count().await;
                        rest_until = Instant::now() + (began.elapsed() * 50).min(COUNTERS_AT_LEAST);
                    }
                }
            }
            if self.reconciler.take_unpublished() {
                self.publish();
            }
        }
    }

    /// Lets relayed connections finish, within the bounds of their routes, and answers meanwhile.
    async fn stop(mut self, mut inputs: Inputs) {
        match self.reconciler.has_table() {
            true => tracing::info!("stopping; the kernel goes on forwarding, `shunt cleanup` would end that"),
            false => tracing::info!("stopping"),
        }
        self.publish_as(false);
        // The CA would not be answered.
        self.acme.stop();
        let Some(streams) = self.reconciler.take_streams() else { return };
        let bound = self.reconciler.longest_drain() + STOP_GRACE;
        let micros = u32::try_from(bound.as_micros()).unwrap_or(u32::MAX);
        // `TimeoutStopSec` would cut a long drain short.
        drop(sd_notify::notify(&[sd_notify::NotifyState::ExtendTimeoutUsec(micros)]));
        let mut stopping = std::pin::pin!(tokio::time::timeout(bound, streams.stop()));
        let mut counters = interval(COUNTERS);
        loop {
            tokio::select! {
                biased;
                result = &mut stopping => {
                    if result.is_err() {
                        tracing::warn!(seconds = bound.as_secs(), "relayed connections did not end in time");
                    }
                    return;
                }
                Some(command) = inputs.commands.recv() => self.refuse(command),
                Some(()) = inputs.reload.recv() => tracing::error!("reload refused: the daemon is stopping"),
                _ = counters.tick() => self.count().await,
            }
        }
    }

    /// While stopping: what is asked is answered, what is to change is not.
    fn refuse(&self, command: RouteCommand) {
        let stopping = || failure(&ReconcileError::Stopping);
        match command {
            RouteCommand::Reload { reply } => answer(reply, Err(stopping())),
            RouteCommand::SetBackend { reply, .. } => answer(reply, Err(stopping())),
            RouteCommand::Explain { route, reply } => self.explain(&route, reply),
            RouteCommand::Ruleset { reply } => answer(reply, Ok(self.reconciler.script())),
        }
    }

    fn explain(&self, route: &str, reply: Reply<view::Explain>) {
        answer(reply, self.reconciler.explain(route).ok_or_else(|| no_such_route(route)));
    }

    /// Hands on what the start has brought about; the first publication.
    pub async fn begin(&mut self, effects: Vec<Effect>) {
        let routes: Vec<RouteName> = self.reconciler.plan().routes().iter().map(|r| r.route.name.clone()).collect();
        self.forward(effects).await;
        self.watch_backends(&routes);
        self.acme.want(self.reconciler.acme());
        self.count().await;
        self.reconciler.take_unpublished();
        self.publish();
    }

    async fn command(&mut self, command: RouteCommand) {
        match command {
            RouteCommand::Reload { reply } => answer(reply, self.reload().await),
            RouteCommand::SetBackend { route, backend, admin, reply } => {
                let result = self.set_backend(&route, &backend, admin).await;
                answer(reply, result);
            }
            RouteCommand::Explain { route, reply } => self.explain(&route, reply),
            RouteCommand::Ruleset { reply } => answer(reply, Ok(self.reconciler.script())),
        }
    }

    async fn reload(&mut self) -> Result<view::Reload, view::Failure> {
        let result = self.try_reload().await;
        match &result {
            Ok(done) => {
                self.reloads_ok += 1;
                self.last_problem = None;
                tracing::info!(
                    added = done.added.len(),
                    changed = done.changed.len(),
                    removed = done.removed.len(),
                    unchanged = done.unchanged,
                    changes = done.changes,
                    apply_ms = done.apply_ms,
                    "reloaded"
                );
            }
            Err(failure) => {
                self.reloads_failed += 1;
                self.last_problem = Some(failure.error.lines().next().unwrap_or_default().to_owned());
                for line in failure.error.lines() {
                    tracing::error!("reload refused: {line}");
                }
            }
        }
        self.publish();
        result
    }

    async fn try_reload(&mut self) -> Result<view::Reload, view::Failure> {
        let file = self.config_file.clone();
        let read = tokio::task::spawn_blocking(move || load(&file)).await;
        let config = read.map_err(|e| view::Failure { error: e.to_string(), hint: None })??;
        self.look_at_machine(&config).await;
        let log = config.log.clone();
        let outcome = match self.change_to(config.clone()).await {
            Err(Refused::Change(ReconcileError::Streams(error))) if error.is_of_handoff() => {
                // Routes that do not insist on it are served without.
                self.reconciler.learn_handoff(Handoff::NotBroughtUp(error.to_string()));
                match self.change_to(config).await {
                    Err(Refused::Change(ReconcileError::Unserved(_))) => Err(ReconcileError::Streams(error).into()),
                    done => {
                        tracing::warn!(mend = error.mend(), "{error}");
                        done
                    }
                }
            }
            done => done,
        };
        let outcome = outcome.map_err(|refused| refused.told())?;
        self.reconciler.look_at_certificates();
        self.acme.want(self.reconciler.acme());
        if let Err(error) = self.log.apply(&log) {
            tracing::warn!(%error, "the log stays as it was");
        }
        self.track.access_log(&log).await;
        self.access.send_replace(log.access);
        let names = |names: &[RouteName]| names.iter().map(ToString::to_string).collect();
        let Outcome { added, changed, removed, changes, apply, effects } = outcome;
        self.forward(effects).await;
        self.watch_backends(&[added.clone(), changed.clone()].concat());
        self.reconciler.settled().await;
        removed.iter().for_each(|route| self.checks.forget(route));
        Ok(view::Reload {
            unchanged: self.reconciler.plan().routes().len() - added.len() - changed.len(),
            added: names(&added),
            changed: names(&changed),
            removed: names(&removed),
            apply_ms: view::milliseconds(apply),
            changes,
        })
    }

    /// What of this machine may have changed, and decides how routes are served.
    async fn look_at_machine(&mut self, config: &Config) {
        if self.reconciler.could_hand_over(config) {
            let filters = tokio::task::spawn_blocking(firewall::filters).await.unwrap_or_default();
            self.reconciler.learn_filter(filters.into_iter().next());
        }
        if self.reconciler.awaits_handoff(config) {
            let socket = config.admin.socket.clone();
            let found = tokio::task::spawn_blocking(move || capability::handoff::ask(&socket)).await;
            found.into_iter().for_each(|found| self.reconciler.learn_handoff(found));
        }
    }

    /// All or nothing: in the kernel, its settings among it, and here.
    async fn change_to(&mut self, config: Config) -> Result<Outcome, Refused> {
        let prepared = self.reconciler.prepare(config)?;
        let needed = needed(self.reconciler.after(&prepared));
        let (settings, record) = (Settings::default(), &self.settings_record);
        let pending = settings.pending(&needed).unwrap_or_default();
        let result = match settings.apply(&needed, record) {
            Ok(applied) => match serve(&mut self.reconciler, &mut self.track, prepared).await {
                Ok(outcome) => {
                    self.setting_warnings.extend(applied.warnings);
                    return Ok(outcome);
                }
                Err(error) => error.into(),
            },
            Err(error) => {
                self.reconciler.abandon(prepared);
                Refused::Settings(error)
            }
        };
        if let Err(error) = sysctl::take_back(&settings, record, &pending) {
            tracing::warn!(%error, "a setting stays as the refused change needed it; `shunt cleanup` puts it back");
        }
        Err(result)
    }

    async fn set_backend(
        &mut self,
        route: &str,
        backend: &str,
        admin: view::BackendAdmin,
    ) -> Result<view::Backend, view::Failure> {
        match self.reconciler.set_backend(route, backend, admin) {
            Err(error) => Err(failure(&error)),
            Ok(None) => Err(view::Failure {
                error: format!("route \"{route}\" has no backend \"{backend}\""),
                hint: Some(format!("`shunt routes {route}` lists them")),
            }),
            Ok(Some((view, effects))) => {
                tracing::info!(route, backend, state = ?admin, "backend set by an operator");
                self.forward(effects).await;
                self.reconciler.settled().await;
                Ok(view)
            }
        }
    }

    async fn report(&mut self, report: &Report) {
        let before = self.up(&report.route, &report.target);
        let effects = self.reconciler.checked(&report.route, &report.target, &report.checked);
        let after = self.up(&report.route, &report.target);
        if before != after {
            let (route, backend) = (&report.route, &report.target);
            match &report.checked.result {
                Ok(()) => tracing::info!(%route, %backend, "backend is up"),
                Err(why) => tracing::warn!(%route, %backend, why, "backend is down"),
            }
        }
        self.settle(effects).await;
    }

    fn up(&self, route: &RouteName, target: &Target) -> Option<bool> {
        self.reconciler.backend_is_up(route, target)
    }

    async fn resolved(&mut self, resolved: Resolved) {
        match resolved.result {
            Ok(addresses) => {
                let effects = self.reconciler.resolved(&resolved.host, &addresses);
                let routes = self.reconciler.routes_with_name(&resolved.host);
                self.watch_hosts(&routes);
                self.settle(effects).await;
            }
            Err(why) => tracing::warn!(name = resolved.host, why, "backend name not resolved; its last addresses stay"),
        }
    }

    async fn dial_failed(&mut self, failed: &FailedDial) {
        let Some(route) = RouteName::new(&failed.route) else { return };
        let effects = self.reconciler.dial_failed(&route, failed.backend, Instant::now());
        self.settle(effects).await;
    }

    async fn drained(&mut self, id: u32, carrier: Carrier) {
        let effects = self.reconciler.drained(id, carrier);
        self.settle(effects).await;
    }

    async fn settle(&mut self, effects: Result<Vec<Effect>, ReconcileError>) {
        match effects {
            Ok(effects) => self.forward(effects).await,
            Err(error) => tracing::error!(%error, "a change was refused; it is tried again with the next one"),
        }
    }

    async fn forward(&mut self, effects: Vec<Effect>) {
        self.track.forward(effects).await;
    }

    /// Keeps health checks and names in step with routes that are new or changed.
    fn watch_backends(&mut self, routes: &[RouteName]) {
        let names = self.reconciler.plan().routes().iter().flat_map(|r| &r.route.backends);
        self.names.watch(names.filter_map(|backend| backend.target.host()));
        self.watch_hosts(routes);
    }

    fn watch_hosts(&mut self, routes: &[RouteName]) {
        for name in routes {
            let targets = self.reconciler.targets(name);
            if let Some(route) = self.reconciler.route(name) {
                self.checks.watch(&route, &targets);
            }
        }
    }

    fn foreign_hand(&mut self, news: Result<MonitorNews, NftError>) {
        match news {
            Ok(news) if !news.foreign_change && !news.overrun => return,
            Ok(MonitorNews { process: Some((name, pid)), .. }) => {
                tracing::warn!(name, pid, "a process changed table inet shunt")
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "nftables events were lost"),
        }
        match self.reconciler.repair() {
            Ok(true) => tracing::warn!("somebody changed table inet shunt: it is as it should be again"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "table inet shunt was changed by somebody and could not be mended"),
        }
    }

    async fn count(&mut self) {
        if !self.reconciler.has_table() {
            return;
        }
        let flows = Arc::clone(&self.flows.borrow());
        match self.reconciler.counters(&flows.moving, Instant::now()) {
            Ok(counters) => self.track.counters(&counters).await,
            Err(error) => tracing::warn!(%error, "kernel counters could not be read"),
        }
    }

    fn publish(&self) {
        self.publish_as(true);
    }

    fn publish_as(&self, ready: bool) {
        let mut warnings = self.setting_warnings.clone();
        warnings.extend(self.last_problem.iter().map(|p| format!("the last reload was refused: {p}")));
        self.published.send_replace(Arc::new(RouteState {
            ready,
            config_file: self.config_file.display().to_string(),
            routes: self.reconciler.route_views(),
            reconcile: self.reconciler.status().clone(),
            reloads_ok: self.reloads_ok,
            reloads_failed: self.reloads_failed,
            warnings,
        }));
    }
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Change(#[from] ReconcileError),
    #[error(transparent)]
    Settings(#[from] SysctlError),
}

impl Refused {
    fn told(&self) -> view::Failure {
        match self {
            Self::Change(error) => failure(error),
            Self::Settings(error) => view::Failure { error: error.to_string(), hint: Some(error.mend()) },
        }
    }
}

/// All or nothing: in the kernel, here, and in the flow table.
async fn serve<N: Nft, S: Streams>(
    reconciler: &mut Reconciler<N, S>,
    track: &mut Announcer,
    prepared: Prepared,
) -> Result<Outcome, ReconcileError> {
    let before = track.announce(&reconciler.serves(&prepared)).await;
    let result = reconciler.carry_out(prepared, Instant::now());
    if result.is_err() {
        track.take_back(before).await;
    }
    result
}

/// Never, without a monitor.
async fn news_of(monitor: &mut Option<AsyncFd<NftMonitor>>) -> Result<MonitorNews, NftError> {
    let Some(monitor) = monitor else { return std::future::pending().await };
    match monitor.readable_mut().await {
        Ok(mut guard) => {
            let news = guard.get_inner_mut().drain();
            guard.clear_ready();
            news
        }
        Err(error) => {
            tracing::error!(%error, "nftables events cannot be awaited");
            std::future::pending().await
        }
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, view::Failure>) {
    // The asker may have gone.
    drop(reply.send(result));
}

fn no_such_route(name: &str) -> view::Failure {
    view::Failure { error: format!("no route \"{name}\""), hint: Some("`shunt routes` lists them".into()) }
}

/// The settings these routes need.
pub fn needed<'a>(routes: impl Iterator<Item = &'a Arc<RoutePlan>>) -> Vec<sysctl::Needed> {
    sysctl::needed(routes_of(routes))
}

pub fn routes_of<'a>(routes: impl Iterator<Item = &'a Arc<RoutePlan>>) -> sysctl::Routes {
    let mut all = sysctl::Routes::default();
    for plan in routes {
        let forwarded = plan.engine == Some(Engine::Nft);
        all.ipv4 |= forwarded && plan.route.listen.iter().any(|l| l.address.is_ipv4());
        all.ipv6 |= forwarded && plan.route.listen.iter().any(|l| l.address.is_ipv6());
        all.relayed |= plan.is_relayed();
        all.handed |= plan.hands_over();
    }
    all
}

/// Reads and parses the file.
pub fn load(file: &Path) -> Result<Config, view::Failure> {
    let text = std::fs::read_to_string(file).map_err(|e| view::Failure {
        error: format!("{}: {e}", file.display()),
        hint: Some("name the file with --config FILE".into()),
    })?;
    config::parse(&text, file).map_err(|problems| view::Failure {
        error: problems.to_string().trim_end().to_owned(),
        hint: Some(format!("`shunt check {}` checks it without touching anything", file.display())),
    })
}

pub fn failure(error: &ReconcileError) -> view::Failure {
    let hint = match error {
        ReconcileError::Unserved(_) => {
            Some("`shunt plan` shows every route with its engine and what rules the others out".into())
        }
        ReconcileError::TooManyRoutes(_) => Some("set kernel.mark_mask, for instance to 0xffffff00".into()),
        ReconcileError::NeedsRestart(_) => Some("restarting loses no connection: the kernel goes on forwarding".into()),
        ReconcileError::Nft(error) => error.mend(),
        ReconcileError::Streams(error) => error.mend(),
        ReconcileError::Stopping => Some("start it again; it reads its configuration then".into()),
    };
    view::Failure { error: error.to_string(), hint }
}

#[cfg(test)]
mod tests;
