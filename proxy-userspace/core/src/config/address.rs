//! Addresses, networks and names. Errors are whole messages that name the value, or the part of it that is wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use super::{
    source::quoted,
    types::{Listen, PortRange, Target},
};

/// `address:port` or `address:first-last`.
pub(super) fn listen(text: &str) -> Result<Listen, String> {
    let (host, ports) = split(text)?;
    let Some(ports) = ports else {
        return Err(format!("{} has no port; address:port or address:first-last is expected", quoted(text)));
    };
    let address = match host {
        "" | "*" => {
            return Err(format!(
                "{}: write \"0.0.0.0:{ports}\" for every IPv4 address, \"[::]:{ports}\" for every IPv6 address",
                quoted(text)
            ));
        }
        _ => own_address(text, host)?,
    };
    if address.is_multicast() {
        return Err(format!("{}: a route cannot listen on a multicast address", quoted(text)));
    }
    Ok(Listen { address, ports: port_range(ports)? })
}

/// `address:port`, or `off`: `None`.
pub(super) fn admin_listen(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    let (host, ports) = split(text)?;
    let Some(ports) = ports else {
        return Err(format!("{} has no port; address:port or \"off\" is expected", quoted(text)));
    };
    Ok(Some(SocketAddr::new(own_address(text, host)?, port(ports)?)))
}

/// `IP:port`, `IP`, `name:port` or `name`.
pub(super) fn target(text: &str) -> Result<Target, String> {
    let (host, ports) = split(text)?;
    let port = match ports {
        Some(range) if range.split_once('-').is_some_and(|(first, last)| port(first).is_ok() && port(last).is_ok()) => {
            return Err(format!(
                "{}: a backend has one port, or none to keep the port that the client dialled",
                quoted(text)
            ));
        }
        Some(text) => Some(port(text)?),
        None => None,
    };
    let Ok(ip) = host.parse::<IpAddr>() else {
        let host = host_name(host, true).map_err(|reason| match looks_numeric(host) {
            true => format!("{} is neither an IP address nor a host name", quoted(text)),
            false => format!("{} is neither an IP address nor a host name: {reason}", quoted(text)),
        })?;
        return Ok(Target::Name { host, port });
    };
    if let Some(plain) = mapped(ip) {
        return Err(format!("{}: write the IPv4 address itself, {plain}", quoted(text)));
    }
    if ip.is_unspecified() || ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(format!("{}: nothing can be reached at {ip}", quoted(text)));
    }
    Ok(Target::Address { ip, port })
}

/// `10.0.0.0/8`, or an address alone.
pub(super) fn network(text: &str) -> Result<IpNet, String> {
    let malformed = || {
        format!("{} is not a network; address/prefix is expected, such as \"10.0.0.0/8\" or \"fd00::/8\"", quoted(text))
    };
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| malformed())?;
    if let Some(plain) = mapped(address) {
        return Err(format!("{}: write the IPv4 address itself, {plain}", quoted(text)));
    }
    let longest: u8 = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => longest,
        Some(prefix) if !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit()) => {
            let in_range = prefix.parse().ok().filter(|prefix| *prefix <= longest);
            in_range.ok_or_else(|| format!("{}: prefix {prefix} is out of range (0–{longest})", quoted(text)))?
        }
        Some(_) => return Err(malformed()),
    };
    let network = IpNet::new(address, prefix).map_err(|_| malformed())?;
    if network.trunc() != network {
        let alone = IpNet::from(address);
        return Err(format!(
            "{} has bits beyond its prefix; write \"{}\" or \"{alone}\"",
            quoted(text),
            network.trunc()
        ));
    }
    Ok(network)
}

/// A host name, or `*.` and a host name; lower-case.
pub(super) fn sni(text: &str) -> Result<String, String> {
    if text == "*" {
        return Err("\"*\": a route for every server name is one without match.sni".to_owned());
    }
    if text.parse::<IpAddr>().is_ok() {
        return Err(format!("{}: clients send no server name for an IP address", quoted(text)));
    }
    let (wildcard, name) = text.strip_prefix("*.").map_or(("", text), |name| ("*.", name));
    match host_name(name, false) {
        Ok(name) => Ok(format!("{wildcard}{name}")),
        Err(reason) => Err(format!("{} is not a server name: {reason}", quoted(text))),
    }
}

/// A host name or an IP address; lower-case.
pub(super) fn server_name(text: &str) -> Result<String, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.to_string()),
        Err(_) => host_name(text, false).map_err(|reason| format!("{} is not a host name: {reason}", quoted(text))),
    }
}

/// A protocol name of TLS ALPN (RFC 7301 §3.1).
pub(super) fn alpn(text: &str) -> Result<String, String> {
    match text.len() {
        1..=255 => Ok(text.to_owned()),
        length => Err(format!("{} is {length} bytes long; a protocol name has 1–255", quoted(text))),
    }
}

/// Splits `host:port`, `[v6]:port`, `host`, `[v6]`, `v6`; neither part is checked, but an address in brackets is IPv6.
fn split(text: &str) -> Result<(&str, Option<&str>), String> {
    if let Some(inner) = text.strip_prefix('[') {
        let (host, rest) = inner.split_once(']').ok_or_else(|| format!("{} lacks the closing ]", quoted(text)))?;
        if host.parse::<Ipv6Addr>().is_err() {
            return Err(format!("{}: {} is not an IPv6 address", quoted(text), quoted(host)));
        }
        return match rest.strip_prefix(':') {
            Some(port) => Ok((host, Some(port))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(format!("{}: a colon and a port are expected after ]", quoted(text))),
        };
    }
    if text.parse::<Ipv6Addr>().is_ok() {
        return Ok((text, None));
    }
    match text.rsplit_once(':') {
        Some((host, _)) if host.contains(':') => {
            Err(format!("{}: an IPv6 address with a port is written [address]:port", quoted(text)))
        }
        Some((host, port)) => Ok((host, Some(port))),
        None => Ok((text, None)),
    }
}

/// An address of this machine; never a name, which could change under the listener.
fn own_address(text: &str, host: &str) -> Result<IpAddr, String> {
    let address: IpAddr = host.parse().map_err(|_| match host_name(host, false) {
        Ok(_) if !looks_numeric(host) => {
            format!("{}: {} is a name; an IP address is expected", quoted(text), quoted(host))
        }
        _ => format!("{}: {} is not an IP address", quoted(text), quoted(host)),
    })?;
    match mapped(address) {
        Some(plain) => Err(format!("{}: write the IPv4 address itself, {plain}", quoted(text))),
        None => Ok(address),
    }
}

/// The IPv4 address inside `::ffff:a.b.c.d`: no packet carries the outer form.
fn mapped(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V6(address) => address.to_ipv4_mapped(),
        IpAddr::V4(_) => None,
    }
}

fn port_range(text: &str) -> Result<PortRange, String> {
    let Some((first, last)) = text.split_once('-') else {
        let port = port(text)?;
        return Ok(PortRange { first: port, last: port });
    };
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(format!("ports {first}-{last} run backwards; write {last}-{first}"));
    }
    Ok(PortRange { first, last })
}

fn port(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let port = text.parse().ok().filter(|port| digits && *port != 0);
    port.ok_or_else(|| match digits {
        true => format!("port {} is not a port (1–65535)", text.get(..20).unwrap_or(text)),
        false => format!("port {} is not a port (1–65535)", quoted(text)),
    })
}

/// A mistyped address rather than a name: no top-level domain is a number.
fn looks_numeric(host: &str) -> bool {
    let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit())
}

/// A host name (RFC 1123 §2.1, and `_`, which service discovery uses); lower-case. Errors say what is wrong with it.
fn host_name(text: &str, trailing_dot: bool) -> Result<String, &'static str> {
    if !text.is_ascii() {
        return Err("write names with other letters than a–z in their xn-- form");
    }
    let name = match text.strip_suffix('.') {
        Some(name) if trailing_dot => name,
        Some(_) => return Err("leave the last dot away"),
        None => text,
    };
    if name.is_empty() || name.len() > 253 {
        return Err("it must have 1–253 characters");
    }
    if name.split('.').any(|label| label.is_empty() || label.len() > 63) {
        return Err("the parts between its dots must have 1–63 characters");
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        return Err("only a–z, 0–9, -, _ and . may be in it");
    }
    if name.split('.').any(|label| label.starts_with('-') || label.ends_with('-')) {
        return Err("none of its parts may begin or end with -");
    }
    if looks_numeric(name) {
        return Err("its last part is a number");
    }
    Ok(text.to_ascii_lowercase())
}
