//! What the configuration module promises.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod acme;
mod arbitrary;
mod example;
mod keys;
mod measure;
mod messages;
mod sharing;
mod syntax;

use std::path::Path;

use super::*;

const FILE: &str = "/etc/shunt/shunt.toml";

fn read(text: &str) -> Result<Config, Problems> {
    parse(text, Path::new(FILE))
}

#[track_caller]
fn good(text: &str) -> Config {
    read(text).unwrap_or_else(|problems| panic!("{problems}\n\nin\n{text}"))
}

/// One line per problem, without the file.
#[track_caller]
fn bad(text: &str) -> Vec<String> {
    match read(text) {
        Ok(_) => panic!("nothing was found wrong with\n{text}"),
        Err(problems) => problems.problems.iter().map(ToString::to_string).collect(),
    }
}

/// A route that listens on a port of its own, with these lines in it; the first of them is line 5.
fn route_with(lines: &str) -> String {
    format!("[[route]]\nname = \"web\"\nlisten = [\"0.0.0.0:80\"]\nbackends = [\"10.0.0.2:8080\"]\n{lines}\n")
}
