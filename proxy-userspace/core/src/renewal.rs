//! When certificates are got from a CA, and when again: which name is next, and when, without a clock or a socket.
//!
//! A certificate is renewed at two thirds of its life, so that a CA may be gone for a third of it. What fails is tried again
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

    /// There is a certificate for `name`: issued just now, or found.
    pub fn have(&mut self, name: &str, validity: Validity, random: u64) {
        if let Some(entry) = self.names.get_mut(name) {
            *entry = Entry { validity: Some(validity), due: due(validity, random), failures: Failures::default() };
        }
    }

    /// The CA has issued a certificate for `name`. One that is due again at once, which a wrong clock makes of any, is not
    /// got again at once.
    pub fn issued(&mut self, name: &str, validity: Validity, now: Time, random: u64) {
        self.have(name, validity, random);
        self.authority = Failures::default();
        if let Some(entry) = self.names.get_mut(name) {
            let life = validity.expires.saturating_sub(validity.begins);
            entry.due = entry.due.max(now.saturating_add((life / 10).clamp(1, 3600)));
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

    /// The name that is next, and when: first those without a certificate, then those that expire first. `None`: none is
    /// wanted.
    pub fn next(&self, now: Time) -> Option<(&str, Time)> {
        let at = |name: &str| self.at(name).unwrap_or(Time::MAX).max(now);
        let urgency = |entry: &Entry| entry.validity.map_or(Time::MIN, |validity| validity.expires);
        let next = self.names.iter().min_by_key(|(name, entry)| (at(name), urgency(entry)))?;
        Some((next.0, at(next.0)))
    }

    /// When `name` is tried next; it may have to wait for its turn.
    pub fn at(&self, name: &str) -> Option<Time> {
        let entry = self.names.get(name)?;
        Some(entry.due.max(entry.failures.until).max(self.authority.until))
    }
}

/// Between 37/60 and 40/60 of its life: certificates that were issued together are not renewed together.
fn due(validity: Validity, random: u64) -> Time {
    let life = i128::from(validity.expires.saturating_sub(validity.begins).max(0));
    let jitter = life / 20 * i128::from(random >> 32) / (1 << 32);
    let due = i128::from(validity.begins) + life * 2 / 3 - jitter;
    Time::try_from(due).unwrap_or(Time::MAX)
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
