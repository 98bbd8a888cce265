//! What this process may do.

use std::fs;

/// The capabilities shunt knows a use for, from `CapEff` of `/proc/self/status`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Privileges {
    pub net_admin: bool,
    pub net_raw: bool,
    pub net_bind_service: bool,
    pub sys_admin: bool,
    pub perfmon: bool,
    pub bpf: bool,
}

/// Those of the calling thread's process; none when `/proc` cannot be read.
pub fn effective() -> Privileges {
    fs::read_to_string("/proc/self/status").ok().and_then(|status| parse(&status)).unwrap_or_default()
}

fn parse(status: &str) -> Option<Privileges> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let bits = u64::from_str_radix(line.trim(), 16).ok()?;
    // include/uapi/linux/capability.h
    let has = |number: u32| bits & 1 << number != 0;
    Some(Privileges {
        net_bind_service: has(10),
        net_admin: has(12),
        net_raw: has(13),
        sys_admin: has(21),
        perfmon: has(38),
        bpf: has(39),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_is_read() {
        let only_net_admin = parse("Name:\tshunt\nCapPrm:\tffffffffffffffff\nCapEff:\t0000000000001000\n");
        assert_eq!(only_net_admin, Some(Privileges { net_admin: true, ..Privileges::default() }));
        assert_eq!(parse("CapEff:\tnonsense\n"), None);
    }
}
