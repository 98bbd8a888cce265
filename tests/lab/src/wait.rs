//! Waiting for a state, never for a time.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Short enough not to matter beside a connect, long enough not to eat a core.
const POLL: Duration = Duration::from_millis(5);

/// Polls until `condition` holds.
///
/// # Errors
/// Names `what` when it still does not hold after `within`.
pub fn wait_until(what: &str, within: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    wait_for(what, within, || condition().then_some(()))
}

/// Polls until `probe` has an answer, and gives it.
///
/// # Errors
/// Names `what` when there is none after `within`.
pub fn wait_for<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(answer) = probe() {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("waited {within:?} in vain: {what}");
        }
        thread::sleep(POLL);
    }
}
