//! `shunt top`

use super::{Exit, Failure, client::Client};

pub(super) fn run(_client: &Client) -> Result<Exit, Failure> {
    Err(Failure::new("not yet", "-"))
}
