//! Stand-ins for parts written elsewhere: parser, plan and app. To be replaced by those.

use std::{fmt, path::Path};

use proxy_core::{capability::Capabilities, config::Config};
use serde_json::Value;

use super::{Exit, Failure, PlanFormat};

/// `proxy_core::config::Problems`
#[derive(Debug)]
pub(crate) struct Problems(String);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `proxy_core::config::parse`
pub(crate) fn parse(_text: &str, path: &Path) -> Result<Config, Problems> {
    Err(Problems(format!("{}: this build has no parser", path.display())))
}

/// `proxy_core::config::schema`
pub(super) fn schema() -> Value {
    Value::Null
}

/// `proxy_core::plan::plan`, printed. `Err`: one line per route that cannot be served.
pub(super) fn plan(_config: &Config, _capabilities: &Capabilities, _format: PlanFormat) -> Result<String, String> {
    Err("this build has no plan".to_owned())
}

/// `crate::app::run`
pub(super) fn run(_config: &Path) -> anyhow::Result<Exit> {
    Err(Failure::new("this build has no daemon", "merge it").into())
}

/// `crate::app::cleanup`: what was removed and put back, one line each. `socket`: where the daemon's admin socket was.
pub(super) fn cleanup(_socket: &Path) -> anyhow::Result<Vec<String>> {
    Err(Failure::new("this build has no daemon", "merge it").into())
}
