//! TLS 1.3 records sealed and opened in userspace (RFC 8446 section 5), with the cipher of rustls's provider, and what both
//! kinds of record share: control messages, key updates, limits. The bytes are moved by `proxy::pump`, keys in the kernel are
//! `ktls`'s.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use rustls::{
    ConnectionTrafficSecrets, ContentType, ProtocolVersion, SupportedCipherSuite,
    client::ClientConnectionData,
    crypto::cipher::{
        AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
    },
    kernel::KernelConnection,
    server::ServerConnectionData,
};

/// The most plaintext in one record (RFC 8446 section 5.1).
pub const MAX_PLAINTEXT: usize = 16 << 10;
pub const HEADER: usize = 5;
/// The most ciphertext in one record: plaintext, type, padding and tag (RFC 8446 section 5.2).
pub const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;
pub const MAX_RECORD: usize = HEADER + MAX_CIPHERTEXT;
/// By how much a record without padding is longer than its content: header, content type, and the tag, which all of TLS 1.3's suites have alike.
pub const OVERHEAD: u64 = HEADER as u64 + 1 + 16;

pub const ALERT: u8 = 21;
pub const HANDSHAKE: u8 = 22;
pub const APPLICATION_DATA: u8 = 23;
pub const CLOSE_NOTIFY: [u8; 2] = [1, 0];
/// `key_update(24)`, length 1, `update_not_requested(0)` or `update_requested(1)` (RFC 8446 section 4.6.3).
const KEY_UPDATE: u8 = 24;
const NEW_SESSION_TICKET: u8 = 4;

/// How many 16-byte blocks AES-GCM may seal with one key. RFC 8446 section 5.5 allows 2^24.5 full records of 2^10 blocks; short
/// records cost less, so blocks are counted.
pub const AES_GCM_BLOCKS: u64 = 1 << 34;

/// Bytes on the wire in which there are at most so many blocks: a record of one byte takes 23 of them and three blocks.
pub const AES_GCM_BYTES: u64 = AES_GCM_BLOCKS * 7;

/// The blocks that a record takes: its content, and two for the type and the tag.
pub fn blocks(bytes: usize) -> u64 {
    bytes.div_ceil(16) as u64 + 2
}

/// How the ends of a connection tell each other that a stream is over, agreed by ALPN (`config::ending`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ending {
    /// As TLS has it: close_notify, and its absence is a truncation. Keys may be changed.
    #[default]
    CloseNotify,
    /// As TCP has it: FIN, because at one of the ends is an application that knows nothing of records. Nothing but application data is sent after
    /// the handshake: no alerts, no changes of keys. A stream that somebody cuts at the end of a record looks like a whole one.
    Fin,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error(
        "the peer sent a record header that TLS 1.3 does not allow: type {content_type}, version {version:#06x}, length {length}"
    )]
    Header { content_type: u8, version: u16, length: usize },
    #[error("a record could not be opened or sealed")]
    Crypto(#[source] rustls::Error),
    #[error("the peer sent the alert {0}")]
    Alert(AlertName),
    #[error("the peer sent an unexpected message after the handshake: {0}")]
    Unexpected(String),
    #[error("the keys cannot be changed")]
    KeyUpdate(#[source] rustls::Error),
    #[error("the peer changes its keys, and it was agreed that neither end does")]
    KeyUpdateNotAgreed,
}

/// An alert's number with the name that RFC 8446 section 6 gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AlertName(pub u8);

impl std::fmt::Display for AlertName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} ({})", rustls::AlertDescription::from(self.0), self.0)
    }
}

/// What a control record asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Control {
    /// The peer has sent all it had to send.
    Closed,
    /// The peer's next records are under new keys; `answer` tells that it wants ours changed too.
    KeyUpdate { answer: bool },
    /// Nothing to do, such as a ticket that is not used.
    Nothing,
}

/// Reads one alert or handshake record's content. A message may not span records here: those that follow a handshake are a
/// few bytes long, and RFC 8446 section 5.1 wants a KeyUpdate to end its record.
pub fn read_control(content_type: u8, payload: &[u8]) -> Result<Control, RecordError> {
    match (content_type, payload) {
        (ALERT, &[_, 0]) => Ok(Control::Closed),
        // user_canceled announces a close_notify.
        (ALERT, &[_, 90]) => Ok(Control::Nothing),
        (ALERT, &[_, description]) => Err(RecordError::Alert(AlertName(description))),
        (HANDSHAKE, mut messages) => {
            let mut control = Control::Nothing;
            while let &[kind, a, b, c, ref rest @ ..] = messages {
                let length = u32::from_be_bytes([0, a, b, c]) as usize;
                let Some((body, rest)) = rest.split_at_checked(length) else {
                    return Err(RecordError::Unexpected(format!("a cut handshake message of type {kind}")));
                };
                match (kind, body) {
                    (KEY_UPDATE, &[request @ (0 | 1)]) if rest.is_empty() => {
                        control = Control::KeyUpdate { answer: request == 1 };
                    }
                    // We ask for none and resume nothing; a server may send them all the same.
                    (NEW_SESSION_TICKET, _) => {}
                    _ => return Err(RecordError::Unexpected(format!("a handshake message of type {kind}"))),
                }
                messages = rest;
            }
            if messages.is_empty() {
                Ok(control)
            } else {
                Err(RecordError::Unexpected("a cut handshake message".into()))
            }
        }
        _ => Err(RecordError::Unexpected(format!("a record of type {content_type} with {} bytes", payload.len()))),
    }
}

pub fn key_update_message(answer_wanted: bool) -> [u8; 5] {
    [KEY_UPDATE, 0, 0, 1, u8::from(answer_wanted)]
}

/// The part of a rustls connection that outlives its handshake: it makes new secrets for a key update.
pub enum Schedule {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

/// What the two directions of one connection share.
pub struct Session {
    pub suite: SupportedCipherSuite,
    pub ending: Ending,
    schedule: Mutex<Schedule>,
    /// The peer asked for new keys from us: sent before the next application data.
    update_wanted: AtomicBool,
    updates_sent: AtomicU64,
    updates_received: AtomicU64,
}

impl Session {
    pub fn new(suite: SupportedCipherSuite, ending: Ending, schedule: Schedule) -> Self {
        let (update_wanted, updates_sent, updates_received) = Default::default();
        Self { suite, ending, schedule: Mutex::new(schedule), update_wanted, updates_sent, updates_received }
    }

    pub fn next_transmit(&self) -> Result<(u64, ConnectionTrafficSecrets), RecordError> {
        let secrets = match &mut *self.schedule() {
            Schedule::Client(connection) => connection.update_tx_secret(),
            Schedule::Server(connection) => connection.update_tx_secret(),
        };
        self.updates_sent.fetch_add(u64::from(secrets.is_ok()), Ordering::Relaxed);
        secrets.map_err(RecordError::KeyUpdate)
    }

    /// After the peer's KeyUpdate.
    pub fn next_receive(&self) -> Result<(u64, ConnectionTrafficSecrets), RecordError> {
        if self.ending == Ending::Fin {
            return Err(RecordError::KeyUpdateNotAgreed);
        }
        let secrets = match &mut *self.schedule() {
            Schedule::Client(connection) => connection.update_rx_secret(),
            Schedule::Server(connection) => connection.update_rx_secret(),
        };
        self.updates_received.fetch_add(u64::from(secrets.is_ok()), Ordering::Relaxed);
        secrets.map_err(RecordError::KeyUpdate)
    }

    /// How often the keys were changed: ours, and the peer's.
    pub fn updates(&self) -> (u64, u64) {
        (self.updates_sent.load(Ordering::Relaxed), self.updates_received.load(Ordering::Relaxed))
    }

    pub fn want_update(&self) {
        self.update_wanted.store(true, Ordering::Relaxed);
    }

    pub fn take_update_wanted(&self) -> bool {
        self.update_wanted.load(Ordering::Relaxed) && self.update_wanted.swap(false, Ordering::Relaxed)
    }

    /// How many blocks one key may seal.
    pub fn block_limit(&self) -> u64 {
        match self.suite.suite() {
            rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => u64::MAX,
            _ => AES_GCM_BLOCKS,
        }
    }

    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seals records of one direction.
pub struct Sealer {
    cipher: Box<dyn MessageEncrypter>,
    sequence: u64,
    sealed: u64,
}

impl Sealer {
    pub fn new(
        suite: SupportedCipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, RecordError> {
        let (key, iv) = key_and_iv(secrets)?;
        let suite = suite.tls13().ok_or_else(not_tls13)?;
        Ok(Self { cipher: suite.aead_alg.encrypter(key, iv), sequence, sealed: 0 })
    }

    /// One whole record, header included. `payload` is at most `MAX_PLAINTEXT` long.
    pub fn seal(&mut self, content_type: u8, payload: &[u8]) -> Result<Vec<u8>, RecordError> {
        let message = OutboundPlainMessage {
            typ: ContentType::from(content_type),
            version: ProtocolVersion::TLSv1_3,
            payload: OutboundChunks::Single(payload),
        };
        let record = self.cipher.encrypt(message, self.sequence).map_err(RecordError::Crypto)?;
        self.sequence += 1;
        self.sealed += blocks(payload.len());
        Ok(record.encode())
    }

    /// Blocks that this key has sealed.
    pub fn sealed(&self) -> u64 {
        self.sealed
    }
}

/// Opens records of one direction.
pub struct Opener {
    cipher: Box<dyn MessageDecrypter>,
    sequence: u64,
}

impl Opener {
    pub fn new(
        suite: SupportedCipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, RecordError> {
        let (key, iv) = key_and_iv(secrets)?;
        let suite = suite.tls13().ok_or_else(not_tls13)?;
        Ok(Self { cipher: suite.aead_alg.decrypter(key, iv), sequence })
    }

    /// Opens the record's body in place: its content type and its content.
    pub fn open<'a>(&mut self, body: &'a mut [u8]) -> Result<(u8, &'a [u8]), RecordError> {
        let message = InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, body);
        let plain = self.cipher.decrypt(message, self.sequence).map_err(RecordError::Crypto)?;
        self.sequence += 1;
        Ok((plain.typ.into(), plain.payload))
    }
}

/// The length of the body of the record that `bytes` begin with: `None` while the header is not whole. After the handshake every record
/// looks like application data (RFC 8446 section 5.2).
pub fn sealed_body_length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let &[content_type, major, minor, a, b, ..] = bytes else { return Ok(None) };
    let (version, length) = (u16::from_be_bytes([major, minor]), usize::from(u16::from_be_bytes([a, b])));
    if content_type != APPLICATION_DATA || major != 3 || length == 0 || length > MAX_CIPHERTEXT {
        return Err(RecordError::Header { content_type, version, length });
    }
    Ok(Some(length))
}

fn key_and_iv(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), RecordError> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(RecordError::Crypto(rustls::Error::General("a cipher that Marline does not know".into()))),
    }
}

fn not_tls13() -> RecordError {
    RecordError::Crypto(rustls::Error::General("not a TLS 1.3 cipher suite".into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn close_notify_ends_the_stream_and_other_alerts_are_errors() {
        assert_eq!(read_control(ALERT, &[1, 0]).ok(), Some(Control::Closed));
        assert_eq!(read_control(ALERT, &[2, 0]).ok(), Some(Control::Closed));
        assert_eq!(read_control(ALERT, &[1, 90]).ok(), Some(Control::Nothing));
        let error = read_control(ALERT, &[2, 40]).err().map(|e| e.to_string());
        assert_eq!(error.as_deref(), Some("the peer sent the alert HandshakeFailure (40)"));
        assert!(read_control(ALERT, &[2]).is_err());
    }

    #[test]
    fn key_update_is_read_and_must_end_its_record() {
        assert_eq!(read_control(HANDSHAKE, &key_update_message(true)).ok(), Some(Control::KeyUpdate { answer: true }));
        assert_eq!(
            read_control(HANDSHAKE, &key_update_message(false)).ok(),
            Some(Control::KeyUpdate { answer: false })
        );
        assert!(read_control(HANDSHAKE, &[24, 0, 0, 1, 2]).is_err());
        assert!(read_control(HANDSHAKE, &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0]).is_err());
        assert_eq!(read_control(HANDSHAKE, &[4, 0, 0, 2, 9, 9]).ok(), Some(Control::Nothing));
        assert!(read_control(HANDSHAKE, &[1, 0, 0, 0]).is_err());
    }

    proptest! {
        #[test]
        fn control_records_of_any_content_never_panic(kind: u8, payload: Vec<u8>) {
            let _ = read_control(kind, &payload);
        }

        #[test]
        fn headers_of_any_content_never_panic_and_never_promise_too_much(bytes: Vec<u8>) {
            if let Ok(Some(length)) = sealed_body_length(&bytes) {
                prop_assert!(length > 0 && length <= MAX_CIPHERTEXT);
            }
        }
    }
}
