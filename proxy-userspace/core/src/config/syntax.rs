//! Mistakes in the TOML itself, told in one line.

use toml::de::Error;

use super::source::quoted;

/// Where a mistake is, and what it is.
pub(super) fn describe(text: &str, mistake: &Error) -> (usize, String) {
    let span = mistake.span().unwrap_or(text.len()..text.len());
    let at = text.get(span.start..).unwrap_or_default();
    let found = text.get(span.clone()).unwrap_or_default();
    let message = match mistake.message() {
        "duplicate key" => return (span.start, format!("{} is here for the second time; a key or table may be set once", quoted(found))),
        message => message.replace('\n', " "),
    };
    let line = at.lines().next().unwrap_or_default().trim();
    let place = if line.is_empty() { "at the end of the line".to_owned() } else { format!("at {}", quoted(line)) };
    (span.start, format!("not valid TOML: {message}, {place}"))
}
