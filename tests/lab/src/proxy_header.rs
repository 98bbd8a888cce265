//! PROXY protocol headers, as other proxies send them. Written from the specification (haproxy.org, proxy-protocol.txt).

use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 1, one line of text. Both addresses of one family.
pub fn v1(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    let (from, to) = (source.ip(), destination.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port()).into_bytes()
}

/// Version 2, command PROXY, stream. `tlvs`: type and value of what follows the addresses.
pub fn v2(source: SocketAddr, destination: SocketAddr, tlvs: &[(u8, &[u8])]) -> Vec<u8> {
    let family = if source.is_ipv4() { 0x11 } else { 0x21 };
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut rest = [octets(source.ip()), octets(destination.ip())].concat();
    rest.extend(source.port().to_be_bytes());
    rest.extend(destination.port().to_be_bytes());
    for (kind, value) in tlvs {
        rest.push(*kind);
        rest.extend((value.len() as u16).to_be_bytes());
        rest.extend_from_slice(value);
    }
    v2_raw(0x21, family, &rest)
}

/// Version 2, command LOCAL: the proxy speaks for itself.
pub fn v2_local() -> Vec<u8> {
    v2_raw(0x20, 0, &[])
}

/// Version 2 with any bytes in the fields, for headers that are wrong.
pub fn v2_raw(version_command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    [&SIGNATURE[..], &[version_command, family], &(rest.len() as u16).to_be_bytes(), rest].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_in_the_specification() {
        let (source, destination) =
            (SocketAddr::from(([192, 168, 0, 1], 56324)), SocketAddr::from(([192, 168, 0, 11], 443)));
        assert_eq!(v1(source, destination), b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n");
        let v2 = v2(source, destination, &[(4, b"x")]);
        assert_eq!(v2[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x10");
        assert_eq!(v2.len(), 16 + 12 + 4);
    }
}
