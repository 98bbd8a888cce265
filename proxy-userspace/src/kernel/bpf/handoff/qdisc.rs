//! The queue discipline `clsact`, which filters hang on where tcx is missing: whether anything hangs on one, and taking it away.

use nix::errno::Errno;

use crate::kernel::netlink::{NetlinkSocket, SyscallError, Writer};

/// `TC_H_CLSACT`, and the places for filters on the way in and out (`include/uapi/linux/pkt_sched.h`).
const CLSACT: u32 = 0xffff_fff1;
const PLACES: [u32; 2] = [0xffff_fff2, 0xffff_fff3];
/// The number that each `clsact` has.
const HANDLE: u32 = 0xffff_0000;

/// Takes the interface's `clsact` away, unless a filter of somebody hangs on it.
pub fn remove_unused(ifindex: u32) -> Result<(), SyscallError> {
    let mut socket = NetlinkSocket::open(mnl::Bus::Route)?;
    for place in PLACES {
        let mut found = false;
        let dump = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
        let filters = tcmsg(ifindex, 0, place);
        let told =
            request(&mut socket, libc::RTM_GETTFILTER, dump, &filters, |kind| found |= kind == libc::RTM_NEWTFILTER);
        // What cannot be looked at stays.
        if found || told.is_err() {
            return told;
        }
    }
    let acknowledged = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    request(&mut socket, libc::RTM_DELQDISC, acknowledged, &tcmsg(ifindex, HANDLE, CLSACT), |_| {})
}

/// `struct tcmsg`
fn tcmsg(ifindex: u32, handle: u32, parent: u32) -> Vec<u8> {
    [0, ifindex, handle, parent, 0].into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// `each` is told the kind of every message before the kernel's last word.
fn request(
    socket: &mut NetlinkSocket,
    kind: u16,
    flags: i32,
    body: &[u8],
    mut each: impl FnMut(u16),
) -> Result<(), SyscallError> {
    const CALL: &str = "netlink(clsact)";
    let sequence = socket.take_sequence(1);
    let mut writer = Writer::new();
    let message = writer.message(kind, flags as u16, sequence, body);
    writer.end_message(message);
    socket.send(&writer.finish().map_err(|_| SyscallError { call: CALL, errno: Errno::EMSGSIZE })?)?;
    // The answer, or the next part of a dump, is queued when the call before returns: an empty queue is the end.
    while let Some(messages) = socket.receive()? {
        for message in messages.filter(|message| message.sequence == sequence) {
            match message.answer() {
                None => each(message.kind),
                Some(answer) => return answer.errno.map_or(Ok(()), |errno| Err(SyscallError { call: CALL, errno })),
            }
        }
    }
    Err(SyscallError { call: CALL, errno: Errno::ENODATA })
}
