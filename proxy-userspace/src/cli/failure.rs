//! A command that failed: what, how to mend it, and the exit code.

use std::{fmt, process::ExitCode};

use anstyle::{AnsiColor, Style};

use crate::{admin::BindError, kernel::sysctl::SysctlError, logging::LogError};

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

/// May be put into an [`anyhow::Error`] and is found there again.
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

/// Finds the typed error below and its mend; context added on the way up stays in front.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let what = format!("{error:#}");
        let below = |mend: Option<String>, exit| Failure { what: what.clone(), mend, exit };
        if let Some(failure) = error.downcast_ref::<Failure>() {
            return below(failure.mend.clone(), failure.exit);
        }
        if let Some(bind) = error.downcast_ref::<BindError>() {
            return below(Some(bind.mend()), Exit::Failed);
        }
        if let Some(sysctl) = error.downcast_ref::<SysctlError>() {
            return below(Some(sysctl.mend()), Exit::Missing);
        }
        if error.downcast_ref::<LogError>().is_some() {
            return below(Some("set log.level to one of trace, debug, info, warn, error".to_owned()), Exit::Failed);
        }
        below(None, Exit::Failed)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn the_mend_and_the_exit_code_survive_context() {
        let below = Failure::new("no nf_tables", "modprobe nf_tables").exit(Exit::Missing);
        let error = Err::<(), _>(below).context("cannot start").expect_err("an error");
        let failure = Failure::from(error);
        assert_eq!(failure.what, "cannot start: no nf_tables");
        assert_eq!((failure.mend.as_deref(), failure.exit), (Some("modprobe nf_tables"), Exit::Missing));
    }

    #[test]
    fn a_second_daemon_is_told_what_to_do() {
        let error = anyhow::Error::new(BindError::AnotherDaemon { path: "/run/s".into(), pid: Some(7) });
        let failure = Failure::from(error);
        assert!(failure.what.contains("(pid 7)"), "{failure}");
        assert!(failure.mend.is_some());
    }
}
