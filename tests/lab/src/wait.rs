//! Waiting for a state, never for a time.

use std::{
    env,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Short enough not to matter beside a connect, long enough not to eat a core.
const POLL: Duration = Duration::from_millis(5);

/// How many times longer than written down the lab waits: for a machine that is slow throughout (`cargo xtask vm` sets it where software
/// plays the processor). What tests ask of the product's own clocks is not stretched.
const PATIENCE: &str = "SHUNT_LAB_PATIENCE";

/// `within`, on this machine. For waits that the lab does not do itself, such as a socket's time-out.
///
/// # Panics
/// When `SHUNT_LAB_PATIENCE` is set to something else than a whole number from 1 on.
pub fn patiently(within: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| match env::var(PATIENCE) {
        Ok(set) => set.parse().ok().filter(|factor| *factor > 0).unwrap_or_else(|| panic!("{PATIENCE}={set}")),
        Err(_) => 1,
    });
    within * *factor
}

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
    let within = patiently(within);
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
