//! Options of a socket that are made of integers alone.

use std::{
    ffi::c_int,
    os::fd::{AsFd, AsRawFd},
};

use rustix::io::Errno;

use super::check;

pub(super) trait Integers {}
impl Integers for c_int {}
impl Integers for u32 {}
impl Integers for [u32; 4] {}
impl Integers for [u32; 5] {}
impl Integers for [u8; 8] {}

/// An option of TCP.
pub(super) fn get<T: Integers + Default>(socket: impl AsFd, option: c_int) -> Result<T, Errno> {
    let (mut value, mut length) = (T::default(), size_of::<T>() as libc::socklen_t);
    // SAFETY: `value` has room for `length` bytes, outlives the call, and any bytes are a value of it.
    check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    })?;
    Ok(value)
}

pub(super) fn set<T: Integers>(socket: impl AsFd, level: c_int, option: c_int, value: T) -> Result<(), Errno> {
    // SAFETY: `value` is as long as it is said to be, and outlives the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })
}
