//! Ctrl-C and SIGTERM: asked to stop, every task returns through its normal path, so that guards clean up.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result, bail};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// From now on the first signal asks to stop; a second one ends the process at once.
pub fn on_signals() -> Result<()> {
    for signal in [SIGINT, SIGTERM] {
        // Registered first, so that it sees the flag of an earlier signal and not of this one.
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&ASKED)).context("signal handler")?;
        flag::register(signal, Arc::clone(&ASKED)).context("signal handler")?;
    }
    Ok(())
}

/// Whether somebody asked to stop.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// # Errors
/// When somebody asked to stop.
pub fn check() -> Result<()> {
    if asked() {
        bail!("interrupted");
    }
    Ok(())
}
