//! What holds for every header and for all bytes.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::{option, prelude::*};

use super::*;

fn end() -> impl Strategy<Value = SocketAddr> {
    let v4 = any::<[u8; 4]>().prop_map(|octets| Ipv4Addr::from(octets).into());
    let v6 = any::<[u16; 8]>().prop_map(|segments| Ipv6Addr::from(segments).into());
    let sparse = any::<u16>().prop_map(|low| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, low).into());
    let mapped = any::<[u8; 4]>().prop_map(|octets| Ipv4Addr::from(octets).to_ipv6_mapped().into());
    (prop_oneof![v4, v6, sparse, mapped], any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip, port))
}

fn blob(longest: usize) -> impl Strategy<Value = Option<Vec<u8>>> {
    option::of(prop::collection::vec(any::<u8>(), 0..longest))
}

fn canonical(end: SocketAddr) -> SocketAddr {
    SocketAddr::new(end.ip().to_canonical(), end.port())
}

/// Headers, such with a byte changed, and something behind them.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let v1 = (end(), end()).prop_map(|(source, destination)| write_v1(source, destination));
    let v2 = (end(), end(), blob(200), blob(40), any::<bool>()).prop_map(|(source, destination, ssl, alpn, crc32c)| {
        let [ssl, alpn] = [ssl.as_deref(), alpn.as_deref()];
        write_v2(&Outgoing { ssl, alpn, ..Outgoing::new(source, destination) }, crc32c)
    });
    let good = prop_oneof![prop::sample::select(REAL.map(<[u8]>::to_vec).to_vec()), v1, v2];
    let change = prop_oneof![Just(0u8), any::<u8>()];
    let rest = prop::collection::vec(any::<u8>(), 0..20);
    (good, any::<prop::sample::Index>(), change, rest).prop_map(|(mut bytes, at, change, rest)| {
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        [bytes, rest].concat()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(source in end(), destination in end(), alpn in blob(300), id in blob(129), ssl in blob(300), crc32c in any::<bool>()) {
        let ends = Some(Ends { source: canonical(source), destination: canonical(destination) });
        let line = write_v1(source, destination);
        prop_assert!(line.len() <= 104);
        prop_assert_eq!(complete(&line).ends, ends);
        let header = complete(&write_v2(
            &Outgoing {
                alpn: alpn.as_deref(),
                authority: Some("a.example"),
                unique_id: id.as_deref(),
                ssl: ssl.as_deref(),
                ..Outgoing::new(source, destination)
            },
            crc32c,
        ));
        prop_assert_eq!(header.ends, ends);
        prop_assert_eq!(header.tlvs.get(kind::ALPN), alpn.as_deref());
        prop_assert_eq!(header.tlvs.get(kind::UNIQUE_ID), id.as_deref());
        prop_assert_eq!(header.tlvs.get(kind::SSL), ssl.as_deref());
        prop_assert_eq!(header.tlvs.get(kind::CRC32C).is_some(), crc32c);
    }

    #[test]
    fn the_first_verdict_stands_and_before_it_more_is_needed(bytes in bytes()) {
        let whole = parse(&bytes);
        let verdicts: Vec<_> = (0..=bytes.len()).map(|end| parse(&bytes[..end])).collect();
        let first = verdicts.iter().position(|verdict| *verdict != Ok(None)).unwrap_or(verdicts.len());
        prop_assert!(verdicts[first..].iter().all(|verdict| *verdict == whole));
        if let Ok(Some((_, length))) = whole {
            prop_assert_eq!(first, length);
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), beginning in 0..=16usize, line in any::<bool>()) {
        let beginning = if line { b"PROXY TCP4 1.2.3".get(..beginning) } else { V2_TLS.get(..beginning) };
        let _ = parse(&[beginning.unwrap_or_default(), &bytes].concat());
    }
}
