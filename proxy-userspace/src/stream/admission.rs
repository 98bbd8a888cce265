//! Who may open a connection on a route: networks, and limits that all workers share.
//!
//! The same meaning as in the nft engine: `connections` and `connections_per_client` count what is open,
//! `rate_per_client` is a bucket of `count` connections that fills at `count` per unit.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use proxy_core::{
    config::{self, Rate, RateUnit},
    reason::Reason,
};

/// Clients are spread over so many locks; routes without limits per client take none.
const SHARDS: usize = 16;
/// Clients remembered per lock at most; beyond, those with nothing open are forgotten. The nft engine's sets hold as many.
const CLIENTS: usize = 65_536 / SHARDS;

/// What is open on a route, and who opened it. Outlives changes of the route.
#[derive(Debug, Default)]
pub struct Admission {
    open: AtomicU32,
    hash: RandomState,
    shards: [Mutex<HashMap<IpAddr, Client>>; SHARDS],
}

#[derive(Debug, Default, Clone, Copy)]
struct Client {
    open: u32,
    /// Nanoseconds of the bucket that are used up at `seen`.
    used: u64,
    seen: Duration,
}

/// What a connection has been counted in; given back to [`Admission::leave`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// Counted for this client.
    client: Option<IpAddr>,
}

/// A place under a route's limits, given back when dropped.
#[derive(Debug)]
pub struct Seat {
    pub admission: Arc<Admission>,
    pub admitted: Admitted,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.admission.leave(self.admitted);
    }
}

impl Admission {
    /// `now`: on a monotonic clock that all workers share.
    pub fn enter(&self, route: &config::Route, client: IpAddr, now: Duration) -> Result<Admitted, Reason> {
        let client = client.to_canonical();
        if !may(route, client) {
            return Err(Reason::Denied);
        }
        let limits = &route.limits;
        let open = self.open.fetch_add(1, Relaxed);
        if limits.connections.is_some_and(|max| open >= max.get()) {
            self.open.fetch_sub(1, Relaxed);
            return Err(Reason::LimitConnections);
        }
        if limits.connections_per_client.is_none() && limits.rate_per_client.is_none() {
            return Ok(Admitted { client: None });
        }
        let counted = self.with(client, |known| {
            if limits.connections_per_client.is_some_and(|max| known.open >= max.get()) {
                return Err(Reason::LimitPerClient);
            }
            if limits.rate_per_client.is_some_and(|rate| !known.take(rate, now)) {
                return Err(Reason::LimitRate);
            }
            known.open += 1;
            Ok(Admitted { client: Some(client) })
        });
        if counted.is_err() {
            self.open.fetch_sub(1, Relaxed);
        }
        counted
    }

    /// Counts a connection that is there already.
    pub fn enter_anyway(&self, route: &config::Route, client: IpAddr) -> Admitted {
        let client = client.to_canonical();
        self.open.fetch_add(1, Relaxed);
        let limits = &route.limits;
        if limits.connections_per_client.is_none() && limits.rate_per_client.is_none() {
            return Admitted { client: None };
        }
        self.with(client, |known| known.open += 1);
        Admitted { client: Some(client) }
    }

    pub fn leave(&self, admitted: Admitted) {
        self.open.fetch_sub(1, Relaxed);
        if let Some(client) = admitted.client {
            self.with(client, |known| known.open = known.open.saturating_sub(1));
        }
    }

    fn with<T>(&self, client: IpAddr, change: impl FnOnce(&mut Client) -> T) -> T {
        let shard = &self.shards[self.hash.hash_one(client) as usize % SHARDS];
        let mut clients = shard.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if clients.len() >= CLIENTS && !clients.contains_key(&client) {
            // Those that have a bucket to refill lose it: a table of strangers cannot shut out everyone else.
            clients.retain(|_, known| known.open > 0);
        }
        let known = clients.entry(client).or_default();
        let result = change(known);
        if known.open == 0 && known.used == 0 {
            clients.remove(&client);
        }
        result
    }
}

impl Client {
    /// Takes one connection out of the bucket, if there is one in it.
    fn take(&mut self, rate: Rate, now: Duration) -> bool {
        let unit = match rate.per {
            RateUnit::Second => 1_000_000_000u64,
            RateUnit::Minute => 60_000_000_000,
            RateUnit::Hour => 3_600_000_000_000,
        };
        let one = unit / u64::from(rate.count.get());
        let passed = u64::try_from(now.saturating_sub(self.seen).as_nanos()).unwrap_or(u64::MAX);
        let used = self.used.saturating_sub(passed);
        (self.seen, self.used) = (now, used);
        // A bucket of `count` holds one unit of time.
        let fits = used + one <= unit;
        if fits {
            self.used = used + one;
        }
        fits
    }
}

/// `deny` wins over `allow`; an empty `allow` is everyone.
fn may(route: &config::Route, client: IpAddr) -> bool {
    let denied = route.deny.iter().any(|net| net.contains(&client));
    !denied && (route.allow.is_empty() || route.allow.iter().any(|net| net.contains(&client)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn route(extra: &str) -> Arc<config::Route> {
        let text =
            format!("[[route]]\nname = \"web\"\nlisten = [\"10.0.0.1:80\"]\nbackends = [\"10.0.1.1:80\"]\n{extra}\n");
        let config = config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
        config.routes[0].clone()
    }

    const ALICE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 1));
    const BOB: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 2));

    #[test]
    fn deny_wins_over_allow_and_v4_mapped_clients_are_what_they_are() {
        let route = route("allow = [\"10.1.0.0/16\"]\ndeny = [\"10.1.0.2/32\"]");
        let admission = Admission::default();
        let mapped = "::ffff:10.1.0.2".parse().expect("an address");
        let other = "10.2.0.1".parse().expect("an address");
        let enter = |client| admission.enter(&route, client, Duration::ZERO).map(drop);
        assert_eq!(enter(ALICE), Ok(()));
        assert_eq!([BOB, mapped, other].map(enter), [Err(Reason::Denied); 3]);
    }

    #[test]
    fn what_leaves_makes_room() {
        let route = route("limits = { connections = 3, connections_per_client = 2 }");
        let admission = Admission::default();
        let enter = |client| admission.enter(&route, client, Duration::ZERO);
        let first = enter(ALICE).expect("room");
        enter(ALICE).expect("room");
        assert_eq!(enter(ALICE), Err(Reason::LimitPerClient));
        enter(BOB).expect("room");
        assert_eq!(enter(BOB), Err(Reason::LimitConnections));
        admission.leave(first);
        enter(ALICE).expect("room again");
    }

    #[test]
    fn a_rate_is_a_bucket_that_fills_evenly() {
        let route = route("limits = { rate_per_client = \"3/second\" }");
        let admission = Admission::default();
        let enter = |ms| admission.enter(&route, ALICE, Duration::from_millis(ms)).map(|a| admission.leave(a));
        assert_eq!([0, 0, 0].map(enter), [Ok(()); 3]);
        assert_eq!(enter(300), Err(Reason::LimitRate));
        assert_eq!([enter(340), enter(350)], [Ok(()), Err(Reason::LimitRate)]);
        assert_eq!([5000, 5000, 5000, 5000].map(enter), [Ok(()), Ok(()), Ok(()), Err(Reason::LimitRate)]);
    }
}
