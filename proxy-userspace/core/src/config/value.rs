//! Strings with a meaning: durations, rates, masks, log filters, file names. Errors are whole messages that name the value.

use std::{num::NonZeroU32, time::Duration};

use super::{
    source::quoted,
    types::{MarkMask, Rate, RateUnit},
};

/// The units of a duration, for messages.
pub(super) const UNITS: &str = "ms, s, m, h, d";

/// The longest first, as [`show_duration`] needs them.
const UNIT_MILLISECONDS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// `500ms`, `5s`, `30m`, `4h`, `1d`, and sums of them: `1h30m`. Integers only.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let malformed =
        || format!("{} is not a duration; a number and a unit ({UNITS}) are expected, such as \"30s\"", quoted(text));
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() || text.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, tail) = tail.split_at(letters);
        if number.is_empty() || (unit.is_empty() && !tail.is_empty()) {
            return Err(malformed());
        }
        if unit.is_empty() {
            return Err(format!("{} has no unit; write \"{text}s\" for seconds ({UNITS})", quoted(text)));
        }
        let Some((_, scale)) = UNIT_MILLISECONDS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("{}: {} is not a unit of time ({UNITS})", quoted(text), quoted(unit)));
        };
        // Too long for the arithmetic is too long for every range.
        let milliseconds = number.parse().unwrap_or(u64::MAX).saturating_mul(*scale);
        total = total.saturating_add(Duration::from_millis(milliseconds));
        rest = tail;
    }
    Ok(total)
}

/// A whole number of milliseconds in the largest unit that fits.
pub(super) fn show_duration(duration: Duration) -> String {
    let milliseconds = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    match UNIT_MILLISECONDS.iter().find(|(_, scale)| milliseconds > 0 && milliseconds.is_multiple_of(*scale)) {
        Some((unit, scale)) => format!("{}{unit}", milliseconds / scale),
        None => "0s".to_owned(),
    }
}

/// `N/second`, `N/minute` or `N/hour`; `None` is zero: unlimited.
pub(super) fn rate(text: &str) -> Result<Option<Rate>, String> {
    let malformed =
        || format!("{} is not a rate; N/second, N/minute or N/hour is expected, such as \"300/minute\"", quoted(text));
    if text == "0" {
        return Ok(None);
    }
    let (count, unit) = text.split_once('/').ok_or_else(malformed)?;
    if count.is_empty() || !count.bytes().all(|b| b.is_ascii_digit()) {
        return Err(malformed());
    }
    let per = match unit {
        "second" => RateUnit::Second,
        "minute" => RateUnit::Minute,
        "hour" => RateUnit::Hour,
        _ => return Err(malformed()),
    };
    let count: u32 =
        count.parse().map_err(|_| format!("{}: {} is out of range (0–{})", quoted(text), quoted(count), u32::MAX))?;
    Ok(NonZeroU32::new(count).map(|count| Rate { count, per }))
}

/// Decimal, or hexadecimal with `0x`.
pub(super) fn mark_mask(text: &str) -> Result<MarkMask, String> {
    let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16),
        None => text.parse(),
    };
    let number = number.map_err(|_| format!("{} is not a mask of 32 bits, such as \"0xffffff00\"", quoted(text)))?;
    MarkMask::new(number)
        .ok_or_else(|| format!("{} is not one contiguous run of 8 to 32 bits, such as \"0xffffff00\"", quoted(text)))
}

const LEVELS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "off"];

/// A level, or several directives `module=level`.
pub(super) fn log_filter(text: &str) -> Result<String, String> {
    for directive in text.split(',').map(str::trim) {
        let (module, level) = directive.rsplit_once('=').unwrap_or(("shunt", directive));
        if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
            return Err(format!("{}: {} is not a level ({})", quoted(text), quoted(level), LEVELS.join(", ")));
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b':' | b'-' | b'.');
        if module.is_empty() || !module.bytes().all(plain) {
            return Err(format!(
                "{}: {} is not the name of a module, such as \"shunt::health\"",
                quoted(text),
                quoted(module)
            ));
        }
    }
    Ok(text.to_owned())
}

/// Any file name that the kernel could take.
pub(super) fn path(text: &str) -> Result<String, String> {
    match text {
        "" => Err("\"\" is not a file name".to_owned()),
        _ if text.contains('\0') => Err(format!("{} is not a file name: it holds a NUL byte", quoted(text))),
        _ => Ok(text.to_owned()),
    }
}
