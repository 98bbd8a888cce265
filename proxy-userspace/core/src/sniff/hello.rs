//! The ClientHello of TLS 1.0 to 1.3: the server name and the protocols a client asks for, before any handshake.
//!
//! Sources: RFC 8446 §4.1.2 (ClientHello), §4.2 (extensions), §5.1 (records); RFC 6066 §3 (`server_name`); RFC 7301
//! §3.1 (ALPN); RFC 8701 (GREASE); RFC 9849 (Encrypted ClientHello).
//!
//! The reader is strict about everything that says where the hello ends, which name and which protocols are in it: a
//! hello that two readers could understand in two ways would let a client be routed by one name and served by another.
//! What it does not route by (cipher suites, other extensions, GREASE) it only steps over.

mod alert;
mod message;
mod name;
mod reader;

#[cfg(test)]
mod tests;

pub use alert::Alert;
pub use message::Protocols;
pub use reader::HelloReader;

/// The longest handshake message that is read, with its header of 4 bytes. Post-quantum hellos have 1.6 to 2 KiB.
pub const MAX_MESSAGE: usize = 16 * 1024;

/// The most bytes of a connection that are looked at: [`MAX_MESSAGE`] in 64 records. Of so many bytes
/// [`parse`] never says that it needs more.
pub const MAX_HELLO: usize = MAX_MESSAGE + 64 * reader::RECORD_HEADER;

/// What a connection is routed by. With Encrypted ClientHello this is the outer, public one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The server name, lower-case, without a last dot: letters, digits, `-` and `_` in parts of 1–63 characters.
    /// `None` when the client sent none, or an IP address, which RFC 6066 §3 does not permit but clients do; rustls
    /// takes it for none too.
    pub sni: Option<Box<str>>,
    /// In the client's order of preference; empty when it sent none.
    pub alpn: Protocols,
    /// The client offers Encrypted ClientHello, or pretends to (GREASE ECH: nobody but the server can tell).
    pub ech: bool,
}

/// Why these bytes are not, and will not become, a ClientHello that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotHello {
    /// Another protocol, SSL 2 among them.
    #[error("not TLS: the first bytes are not the header of a handshake record")]
    NotTls,
    /// A TLS handshake that begins with something else.
    #[error("the first handshake message is not a ClientHello")]
    OtherMessage,
    #[error("the ClientHello is of a version other than SSL 3 and TLS 1")]
    Version,
    /// Beyond [`MAX_MESSAGE`] or [`MAX_HELLO`], or a record beyond 2^14 bytes (RFC 8446 §5.1).
    #[error("the ClientHello is longer than 16 KiB, or its record is")]
    TooLong,
    /// Lengths that contradict each other, something missing, or something left over.
    #[error("the ClientHello is malformed")]
    Malformed,
    /// RFC 8446 §4.2.
    #[error("the ClientHello has an extension twice")]
    DuplicateExtension,
    /// Neither a host name nor an IP address. Such a name is refused and not ignored: the default route would get
    /// what was meant for some other.
    #[error("the server name in the ClientHello is not a host name")]
    BadServerName,
}

/// Reads the hello from everything received so far, beginning with the first byte after a PROXY header. `None`: more
/// bytes are needed. Bytes behind the hello's last record are of no interest.
///
/// Each call begins anew. [`HelloReader`] is for connections: it goes over bytes that came before only once.
///
/// # Errors
/// At the first byte that cannot belong to a ClientHello.
pub fn parse(received: &[u8]) -> Result<Option<Hello>, NotHello> {
    HelloReader::default().advance(received)
}
