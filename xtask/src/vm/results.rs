//! What the checks left in the results folder, and the table of it.

use std::{fs, path::Path};

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

/// How many tests of a test program passed, and which did not.
fn summary(log: &str) -> String {
    let named = |line: &str, end: &str| {
        Some(line.strip_prefix("test ")?.strip_suffix(end)?.trim_end_matches(" ...").to_owned())
    };
    let passed = log.lines().filter(|line| line.starts_with("test ") && line.ends_with("ok")).count();
    let failed: Vec<String> = log.lines().filter_map(|line| named(line, "FAILED")).collect();
    match (passed, failed.len()) {
        (0, 0) => String::new(),
        (passed, 0) => format!("{passed}"),
        (passed, _) => format!("{passed}, not {}", failed.join(", ")),
    }
}

/// A Markdown table: a row for each check, a column for each kernel.
pub fn table(checks: &[String], kernels: &[(String, Vec<Outcome>)]) -> String {
    let heads: Vec<&str> = kernels.iter().map(|(name, _)| name.as_str()).collect();
    let mut text = format!("| check | {} |\n|{}\n", heads.join(" | "), " --- |".repeat(kernels.len() + 1));
    for (index, check) in checks.iter().enumerate() {
        let cells: Vec<String> =
            kernels.iter().map(|(_, outcomes)| outcomes.get(index).unwrap_or(&Outcome::NotRun).cell()).collect();
        text += &format!("| {check} | {} |\n", cells.join(" | "));
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
        assert_eq!(Outcome::Passed(String::new()).cell(), "ok");
    }
}
