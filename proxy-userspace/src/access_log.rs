//! One line per ended connection, to standard output.
//!
//! Lines are formatted by the owner of the flow table and written by a thread of their own: a stuck reader of the log
//! costs lines, which are counted, and never holds the flow table up.

use std::{
    fmt::Display,
    io::{self, Write},
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread::JoinHandle,
    time::Duration,
};

use proxy_core::{
    config::{AccessLog as Filter, Engine, LogFormat},
    flow::Ended,
    reason::Reason,
};

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

    pub fn write(&mut self, ended: &Ended, engine: Engine) {
        let wanted = match self.filter {
            Filter::All => true,
            Filter::Errors => !matches!(ended.reason, Reason::FinishedClientFirst | Reason::FinishedBackendFirst),
            Filter::Off => false,
        };
        if !wanted {
            return;
        }
        let time = self.clock.text(ended.at);
        // Writing into a Vec cannot fail.
        let _ = line(&mut self.buffer, self.format, time, ended, engine);
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

fn line(out: &mut Vec<u8>, format: LogFormat, time: &str, ended: &Ended, engine: Engine) -> io::Result<()> {
    let (duration, metered) = (ended.duration, ended.metered);
    let mut line = Line { out, format, first: true };
    line.text("time", &time)?;
    line.text("id", &ended.id)?;
    line.text("client", &ended.client)?;
    line.text("listen", &ended.listen)?;
    line.text("route", &ended.route)?;
    line.text("engine", &engine)?;
    line.text("backend", &ended.backend)?;
    line.text("reason", &ended.reason.label())?;
    line.number("duration", &format_args!("{}.{:06}", duration.as_secs(), duration.subsec_micros()))?;
    line.count("bytes_in", metered.then_some(ended.traffic_in.bytes))?;
    line.count("bytes_out", metered.then_some(ended.traffic_out.bytes))?;
    line.count("packets_in", metered.then_some(ended.traffic_in.packets))?;
    line.count("packets_out", metered.then_some(ended.traffic_out.packets))?;
    line.end()
}

/// A line in the making. No value needs escaping: addresses, numbers, labels, and route names of `[a-z0-9-]`.
struct Line<'a> {
    out: &'a mut Vec<u8>,
    format: LogFormat,
    first: bool,
}

impl Line<'_> {
    fn text(&mut self, key: &str, value: &dyn Display) -> io::Result<()> {
        self.key(key)?;
        match self.format {
            LogFormat::Text => write!(self.out, "{value}"),
            LogFormat::Json => write!(self.out, "\"{value}\""),
        }
    }

    fn number(&mut self, key: &str, value: &dyn Display) -> io::Result<()> {
        self.key(key)?;
        write!(self.out, "{value}")
    }

    fn count(&mut self, key: &str, count: Option<u64>) -> io::Result<()> {
        match (count, self.format) {
            (Some(count), _) => self.number(key, &count),
            (None, LogFormat::Text) => self.number(key, &"-"),
            (None, LogFormat::Json) => self.number(key, &"null"),
        }
    }

    fn key(&mut self, key: &str) -> io::Result<()> {
        let first = std::mem::take(&mut self.first);
        match (self.format, first) {
            (LogFormat::Text, true) => write!(self.out, "{key}="),
            (LogFormat::Text, false) => write!(self.out, " {key}="),
            (LogFormat::Json, true) => write!(self.out, "{{\"{key}\":"),
            (LogFormat::Json, false) => write!(self.out, ",\"{key}\":"),
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
