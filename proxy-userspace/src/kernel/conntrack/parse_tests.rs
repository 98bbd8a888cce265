use std::net::SocketAddr;

use proptest::prelude::*;
use proxy_core::{
    config::Protocol,
    conntrack::{Event, TcpState, Traffic},
};

use super::{super::wire::Messages, event};

const ID_MASK: u32 = 0xffff_f800;

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = ((payload.len() + 4) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | 0x8000, &parts.concat())
}

fn tuple(kind: u16, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let address = |v4, v6, ip| match ip {
        std::net::IpAddr::V4(ip) => attribute(v4, &ip.octets()),
        std::net::IpAddr::V6(ip) => attribute(v6, &ip.octets()),
    };
    let ip = nested(1, &[address(1, 3, source.ip()), address(2, 4, destination.ip())]);
    let proto = nested(
        2,
        &[
            attribute(1, &[6]),
            attribute(2, &source.port().to_be_bytes()),
            attribute(3, &destination.port().to_be_bytes()),
        ],
    );
    nested(kind, &[ip, proto])
}

/// A `Destroy` as Linux 6.18 writes it.
fn destroy(client: &str, listen: &str, backend: &str, mark: u32) -> Vec<u8> {
    let [client, listen, backend] = [client, listen, backend].map(|text| text.parse().expect("address"));
    let counters =
        |packets: u64, bytes: u64| [attribute(1, &packets.to_be_bytes()), attribute(2, &bytes.to_be_bytes())];
    let body = [
        vec![2, 0, 0, 0],
        tuple(1, client, listen),
        tuple(2, backend, client),
        attribute(12, &7u32.to_be_bytes()),
        attribute(3, &0x18eu32.to_be_bytes()),
        nested(9, &counters(5, 420)),
        nested(10, &counters(4, 9000)),
        nested(20, &[attribute(1, &1u64.to_be_bytes()), attribute(2, &3u64.to_be_bytes())]),
        nested(4, &[nested(1, &[attribute(1, &[8])])]),
        attribute(8, &mark.to_be_bytes()),
    ]
    .concat();
    let mut message = ((body.len() + 16) as u32).to_ne_bytes().to_vec();
    message.extend(0x102u16.to_ne_bytes());
    message.extend([0; 10]);
    message.extend(body);
    message
}

fn parse(bytes: &[u8]) -> Vec<Event> {
    Messages(bytes).filter_map(|message| event(&message, ID_MASK)).collect()
}

#[test]
fn a_destroy_has_tuples_counters_state_and_times() {
    for (client, listen, backend) in
        [("10.0.0.1:40000", "10.0.0.2:80", "10.0.1.1:8080"), ("[fd00::1]:40000", "[fd00::2]:80", "[fd01::1]:8080")]
    {
        let events = parse(&destroy(client, listen, backend, 0x0800));
        let [Event::Destroy(entry)] = &events[..] else { panic!("{events:?}") };
        assert_eq!(entry.client().to_string(), client);
        assert_eq!(entry.listen().to_string(), listen);
        assert_eq!(entry.backend().to_string(), backend);
        assert_eq!((entry.id, entry.protocol, entry.mark), (7, Protocol::Tcp, 0x0800));
        assert_eq!(entry.tcp_state, Some(TcpState::Close));
        assert_eq!(entry.traffic_in, Some(Traffic { packets: 5, bytes: 420 }));
        assert_eq!(entry.traffic_out, Some(Traffic { packets: 4, bytes: 9000 }));
        assert_eq!((entry.started_ns, entry.stopped_ns), (Some(1), Some(3)));
    }
}

#[test]
fn foreign_marks_are_not_told() {
    assert!(parse(&destroy("10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3", 0x07ff)).is_empty());
}

#[test]
fn several_messages_in_one_datagram_are_all_read() {
    let one = destroy("10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3", 0x800);
    assert_eq!(parse(&one.repeat(3)).len(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        parse(&bytes);
    }

    #[test]
    fn damaged_messages_never_panic(at in prop::collection::vec((0usize..400, any::<u8>()), 1..8), keep in 0usize..400) {
        let mut bytes = destroy("10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3", 0x800);
        for (index, value) in at {
            if let Some(byte) = bytes.get_mut(index) {
                *byte = value;
            }
        }
        bytes.truncate(keep);
        parse(&bytes);
    }
}

/// Nanoseconds this thread has run.
fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("number")
}

/// Prints what one event costs; run with optimisation to learn something.
#[test]
#[ignore = "a measurement"]
fn cost_of_one_event() {
    let bytes = destroy("10.0.0.1:40000", "10.0.0.2:80", "10.0.1.1:8080", 0x0800);
    let foreign = destroy("10.0.0.1:40000", "10.0.0.2:80", "10.0.1.1:8080", 0x0100);
    for (name, bytes) in [("ours", &bytes), ("foreign", &foreign)] {
        let rounds = 1_000_000;
        let started = cpu();
        for _ in 0..rounds {
            std::hint::black_box(Messages(std::hint::black_box(bytes)).filter_map(|m| event(&m, ID_MASK)).count());
        }
        println!("{name}: {:.0} ns per event", (cpu() - started) / f64::from(rounds));
    }
}
