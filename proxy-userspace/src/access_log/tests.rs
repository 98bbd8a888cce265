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
    let values: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
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
