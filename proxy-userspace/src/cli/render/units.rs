//! Numbers for people.

/// `0 B`, `1023 B`, `1.5 KiB`, `12 MiB`
pub(in crate::cli) fn bytes(value: f64) -> String {
    scaled(value, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB"])
}

/// `999`, `1.2k`, `35M`
pub(in crate::cli) fn count(value: u64) -> String {
    scaled(value as f64, 1000.0, &["", "k", "M", "G", "T"])
}

/// `1 route`, `2 routes`
pub(in crate::cli) fn counted(number: u64, one: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {one}s") }
}

/// `0`, `0.3`, `12`, `1.2k`: per second, without the unit.
pub(in crate::cli) fn rate(value: f64) -> String {
    if value > 0.0 && value < 9.95 { format!("{value:.1}") } else { scaled(value, 1000.0, &["", "k", "M", "G"]) }
}

/// `0.4s`, `12s`, `3m20s`, `5h12m`, `3d4h`
pub(in crate::cli) fn seconds(value: f64) -> String {
    let whole = value.max(0.0) as u64;
    let (days, hours, minutes, seconds) = (whole / 86400, whole / 3600 % 24, whole / 60 % 60, whole % 60);
    match (days, hours, minutes) {
        (0, 0, 0) if value < 9.95 => format!("{value:.1}s"),
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{seconds}s"),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

fn scaled(value: f64, base: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut units = units.iter();
    let mut unit = units.next().copied().unwrap_or_default();
    let mut whole = true;
    // What would be rounded up to the next unit is shown in it: 1.0 MiB, not 1024 KiB.
    while value >= base - 0.5 {
        let Some(next) = units.next() else { break };
        (value, unit, whole) = (value / base, next, false);
    }
    if !whole && value < 99.95 { format!("{value:.1}{unit}") } else { format!("{value:.0}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_in_binary_units() {
        let shown = [0.0, 1023.0, 1024.0, 1536.0, 1_048_575.9, 123.0 * 1024.0 * 1024.0, 5e18].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "123 MiB", "4441 PiB"]);
    }

    #[test]
    fn counts_and_rates_are_short() {
        assert_eq!([0, 999, 1000, 1234, 35_000_000].map(count), ["0", "999", "1.0k", "1.2k", "35.0M"]);
        assert_eq!([0.0, 0.26, 12.4, 1234.0].map(rate), ["0", "0.3", "12", "1.2k"]);
    }

    #[test]
    fn durations_have_two_parts_at_most() {
        let shown = [0.0, 0.44, 12.0, 200.0, 18_720.0, 273_600.0].map(seconds);
        assert_eq!(shown, ["0.0s", "0.4s", "12s", "3m20s", "5h12m", "3d4h"]);
    }
}
