//! One packet into the counters of its flow.

use aya_ebpf::programs::TcContext;
use proxy_abi::{flow::FlowKey, outcome};
use proxy_ebpf::packet::{self, Refused};

use crate::maps;

/// Counts the packet in its flow and says so, [`outcome::COUNTED`].
#[inline(always)]
pub fn try_count(ctx: &TcContext) -> Result<u32, Refused> {
    let packet = packet::parse(ctx)?;
    let (key, direction) = FlowKey::of_packet(packet.source, packet.destination, packet.protocol, packet.ip_version);
    let counters = maps::flow_counters(&key).ok_or(Refused::TableFull)?;
    counters.add(direction, packet.payload_bytes as u64);
    Ok(outcome::COUNTED)
}
