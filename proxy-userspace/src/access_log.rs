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
mod tests {
    use std::sync::{Arc, Mutex};

    use proxy_core::{config::Protocol, conntrack::Traffic, flow::FlowId};

    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("page").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn ended(reason: Reason) -> Ended {
        let client = "10.0.0.1:40000".parse().expect("address");
        let listen = "[fd00::1]:443".parse().expect("address");
        Ended {
            id: "00000007a8aeb1a7".parse::<FlowId>().expect("id"),
            route: "web".into(),
            protocol: Protocol::Tcp,
            client,
            listen,
            backend: "10.0.1.1:80".parse().expect("address"),
            reason,
            at: Duration::new(1_709_210_096, 5_000),
            duration: Duration::from_micros(1_000_042),
            traffic_in: Traffic { packets: 5, bytes: 420 },
            traffic_out: Traffic { packets: 4, bytes: 9000 },
            metered: true,
        }
    }

    fn lines(format: LogFormat, filter: Filter, ended: &[Ended]) -> String {
        let page = Page::default();
        let mut log = AccessLog::new(format, filter, page.clone()).expect("thread");
        ended.iter().for_each(|ended| log.write(ended, Engine::Nft));
        drop(log);
        let bytes = page.0.lock().expect("page").clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    #[test]
    fn a_text_line_has_every_field() {
        assert_eq!(
            lines(LogFormat::Text, Filter::All, &[ended(Reason::FinishedClientFirst)]),
            "time=2024-02-29T12:34:56.000005Z id=00000007a8aeb1a7 client=10.0.0.1:40000 listen=[fd00::1]:443 route=web \
             engine=nft backend=10.0.1.1:80 reason=finished_client_first duration=1.000042 bytes_in=420 bytes_out=9000 \
             packets_in=5 packets_out=4\n"
        );
    }

    #[test]
    fn a_json_line_is_one_json_object() {
        let mut unmetered = ended(Reason::Killed);
        unmetered.metered = false;
        let text = lines(LogFormat::Json, Filter::All, &[ended(Reason::Killed), unmetered]);
        let values: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(values[0]["duration"], 1.000042);
        assert_eq!(values[0]["bytes_out"], 9000);
        assert_eq!(values[0]["reason"], "killed");
        assert!(values[1]["bytes_out"].is_null());
    }

    #[test]
    fn a_relayed_connection_has_a_line_of_the_same_form() {
        let relayed = stream::Ended {
            id: stream::StreamId::new(1, 2),
            route: "-".into(),
            engine: Engine::Copy,
            client: "10.0.0.1:40000".parse().expect("address"),
            listen: "[fd00::1]:443".parse().expect("address"),
            backend: None,
            reason: Reason::NoRoute,
            at: Duration::new(1_709_210_096, 5_000),
            duration: Duration::from_micros(42),
            bytes_in: 7,
            bytes_out: 0,
        };
        let line = |format| {
            let page = Page::default();
            let mut log = AccessLog::new(format, Filter::Errors, page.clone()).expect("thread");
            log.write_relayed(&relayed);
            drop(log);
            String::from_utf8(page.0.lock().expect("page").clone()).expect("UTF-8")
        };
        assert_eq!(
            line(LogFormat::Text),
            "time=2024-02-29T12:34:56.000005Z id=s010000000000002 client=10.0.0.1:40000 listen=[fd00::1]:443 route=- \
             engine=copy backend=- reason=no_route duration=0.000042 bytes_in=7 bytes_out=0 packets_in=- packets_out=-\n"
        );
        let json: serde_json::Value = serde_json::from_str(&line(LogFormat::Json)).expect("JSON");
        assert!(json["backend"].is_null() && json["packets_in"].is_null());
        assert_eq!(json["bytes_in"], 7);
    }

    #[tokio::test]
    async fn lines_of_relayed_connections_are_written_before_the_daemon_is_gone() {
        let page = Page::default();
        let log = AccessLog::new(LogFormat::Text, Filter::Off, page.clone()).expect("thread");
        let (told, hears) = mpsc::channel(4);
        let (filter, filters) = watch::channel(Filter::Off);
        let pressure = Arc::new(Pressure::default());
        filter.send_replace(Filter::All);
        let one = stream::Ended {
            id: stream::StreamId::new(0, 1),
            route: "web".into(),
            engine: Engine::Splice,
            client: "10.0.0.1:40000".parse().expect("address"),
            listen: "10.0.0.2:443".parse().expect("address"),
            backend: None,
            reason: Reason::Denied,
            at: Duration::ZERO,
            duration: Duration::ZERO,
            bytes_in: 0,
            bytes_out: 0,
        };
        let task = tokio::spawn(write_relayed(log, hears, filters, pressure));
        // The level is taken over before lines that come after it.
        tokio::task::yield_now().await;
        told.send(vec![one.clone(), one]).await.expect("heard");
        drop(told);
        task.await.expect("ended");
        assert_eq!(page.0.lock().expect("page").iter().filter(|b| **b == b'\n').count(), 2);
    }

    #[test]
    fn the_filter_errors_leaves_clean_ends_out() {
        let both = [ended(Reason::FinishedBackendFirst), ended(Reason::ConnectRefused)];
        assert_eq!(lines(LogFormat::Text, Filter::Errors, &both).lines().count(), 1);
        assert_eq!(lines(LogFormat::Text, Filter::Off, &both), "");
    }

    #[test]
    fn dates_are_right_around_leap_days_and_centuries() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(11_016), (2000, 2, 29));
        assert_eq!(civil_date(11_017), (2000, 3, 1));
        assert_eq!(civil_date(47_540), (2100, 2, 28));
        assert_eq!(civil_date(47_541), (2100, 3, 1));
    }

    #[derive(Debug)]
    struct Stuck(Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_reader_costs_counted_lines_and_no_time() {
        let (release, held) = sync_channel(0);
        let mut log = AccessLog::new(LogFormat::Text, Filter::All, Stuck(held)).expect("thread");
        for _ in 0..WAITING + 10 {
            log.write(&ended(Reason::Killed), Engine::Nft);
            log.flush();
        }
        assert!(log.lost() >= 9, "{}", log.lost());
        drop(release);
    }

    /// Nanoseconds this thread has run.
    fn cpu() -> f64 {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
        text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("number")
    }

    /// Prints what one line costs; run with optimisation to learn something.
    #[test]
    #[ignore = "a measurement"]
    fn cost_of_a_line() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let mut log = AccessLog::new(format, Filter::All, io::sink()).expect("thread");
            let line = ended(Reason::FinishedClientFirst);
            let started = cpu();
            for _ in 0..1_000_000 {
                log.write(&line, Engine::Nft);
            }
            println!("{format:?}: {:.0} ns per line", (cpu() - started) / 1e6);
        }
    }
}
