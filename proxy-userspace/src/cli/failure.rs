//! A command that failed: what, how to mend it, and the exit code.

use std::{fmt, process::ExitCode};

use anstyle::{AnsiColor, Style};

/// The exit codes of `shunt`; 2, wrong usage, is clap's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Fine = 0,
    /// The request failed.
    Failed = 1,
    /// No daemon to talk to.
    NoDaemon = 3,
    /// A privilege or a kernel feature is missing.
    Missing = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One line, or one per problem.
    pub what: String,
    /// One line.
    pub mend: Option<String>,
    pub exit: Exit,
}

impl Failure {
    pub fn new(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what: what.into(), mend: Some(mend.into()), exit: Exit::Failed }
    }

    pub fn exit(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }

    /// To stderr; an error of writing has nobody left to be told to.
    pub(super) fn print(&self) {
        use std::io::Write;
        let error = AnsiColor::Red.on_default().bold();
        let bold = Style::new().bold();
        let mut stderr = anstream::stderr().lock();
        let _ = writeln!(stderr, "{error}error:{error:#} {}", self.what);
        if let Some(mend) = &self.mend {
            let _ = writeln!(stderr, "{bold} mend:{bold:#} {mend}");
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}
