use proptest::prelude::*;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{
    RootCertStore, SupportedProtocolVersion,
    crypto::aws_lc_rs::default_provider,
    pki_types::PrivateKeyDer,
    version::{TLS12, TLS13},
};

use super::*;

fn legs(version: &'static SupportedProtocolVersion, fragment: Option<usize>) -> [Leg; 2] {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["a.example".to_owned()]).expect("signed");
    let provider = Arc::new(default_provider());
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).expect("a key");
    let server = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[version]);
    let server = server.expect("versions").with_no_client_auth().with_single_cert(vec![cert.der().clone()], key);
    let mut server = server.expect("a pair");
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).expect("an authority");
    let client = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).expect("versions");
    let mut client = client.with_root_certificates(roots).with_no_client_auth();
    (server.max_fragment_size, client.max_fragment_size) = (fragment, fragment);
    let name = ServerName::try_from("a.example").expect("a name");
    [
        Leg::with_client(Arc::new(server), Vec::new()).expect("a leg"),
        Leg::with_backend(Arc::new(client), name, None, Vec::new()).expect("a leg"),
    ]
}

/// Plaintext that came out; `None`: the handshake is not complete yet.
fn receive(leg: &mut Leg, bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let mut input = [&leg.pending, bytes].concat();
    if leg.is_handshaking() {
        leg.shake(&mut input)?;
        if leg.is_handshaking() {
            return Ok(Vec::new());
        }
        leg.say_the_rest();
        input = leg.pending.clone();
    }
    let mut room = vec![0; 128 * 1024];
    let mut plain = Vec::new();
    loop {
        let mut out = Out { bytes: &mut room, length: 0, payload: 0, leg: None, now: Tick(0) };
        leg.open(&mut input, &mut out)?;
        let length = out.length;
        plain.extend_from_slice(&room[..length]);
        if !leg.more {
            return Ok(plain);
        }
        input = leg.pending.clone();
    }
}

fn send(leg: &mut Leg, plain: &[u8]) -> Vec<u8> {
    let mut bytes = std::mem::take(&mut leg.control);
    if !plain.is_empty() && !leg.is_handshaking() {
        let mut room = vec![0; 128 * 1024];
        let length = leg.seal(plain, &mut room, Tick(0)).expect("sealed");
        bytes.extend_from_slice(&room[..length]);
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// However the bytes are cut on their way, and however long the records are.
    #[test]
    fn what_is_sealed_comes_out_whole(
        tls13 in any::<bool>(),
        fragment in prop_oneof![Just(None), (64usize..2000).prop_map(Some)],
        cuts in prop::collection::vec(1usize..3000, 1..40),
        texts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20_000), 1..6),
    ) {
        let mut legs = legs(if tls13 { &TLS13 } else { &TLS12 }, fragment);
        let mut cuts = cuts.into_iter().cycle();
        receive(&mut legs[1], &[]).expect("a hello");
        let (mut wires, mut got) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        let mut next = [0, 0];
        for _ in 0..20_000 {
            for side in [0, 1] {
                let ready = !legs[side].is_handshaking() && next[side] < texts.len();
                let plain = if ready { &texts[next[side]][..] } else { &[] };
                next[side] += usize::from(ready);
                let bytes = send(&mut legs[side], plain);
                wires[side].extend(bytes);
                let cut = cuts.next().unwrap_or(1).min(wires[side].len());
                let part: Vec<u8> = wires[side].drain(..cut).collect();
                let other = &mut legs[1 - side];
                if cut % 3 == 0 && !other.is_handshaking() && (cut > 0 || !other.more) {
                    // Read, but not looked at before the other side's turn to write.
                    other.pending.extend_from_slice(&part);
                    other.more |= cut > 0;
                    continue;
                }
                let plain = receive(&mut legs[1 - side], &part).expect("understood");
                got[1 - side].extend(plain);
            }
            if next == [texts.len(); 2] && wires.iter().all(Vec::is_empty) && legs.iter().all(|l| l.control.is_empty() && !l.more) {
                break;
            }
        }
        prop_assert_eq!(&got[0], &texts.concat());
        prop_assert_eq!(&got[1], &texts.concat());
        prop_assert!(legs.iter().all(|leg| leg.pending.capacity() == 0 && leg.stash.is_empty()), "nothing is kept");
        let end = legs[0].close();
        receive(&mut legs[1], &end).expect("an end");
        prop_assert!(legs[1].closed && !legs[0].closed);
    }

    /// A defect in what comes is an error and never a panic, at whatever byte, in the handshake and behind it.
    #[test]
    fn damaged_bytes_are_refused(
        tls13 in any::<bool>(),
        fragment in prop_oneof![Just(None), (64usize..500).prop_map(Some)],
        damage in prop::collection::vec((0usize..6000, any::<u8>()), 1..4),
        cut in 1usize..3000,
    ) {
        let mut legs = legs(if tls13 { &TLS13 } else { &TLS12 }, fragment);
        receive(&mut legs[1], &[]).expect("a hello");
        let mut passed = 0;
        'all: for _ in 0..400 {
            for side in [0, 1] {
                let mut bytes = send(&mut legs[side], b"hello");
                for (at, byte) in &damage {
                    if let Some(place) = at.checked_sub(passed).and_then(|at| bytes.get_mut(at)) {
                        *place ^= byte;
                    }
                }
                passed += bytes.len();
                for part in bytes.chunks(cut) {
                    if receive(&mut legs[1 - side], part).is_err() {
                        legs[1 - side].say_why();
                        break 'all;
                    }
                }
            }
        }
    }
}
