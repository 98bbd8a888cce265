//! Mistakes in the TOML itself, told in one line.

use std::ops::Range;

use toml::de::Error;

use super::source::quoted;

/// Where each mistake is, and what it is. Mistakes that only follow from the one before them are left out.
pub(super) fn describe(text: &str, mistakes: &[Error]) -> Vec<(usize, String)> {
    let mut told: Vec<(usize, String)> = Vec::new();
    for mistake in mistakes {
        let reason = mistake.message();
        let span = mistake.span().unwrap_or(text.len()..text.len());
        told.push((span.start, message(text, reason, span.clone())));
        // An array that is not closed takes the keys after it for its items, to the end of the file.
        if reason.starts_with("missing comma between array elements") && begins_a_key(text, span.start) {
            break;
        }
    }
    told
}

fn begins_a_key(text: &str, at: usize) -> bool {
    let (before, after) = line_around(text, at);
    before.trim().is_empty() && (after.starts_with('[') || after.contains('='))
}

/// The line that holds the byte at `at`, in two parts.
fn line_around(text: &str, at: usize) -> (&str, &str) {
    let before = text.get(..at).and_then(|before| before.rsplit('\n').next()).unwrap_or_default();
    let after = text.get(at..).and_then(|after| after.lines().next()).unwrap_or_default();
    (before, after)
}

fn message(text: &str, reason: &str, span: Range<usize>) -> String {
    let found = text.get(span.clone()).unwrap_or_default();
    if reason == "duplicate key" {
        return format!("{} is here for the second time; a key or table may be set once", quoted(found));
    }
    if reason.starts_with("string values must be quoted") || (reason.starts_with("invalid") && is_word(found)) {
        return format!("not valid TOML: a string is written in quotes, {}", quoted(found));
    }
    let reason = match reason {
        _ if reason.starts_with("missing comma between array elements") => {
            "a comma or the ] of the array above is missing".to_owned()
        }
        _ => reason.trim_end_matches(", expected nothing").replace('\n', " "),
    };
    let (before, after) = line_around(text, span.start);
    format!("not valid TOML: {reason}, in {}", quoted(format!("{before}{after}").trim()))
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:/".contains(&b))
}
