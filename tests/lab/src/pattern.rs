//! Bytes that are the same on both ends and nowhere twice in a row, and their digest.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

/// Endless bytes determined by a seed: a lost, doubled or moved piece changes the digest.
#[derive(Debug, Clone)]
pub struct Pattern(u64);

impl Pattern {
    pub fn new(seed: u64) -> Self {
        // xorshift stays at zero forever
        Self(seed | 1 << 63)
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// What a stream was: its length and the SHA-256 of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digested {
    pub bytes: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

/// Writes `bytes` of the pattern; the digest of what was written.
pub fn send(to: &mut impl Write, seed: u64, bytes: u64) -> io::Result<Digested> {
    let mut pattern = Pattern::new(seed);
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut left = bytes;
    while left > 0 {
        let piece = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        pattern.fill(&mut buffer[..piece]);
        to.write_all(&buffer[..piece])?;
        digest.update(&buffer[..piece]);
        left -= piece as u64;
    }
    Ok(Digested { bytes, sha256: hex(&digest.finalize()) })
}

/// Reads to the end of the stream; the digest of what came.
pub fn receive(from: &mut impl Read) -> io::Result<Digested> {
    receive_rest(Running::default(), from)
}

/// Reads `bytes`, in front of what [`receive_rest`] reads.
pub fn receive_first(from: &mut impl Read, bytes: u64) -> io::Result<Running> {
    let mut running = Running::default();
    let mut buffer = vec![0; 64 * 1024];
    while running.bytes < bytes {
        let room = usize::try_from(bytes - running.bytes).map_or(buffer.len(), |left| left.min(buffer.len()));
        match from.read(&mut buffer[..room])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => running.update(&buffer[..n]),
        }
    }
    Ok(running)
}

/// Reads to the end of the stream; the digest of everything, `first` too.
pub fn receive_rest(mut first: Running, from: &mut impl Read) -> io::Result<Digested> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(first.finish()),
            n => first.update(&buffer[..n]),
        }
    }
}

/// A digest under way.
#[derive(Debug, Clone, Default)]
pub struct Running {
    bytes: u64,
    digest: Sha256,
}

impl Running {
    pub fn update(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        self.digest.update(piece);
    }

    pub fn finish(self) -> Digested {
        Digested { bytes: self.bytes, sha256: hex(&self.digest.finalize()) }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_is_received() -> io::Result<()> {
        let mut wire = Vec::new();
        let sent = send(&mut wire, 7, 100_003)?;
        assert_eq!(receive(&mut wire.as_slice())?, sent);
        Ok(())
    }

    #[test]
    fn a_flipped_bit_shows() -> io::Result<()> {
        let mut wire = Vec::new();
        let sent = send(&mut wire, 7, 1000)?;
        wire[500] ^= 1;
        assert_ne!(receive(&mut wire.as_slice())?, sent);
        Ok(())
    }
}
