use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn limits() -> Limits {
    Limits {
        initial_data: 5 * SECOND,
        tls_handshake: 3 * SECOND,
        connect: 10 * SECOND,
        idle: Some(60 * SECOND),
        idle_warning: None,
        half_closed: Some(20 * SECOND),
        lifetime: None,
    }
}

fn at(seconds: u64) -> Tick {
    Tick(seconds * 1000)
}

fn ended(reason: Reason, how: How) -> Action {
    Action::End { reason, how }
}

fn finished(side: Side) -> Event {
    Event::Finished { side, silent: false }
}

fn established(limits: &Limits) -> Session {
    let mut session = Session::accepted(limits.initial_data, at(0));
    assert_eq!(session.step(Event::Classified { tls: false }, limits, at(0)), Action::Dial);
    assert_eq!(session.step(Event::Connected { tls: false }, limits, at(0)), Action::Relay);
    session
}

#[test]
fn the_connect_limit_covers_every_attempt_and_starts_when_the_route_is_known() {
    let limits = limits();
    let mut session = Session::accepted(limits.initial_data, at(0));
    assert_eq!(session.deadline(&limits), Some(at(5)));
    session.step(Event::Classified { tls: false }, &limits, at(4));
    assert_eq!(session.deadline(&limits), Some(at(14)));
    assert_eq!(session.step(Event::Tick, &limits, at(13)), Action::Nothing);
    assert_eq!(session.step(Event::Tick, &limits, at(14)), ended(Reason::ConnectTimeout, How::Reset));
}

#[test]
fn a_stalled_first_message_ends_at_its_own_limit() {
    let limits = limits();
    let mut session = Session::accepted(limits.initial_data, at(0));
    assert_eq!(session.step(Event::Tick, &limits, at(5)), ended(Reason::InitialDataTimeout, How::Reset));
}

#[test]
fn a_client_fin_while_dialing_reaches_the_backend() {
    let limits = limits();
    let mut session = Session::accepted(limits.initial_data, at(0));
    session.step(Event::Classified { tls: false }, &limits, at(0));
    assert_eq!(session.step(finished(Side::Client), &limits, at(1)), Action::Nothing);
    assert_eq!(session.deadline(&limits), Some(at(10)));
    assert_eq!(session.step(Event::Connected { tls: false }, &limits, at(2)), Action::Relay);
    assert_eq!(session.step(finished(Side::Client), &limits, at(2)), Action::Nothing);
    assert_eq!(session.state(), State::HalfClosed { first: Side::Client });
}

#[test]
fn a_client_that_left_without_a_word_is_not_dialled_for_long() {
    let limits = limits();
    let mut session = Session::accepted(limits.initial_data, at(0));
    session.step(Event::Classified { tls: false }, &limits, at(0));
    session.step(Event::Finished { side: Side::Client, silent: true }, &limits, at(1));
    assert_eq!(session.deadline(&limits), Some(Tick(2500)));
    let end = session.step(Event::Tick, &limits, at(3));
    assert_eq!(end, ended(Reason::FinishedClientFirst, How::Reset));
}

#[test]
fn a_byte_just_before_the_idle_limit_starts_it_over() {
    let limits = limits();
    let mut session = established(&limits);
    session.moved(at(59));
    assert_eq!(session.step(Event::Tick, &limits, at(60)), Action::Nothing);
    assert_eq!(session.deadline(&limits), Some(at(119)));
    assert_eq!(session.step(Event::Tick, &limits, at(119)), ended(Reason::IdleTimeout, How::Reset));
}

#[test]
fn half_closed_has_its_own_limit_counted_while_idle() {
    let limits = Limits { idle: Some(SECOND), ..limits() };
    let mut session = established(&limits);
    session.step(finished(Side::Backend), &limits, at(0));
    session.moved(at(15));
    assert_eq!(session.deadline(&limits), Some(at(35)));
    assert_eq!(session.step(Event::Tick, &limits, at(35)), ended(Reason::HalfClosedTimeout, How::Reset));
}

#[test]
fn each_handshake_has_its_own_limit_and_comes_before_what_needs_it() {
    let limits = limits();
    let mut session = Session::accepted(limits.initial_data, at(0));
    assert_eq!(session.step(Event::Classified { tls: true }, &limits, at(4)), Action::Handshake);
    assert_eq!(session.deadline(&limits), Some(at(7)));
    let mut late = session;
    assert_eq!(late.step(Event::Tick, &limits, at(7)), ended(Reason::TlsHandshakeTimeout, How::Reset));
    assert_eq!(session.step(Event::Secured, &limits, at(6)), Action::Dial);
    assert_eq!(session.step(Event::Connected { tls: true }, &limits, at(8)), Action::Handshake);
    assert_eq!(session.deadline(&limits), Some(at(11)));
    assert_eq!(session.step(finished(Side::Client), &limits, at(9)), Action::Nothing);
    let mut late = session;
    assert_eq!(late.step(Event::Tick, &limits, at(11)), ended(Reason::TlsHandshakeTimeout, How::Reset));
    assert_eq!(session.step(Event::Secured, &limits, at(10)), Action::Relay);
}

#[test]
fn a_failed_handshake_ends_the_connection_and_lets_the_client_read_why() {
    let limits = limits();
    for event in [Event::HandshakeFailed, finished(Side::Client)] {
        let mut session = Session::accepted(limits.initial_data, at(0));
        session.step(Event::Classified { tls: true }, &limits, at(0));
        assert_eq!(session.step(event, &limits, at(1)), ended(Reason::TlsHandshakeFailed, How::Finished));
    }
    let mut session = Session::accepted(limits.initial_data, at(0));
    session.step(Event::Classified { tls: false }, &limits, at(0));
    session.step(Event::Connected { tls: true }, &limits, at(0));
    assert_eq!(session.step(Event::HandshakeFailed, &limits, at(1)), ended(Reason::TlsHandshakeFailed, How::Reset));
}

#[test]
fn the_first_to_finish_names_the_reason() {
    for (first, second, reason) in [
        (Side::Client, Side::Backend, Reason::FinishedClientFirst),
        (Side::Backend, Side::Client, Reason::FinishedBackendFirst),
    ] {
        let limits = limits();
        let mut session = established(&limits);
        assert_eq!(session.step(finished(first), &limits, at(1)), Action::Nothing);
        assert_eq!(session.step(finished(first), &limits, at(1)), Action::Nothing);
        assert_eq!(session.step(finished(second), &limits, at(1)), ended(reason, How::Finished));
    }
}

#[test]
fn keepalive_extended_warns_once_per_silence_and_immortal_never_ends() {
    let extended = Limits { idle: Some(60 * SECOND), idle_warning: Some(10 * SECOND), ..limits() };
    let mut session = established(&extended);
    assert_eq!(session.deadline(&extended), Some(at(10)));
    assert_eq!(session.step(Event::Tick, &extended, at(10)), Action::WarnIdle);
    assert_eq!(session.step(Event::Tick, &extended, at(11)), Action::Nothing);
    assert_eq!(session.deadline(&extended), Some(at(60)));
    session.moved(at(20));
    assert_eq!(session.step(Event::Tick, &extended, at(30)), Action::WarnIdle);
    assert_eq!(session.step(Event::Tick, &extended, at(80)), ended(Reason::IdleTimeout, How::Reset));
    let immortal = Limits { idle: None, ..limits() };
    assert_eq!(established(&immortal).deadline(&immortal), None);
}

#[test]
fn lifetime_ends_a_busy_connection() {
    let limits = Limits { lifetime: Some(30 * SECOND), ..limits() };
    let mut session = established(&limits);
    session.moved(at(30));
    assert_eq!(session.step(Event::Tick, &limits, at(30)), ended(Reason::LifetimeExceeded, How::Reset));
}

fn any_event() -> impl Strategy<Value = Event> {
    let side = prop_oneof![Just(Side::Client), Just(Side::Backend)];
    prop_oneof![
        any::<bool>().prop_map(|tls| Event::Classified { tls }),
        any::<bool>().prop_map(|tls| Event::Connected { tls }),
        Just(Event::Secured),
        Just(Event::HandshakeFailed),
        Just(Event::DialFailed(Reason::ConnectRefused)),
        Just(Event::Moved),
        (side.clone(), any::<bool>()).prop_map(|(side, silent)| Event::Finished { side, silent }),
        side.prop_map(Event::Reset),
        Just(Event::Cut(Reason::Killed)),
        Just(Event::Tick),
    ]
}

proptest! {
    /// Whatever happens, in whatever order: one end, told once, and never a state without a way out of it.
    #[test]
    fn a_session_ends_at_most_once_and_always_can(events in prop::collection::vec((any_event(), 0u64..30), 0..60)) {
        let limits = limits();
        let (mut session, mut now, mut ends) = (Session::accepted(limits.initial_data, at(0)), 0, 0);
        for (event, wait) in events {
            now += wait;
            let was_closed = matches!(session.state(), State::Closed(_));
            let action = session.step(event, &limits, at(now));
            ends += usize::from(matches!(action, Action::End { .. }));
            prop_assert!(!was_closed || action == Action::Nothing);
            prop_assert_eq!(session.deadline(&limits).is_none(), matches!(session.state(), State::Closed(_)));
        }
        while let Some(deadline) = session.deadline(&limits) {
            ends += usize::from(matches!(session.step(Event::Tick, &limits, deadline), Action::End { .. }));
        }
        prop_assert_eq!(ends, 1);
    }
}
