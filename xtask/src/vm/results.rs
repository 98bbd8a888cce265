//! What the checks left in the results folder, and the table of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde_json::{Value, json};

/// The end of one check on one kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// What it says of itself.
    Passed(String),
    /// Exit code, and what failed.
    Failed(i32, String),
    TimedOut(String),
    /// The machine ended before it.
    NotRun,
}

/// `timeout`'s exit codes, when it had to ask and when it had to force.
const TIMED_OUT: [i32; 2] = [124, 137];

impl Outcome {
    pub fn read(results: &Path, check: &str) -> Self {
        let ended = fs::read_to_string(results.join(format!("{check}.exit"))).unwrap_or_default();
        let log = fs::read(results.join(format!("{check}.log"))).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        match ended.split_whitespace().next().and_then(|code| code.parse().ok()) {
            None => Self::NotRun,
            Some(0) => Self::Passed(summary(&log)),
            Some(code) if TIMED_OUT.contains(&code) => Self::TimedOut(summary(&log)),
            Some(code) => Self::Failed(code, summary(&log)),
        }
    }

    pub fn passed(&self) -> bool {
        matches!(self, Self::Passed(_))
    }

    /// One cell of the table.
    pub fn cell(&self) -> String {
        match self {
            Self::Passed(what) => format!("ok {what}"),
            Self::Failed(code, what) => format!("**failed** ({code}) {what}"),
            Self::TimedOut(what) => format!("**timed out** {what}"),
            Self::NotRun => "not run".to_owned(),
        }
        .trim_end()
        .to_owned()
    }
}

/// How many tests of a test program passed, and which did not or had not ended.
fn summary(log: &str) -> String {
    let (passed, others) = at_the_end(log).unwrap_or_else(|| on_the_way(log));
    match (passed, others.as_slice()) {
        (0, []) => String::new(),
        (passed, []) => passed.to_string(),
        (passed, others) => format!("{passed}, not {}", others.join(", ")),
    }
}

/// As the program sums up itself.
fn at_the_end(log: &str) -> Option<(usize, Vec<&str>)> {
    let result = log.lines().find_map(|line| line.strip_prefix("test result: "))?;
    let passed = result.split_once(" passed")?.0.rsplit(' ').next()?.parse().ok()?;
    let failed = log.rsplit_once("\nfailures:\n").map_or("", |(_, names)| names);
    Some((passed, failed.lines().map_while(|line| line.strip_prefix("    ")).collect()))
}

/// Of one that did not come to its end. What the peers of a test write may stand where its outcome should.
fn on_the_way(log: &str) -> (usize, Vec<&str>) {
    let tests = log.lines().filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "));
    let tests = tests.filter(|(_, outcome)| !outcome.starts_with("ignored"));
    let (passed, others): (Vec<_>, Vec<_>) = tests.partition(|(_, outcome)| outcome.ends_with("ok"));
    (passed.len(), others.into_iter().map(|(name, _)| name).collect())
}

/// Checks of `shunt doctor` that say which engine a kernel gets.
const ENGINES: [&str; 6] =
    ["nf_tables", "table ownership", "port ranges", "eBPF self-probe", "sockmap self-probe", "handoff"];

/// What `shunt doctor` found of the engines, by check.
pub fn doctor(results: &Path) -> BTreeMap<&'static str, String> {
    let told = fs::read(results.join("doctor.log")).unwrap_or_default();
    // A warning on standard error may stand before it.
    let begin = told.iter().position(|byte| *byte == b'{').unwrap_or_default();
    let report: Value = serde_json::from_slice(&told[begin..]).unwrap_or_default();
    let found = |name: &'static str| {
        let check = report["checks"].as_array()?.iter().find(|check| check["name"] == name)?;
        let found = check["found"].as_str().unwrap_or_default().replace('|', "/");
        Some((name, if check["state"] == "ok" { format!("ok: {found}") } else { format!("**no**: {found}") }))
    };
    ENGINES.into_iter().filter_map(found).collect()
}

/// What the kernel said of each eBPF program, by object and program: lines of the test `ebpf_objects`.
pub fn programs(results: &Path) -> BTreeMap<String, String> {
    let log = fs::read_to_string(results.join("ebpf_objects.log")).unwrap_or_default();
    let told = log.lines().filter_map(|line| line.strip_prefix("ebpf: ")?.split_once(": "));
    told.map(|(program, outcome)| (program.to_owned(), outcome.replace('|', "/"))).collect()
}

/// One kernel's column of the table.
#[derive(Debug)]
pub struct Column {
    pub kernel: String,
    pub outcomes: Vec<Outcome>,
    pub doctor: BTreeMap<&'static str, String>,
    pub programs: BTreeMap<String, String>,
}

/// The same for programs to read.
pub fn json(checks: &[String], kernels: &[Column]) -> Value {
    let column = |column: &Column| {
        let outcomes = checks.iter().zip(&column.outcomes);
        let checks: Vec<Value> = outcomes
            .map(|(check, outcome)| json!({"check": check, "passed": outcome.passed(), "said": outcome.cell()}))
            .collect();
        json!({"kernel": column.kernel, "checks": checks, "doctor": column.doctor, "programs": column.programs})
    };
    kernels.iter().map(column).collect()
}

/// A Markdown table: a row for each check, for what `shunt doctor` says of the engines, and for each eBPF program; a column for each kernel.
pub fn table(checks: &[String], kernels: &[Column]) -> String {
    let heads: Vec<&str> = kernels.iter().map(|column| column.kernel.as_str()).collect();
    let mut text = format!("| check | {} |\n|{}\n", heads.join(" | "), " --- |".repeat(kernels.len() + 1));
    for (index, check) in checks.iter().enumerate() {
        let cell = |column: &Column| column.outcomes.get(index).unwrap_or(&Outcome::NotRun).cell();
        text += &format!("| {check} | {} |\n", kernels.iter().map(cell).collect::<Vec<_>>().join(" | "));
    }
    for engine in ENGINES {
        let cell = |column: &Column| column.doctor.get(engine).map_or("not run", String::as_str).to_owned();
        text += &format!("| doctor: {engine} | {} |\n", kernels.iter().map(cell).collect::<Vec<_>>().join(" | "));
    }
    let programs: BTreeSet<&String> = kernels.iter().flat_map(|column| column.programs.keys()).collect();
    for program in programs {
        let cell = |column: &Column| column.programs.get(program).map_or("not run", String::as_str).to_owned();
        text += &format!("| {program} | {} |\n", kernels.iter().map(cell).collect::<Vec<_>>().join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_names_what_failed() {
        let log = "running 3 tests\ntest a ... ok\ntest b ... FAILED\ntest c ... ok\n";
        assert_eq!(summary(log), "2, not b");
        assert_eq!(Outcome::Failed(101, summary(log)).cell(), "**failed** (101) 2, not b");
        let noisy = "test a ... depth=1 CN = lab\nok\ntest b ... FAILED\n\nfailures:\n\n---- b stdout ----\nError: 1\n\n\n\
                     failures:\n    b\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n\n";
        assert_eq!(summary(noisy), "1, not b");
        assert_eq!(summary("test a ... ok\ntest b ... ignored, slow\ntest c ... "), "1, not c");
        assert_eq!(Outcome::Passed(String::new()).cell(), "ok");
    }
}
