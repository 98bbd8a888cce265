//! What hosts receive and send, counted by their own kernels.

use anyhow::{Context, Result};

use crate::{host::Host, process::run};

/// Counts FINs and RSTs that reach `host`, before anything else sees them. Needs only nftables; meant for clients and
/// backends.
pub fn watch_ends(host: &Host) -> Result<()> {
    let chain = "add chain inet lab_ends in { type filter hook prerouting priority -400; }";
    let rule = |flag| format!("add rule inet lab_ends in tcp flags & {flag} == {flag} counter name {flag}s");
    let counters = "add counter inet lab_ends fins; add counter inet lab_ends rsts";
    let script = format!("add table inet lab_ends; {counters}; {chain}; {}; {}", rule("fin"), rule("rst"));
    run(host.command("nft").arg(script)).map(drop)
}

/// FINs and RSTs that have reached `host` since [`watch_ends`].
pub fn ends_seen(host: &Host) -> Result<(u64, u64)> {
    let packets = |name: &str| -> Result<u64> {
        let text = run(host.command("nft").args(["list", "counter", "inet", "lab_ends", name]))?;
        let mut words = text.split_whitespace();
        words.find(|word| *word == "packets").context("no counter")?;
        Ok(words.next().context("no number")?.parse()?)
    };
    Ok((packets("fins")?, packets("rsts")?))
}

/// A counter of `/proc/net/snmp` or `/proc/net/netstat`, as nstat calls it (`TcpRetransSegs`).
pub fn stack_counter(host: &Host, name: &str) -> Result<u64> {
    let text = run(host.command("nstat").args(["-asz", name]))?;
    let line = text.lines().find(|line| line.starts_with(name)).with_context(|| format!("no {name}: {text}"))?;
    Ok(line.split_whitespace().nth(1).context("no value")?.parse()?)
}
