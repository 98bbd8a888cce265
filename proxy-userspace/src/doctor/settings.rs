//! Kernel settings: what `shunt run` would change, and whether it may.

use proxy_core::config::{Config, SourceAddress};

use super::Check;
use crate::kernel::sysctl::{self, Routes, Settings, Sysctl};

/// One check per setting these routes need.
pub(super) fn checks(settings: &Settings, routes: Routes) -> Vec<Check> {
    let mut checks: Vec<_> = sysctl::needed(routes).iter().map(|need| check(settings, need)).collect();
    checks.push(events(settings));
    let lost = settings.router_advertisements_lost();
    let forwards = settings.read(&Sysctl::new("net/ipv6/conf/all/forwarding")).is_ok_and(|value| value != "0");
    if !lost.is_empty() && !forwards {
        let advertisements =
            Check::of("router advertisements", "a host that forwards IPv6 ignores them unless accept_ra is 2");
        checks.push(advertisements.warn("an interface depends on them", lost.join("; ")));
    }
    checks
}

fn check(settings: &Settings, need: &sysctl::Needed) -> Check {
    let check = Check::of(need.name.to_string(), need.why);
    match settings.read(&need.name) {
        Ok(value) if need.value.instead_of(&value).is_none() => check.ok(format!("{value}, as needed")),
        Ok(value) if settings.writable(&need.name) => {
            check.ok(format!("{value}; shunt run sets it to {}, shunt cleanup puts it back", need.value))
        }
        Ok(value) if need.optional => check.warn(
            format!("{value}, and may not be set from here"),
            format!("sysctl -w {}={}, where the network namespace is made", need.name, need.value),
        ),
        Ok(value) => check.missing(
            format!("{value}, and may not be set from here"),
            format!("sysctl -w {}={}, where the network namespace is made", need.name, need.value),
        ),
        Err(error) if need.optional => check.warn(error.to_string(), error.mend()),
        Err(error) => check.missing(error.to_string(), error.mend()),
    }
}

fn events(settings: &Settings) -> Check {
    let name = Sysctl::new("net/netfilter/nf_conntrack_events");
    let check = Check::of(
        name.to_string(),
        "with 0 only shunt's own connections send events; otherwise every connection of this machine does, which costs CPU",
    );
    match settings.read(&name).as_deref() {
        Ok("0") => check.ok("0: only shunt's connections send events"),
        Ok(value) => check.warn(
            format!("{value}: every connection of this machine sends events"),
            format!("sysctl -w {name}=0, unless something else here (conntrackd) lives on those events"),
        ),
        Err(error) => check.warn(error.to_string(), error.mend()),
    }
}

/// Strict reverse-path filters, which drop a backend's answers when they take another way than the packets to it.
pub(super) fn reverse_path(settings: &Settings, config: Option<&Config>) -> Check {
    let check = Check::of(
        "rp_filter",
        "strict reverse-path filters drop what takes another way back than the routing table says",
    );
    let strict = strict_interfaces(&settings.per_interface("ipv4", "rp_filter"));
    if strict.is_empty() {
        return check.ok("not strict on any interface");
    }
    let found = format!("strict on {}", strict.join(", "));
    let transparent =
        config.is_some_and(|config| config.routes.iter().any(|route| route.source_address == SourceAddress::Client));
    if !transparent {
        return check.ok(format!("{found}; matters with source_address = \"client\" only"));
    }
    let mend =
        strict.iter().map(|interface| format!("sysctl -w net.ipv4.conf.{}.rp_filter=2", interface.replace('.', "/")));
    check.warn(
        format!("{found}, and a route has source_address = \"client\""),
        format!("if the backends' answers come by another interface: {}", mend.collect::<Vec<_>>().join("; ")),
    )
}

/// The kernel takes the larger of the interface's value and that of `all` (`IN_DEV_MAXCONF`, v6.18); 1 is strict.
fn strict_interfaces(values: &[(Sysctl, String)]) -> Vec<String> {
    let named: Vec<_> =
        values.iter().filter_map(|(name, value)| Some((name.interface()?, value.parse::<u8>().ok()?))).collect();
    let all = named.iter().find(|(interface, _)| *interface == "all").map_or(0, |(_, value)| *value);
    named
        .iter()
        .filter(|(interface, value)| !matches!(*interface, "all" | "default" | "lo") && all.max(*value) == 1)
        .map(|(interface, _)| (*interface).to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_strict_by_itself_or_by_all_and_loose_wins() {
        let values = |all: &str| {
            ["all", "eth0", "eth1", "eth2", "lo"]
                .into_iter()
                .zip([all, "0", "1", "2", "1"])
                .map(|(name, value)| (Sysctl::new(format!("net/ipv4/conf/{name}/rp_filter")), value.to_owned()))
                .collect::<Vec<_>>()
        };
        assert_eq!(strict_interfaces(&values("0")), ["eth1"]);
        assert_eq!(strict_interfaces(&values("1")), ["eth0", "eth1"]);
        assert!(strict_interfaces(&values("2")).is_empty());
    }
}
