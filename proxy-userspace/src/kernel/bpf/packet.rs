//! Packets of our own making, and what the program must make of each.

use proxy_abi::{
    flow::{Endpoint, FlowKey, HIGH_TO_LOW, IPV4, IPV6, LOW_TO_HIGH, TCP, UDP},
    outcome,
};

/// Documentation addresses (RFC 5737, RFC 3849). The client's is the lower one.
const CLIENT_V4: [u8; 4] = [192, 0, 2, 7];
const SERVER_V4: [u8; 4] = [198, 51, 100, 9];
const CLIENT_V6: [u8; 16] = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
const SERVER_V6: [u8; 16] = [0x20, 0x01, 0x0d, 0xb8, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
const CLIENT_PORT: u16 = 40_001;
const SERVER_PORT: u16 = 443;

const ICMP: u8 = 1;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
/// `MF`, with offset 0: the first of several fragments.
const MORE_FRAGMENTS: u16 = 0x2000;

pub struct SyntheticPacket {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub expected: Expected,
}

#[derive(Clone, Copy)]
pub enum Expected {
    Counted { key: FlowKey, direction: u32, payload_bytes: u64 },
    Refused { outcome: u32 },
}

impl Expected {
    pub const fn outcome(&self) -> u32 {
        match self {
            Self::Counted { .. } => outcome::COUNTED,
            Self::Refused { outcome } => *outcome,
        }
    }
}

/// Every kind of packet that the program tells apart.
pub fn all() -> Vec<SyntheticPacket> {
    let counted = |key, direction, payload_bytes| Expected::Counted { key, direction, payload_bytes };
    let refused = |outcome| Expected::Refused { outcome };
    let packet = |name, bytes, expected| SyntheticPacket { name, bytes, expected };
    let mut padded = ipv4(LOW_TO_HIGH, TCP, 0, &tcp(LOW_TO_HIGH, 20, 0));
    padded.resize(60, 0);
    let whole = ipv4(LOW_TO_HIGH, TCP, 0, &tcp(LOW_TO_HIGH, 20, 64));
    let in_header = whole.iter().copied().take(14 + 20 + 10).collect();
    let in_payload = whole.iter().copied().take(whole.len() - 1).collect();
    vec![
        packet("IPv4 TCP", ipv4(LOW_TO_HIGH, TCP, 0, &tcp(LOW_TO_HIGH, 20, 100)), counted(v4(TCP), LOW_TO_HIGH, 100)),
        packet(
            "IPv4 TCP again",
            ipv4(LOW_TO_HIGH, TCP, 0, &tcp(LOW_TO_HIGH, 20, 11)),
            counted(v4(TCP), LOW_TO_HIGH, 11),
        ),
        packet(
            "IPv4 TCP reply with options",
            ipv4(HIGH_TO_LOW, TCP, 0, &tcp(HIGH_TO_LOW, 32, 1_400)),
            counted(v4(TCP), HIGH_TO_LOW, 1_400),
        ),
        packet("IPv4 TCP without payload, padded by Ethernet", padded, counted(v4(TCP), LOW_TO_HIGH, 0)),
        packet("IPv4 UDP", ipv4(LOW_TO_HIGH, UDP, 0, &udp(LOW_TO_HIGH, 48)), counted(v4(UDP), LOW_TO_HIGH, 48)),
        packet("IPv4 UDP reply", ipv4(HIGH_TO_LOW, UDP, 0, &udp(HIGH_TO_LOW, 512)), counted(v4(UDP), HIGH_TO_LOW, 512)),
        packet("IPv6 TCP", ipv6(LOW_TO_HIGH, TCP, &tcp(LOW_TO_HIGH, 20, 77)), counted(v6(TCP), LOW_TO_HIGH, 77)),
        packet("IPv6 UDP reply", ipv6(HIGH_TO_LOW, UDP, &udp(HIGH_TO_LOW, 33)), counted(v6(UDP), HIGH_TO_LOW, 33)),
        packet("ARP", ethernet(ETHERTYPE_ARP, &[0; 28]), refused(outcome::NOT_IP)),
        packet("IPv4 ICMP", ipv4(LOW_TO_HIGH, ICMP, 0, &[8; 16]), refused(outcome::OTHER_PROTOCOL)),
        packet(
            "first IPv4 fragment",
            ipv4(LOW_TO_HIGH, UDP, MORE_FRAGMENTS, &udp(LOW_TO_HIGH, 24)),
            refused(outcome::FRAGMENT),
        ),
        packet("IPv4 TCP cut in its TCP header", in_header, refused(outcome::TRUNCATED)),
        packet("IPv4 TCP cut in its payload", in_payload, refused(outcome::TRUNCATED)),
        packet(
            "IPv4 TCP with a header longer than the packet",
            ipv4(LOW_TO_HIGH, TCP, 0, &tcp(LOW_TO_HIGH, 60, 0)[..20]),
            refused(outcome::MALFORMED),
        ),
    ]
}

fn v4(protocol: u8) -> FlowKey {
    let [low, high] = [(CLIENT_V4, CLIENT_PORT), (SERVER_V4, SERVER_PORT)]
        .map(|(address, port)| Endpoint::v4(address, port.to_be_bytes()));
    FlowKey { low, high, protocol, ip_version: IPV4, reserved: [0; 2] }
}

fn v6(protocol: u8) -> FlowKey {
    let [low, high] = [(CLIENT_V6, CLIENT_PORT), (SERVER_V6, SERVER_PORT)]
        .map(|(address, port)| Endpoint::v6(address, port.to_be_bytes()));
    FlowKey { low, high, protocol, ip_version: IPV6, reserved: [0; 2] }
}

/// Source and destination in the order of the direction.
fn ordered<T>(direction: u32, client: T, server: T) -> (T, T) {
    if direction == LOW_TO_HIGH { (client, server) } else { (server, client) }
}

fn ethernet(ethertype: [u8; 2], content: &[u8]) -> Vec<u8> {
    // Locally administered addresses: no device has them.
    let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    bytes.extend(ethertype);
    bytes.extend(content);
    bytes
}

/// Checksums stay zero: nobody on this way looks at them.
fn ipv4(direction: u32, protocol: u8, fragment: u16, content: &[u8]) -> Vec<u8> {
    let (source, destination) = ordered(direction, CLIENT_V4, SERVER_V4);
    let mut bytes = vec![0x45, 0];
    bytes.extend(length(20 + content.len()));
    bytes.extend([0, 1]);
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([64, protocol, 0, 0]);
    bytes.extend(source);
    bytes.extend(destination);
    bytes.extend(content);
    ethernet(ETHERTYPE_IPV4, &bytes)
}

fn ipv6(direction: u32, protocol: u8, content: &[u8]) -> Vec<u8> {
    let (source, destination) = ordered(direction, CLIENT_V6, SERVER_V6);
    let mut bytes = vec![0x60, 0, 0, 0];
    bytes.extend(length(content.len()));
    bytes.extend([protocol, 64]);
    bytes.extend(source);
    bytes.extend(destination);
    bytes.extend(content);
    ethernet(ETHERTYPE_IPV6, &bytes)
}

/// A segment with a header of `header` bytes, a multiple of 4, 20–60.
fn tcp(direction: u32, header: u8, payload: usize) -> Vec<u8> {
    let mut bytes = ports(direction);
    bytes.extend([0; 8]);
    bytes.extend([(header / 4) << 4, 0x10]);
    bytes.resize(usize::from(header) + payload, 0);
    bytes
}

fn udp(direction: u32, payload: usize) -> Vec<u8> {
    let mut bytes = ports(direction);
    bytes.extend(length(8 + payload));
    bytes.resize(8 + payload, 0);
    bytes
}

fn ports(direction: u32) -> Vec<u8> {
    let (source, destination) = ordered(direction, CLIENT_PORT, SERVER_PORT);
    [source.to_be_bytes(), destination.to_be_bytes()].concat()
}

/// A length field; the packets here are far below its range.
fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}
