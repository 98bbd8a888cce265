//! When certificates are got from a CA, and when again: which name is next, and when, without a clock or a socket.
//!
//! A certificate is renewed at two thirds of its life, so that a CA may be gone for a third of it, or when the CA wants it
//! to be (RFC 9773), which is how a CA has certificates replaced that it will revoke. What fails is tried again
//! later, and each time later still. A CA that cannot be talked to holds up everything; a name that a CA refuses holds up
//! nothing but itself.

use std::{collections::BTreeMap, time::Duration};

/// Seconds since the Unix epoch.
pub type Time = i64;

/// From when to when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub begins: Time,
    pub expires: Time,
}

/// What a failure is a failure of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The CA cannot be reached, or will not have this account.
    Authority,
    /// This name.
    Name,
}

/// What is done next for a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// A certificate is got.
    Order,
    /// The CA is asked when it wants the certificate to be renewed.
    Advice,
}

/// What the CA says to that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// At some time between the two; it wants to be asked again later.
    Between { first: Time, last: Time, again: Time },
    /// It does not say such things.
    NotOffered,
    /// Nothing: it could not be talked to.
    NotHeard,
}

/// How often it is asked: as it says, within these bounds; every six hours where it says nothing.
const ASKED_AGAIN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(86_400));
const ASKED: i64 = 6 * 3600;

/// The wait after the first failure, and the longest; each is twice the one before. Public CAs take five failures of a name
/// within an hour, and forbid more for a while; not to answer costs them nothing.
const NAME: (Duration, Duration) = (Duration::from_secs(5 * 60), Duration::from_secs(12 * 3600));
const AUTHORITY: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));
/// What a CA asks for beyond this is a mistake of its clock or ours.
const LONGEST_WISH: Duration = Duration::from_secs(7 * 86_400);

/// The names that are wanted, and when each is next.
#[derive(Debug, Clone, Default)]
pub struct Renewals {
    names: BTreeMap<String, Entry>,
    authority: Failures,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Entry {
    /// `None`: there is no certificate yet.
    validity: Option<Validity>,
    /// When its next one is due, failures left aside.
    due: Time,
    /// … at the earliest, whatever the CA wants.
    earliest: Time,
    /// When the CA is asked for its advice, and what it said last.
    ask: Time,
    advised: Option<(Time, Time)>,
    failures: Failures,
}

/// In a row, and until when nothing is tried because of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Failures {
    count: u32,
    until: Time,
}

impl Failures {
    fn another(&mut self, (first, longest): (Duration, Duration), wish: Option<Time>, now: Time, random: u64) {
        let wait = back_off(self.count, first, longest, random);
        let latest = after(now, LONGEST_WISH);
        self.until = after(now, wait).max(wish.unwrap_or(now).min(latest));
        self.count = self.count.saturating_add(1);
    }
}

impl Renewals {
    /// From now on these names are wanted, and no others. Those that were wanted before go on where they were.
    pub fn want(&mut self, names: impl IntoIterator<Item = String>) {
        let mut before = std::mem::take(&mut self.names);
        self.names =
            names.into_iter().map(|name| (before.remove_entry(&name)).unwrap_or((name, Entry::default()))).collect();
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// There is a certificate for `name` already. After a restart the CA is not asked for its advice on all at once.
    pub fn found(&mut self, name: &str, validity: Validity, now: Time, random: u64) {
        if let Some(entry) = self.names.get_mut(name) {
            let ask = now.saturating_add(share(ASKED, random.rotate_left(16)));
            *entry = Entry { validity: Some(validity), due: due(validity, random), ask, ..Entry::default() };
        }
    }

    /// The CA has issued a certificate for `name`. One that is due again at once, which a wrong clock makes of any, is not
    /// got again at once.
    pub fn issued(&mut self, name: &str, validity: Validity, now: Time, random: u64) {
        self.authority = Failures::default();
        if let Some(entry) = self.names.get_mut(name) {
            let life = validity.expires.saturating_sub(validity.begins);
            let earliest = now.saturating_add((life / 10).clamp(1, 3600));
            let due = due(validity, random).max(earliest);
            *entry = Entry { validity: Some(validity), due, earliest, ask: now, ..Entry::default() };
        }
    }

    /// The CA was asked for its advice on the certificate for `name`. It is not kept beyond nine tenths of its life.
    pub fn advised(&mut self, name: &str, advice: Advice, now: Time, random: u64) {
        let Some((entry, validity)) = self.names.get_mut(name).and_then(|entry| entry.validity.map(|v| (entry, v)))
        else {
            return;
        };
        match advice {
            Advice::NotOffered => entry.ask = Time::MAX,
            Advice::NotHeard => entry.ask = now.saturating_add(ASKED + share(ASKED, random)),
            Advice::Between { first, last, again } => {
                entry.ask = again.clamp(after(now, ASKED_AGAIN.0), after(now, ASKED_AGAIN.1));
                // The same advice is not another choice.
                if entry.advised.replace((first, last)) != Some((first, last)) {
                    let chosen = first.saturating_add(share(last.saturating_sub(first).max(0), random));
                    entry.due = chosen.min(part(validity, 9, 10)).max(entry.earliest);
                }
            }
        }
    }

    /// `wish`: when the CA wants to be asked again (`Retry-After`).
    pub fn failed(&mut self, name: &str, scope: Scope, wish: Option<Time>, now: Time, random: u64) {
        match scope {
            Scope::Authority => self.authority.another(AUTHORITY, wish, now, random),
            Scope::Name => {
                // It has answered.
                self.authority = Failures::default();
                if let Some(entry) = self.names.get_mut(name) {
                    entry.failures.another(NAME, wish, now, random);
                }
            }
        }
    }

    /// What is next, and when: orders before advice, first for those without a certificate, then for those that expire
    /// first. `None`: no name is wanted.
    pub fn next(&self, now: Time) -> Option<(&str, Step, Time)> {
        let step = |(name, entry)| {
            let entry: &Entry = entry;
            let (order, ask) = (self.order(entry).max(now), entry.ask.max(self.authority.until).max(now));
            let expires = entry.validity.map_or(Time::MIN, |validity| validity.expires);
            let (at, step) =
                if ask < order && expires > Time::MIN { (ask, Step::Advice) } else { (order, Step::Order) };
            (at, step, expires, name)
        };
        let (at, step, _, name): (_, _, _, &String) = self.names.iter().map(step).min()?;
        Some((name, step, at))
    }

    /// When `name` is ordered next; it may have to wait for its turn.
    pub fn at(&self, name: &str) -> Option<Time> {
        self.names.get(name).map(|entry| self.order(entry))
    }

    fn order(&self, entry: &Entry) -> Time {
        entry.due.max(entry.failures.until).max(self.authority.until)
    }
}

/// Between 37/60 and 40/60 of its life: certificates that were issued together are not renewed together.
fn due(validity: Validity, random: u64) -> Time {
    let life = validity.expires.saturating_sub(validity.begins).max(0);
    part(validity, 2, 3).saturating_sub(share(life / 20, random))
}

/// When so much of its life is over.
fn part(validity: Validity, of: i128, all: i128) -> Time {
    let (begins, expires) = (i128::from(validity.begins), i128::from(validity.expires));
    Time::try_from(begins + (expires - begins).max(0) * of / all).unwrap_or(Time::MAX)
}

/// Somewhere from 0 to `whole`.
fn share(whole: i64, random: u64) -> i64 {
    i64::try_from(i128::from(whole) * i128::from(random >> 32) / (1 << 32)).unwrap_or(whole)
}

/// Twice as long after each failure, and up to a quarter longer than that, so that many daemons do not come together when
/// a CA is back.
fn back_off(failures: u32, first: Duration, longest: Duration, random: u64) -> Duration {
    let wait = first.saturating_mul(1 << failures.min(20)).min(longest);
    wait + wait.mul_f64((random >> 32) as f64 / f64::from(u32::MAX) / 4.0)
}

fn after(now: Time, wait: Duration) -> Time {
    // A part of a second counts whole: never earlier than asked.
    now.saturating_add(i64::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
