//! Promises of the PROXY protocol.

mod properties;

use super::*;

macro_rules! testdata {
    ($name:literal) => {
        include_bytes!(concat!("../../../testdata/proxy/haproxy_", $name, ".bin"))
    };
}

/// What HAProxy 2.6 sent.
const V1_TCP4: &[u8] = testdata!("v1_tcp4");
const V1_TCP6: &[u8] = testdata!("v1_tcp6");
const V2_TCP6: &[u8] = testdata!("v2_tcp6");
/// A health check.
const V2_LOCAL: &[u8] = testdata!("v2_local");
const V2_UNIQUE_ID_CRC32C: &[u8] = testdata!("v2_unique_id_crc32c");
/// `proxy-v2-options ssl,cert-cn,ssl-cipher,cert-key,cert-sig,authority,unique-id,crc32c`, and ALPN.
const V2_TLS: &[u8] = testdata!("v2_tls");
const REAL: [&[u8]; 6] = [V1_TCP4, V1_TCP6, V2_TCP6, V2_LOCAL, V2_UNIQUE_ID_CRC32C, V2_TLS];

fn complete(bytes: &[u8]) -> Header {
    let (header, length) = parse(bytes).expect("a header").expect("a complete one");
    assert_eq!(length, bytes.len());
    header
}

fn ends(bytes: &[u8]) -> Option<(String, String)> {
    complete(bytes).ends.map(|ends| (ends.source.to_string(), ends.destination.to_string()))
}

fn pair(source: &str, destination: &str) -> Option<(String, String)> {
    Some((source.to_owned(), destination.to_owned()))
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn outgoing<'a>(source: &str, destination: &str) -> Outgoing<'a> {
    Outgoing::new(address(source), address(destination))
}

/// A header of version 2 with this 13th and 14th byte.
fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    [&v2::SIGNATURE[..], &[command, family], &(rest.len() as u16).to_be_bytes(), rest].concat()
}

/// One over IPv4, with these bytes behind the addresses.
fn with_tlvs(tlvs: &[u8]) -> Vec<u8> {
    v2(v2::PROXY, v2::TCP4, &[&[10, 0, 0, 1, 10, 0, 0, 2, 0, 1, 0, 2], tlvs].concat())
}

#[test]
fn headers_of_haproxy_are_read() {
    assert_eq!(ends(V1_TCP4), pair("127.0.0.1:52336", "127.0.0.1:18501"));
    assert_eq!(ends(V1_TCP6), pair("[::1]:56244", "[::1]:18505"));
    assert_eq!(ends(V2_TCP6), pair("[::1]:35794", "[::1]:18504"));
    assert_eq!(ends(V2_LOCAL), None);
    assert_eq!(ends(V2_UNIQUE_ID_CRC32C), pair("127.0.0.1:54850", "127.0.0.1:18502"));
    let tlvs = complete(V2_TLS).tlvs;
    assert_eq!(tlvs.get(kind::ALPN), Some(&b"h2"[..]));
    assert_eq!(tlvs.get(kind::AUTHORITY), Some(&b"shop.example.com"[..]));
    assert_eq!(tlvs.get(kind::UNIQUE_ID).map(<[u8]>::len), Some(36));
    let ssl = tlvs.get(kind::SSL).expect("TLS");
    assert!(ssl.starts_with(&[1, 0, 0, 0, 0, 0x21, 0, 7]) && ssl.ends_with(b"TLS_AES_256_GCM_SHA384"));
}

#[test]
fn a_header_that_haproxy_sent_is_written_byte_for_byte() {
    let header = complete(V1_TCP6).ends.expect("ends");
    assert_eq!(write_v1(header.source, header.destination), V1_TCP6);
    assert_eq!(write_v2(&outgoing("[::1]:35794", "[::1]:18504"), false), V2_TCP6);
}

#[test]
fn a_checksum_that_is_wrong_is_refused_and_a_missing_one_is_not() {
    for at in [16, 20, 40, V2_TLS.len() - 1] {
        let mut bytes = V2_TLS.to_vec();
        bytes[at] ^= 1;
        let refused = parse(&bytes);
        assert!(matches!(refused, Err(BadHeader::Checksum)), "{at}: {refused:?}");
    }
    assert!(complete(&with_tlvs(&[])).ends.is_some());
    assert_eq!(parse(&with_tlvs(&[3, 0, 3, 0, 0, 0])), Err(BadHeader::Tlv));
    assert_eq!(parse(&with_tlvs(&[3, 0, 4, 0, 0, 0, 0])), Err(BadHeader::Checksum));
}

#[test]
fn only_the_header_is_taken() {
    let bytes = [V1_TCP4, b"\r\nPROXY"].concat();
    assert_eq!(parse(&bytes).map(|header| header.map(|(_, length)| length)), Ok(Some(V1_TCP4.len())));
    let bytes = [V2_TLS, V2_TLS].concat();
    assert_eq!(parse(&bytes).map(|header| header.map(|(_, length)| length)), Ok(Some(V2_TLS.len())));
}

#[test]
fn a_connection_without_a_header_is_told_by_its_first_bytes() {
    for bytes in [&b"G"[..], b"\x16\x03", b"PR ", b"PROXY\r", b"\r\n\r\n\0\r\nQUIT\r", b"proxy", b"\n"] {
        assert_eq!(parse(bytes), Err(BadHeader::Absent), "{bytes:?}");
    }
    assert_eq!(parse(b"PROXY tcp"), Err(BadHeader::Line));
    assert_eq!(parse(b"PROXY  "), Err(BadHeader::Line));
    assert_eq!(parse(b"PROXY TCP5"), Err(BadHeader::Line));
    assert_eq!(parse(b"\r\n\r\n\0\r\nQUIT\n\x11"), Err(BadHeader::Command));
    assert_eq!(parse(b"\r\n\r\n\0\r\nQUIT\n\x22"), Err(BadHeader::Command));
    assert_eq!(parse(b"\r\n\r\n\0\r\nQUIT\n\x21\x41"), Err(BadHeader::Family));
    assert_eq!(parse(b"\r\n\r\n\0\r\nQUIT\n\x21\x13"), Err(BadHeader::Family));
}

#[test]
fn a_line_is_what_the_specification_says_to_the_letter() {
    assert_eq!(
        ends(b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"),
        pair("192.168.0.1:56324", "192.168.0.11:443")
    );
    assert_eq!(ends(b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n"), pair("0.0.0.0:0", "255.255.255.255:65535"));
    assert_eq!(ends(b"PROXY TCP6 FD00::1 fd00::2 1 2\r\n"), pair("[fd00::1]:1", "[fd00::2]:2"));
    for line in [
        "TCP4 1.2.3.4  1.2.3.5 1 2\r\n",
        "TCP4 1.2.3.4 1.2.3.5 1 2 \r\n",
        "TCP4 1.2.3.4 1.2.3.5 1 2 3\r\n",
        "TCP4 1.2.3.4 1.2.3.5 1\r\n",
        "TCP4 1.2.3.4 1.2.3.5 1 2\n",
        "TCP4 1.2.3.4 1.2.3.5 1 2\r ",
        "TCP4 1.2.3.4\t1.2.3.5 1 2\r\n",
        "TCP4 01.2.3.4 1.2.3.5 1 2\r\n",
        "TCP4 1.2.3.4 1.2.3.5 01 2\r\n",
        "TCP4 1.2.3.4 1.2.3.5 +1 2\r\n",
        "TCP4 1.2.3.4 1.2.3.5 00 2\r\n",
        "TCP4 1.2.3.4 1.2.3.5  2\r\n",
        "TCP4 1.2.3.4 1.2.3.5 65536 2\r\n",
        "TCP4 1.2.3.4 1.2.3.256 1 2\r\n",
        "TCP4 1.2.3 1.2.3.5 1 2\r\n",
        "TCP4 ::1 ::1 1 2\r\n",
        "TCP6 1.2.3.4 1.2.3.5 1 2\r\n",
        "TCP6 fe80::1%lo ::1 1 2\r\n",
        "TCP6 1::2::3 ::1 1 2\r\n",
        "TCP4 1.2.3.4 \u{ff11}.2.3.5 1 2\r\n",
        "UNKNOWN\n",
        "UNKNOWNS\r\n",
        "UNKNOWN a\rb\r\n",
    ] {
        assert_eq!(parse(format!("PROXY {line}").as_bytes()), Err(BadHeader::Line), "{line:?}");
    }
}

#[test]
fn unknown_means_the_ends_of_the_connection_itself() {
    assert_eq!(ends(b"PROXY UNKNOWN\r\n"), None);
    assert_eq!(ends(b"PROXY UNKNOWN \xff whatever 70000\r\n"), None);
}

#[test]
fn a_line_ends_within_107_bytes() {
    let line = |length: usize| format!("PROXY UNKNOWN {}\r\n", "x".repeat(length - 16)).into_bytes();
    assert_eq!(ends(&line(107)), None);
    assert!(parse(&line(108)).is_err());
    assert_eq!(parse(&line(300)[..106]), Ok(None));
    assert_eq!(parse(&line(300)[..107]), Err(BadHeader::LineTooLong));
}

#[test]
fn local_is_accepted_whatever_else_it_says() {
    for (family, rest) in [(0, &[][..]), (0xff, b"anything"), (0x11, &[1]), (0x21, &[3, 0, 4, 0, 0, 0, 0])] {
        let header = complete(&v2(0x20, family, rest));
        assert_eq!((header.ends, header.tlvs.is_empty()), (None, true));
    }
}

#[test]
fn families_that_cannot_be_clients_mean_the_ends_of_the_connection_itself() {
    assert_eq!(ends(&v2(0x21, 0x00, b"anything")), None);
    assert_eq!(ends(&v2(0x21, 0x12, &[1; 12])), None);
    assert_eq!(ends(&v2(0x21, 0x22, &[1; 36])), None);
    let unix = complete(&v2(0x21, 0x31, &[&[b'/'; 216][..], &[kind::NETNS, 0, 1, b'x']].concat()));
    assert_eq!((unix.ends, unix.tlvs.get(kind::NETNS)), (None, Some(&b"x"[..])));
}

#[test]
fn addresses_that_are_cut_short_are_refused_without_waiting() {
    for (family, length) in [(0x11, 11), (0x12, 11), (0x21, 35), (0x22, 35), (0x31, 215), (0x32, 215)] {
        assert_eq!(parse(&v2(0x21, family, &vec![0; length])[..16]), Err(BadHeader::Addresses), "{family:#x}");
    }
}

#[test]
fn a_header_beyond_the_limit_is_refused_without_waiting() {
    let limit = |length: usize| v2(0x21, 0, &vec![0; length - 16]);
    assert_eq!(ends(&limit(MAX_HEADER)), None);
    assert_eq!(parse(&limit(MAX_HEADER + 1)[..16]), Err(BadHeader::TooLong));
}

#[test]
fn tlvs_whose_lengths_do_not_add_up_are_refused() {
    for tlvs in [&[4][..], &[4, 0], &[4, 0, 1], &[4, 0, 0, 4], &[0xe0, 1, 0, 0]] {
        assert_eq!(parse(&with_tlvs(tlvs)), Err(BadHeader::Tlv), "{tlvs:?}");
    }
    let id = |length: u8| with_tlvs(&[&[kind::UNIQUE_ID, 0, length][..], &vec![0; length.into()]].concat());
    assert!(complete(&id(128)).tlvs.get(kind::UNIQUE_ID).is_some());
    assert_eq!(parse(&id(129)), Err(BadHeader::Tlv));
}

#[test]
fn an_ipv4_client_written_as_ipv6_is_an_ipv4_client() {
    let client = pair("10.0.0.1:7", "[fd00::2]:443");
    assert_eq!(ends(b"PROXY TCP6 ::ffff:10.0.0.1 fd00::2 7 443\r\n"), client);
    assert_eq!(ends(&write_v1(address("10.0.0.1:7"), address("[fd00::2]:443"))), client);
    assert_eq!(ends(&write_v2(&outgoing("10.0.0.1:7", "[fd00::2]:443"), true)), client);
    assert_eq!(
        write_v1(address("10.0.0.1:7"), address("[fd00::2]:443")),
        b"PROXY TCP6 ::ffff:a00:1 fd00::2 7 443\r\n",
        "§2.1 has no dots in IPv6 addresses"
    );
    // Both ends as a dual-stack socket gives them.
    assert_eq!(
        write_v1(address("[::ffff:10.0.0.1]:7"), address("[::ffff:10.0.0.2]:443")),
        b"PROXY TCP4 10.0.0.1 10.0.0.2 7 443\r\n"
    );
}

#[test]
fn tlvs_that_came_in_are_passed_on_but_for_what_is_said_anew() {
    let came = with_tlvs(&[
        kind::ALPN,
        0,
        2,
        b'h',
        b'3',
        kind::NOOP,
        0,
        1,
        0,
        0xea,
        0,
        1,
        9,
        kind::SSL,
        0,
        5,
        1,
        0,
        0,
        0,
        0,
        0xea,
        0,
        1,
        8,
    ]);
    let received = complete(&came).tlvs;
    let outgoing = Outgoing {
        alpn: Some(b"h2"),
        authority: Some("shop.example.com"),
        unique_id: Some(b"42"),
        received: Some(&received),
        ..outgoing("10.0.0.1:1", "10.0.0.2:2")
    };
    let written = complete(&write_v2(&outgoing, true)).tlvs;
    let expected: [(u8, &[u8]); 7] = [
        (kind::ALPN, b"h2"),
        (kind::AUTHORITY, b"shop.example.com"),
        (kind::UNIQUE_ID, b"42"),
        (0xea, &[9]),
        (kind::SSL, &[1, 0, 0, 0, 0]),
        (0xea, &[8]),
        (kind::CRC32C, written.get(kind::CRC32C).expect("a checksum")),
    ];
    assert!(written.iter().eq(expected), "{written:?}");
}

#[test]
fn tlvs_without_room_are_left_out_and_the_rest_is_sent() {
    let long = "a".repeat(MAX_HEADER);
    let id = [0; 129];
    let outgoing = Outgoing {
        authority: Some(&long),
        unique_id: Some(&id),
        alpn: Some(b"h2"),
        ssl: Some(&[0; 5]),
        ..outgoing("10.0.0.1:1", "10.0.0.2:2")
    };
    let header = complete(&write_v2(&outgoing, false));
    assert!(header.tlvs.iter().map(|(kind, _)| kind).eq([kind::ALPN, kind::SSL]));
}
