//! Promises of the ClientHello reader.

mod properties;
mod samples;

use super::*;
use samples::{ALPN, ECH, SERVER_NAME, Sample, alpn, message, records, server_name, vector16};

macro_rules! testdata {
    ($name:literal) => {
        include_bytes!(concat!("../../../testdata/hello/", $name, ".bin"))
    };
}

/// Bytes, the name and the protocols in them, and whether there is ECH.
type Case = (&'static [u8], Option<&'static str>, &'static [&'static str], bool);

/// What real clients sent.
const REAL: [Case; 7] = [
    (testdata!("openssl"), Some("shop.example.com"), &["h2", "http/1.1"], false),
    (testdata!("openssl_no_sni_tls12"), None, &[], false),
    (testdata!("curl"), Some("www.example.org"), &["h2", "http/1.1"], false),
    (testdata!("curl_ip"), None, &["h2", "http/1.1"], false),
    (testdata!("node"), Some("node.example.net"), &["h2", "http/1.1"], false),
    (testdata!("rustls_post_quantum"), Some("pq.example.com"), &["h2", "http/1.1"], false),
    (testdata!("rustls_ech"), Some("public.example.com"), &[], true),
];

/// Of OpenSSL, with `-max_send_frag 512` and 40 protocols.
const FRAGMENTED: &[u8] = testdata!("openssl_fragmented");

fn complete(bytes: &[u8]) -> Hello {
    parse(bytes).expect("a hello").expect("a complete one")
}

fn with(kind: u16, data: &[u8]) -> Vec<u8> {
    Sample::with(&[(kind, data.to_vec())]).record()
}

fn refused(kind: u16, data: &[u8]) -> NotHello {
    parse(&with(kind, data)).expect_err("nothing that is served")
}

fn name_in(name: &[u8]) -> Result<Option<Box<str>>, NotHello> {
    parse(&with(SERVER_NAME, &server_name(name))).map(|hello| hello.expect("a complete one").sni)
}

#[test]
fn hellos_of_real_clients_are_read() {
    for (bytes, sni, alpn, ech) in REAL {
        let hello = complete(bytes);
        assert_eq!((hello.sni.as_deref(), hello.ech), (sni, ech));
        assert!(hello.alpn.iter().eq(alpn.iter().map(|protocol| protocol.as_bytes())), "{:?}", hello.alpn);
    }
}

#[test]
fn a_hello_in_several_records_is_read() {
    let hello = complete(FRAGMENTED);
    assert_eq!(hello.sni.as_deref(), Some("frag.example.com"));
    assert_eq!(hello.alpn.iter().count(), 40);
    assert!(hello.alpn.contains(b"protocol-39") && !hello.alpn.contains(b"protocol-40"));
    let browser = Sample::browser();
    for payload in [32, 100, 1000] {
        assert_eq!(complete(&records(&browser.message(), payload)), complete(&browser.record()));
    }
    // Not even the header of the message is in one record.
    assert_eq!(complete(&records(&Sample::with(&[]).message(), 1)).sni, None);
}

#[test]
fn a_browsers_hello_with_grease_and_ech_is_read() {
    let bytes = Sample::browser().record();
    assert!(bytes.len() > 1600, "{} fit into one segment", bytes.len());
    let hello = complete(&bytes);
    assert_eq!((hello.sni.as_deref(), hello.ech), (Some("www.example.com"), true));
    assert!(hello.alpn.contains(b"h2"));
}

#[test]
fn the_inner_hello_that_a_front_server_passes_on_is_not_encrypted() {
    assert!(complete(&with(ECH, &[0])).ech);
    assert!(!complete(&with(ECH, &[1])).ech);
}

#[test]
fn a_hello_of_16_kib_is_read_and_one_more_byte_is_too_long() {
    let longest = Sample::browser().padded_to(MAX_MESSAGE).message();
    for bytes in [records(&longest, 1 << 14), records(&longest, 256)] {
        assert_eq!(complete(&bytes).sni.as_deref(), Some("www.example.com"));
    }
    let longer = Sample::browser().padded_to(MAX_MESSAGE + 1).message();
    // Said as soon as the length is known.
    assert_eq!(parse(&records(&longer, 1 << 14)[..9]), Err(NotHello::TooLong));
    // Too many records.
    assert_eq!(parse(&records(&longest, 255)), Err(NotHello::TooLong));
    // A record that no receiver takes.
    assert_eq!(parse(&[22, 3, 1, 0x40, 1]), Err(NotHello::TooLong));
}

#[test]
fn early_data_behind_the_hello_is_of_no_interest() {
    let mut bytes = Sample::browser().record();
    let alone = complete(&bytes);
    bytes.extend([23, 3, 3, 0, 1, 0]);
    assert_eq!(complete(&bytes), alone);
}

#[test]
fn another_protocol_is_told_by_its_first_bytes() {
    for bytes in [&b"G"[..], b"\x80\x2e\x01\x00\x02", b"SSH-2.0", b"\x16\x02", b"\x15\x03\x01", b"\0", b"\x16\xfe\xff"]
    {
        assert_eq!(parse(bytes), Err(NotHello::NotTls), "{bytes:?}");
    }
    assert_eq!(parse(&records(&message(2, &[]), 4)[..6]), Err(NotHello::OtherMessage));
    assert_eq!(parse(&Sample { version: [2, 0], ..Sample::browser() }.record()), Err(NotHello::Version));
}

#[test]
fn records_that_are_not_the_hello_s_are_refused() {
    let whole = Sample::with(&[]).record();
    // No payload.
    assert_eq!(parse(&[22, 3, 1, 0, 0]), Err(NotHello::Malformed));
    // An alert amid the hello.
    let mut records = records(&Sample::with(&[]).message(), 20);
    records[25] = 21;
    assert_eq!(parse(&records), Err(NotHello::Malformed));
    // Another message in the hello's record: said when the header is there.
    let mut more = whole;
    more[4] += 1;
    assert_eq!(parse(&more[..9]), Err(NotHello::Malformed));
}

#[test]
fn a_hello_without_extensions_is_one_without_a_name() {
    let body = [&[3, 1][..], &[0; 32], &[0, 0, 2, 0, 47, 1, 0]].concat();
    let hello = complete(&records(&message(1, &body), 1000));
    assert_eq!(hello, Hello { sni: None, alpn: Protocols::default(), ech: false });
    // Cut anywhere it is no hello, however well its outer lengths agree.
    for end in 0..body.len() {
        assert_eq!(parse(&records(&message(1, &body[..end]), 1000)), Err(NotHello::Malformed), "{end}");
    }
}

#[test]
fn lists_of_lengths_that_cannot_be_are_refused() {
    let sample = Sample::browser();
    for spoilt in [
        Sample { session_id: vec![0; 33], ..sample.clone() },
        Sample { cipher_suites: vec![], ..sample.clone() },
        Sample { cipher_suites: vec![0x13, 0x01, 0x13], ..sample.clone() },
        Sample { compression: vec![], ..sample },
    ] {
        assert_eq!(parse(&spoilt.record()), Err(NotHello::Malformed), "{spoilt:?}");
    }
}

#[test]
fn an_extension_that_comes_twice_is_refused() {
    let name = (SERVER_NAME, server_name(b"a.example"));
    let other = (SERVER_NAME, server_name(b"b.example"));
    let padding = (samples::PADDING, Vec::new());
    let twice = Sample::with(&[name.clone(), padding.clone(), other]);
    assert_eq!(parse(&twice.record()), Err(NotHello::DuplicateExtension));
    let unknown = Sample::with(&[padding.clone(), name, padding]);
    assert_eq!(parse(&unknown.record()), Err(NotHello::DuplicateExtension));
}

#[test]
fn bytes_left_over_are_refused_wherever_they_are() {
    for (kind, data) in [(SERVER_NAME, server_name(b"a.example")), (ALPN, alpn(&[b"h2"]))] {
        assert_eq!(refused(kind, &[&data[..], &[0]].concat()), NotHello::Malformed);
        assert_eq!(refused(kind, &data[..data.len() - 1]), NotHello::Malformed);
        assert_eq!(refused(kind, &[]), NotHello::Malformed);
    }
    // Two names, a name of a type that nobody defined, none.
    let list = |entries: &[&[u8]]| vector16(&entries.concat());
    let entry = |kind: u8| [&[kind][..], &vector16(b"a.example")].concat();
    for data in [list(&[&entry(0), &entry(0)]), list(&[&entry(0), &entry(1)]), list(&[&entry(1)]), list(&[])] {
        assert_eq!(refused(SERVER_NAME, &data), NotHello::Malformed);
    }
    assert_eq!(refused(ALPN, &alpn(&[b"h2", b""])), NotHello::Malformed);
    assert_eq!(refused(ALPN, &alpn(&[])), NotHello::Malformed);
    let mut message = Sample::browser().message();
    message.push(0);
    message[3] += 1;
    assert_eq!(parse(&records(&message, 1 << 14)), Err(NotHello::Malformed));
}

#[test]
fn a_name_is_lower_case_and_without_its_last_dot() {
    for (sent, read) in [
        (&b"WWW.Example.COM"[..], "www.example.com"),
        (b"www.example.com.", "www.example.com"),
        (b"localhost", "localhost"),
        (b"_dmarc.-x-.example", "_dmarc.-x-.example"),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
    ] {
        assert_eq!(name_in(sent), Ok(Some(read.into())));
    }
    let longest = [[b'a'; 63]; 4].join(&b'.');
    assert!(name_in(&longest[..253]).is_ok());
    assert_eq!(name_in(&longest[..254]), Err(NotHello::BadServerName));
}

#[test]
fn an_ip_address_in_place_of_a_name_is_no_name() {
    for address in [&b"10.0.0.1"[..], b"::1", b"fd00::1"] {
        assert_eq!(name_in(address), Ok(None));
    }
}

#[test]
fn what_cannot_be_a_host_name_is_refused() {
    let long_label = [b'a'; 64];
    for name in
        [&b""[..], b".", b"a..b", b".a", b"a b", b"a\0b", b"*.example", b"a:443", b"\xff", "ä.example".as_bytes()]
            .into_iter()
            .chain([&long_label[..]])
    {
        assert_eq!(name_in(name), Err(NotHello::BadServerName), "{name:?}");
    }
}

#[test]
fn an_alert_is_one_record_that_ends_the_handshake() {
    assert_eq!(Alert::UnrecognizedName.record(), [21, 3, 3, 0, 2, 2, 112]);
    assert_eq!(NotHello::Malformed.alert().map(Alert::record), Some([21, 3, 3, 0, 2, 2, 50]));
    assert_eq!(NotHello::NotTls.alert(), None);
}
