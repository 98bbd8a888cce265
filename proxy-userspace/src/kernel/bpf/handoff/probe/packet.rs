//! Packets of our own making, and the flow that each meets.

use proxy_abi::{
    flow::{Endpoint, IPV4, IPV6},
    handoff::{HandoffEnd, HandoffEntry, HandoffFlow, HandoffKey, closing, gate, seen},
};

use crate::kernel::bpf::handoff::monotonic_ns;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH_ACK: u8 = 0x18;
const ACK: u8 = 0x10;
const ECN: u8 = 0xc0;
const TCP: u8 = 6;
const CLIENT_SEQ: u32 = 0xffff_ff00;
const BACKEND_SEQ: u32 = 0x4000_0000;
/// `write_seq` of our sockets.
const OWN_TO_CLIENT: u32 = 0x1111_0000;
const OWN_TO_BACKEND: u32 = 0xffff_fff0;

/// A packet, the entries and the flow that it meets.
#[derive(Debug, Clone)]
pub struct Case {
    pub name: String,
    pub bytes: Vec<u8>,
    pub entries: [(HandoffKey, HandoffEntry); 2],
    pub flow: HandoffFlow,
    pub now_ns: u64,
}

/// A TCP packet from the client, to be.
#[derive(Debug, Clone)]
struct Segment {
    version: u8,
    from_backend: bool,
    flags: u8,
    seq: u32,
    ack: u32,
    options: Vec<u8>,
    payload: usize,
    hops: u8,
    fragment: bool,
    ip_options: bool,
}

/// Every kind of packet that the program tells apart.
pub fn all() -> Vec<Case> {
    [IPV4, IPV6].into_iter().flat_map(of_version).collect()
}

fn of_version(version: u8) -> Vec<Case> {
    let mut cases = Vec::new();
    for from_backend in [false, true] {
        for (name, options) in layouts() {
            for taken in [0x3f, 0x15, 0x3d, 0] {
                let segment = Segment { options: options.clone(), ..plain(version, from_backend) };
                let entries = entries(version, taken);
                cases.push(case(format!("{name}, options {taken:#04x}"), &segment, entries, flow(gate::ALONE)));
            }
        }
        cases.extend(lives(version, from_backend));
    }
    cases.extend(refused(version));
    cases.extend(errors(version));
    cases
}

/// What happens in the life of a flow.
fn lives(version: u8, from_backend: bool) -> Vec<Case> {
    let (own, plain) = (own_seq(from_backend), plain(version, from_backend));
    let entries = entries(version, 0x3f);
    let sack = [vec![1, 1], sack(2)].concat();
    let mut over = flow(gate::ALONE);
    over.closing = closing::FINISHED;
    let mut half_closed = flow(gate::ALONE);
    for end in &mut half_closed.ends {
        end.seen |= seen::FIN;
        end.fin_end = (end.end_seq as u32).wrapping_add(1);
    }
    let acked_fin = half_closed.ends[usize::from(!from_backend)].fin_end;
    half_closed.ends[usize::from(!from_backend)].seen |= seen::ACKED_FIN;
    let mut unknown_clocks = flow(gate::OPEN);
    unknown_clocks.ends.iter_mut().for_each(|end| end.seen &= !seen::CLOCK);
    let list = [
        ("armed", Segment { ..plain.clone() }, flow(gate::CLOSED)),
        ("our bytes acknowledged", Segment { ack: own, payload: 0, ..plain.clone() }, flow(gate::OPEN)),
        ("some of them", Segment { ack: own.wrapping_sub(9), payload: 0, ..plain.clone() }, flow(gate::OPEN)),
        (
            "data with an old acknowledgement",
            Segment { ack: own.wrapping_sub(9), options: sack, ..plain.clone() },
            flow(gate::OPEN),
        ),
        (
            "an acknowledgement beyond",
            Segment { ack: own.wrapping_add(9), payload: 0, ..plain.clone() },
            flow(gate::OPEN),
        ),
        (
            "clocks not known",
            Segment { options: timestamps(), ack: own.wrapping_add(9), ..plain.clone() },
            unknown_clocks,
        ),
        ("FIN", Segment { flags: FIN | ACK, ..plain.clone() }, flow(gate::ALONE)),
        (
            "the last acknowledgement",
            Segment {
                ack: to_this(acked_fin, from_backend),
                seq: plain.seq.wrapping_add(1),
                payload: 0,
                ..plain.clone()
            },
            half_closed,
        ),
        ("RST", Segment { flags: RST, payload: 0, ack: 0, ..plain.clone() }, flow(gate::ALONE)),
        ("RST from elsewhere", Segment { flags: RST, seq: 77, payload: 0, ..plain.clone() }, flow(gate::ALONE)),
        (
            "SYN",
            Segment { flags: SYN, seq: 9, options: vec![2, 4, 5, 180, 1, 3, 3, 7], payload: 0, ..plain.clone() },
            flow(gate::ALONE),
        ),
        ("SYN after the end", Segment { flags: SYN, payload: 0, ..plain.clone() }, over),
        ("SYN with data", Segment { flags: SYN, ..plain.clone() }, flow(gate::ALONE)),
        ("SYN ACK", Segment { flags: SYN | ACK, payload: 0, ..plain.clone() }, flow(gate::ALONE)),
        ("congestion", Segment { flags: PSH_ACK | ECN, ..plain.clone() }, flow(gate::ALONE)),
    ];
    list.into_iter().map(|(name, segment, flow)| case(name.to_owned(), &segment, entries, flow)).collect()
}

fn refused(version: u8) -> Vec<Case> {
    let plain = plain(version, false);
    let entries = entries(version, 0x3f);
    let mut cases =
        vec![case("the last hop".to_owned(), &Segment { hops: 1, ..plain.clone() }, entries, flow(gate::ALONE))];
    if version == IPV4 {
        let fragment = Segment { fragment: true, ..plain.clone() };
        let ip_options = Segment { ip_options: true, ..plain.clone() };
        cases.push(case("a fragment".to_owned(), &fragment, entries, flow(gate::ALONE)));
        cases.push(case("IP options".to_owned(), &ip_options, entries, flow(gate::ALONE)));
    }
    let mut short = case("a header longer than the packet".to_owned(), &plain, entries, flow(gate::ALONE));
    let at = transport(version) + 12;
    if let Some(byte) = short.bytes.get_mut(at) {
        *byte = 0x40;
    }
    cases.push(short);
    let mut other = case("of no flow".to_owned(), &plain, entries, flow(gate::ALONE));
    let at = transport(version) + 3;
    if let Some(byte) = other.bytes.get_mut(at) {
        *byte ^= 1;
    }
    cases.push(other);
    cases
}

/// ICMP errors about packets that went to the backend.
fn errors(version: u8) -> Vec<Case> {
    let entries = entries(version, 0x3f);
    let kinds: &[(u8, u8)] = if version == IPV4 { &[(3, 4), (3, 1), (11, 0)] } else { &[(2, 0), (1, 4), (3, 0)] };
    let mut cases = Vec::new();
    for &(kind, code) in kinds {
        for (name, seq, word) in [
            ("a translated packet", OWN_TO_BACKEND.wrapping_add(5_000), gate::ALONE),
            ("a packet of our socket", OWN_TO_BACKEND.wrapping_sub(5_000), gate::OPEN),
            ("a packet of an armed flow", OWN_TO_BACKEND, gate::CLOSED),
        ] {
            // As it was sent to the backend: by the address and port of the other connection.
            let [(_, from_client), _] = entries;
            let sent = Segment { seq, ..plain(version, false) };
            let quoted = ip(
                &sent,
                from_client.source,
                from_client.destination,
                &tcp(&sent, &from_client.source, &from_client.destination),
            );
            let quoted: Vec<u8> = quoted.into_iter().take(if kind == 3 { 60 } else { 90 }).collect();
            let bytes = icmp(version, kind, code, &quoted, from_client.source);
            cases.push(Case {
                name: format!("IPv{version} ICMP {kind}/{code} about {name}"),
                bytes,
                entries,
                flow: flow(word),
                now_ns: monotonic_ns(),
            });
        }
    }
    cases
}

/// Layouts of options, sensible and not.
fn layouts() -> Vec<(&'static str, Vec<u8>)> {
    let ts = || timestamps().split_off(2);
    vec![
        ("no options", Vec::new()),
        ("the usual timestamps", timestamps()),
        ("timestamps first", [ts(), vec![1, 1]].concat()),
        ("timestamps at an odd offset", [vec![1], ts(), vec![0]].concat()),
        ("timestamps and one block", [timestamps(), vec![1, 1], sack(1)].concat()),
        ("timestamps and three blocks", [timestamps(), vec![1, 1], sack(3)].concat()),
        ("four blocks", [vec![1, 1], sack(4)].concat()),
        ("two blocks at an odd offset", [vec![1], sack(2), vec![1]].concat()),
        ("an unknown option first", [vec![254, 5, 9, 9, 9], ts(), vec![0]].concat()),
        ("timestamps after the end", [vec![0, 1], ts()].concat()),
        ("an option longer than the header", [vec![1, 1], vec![8, 30], vec![0; 8]].concat()),
        ("an option of length one", [vec![254, 1], ts()].concat()),
        ("blocks of a wrong length", [vec![5, 12], vec![7; 10]].concat()),
        ("NOPs only", vec![1; 40]),
    ]
}

fn timestamps() -> Vec<u8> {
    [vec![1, 1, 8, 10], 0xffff_fff0u32.to_be_bytes().to_vec(), 0x0102_0304u32.to_be_bytes().to_vec()].concat()
}

fn sack(blocks: u8) -> Vec<u8> {
    let mut option = vec![5, 2 + 8 * blocks];
    for n in 0..u32::from(blocks) {
        option.extend(OWN_TO_CLIENT.wrapping_add(1_000 * n).to_be_bytes());
        option.extend(OWN_TO_CLIENT.wrapping_add(1_000 * n + 500).to_be_bytes());
    }
    option
}

fn plain(version: u8, from_backend: bool) -> Segment {
    Segment {
        version,
        from_backend,
        flags: PSH_ACK,
        seq: if from_backend { BACKEND_SEQ } else { CLIENT_SEQ },
        ack: own_seq(from_backend).wrapping_add(100),
        options: Vec::new(),
        payload: 33,
        hops: 64,
        fragment: false,
        ip_options: false,
    }
}

const fn own_seq(from_backend: bool) -> u32 {
    if from_backend { OWN_TO_BACKEND } else { OWN_TO_CLIENT }
}

/// A sequence number of the other end as this end acknowledges it.
const fn to_this(seq: u32, from_backend: bool) -> u32 {
    if from_backend { seq.wrapping_add(DSEQ_OF_CLIENT) } else { seq.wrapping_add(DSEQ_OF_BACKEND) }
}

const DSEQ_OF_CLIENT: u32 = OWN_TO_BACKEND.wrapping_sub(CLIENT_SEQ);
const DSEQ_OF_BACKEND: u32 = OWN_TO_CLIENT.wrapping_sub(BACKEND_SEQ);

fn end(version: u8, host: u8, port: u16) -> Endpoint {
    if version == IPV4 {
        return Endpoint::v4([192, 0, 2, host], port.to_be_bytes());
    }
    let mut address = [0; 16];
    address[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
    address[15] = host;
    Endpoint::v6(address, port.to_be_bytes())
}

fn entries(version: u8, options: u8) -> [(HandoffKey, HandoffEntry); 2] {
    let (client, listen) = (end(version, 7, 40_001), end(version, 1, 443));
    let (source, backend) = (end(version, 2, 33_333), end(version, 99, 8443));
    // `options` are those of the client's direction; the ends change places in the other.
    let swapped = (options & 0b10_1010) >> 1 | (options & 0b01_0101) << 1;
    let common = HandoffEntry { clock_tick_ns: u32::MAX, clock_ns: monotonic_ns(), ..HandoffEntry::default() };
    let from_client = HandoffEntry {
        options,
        scale_in: 7,
        scale_out: 9,
        dseq: DSEQ_OF_CLIENT,
        dack: DSEQ_OF_BACKEND,
        clock: 1_000,
        source,
        destination: backend,
        ..common
    };
    let from_backend = HandoffEntry {
        direction: proxy_abi::handoff::FROM_BACKEND,
        options: swapped,
        scale_in: 10,
        scale_out: 2,
        dseq: DSEQ_OF_BACKEND,
        dack: DSEQ_OF_CLIENT,
        clock: u32::MAX,
        source: listen,
        destination: client,
        ..common
    };
    [(HandoffKey::new(client, listen, version), from_client), (HandoffKey::new(backend, source, version), from_backend)]
}

fn flow(word: u32) -> HandoffFlow {
    let mut flow = HandoffFlow { gate: word, id: 7, ..HandoffFlow::EMPTY };
    for (end, (first_seq, own_seq)) in
        flow.ends.iter_mut().zip([(CLIENT_SEQ, OWN_TO_CLIENT), (BACKEND_SEQ, OWN_TO_BACKEND)])
    {
        *end = HandoffEnd {
            end_seq: u64::from(first_seq),
            first_seq,
            fin_end: first_seq,
            own_seq,
            clock_offset: 0x0fff_0000,
            seen: seen::CLOCK,
            ifindex: 1,
            window: 500,
            ..HandoffEnd::EMPTY
        };
    }
    flow
}

fn case(name: String, segment: &Segment, entries: [(HandoffKey, HandoffEntry); 2], flow: HandoffFlow) -> Case {
    let (key, _) = entries[usize::from(segment.from_backend)];
    let bytes = ip(segment, key.source, key.destination, &tcp(segment, &key.source, &key.destination));
    let ethertype = if segment.version == IPV4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    let from = if segment.from_backend { "the backend" } else { "the client" };
    let name = format!("IPv{} from {from}: {name}", segment.version);
    Case { name, bytes: [&[2; 12][..], &ethertype, &bytes].concat(), entries, flow, now_ns: monotonic_ns() }
}

fn tcp(segment: &Segment, source: &Endpoint, destination: &Endpoint) -> Vec<u8> {
    let header_words = 5 + segment.options.len().div_ceil(4);
    let mut bytes = [&source.port_be[..], &destination.port_be].concat();
    bytes.extend(segment.seq.to_be_bytes());
    bytes.extend(segment.ack.to_be_bytes());
    bytes.extend([(header_words as u8) << 4, segment.flags, 0x7f, 0x01, 0, 0, 0, 0]);
    bytes.extend(&segment.options);
    bytes.resize(header_words * 4, 0);
    bytes.extend((0..segment.payload).map(|n| n as u8));
    let checksum = transport_checksum(segment.version, TCP, source, destination, &bytes);
    bytes[16..18].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

fn ip(segment: &Segment, source: Endpoint, destination: Endpoint, payload: &[u8]) -> Vec<u8> {
    let fragment = if segment.fragment { 0x20 } else { 0x40 };
    let ip_options: &[u8] = if segment.ip_options { &[1, 1, 1, 0] } else { &[] };
    header(segment.version, TCP, segment.hops, fragment, ip_options, source, destination, payload)
}

#[expect(clippy::too_many_arguments, reason = "the fields of a header")]
fn header(
    version: u8,
    protocol: u8,
    hops: u8,
    fragment: u8,
    options: &[u8],
    source: Endpoint,
    destination: Endpoint,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes;
    if version == IPV4 {
        let total = (20 + options.len() + payload.len()) as u16;
        bytes = vec![0x45 + (options.len() / 4) as u8, 0x02];
        bytes.extend(total.to_be_bytes());
        bytes.extend([0x12, 0x34, fragment, 0, hops, protocol, 0, 0]);
        bytes.extend(&source.address[..4]);
        bytes.extend(&destination.address[..4]);
        bytes.extend(options);
        let checksum = !fold(sum(&bytes));
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    } else {
        bytes = vec![0x60, 0x20, 0x12, 0x34];
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.extend([protocol, hops]);
        bytes.extend(source.address);
        bytes.extend(destination.address);
    }
    bytes.extend(payload);
    bytes
}

/// An error of a router about a packet that was sent from `to`.
fn icmp(version: u8, kind: u8, code: u8, quoted: &[u8], to: Endpoint) -> Vec<u8> {
    let router = end(version, 200, 0);
    let mut message = vec![kind, code, 0, 0, 0, 0, 0x05, 0x14];
    message.extend(quoted);
    let (protocol, ethertype) = if version == IPV4 { (1, [0x08, 0x00]) } else { (58, [0x86, 0xdd]) };
    let checksum =
        if version == IPV4 { !fold(sum(&message)) } else { transport_checksum(IPV6, protocol, &router, &to, &message) };
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let packet = header(version, protocol, 60, 0, &[], router, to, &message);
    [&[2; 12][..], &ethertype, &packet].concat()
}

fn transport_checksum(version: u8, protocol: u8, source: &Endpoint, destination: &Endpoint, bytes: &[u8]) -> u16 {
    let length = if version == IPV4 { 4 } else { 16 };
    let addresses = sum(&source.address[..length]) + sum(&destination.address[..length]);
    !fold(addresses + u64::from(protocol) + bytes.len() as u64 + sum(bytes))
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum()
}

const fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

const fn transport(version: u8) -> usize {
    if version == IPV4 { 34 } else { 54 }
}
