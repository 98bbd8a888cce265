//! How long a large file takes. Run with `cargo test --release -p proxy-core measure -- --ignored --nocapture --test-threads 1`.

use std::{fmt::Write as _, time::Instant};

use super::*;

const ROUTES: usize = 50_000;

fn simple() -> String {
    (0..ROUTES).fold("admin.listen = \"off\"\n".to_owned(), |mut text, n| {
        let (a, b, port) = (n / 50_000, n / 200 % 250, n % 200 + 1);
        let _ = write!(text, "[[route]]\nname = \"route-{n}\"\nlisten = [\"10.88.{a}.{b}:{port}\"]\nbackends = [\"10.99.{a}.{b}:{port}\"]\n\n");
        text
    })
}

fn names_on_one_port() -> String {
    (0..ROUTES).fold(String::new(), |mut text, n| {
        let _ = write!(text, "[[route]]\nname = \"route-{n}\"\nlisten = [\"0.0.0.0:443\", \"[::]:443\"]\nmatch = {{ sni = [\"n{n}.example.com\"] }}\nbackends = [\"10.99.0.1:443\"]\n\n");
        text
    })
}

fn one_range_over_all_ports() -> String {
    let wide = "[[route]]\nname = \"wide\"\nmatch.client = [\"10.0.0.0/8\"]\nlisten = [\"0.0.0.0:1-65535\"]\nbackends = [\"10.0.0.1\"]\n";
    (1..=ROUTES).fold(format!("admin.listen = \"off\"\n{wide}"), |mut text, n| {
        let _ =
            write!(text, "[[route]]\nname = \"route-{n}\"\nlisten = [\"0.0.0.0:{n}\"]\nbackends = [\"10.99.0.1\"]\n\n");
        text
    })
}

/// MiB of memory now, and at the highest so far.
fn memory() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() / 1024
    };
    (of("VmRSS:"), of("VmHWM:"))
}

#[test]
#[ignore = "a measurement, of use in a release build only"]
fn fifty_thousand_routes() {
    for (what, text) in [
        ("simple", simple()),
        ("names on one port", names_on_one_port()),
        ("one range over all", one_range_over_all_ports()),
    ] {
        let before = memory();
        let mut times = Vec::new();
        for _ in 0..4 {
            let start = Instant::now();
            drop(good(&text));
            times.push(start.elapsed());
        }
        let config = good(&text);
        println!(
            "{what}: {} routes, {} KiB of text, {times:?}, MiB (now, peak) {before:?} -> {:?}",
            config.routes.len(),
            text.len() / 1024,
            memory()
        );
    }
}

#[test]
#[ignore = "a measurement, of use in a release build only"]
fn fifty_thousand_routes_that_all_overlap() {
    let text = (1..=ROUTES).fold(String::new(), |mut text, n| {
        let _ = write!(
            text,
            "[[route]]\nname = \"route-{n}\"\nlisten = [\"0.0.0.0:{n}-65535\"]\nbackends = [\"10.99.0.1\"]\n\n"
        );
        text
    });
    let start = Instant::now();
    let problems = bad(&text).len();
    println!("nested ranges: {problems} problems, {:?}", start.elapsed());
}
