//! Packets as their parts, put together the plain way.

use proxy_abi::{
    flow::{Endpoint, IPV4, IPV6},
    handoff::{HandoffEnd, HandoffFlow, HandoffKey, seen},
};

#[derive(Debug, Clone)]
pub enum Opt {
    Nops(usize),
    Timestamps(u32, u32),
    Sack(Vec<(u32, u32)>),
    Unknown(u8, Vec<u8>),
}

impl Opt {
    pub fn length(&self) -> usize {
        self.bytes().len()
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Nops(count) => vec![1; *count],
            Self::Timestamps(value, echo) => {
                [vec![8, 10], value.to_be_bytes().into(), echo.to_be_bytes().into()].concat()
            }
            Self::Sack(blocks) => {
                let edges = blocks.iter().flat_map(|(left, right)| [left.to_be_bytes(), right.to_be_bytes()].concat());
                [vec![5, 2 + 8 * blocks.len() as u8], edges.collect()].concat()
            }
            Self::Unknown(kind, content) => [vec![*kind, 2 + content.len() as u8], content.clone()].concat(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Packet {
    pub v6: bool,
    pub source: Endpoint,
    pub destination: Endpoint,
    pub ecn: u8,
    pub hops: u8,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub urgent: u16,
    pub options: Vec<Opt>,
    pub payload: Vec<u8>,
}

pub fn plain(v6: bool) -> Packet {
    let key = key_of(v6, false);
    Packet {
        v6,
        source: key.source,
        destination: key.destination,
        ecn: 0,
        hops: 64,
        seq: 0xffff_f000,
        ack: 1,
        flags: 0x10,
        window: 9,
        urgent: 0,
        options: Vec::new(),
        payload: vec![1, 2, 3],
    }
}

pub fn key_of(v6: bool, from_backend: bool) -> HandoffKey {
    let end = |host: u8, port: u16| {
        let mut address = [0; 16];
        if v6 {
            address = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host];
        } else {
            address[..4].copy_from_slice(&[192, 0, 2, host]);
        }
        Endpoint::v6(address, port.to_be_bytes())
    };
    let version = if v6 { IPV6 } else { IPV4 };
    if from_backend {
        HandoffKey::new(end(4, 8443), end(3, 33_333), version)
    } else {
        HandoffKey::new(end(1, 40_000), end(2, 443), version)
    }
}

pub fn flow(gate: u32) -> HandoffFlow {
    let end = HandoffEnd { seen: seen::CLOCK, first_seq: 0xffff_f000, end_seq: 0xffff_f000, ..HandoffEnd::EMPTY };
    HandoffFlow { gate, id: 1, ends: [end; 2], ..HandoffFlow::EMPTY }
}

impl Packet {
    /// The packet. `partial`: its checksum is that of the pseudo-header alone.
    pub fn bytes(&self, partial: bool) -> Vec<u8> {
        let tcp = self.tcp(partial);
        let (addresses, _) = self.addresses();
        let mut ip = if self.v6 {
            let mut ip = vec![0x60, self.ecn << 4, 0, 0];
            ip.extend((tcp.len() as u16).to_be_bytes());
            ip.extend([6, self.hops]);
            ip
        } else {
            let mut ip = vec![0x45, self.ecn];
            ip.extend((20 + tcp.len() as u16).to_be_bytes());
            ip.extend([0x12, 0x34, 0x40, 0, self.hops, 6, 0, 0]);
            ip
        };
        ip.extend(addresses);
        if !self.v6 {
            let checksum = !sum(&ip);
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        let ethertype = if self.v6 { [0x86, 0xdd] } else { [8, 0] };
        [&[2; 12][..], &ethertype, &ip, &tcp].concat()
    }

    fn tcp(&self, partial: bool) -> Vec<u8> {
        let mut options: Vec<u8> = self.options.iter().flat_map(Opt::bytes).collect();
        options.resize(options.len().next_multiple_of(4), 0);
        let mut tcp = [self.source.port_be, self.destination.port_be].concat();
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([((20 + options.len()) << 2) as u8, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 2]);
        tcp.extend(self.urgent.to_be_bytes());
        tcp.extend(options);
        tcp.extend(&self.payload);
        let pseudo = [self.addresses().0, vec![0, 6], (tcp.len() as u16).to_be_bytes().into()].concat();
        let checksum = if partial { sum(&pseudo) } else { !sum(&[pseudo, tcp.clone()].concat()) };
        tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
        tcp
    }

    fn addresses(&self) -> (Vec<u8>, usize) {
        let length = if self.v6 { 16 } else { 4 };
        ([&self.source.address[..length], &self.destination.address[..length]].concat(), length)
    }
}

/// RFC 1071: the sum of 16-bit words, with carries added in.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
