//! Whether the ends of a connection without an idle limit are still there: what keepalive does for sockets (RFC 1122 §4.2.3.6).

use std::{fs, time::Duration};

use proxy_core::session::Tick;

/// As the kernel would ask for this network namespace.
#[derive(Debug, Clone, Copy)]
pub struct Probing {
    /// Silence before the first probe.
    pub after: Duration,
    /// From one to the next.
    pub every: Duration,
    /// Unanswered ones until the end is taken for gone.
    pub times: u8,
}

/// What one end has been asked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// When it was heard of last.
    heard: Tick,
    unanswered: u8,
}

/// What is to be done about one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Wait,
    Ask,
    Gone,
}

impl Probing {
    /// `net.ipv4.tcp_keepalive_*`, which are for IPv6 too.
    pub fn of_this_namespace() -> Self {
        let read = |name: &str, otherwise: u64| {
            let text = fs::read_to_string(format!("/proc/sys/net/ipv4/tcp_keepalive_{name}")).ok();
            text.and_then(|text| text.trim().parse().ok()).unwrap_or(otherwise)
        };
        Self {
            after: Duration::from_secs(read("time", 7200)),
            every: Duration::from_secs(read("intvl", 75)),
            times: u8::try_from(read("probes", 9)).unwrap_or(u8::MAX),
        }
    }
}

impl Asked {
    pub fn since(heard: Tick) -> Self {
        Self { heard, unanswered: 0 }
    }

    /// A packet of this end has come then.
    pub fn heard(&mut self, at: Tick) {
        if at > self.heard {
            *self = Self::since(at);
        }
    }

    pub fn due(&self, probing: &Probing) -> Tick {
        self.heard.after(probing.after + probing.every * u32::from(self.unanswered))
    }

    /// To be called when it is due; counts the probe that is then sent.
    pub fn next(&mut self, probing: &Probing, now: Tick) -> Next {
        match (self.due(probing) <= now, self.unanswered < probing.times) {
            (false, _) => Next::Wait,
            (true, true) => {
                self.unanswered += 1;
                Next::Ask
            }
            (true, false) => Next::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_does_not_answer_is_gone_and_one_that_does_is_left_alone() {
        let probing = Probing { after: Duration::from_secs(10), every: Duration::from_secs(2), times: 2 };
        let mut asked = Asked::since(Tick(0));
        assert_eq!(asked.next(&probing, Tick(9_999)), Next::Wait);
        assert_eq!([10_000, 11_000].map(|at| asked.next(&probing, Tick(at))), [Next::Ask, Next::Wait]);
        let mut silent = asked;
        assert_eq!([12_000, 14_000].map(|at| silent.next(&probing, Tick(at))), [Next::Ask, Next::Gone]);
        asked.heard(Tick(10_050));
        assert_eq!(asked.due(&probing), Tick(20_050));
    }
}
