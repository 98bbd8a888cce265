use proxy_core::sniff::hello;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use x509_parser::parse_x509_certificate;

use super::*;

/// The ClientHello of a client that asks for `name` and offers `protocols`.
fn asked(name: &str, protocols: &[&[u8]]) -> Hello {
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&version::TLS13]);
    let builder = builder.expect("TLS 1.3").with_root_certificates(RootCertStore::empty());
    let mut config = builder.with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let name = name.to_owned().try_into().expect("a name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut sent = Vec::new();
    client.write_tls(&mut sent).expect("a hello");
    hello::parse(&sent).expect("a hello").expect("whole")
}

#[test]
fn only_a_ca_is_answered_and_only_while_it_looks() {
    let challenges = Challenges::default();
    let ca = asked("a.example", &[PROTOCOL]);
    assert!(challenges.answer(&ca).is_none());
    let prepared = challenges.prepare("a.example", &[7; 32]).expect("prepared");
    assert!(challenges.answer(&ca).is_some());
    assert!(challenges.answer(&asked("b.example", &[PROTOCOL])).is_none(), "another name");
    assert!(challenges.answer(&asked("a.example", &[b"h2"])).is_none(), "a client");
    assert!(challenges.answer(&asked("a.example", &[PROTOCOL, b"h2"])).is_none(), "not as a CA asks");
    assert!(challenges.answer(&asked("a.example", &[])).is_none());
    drop(prepared);
    assert!(challenges.answer(&ca).is_none());
}

/// rustls' client will not read it: what it does with a CA's eyes is for the test with a CA to see.
#[test]
fn the_answer_is_the_digest_for_the_name_in_a_critical_extension() {
    let shown = shown("a.example", &[7; 32]).expect("made");
    let (_, parsed) = parse_x509_certificate(&shown.cert[0]).expect("a certificate");
    let extension = parsed.extensions().iter().find(|one| one.oid.to_id_string() == "1.3.6.1.5.5.7.1.31");
    let extension = extension.expect("id-pe-acmeIdentifier");
    assert!(extension.critical);
    assert_eq!(extension.value, [&[0x04, 32][..], &[7; 32]].concat(), "an OCTET STRING of the digest");
    let names = parsed.subject_alternative_name().expect("readable").expect("there").value.general_names.clone();
    assert_eq!(format!("{names:?}"), "[DNSName(\"a.example\")]");
}
