//! Whether this kernel joins sockets without harm: known bytes through sockets on loopback, moved by the very code that moves
//! connections, and compared. Whatever a version says, this decides; some versions are not even tried.

mod overlap;
mod rig;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_core::capability;

use self::rig::{Rig, Talk};
use super::GRANT;
use crate::kernel::sockmap::{Sockmap, known_bug};

/// Sockets that the probe joins in all, with room.
const SOCKETS: u32 = 64;

/// Runs every check: some ten milliseconds. Nothing of it is left when this returns.
pub fn trust_in_sockmap() -> capability::Sockmap {
    match checked() {
        Ok(()) => capability::Sockmap::Trusted,
        Err(what) => capability::Sockmap::Refused(what),
    }
}

fn checked() -> Result<(), String> {
    if let Some(bug) = known_bug() {
        return Err(bug);
    }
    let mut map = Sockmap::load(SOCKETS).map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })?;
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        if address.is_ipv6() && !rig::is_there(address) {
            continue;
        }
        for (name, check) in CHECKS {
            let mut rig = Rig::new(map, address).map_err(|what| format!("{name}: {what}"))?;
            let outcome = check(&mut rig);
            outcome.map_err(|what| format!("{name} ({address}): {what}"))?;
            map = rig.end().ok_or("the maps are gone")?;
        }
        map.check_abi().map_err(|error| error.to_string())?;
    }
    Ok(())
}

type CheckFn = fn(&mut Rig) -> Result<(), String>;

const CHECKS: [(&str, CheckFn); 6] = [
    ("joined in the middle", in_the_middle),
    ("bulk", bulk),
    ("overlap", overlap::check),
    ("overlap at the join", overlap::at_the_join),
    ("stalled reader", stalled),
    ("half-close", half_close),
];

/// Joined in the middle of what both sides say.
fn in_the_middle(rig: &mut Rig) -> Result<(), String> {
    const BEFORE: u64 = 20_000;
    rig.before_the_join(BEFORE)?;
    rig.join()?;
    rig.client.talk(Talk { bytes: 100_000, finish: true });
    rig.server.talk(Talk { bytes: 200_000, finish: true });
    rig.through()
}

/// Much more than is granted at once; the kernel must have moved some of it.
fn bulk(rig: &mut Rig) -> Result<(), String> {
    rig.greet()?;
    rig.client.talk(Talk { bytes: 4 * GRANT, finish: true });
    rig.server.talk(Talk { bytes: 2 * GRANT, finish: true });
    rig.through()?;
    let [up, down] = rig.seen();
    if up.redirected == 0 || down.redirected == 0 {
        return Err("the kernel redirected nothing".into());
    }
    Ok(())
}

/// A reader that does not read: the writer must be stopped, and nothing may be lost.
fn stalled(rig: &mut Rig) -> Result<(), String> {
    const FAR_TOO_MUCH: u64 = 64 << 20;
    rig.greet()?;
    rig.server.reads = false;
    rig.client.talk(Talk { bytes: FAR_TOO_MUCH, finish: true });
    rig.until_still()?;
    if rig.client.sent == FAR_TOO_MUCH {
        return Err(format!("a reader that read nothing was sent {FAR_TOO_MUCH} bytes"));
    }
    let sent = rig.client.sent;
    rig.client.talk(Talk { bytes: 0, finish: true });
    rig.server.reads = true;
    rig.through()?;
    match rig.seen()[0].passed {
        0 => Err(format!("nothing was passed to the daemon of {sent} bytes")),
        _ => Ok(()),
    }
}

/// One side finishes; the other goes on, its reader is slow, and it finishes too.
fn half_close(rig: &mut Rig) -> Result<(), String> {
    rig.greet()?;
    rig.server.talk(Talk { bytes: 10_000, finish: true });
    rig.wait("the end of one direction", |rig| rig.client.ended)?;
    rig.server.reads = false;
    rig.client.talk(Talk { bytes: 8 * GRANT, finish: true });
    rig.until_still()?;
    rig.server.reads = true;
    rig.through()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn this_kernel_joins_sockets_without_harm() {
        if !crate::kernel::capability::privileges::effective().bpf {
            eprintln!("skipped: needs CAP_BPF");
            return;
        }
        let began = Instant::now();
        assert_eq!(trust_in_sockmap(), capability::Sockmap::Trusted);
        eprintln!("took {:?}", began.elapsed());
    }
}
