//! One end of TLS: ciphertext in, plaintext out, and back, without a socket and without buffers of its own.
//!
//! rustls' unbuffered interface works in the worker's buffers. A connection keeps only the part of a record that has come
//! so far; one that is silent keeps nothing.
//!
//! rustls remembers where in its input the parts of a handshake message are, and panics when that is not there: whatever
//! it is called for, it is given everything it has not used up.

use std::{fmt, sync::Arc};

use proxy_core::session::Tick;
use rustls::{
    ClientConfig, Error, HandshakeKind, ProtocolVersion, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::{CertificateDer, ServerName},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, UnbufferedConnectionCommon, UnbufferedStatus},
};

/// The most plaintext in a record (RFC 8446 §5.1).
pub const RECORD: usize = 16 * 1024;
/// A reader can use a record when all of it is there: after silence the first ones fit into a segment each, so that
/// nobody waits for a second round trip of TCP's initial window (RFC 6928).
const FIRST_RECORD: usize = 1400;
const FIRST_RECORDS: u8 = 8;
/// In milliseconds.
const SILENCE: u64 = 1000;
/// Room for what one record may become, and for what the protocol itself may want to say before it.
const ROOM: usize = 2 * RECORD;
/// The longest message of a handshake that rustls takes, and its records' headers.
pub const MAX_PENDING: usize = 72 * 1024;

pub struct Leg {
    peer: Peer,
    /// Ciphertext that has been read and cannot be understood yet.
    pub pending: Vec<u8>,
    /// `pending` has not been looked at to its end.
    pub more: bool,
    /// Plaintext that came out when it was not asked for.
    stash: Vec<u8>,
    /// What this end has to say on its own account: to be written behind what waits already, and before anything else.
    pub control: Vec<u8>,
    /// The peer has said that nothing more comes (`close_notify`).
    pub closed: bool,
    /// So have we.
    pub close_sent: bool,
    /// What came is not TLS as it should be. Asked again, rustls would go on reading behind its own alert.
    refused: Option<Error>,
    /// Records until they become large.
    small: u8,
    sealed: Tick,
}

enum Peer {
    Client(Box<UnbufferedServerConnection>),
    Backend(Box<UnbufferedClientConnection>),
}

/// Where plaintext goes: as it is, or into the next leg.
#[derive(Debug)]
pub struct Out<'a> {
    pub bytes: &'a mut [u8],
    pub length: usize,
    /// Of the stream.
    pub payload: u64,
    pub leg: Option<&'a mut Leg>,
    pub now: Tick,
}

impl Out<'_> {
    /// For another record.
    pub fn has_room(&self) -> bool {
        self.bytes.len() - self.length >= ROOM
    }

    pub fn put(&mut self, plain: &[u8]) -> Result<(), Error> {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        self.length += match &mut self.leg {
            Some(leg) => leg.seal(plain, room, self.now)?,
            None => {
                let Some(room) = room.get_mut(..plain.len()) else { return Err(no_room()) };
                room.copy_from_slice(plain);
                plain.len()
            }
        };
        self.payload += plain.len() as u64;
        Ok(())
    }
}

/// Both kinds of connection, which rustls does not give a name in common.
trait Records {
    type Data;
    fn next<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Records for UnbufferedConnectionCommon<ServerConnectionData> {
    type Data = ServerConnectionData;
    fn next<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, ServerConnectionData> {
        self.process_tls_records(input)
    }
}

impl Records for UnbufferedConnectionCommon<ClientConnectionData> {
    type Data = ClientConnectionData;
    fn next<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, ClientConnectionData> {
        self.process_tls_records(input)
    }
}

macro_rules! with {
    ($peer:expr, $connection:ident => $do:expr) => {
        match $peer {
            Peer::Client(peer) => {
                let $connection = &mut ***peer;
                $do
            }
            Peer::Backend(peer) => {
                let $connection = &mut ***peer;
                $do
            }
        }
    };
}

macro_rules! about {
    ($leg:expr, $connection:ident => $tell:expr) => {
        match &$leg.peer {
            Peer::Client($connection) => $tell,
            Peer::Backend($connection) => $tell,
        }
    };
}

impl Leg {
    /// `received`: what the client has sent so far.
    pub fn with_client(config: Arc<ServerConfig>, received: Vec<u8>) -> Result<Self, Error> {
        let peer = Peer::Client(Box::new(UnbufferedServerConnection::new(config)?));
        Ok(Self { more: !received.is_empty(), pending: received, ..Self::new(peer) })
    }

    /// `before`: bytes that go in front of TLS.
    pub fn with_backend(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        alpn: Option<Vec<u8>>,
        before: Vec<u8>,
    ) -> Result<Self, Error> {
        let connection = UnbufferedClientConnection::new_with_alpn(config, name, alpn.into_iter().collect())?;
        // The hello does not wait for anything.
        Ok(Self { more: true, control: before, ..Self::new(Peer::Backend(Box::new(connection))) })
    }

    fn new(peer: Peer) -> Self {
        Self {
            peer,
            pending: Vec::new(),
            more: false,
            stash: Vec::new(),
            control: Vec::new(),
            closed: false,
            close_sent: false,
            refused: None,
            small: FIRST_RECORDS,
            sealed: Tick(0),
        }
    }

    pub fn is_handshaking(&self) -> bool {
        about!(self, connection => connection.is_handshaking())
    }

    /// `None` while it is under way.
    pub fn is_resumed(&self) -> bool {
        about!(self, connection => connection.handshake_kind()) == Some(HandshakeKind::Resumed)
    }

    pub fn alpn(&self) -> Option<&[u8]> {
        about!(self, connection => connection.alpn_protocol())
    }

    pub fn version(&self) -> Option<ProtocolVersion> {
        about!(self, connection => connection.protocol_version())
    }

    /// The certificate the peer has shown.
    pub fn certificate(&self) -> Option<&CertificateDer<'static>> {
        about!(self, connection => connection.peer_certificates())?.first()
    }

    /// Goes on with the handshake until it is complete or `input` is used up. What is not used is kept.
    pub fn shake(&mut self, input: &mut [u8]) -> Result<(), Error> {
        self.read(input, None)
    }

    /// What is in `input` becomes plaintext in `out`, as far as there is room. What is not used is kept.
    pub fn open(&mut self, input: &mut [u8], out: &mut Out<'_>) -> Result<(), Error> {
        if !self.stash.is_empty() {
            let stash = std::mem::take(&mut self.stash);
            stash.chunks(RECORD).try_for_each(|record| out.put(record))?;
        }
        self.read(input, Some(out))
    }

    /// `input`: what was pending, and more.
    fn read(&mut self, input: &mut [u8], mut out: Option<&mut Out<'_>>) -> Result<(), Error> {
        self.is_sound()?;
        let mut used = 0;
        self.more = false;
        let result = loop {
            let stop = match &out {
                Some(out) => !out.has_room(),
                None => !self.is_handshaking(),
            };
            if stop {
                self.more = true;
                break Ok(());
            }
            let rest = input.get_mut(used..).unwrap_or_default();
            let Self { peer, control, closed, stash, .. } = self;
            let (discard, next) = with!(peer, connection => {
                let status = connection.next(rest);
                let put = &mut |plain: &[u8]| match &mut out {
                    Some(out) => out.put(plain),
                    None => {
                        stash.extend_from_slice(plain);
                        Ok(())
                    }
                };
                (status.discard, take(status.state, control, closed, put))
            });
            used += discard;
            match next {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(self.refuse(error)),
            }
        };
        self.keep(input.get(used..).unwrap_or_default());
        result
    }

    fn is_sound(&self) -> Result<(), Error> {
        self.refused.clone().map_or(Ok(()), Err)
    }

    fn refuse(&mut self, error: Error) -> Error {
        self.refused = Some(error.clone());
        error
    }

    /// Records of `plain`, at the front of `out`.
    fn seal(&mut self, plain: &[u8], out: &mut [u8], now: Tick) -> Result<usize, Error> {
        if now.0 >= self.sealed.0 + SILENCE {
            self.small = FIRST_RECORDS;
        }
        self.sealed = now;
        let (mut left, mut length) = (plain, 0);
        while !left.is_empty() {
            let most = if self.small > 0 { FIRST_RECORD } else { RECORD };
            self.small = self.small.saturating_sub(1);
            let (record, rest) = left.split_at(most.min(left.len()));
            let room = out.get_mut(length..).unwrap_or_default();
            length += self.write(Some(record), room)?;
            left = rest;
        }
        Ok(length)
    }

    /// Says that nothing more comes. The record for it, or nothing where none can be sent any more.
    pub fn close(&mut self) -> Vec<u8> {
        self.close_sent = true;
        let mut record = vec![0; 1024];
        let length = self.write(None, &mut record).unwrap_or_default();
        record.truncate(length);
        record
    }

    /// After an error, once: what was to be said before it, and the alert. Nothing more is read.
    pub fn say_why(&mut self) {
        while about!(self, connection => connection.wants_write()) {
            let Self { peer, control, closed, pending, .. } = self;
            let said =
                with!(peer, connection => take(connection.next(pending).state, control, closed, &mut |_| Ok(())));
            if said.is_err() {
                return;
            }
        }
    }

    /// What rustls still wants to say after a handshake: tickets.
    pub fn say_the_rest(&mut self) {
        while self.refused.is_none() {
            let Self { peer, control, closed, stash, pending, .. } = self;
            let (discard, next) = with!(peer, connection => {
                let status = connection.next(pending);
                let put = &mut |plain: &[u8]| {
                    stash.extend_from_slice(plain);
                    Ok(())
                };
                (status.discard, take(status.state, control, closed, put))
            });
            self.used(discard);
            match next {
                Ok(true) => {}
                Ok(false) => return,
                // Told to who reads next.
                Err(error) => drop(self.refuse(error)),
            }
        }
    }

    /// One record at the front of `room`, and before it what rustls wants to say. `None`: `close_notify`.
    fn write(&mut self, plain: Option<&[u8]>, room: &mut [u8]) -> Result<usize, Error> {
        self.is_sound()?;
        let general = |error: &dyn fmt::Display| Error::General(error.to_string());
        let mut length = 0;
        loop {
            let Self { peer, control, closed, stash, pending, .. } = self;
            let room = room.get_mut(length..).unwrap_or_default();
            let (discard, next) = with!(peer, connection => {
                let status = connection.next(pending);
                let next = match status.state {
                    Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                        let written = match plain {
                            Some(plain) => traffic.encrypt(plain, room),
                            None => traffic.queue_close_notify(room),
                        };
                        written.map(|written| (written, true)).map_err(|error| general(&error))
                    }
                    // It is written before the record, which has a later number.
                    Ok(ConnectionState::EncodeTlsData(mut data)) => {
                        data.encode(room).map(|written| (written, false)).map_err(|error| general(&error))
                    }
                    state => {
                        let put = &mut |plain: &[u8]| {
                            stash.extend_from_slice(plain);
                            Ok(())
                        };
                        match take(state, control, closed, put) {
                            Ok(true) => Ok((0, false)),
                            Ok(false) => Err(Error::HandshakeNotComplete),
                            Err(error) => Err(error),
                        }
                    }
                };
                (status.discard, next)
            });
            self.used(discard);
            let (written, done) = next.map_err(|error| self.refuse(error))?;
            length += written;
            if done {
                return Ok(length);
            }
        }
    }

    fn used(&mut self, discard: usize) {
        if discard > 0 {
            self.pending.drain(..discard.min(self.pending.len()));
            self.more = true;
        }
    }

    fn keep(&mut self, unused: &[u8]) {
        if unused.is_empty() {
            self.pending = Vec::new();
        } else {
            self.pending.clear();
            self.pending.extend_from_slice(unused);
        }
    }
}

/// True when there may be more to take.
fn take<D>(
    state: Result<ConnectionState<'_, '_, D>, Error>,
    control: &mut Vec<u8>,
    closed: &mut bool,
    put: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
) -> Result<bool, Error> {
    match state? {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                put(record?.payload)?;
            }
            Ok(true)
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let length = control.len();
            // What it needs is what it says when there is no room.
            let mut result = data.encode(&mut []);
            if let Err(EncodeError::InsufficientSize(needed)) = result {
                control.resize(length + needed.required_size, 0);
                result = data.encode(control.get_mut(length..).unwrap_or_default());
            }
            result.map(|_| true).map_err(|error| Error::General(error.to_string()))
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(true)
        }
        ConnectionState::PeerClosed => {
            *closed = true;
            Ok(true)
        }
        // Early data is not offered.
        _ => Ok(false),
    }
}

fn no_room() -> Error {
    Error::General("no room for a record".into())
}

/// Nothing of what it holds is for a log.
impl fmt::Debug for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leg")
            .field("closed", &self.closed)
            .field("close_sent", &self.close_sent)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
