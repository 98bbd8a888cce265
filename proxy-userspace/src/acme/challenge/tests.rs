use std::io::{Read, Write};

use proxy_core::sniff::hello;
use rustls::{ClientConnection, ServerConnection};
use x509_parser::parse_x509_certificate;

use super::*;

/// The ClientHello of a client that asks for `name` and offers `protocols`.
fn client(name: &str, protocols: &[&[u8]]) -> (ClientConnection, Vec<u8>) {
    let mut config = crate::health::tls::trusting_anybody().expect("a client");
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let name = name.to_owned().try_into().expect("a name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut sent = Vec::new();
    client.write_tls(&mut sent).expect("a hello");
    (client, sent)
}

fn asked(name: &str, protocols: &[&[u8]]) -> Hello {
    hello::parse(&client(name, protocols).1).expect("a hello").expect("whole")
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

#[test]
fn the_answer_is_the_digest_for_the_name_in_a_critical_extension() {
    let challenges = Challenges::default();
    let _prepared = challenges.prepare("a.example", &[7; 32]).expect("prepared");
    let (mut client, sent) = client("a.example", &[PROTOCOL]);
    let config = challenges.answer(&asked("a.example", &[PROTOCOL])).expect("pending");
    let mut server = ServerConnection::new(config).expect("a server");
    let mut to_server = sent;
    while client.is_handshaking() || server.is_handshaking() {
        server.read_tls(&mut &to_server[..]).expect("read");
        server.process_new_packets().expect("good");
        let mut to_client = Vec::new();
        server.write_tls(&mut to_client).expect("written");
        client.read_tls(&mut &to_client[..]).expect("read");
        client.process_new_packets().expect("good");
        to_server.clear();
        client.write_tls(&mut to_server).expect("written");
    }
    assert_eq!(client.alpn_protocol(), Some(PROTOCOL));
    let certificate = client.peer_certificates().expect("shown")[0].clone();
    let (_, parsed) = parse_x509_certificate(&certificate).expect("a certificate");
    let extension = parsed.extensions().iter().find(|one| one.oid.to_id_string() == "1.3.6.1.5.5.7.1.31");
    let extension = extension.expect("id-pe-acmeIdentifier");
    assert!(extension.critical);
    assert_eq!(extension.value, [&[0x04, 32][..], &[7; 32]].concat(), "an OCTET STRING of the digest");
    let names = parsed.subject_alternative_name().expect("readable").expect("there").value.general_names.clone();
    assert_eq!(format!("{names:?}"), "[DNSName(\"a.example\")]");
}
