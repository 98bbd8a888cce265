//! What the routes of a configuration need beyond the common.

use std::{collections::BTreeSet, io::ErrorKind, net::IpAddr, os::unix::fs::PermissionsExt, sync::Arc};

use nix::ifaddrs::getifaddrs;
use proxy_core::{
    capability::Capabilities,
    config::{AcmeCertificate, Config, Listen, Route},
    plan::Plan,
};

use super::Check;
use crate::{
    acme,
    kernel::{return_path, sysctl::Settings},
    tls::{Certificate, EXPIRES_SOON, RouteTls, now},
};

pub(super) fn checks(config: &Config, capabilities: &Capabilities) -> Vec<Check> {
    let mut checks = vec![listen_addresses(config), features(config, capabilities)];
    checks.extend(certificates(config));
    checks.extend(acme(config));
    checks
}

/// `None`: no route has any.
fn certificates(config: &Config) -> Option<Check> {
    let loaded: Vec<_> = config.routes.iter().map(|route| (route, RouteTls::load(route))).collect();
    // Those that a CA issues are a matter of their own.
    let from_files =
        |tls: &Result<Option<RouteTls>, _>| !matches!(tls, Ok(tls) if tls.as_ref().is_none_or(RouteTls::is_by_acme));
    let loaded: Vec<_> = loaded.into_iter().filter(|(_, tls)| from_files(tls)).collect();
    if loaded.is_empty() {
        return None;
    }
    let check =
        Check::of("certificates", "a daemon does not start with files it cannot serve, nor do clients trust old ones");
    let (mut bad, mut soon, mut first) = (Vec::new(), Vec::new(), None);
    for (route, tls) in &loaded {
        match tls {
            Ok(tls) => {
                for certificate in tls.iter().flat_map(RouteTls::certificates) {
                    let days = (certificate.expires - now()).div_euclid(86_400);
                    first = Some(first.map_or(days, |first: i64| first.min(days)));
                    if certificate.expires - now() <= EXPIRES_SOON {
                        soon.push(match days {
                            ..0 => format!("{} has expired", certificate.file.display()),
                            days => format!("{} expires in {days} days", certificate.file.display()),
                        });
                    }
                }
            }
            Err(error) => bad.push((format!("route \"{}\": {error}", route.name), error.mend())),
        }
    }
    if let Some((_, mend)) = bad.first() {
        let mend = mend.clone();
        let told: Vec<String> = bad.into_iter().map(|(what, _)| what).collect();
        return Some(check.missing(some_of(&told), mend));
    }
    Some(match (soon.is_empty(), first) {
        (false, _) => check.warn(some_of(&soon), "renew them: the daemon takes new files by itself"),
        (true, Some(days)) => check.ok(format!("good; the first one expires in {days} days")),
        (true, None) => check.ok("good"),
    })
}

/// `None`: no route has certificates from a CA.
fn acme(config: &Config) -> Option<Check> {
    let section = config.acme.as_deref()?;
    let routes: Vec<_> = config.routes.iter().filter(|route| !acme::names(route).is_empty()).collect();
    let wanted: BTreeSet<_> = routes.iter().flat_map(|route| acme::names(route)).collect();
    if wanted.is_empty() {
        return None;
    }
    let check =
        Check::of("certificates from the CA", "a name without one is not served, and what is kept of them is secret");
    if let Err(error) = acme::check(section) {
        return Some(check.missing(error.to_string(), error.mend()));
    }
    let cache = &section.cache;
    match std::fs::metadata(cache) {
        Ok(found) if found.permissions().mode() & 0o077 != 0 => {
            let cache = cache.display();
            return Some(check.warn(format!("others may look into {cache}"), format!("chmod 700 {cache}")));
        }
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => {
            let mend = "name another folder with acme.cache, or let shunt's user have this one";
            return Some(check.missing(format!("{}: {error}", cache.display()), mend));
        }
    }
    let lacking =
        |one: &&&AcmeCertificate| !Certificate::load_whole(&one.file).is_ok_and(|found| found.expires > now());
    let lacking: Vec<String> = wanted.iter().filter(lacking).map(|one| one.name.clone()).collect();
    // Where else a CA looks is for others to arrange.
    let reached = |route: &&&Arc<Route>| {
        route.listen.iter().any(|listen| (listen.ports.first..=listen.ports.last).contains(&443))
    };
    let elsewhere: Vec<String> =
        routes.iter().filter(|route| !reached(route)).map(|route| route.name.to_string()).collect();
    Some(match (lacking.is_empty(), elsewhere.is_empty()) {
        (true, _) => {
            check.ok(format!("{} names, every one has a certificate in {}", wanted.len(), section.folder().display()))
        }
        (false, false) => check.warn(
            format!(
                "{} of {} names have none yet ({}), and not on port 443: {}",
                lacking.len(),
                wanted.len(),
                some_of(&lacking),
                some_of(&elsewhere)
            ),
            "the CA looks at port 443 of the name: listen there, or have it led to the route's port",
        ),
        (false, true) => check.warn(
            format!("{} of {} names have none yet: {}", lacking.len(), wanted.len(), some_of(&lacking)),
            "the daemon gets them; `shunt status` says how it goes",
        ),
    })
}

/// … and what the way back of those whose backends see the client's address needs of this machine.
pub(super) fn way_back(plan: &Plan, settings: &Settings) -> Option<Check> {
    let transparent: Vec<_> = plan.routes().iter().filter(|route| route.is_transparent()).collect();
    let names: Vec<_> = transparent.iter().map(|route| route.route.name.to_string()).collect();
    transparent.first()?;
    let check = Check::of(
        "the way back to the daemon",
        "source_address = \"client\": what the backends send to clients must come back through this machine, and to the daemon",
    );
    let uses_marks = settings.per_interface("ipv4", "src_valid_mark");
    let uses_marks = uses_marks.iter().find(|(setting, value)| value != "0" && setting.interface() != Some("default"));
    Some(match (return_path::is_in_place(), uses_marks) {
        (Err(error), _) => {
            let mend = error.mend().unwrap_or_else(|| "`ip rule` shows the rules".into());
            check.missing(error.to_string(), mend)
        }
        (Ok(_), Some((setting, value))) => check.warn(
            format!("{setting} is {value}: what backends answer on that interface is dropped"),
            format!("sysctl -w {setting}=0"),
        ),
        (Ok(there), None) => check.ok(format!(
            "{}, for {}; whether the backends' answers come through this machine is theirs to say: `ip route get CLIENT` there",
            if there { "in place" } else { "free to be made" },
            some_of(&names),
        )),
    })
}

fn listen_addresses(config: &Config) -> Check {
    let check =
        Check::of("listen addresses", "packets to an address this machine does not have must be routed here by others");
    let local: BTreeSet<IpAddr> = match getifaddrs() {
        Ok(interfaces) => interfaces
            .filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
            })
            .collect(),
        Err(errno) => return check.ok(format!("not known: {errno}")),
    };
    let foreign = foreign(config.routes.iter().flat_map(|route| &route.listen), &local);
    match foreign.first() {
        None => check.ok("every one is on this machine"),
        Some(first) => check.warn(
            format!("{} not on this machine", some_of(&foreign)),
            format!(
                "ip address add {first} dev INTERFACE; or nothing, when they are routed to this machine on purpose"
            ),
        ),
    }
}

fn foreign<'a>(listens: impl Iterator<Item = &'a Listen>, local: &BTreeSet<IpAddr>) -> Vec<String> {
    let foreign: BTreeSet<_> = listens
        .map(|listen| listen.address)
        .filter(|address| !address.is_unspecified() && !address.is_loopback() && !local.contains(address))
        .collect();
    foreign.iter().map(ToString::to_string).collect()
}

fn features(config: &Config, capabilities: &Capabilities) -> Check {
    let check = Check::of(
        "features the routes use",
        "a route that needs what the kernel lacks gets another engine or is refused",
    );
    type Uses = fn(&Route) -> bool;
    let uses: [(&str, bool, Uses); 4] = [
        ("limits need nft_connlimit", capabilities.nft_connlimit, |route| {
            route.limits.connections.is_some() || route.limits.connections_per_client.is_some()
        }),
        ("several backends need nft_numgen and nft_hash", capabilities.nft_balance, |route| route.backends.len() > 1),
        ("idle and half-closed timeouts need ct timeout", capabilities.nft_ct_timeout, |_| true),
        ("IPv6 addresses need IPv6", capabilities.ipv6, |route| {
            route.listen.iter().any(|listen| listen.address.is_ipv6())
        }),
    ];
    for (what, there, uses) in uses {
        let routes: Vec<_> =
            config.routes.iter().filter(|route| uses(route)).map(|route| route.name.to_string()).collect();
        if !there && !routes.is_empty() {
            return check.warn(
                format!("{what}: {}", some_of(&routes)),
                "see the check of that feature above; shunt plan tells the consequence",
            );
        }
    }
    check.ok("all there")
}

/// The first few, and how many more.
fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.get(..SHOWN.min(names.len())).unwrap_or_default().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

#[cfg(test)]
mod tests {
    use proxy_core::config::PortRange;

    use super::*;

    #[test]
    fn wildcard_and_loopback_are_always_here() {
        let listen = |address: &str| Listen {
            address: address.parse().expect("address"),
            ports: PortRange { first: 80, last: 80 },
        };
        let listens = ["0.0.0.0", "::", "127.0.0.1", "10.0.0.1", "10.0.0.2"].map(listen);
        let local = BTreeSet::from(["10.0.0.1".parse().expect("address")]);
        assert_eq!(foreign(listens.iter(), &local), ["10.0.0.2"]);
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<_> = (0..8).map(|number| number.to_string()).collect();
        assert_eq!(some_of(&names), "0, 1, 2, 3, 4 and 3 more");
        assert_eq!(some_of(&names[..1]), "0");
    }
}
