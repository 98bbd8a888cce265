//! The translation against a straightforward model: take the packet apart, change the parts, put it together anew with checksums
//! computed from scratch.

mod packet;

use packet::{Opt, Packet, flow, key_of};
use proptest::prelude::*;
use proxy_abi::handoff::{HandoffEnd, HandoffEntry, HandoffFlow, gate, option, seen};
use proxy_translate::{
    bytes::Bytes,
    segment::{Context, Verdict},
    whole,
};

/// What the model makes of a data segment of a flow whose sockets are gone.
fn model(packet: &Packet, entry: &HandoffEntry, this: &HandoffEnd, other: &HandoffEnd) -> Packet {
    let mut out = packet.clone();
    (out.source, out.destination) = (entry.source, entry.destination);
    out.hops -= 1;
    out.seq = packet.seq.wrapping_add(entry.dseq);
    out.ack = packet.ack.wrapping_sub(entry.dack);
    let bytes = u64::from(packet.window) << entry.scale_in;
    out.window = u16::try_from(bytes >> entry.scale_out).unwrap_or(u16::MAX);
    (out.flags, out.urgent) = (packet.flags & !0x20, 0);
    let both = |bits| entry.options & bits == bits;
    if !both(option::ECN_IN | option::ECN_OUT) {
        out.ecn = 0;
        out.flags &= !0xc0;
    }
    let timestamps = both(option::TIMESTAMPS_IN | option::TIMESTAMPS_OUT);
    let sack = both(option::SACK_IN | option::SACK_OUT);
    out.options = packet.options.iter().map(|opt| translated(opt, timestamps, sack, entry, this, other)).collect();
    out
}

fn translated(
    opt: &Opt,
    timestamps: bool,
    sack: bool,
    entry: &HandoffEntry,
    this: &HandoffEnd,
    other: &HandoffEnd,
) -> Opt {
    match opt {
        Opt::Timestamps(value, echo) if timestamps => {
            let echo = if *echo == 0 { 0 } else { echo.wrapping_sub(other.clock_offset) };
            Opt::Timestamps(value.wrapping_add(this.clock_offset), echo)
        }
        Opt::Timestamps(..) => Opt::Nops(10),
        Opt::Sack(blocks) if sack => {
            Opt::Sack(blocks.iter().map(|(l, r)| (l.wrapping_sub(entry.dack), r.wrapping_sub(entry.dack))).collect())
        }
        Opt::Sack(blocks) => Opt::Nops(2 + 8 * blocks.len()),
        Opt::Nops(_) | Opt::Unknown(..) => opt.clone(),
    }
}

/// Options of which the translated kinds appear once at most, in any order and at any offset, 40 bytes at most.
fn options() -> impl Strategy<Value = Vec<Opt>> {
    let filler = prop_oneof![
        (1usize..4).prop_map(Opt::Nops),
        (any::<u8>(), 0usize..4).prop_map(|(kind, n)| {
            Opt::Unknown(if matches!(kind, 0 | 1 | 5 | 8) { 254 } else { kind }, vec![kind; n])
        })
    ];
    let timestamps = proptest::option::of((any::<u32>(), any::<u32>()).prop_map(|(a, b)| Opt::Timestamps(a, b)));
    let sack = proptest::option::of(proptest::collection::vec(any::<(u32, u32)>(), 1..=4).prop_map(Opt::Sack));
    (proptest::collection::vec(filler, 0..4), timestamps, sack).prop_flat_map(|(mut all, timestamps, sack)| {
        all.extend(timestamps);
        all.extend(sack);
        Just(all).prop_shuffle().prop_map(|mut all| {
            while all.iter().map(Opt::length).sum::<usize>() > 40 {
                all.pop();
            }
            all
        })
    })
}

prop_compose! {
    fn packets()(
        v6 in any::<bool>(), from_backend in any::<bool>(), options in options(), seq in any::<u32>(), ack in any::<u32>(),
        window in any::<u16>(), ecn in 0u8..4, congestion in 0u8..4, hops in 2u8..=255, payload in proptest::collection::vec(any::<u8>(), 0..90),
        urgent in proptest::option::of(any::<u16>()),
    ) -> (Packet, bool) {
        let key = key_of(v6, from_backend);
        let flags = 0x10 | congestion << 6 | u8::from(urgent.is_some()) << 5;
        let urgent = urgent.unwrap_or(0);
        (Packet { v6, source: key.source, destination: key.destination, ecn, hops, seq, ack, flags, window, urgent, options, payload }, from_backend)
    }
}

prop_compose! {
    fn entries()(options in 0u8..64, scale_in in 0u8..15, scale_out in 0u8..15, dseq in any::<u32>(), dack in any::<u32>()) -> HandoffEntry {
        HandoffEntry { options, scale_in, scale_out, dseq, dack, ..HandoffEntry::default() }
    }
}

fn run(
    bytes: &mut [u8],
    partial: bool,
    v6: bool,
    from_backend: bool,
    entry: &HandoffEntry,
    flow: &mut HandoffFlow,
) -> Verdict {
    let key = key_of(v6, from_backend);
    let context = Context { now_ns: 1, segments: 0, ifindex: 3 };
    let find = |asked: &_| (*asked == key).then_some(*entry);
    let mut packet = if partial { Bytes::partial(bytes) } else { Bytes::new(bytes) };
    whole::translate(&mut packet, find, flow, context)
}

fn addressed(entry: HandoffEntry, v6: bool, from_backend: bool) -> HandoffEntry {
    let back = key_of(v6, !from_backend);
    // The packets of the other direction, turned round, are what these become.
    HandoffEntry { direction: u8::from(from_backend), source: back.destination, destination: back.source, ..entry }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn every_layout_comes_out_as_the_model_says_with_checksums_that_hold(
        (packet, from_backend) in packets(), entry in entries(), offsets in any::<(u32, u32)>(), partial in any::<bool>(),
    ) {
        let entry = addressed(entry, packet.v6, from_backend);
        let mut flow = flow(gate::ALONE);
        (flow.ends[0].clock_offset, flow.ends[1].clock_offset) = offsets;
        let (this, other) = (flow.ends[usize::from(from_backend)], flow.ends[usize::from(!from_backend)]);
        let mut bytes = packet.bytes(partial);
        let verdict = run(&mut bytes, partial, packet.v6, from_backend, &entry, &mut flow);
        prop_assert!(matches!(verdict, Verdict::Send { .. }), "{verdict:?}");
        prop_assert_eq!(bytes, model(&packet, &entry, &this, &other).bytes(partial));
    }

    #[test]
    fn no_bytes_whatever_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..160), v6 in any::<bool>(), kind in 0u8..3) {
        // Looks like one of ours up to the ports, more often than chance would have it.
        if bytes.len() > 60 {
            let packet = packet::plain(v6).bytes(false);
            let keep = [14, 38, 56][usize::from(kind)].min(packet.len());
            bytes[..keep].copy_from_slice(&packet[..keep]);
        }
        let mut flow = flow(gate::OPEN);
        let entry = addressed(HandoffEntry { options: 63, ..HandoffEntry::default() }, v6, false);
        run(&mut bytes, false, v6, false, &entry, &mut flow);
    }

    #[test]
    fn bytes_are_counted_once_however_often_and_in_whatever_order_they_come(
        pieces in proptest::collection::vec((0u32..5_000, 1usize..90), 1..40),
    ) {
        let entry = addressed(HandoffEntry::default(), false, false);
        let mut flow = flow(gate::ALONE);
        let first = flow.ends[0].first_seq;
        for (offset, length) in &pieces {
            let packet = Packet { seq: first.wrapping_add(*offset), payload: vec![7; *length], ..packet::plain(false) };
            run(&mut packet.bytes(false), false, false, false, &entry, &mut flow);
        }
        let highest = pieces.iter().map(|(offset, length)| u64::from(*offset) + *length as u64).max();
        prop_assert_eq!(Some(flow.ends[0].bytes()), highest);
        prop_assert_eq!(flow.ends[0].packets, pieces.len() as u64);
    }
}

#[test]
fn a_fin_and_what_comes_after_it_are_no_bytes() {
    let entry = addressed(HandoffEntry::default(), false, false);
    let mut flow = flow(gate::ALONE);
    let data = packet::plain(false);
    let fin = Packet { seq: data.seq.wrapping_add(3), flags: 0x11, payload: Vec::new(), ..data.clone() };
    let after = Packet { seq: fin.seq.wrapping_add(1), flags: 0x10, ..fin.clone() };
    for packet in [data, fin, after] {
        run(&mut packet.bytes(false), false, false, false, &entry, &mut flow);
    }
    assert_eq!(flow.ends[0].bytes(), 3);
}

#[test]
fn a_clock_that_is_learnt_goes_on_from_that_of_our_socket() {
    let entry = HandoffEntry { clock: 5_000, clock_ns: 0, clock_tick_ns: 1, options: 63, ..HandoffEntry::default() };
    let entry = addressed(entry, false, false);
    let mut flow = flow(gate::ALONE);
    flow.ends.iter_mut().for_each(|end| end.seen &= !seen::CLOCK);
    let packet = Packet { options: vec![Opt::Timestamps(77, 99)], ..packet::plain(false) };
    let mut bytes = packet.bytes(false);
    run(&mut bytes, false, false, false, &entry, &mut flow);
    // One tick after the clock was read, and a second ahead; the echo is of a clock that is not known.
    let expected = Packet { options: vec![Opt::Timestamps(1_000_005_001, 0)], ..packet };
    assert_eq!(bytes[54..], expected.bytes(false)[54..]);
}
