//! The loop around the [`Owner`]: one event at a time.

use std::{
    future::pending,
    io,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{
    io::unix::AsyncFd,
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep_until},
};

use super::{Command, Options, Remnants, Resets, owner::Owner};
use crate::{
    kernel::{conntrack::forget::Forgetter, readable},
    stream::{Ended, handover::HandedOver, meter::Meters},
};

/// Counters are read so often, or less often when that would take more than a fiftieth of a core: what others are shown is
/// never much older.
const LOOKING: Duration = Duration::from_secs(2);
/// … and in silence more and more seldom, down to so often.
const LOOKING_AT_SILENCE: Duration = Duration::from_secs(30);
/// What was looked at so lately is good enough for who asks.
const FRESH: Duration = Duration::from_millis(500);
/// Handed-over connections taken in one go.
const TOGETHER: usize = 256;

pub struct Task {
    owner: Owner,
    handed: mpsc::Receiver<HandedOver>,
    remnants: Option<Remnants>,
    unrouted: Arc<Meters>,
    drained: mpsc::Sender<u32>,
    ended: mpsc::Sender<Vec<Ended>>,
    forgetter: Option<Forgetter>,
    looked: Instant,
    rest_until: Instant,
    /// Grows while nothing comes.
    patience: Duration,
}

impl Task {
    pub fn new(options: Options, resets: Resets, forgetter: Option<Forgetter>) -> Self {
        let Options { store, handed, remnants, unrouted, drained, ended, gauge } = options;
        let now = Instant::now();
        Self {
            owner: Owner::new(store, resets, gauge),
            handed,
            remnants: Some(remnants),
            unrouted,
            drained,
            ended,
            forgetter,
            looked: now,
            rest_until: now,
            patience: LOOKING,
        }
    }

    /// Until it is told to stop, or nobody is left to tell it.
    pub async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let events = self.events();
        let mut looking = interval(LOOKING);
        looking.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(TOGETHER);
        self.owner.show();
        loop {
            let due = self.owner.next().map(|tick| self.owner.clock.instant(tick));
            tokio::select! {
                biased;
                // Before the commands: a connection that is asked for has arrived.
                received = self.handed.recv_many(&mut batch, TOGETHER) => {
                    if received == 0 {
                        // The workers have ended: what they sent has been taken.
                        self.obey_to_the_end(commands).await;
                        return;
                    }
                    self.receive(&mut batch);
                }
                command = commands.recv() => match command {
                    None | Some(Command::Stop) => break,
                    Some(command) => self.obey(command),
                },
                () = has_events(events.as_ref()) => self.hear(),
                () = until(due) => self.owner.advance(),
                _ = looking.tick() => self.look_now_and_then(),
            }
            self.tell().await;
        }
        self.last_words().await;
    }

    /// While the daemon stops: asked and told as before, but nothing more is handed over.
    async fn obey_to_the_end(&mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        while let Some(command) = commands.recv().await {
            if matches!(command, Command::Stop) {
                break;
            }
            self.obey(command);
            self.tell().await;
        }
        self.last_words().await;
    }

    /// What the program sends. Without a descriptor to wait for, what has ended is found by looking.
    fn events(&self) -> Option<AsyncFd<OwnedFd>> {
        let register = || -> io::Result<AsyncFd<OwnedFd>> {
            let fd = self.owner.store.events_fd().try_clone_to_owned()?;
            readable::register(fd)
        };
        register().inspect_err(|error| tracing::error!(%error, "ends of handed-over connections come late")).ok()
    }

    fn receive(&mut self, batch: &mut Vec<HandedOver>) {
        for handed in batch.drain(..) {
            if let Some(forgetter) = &mut self.forgetter {
                forgetter
                    .forget(&[(handed.ends.listen, handed.ends.client), (handed.ends.source, handed.ends.backend)]);
            }
            self.owner.receive(handed);
        }
        self.owner.show();
    }

    fn hear(&mut self) {
        while let Some(event) = self.owner.store.next_event() {
            self.owner.heard(&event);
        }
    }

    fn look_now_and_then(&mut self) {
        if Instant::now() >= self.rest_until && self.owner.flows.len() > 0 {
            self.look();
        }
        self.owner.show();
    }

    fn look(&mut self) {
        let began = Instant::now();
        let news = self.owner.look_at_all();
        self.patience = if news { LOOKING } else { (self.patience * 2).min(LOOKING_AT_SILENCE) };
        self.looked = Instant::now();
        // The tick that is due then must not come a moment too early.
        let wait = (self.patience - LOOKING / 2).max(began.elapsed() * 50);
        self.rest_until = self.looked + wait;
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Routes(routes) => self.owner.serve(routes),
            Command::Gone(id, leaving) => self.owner.leave(id, leaving),
            Command::Adopt => self.adopt(),
            Command::Refresh(done) => {
                if self.looked.elapsed() >= FRESH {
                    self.look();
                }
                let _ = done.send(());
            }
            Command::List(filter, reply) => drop(reply.send(self.owner.list(&filter))),
            Command::Kill(id, reply) => drop(reply.send(self.owner.kill(id))),
            Command::Stop => {}
        }
    }

    fn adopt(&mut self) {
        let Some(remnants) = self.remnants.take().filter(|remnants| !remnants.is_empty()) else { return };
        let (adopted, cut) = self.owner.adopt(remnants, &self.unrouted);
        self.owner.gauge.adopted.store(adopted as u64, Relaxed);
        tracing::info!(adopted, "connections that were handed over go on");
        if cut > 0 {
            tracing::warn!(
                cut,
                "connections were being handed over when the daemon before ended: both ends were reset"
            );
        }
        self.owner.show();
    }

    /// Hands on what has ended, and which routes have nothing left.
    async fn tell(&mut self) {
        for id in std::mem::take(&mut self.owner.gone) {
            // Its owner takes it from its own queue: a full one would only delay the news.
            let _ = self.drained.send(id).await;
        }
        if self.owner.told.is_empty() {
            return;
        }
        let told = std::mem::take(&mut self.owner.told);
        if let Err(mpsc::error::TrySendError::Full(told)) = self.ended.try_send(told) {
            // Tried again with the next event, at the latest when counters are read.
            self.owner.told = told;
        }
    }

    async fn last_words(&mut self) {
        if !self.owner.told.is_empty() {
            let _ = self.ended.send(std::mem::take(&mut self.owner.told)).await;
        }
    }
}

async fn has_events(events: Option<&AsyncFd<OwnedFd>>) {
    match events {
        // The queue is read to its end next, which is what makes the edge come again.
        Some(events) => match events.readable().await {
            Ok(mut guard) => guard.clear_ready(),
            Err(_) => pending().await,
        },
        None => pending().await,
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due.into()).await,
        None => pending().await,
    }
}
