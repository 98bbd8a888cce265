//! Where packets to an address go, asked of the kernel's routing.

use std::net::IpAddr;

use super::netlink::{Attributes, NetlinkSocket, SyscallError, Writer};

/// Bytes of `struct rtmsg`.
const FIXED: usize = 12;
/// `RTA_DST`, `RTA_OIF`
const DESTINATION: u16 = 1;
const INTERFACE: u16 = 4;

/// The kernel's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// An address of this machine.
    Here,
    /// Out through the interface with this number.
    Through(u32),
}

/// A socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Fib(NetlinkSocket);

impl Fib {
    pub fn open() -> Result<Self, SyscallError> {
        NetlinkSocket::open(mnl::Bus::Route).map(Self)
    }

    /// `None`: there is no way, or the kernel does not say.
    pub fn way_to(&mut self, destination: IpAddr) -> Option<Way> {
        let sequence = self.0.take_sequence(1);
        let mut writer = Writer::new();
        let (family, octets) = match destination {
            IpAddr::V4(ip) => (libc::AF_INET as u8, ip.octets().to_vec()),
            IpAddr::V6(ip) => (libc::AF_INET6 as u8, ip.octets().to_vec()),
        };
        let mut fixed = [0; FIXED];
        (fixed[0], fixed[1]) = (family, octets.len() as u8 * 8);
        let message = writer.message(libc::RTM_GETROUTE, libc::NLM_F_REQUEST as u16, sequence, &fixed);
        writer.put(DESTINATION, &octets);
        writer.end_message(message);
        self.0.send(&writer.finish().ok()?).ok()?;
        // The one answer is queued when the call returns.
        while let Some(mut messages) = self.0.receive().ok()? {
            if let Some(message) = messages.find(|message| message.sequence == sequence) {
                return if message.kind == libc::RTM_NEWROUTE { way(message.payload) } else { None };
            }
        }
        None
    }
}

fn way(payload: &[u8]) -> Option<Way> {
    // rtm_type
    if *payload.get(7)? == libc::RTN_LOCAL {
        return Some(Way::Here);
    }
    let interface = Attributes::new(payload.get(FIXED..)?).find(INTERFACE)?;
    Some(Way::Through(u32::from_ne_bytes(*interface.payload.first_chunk()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_here() {
        let mut fib = Fib::open().expect("netlink is for everybody");
        assert_eq!(fib.way_to(IpAddr::from([127, 0, 0, 1])), Some(Way::Here));
        assert_eq!(fib.way_to(IpAddr::from([127, 9, 9, 9])), Some(Way::Here));
    }

    #[test]
    fn a_message_cut_off_anywhere_is_no_way() {
        let mut whole = vec![0; FIXED];
        whole.extend([8, 0, 4, 0, 7, 0, 0, 0]);
        assert_eq!(way(&whole), Some(Way::Through(7)));
        for length in 0..whole.len() {
            assert_eq!(way(&whole[..length]), None, "{length}");
        }
    }
}
