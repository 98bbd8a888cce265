//! A piece that repeats bytes which had come, as a lossy link makes them, with new ones behind them: later, and as the first of all.

use super::{
    super::GRANT,
    rig::{Rig, Talk},
};
use crate::kernel::tcp;

const REPEATED: u32 = 5000;
const NEW: u64 = 3000;

pub fn check(rig: &mut Rig) -> Result<(), String> {
    rig.greet()?;
    rig.client.talk(Talk { bytes: 20_000, finish: false });
    rig.wait("what will be repeated", |rig| rig.server.heard == rig.client.sent && rig.client.sent > 20_000)?;
    rig.wait("its acknowledgement", |rig| tcp::unacked(&rig.client.stream) == Ok(0))?;
    rig.client.say_again(REPEATED).map_err(|error| format!("a segment cannot be repeated: {error}"))?;
    rig.client.talk(Talk { bytes: NEW, finish: true });
    rig.through()?;
    // Segments that bring nothing new end before the verdict; one is half old and half new.
    match rig.seen()[0].trimmed {
        0 => Err("the segment that repeats bytes did not come".into()),
        _ => Ok(()),
    }
}

/// What is repeated was read before the sockets were joined, where no verdict could see it.
pub fn at_the_join(rig: &mut Rig) -> Result<(), String> {
    const SHORT: u64 = 10;
    rig.before_the_join(20_000)?;
    rig.wait("the acknowledgement before the join", |rig| tcp::unacked(&rig.client.stream) == Ok(0))?;
    rig.client.say_again(REPEATED).map_err(|error| format!("a segment cannot be repeated: {error}"))?;
    rig.join()?;
    rig.client.talk(Talk { bytes: NEW, finish: false });
    rig.wait("what is new of the first piece", |rig| rig.server.heard == 20_000 + NEW)?;
    let seen = rig.seen()[0];
    let repeated = (seen.passed + seen.redirected).saturating_sub(NEW);
    if repeated < 4 * SHORT {
        return Err(format!("the segment that repeats bytes did not come: {seen:?}"));
    }
    // All of them are shorter than what was repeated: a kernel that takes them for read is silent.
    for message in 1..=3 {
        rig.client.talk(Talk { bytes: SHORT, finish: false });
        rig.wait("a short message behind it", |rig| rig.server.heard == 20_000 + NEW + message * SHORT)?;
    }
    rig.client.talk(Talk { bytes: 3 * GRANT, finish: false });
    rig.server.talk(Talk { bytes: 100_000, finish: true });
    rig.through()
}
