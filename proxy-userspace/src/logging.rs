//! The log: to stderr, as text or JSON. Level and format may change with a reload.

use std::io::{IsTerminal, stderr};

use proxy_core::config::{Log, LogFormat};
use thiserror::Error;
use tracing::Level;
use tracing_subscriber::{EnvFilter, Layer, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// The target of access-log lines. They are written at every level: `log.access` decides over them, not `log.level`.
pub const ACCESS_TARGET: &str = "access";

#[derive(Debug, Error)]
pub enum LogError {
    #[error("log.level: \"{level}\" is not a level (trace, debug, info, warn, error) or filter: {problem}")]
    Level { level: String, problem: String },
    #[error("the log was set up before")]
    AlreadySet,
    #[error("the log is gone")]
    Gone,
}

type Filtered = tracing_subscriber::layer::Layered<reload::Layer<EnvFilter, Registry>, Registry>;
type Output = Box<dyn Layer<Filtered> + Send + Sync>;

/// Changes the log of a running daemon.
#[derive(Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
    output: reload::Handle<Output, Filtered>,
}

impl std::fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogHandle").finish_non_exhaustive()
    }
}

impl LogHandle {
    /// Takes over `log.level` and `log.format`. On an error nothing changes.
    pub fn apply(&self, log: &Log) -> Result<(), LogError> {
        let filter = filter(&log.level)?;
        self.filter.reload(filter).map_err(|_| LogError::Gone)?;
        self.output.reload(output(log.format)).map_err(|_| LogError::Gone)
    }
}

/// Sets the process's log up. Once per process.
pub fn init(log: &Log) -> Result<LogHandle, LogError> {
    let (filter, filter_handle) = reload::Layer::new(filter(&log.level)?);
    let (output, output_handle) = reload::Layer::new(output(log.format));
    tracing_subscriber::registry().with(filter).with(output).try_init().map_err(|_| LogError::AlreadySet)?;
    Ok(LogHandle { filter: filter_handle, output: output_handle })
}

/// `level` alone (`info`), or directives as `tracing` has them (`info,proxy_userspace::track=debug`).
fn filter(level: &str) -> Result<EnvFilter, LogError> {
    let access = format!("{ACCESS_TARGET}={}", Level::INFO);
    let refused = |problem: String| LogError::Level { level: level.to_owned(), problem };
    if level.trim().is_empty() {
        return Err(refused("it is empty".to_owned()));
    }
    // A bare word that is no level is taken for a target by the parser, and would silence everything else.
    if !level.contains(['=', ',']) && level.parse::<tracing::level_filters::LevelFilter>().is_err() {
        return Err(refused("no such level".to_owned()));
    }
    let filter = EnvFilter::builder().parse(level).map_err(|error| refused(error.to_string()))?;
    let access = access.parse().map_err(|_| refused("the access log's directive was refused".to_owned()))?;
    Ok(filter.add_directive(access))
}

fn output(format: LogFormat) -> Output {
    let layer = tracing_subscriber::fmt::layer().with_writer(stderr).with_target(false);
    match format {
        LogFormat::Text => {
            let colour = stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            Box::new(layer.with_ansi(colour))
        }
        LogFormat::Json => Box::new(layer.with_ansi(false).with_target(true).json().flatten_event(true)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_or_a_filter_is_taken() {
        for level in ["info", "WARN", "off", "info,proxy_userspace::track=debug", "proxy_core=trace"] {
            assert!(filter(level).is_ok(), "{level}");
        }
    }

    #[test]
    fn a_word_that_is_no_level_is_refused_with_the_word() {
        let error = filter("loud").expect_err("an error").to_string();
        assert!(error.contains("loud") && error.contains("warn"), "{error}");
        assert!(filter("").is_err());
        assert!(filter("info,x=loud").is_err());
    }

    #[test]
    fn access_lines_are_not_silenced_by_the_level() {
        let directives = filter("error").expect("a level").to_string();
        assert!(directives.contains("access=info"), "{directives}");
    }
}
