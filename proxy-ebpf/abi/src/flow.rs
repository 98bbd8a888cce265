//! Flows and their counters: key and value of the map `FLOWS`.

/// IPv4, as [`FlowKey::ip_version`].
pub const IPV4: u8 = 4;
/// IPv6, as [`FlowKey::ip_version`].
pub const IPV6: u8 = 6;
/// TCP, as [`FlowKey::protocol`].
pub const TCP: u8 = 6;
/// UDP, as [`FlowKey::protocol`].
pub const UDP: u8 = 17;

/// Index of [`FlowCounters`] for packets from [`FlowKey::low`] to [`FlowKey::high`].
pub const LOW_TO_HIGH: u32 = 0;
/// Index of [`FlowCounters`] for packets from [`FlowKey::high`] to [`FlowKey::low`].
pub const HIGH_TO_LOW: u32 = 1;

/// One end of a flow.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// IPv6 address, or an IPv4 address in the first four bytes and zeros.
    pub address: [u8; 16],
    /// Port in network byte order; see [`Endpoint::port`].
    pub port_be: [u8; 2],
}

impl Endpoint {
    pub const fn v4(address: [u8; 4], port_be: [u8; 2]) -> Self {
        let [a, b, c, d] = address;
        Self { address: [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], port_be }
    }

    pub const fn v6(address: [u8; 16], port_be: [u8; 2]) -> Self {
        Self { address, port_be }
    }

    /// The port in host byte order, 0–65535.
    pub const fn port(&self) -> u16 {
        u16::from_be_bytes(self.port_be)
    }

    /// The order of endpoints as integers: a comparison of byte arrays would be a loop for the verifier to walk.
    const fn rank(&self) -> (u128, u16) {
        (u128::from_be_bytes(self.address), self.port())
    }
}

/// A flow, the same for both directions: its ends are ordered by address, then by port.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    pub low: Endpoint,
    pub high: Endpoint,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// [`IPV4`] or [`IPV6`].
    pub ip_version: u8,
    /// Zero: the kernel hashes every byte of a key.
    pub reserved: [u8; 2],
}

impl FlowKey {
    /// The key of a packet, and its direction: [`LOW_TO_HIGH`] or [`HIGH_TO_LOW`].
    #[inline(always)]
    pub fn of_packet(source: Endpoint, destination: Endpoint, protocol: u8, ip_version: u8) -> (Self, u32) {
        let (low, high, direction) = if source.rank() <= destination.rank() {
            (source, destination, LOW_TO_HIGH)
        } else {
            (destination, source, HIGH_TO_LOW)
        };
        (Self { low, high, protocol, ip_version, reserved: [0; 2] }, direction)
    }
}

/// Traffic of one flow on one CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowCounters {
    pub low_to_high: Traffic,
    pub high_to_low: Traffic,
}

impl FlowCounters {
    /// Nothing counted yet.
    pub const ZERO: Self = Self {
        low_to_high: Traffic { packets: 0, payload_bytes: 0 },
        high_to_low: Traffic { packets: 0, payload_bytes: 0 },
    };

    /// Counts one packet of a direction; anything but [`LOW_TO_HIGH`] is [`HIGH_TO_LOW`].
    ///
    /// Both directions are written, one with zeros: to choose between their addresses is pointer arithmetic that differs
    /// by path, which the verifier refuses to a process without `CAP_PERFMON`.
    #[inline(always)]
    pub const fn add(&mut self, direction: u32, payload_bytes: u64) {
        let low = (direction == LOW_TO_HIGH) as u64;
        let high = 1 - low;
        self.low_to_high = self.low_to_high.merge(Traffic { packets: low, payload_bytes: payload_bytes * low });
        self.high_to_low = self.high_to_low.merge(Traffic { packets: high, payload_bytes: payload_bytes * high });
    }

    /// The sum of what two CPUs counted.
    pub const fn merge(self, other: Self) -> Self {
        Self {
            low_to_high: self.low_to_high.merge(other.low_to_high),
            high_to_low: self.high_to_low.merge(other.high_to_low),
        }
    }
}

/// Traffic of one direction.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    pub packets: u64,
    /// Bytes after the TCP or UDP header, as the IP header states them: Ethernet padding is not payload.
    pub payload_bytes: u64,
}

impl Traffic {
    /// The sum of both. Wraps, as every counter that is read as a difference may.
    #[inline(always)]
    pub const fn merge(self, other: Self) -> Self {
        Self {
            packets: self.packets.wrapping_add(other.packets),
            payload_bytes: self.payload_bytes.wrapping_add(other.payload_bytes),
        }
    }
}

const _: () = assert!(size_of::<Endpoint>() == 18);
const _: () = assert!(size_of::<FlowKey>() == 40);
const _: () = assert!(size_of::<Traffic>() == 16);
const _: () = assert!(size_of::<FlowCounters>() == 32 && align_of::<FlowCounters>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    fn end(last: u8, port: u16) -> Endpoint {
        Endpoint::v4([192, 0, 2, last], port.to_be_bytes())
    }

    #[test]
    fn both_directions_of_a_flow_have_one_key() {
        let (key, there) = FlowKey::of_packet(end(1, 40_000), end(2, 80), TCP, IPV4);
        let (same, back) = FlowKey::of_packet(end(2, 80), end(1, 40_000), TCP, IPV4);
        assert_eq!(key, same);
        assert_eq!((there, back), (LOW_TO_HIGH, HIGH_TO_LOW));
    }

    #[test]
    fn ports_order_the_ends_of_a_flow_within_one_host() {
        let (key, direction) = FlowKey::of_packet(end(1, 0x0200), end(1, 0x0180), UDP, IPV4);
        assert_eq!((key.low.port(), key.high.port(), direction), (0x0180, 0x0200, HIGH_TO_LOW));
    }

    #[test]
    fn counters_of_the_two_directions_stay_apart() {
        let mut counters = FlowCounters::default();
        counters.add(HIGH_TO_LOW, 7);
        counters.add(LOW_TO_HIGH, 2);
        counters.add(LOW_TO_HIGH, 3);
        assert_eq!(counters.low_to_high, Traffic { packets: 2, payload_bytes: 5 });
        assert_eq!(counters.high_to_low, Traffic { packets: 1, payload_bytes: 7 });
    }
}
