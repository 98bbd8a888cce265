//! The Internet checksum (RFC 1071), incrementally (RFC 1624), on words in the order of this machine, as the kernel computes it.

/// The sum of words.
#[inline(always)]
pub const fn sum<const N: usize>(words: &[u32; N]) -> u64 {
    let (mut sum, mut at) = (0, 0);
    while at < N {
        sum += words[at] as u64;
        at += 1;
    }
    sum
}

/// What is to be added to a checksum's sum when bytes that summed up to `old` are replaced by such that sum up to `new`.
#[inline(always)]
pub const fn difference(old: u64, new: u64) -> u32 {
    add(fold32(new), !fold32(old))
}

/// One's complement sum of two.
#[inline(always)]
pub const fn add(a: u32, b: u32) -> u32 {
    fold32(a as u64 + b as u64)
}

/// The checksum after a difference, both as they are in memory.
#[inline(always)]
pub const fn adjust(checksum: u16, difference: u32) -> u16 {
    !fold16(add(!checksum as u32, difference))
}

#[inline(always)]
const fn fold32(sum: u64) -> u32 {
    let once = (sum & 0xffff_ffff) + (sum >> 32);
    ((once & 0xffff_ffff) + (once >> 32)) as u32
}

#[inline(always)]
pub const fn fold16(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}
