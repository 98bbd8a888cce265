//! A UDP server that says who it is.

use std::{
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::host::Host;
use anyhow::Result;

/// How often an idle server looks whether it shall stop.
const LOOK_UP: Duration = Duration::from_millis(50);

/// Answers every datagram with its name, a colon and the datagram; from the address it was sent to only on hosts with one
/// address per family.
#[derive(Debug)]
pub struct UdpServer {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    datagrams: AtomicU64,
    bytes: AtomicU64,
    stop: AtomicBool,
}

impl UdpServer {
    /// Listens on `port` of `host`, both families.
    pub fn start(host: &Host, port: u16, name: &str) -> Result<Self> {
        let socket = host.udp(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))?;
        socket.set_read_timeout(Some(LOOK_UP))?;
        let counts = Arc::new(Counts::default());
        let thread = {
            let (counts, name) = (Arc::clone(&counts), name.to_owned());
            thread::spawn(move || answer(&socket, &counts, &name))
        };
        Ok(Self { counts, thread: Some(thread) })
    }

    /// Datagrams that came.
    pub fn datagrams(&self) -> u64 {
        self.counts.datagrams.load(Ordering::Relaxed)
    }

    /// UDP payload bytes that came.
    pub fn bytes(&self) -> u64 {
        self.counts.bytes.load(Ordering::Relaxed)
    }
}

fn answer(socket: &UdpSocket, counts: &Counts, name: &str) {
    let mut buffer = vec![0; 64 * 1024];
    while !counts.stop.load(Ordering::Relaxed) {
        // An ICMP error for an earlier answer shows up here as an error of this read, as does the timeout.
        let Ok((n, from)) = socket.recv_from(&mut buffer) else { continue };
        counts.datagrams.fetch_add(1, Ordering::Relaxed);
        counts.bytes.fetch_add(n as u64, Ordering::Relaxed);
        let _ = socket.send_to(&[name.as_bytes(), b":", &buffer[..n]].concat(), from);
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.counts.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
