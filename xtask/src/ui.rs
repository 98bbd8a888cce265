//! What the person at the terminal sees.

use std::io::{self, IsTerminal, Write};

/// Begins a step: one line on stderr.
pub fn step(what: &str) {
    print("==>", "1;34", what);
}

/// A fact worth knowing, on stderr.
pub fn note(what: &str) {
    print("   ", "0", what);
}

/// The error and what led to it, on stderr.
pub fn error(error: &anyhow::Error) {
    print("error:", "1;31", &format!("{error:#}"));
}

fn print(mark: &str, colour: &str, text: &str) {
    let mut stderr = io::stderr();
    let outcome = if stderr.is_terminal() {
        writeln!(stderr, "\x1b[{colour}m{mark}\x1b[0m {text}")
    } else {
        writeln!(stderr, "{mark} {text}")
    };
    // A closed stderr is no reason to stop.
    drop(outcome);
}
