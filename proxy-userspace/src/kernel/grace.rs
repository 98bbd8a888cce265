//! Waiting until every packet that was being received has been received.
//!
//! The kernel brings a packet from its interface to its socket within one RCU read section (`__netif_receive_skb`,
//! `ip_local_deliver_finish`). `membarrier(MEMBARRIER_CMD_GLOBAL)` waits for all sections that were under way when it was
//! called (`synchronize_rcu`, v4.3+). It takes milliseconds, so a thread does it for everybody who waits.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread::{self, Thread},
    time::Duration,
};

/// Where the kernel cannot say (`nohz_full`): far longer than a packet takes through the stack.
const LONG_ENOUGH: Duration = Duration::from_millis(100);
/// A thread that is asked nothing looks so often whether anybody could still ask.
const IDLE: Duration = Duration::from_secs(1);

/// Cheap to ask; the answer comes later.
#[derive(Debug, Default)]
pub struct Grace {
    /// The last wait that anybody needs …
    asked: AtomicU64,
    /// … that has begun …
    begun: AtomicU64,
    /// … and that is over.
    ended: AtomicU64,
    thread: OnceLock<Thread>,
}

/// What has been received before it was given out has been received when it has [`Grace::passed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

impl Grace {
    pub fn start() -> io::Result<Arc<Self>> {
        let grace = Arc::new(Self::default());
        let owned = Arc::downgrade(&grace);
        let run = move || {
            while let Some(grace) = owned.upgrade() {
                if grace.asked.load(SeqCst) > grace.ended.load(SeqCst) {
                    let number = grace.begun.fetch_add(1, SeqCst) + 1;
                    wait_for_readers();
                    grace.ended.store(number, SeqCst);
                } else {
                    drop(grace);
                    thread::park_timeout(IDLE);
                }
            }
        };
        let thread = thread::Builder::new().name("grace".into()).spawn(run)?;
        let _ = grace.thread.set(thread.thread().clone());
        Ok(grace)
    }

    /// The next wait to begin is after now.
    pub fn ask(&self) -> Ticket {
        let next = self.begun.load(SeqCst) + 1;
        self.asked.fetch_max(next, SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
        Ticket(next)
    }

    pub fn passed(&self, ticket: Ticket) -> bool {
        self.ended.load(SeqCst) >= ticket.0
    }
}

fn wait_for_readers() {
    const GLOBAL: libc::c_int = 1;
    // SAFETY: it takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result != 0 {
        thread::sleep(LONG_ENOUGH);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_is_asked_for_comes_and_the_next_is_another() {
        let grace = Grace::start().expect("a thread");
        for _ in 0..3 {
            let (ticket, began) = (grace.ask(), Instant::now());
            assert!(!grace.passed(Ticket(ticket.0 + 1)));
            while !grace.passed(ticket) {
                assert!(began.elapsed() < Duration::from_secs(5), "{grace:?}");
                thread::yield_now();
            }
        }
    }
}
