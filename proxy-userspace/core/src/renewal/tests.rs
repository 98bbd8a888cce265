use proptest::prelude::*;

use super::*;

const DAY: Time = 86_400;
const NOW: Time = 1_800_000_000;

fn renewals(names: &[&str]) -> Renewals {
    let mut renewals = Renewals::default();
    renewals.want(names.iter().map(ToString::to_string));
    renewals
}

fn days(first: Time, last: Time) -> Validity {
    Validity { begins: NOW + first * DAY, expires: NOW + last * DAY }
}

#[test]
fn a_name_without_a_certificate_is_due_at_once_and_before_all_others() {
    let mut all = renewals(&["a", "b", "c"]);
    all.have("a", days(-80, 10), 0);
    all.have("c", days(-80, 9), 0);
    assert_eq!(all.next(NOW), Some(("b", NOW)));
    all.issued("b", days(0, 90), NOW, 0);
    assert_eq!(all.next(NOW), Some(("c", NOW)), "overdue both: the one that expires first");
    all.issued("c", days(0, 90), NOW, 0);
    all.issued("a", days(0, 60), NOW, 0);
    assert_eq!(all.next(NOW), Some(("a", NOW + 40 * DAY)));
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
    all.have("good", days(-1, 89), 0);
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
    assert_eq!(all.next(NOW), Some(("a", NOW + 40)));
    all.failed("a", Scope::Name, None, NOW + 40, 0);
    assert_eq!(all.next(NOW + 40), Some(("b", NOW + 40)), "it answers, though it will not have a");
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
fn names_that_stay_go_on_where_they_were() {
    let mut all = renewals(&["gone", "stays"]);
    all.issued("stays", days(0, 90), NOW, 0);
    all.want(["new".to_owned(), "stays".to_owned()]);
    assert_eq!(all.names().collect::<Vec<_>>(), ["new", "stays"]);
    assert_eq!((all.at("gone"), all.at("stays")), (None, Some(NOW + 60 * DAY)));
    assert_eq!(all.next(NOW), Some(("new", NOW)));
}

proptest! {
    #[test]
    fn whatever_a_certificate_says_the_times_are_in_order(
        begins: i64, expires: i64, now: i64, random: u64, wish: Option<i64>, failures in 0u32..40
    ) {
        let mut all = renewals(&["a"]);
        all.issued("a", Validity { begins, expires }, now, random);
        let due = all.at("a").unwrap_or_default();
        prop_assert!(due > now || now > i64::MAX - 3600);
        let mut last = now;
        for _ in 0..failures {
            all.failed("a", Scope::Name, wish, last, random);
            let next = all.at("a").unwrap_or_default();
            prop_assert!(next >= last);
            last = next;
        }
    }
}
