//! The program, run by the kernel on look-ups of our own making (`BPF_PROG_TEST_RUN` for this kind since v5.13).

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
};

use nix::sched::{CloneFlags, unshare};
use proxy_abi::lookup::{LEAVE, REFUSE};
use rustix::net::sockopt::socket_cookie;

use super::*;

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const TCP: u32 = 6;
const UDP: u32 = 17;

/// `struct bpf_sk_lookup` (`linux/bpf.h`).
#[repr(C)]
#[derive(Default)]
struct Context {
    cookie: u64,
    family: u32,
    protocol: u32,
    remote_ip4: [u8; 4],
    remote_ip6: [u8; 16],
    remote_port: u16,
    padding: u16,
    local_ip4: [u8; 4],
    local_ip6: [u8; 16],
    local_port: u32,
    ingress_ifindex: u32,
    /// The kernel wants zeros to the last byte.
    end: u32,
}

/// `union bpf_attr` of `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    verdict: u32,
    data_size: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_size: [u32; 2],
    context: [u64; 2],
    flags: u32,
    cpu: u32,
    batch_size: u32,
    /// The kernel wants zeros to the last byte.
    end: u32,
}

/// The verdict, and the cookie of the socket that was chosen.
fn run(lookup: &mut Lookup, protocol: u32, dialled: &str) -> (u32, u64) {
    const PROG_TEST_RUN: libc::c_int = 10;
    let dialled: SocketAddr = dialled.parse().expect("an address");
    let mut context = Context { protocol, local_port: dialled.port().into(), ..Context::default() };
    match dialled.ip() {
        IpAddr::V4(ip) => (context.family, context.local_ip4) = (libc::AF_INET as u32, ip.octets()),
        IpAddr::V6(ip) => (context.family, context.local_ip6) = (libc::AF_INET6 as u32, ip.octets()),
    }
    let program = program(&mut lookup.object).expect("a program");
    let mut test = TestRun {
        program: program.fd().expect("loaded").as_fd().as_raw_fd() as u32,
        context_size: [size_of::<Context>() as u32; 2],
        context: [(&raw mut context) as u64; 2],
        ..TestRun::default()
    };
    // SAFETY: bpf(2) with the attributes of this command; the context it reads and writes is alive and of the stated size.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, &raw mut test, size_of::<TestRun>()) };
    assert_eq!(result, 0, "BPF_PROG_TEST_RUN: {}", io::Error::last_os_error());
    (test.verdict, context.cookie)
}

fn block(address: impl Into<IpAddr>, port: u16, bits: u8) -> Block {
    Block { address: address.into(), port, bits }
}

/// In a network namespace of its own; not at all where that is not allowed.
fn with_lookup(test: fn(&mut Lookup)) {
    let inside = move || {
        if unshare(CloneFlags::CLONE_NEWNET).is_ok() {
            test(&mut Lookup::attach().expect("this kernel takes the program"));
        }
    };
    std::thread::spawn(inside).join().expect("the thread ends");
}

fn listener(address: impl Into<IpAddr>) -> (OwnedFd, u64) {
    let socket = TcpListener::bind(SocketAddr::new(address.into(), 0));
    // In a new namespace the loopback interface is down: only the address of all can be bound.
    let socket = socket.expect("a socket");
    let cookie = socket_cookie(&socket).expect("a cookie");
    (socket.into(), cookie)
}

#[test]
fn a_look_up_goes_to_the_socket_of_the_longest_block_of_the_dialled_address_or_else_of_all_addresses() {
    with_lookup(|lookup| {
        let [(one, first), (other, second)] = [(); 2].map(|()| listener(Ipv4Addr::UNSPECIFIED));
        let (six, third) = listener(Ipv6Addr::UNSPECIFIED);
        for (place, socket) in [(0, &one), (1, &other), (2, &six)] {
            lookup.put_listener(place, socket).expect("a place");
        }
        let address = Ipv4Addr::new(192, 0, 2, 1);
        for (block, to) in [
            (block(address, 1024, 6), 0),
            (block(Ipv4Addr::UNSPECIFIED, 0, 0), 1),
            (block(Ipv4Addr::UNSPECIFIED, 80, 16), LEAVE),
            (block(Ipv4Addr::UNSPECIFIED, 81, 16), REFUSE),
            (block(Ipv6Addr::UNSPECIFIED, 4096, 4), 2),
            (block(Ipv6Addr::UNSPECIFIED, 4097, 16), 7),
        ] {
            lookup.lead(block, to).expect("room");
        }
        for (dialled, expected) in [
            ("192.0.2.1:1024", (SK_PASS, first)),
            ("192.0.2.1:2047", (SK_PASS, first)),
            ("192.0.2.1:2048", (SK_PASS, second)),
            ("198.51.100.7:1024", (SK_PASS, second)),
            ("198.51.100.7:80", (SK_PASS, 0)),
            ("198.51.100.7:81", (SK_DROP, 0)),
            ("[2001:db8::1]:4096", (SK_PASS, third)),
            ("[2001:db8::1]:4097", (SK_PASS, 0)),
            ("[2001:db8::1]:80", (SK_PASS, 0)),
        ] {
            assert_eq!(run(lookup, TCP, dialled), expected, "{dialled}");
        }
        assert_eq!(run(lookup, UDP, "192.0.2.1:1024"), (SK_PASS, 0), "only TCP");
    });
}

#[test]
fn what_is_no_longer_wanted_is_forgotten_and_what_stays_is_led_as_before() {
    with_lookup(|lookup| {
        let (socket, cookie) = listener(Ipv4Addr::UNSPECIFIED);
        lookup.put_listener(5, &socket).expect("a place");
        let (stays, goes) = (block(Ipv4Addr::UNSPECIFIED, 1024, 6), block(Ipv4Addr::UNSPECIFIED, 2048, 6));
        [stays, goes].into_iter().try_for_each(|block| lookup.lead(block, 5)).expect("room");
        lookup.keep_only(&BTreeMap::from([(stays, 5)])).expect("the other is forgotten");
        assert_eq!(run(lookup, TCP, "192.0.2.1:1024"), (SK_PASS, cookie));
        assert_eq!(run(lookup, TCP, "192.0.2.1:2048"), (SK_PASS, 0));
        assert_eq!(lookup.held.keys().collect::<Vec<_>>(), [&stays]);
    });
}

#[test]
fn a_closed_socket_leaves_its_place() {
    with_lookup(|lookup| {
        let (socket, _) = listener(Ipv4Addr::UNSPECIFIED);
        lookup.put_listener(0, &socket).expect("a place");
        lookup.lead(block(Ipv4Addr::UNSPECIFIED, 0, 0), 0).expect("room");
        drop(socket);
        assert_eq!(run(lookup, TCP, "192.0.2.1:1024"), (SK_PASS, 0));
    });
}

#[test]
fn the_embedded_object_has_the_maps_of_this_abi() {
    let object = aya_obj::Object::parse(OBJECT).expect("an eBPF object");
    assert!(object.programs.contains_key(PROGRAM));
    let layout = |name: &str| (object.maps[name].key_size() as usize, object.maps[name].value_size() as usize);
    assert_eq!(layout(RANGES), (4 + size_of::<ListenKey>(), 4));
    assert_eq!(object.maps[RANGES].max_entries(), proxy_abi::lookup::MAX_BLOCKS);
    assert_eq!(object.maps[LISTENERS].max_entries(), proxy_abi::lookup::MAX_LISTENERS);
}
