//! What a network can do to packets: delay, loss, no offloads.

use anyhow::Result;

use crate::{host::Host, process::run};

/// Shapes what `host` sends on `device` (a backend's and the client's is `eth0`; the gateway's are `clients`, `backend1`,
/// …). `rules` as in tc-netem(8): `delay 20ms 2ms loss 1%`. Replaces an earlier shaping.
///
/// # Errors
/// Also when the kernel has no netem ([`has_netem`]); [`lose`] needs none.
pub fn netem(host: &Host, device: &str, rules: &str) -> Result<()> {
    let mut command = host.command("tc");
    command.args(["qdisc", "replace", "dev", device, "root", "netem"]).args(rules.split_whitespace());
    run(&mut command).map(drop)
}

/// Whether this kernel was built with netem (`CONFIG_NET_SCH_NETEM`), asked with a link that delays nothing.
pub fn has_netem(host: &Host) -> bool {
    netem(host, "lo", "delay 0ms").and_then(|()| netem_off(host, "lo")).is_ok()
}

/// Drops `percent` (1–100) of the IP packets that reach `host`, at random, for good. Needs only nftables; meant for
/// clients and backends, whose own packet filter is nobody's business.
pub fn lose(host: &Host, percent: u32) -> Result<()> {
    lose_those(host, "", percent)
}

/// As [`lose`], but nothing of the host's own, and never a TCP reset: nobody sends it again, and who does not hear it waits for a timeout.
pub fn lose_all_but_resets(host: &Host, percent: u32) -> Result<()> {
    lose_those(host, "iifname != \"lo\" tcp flags & rst == 0", percent)
}

fn lose_those(host: &Host, which: &str, percent: u32) -> Result<()> {
    let chain = "add chain inet lab_loss in { type filter hook prerouting priority -400; }";
    let rule = format!("add rule inet lab_loss in {which} numgen random mod 100 0-{} drop", percent.saturating_sub(1));
    run(host.command("nft").arg(format!("add table inet lab_loss; {chain}; {rule}"))).map(drop)
}

/// Takes the shaping away.
pub fn netem_off(host: &Host, device: &str) -> Result<()> {
    run(host.command("tc").args(["qdisc", "delete", "dev", device, "root"])).map(drop)
}

/// Turns segmentation, receive and checksum offloads of a veth on or off: with them off, packets are as small and
/// retransmissions as frequent as on a wire.
pub fn offloads(host: &Host, device: &str, on: bool) -> Result<()> {
    let value = if on { "on" } else { "off" };
    let mut command = host.command("ethtool");
    command.args(["-K", device]);
    for feature in ["tso", "gso", "gro", "tx", "rx"] {
        command.args([feature, value]);
    }
    run(&mut command).map(drop)
}

/// Takes a link down or up; neighbours see the carrier go.
pub fn set_up(host: &Host, device: &str, up: bool) -> Result<()> {
    run(host.command("ip").args(["link", "set", device, if up { "up" } else { "down" }])).map(drop)
}
