//! Room in the conntrack table.

use std::fs;

use super::Check;
use crate::kernel::sysctl::{Settings, Sysctl};

/// Kernel memory of one entry with accounting and timeout extensions, roughly, bytes (`struct nf_conn` and `nf_ct_ext`).
const ENTRY: u64 = 400;

pub(super) fn checks(settings: &Settings) -> Option<Check> {
    let number = |name| settings.read(&Sysctl::new(name)).ok()?.parse::<u64>().ok();
    let max = number("net/netfilter/nf_conntrack_max")?;
    let entries = number("net/netfilter/nf_conntrack_count")?;
    let memory = total_memory(&fs::read_to_string("/proc/meminfo").ok()?)?;
    Some(room(entries, max, memory))
}

/// `memory` in bytes.
fn room(entries: u64, max: u64, memory: u64) -> Check {
    let check =
        Check::of("conntrack table", "every forwarded connection takes an entry; a full table refuses new ones");
    let mebibytes = |bytes: u64| bytes >> 20;
    let found = format!("{entries} of {max} entries; full it takes some {} MiB", mebibytes(max.saturating_mul(ENTRY)));
    // An eighth of the memory, within what is usual.
    let fitting = (memory / 8 / ENTRY).clamp(65_536, 4_194_304).next_power_of_two() / 2;
    let raise =
        |max: u64| format!("sysctl -w net.netfilter.nf_conntrack_max={max} (on the host: containers cannot set it)");
    if entries.saturating_mul(5) >= max.saturating_mul(4) {
        return check.warn(format!("{found}: nearly full"), raise(max.saturating_mul(2).max(fitting)));
    }
    if max.saturating_mul(ENTRY) > memory / 2 {
        return check.warn(format!("{found}, of {} MiB", mebibytes(memory)), raise(fitting));
    }
    if max < 65_536 {
        return check.warn(format!("{found}: small for a gateway"), raise(fitting.max(65_536)));
    }
    check.ok(found)
}

fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn a_table_that_is_nearly_full_too_small_or_too_large_is_said() {
        const GIB: u64 = 1 << 30;
        assert_eq!(room(10, 262_144, 8 * GIB).state, State::Ok);
        assert_eq!(room(250_000, 262_144, 8 * GIB).state, State::Warn);
        assert_eq!(room(10, 16_384, GIB).state, State::Warn);
        let greedy = room(10, 4_194_304, GIB);
        assert_eq!(greedy.state, State::Warn);
        assert!(greedy.mend[0].contains("nf_conntrack_max=262144"), "{greedy:?}");
        room(u64::MAX, u64::MAX, 0);
    }

    #[test]
    fn the_memory_is_read() {
        assert_eq!(total_memory("MemTotal:        2048 kB\nMemFree: 1 kB\n"), Some(2 << 20));
        assert_eq!(total_memory("nonsense"), None);
    }
}
