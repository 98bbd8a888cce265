//! Version 1: one line of text (§2.1).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::Split,
};

use super::{BadHeader, Ends, Header, Tlvs, Version};

/// With its CRLF.
pub(super) const MAX_LINE: usize = 107;
const BEGINNINGS: [&[u8]; 3] = [b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN"];

pub(super) fn parse(received: &[u8]) -> Result<Option<(Header, usize)>, BadHeader> {
    let may_begin = |beginning: &&[u8]| beginning.iter().zip(received).all(|(wanted, got)| wanted == got);
    if !BEGINNINGS.iter().any(may_begin) {
        return Err(if received.starts_with(b"PROXY ") { BadHeader::Line } else { BadHeader::Absent });
    }
    let line = received.get(..MAX_LINE).unwrap_or(received);
    let Some(end) = line.iter().position(|b| matches!(b, b'\r' | b'\n')) else {
        return if received.len() < MAX_LINE { Ok(None) } else { Err(BadHeader::LineTooLong) };
    };
    let (text, rest) = line.split_at_checked(end).ok_or(BadHeader::Line)?;
    match rest {
        [b'\r', b'\n', ..] => {}
        [b'\r'] if end + 1 < MAX_LINE => return Ok(None),
        _ => return Err(BadHeader::Line),
    }
    let ends = ends(text).ok_or(BadHeader::Line)?;
    Ok(Some((Header { version: Version::V1, ends, tlvs: Tlvs::default() }, end + 2)))
}

/// The outer `None` is an error.
fn ends(line: &[u8]) -> Option<Option<Ends>> {
    // What follows UNKNOWN must be ignored; it need not even be text.
    if let Some(rest) = line.strip_prefix(b"PROXY UNKNOWN") {
        return matches!(rest, [] | [b' ', ..]).then_some(None);
    }
    let mut words = str::from_utf8(line).ok()?.split(' ');
    let [_proxy, family] = [words.next()?, words.next()?];
    let address: fn(&str) -> Option<IpAddr> = match family {
        "TCP4" => |word| word.parse::<Ipv4Addr>().ok().map(IpAddr::from),
        _ => |word| word.parse::<Ipv6Addr>().ok().map(IpAddr::from),
    };
    let [source, destination] = [address(words.next()?)?, address(words.next()?)?];
    let mut end = |address: IpAddr| Some(SocketAddr::new(address.to_canonical(), port(&mut words)?));
    let ends = Ends { source: end(source)?, destination: end(destination)? };
    words.next().is_none().then_some(Some(ends))
}

/// Digits only, and no leading zero.
fn port(words: &mut Split<'_, char>) -> Option<u16> {
    let word = words.next()?;
    let is_canonical = word == "0" || word.starts_with(|first: char| matches!(first, '1'..='9'));
    if is_canonical { word.parse().ok() } else { None }
}
