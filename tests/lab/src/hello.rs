//! TLS ClientHellos as clients of every kind send them, built byte by byte (RFC 8446 §4.1.2). A TLS server answers them.

/// IANA numbers of what is offered.
const P256: u16 = 0x0017;
const X25519: u16 = 0x001d;
const X25519MLKEM768: u16 = 0x11ec;
/// Encapsulation key of ML-KEM-768 and an X25519 share.
const HYBRID_SHARE: usize = 1184 + 32;
const RECORD_MAX: usize = 16_384;

/// A ClientHello to be.
#[derive(Debug, Clone)]
pub struct Hello {
    server_name: Option<String>,
    alpn: Vec<String>,
    padding: usize,
    post_quantum: bool,
    record: usize,
}

impl Hello {
    pub fn to(server_name: &str) -> Self {
        Self { server_name: Some(server_name.to_owned()), ..Self::anonymous() }
    }

    /// Without a server name.
    pub fn anonymous() -> Self {
        Self { server_name: None, alpn: Vec::new(), padding: 0, post_quantum: false, record: RECORD_MAX }
    }

    pub fn alpn(mut self, protocols: &[&str]) -> Self {
        self.alpn = protocols.iter().map(|p| (*p).to_owned()).collect();
        self
    }

    /// A padding extension of so many bytes, 0–65535 less what the rest takes.
    pub fn padding(mut self, bytes: usize) -> Self {
        self.padding = bytes;
        self
    }

    /// With a key share of X25519MLKEM768 ahead of the classical one, as browsers send it, and with Encrypted ClientHello: more than
    /// one segment.
    pub fn post_quantum(mut self) -> Self {
        self.post_quantum = true;
        self
    }

    /// At most so many bytes of the message in one TLS record (RFC 8446 §5.1 lets a message span records).
    pub fn in_records_of(mut self, bytes: usize) -> Self {
        self.record = bytes;
        self
    }

    /// As it goes over the wire: the message in its records.
    pub fn build(&self) -> Vec<u8> {
        let message = self.message();
        let records = message
            .chunks(self.record)
            .flat_map(|piece| [&[0x16, 3, 1][..], &u16s(&[piece.len() as u16]), piece].concat());
        records.collect()
    }

    fn message(&self) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend((0..32).map(|n| n * 7));
        body.extend(vec8(&[9; 32]));
        // TLS 1.3 suites, and one of TLS 1.2.
        body.extend(vec16(&u16s(&[0x1301, 0x1302, 0x1303, 0xc02b, 0xc02f])));
        body.extend(vec8(&[0]));
        body.extend(vec16(&self.extensions()));
        let length = (body.len() as u32).to_be_bytes();
        [&[1, length[1], length[2], length[3]], body.as_slice()].concat()
    }

    fn extensions(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut put = |kind: u16, content: Vec<u8>| all.extend([u16s(&[kind]), vec16(&content)].concat());
        // A value that nobody knows comes first, as GREASE does (RFC 8701).
        put(0x2a2a, Vec::new());
        if let Some(name) = &self.server_name {
            put(0, vec16(&[&[0], vec16(name.as_bytes()).as_slice()].concat()));
        }
        let groups = if self.post_quantum { u16s(&[X25519MLKEM768, X25519, P256]) } else { u16s(&[X25519, P256]) };
        put(10, vec16(&groups));
        put(13, vec16(&u16s(&[0x0403, 0x0804, 0x0401])));
        if !self.alpn.is_empty() {
            put(16, vec16(&self.alpn.iter().flat_map(|p| vec8(p.as_bytes())).collect::<Vec<u8>>()));
        }
        put(43, vec8(&u16s(&[0x0304, 0x0303])));
        put(51, vec16(&self.key_shares()));
        if self.post_quantum {
            // Encrypted ClientHello, or a pretence of it (RFC 9849 §6.2): browsers always send one.
            put(0xfe0d, [&[0, 0, 1, 0, 1, 7], vec16(&[9; 32]).as_slice(), &vec16(&[9; 208])].concat());
        }
        if self.padding > 0 {
            put(21, vec![0; self.padding]);
        }
        all
    }

    fn key_shares(&self) -> Vec<u8> {
        let share = |group: u16, length: usize| [u16s(&[group]), vec16(&vec![9; length])].concat();
        let hybrid = if self.post_quantum { share(X25519MLKEM768, HYBRID_SHARE) } else { Vec::new() };
        [hybrid, share(X25519, 32)].concat()
    }
}

fn u16s(numbers: &[u16]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_be_bytes()).collect()
}

fn vec8(content: &[u8]) -> Vec<u8> {
    [&[content.len() as u8], content].concat()
}

fn vec16(content: &[u8]) -> Vec<u8> {
    [&(content.len() as u16).to_be_bytes(), content].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_post_quantum_hello_takes_two_segments_and_lengths_add_up() {
        let hello = Hello::to("shop.example.com").post_quantum().alpn(&["h2", "http/1.1"]).build();
        assert!(hello.len() > 1460, "{}", hello.len());
        assert_eq!(usize::from(u16::from_be_bytes([hello[3], hello[4]])), hello.len() - 5);
        assert_eq!(hello[5], 1);
        let message = usize::from(hello[6]) << 16 | usize::from(hello[7]) << 8 | usize::from(hello[8]);
        assert_eq!(message, hello.len() - 9);
    }

    #[test]
    fn a_hello_in_small_records_carries_the_same_message() {
        let whole = Hello::to("a.example").build();
        let split = Hello::to("a.example").in_records_of(10).build();
        let message: Vec<u8> = split.chunks(15).flat_map(|record| record[5..].to_vec()).collect();
        assert_eq!(message, whole[5..]);
    }
}
