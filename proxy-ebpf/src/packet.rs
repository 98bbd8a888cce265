//! Ethernet, IPv4, IPv6, TCP and UDP headers: RFC 894, 791, 8200, 9293, 768.
//!
//! Every read goes through `bpf_skb_load_bytes`, which checks its bounds in the kernel and also reads what is not in the
//! linear part of the packet.

use aya_ebpf::programs::TcContext;
use proxy_abi::{
    flow::{Endpoint, IPV4, IPV6, TCP, UDP},
    outcome,
};

const ETHERNET_HEADER: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const IPV6_HEADER: usize = 40;
const IPV6_FRAGMENT: u8 = 44;
/// Without options.
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
/// `MF` and the fragment offset, without `DF`.
const IPV4_FRAGMENT_BITS: u16 = 0x3fff;

/// Why a packet is not counted in a flow.
#[derive(Clone, Copy)]
pub enum Refused {
    NotIp,
    OtherProtocol,
    Fragment,
    Truncated,
    Malformed,
    TableFull,
}

impl Refused {
    pub const fn outcome(self) -> u32 {
        match self {
            Self::NotIp => outcome::NOT_IP,
            Self::OtherProtocol => outcome::OTHER_PROTOCOL,
            Self::Fragment => outcome::FRAGMENT,
            Self::Truncated => outcome::TRUNCATED,
            Self::Malformed => outcome::MALFORMED,
            Self::TableFull => outcome::TABLE_FULL,
        }
    }
}

/// A TCP or UDP packet.
pub struct Packet {
    pub source: Endpoint,
    pub destination: Endpoint,
    pub protocol: u8,
    pub ip_version: u8,
    pub payload_bytes: usize,
}

/// What the network layer says.
struct Network {
    source: [u8; 16],
    destination: [u8; 16],
    version: u8,
    protocol: u8,
    /// Where the transport header begins.
    transport: usize,
    /// Bytes after the network header, as it states them.
    length: usize,
}

/// Reads the headers of a packet that begins with its Ethernet header.
#[inline(always)]
pub fn parse(ctx: &TcContext) -> Result<Packet, Refused> {
    let network = match u16::from_be_bytes(load(ctx, 12)?) {
        ETHERTYPE_IPV4 => ipv4(ctx)?,
        ETHERTYPE_IPV6 => ipv6(ctx)?,
        _ => return Err(Refused::NotIp),
    };
    if network.transport + network.length > ctx.len() as usize {
        return Err(Refused::Truncated);
    }
    let payload_bytes = match network.protocol {
        TCP => tcp_payload(ctx, &network)?,
        UDP => udp_payload(ctx, &network)?,
        _ => return Err(Refused::OtherProtocol),
    };
    Ok(Packet {
        source: Endpoint::v6(network.source, load(ctx, network.transport)?),
        destination: Endpoint::v6(network.destination, load(ctx, network.transport + 2)?),
        protocol: network.protocol,
        ip_version: network.version,
        payload_bytes,
    })
}

#[inline(always)]
fn ipv4(ctx: &TcContext) -> Result<Network, Refused> {
    let header: [u8; 20] = load(ctx, ETHERNET_HEADER)?;
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_bytes < header.len() {
        return Err(Refused::Malformed);
    }
    if u16::from_be_bytes([header[6], header[7]]) & IPV4_FRAGMENT_BITS != 0 {
        return Err(Refused::Fragment);
    }
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    Ok(Network {
        source: Endpoint::v4([header[12], header[13], header[14], header[15]], [0; 2]).address,
        destination: Endpoint::v4([header[16], header[17], header[18], header[19]], [0; 2]).address,
        version: IPV4,
        protocol: header[9],
        transport: ETHERNET_HEADER + header_bytes,
        length: total.checked_sub(header_bytes).ok_or(Refused::Malformed)?,
    })
}

/// Extension headers are not walked: behind one the packet is [`Refused::OtherProtocol`].
#[inline(always)]
fn ipv6(ctx: &TcContext) -> Result<Network, Refused> {
    let header: [u8; 8] = load(ctx, ETHERNET_HEADER)?;
    if header[0] >> 4 != 6 {
        return Err(Refused::Malformed);
    }
    if header[6] == IPV6_FRAGMENT {
        return Err(Refused::Fragment);
    }
    Ok(Network {
        source: load(ctx, ETHERNET_HEADER + 8)?,
        destination: load(ctx, ETHERNET_HEADER + 24)?,
        version: IPV6,
        protocol: header[6],
        transport: ETHERNET_HEADER + IPV6_HEADER,
        length: usize::from(u16::from_be_bytes([header[4], header[5]])),
    })
}

#[inline(always)]
fn tcp_payload(ctx: &TcContext, network: &Network) -> Result<usize, Refused> {
    let [data_offset] = load(ctx, network.transport + 12)?;
    let header_bytes = usize::from(data_offset >> 4) * 4;
    if header_bytes < TCP_HEADER {
        return Err(Refused::Malformed);
    }
    network.length.checked_sub(header_bytes).ok_or(Refused::Malformed)
}

#[inline(always)]
fn udp_payload(ctx: &TcContext, network: &Network) -> Result<usize, Refused> {
    let datagram = usize::from(u16::from_be_bytes(load(ctx, network.transport + 4)?));
    if datagram > network.length {
        return Err(Refused::Malformed);
    }
    datagram.checked_sub(UDP_HEADER).ok_or(Refused::Malformed)
}

/// `N` bytes of the packet; past its end it is [`Refused::Truncated`].
#[inline(always)]
fn load<const N: usize>(ctx: &TcContext, offset: usize) -> Result<[u8; N], Refused> {
    ctx.load(offset).map_err(|_| Refused::Truncated)
}
