//! ClientHellos for tests: real ones, and made ones that no client on a test machine sends.

/// A hello whose parts can be spoilt one at a time.
#[derive(Debug, Clone)]
pub struct Sample {
    pub version: [u8; 2],
    pub session_id: Vec<u8>,
    pub cipher_suites: Vec<u8>,
    pub compression: Vec<u8>,
    pub extensions: Vec<(u16, Vec<u8>)>,
}

pub const SERVER_NAME: u16 = 0;
pub const ALPN: u16 = 16;
pub const PADDING: u16 = 21;
pub const ECH: u16 = 0xfe0d;
const GREASE: u16 = 0x0a0a;

impl Sample {
    /// With these extensions only.
    pub fn with(extensions: &[(u16, Vec<u8>)]) -> Self {
        Self {
            version: [3, 3],
            session_id: vec![7; 32],
            cipher_suites: vec![0x13, 0x01],
            compression: vec![0],
            extensions: extensions.to_vec(),
        }
    }

    /// As a browser does it: GREASE in every list, a hybrid key share, Encrypted ClientHello.
    pub fn browser() -> Self {
        let grease = GREASE.to_be_bytes();
        let groups = [&grease[..], &[0x11, 0xec, 0x00, 0x1d, 0x00, 0x17]].concat();
        let share = |group: &[u8], length| [group, &vector16(&vec![0x5a; length])].concat();
        let shares = [share(&grease, 1), share(&[0x11, 0xec], 1216), share(&[0x00, 0x1d], 32)].concat();
        let ech = [&[0, 0, 1, 0, 1, 42][..], &vector16(&[1; 32]), &vector16(&[2; 208])].concat();
        Self {
            cipher_suites: [&grease[..], &[0x13, 0x01, 0x13, 0x02, 0x13, 0x03, 0xc0, 0x2b]].concat(),
            ..Self::with(&[
                (GREASE, Vec::new()),
                (10, vector16(&groups)),
                (ALPN, alpn(&[b"\x0a\x0a", b"h2", b"http/1.1"])),
                (43, vector8(&[&grease[..], &[3, 4, 3, 3]].concat())),
                (51, vector16(&shares)),
                (ECH, ech),
                (SERVER_NAME, server_name(b"www.Example.com")),
                (0x1a1a, vec![0]),
            ])
        }
    }

    /// Padded so that the message has this length, header and all.
    pub fn padded_to(mut self, length: usize) -> Self {
        let padding = length - self.message().len() - 4;
        self.extensions.push((PADDING, vec![0; padding]));
        self
    }

    /// The handshake message.
    pub fn message(&self) -> Vec<u8> {
        let extensions = self.extensions.iter().map(|(kind, data)| [&kind.to_be_bytes()[..], &vector16(data)].concat());
        let body = [
            &self.version[..],
            &[9; 32],
            &vector8(&self.session_id),
            &vector16(&self.cipher_suites),
            &vector8(&self.compression),
            &vector16(&extensions.collect::<Vec<_>>().concat()),
        ]
        .concat();
        message(1, &body)
    }

    /// In one record.
    pub fn record(&self) -> Vec<u8> {
        records(&self.message(), 1 << 14)
    }
}

pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = (body.len() as u32).to_be_bytes();
    [&[kind], &length[..], body].concat()
}

/// The message in records of at most this many bytes each.
pub fn records(message: &[u8], payload: usize) -> Vec<u8> {
    message.chunks(payload).flat_map(|chunk| [&[22, 3, 1], &vector16(chunk)[..]].concat()).collect()
}

pub fn server_name(name: &[u8]) -> Vec<u8> {
    vector16(&[&[0], &vector16(name)[..]].concat())
}

pub fn alpn(protocols: &[&[u8]]) -> Vec<u8> {
    vector16(&protocols.iter().map(|protocol| vector8(protocol)).collect::<Vec<_>>().concat())
}

pub fn vector8(contents: &[u8]) -> Vec<u8> {
    [&[contents.len() as u8], contents].concat()
}

pub fn vector16(contents: &[u8]) -> Vec<u8> {
    [&(contents.len() as u16).to_be_bytes(), contents].concat()
}
