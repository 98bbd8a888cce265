//! Mistakes in the TOML itself, told in one line.

use std::ops::Range;

use toml::de::Error;

use super::source::quoted;

/// One mistake and where it is.
#[derive(Debug)]
pub(super) struct Mistake {
    pub offset: usize,
    pub message: String,
    /// What comes after it was taken for something it is not: a header that is broken puts every key after it into the
    /// wrong table, an array that is not closed takes them for its items.
    pub misleads: bool,
}

/// The mistakes, less those that only follow from one before them.
pub(super) fn describe(text: &str, errors: &[Error]) -> Vec<Mistake> {
    let mut mistakes = Vec::new();
    for error in errors {
        let reason = error.message();
        let span = error.span().unwrap_or(text.len()..text.len());
        let offset = span.start;
        let (before, after) = line_around(text, offset);
        let header = before.trim_start().starts_with('[') && reason != "duplicate key";
        let first_of_line = before.trim().is_empty();
        let array = reason.starts_with("missing comma between array elements")
            && first_of_line
            && (after.starts_with('[') || after.contains('='));
        mistakes.push(Mistake { offset, message: message(text, reason, span), misleads: header || array });
        if array {
            break;
        }
    }
    mistakes
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
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:/".contains(&b))
}
