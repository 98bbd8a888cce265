//! A piece that repeats bytes which had come, as a lossy link makes them, with new ones behind them.

use super::rig::{Rig, Talk};
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
