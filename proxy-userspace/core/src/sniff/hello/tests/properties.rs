//! What holds for every hello and for all bytes.

use proptest::prelude::*;

use super::*;

/// Hellos in records of every size, and such with a byte changed.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let real = || REAL.map(|real| real.0.to_vec()).into_iter().chain([FRAGMENTED.to_vec()]);
    let made =
        (prop::sample::select(vec![1usize, 3, 40, 41, 600, 1 << 14]), 0..1500usize).prop_map(|(payload, padding)| {
            let sample = if payload < 40 { Sample::with(&[(ALPN, alpn(&[b"h2"]))]) } else { Sample::browser() };
            let length = sample.message().len();
            records(&sample.padded_to(length + 4 + padding / payload.min(10)).message(), payload)
        });
    let good = prop_oneof![prop::sample::select(real().collect::<Vec<_>>()), made];
    (good, any::<prop::sample::Index>(), prop_oneof![Just(0u8), any::<u8>()]).prop_map(|(mut bytes, at, change)| {
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        bytes
    })
}

/// What a reader says that is shown the bytes up to each of these places, and where it said so.
fn in_pieces(bytes: &[u8], ends: impl Iterator<Item = usize>) -> (usize, Result<Option<Hello>, NotHello>) {
    let mut reader = HelloReader::default();
    for end in ends {
        match reader.advance(&bytes[..end]) {
            Ok(None) => {}
            verdict => return (end, verdict),
        }
    }
    (bytes.len(), Ok(None))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn any_split_gives_what_the_whole_gives(bytes in bytes(), mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
        let whole = parse(&bytes);
        let mut ends: Vec<usize> = cuts.drain(..).map(|cut| cut.index(bytes.len())).chain([bytes.len()]).collect();
        ends.sort_unstable();
        prop_assert_eq!(in_pieces(&bytes, ends.into_iter()).1, whole.clone());
        prop_assert_eq!(in_pieces(&bytes, 0..=bytes.len()).1, whole);
    }

    #[test]
    fn what_a_prefix_is_refused_for_the_whole_is_refused_for(bytes in bytes()) {
        let (end, verdict) = in_pieces(&bytes, 0..=bytes.len());
        for shorter in [0, end / 2, end.saturating_sub(1)] {
            prop_assert!(shorter == end || parse(&bytes[..shorter]) == Ok(None));
        }
        for longer in [end, (end + bytes.len()) / 2, bytes.len()] {
            prop_assert_eq!(parse(&bytes[..longer]), verdict.clone());
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), beginning in 0..=9usize) {
        let record = [22, 3, 1, 1, 0, 1, 0, 0, 252];
        let bytes = [&record[..beginning], &bytes].concat();
        let _ = parse(&bytes);
    }

    #[test]
    fn a_reader_that_has_seen_enough_never_asks_for_more(payload in 1..=1usize << 14) {
        let message = Sample::browser().padded_to(MAX_MESSAGE).message();
        let mut bytes = records(&message, payload);
        bytes.resize(bytes.len().max(MAX_HELLO), 0);
        prop_assert_ne!(parse(&bytes[..MAX_HELLO]), Ok(None));
    }
}

#[test]
fn a_valid_hello_is_waited_for_up_to_its_last_byte() {
    let made = [1, 7, 500, 1 << 14].map(|payload| records(&Sample::with(&[]).message(), payload));
    let real = REAL.map(|real| real.0.to_vec());
    for bytes in real.into_iter().chain(made).chain([FRAGMENTED.to_vec(), Sample::browser().record()]) {
        let (end, verdict) = in_pieces(&bytes, 0..=bytes.len());
        assert_eq!(end, bytes.len());
        assert!(matches!(verdict, Ok(Some(_))), "{verdict:?}");
    }
}

/// A byte at a time, the reader looks at each byte once: 16 KiB are 16 Ki steps, not 134 million.
#[test]
fn sixteen_kib_a_byte_at_a_time_cost_one_look_at_each_byte() {
    let bytes = records(&Sample::browser().padded_to(MAX_MESSAGE).message(), 256);
    let mut reader = HelloReader::default();
    for end in 0..bytes.len() {
        assert_eq!(reader.advance(&bytes[..end]), Ok(None));
        assert!(end - reader.at() < reader::RECORD_HEADER, "it would look at {} bytes again", end - reader.at());
    }
}
