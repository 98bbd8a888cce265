use proptest::prelude::*;

use super::*;

const DAY: Time = 86_400;
const NOW: Time = 1_800_000_000;

fn renewals(names: &[&str]) -> Renewals {
    let mut renewals = Renewals::default();
    renewals.want(names.iter().map(ToString::to_string));
    renewals
}

/// The next order, all advice left aside.
fn next_order(all: &Renewals, now: Time) -> Option<(String, Time)> {
    let mut all = all.clone();
    all.names.values_mut().for_each(|entry| entry.ask = Time::MAX);
    let (name, step, at) = all.next(now)?;
    assert_eq!(step, Step::Order);
    Some((name.to_owned(), at))
}

fn order(name: &str, at: Time) -> Option<(String, Time)> {
    Some((name.to_owned(), at))
}

fn days(first: Time, last: Time) -> Validity {
    Validity { begins: NOW + first * DAY, expires: NOW + last * DAY }
}

#[test]
fn a_name_without_a_certificate_is_due_at_once_and_before_all_others() {
    let mut all = renewals(&["a", "b", "c"]);
    all.found("a", days(-80, 10), NOW, 0);
    all.found("c", days(-80, 9), NOW, 0);
    assert_eq!(next_order(&all, NOW), order("b", NOW));
    all.issued("b", days(0, 90), NOW, 0);
    assert_eq!(next_order(&all, NOW), order("c", NOW), "overdue both: the one that expires first");
    all.issued("c", days(0, 90), NOW, 0);
    all.issued("a", days(0, 60), NOW, 0);
    assert_eq!(next_order(&all, NOW), order("a", NOW + 40 * DAY));
    assert_eq!(Renewals::default().next(NOW), None);
}

#[test]
fn a_certificate_is_renewed_at_two_thirds_of_its_life_or_a_twentieth_earlier() {
    assert_eq!(due(days(0, 90), 0), NOW + 60 * DAY);
    let earliest = due(days(0, 90), u64::MAX);
    assert!((NOW + 55 * DAY..NOW + 56 * DAY).contains(&earliest), "{earliest}");
    let seconds = Validity { begins: NOW, expires: NOW + 12 };
    assert_eq!(due(seconds, 0), NOW + 8);
}

#[test]
fn a_name_that_fails_waits_twice_as_long_each_time_and_holds_up_no_other() {
    let mut all = renewals(&["bad", "good"]);
    all.found("good", days(-1, 89), NOW, 0);
    let mut now = NOW;
    let mut waits = Vec::new();
    for _ in 0..12 {
        all.failed("bad", Scope::Name, None, now, 0);
        let at = all.at("bad").unwrap_or_default();
        waits.push((at - now) / 60);
        now = at;
    }
    assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 640, 720, 720, 720, 720]);
    assert_eq!(all.at("good"), Some(NOW + 59 * DAY));
    all.issued("bad", days(0, 90), now, 0);
    all.failed("bad", Scope::Name, None, NOW + 60 * DAY, 0);
    assert_eq!(all.at("bad"), Some(NOW + 60 * DAY + 300), "it begins anew");
}

#[test]
fn a_ca_that_is_gone_holds_up_all_names_until_it_answers_one() {
    let mut all = renewals(&["a", "b"]);
    for _ in 0..3 {
        all.failed("a", Scope::Authority, None, NOW, 0);
    }
    assert_eq!((all.at("a"), all.at("b")), (Some(NOW + 40), Some(NOW + 40)));
    assert_eq!(next_order(&all, NOW), order("a", NOW + 40));
    all.failed("a", Scope::Name, None, NOW + 40, 0);
    assert_eq!(next_order(&all, NOW + 40), order("b", NOW + 40), "it answers, though it will not have a");
}

#[test]
fn what_the_ca_wishes_is_kept_unless_it_is_absurd() {
    let mut all = renewals(&["a"]);
    all.failed("a", Scope::Name, Some(NOW + 3600), NOW, 0);
    assert_eq!(all.at("a"), Some(NOW + 3600));
    all.failed("a", Scope::Name, Some(NOW + 1), NOW, 0);
    assert_eq!(all.at("a"), Some(NOW + 600), "never sooner than it would be");
    all.failed("a", Scope::Authority, Some(Time::MAX), NOW, 0);
    assert_eq!(all.at("a"), Some(NOW + 7 * DAY));
}

#[test]
fn a_certificate_that_is_due_when_it_comes_is_not_got_again_at_once() {
    let mut all = renewals(&["a"]);
    all.issued("a", days(-90, 0), NOW, 0);
    assert_eq!(all.at("a"), Some(NOW + 3600));
    all.issued("a", Validity { begins: NOW, expires: NOW }, NOW, 0);
    assert_eq!(all.at("a"), Some(NOW + 1));
}

#[test]
fn the_ca_may_want_a_certificate_renewed_at_another_time_and_is_heard() {
    let mut all = renewals(&["a"]);
    assert_eq!(all.next(NOW), Some(("a", Step::Order, NOW)));
    all.advised("a", Advice::NotHeard, NOW, 0);
    assert_eq!(all.next(NOW), Some(("a", Step::Order, NOW)), "there is nothing to be advised on");
    all.issued("a", days(0, 90), NOW, 0);
    assert_eq!(all.next(NOW), Some(("a", Step::Advice, NOW)));
    let between = |first: Time, last: Time| Advice::Between { first, last, again: NOW + 7200 };
    all.advised("a", between(NOW + 30 * DAY, NOW + 32 * DAY), NOW, 1 << 63);
    assert_eq!((all.next(NOW), all.at("a")), (Some(("a", Step::Advice, NOW + 7200)), Some(NOW + 31 * DAY)));
    all.advised("a", between(NOW + 30 * DAY, NOW + 32 * DAY), NOW, 0);
    assert_eq!(all.at("a"), Some(NOW + 31 * DAY), "the same advice is the same time");
    all.advised("a", between(NOW - DAY, NOW - 1), NOW + 7200, 0);
    assert_eq!(all.next(NOW + 7200), Some(("a", Step::Order, NOW + 7200)), "it will be revoked: now");
    all.issued("a", days(0, 90), NOW, 0);
    all.advised("a", between(NOW - DAY, NOW - 1), NOW, 0);
    assert_eq!(all.at("a"), Some(NOW + 3600), "but not each new one again at once");
    all.advised("a", between(NOW + 200 * DAY, NOW + 300 * DAY), NOW, 0);
    assert_eq!(all.at("a"), Some(NOW + 81 * DAY), "nor ever later than it is good for");
}

#[test]
fn advice_is_asked_for_as_often_as_the_ca_says_and_not_of_one_that_gives_none() {
    let mut all = renewals(&["a"]);
    all.found("a", days(0, 90), NOW, u64::MAX);
    let asked = |all: &Renewals| all.next(NOW).map(|(_, step, at)| (step, at - NOW));
    assert_eq!(asked(&all), Some((Step::Advice, 6 * 3600 - 1)), "found: some time within six hours");
    for (again, kept) in [(0, 60), (3600, 3600), (Time::MAX - NOW, DAY)] {
        all.advised("a", Advice::Between { first: NOW, last: NOW + 60 * DAY, again: NOW + again }, NOW, u64::MAX);
        assert_eq!(asked(&all), Some((Step::Advice, kept)));
    }
    all.advised("a", Advice::NotHeard, NOW, 0);
    assert_eq!(asked(&all), Some((Step::Advice, 6 * 3600)));
    let due = all.at("a").unwrap_or_default();
    all.advised("a", Advice::NotOffered, NOW, 0);
    assert_eq!(asked(&all), Some((Step::Order, due - NOW)));
}

#[test]
fn names_that_stay_go_on_where_they_were() {
    let mut all = renewals(&["gone", "stays"]);
    all.issued("stays", days(0, 90), NOW, 0);
    all.want(["new".to_owned(), "stays".to_owned()]);
    assert_eq!(all.names().collect::<Vec<_>>(), ["new", "stays"]);
    assert_eq!((all.at("gone"), all.at("stays")), (None, Some(NOW + 60 * DAY)));
    assert_eq!(next_order(&all, NOW), order("new", NOW));
}

proptest! {
    #[test]
    fn whatever_a_certificate_says_the_times_are_in_order(
        begins: i64, expires: i64, now: i64, random: u64, wish: Option<i64>, failures in 0u32..40, advice: (i64, i64, i64)
    ) {
        let mut all = renewals(&["a"]);
        all.issued("a", Validity { begins, expires }, now, random);
        let due = all.at("a").unwrap_or_default();
        prop_assert!(due > now || now > i64::MAX - 3600);
        let (first, last, again) = advice;
        all.advised("a", Advice::Between { first, last, again }, now, random);
        prop_assert!(all.at("a").unwrap_or_default() > now || now > i64::MAX - 3600);
        let mut last = now;
        for _ in 0..failures {
            all.failed("a", Scope::Name, wish, last, random);
            let next = all.at("a").unwrap_or_default();
            prop_assert!(next >= last);
            last = next;
        }
    }
}
