//! A client's server name (RFC 6066 §3).

use std::net::IpAddr;

use super::NotHello;

/// `None` for an IP address.
pub(super) fn read(name: &[u8]) -> Result<Option<Box<str>>, NotHello> {
    let name = str::from_utf8(name).map_err(|_| NotHello::BadServerName)?;
    if name.parse::<IpAddr>().is_ok() {
        return Ok(None);
    }
    // Not permitted either, but it can only mean the name before it.
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_host_name = name.len() <= 253 && name.split('.').all(is_label);
    if is_host_name { Ok(Some(name.to_ascii_lowercase().into())) } else { Err(NotHello::BadServerName) }
}

/// Wider than RFC 1123: names with `_`, and with `-` at an end, are in use.
fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}
