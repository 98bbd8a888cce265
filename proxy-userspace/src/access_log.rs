//! One line per ended connection, to standard output.
//!
//! Lines are formatted by the owner of the flow table and written by a thread of their own: a stuck reader of the log
//! costs lines, which are counted, and never holds the flow table up.

use std::{
    fmt::Display,
    io::{self, Write},
    net::SocketAddr,
    sync::{
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use proxy_core::{
    config::{AccessLog as Filter, Engine, LogFormat},
    flow::Ended,
    reason::Reason,
};
use tokio::sync::{mpsc, watch};

use crate::stream::{self, meter::Pressure};

/// A buffer goes to the writer at this size, in bytes, or at the next [`AccessLog::flush`].
const FULL: usize = 256 * 1024;
/// Buffers waiting for the writer at most.
const WAITING: usize = 32;

/// The formatting side.
#[derive(Debug)]
pub struct AccessLog {
    format: LogFormat,
    filter: Filter,
    buffer: Vec<u8>,
    lines: u64,
    lost: u64,
    clock: SecondText,
    writer: Option<Writer>,
}

#[derive(Debug)]
struct Writer {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    thread: JoinHandle<()>,
}

impl AccessLog {
    /// Writes to standard output.
    pub fn stdout(format: LogFormat, filter: Filter) -> io::Result<Self> {
        Self::new(format, filter, io::stdout())
    }

    pub fn new(format: LogFormat, filter: Filter, out: impl Write + Send + 'static) -> io::Result<Self> {
        let (full, filled) = sync_channel(WAITING);
        let (written, empty) = sync_channel(WAITING);
        let thread =
            std::thread::Builder::new().name("access-log".into()).spawn(move || write_all(&filled, &written, out))?;
        let writer = Some(Writer { full, empty, thread });
        Ok(Self { format, filter, buffer: Vec::new(), lines: 0, lost: 0, clock: SecondText::default(), writer })
    }

    pub fn set_filter(&mut self, filter: Filter) {
        self.filter = filter;
    }

    /// Lines dropped because the writer could not keep up.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// A connection that the kernel forwarded.
    pub fn write(&mut self, ended: &Ended, engine: Engine) {
        let (inward, outward) = (ended.traffic_in, ended.traffic_out);
        self.line(&Line {
            at: ended.at,
            id: &ended.id,
            client: ended.client,
            listen: ended.listen,
            route: &ended.route,
            engine,
            backend: Some(ended.backend),
            reason: ended.reason,
            duration: ended.duration,
            bytes: ended.metered.then_some([inward.bytes, outward.bytes]),
            packets: ended.metered.then_some([inward.packets, outward.packets]),
        });
    }

    /// A connection that the daemon relayed, or refused.
    pub fn write_relayed(&mut self, ended: &stream::Ended) {
        self.line(&Line {
            at: ended.at,
            id: &ended.id,
            client: ended.client,
            listen: ended.listen,
            route: &ended.route,
            engine: ended.engine,
            backend: ended.backend,
            reason: ended.reason,
            duration: ended.duration,
            bytes: Some([ended.bytes_in, ended.bytes_out]),
            packets: None,
        });
    }

    fn line(&mut self, line: &Line<'_>) {
        let wanted = match self.filter {
            Filter::All => true,
            Filter::Errors => !matches!(line.reason, Reason::FinishedClientFirst | Reason::FinishedBackendFirst),
            Filter::Off => false,
        };
        if !wanted {
            return;
        }
        let time = self.clock.text(line.at);
        // Writing into a Vec cannot fail.
        let _ = line.write(&mut self.buffer, self.format, time);
        self.lines += 1;
        if self.buffer.len() >= FULL {
            self.flush();
        }
    }

    /// Hands what is buffered to the writer.
    pub fn flush(&mut self) {
        let Some(writer) = self.writer.as_ref().filter(|_| !self.buffer.is_empty()) else { return };
        let next = writer.empty.try_recv().unwrap_or_default();
        match writer.full.try_send(std::mem::replace(&mut self.buffer, next)) {
            Ok(()) => {}
            Err(TrySendError::Full(mut dropped) | TrySendError::Disconnected(mut dropped)) => {
                self.lost += self.lines;
                dropped.clear();
                self.buffer = dropped;
            }
        }
        self.lines = 0;
    }
}

/// Everything buffered is written before it is gone.
impl Drop for AccessLog {
    fn drop(&mut self) {
        self.flush();
        if let Some(Writer { full, empty, thread }) = self.writer.take() {
            drop((full, empty));
            let _ = thread.join();
        }
    }
}

/// Writes of the connections that the daemon relayed, until the last of those who tell is gone.
pub async fn write_relayed(
    mut log: AccessLog,
    mut ended: mpsc::Receiver<Vec<stream::Ended>>,
    mut filter: watch::Receiver<Filter>,
    pressure: std::sync::Arc<Pressure>,
) {
    loop {
        tokio::select! {
            biased;
            Ok(()) = filter.changed() => log.set_filter(*filter.borrow_and_update()),
            batch = ended.recv() => {
                let Some(batch) = batch else { break };
                let lost = log.lost();
                batch.iter().for_each(|one| log.write_relayed(one));
                log.flush();
                pressure.unlogged.fetch_add(log.lost() - lost, Relaxed);
            }
        }
    }
    // Waits for the writer.
    drop(tokio::task::spawn_blocking(move || drop(log)).await);
}

fn write_all(filled: &Receiver<Vec<u8>>, written: &SyncSender<Vec<u8>>, mut out: impl Write) {
    for mut buffer in filled {
        // Nobody reads the log any more: connections go on without it.
        if out.write_all(&buffer).and_then(|()| out.flush()).is_err() {
            return;
        }
        buffer.clear();
        let _ = written.try_send(buffer);
    }
}

/// What a line says.
struct Line<'a> {
    /// Since the Unix epoch.
    at: Duration,
    id: &'a dyn Display,
    client: SocketAddr,
    listen: SocketAddr,
    route: &'a str,
    engine: Engine,
    backend: Option<SocketAddr>,
    reason: Reason,
    duration: Duration,
    /// In and out; `None`: not known.
    bytes: Option<[u64; 2]>,
    packets: Option<[u64; 2]>,
}

impl Line<'_> {
    fn write(&self, out: &mut Vec<u8>, format: LogFormat, time: &str) -> io::Result<()> {
        let (seconds, micros) = (self.duration.as_secs(), self.duration.subsec_micros());
        let mut fields = Fields { out, format, first: true };
        fields.text("time", Some(&time))?;
        fields.text("id", Some(self.id))?;
        fields.text("client", Some(&self.client))?;
        fields.text("listen", Some(&self.listen))?;
        fields.text("route", Some(&self.route))?;
        fields.text("engine", Some(&self.engine))?;
        fields.text("backend", self.backend.as_ref().map(|backend| backend as &dyn Display))?;
        fields.text("reason", Some(&self.reason.label()))?;
        fields.number("duration", Some(&format_args!("{seconds}.{micros:06}")))?;
        for (keys, counts) in [(["bytes_in", "bytes_out"], &self.bytes), (["packets_in", "packets_out"], &self.packets)]
        {
            for (key, index) in keys.into_iter().zip(0..) {
                let count = counts.as_ref().and_then(|counts| counts.get(index));
                fields.number(key, count.map(|count| count as &dyn Display))?;
            }
        }
        fields.end()
    }
}

/// A line in the making. No value needs escaping: addresses, numbers, labels, and route names of `[a-z0-9-]`.
struct Fields<'a> {
    out: &'a mut Vec<u8>,
    format: LogFormat,
    first: bool,
}

impl Fields<'_> {
    /// `None`: not known.
    fn text(&mut self, key: &str, value: Option<&dyn Display>) -> io::Result<()> {
        match (value, self.format) {
            (Some(value), LogFormat::Json) => self.number(key, Some(&format_args!("\"{value}\""))),
            (value, LogFormat::Text | LogFormat::Json) => self.number(key, value),
        }
    }

    /// `None`: not known.
    fn number(&mut self, key: &str, value: Option<&dyn Display>) -> io::Result<()> {
        match (self.format, std::mem::take(&mut self.first)) {
            (LogFormat::Text, true) => write!(self.out, "{key}=")?,
            (LogFormat::Text, false) => write!(self.out, " {key}=")?,
            (LogFormat::Json, true) => write!(self.out, "{{\"{key}\":")?,
            (LogFormat::Json, false) => write!(self.out, ",\"{key}\":")?,
        }
        match (value, self.format) {
            (Some(value), _) => write!(self.out, "{value}"),
            (None, LogFormat::Text) => write!(self.out, "-"),
            (None, LogFormat::Json) => write!(self.out, "null"),
        }
    }

    fn end(self) -> io::Result<()> {
        self.out.write_all(match self.format {
            LogFormat::Text => b"\n",
            LogFormat::Json => b"}\n",
        })
    }
}

/// RFC 3339 in UTC. Lines come in bursts of the same second, so only the fraction is written anew.
#[derive(Debug, Default)]
struct SecondText {
    second: Option<u64>,
    text: String,
}

impl SecondText {
    /// `at`: since the Unix epoch.
    fn text(&mut self, at: Duration) -> &str {
        use std::fmt::Write as _;
        if self.second != Some(at.as_secs()) {
            self.second = Some(at.as_secs());
            let (year, month, day) = civil_date(at.as_secs() / 86_400);
            let second = at.as_secs() % 86_400;
            let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
            self.text.clear();
            let _ = write!(self.text, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.");
        }
        self.text.truncate(20);
        let _ = write!(self.text, "{:06}Z", at.subsec_micros());
        &self.text
    }
}

/// Year, month and day of the proleptic Gregorian calendar, `days` after 1970-01-01. Eras of 400 years that begin on a
/// 1 March put the leap day last, so that every formula is linear.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests;
