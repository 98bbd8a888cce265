//! Source ports towards backends that stay taken without a socket.
//!
//! The kernel would give the port of a connection that has been handed over out again. So the daemon takes the ports of such
//! connections from a range of its own, kept out of the kernel's hands by `net.ipv4.ip_local_reserved_ports`. A port is
//! taken once per backend, whatever the source address: towards others it is free.

use std::{
    collections::HashMap,
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Below the ports that Linux gives out by itself (32768–60999), above those that services like to listen on.
pub const RESERVED: RangeInclusive<u16> = 12_288..=32_767;

const COUNT: usize = (*RESERVED.end() - *RESERVED.start()) as usize + 1;
/// Backends are spread over so many locks.
const SHARDS: usize = 16;

/// The reserved ports of all backends. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct SourcePorts(Arc<[Mutex<HashMap<SocketAddr, Taken>>; SHARDS]>);

/// The ports that are taken towards one backend.
#[derive(Debug)]
struct Taken {
    bits: Box<[u64]>,
    count: usize,
    /// Where the search goes on: a port that was given back rests until all others have had their turn.
    next: usize,
}

/// A port that is nobody else's towards its backend until this is dropped.
#[derive(Debug)]
pub struct SourcePort {
    ports: SourcePorts,
    backend: SocketAddr,
    port: u16,
}

impl SourcePorts {
    /// `None` when every port towards this backend is taken.
    pub fn take(&self, backend: SocketAddr) -> Option<SourcePort> {
        let port = self.shard(backend).entry(backend).or_default().take()?;
        Some(SourcePort { ports: self.clone(), backend, port })
    }

    /// The port of a connection that lives already; `None` when it is not one of the range, or taken.
    pub fn adopt(&self, backend: SocketAddr, port: u16) -> Option<SourcePort> {
        let index = usize::from(port.checked_sub(*RESERVED.start()).filter(|_| RESERVED.contains(&port))?);
        let mut shard = self.shard(backend);
        shard.entry(backend).or_default().mark(index).then(|| SourcePort { ports: self.clone(), backend, port })
    }

    /// Ports taken towards all backends.
    pub fn taken(&self) -> usize {
        self.0.iter().map(|shard| lock(shard).values().map(|taken| taken.count).sum::<usize>()).sum()
    }

    fn shard(&self, backend: SocketAddr) -> MutexGuard<'_, HashMap<SocketAddr, Taken>> {
        let ip = match backend.ip() {
            std::net::IpAddr::V4(ip) => ip.octets()[3],
            std::net::IpAddr::V6(ip) => ip.octets()[15],
        };
        lock(&self.0[(usize::from(ip) ^ usize::from(backend.port())) % SHARDS])
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SourcePort {
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for SourcePort {
    fn drop(&mut self) {
        let mut shard = self.ports.shard(self.backend);
        let Some(taken) = shard.get_mut(&self.backend) else { return };
        taken.free(usize::from(self.port - *RESERVED.start()));
    }
}

impl Default for Taken {
    fn default() -> Self {
        Self { bits: vec![0; COUNT.div_ceil(64)].into(), count: 0, next: 0 }
    }
}

impl Taken {
    fn take(&mut self) -> Option<u16> {
        if self.count == COUNT {
            return None;
        }
        let index = self.free_from(self.next).or_else(|| self.free_from(0))?;
        self.next = (index + 1) % COUNT;
        self.mark(index);
        Some(*RESERVED.start() + index as u16)
    }

    /// The first free one of these and those behind them, a word at a time.
    fn free_from(&self, first: usize) -> Option<usize> {
        let below = |index: usize| (1 << (index % 64)) - 1;
        let masked = |word: usize| self.bits[word] | if word == first / 64 { below(first) } else { 0 };
        let word = (first / 64..self.bits.len()).find(|word| masked(*word) != u64::MAX)?;
        let index = word * 64 + masked(word).trailing_ones() as usize;
        (index < COUNT).then_some(index)
    }

    /// False when it was taken.
    fn mark(&mut self, index: usize) -> bool {
        let bit = 1 << (index % 64);
        let was_free = self.bits[index / 64] & bit == 0;
        self.bits[index / 64] |= bit;
        self.count += usize::from(was_free);
        was_free
    }

    fn free(&mut self, index: usize) {
        self.bits[index / 64] &= !(1 << (index % 64));
        self.count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 443))
    }

    #[test]
    fn a_port_is_taken_once_per_backend_and_comes_back_last() {
        let ports = SourcePorts::default();
        let first = ports.take(backend(1)).expect("a port");
        assert_eq!(ports.take(backend(2)).expect("a port").port(), first.port());
        let (number, second) = (first.port(), ports.take(backend(1)).expect("a port"));
        assert_ne!(second.port(), number);
        drop(first);
        let third = ports.take(backend(1)).expect("a port");
        assert!(third.port() > second.port(), "the one that came back rests");
        assert_eq!(ports.taken(), 2);
    }

    #[test]
    fn a_backend_has_the_whole_range_and_no_more() {
        let ports = SourcePorts::default();
        let all: Vec<SourcePort> = std::iter::from_fn(|| ports.take(backend(1))).collect();
        assert_eq!(all.len(), RESERVED.count());
        assert!(all.iter().all(|port| RESERVED.contains(&port.port())));
        drop(all);
        assert_eq!(ports.taken(), 0);
    }

    #[test]
    fn a_port_that_lives_already_is_not_given_out() {
        let ports = SourcePorts::default();
        let adopted = ports.adopt(backend(1), *RESERVED.start()).expect("free");
        assert!(ports.adopt(backend(1), *RESERVED.start()).is_none());
        assert!(ports.adopt(backend(1), 80).is_none() && ports.adopt(backend(1), 40_000).is_none());
        assert_ne!(ports.take(backend(1)).expect("a port").port(), adopted.port());
    }
}
