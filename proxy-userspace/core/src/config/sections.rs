//! `[admin]`, `[log]`, `[kernel]`, and what `[defaults]` and a route have in common.

use std::{num::NonZeroU32, os::unix::ffi::OsStrExt as _, time::Duration};

use super::{
    address,
    reader::{Field, Section},
    types::{Admin, Balance, EngineChoice, Keepalive, Kernel, Limits, Log, Timeouts},
    value,
};

/// `sun_path` of unix(7), less the NUL at its end.
const LONGEST_SOCKET_PATH: usize = 107;

pub(super) fn admin(section: &Section<'_>) -> Option<Admin> {
    let listen = section.value("listen", |field| field.parse(address::admin_listen));
    let socket = section.value("socket", |field| {
        let path = field.file()?;
        let length = path.as_os_str().as_bytes().len();
        if length > LONGEST_SOCKET_PATH {
            field.reject(format!(
                "{path:?} is {length} bytes long; the path of a Unix socket has at most {LONGEST_SOCKET_PATH}"
            ));
            return None;
        }
        Some(path)
    });
    Some(Admin { listen: listen?, socket: socket? })
}

pub(super) fn log(section: &Section<'_>) -> Option<Log> {
    let level = section.value("level", |field| field.parse(value::log_filter));
    let format = section.value("format", Field::choice);
    let access = section.value("access", Field::choice);
    Some(Log { level: level?, format: format?, access: access? })
}

pub(super) fn kernel(section: &Section<'_>) -> Option<Kernel> {
    let mark_mask = section.value("mark_mask", |field| {
        let text = field.text_or_integer()?;
        value::mark_mask(&text).map_err(|message| field.reject(message)).ok()
    });
    let lock_table = section.value("lock_table", Field::boolean);
    Some(Kernel { mark_mask: mark_mask?, lock_table: lock_table? })
}

/// A UDP flow that nobody said anything about is forgotten after this (RFC 4787 REQ-5: no sooner).
const UDP_IDLE: Duration = Duration::from_secs(120);

/// `[defaults]`: what a route has when it says nothing itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    pub timeouts: Timeouts,
    /// The same for UDP, which has no end but silence.
    pub udp_timeouts: Timeouts,
    pub limits: Limits,
    /// `None`: the default of the route's own key.
    pub keepalive: Option<Keepalive>,
    pub engine: Option<EngineChoice>,
    pub balance: Option<Balance>,
}

pub(super) fn defaults(section: &Section<'_>) -> Option<Defaults> {
    let given = section.child("timeouts")?;
    let timeouts = timeouts(&given, None);
    let udp_timeouts = timeouts.map(|timeouts| match given.given("idle") {
        Some(_) => timeouts,
        None => Timeouts { idle: Some(UDP_IDLE), ..timeouts },
    });
    let limits = limits(&section.child("limits")?, None);
    Some(Defaults {
        keepalive: section.given("keepalive").and_then(|field| field.choice()),
        engine: section.given("engine").and_then(|field| field.choice()),
        balance: section.given("balance").and_then(|field| field.choice()),
        timeouts: timeouts?,
        udp_timeouts: udp_timeouts?,
        limits: limits?,
    })
}

/// What is absent is taken from `base`, or from the key's own default if there is none.
pub(super) fn timeouts(section: &Section<'_>, base: Option<&Timeouts>) -> Option<Timeouts> {
    let connect = section.value_or("connect", base.map(|b| b.connect), Field::duration);
    let initial_data = section.value_or("initial_data", base.map(|b| b.initial_data), Field::duration);
    let tls_handshake = section.value_or("tls_handshake", base.map(|b| b.tls_handshake), Field::duration);
    let idle = section.value_or("idle", base.map(|b| b.idle), Field::duration_or_never);
    let half_closed = section.value_or("half_closed", base.map(|b| b.half_closed), Field::duration_or_never);
    let lifetime = section.value_or("lifetime", base.map(|b| b.lifetime), Field::duration_or_never);
    let drain = section.value_or("drain", base.map(|b| b.drain), Field::duration);
    Some(Timeouts {
        connect: connect?,
        initial_data: initial_data?,
        tls_handshake: tls_handshake?,
        idle: idle?,
        half_closed: half_closed?,
        lifetime: lifetime?,
        drain: drain?,
    })
}

/// What is absent is taken from `base`, or from the key's own default if there is none.
pub(super) fn limits(section: &Section<'_>, base: Option<&Limits>) -> Option<Limits> {
    let count = |field: &Field<'_>| field.integer().map(NonZeroU32::new);
    let connections = section.value_or("connections", base.map(|b| b.connections), count);
    let per_client = section.value_or("connections_per_client", base.map(|b| b.connections_per_client), count);
    let rate = section.value_or("rate_per_client", base.map(|b| b.rate_per_client), |field| {
        let text = field.text_or_integer()?;
        value::rate(&text).map_err(|message| field.reject(message)).ok()
    });
    Some(Limits { connections: connections?, connections_per_client: per_client?, rate_per_client: rate? })
}
