//! PROXY protocol headers, as other proxies send them. Written from the specification (haproxy.org, proxy-protocol.txt).

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};

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

/// What a received header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Bytes of the header.
    pub length: usize,
}

/// Reads the header, of either version, that `bytes` begin with.
///
/// # Errors
/// When there is none, or it names nobody.
pub fn read(bytes: &[u8]) -> Result<Said> {
    if bytes.starts_with(&SIGNATURE) { read_v2(bytes) } else { read_v1(bytes) }
}

fn read_v1(bytes: &[u8]) -> Result<Said> {
    let end = bytes.windows(2).position(|two| two == b"\r\n").context("no end of line")?;
    let line = std::str::from_utf8(&bytes[..end])?;
    let ["PROXY", "TCP4" | "TCP6", from, to, from_port, to_port] = line.split(' ').collect::<Vec<_>>()[..] else {
        bail!("no header of version 1: {line:?}");
    };
    let at = |ip: &str, port: &str| anyhow::Ok(SocketAddr::new(ip.parse()?, port.parse()?));
    Ok(Said { source: at(from, from_port)?, destination: at(to, to_port)?, length: end + 2 })
}

fn read_v2(bytes: &[u8]) -> Result<Said> {
    let fixed: &[u8; 16] = bytes.first_chunk().context("too short")?;
    let (kind, length) = ((fixed[12], fixed[13]), usize::from(u16::from_be_bytes([fixed[14], fixed[15]])));
    let rest = bytes.get(16..16 + length).context("too short")?;
    let size = match kind {
        (0x21, 0x11) => 4,
        (0x21, 0x21) => 16,
        other => bail!("command and family {other:?}"),
    };
    let ip = |at: &[u8]| -> Result<IpAddr> {
        Ok(if size == 4 { IpAddr::from(<[u8; 4]>::try_from(at)?) } else { IpAddr::from(<[u8; 16]>::try_from(at)?) })
    };
    let port = |at: usize| rest.get(at..at + 2).map(|p| u16::from_be_bytes([p[0], p[1]])).context("too short");
    let source = SocketAddr::new(ip(rest.get(..size).context("too short")?)?, port(2 * size)?);
    let destination = SocketAddr::new(ip(rest.get(size..2 * size).context("too short")?)?, port(2 * size + 2)?);
    Ok(Said { source, destination, length: 16 + length })
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
        for (header, length) in [(v1(source, destination), 47), (v2, 32)] {
            let said = read(&[header.as_slice(), b"payload"].concat()).expect("a header");
            assert_eq!(said, Said { source, destination, length });
        }
    }
}
