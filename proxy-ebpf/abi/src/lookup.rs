//! Where `sk_lookup` leads connections that dial an address and port: keys and values of the map `RANGES`.

/// An address and port that are listened on. Looked up by the longest prefix of its bits: a range of ports is the few aligned
/// blocks that it consists of.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenKey {
    /// IPv4 as `::ffff:a.b.c.d`.
    pub address: [u8; 16],
    pub port_be: [u8; 2],
}

impl ListenKey {
    /// Bits of an address: the least that a prefix has.
    pub const ADDRESS_BITS: u32 = 128;
    /// Bits of a whole key.
    pub const BITS: u32 = 144;
}

/// Value: this one is not led anywhere, whoever listens there gets it. Other values are places in the map `LISTENERS`.
pub const LEAVE: u32 = u32::MAX;
/// Value: as if nobody listened there.
pub const REFUSE: u32 = u32::MAX - 1;

/// Blocks of ports, of all listen addresses together.
pub const MAX_BLOCKS: u32 = 65_536;
/// Listening sockets that connections are led to.
pub const MAX_LISTENERS: u32 = 1024;

const _: () = assert!(size_of::<ListenKey>() == 18);
