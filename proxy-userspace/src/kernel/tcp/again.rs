//! A connection that says its last bytes again, as one does whose acknowledgements were lost.

use std::{
    ffi::c_int,
    io,
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{AddressFamily, SocketType, bind, connect, ipproto, socket};

use super::option::{get, set};

const RECEIVE_QUEUE: c_int = 1;
const SEND_QUEUE: c_int = 2;
/// Without a word to the peer (`TCP_REPAIR_OFF_NO_WP`, v4.19+).
const OFF_SILENTLY: c_int = -1;
/// `struct tcp_repair_opt`: kinds of RFC 9293 §3.2 and RFC 7323 §2.2.
const MAXIMUM_SEGMENT: u32 = 2;
const WINDOW_SCALE: u32 = 3;
/// Of `struct tcp_info`: both scales, four bits each.
const SCALES: usize = 6;

/// Takes the end of a connection over into a new socket (`TCP_REPAIR`, CAP_NET_ADMIN) whose next bytes have the sequence
/// numbers of the last `back` that were sent. All of them must have been acknowledged.
pub fn say_again(stream: TcpStream, back: u32) -> io::Result<TcpStream> {
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    set(&stream, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)?;
    let sent = sequence(&stream, SEND_QUEUE)?;
    let received = sequence(&stream, RECEIVE_QUEUE)?;
    let window: [u32; 5] = get(&stream, libc::TCP_REPAIR_WINDOW)?;
    let segment: u32 = get(&stream, libc::TCP_MAXSEG)?;
    let info: [u8; 8] = get(&stream, libc::TCP_INFO)?;
    let scales = u32::from(info[SCALES] & 15) | u32::from(info[SCALES] >> 4) << 16;
    // In this state it goes without a FIN.
    drop(stream);

    let again = fresh(local, peer, [(SEND_QUEUE, sent.wrapping_sub(back)), (RECEIVE_QUEUE, received)])?;
    let options = [MAXIMUM_SEGMENT, segment, WINDOW_SCALE, scales];
    set(&again, libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, options)?;
    set(&again, libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, window)?;
    set(&again, libc::IPPROTO_TCP, libc::TCP_REPAIR, OFF_SILENTLY)?;
    let again = TcpStream::from(again);
    again.set_nonblocking(true)?;
    again.set_nodelay(true)?;
    Ok(again)
}

/// A socket that is connected without asking the peer.
fn fresh(local: SocketAddr, peer: SocketAddr, queues: [(c_int, u32); 2]) -> io::Result<OwnedFd> {
    let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fresh = socket(family, SocketType::STREAM, Some(ipproto::TCP))?;
    set(&fresh, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)?;
    bind(&fresh, &local)?;
    for (queue, at) in queues {
        set(&fresh, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, queue)?;
        set(&fresh, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, at)?;
    }
    connect(&fresh, &peer)?;
    Ok(fresh)
}

fn sequence(socket: &impl AsFd, queue: c_int) -> io::Result<u32> {
    set(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, queue)?;
    Ok(get(socket, libc::TCP_QUEUE_SEQ)?)
}
