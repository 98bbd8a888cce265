//! `ct timeout` objects.

use proxy_core::{config::Protocol, ruleset::TimeoutPolicy};

use super::uapi::object;
use crate::kernel::netlink::Attributes;

/// The states of TCP that a policy does not name keep what the kernel ships with, seconds
/// (`tcp_timeouts` of `nf_conntrack_proto_tcp.c`).
const SYN_RECV: u32 = 60;
const SYN_SENT2: u32 = 120;
const RETRANS: u32 = 300;
const UNACKNOWLEDGED: u32 = 300;

pub const fn protocol(policy: &TimeoutPolicy) -> Protocol {
    match policy {
        TimeoutPolicy::Tcp { .. } => Protocol::Tcp,
        TimeoutPolicy::Udp { .. } => Protocol::Udp,
    }
}

/// The attributes of a policy, all of them: what is left out would be taken from the namespace's sysctls.
pub fn seconds(policy: &TimeoutPolicy) -> Vec<(u16, u32)> {
    match *policy {
        TimeoutPolicy::Tcp { syn_sent, established, fin_wait, close_wait, last_ack, time_wait, close } => vec![
            (object::TCP_SYN_SENT, syn_sent),
            (object::TCP_SYN_RECV, SYN_RECV),
            (object::TCP_ESTABLISHED, established),
            (object::TCP_FIN_WAIT, fin_wait),
            (object::TCP_CLOSE_WAIT, close_wait),
            (object::TCP_LAST_ACK, last_ack),
            (object::TCP_TIME_WAIT, time_wait),
            (object::TCP_CLOSE, close),
            (object::TCP_SYN_SENT2, SYN_SENT2),
            (object::TCP_RETRANS, RETRANS),
            (object::TCP_UNACK, UNACKNOWLEDGED),
        ],
        TimeoutPolicy::Udp { unreplied, replied } => {
            vec![(object::UDP_UNREPLIED, unreplied), (object::UDP_REPLIED, replied)]
        }
    }
}

/// The name and policy in a `NEWOBJ` message; `None` for an object shunt would never make.
pub fn parse(attributes: Attributes<'_>) -> Option<(String, TimeoutPolicy)> {
    if attributes.find(object::TYPE)?.be32()? != object::TYPE_CT_TIMEOUT {
        return None;
    }
    let name = attributes.find(object::NAME)?.text()?.to_owned();
    let data = attributes.find(object::DATA)?.nested();
    let number = data.find(object::L4PROTO)?.payload.first().copied()?;
    let policy = data.find(object::POLICY)?.nested();
    let of = |attribute: u16| policy.find(attribute).and_then(|seconds| seconds.be32());
    let policy = if number == Protocol::Tcp.number() {
        TimeoutPolicy::Tcp {
            syn_sent: of(object::TCP_SYN_SENT)?,
            established: of(object::TCP_ESTABLISHED)?,
            fin_wait: of(object::TCP_FIN_WAIT)?,
            close_wait: of(object::TCP_CLOSE_WAIT)?,
            last_ack: of(object::TCP_LAST_ACK)?,
            time_wait: of(object::TCP_TIME_WAIT)?,
            close: of(object::TCP_CLOSE)?,
        }
    } else if number == Protocol::Udp.number() {
        TimeoutPolicy::Udp { unreplied: of(object::UDP_UNREPLIED)?, replied: of(object::UDP_REPLIED)? }
    } else {
        return None;
    };
    Some((name, policy))
}
