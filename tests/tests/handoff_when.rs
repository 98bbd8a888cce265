//! When a connection is worth handing over, measured: ignored by default. With a release build of the daemon:
//! `SHUNT_BIN=… cargo test -p shunt-tests --test handoff_when -- --ignored --nocapture` (`ROUNDS=n`, 3).

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use shunt_lab::{GATEWAY, Host, Lab, Shunt};

const RUN: Duration = Duration::from_millis(1500);
const CLIENTS: usize = 8;
const MIB: usize = 1 << 20;

/// What is varied: milliseconds since the backend answered, and bytes; `None`: never, the engine `splice`.
const SETTINGS: [(&str, Option<(u64, usize)>); 8] = [
    ("splice", None),
    ("0 ms, 256 KiB", Some((0, MIB / 4))),
    ("5 ms, 256 KiB", Some((5, MIB / 4))),
    ("20 ms, 256 KiB", Some((20, MIB / 4))),
    ("100 ms, 256 KiB", Some((100, MIB / 4))),
    ("20 ms, 64 KiB", Some((20, MIB / 16))),
    ("20 ms, 1 MiB", Some((20, MIB))),
    ("100 ms, 4 MiB", Some((100, 4 * MIB))),
];

/// What each connection carries.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// One request, an answer of 1 KiB after so many milliseconds, and the end.
    Answer(u64),
    /// Requests and answers of 64 bytes, until the time is over.
    KeepAlive,
    /// An answer of so many bytes, and the end.
    Download(usize),
}

const WORKS: [(&str, Work); 8] = [
    ("answer at once", Work::Answer(0)),
    ("answer after 5 ms", Work::Answer(5)),
    ("answer after 30 ms", Work::Answer(30)),
    ("keep-alive", Work::KeepAlive),
    ("download of 128 KiB", Work::Download(MIB / 8)),
    ("download of 512 KiB", Work::Download(MIB / 2)),
    ("download of 2 MiB", Work::Download(2 * MIB)),
    ("download of 32 MiB", Work::Download(32 * MIB)),
];

impl Work {
    fn port(self) -> u16 {
        match self {
            Self::Answer(after) => 9000 + after as u16,
            Self::KeepAlive => 9100,
            Self::Download(bytes) => 9200 + (bytes / (MIB / 8)) as u16,
        }
    }

    /// The backend's part.
    fn serve(self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut request = [0; 64];
        loop {
            match stream.read_exact(&mut request) {
                Ok(()) => {}
                Err(_) => return Ok(()),
            }
            let answer = match self {
                Self::Answer(after) => {
                    thread::sleep(Duration::from_millis(after));
                    vec![7; 1024]
                }
                Self::KeepAlive => {
                    stream.write_all(&request)?;
                    continue;
                }
                Self::Download(bytes) => vec![7; bytes],
            };
            stream.write_all(&answer)?;
            return stream.shutdown(Shutdown::Write);
        }
    }

    /// One client's: how often it got what it asked for.
    fn ask(self, client: &Host, until: Instant, done: &AtomicU64) -> Result<()> {
        let to = SocketAddr::from((GATEWAY, self.port()));
        let (request, mut answer) = ([1; 64], vec![0; 256 * 1024]);
        while Instant::now() < until {
            let mut stream = client.connect(to)?;
            stream.set_nodelay(true)?;
            stream.write_all(&request)?;
            if let Self::KeepAlive = self {
                while Instant::now() < until {
                    stream.read_exact(answer.get_mut(..64).context("64")?)?;
                    done.fetch_add(1, Relaxed);
                    stream.write_all(&request)?;
                }
                continue;
            }
            while stream.read(&mut answer)? > 0 {}
            done.fetch_add(1, Relaxed);
        }
        Ok(())
    }
}

/// A thread for each connection, until it is told to stop.
fn backend(host: &Host, work: Work, stop: &Arc<AtomicBool>) -> Result<()> {
    let listener: TcpListener = host.listen(SocketAddr::from(([10, 88, 2, 2], work.port())))?;
    let stop = Arc::clone(stop);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if stop.load(Relaxed) {
                return;
            }
            thread::spawn(move || drop(work.serve(stream)));
        }
    });
    Ok(())
}

/// Of the process, in seconds: all of its threads live as long as it does.
fn processor_time(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread of the runtime's pool may go meanwhile; it has done nothing.
        let Ok(times) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        nanoseconds += times.split_whitespace().next().and_then(|ran| ran.parse::<u64>().ok()).context("schedstat")?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

/// What was done in a second, and the daemon's microseconds for each.
fn measure(lab: &Lab, shunt: &Shunt, work: Work) -> Result<(f64, f64)> {
    let (done, began, before) = (AtomicU64::new(0), Instant::now(), processor_time(shunt.pid()?)?);
    let until = began + RUN;
    thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| work.ask(lab.client(), until, &done))).collect();
        clients.into_iter().try_for_each(|client| client.join().expect("a client"))
    })?;
    let (done, spent) = (done.load(Relaxed).max(1) as f64, processor_time(shunt.pid()?)? - before);
    Ok((done / began.elapsed().as_secs_f64(), spent * 1e6 / done))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[test]
#[ignore = "a measurement of some minutes"]
fn when_a_connection_is_worth_handing_over() -> Result<()> {
    let rounds = env::var("ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3);
    let lab = Lab::builder().backends(1).build()?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut config = String::from("[log]\naccess = \"off\"\n");
    for (_, work) in WORKS {
        backend(lab.backend(1), work, &stop)?;
        let port = work.port();
        config += &format!(
            "[[route]]\nname = \"p{port}\"\nlisten = [\"10.88.1.1:{port}\"]\nbackends = [\"10.88.2.2:{port}\"]\nengine = \"ENGINE\"\n"
        );
    }
    // (work, setting) → rates beside those of splice in the same round, and processor time.
    let mut found: BTreeMap<(usize, usize), (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for _ in 0..rounds {
        let mut of_splice = [f64::NAN; WORKS.len()];
        for (setting, (_, when)) in SETTINGS.into_iter().enumerate() {
            let engine = if when.is_some() { "handoff" } else { "splice" };
            let (age, bytes) = when.unwrap_or_default();
            let builder = Shunt::builder().env("SHUNT_MEASURE_HANDOVER", &format!("{age} {bytes}"));
            let mut shunt = builder.start(&lab, &config.replace("ENGINE", engine))?;
            for (work, (_, kind)) in WORKS.into_iter().enumerate() {
                let (rate, spent) = measure(&lab, &shunt, kind)?;
                if setting == 0 {
                    of_splice[work] = rate;
                }
                let (rates, times) = found.entry((work, setting)).or_default();
                rates.push(rate / of_splice[work]);
                times.push(spent);
            }
            shunt.terminate(Duration::from_secs(40))?;
            shunt.cli(&["cleanup"])?;
        }
    }
    stop.store(true, Relaxed);
    let load = fs::read_to_string("/proc/loadavg")?;
    println!("{rounds} rounds of {} ms, load {load}", RUN.as_millis());
    let names: Vec<_> = SETTINGS.iter().map(|(name, _)| *name).collect();
    println!("| rate beside splice; µs of the daemon for each | {} |", names.join(" | "));
    println!("|{}", " --- |".repeat(SETTINGS.len() + 1));
    for (work, (name, _)) in WORKS.into_iter().enumerate() {
        let cells = (0..SETTINGS.len()).map(|setting| {
            let (mut rates, mut times) = found.get(&(work, setting)).cloned().unwrap_or_default();
            format!("{:.2}; {:.0}", median(&mut rates), median(&mut times))
        });
        println!("| {name} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    Ok(())
}
