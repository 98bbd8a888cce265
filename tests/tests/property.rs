//! Whatever the configuration, the kernel holds what was planned; whatever the way there, it ends where a fresh start would.

use std::{path::Path, time::Instant};

use proptest::{
    prelude::*,
    test_runner::{Config as Runs, TestCaseError, TestRunner},
};
use proxy_core::{
    capability::Capabilities,
    config::{self, Config},
    diff::{Ownership, diff},
    flow::MarkLayout,
    plan::plan,
};
use proxy_userspace::{
    kernel::nft::{KernelNft, Nft},
    reconcile::{Carrier, Reconciler},
    stream::memory::MemoryStreams,
};
use shunt_tests::in_new_namespace;

/// One route, listening on ports that no other number has.
#[derive(Debug, Clone)]
struct Sketch {
    number: u16,
    udp: bool,
    v6: bool,
    any: bool,
    range: bool,
    same_port: bool,
    backends: Vec<(u8, u16)>,
    balance: &'static str,
    client_source: bool,
    access: bool,
    limits: u8,
    idle: Option<u16>,
}

fn sketch() -> impl Strategy<Value = Sketch> {
    let flags =
        (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let backends = prop::collection::btree_map(2u8..9, 1u16..5, 1..5).prop_map(|m| m.into_iter().collect::<Vec<_>>());
    let balance = prop::sample::select(vec!["round-robin", "random", "source-hash", "maglev"]);
    (0u16..40, flags, backends, balance, 0u8..8, prop::option::of(1u16..9000)).prop_map(
        |(number, (udp, v6, any, range, same_port, client_source, access), backends, balance, limits, idle)| Sketch {
            number,
            udp,
            v6,
            any,
            range,
            same_port,
            backends,
            balance,
            client_source,
            access,
            limits,
            idle,
        },
    )
}

impl Sketch {
    fn toml(&self) -> String {
        let n = self.number;
        let (first, last) = (1000 + n * 100, 1000 + n * 100 + if self.range { 57 } else { 0 });
        let ports = if self.range { format!("{first}-{last}") } else { first.to_string() };
        let listen = match (self.v6, self.any) {
            (false, false) => format!("10.88.1.1:{ports}"),
            (false, true) => format!("0.0.0.0:{ports}"),
            (true, false) => format!("[fd88:1::1]:{ports}"),
            (true, true) => format!("[::]:{ports}"),
        };
        let backends: Vec<String> = self
            .backends
            .iter()
            .map(|(host, weight)| {
                let ip = if self.v6 { format!("fd88:2::{host}") } else { format!("10.88.2.{host}") };
                let address = match (self.same_port, self.v6) {
                    (true, _) => ip,
                    (false, true) => format!("[{ip}]:80"),
                    (false, false) => format!("{ip}:80"),
                };
                format!("{{ address = \"{address}\", weight = {weight} }}")
            })
            .collect();
        let mut toml = format!(
            "[[route]]\nname = \"r{n}\"\nprotocol = \"{}\"\nlisten = [\"{listen}\"]\nbackends = [{}]\nbalance = \"{}\"\nsource_address = \"{}\"\n",
            if self.udp { "udp" } else { "tcp" },
            backends.join(", "),
            self.balance,
            if self.client_source { "client" } else { "gateway" },
        );
        if self.access {
            toml += "allow = [\"10.0.0.0/8\", \"10.88.0.0/16\", \"fd88::/16\"]\ndeny = [\"10.9.0.0/16\"]\n";
        }
        let limits: Vec<&str> =
            [(1, "connections = 10"), (2, "connections_per_client = 3"), (4, "rate_per_client = \"9/minute\"")]
                .into_iter()
                .filter(|(bit, _)| self.limits & bit != 0)
                .map(|(_, text)| text)
                .collect();
        toml += &format!("limits = {{ {} }}\n", limits.join(", "));
        if let Some(idle) = self.idle {
            toml += &format!("timeouts = {{ idle = \"{idle}s\" }}\n");
        }
        toml
    }
}

/// Some routes, each number once.
fn file() -> impl Strategy<Value = Config> {
    prop::collection::vec(sketch(), 0..10).prop_map(|mut routes| {
        routes.sort_by_key(|r| r.number);
        routes.dedup_by_key(|r| r.number);
        let text: String = routes.iter().map(Sketch::toml).collect();
        config::parse(&text, Path::new("/random.toml")).unwrap_or_else(|problems| panic!("{problems}\n{text}"))
    })
}

fn run<T: std::fmt::Debug>(
    cases: u32,
    strategy: impl Strategy<Value = T>,
    test: impl Fn(T) -> Result<(), TestCaseError>,
) {
    let runs = Runs { cases, failure_persistence: None, ..Runs::default() };
    TestRunner::new(runs).run(&strategy, test).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn what_the_kernel_holds_is_what_was_planned() {
    run(24, file(), |config| {
        let wanted =
            plan(&config, &Capabilities::all()).preview(MarkLayout::new(config.kernel.mark_mask), &[]).ruleset();
        let left = in_new_namespace(move || -> anyhow::Result<usize> {
            let mut nft = KernelNft::open()?;
            let nothing = nft.snapshot()?;
            nft.apply(&diff(wanted.clone(), &nothing, Ownership::Shared, |rule| nft.fingerprint(rule)))?;
            Ok(diff(wanted, &nft.snapshot()?, Ownership::Shared, |rule| nft.fingerprint(rule)).len())
        });
        prop_assert_eq!(left.and_then(|left| left).map_err(|e| TestCaseError::fail(format!("{e:#}")))?, 0);
        Ok(())
    });
}

/// The table with each mark spelled as the name of its route, in an order of its own.
fn by_name(reconciler: &Both) -> Vec<String> {
    let mut script = reconciler.script();
    for view in reconciler.route_views() {
        script = script.replace(&format!("{:#010x}", view.mark), &view.name);
    }
    let mut lines: Vec<String> = script.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

type Both = Reconciler<KernelNft, MemoryStreams>;

fn begin(config: Config) -> anyhow::Result<Both> {
    let (nft, streams) = (Some(KernelNft::open()?), MemoryStreams::default());
    let (mut reconciler, found) = Reconciler::open(nft, streams, config, Capabilities::all(), Instant::now())?;
    reconciler.install(&found)?;
    Ok(reconciler)
}

#[test]
fn a_sequence_of_changes_ends_where_a_fresh_start_begins() {
    run(16, prop::collection::vec(file(), 2..6), |configs| {
        let outcome = in_new_namespace(move || -> anyhow::Result<(Vec<String>, Vec<String>, usize)> {
            let last = configs.last().cloned().unwrap_or_else(|| unreachable!("at least two"));
            let mut configs = configs.into_iter();
            let mut changing = begin(configs.next().unwrap_or_else(|| unreachable!("at least two")))?;
            for config in configs {
                let prepared = changing.prepare(config)?;
                changing.carry_out(prepared, Instant::now())?;
                anyhow::ensure!(changing.verify()? == 0, "the kernel differs after a change");
            }
            for id in changing.draining().keys().copied().collect::<Vec<_>>() {
                changing.drained(id, Carrier::Kernel)?;
                changing.drained(id, Carrier::Daemon)?;
            }
            let differences = changing.verify()?;
            let changed = by_name(&changing);
            let fresh = std::thread::spawn(move || in_new_namespace(move || Ok(by_name(&begin(last)?))));
            let fresh: anyhow::Result<Vec<String>> = fresh.join().unwrap_or_else(|_| anyhow::bail!("a panic"))?;
            Ok((changed, fresh?, differences))
        });
        let (changed, fresh, differences) =
            outcome.and_then(|o| o).map_err(|e| TestCaseError::fail(format!("{e:#}")))?;
        prop_assert_eq!(differences, 0);
        prop_assert_eq!(changed, fresh);
        Ok(())
    });
}
