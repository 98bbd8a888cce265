//! What a proxy answers to a hello that it does not serve.

use super::NotHello;

/// A fatal alert (RFC 8446 §6); the numbers are the ones on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Alert {
    UnexpectedMessage = 10,
    RecordOverflow = 22,
    IllegalParameter = 47,
    DecodeError = 50,
    ProtocolVersion = 70,
    /// Not the client's fault: there is nothing to serve it with yet.
    InternalError = 80,
    /// No route for this server name (RFC 6066 §3).
    UnrecognizedName = 112,
    /// No route for these protocols (RFC 7301 §3.2).
    NoApplicationProtocol = 120,
}

impl Alert {
    /// The record to send before the connection is closed: unencrypted, as nothing has been agreed on.
    pub const fn record(self) -> [u8; 7] {
        const ALERT: u8 = 21;
        const FATAL: u8 = 2;
        [ALERT, 3, 3, 0, 2, FATAL, self as u8]
    }
}

impl NotHello {
    /// `None` for a peer that does not speak TLS: it would not understand.
    pub const fn alert(self) -> Option<Alert> {
        match self {
            Self::NotTls => None,
            Self::OtherMessage => Some(Alert::UnexpectedMessage),
            Self::Version => Some(Alert::ProtocolVersion),
            Self::TooLong => Some(Alert::RecordOverflow),
            Self::Malformed => Some(Alert::DecodeError),
            Self::DuplicateExtension | Self::BadServerName => Some(Alert::IllegalParameter),
        }
    }
}
