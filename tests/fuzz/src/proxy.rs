//! Bytes of a connection, as they came; and what is read can be written and read again.
#![no_main]

use std::net::SocketAddr;

use libfuzzer_sys::fuzz_target;
use proxy_core::sniff::proxy::{Ends, Header, MAX_HEADER, Outgoing, Tlvs, kind, parse, write_v1, write_v2};

fuzz_target!(|bytes: &[u8]| {
    let whole = parse(bytes);
    let step = bytes.len() % 13 + 1;
    let ends = (0..bytes.len()).step_by(step).chain([bytes.len()]);
    let in_pieces = ends.map(|end| parse(&bytes[..end])).find(|said| *said != Ok(None));
    assert_eq!(in_pieces.unwrap_or(Ok(None)), whole);
    assert!(bytes.len() < MAX_HEADER || whole != Ok(None));
    if let Ok(Some((header, length))) = whole {
        assert!(length <= bytes.len().min(MAX_HEADER));
        assert_eq!(parse(&bytes[..length]), Ok(Some((header.clone(), length))));
        write(&header);
    }
});

fn write(header: &Header) {
    let own = SocketAddr::from(([10, 0, 0, 1], 1));
    let ends = header.ends.unwrap_or(Ends { source: own, destination: own });
    let read = |bytes: &[u8]| parse(bytes).ok().flatten().filter(|(_, length)| *length == bytes.len());
    let line = read(&write_v1(ends.source, ends.destination));
    assert_eq!(line.and_then(|(line, _)| line.ends), Some(ends));

    let outgoing = Outgoing { received: Some(&header.tlvs), ..Outgoing::new(ends.source, ends.destination) };
    let written = read(&write_v2(&outgoing, true)).map(|(header, _)| header);
    let written = written.as_ref();
    assert_eq!(written.and_then(|written| written.ends), Some(ends));
    let passed_on = written.map(|written| meant(&written.tlvs).collect::<Vec<_>>()).unwrap_or_default();
    // Some may have been left out for want of room; nothing was added, and the order is kept.
    let mut rest = passed_on.as_slice();
    for tlv in meant(&header.tlvs) {
        rest = rest.strip_prefix(&[tlv]).unwrap_or(rest);
    }
    assert_eq!(rest, []);
}

fn meant(tlvs: &Tlvs) -> impl Iterator<Item = (u8, &[u8])> {
    tlvs.iter().filter(|(kind, _)| !matches!(*kind, kind::CRC32C | kind::NOOP))
}
