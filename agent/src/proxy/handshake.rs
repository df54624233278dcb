//! The TLS 1.3 handshake on a socket, with reads that take exactly one record: nothing is over-read, so nothing has to be drained
//! before the kernel takes the records over. Who the peer must be is in the configuration (`tls::config`); what
//! becomes of the keys is `offload`'s.

use std::{io, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, ExtractedSecrets, NamedGroup, ServerConfig, SupportedCipherSuite,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::{CertificateDer, ServerName},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{
    identity::SpiffeId,
    tls::{
        config::peer_id,
        records::{HEADER, MAX_CIPHERTEXT, Schedule},
    },
};

#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("the connection ended in the handshake")]
    Cut,
    #[error("the connection failed in the handshake")]
    Io(#[source] io::Error),
    #[error("no TLS came from the peer: its first bytes are {0:02x?}")]
    NotTls([u8; HEADER]),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error("the peer sent more than the handshake before it was done")]
    Trailing,
    #[error("the peer's certificate")]
    Peer(#[source] crate::tls::config::TlsError),
    #[error("the handshake took longer than {0:?}")]
    TimedOut(Duration),
}

/// A handshake that is done: who the peer is, and the keys.
pub struct Secured {
    pub peer: SpiffeId,
    pub suite: SupportedCipherSuite,
    pub group: Option<NamedGroup>,
    pub alpn: Option<Vec<u8>>,
    pub secrets: ExtractedSecrets,
    pub schedule: Schedule,
    /// Bytes that the handshake took on the wire.
    pub sent: u64,
    pub received: u64,
}

/// What a handshake is done on.
pub trait Socket: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Socket for T {}

/// Whether the server knows none of the protocols that the client offered.
pub fn not_agreed(error: &HandshakeError) -> bool {
    use rustls::{AlertDescription, Error};
    matches!(error, HandshakeError::Tls(Error::AlertReceived(AlertDescription::NoApplicationProtocol)))
}

pub async fn connect(
    socket: &mut impl Socket,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    limit: Duration,
) -> Result<Secured, HandshakeError> {
    let connection = UnbufferedClientConnection::new(config, name)?;
    within(limit, run(socket, connection)).await
}

pub async fn accept(
    socket: &mut impl Socket,
    config: Arc<ServerConfig>,
    limit: Duration,
) -> Result<Secured, HandshakeError> {
    let connection = UnbufferedServerConnection::new(config)?;
    within(limit, run(socket, connection)).await
}

async fn within<T>(
    limit: Duration,
    handshake: impl Future<Output = Result<T, HandshakeError>>,
) -> Result<T, HandshakeError> {
    tokio::time::timeout(limit, handshake).await.unwrap_or(Err(HandshakeError::TimedOut(limit)))
}

/// What differs between the two ends of rustls's unbuffered connections.
trait End: Sized + Send {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &rustls::CommonState;
    fn finish(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error>;
}

impl End for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn common(&self) -> &rustls::CommonState {
        self
    }
    fn finish(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error> {
        let (secrets, connection) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Schedule::Client(Box::new(connection))))
    }
}

impl End for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn common(&self) -> &rustls::CommonState {
        self
    }
    fn finish(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error> {
        let (secrets, connection) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Schedule::Server(Box::new(connection))))
    }
}

/// What one turn of rustls's state machine leaves to do.
enum Next {
    Again,
    Send,
    Read,
    Done,
    Fail(HandshakeError),
}

async fn run<E: End>(socket: &mut impl Socket, mut connection: E) -> Result<Secured, HandshakeError> {
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    let (mut sent, mut received) = (0, 0);
    loop {
        match turn(&mut connection, &mut incoming, &mut outgoing) {
            Next::Again => {}
            Next::Send => {
                socket.write_all(&outgoing).await.map_err(failed)?;
                sent += outgoing.len() as u64;
                outgoing.clear();
            }
            Next::Read => received += read_record(socket, &mut incoming).await? as u64,
            Next::Done => break,
            Next::Fail(error) => {
                say_why(socket, &mut connection, &mut incoming).await;
                return Err(error);
            }
        }
    }
    if !incoming.is_empty() {
        return Err(HandshakeError::Trailing);
    }
    let common = connection.common();
    let suite = common.negotiated_cipher_suite().ok_or(rustls::Error::HandshakeNotComplete)?;
    let group = common.negotiated_key_exchange_group().map(|group| group.name());
    let alpn = common.alpn_protocol().map(<[u8]>::to_vec);
    let chain: &[CertificateDer<'_>] = common.peer_certificates().unwrap_or_default();
    let peer = peer_id(chain).map_err(HandshakeError::Peer)?;
    let (secrets, schedule) = connection.finish()?;
    Ok(Secured { peer, suite, group, alpn, secrets, schedule, sent, received })
}

fn turn<E: End>(connection: &mut E, incoming: &mut Vec<u8>, outgoing: &mut Vec<u8>) -> Next {
    let UnbufferedStatus { discard, state, .. } = connection.process(incoming);
    let next = match state {
        Err(error) => Next::Fail(error.into()),
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(outgoing, |room| data.encode(room)).map_or_else(Next::Fail, |()| Next::Again)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Next::Send
        }
        Ok(ConnectionState::BlockedHandshake) => Next::Read,
        Ok(ConnectionState::WriteTraffic(_)) => Next::Done,
        Ok(_) => Next::Fail(HandshakeError::Trailing),
    };
    incoming.drain(..discard.min(incoming.len()));
    // A server may write before the client's Finished has come; the handshake is done when both have spoken.
    match next {
        Next::Done if connection.common().is_handshaking() => Next::Read,
        next => next,
    }
}

fn encode(
    outgoing: &mut Vec<u8>,
    mut fill: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), HandshakeError> {
    let start = outgoing.len();
    let mut room = 4 << 10;
    loop {
        outgoing.resize(start + room, 0);
        match fill(&mut outgoing[start..]) {
            Ok(written) => {
                outgoing.truncate(start + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) if required_size > room => {
                room = required_size;
            }
            Err(error) => {
                outgoing.truncate(start);
                return Err(HandshakeError::Tls(rustls::Error::General(error.to_string())));
            }
        }
    }
}

/// Tells the peer why, with the alert that rustls has queued; a peer that does not take it is not waited for. What is left of `incoming` is
/// passed on, though nobody wants it: rustls remembers where in it the messages behind the bad one are, and panics where they are not.
async fn say_why<E: End>(socket: &mut impl Socket, connection: &mut E, incoming: &mut Vec<u8>) {
    let mut outgoing = Vec::new();
    loop {
        let UnbufferedStatus { discard, state, .. } = connection.process(incoming);
        let Ok(ConnectionState::EncodeTlsData(mut data)) = state else { break };
        if encode(&mut outgoing, |room| data.encode(room)).is_err() {
            return;
        }
        incoming.drain(..discard.min(incoming.len()));
    }
    if !outgoing.is_empty() {
        let _ = tokio::time::timeout(Duration::from_millis(200), socket.write_all(&outgoing)).await;
    }
}

/// Returns how many bytes it took.
async fn read_record(socket: &mut impl Socket, incoming: &mut Vec<u8>) -> Result<usize, HandshakeError> {
    let mut header = [0; HEADER];
    socket.read_exact(&mut header).await.map_err(failed)?;
    let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
    if !(20..=23).contains(&header[0]) || header[1] != 3 || length > MAX_CIPHERTEXT {
        return Err(HandshakeError::NotTls(header));
    }
    let start = incoming.len();
    incoming.extend_from_slice(&header);
    incoming.resize(start + HEADER + length, 0);
    socket.read_exact(&mut incoming[start + HEADER..]).await.map_err(failed)?;
    Ok(HEADER + length)
}

fn failed(error: io::Error) -> HandshakeError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => HandshakeError::Cut,
        _ => HandshakeError::Io(error),
    }
}
