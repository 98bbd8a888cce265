//! Bytes of a connection, as they came: whether cut or whole, the same is said about them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxy_core::sniff::hello::{Hello, HelloReader, MAX_HELLO, parse};

fuzz_target!(|bytes: &[u8]| {
    let whole = parse(bytes);
    let step = bytes.len() % 61 + 1;
    let mut reader = HelloReader::default();
    let ends = (0..bytes.len()).step_by(step).chain([bytes.len()]);
    let in_pieces = ends.map(|end| reader.advance(&bytes[..end])).find(|said| *said != Ok(None));
    assert_eq!(in_pieces.unwrap_or(Ok(None)), whole);
    assert!(bytes.len() < MAX_HELLO || whole != Ok(None));
    if let Ok(Some(hello)) = whole {
        check(&hello);
    }
});

fn check(hello: &Hello) {
    if let Some(name) = &hello.sni {
        assert!((1..=253).contains(&name.len()));
        assert!(name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.')));
    }
    assert!(hello.alpn.iter().all(|protocol| !protocol.is_empty() && hello.alpn.contains(protocol)));
}
