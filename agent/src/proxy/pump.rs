//! Moves the bytes of one connection between the application's leg and the wire's, so that the application sees exactly the TCP
//! connection it believes to have: half-close either way, RST as RST, back pressure, no limit of size or time. The directions
//! are `outward` (application to wire) and `inward`. After a failure the caller closes the legs, which then are reset: `capture::guard`.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{io::Interest, net::TcpStream, sync::watch, time::timeout};

use crate::{
    sys::{socket, splice::Pipe},
    tls::{
        ktls::KtlsError,
        records::{ALERT, Ending, Opener, RecordError, Sealer, Session},
    },
    words::PumpKind,
};

use super::offload::Records;

mod buffer;
mod closing;
mod inward;
mod outward;

/// The reason that `watchdog` gives: no rule has changed, the peer has gone.
pub const DEAD_PEER: &str = "the peer's host does not answer any more";

/// How long an application may take to read what came before a reset.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Bytes moved so far, as the application counts them: `received` what its socket has taken, `sent` what the wire's has (where records are
/// made here, in whole records). So after any end the receiver's agent has not counted more than the sender's.
#[derive(Debug, Default)]
pub struct Moved {
    pub sent: AtomicU64,
    pub received: AtomicU64,
}

/// Why a connection did not end by both sides closing it.
#[derive(Debug, thiserror::Error)]
pub enum PumpError {
    #[error("the application reset the connection")]
    Application(#[source] io::Error),
    #[error("the peer reset the connection")]
    Wire(#[source] io::Error),
    #[error("the peer's host does not answer any more")]
    PeerDead(#[source] io::Error),
    #[error("the peer's stream ended without close_notify: it may have been cut")]
    Truncated,
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the kernel could not open a record")]
    Unreadable(#[source] io::Error),
    #[error("the peer changed its keys and this kernel cannot (needs Linux 6.14)")]
    CannotRekey(#[source] KtlsError),
    #[error("the key has sealed as many records as it may and this kernel cannot change it (needs Linux 6.14)")]
    RecordLimit(#[source] KtlsError),
    #[error("the key has sealed as many records as it may, and it was agreed that keys are not changed")]
    KeySpent,
    #[error("no longer allowed: {0}")]
    Revoked(&'static str),
    #[error("the pump has no pipe")]
    Pipe(#[source] io::Error),
}

impl PumpError {
    /// The label under which it is counted.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Application(_) => "application_reset",
            Self::Wire(_) => "peer_reset",
            Self::PeerDead(_) => "peer_dead",
            Self::Truncated => "truncated",
            Self::Record(RecordError::Alert(_)) => "peer_alert",
            Self::Record(_) => "bad_record",
            Self::Unreadable(_) => "bad_record",
            Self::CannotRekey(_) => "cannot_rekey",
            Self::RecordLimit(_) | Self::KeySpent => "record_limit",
            Self::Revoked(_) => "revoked",
            Self::Pipe(_) => "no_pipe",
        }
    }
}

/// Runs until both directions have ended in order, or one has failed. On an error both legs must be reset.
pub async fn run(
    app: &TcpStream,
    wire: &TcpStream,
    records: Records,
    moved: &Moved,
    revoked: &mut watch::Receiver<Option<&'static str>>,
) -> Result<(), PumpError> {
    let (out, into) = split(wire, records);
    let outward = outward::run(app, wire, out, moved);
    let inward = inward::run(wire, app, into, moved);
    tokio::pin!(outward, inward);
    let (mut sent_all, mut received_all) = (false, false);
    while !(sent_all && received_all) {
        tokio::select! {
            // What is revoked moves nothing more, whatever waits to be moved.
            biased;
            reason = revocation(revoked) => return Err(revoked_for(reason)),
            result = &mut outward, if !sent_all => {
                if let Err(error) = result {
                    return Err(if received_all { error } else { last_words(error, inward).await });
                }
                sent_all = true;
            }
            result = &mut inward, if !received_all => { result?; received_all = true; }
            // A side that has closed its half is no longer read: its reset shows only as an error event.
            error = reset(app), if sent_all => return Err(PumpError::Application(error)),
            error = reset(wire), if received_all => return Err(wire_lost(error)),
        }
    }
    Ok(())
}

/// A peer that refuses says why and closes, and what it had not read makes that close a reset, which sending hears of first. What
/// had come before is still there to be read: it is the application's, and its last record may be the reason.
async fn last_words(error: PumpError, inward: impl Future<Output = Result<(), PumpError>>) -> PumpError {
    if !matches!(error, PumpError::Wire(_)) {
        return error;
    }
    match timeout(LAST_WORDS, inward).await {
        Ok(Err(said @ PumpError::Record(_))) => said,
        _ => error,
    }
}

/// Ends a wire leg whose connection goes no further: with an alert where the peer takes one, and not as the end of a stream.
pub async fn refuse(wire: TcpStream, records: Records, alert: u8) {
    if records.ending() == Ending::Fin {
        // The guard's reset says it.
        return;
    }
    let payload = [2, alert];
    let said = match records {
        Records::Plain(_) => return,
        Records::Kernel { .. } => socket::send_record(&wire, ALERT, &payload).map(drop),
        Records::Userspace { mut sealer, .. } => match sealer.seal(ALERT, &payload) {
            Ok(record) => socket::send(&wire, &record).map(drop),
            Err(error) => Err(io::Error::other(error)),
        },
    };
    match said.and_then(|()| super::capture::settle(&wire)).and_then(|()| shut(&wire)) {
        Ok(()) => {}
        Err(error) => tracing::debug!(%error, "the peer could not be told why it is refused"),
    }
}

async fn reset(leg: &TcpStream) -> io::Error {
    match leg.ready(Interest::ERROR).await {
        Ok(_) => socket::take_error(leg).ok().flatten().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        Err(error) => error,
    }
}

fn revoked_for(reason: &'static str) -> PumpError {
    match reason {
        DEAD_PEER => PumpError::PeerDead(io::ErrorKind::TimedOut.into()),
        reason => PumpError::Revoked(reason),
    }
}

async fn revocation(revoked: &mut watch::Receiver<Option<&'static str>>) -> &'static str {
    let reason = revoked.wait_for(Option::is_some).await.map(|reason| *reason);
    match reason {
        Ok(reason) => reason.unwrap_or("revoked"),
        // Who could revoke is gone: nobody will.
        Err(_) => std::future::pending().await,
    }
}

/// How one direction's bytes become records.
enum Out {
    Plain(PumpKind),
    Kernel {
        pump: PumpKind,
        session: std::sync::Arc<Session>,
        sealed: u64,
        /// Bytes given to the kernel since `start`.
        given: u64,
        start: Option<closing::Start>,
    },
    Userspace {
        sealer: Box<Sealer>,
        session: std::sync::Arc<Session>,
    },
}

/// How records become one direction's bytes.
enum In {
    Plain(PumpKind),
    Kernel { pump: PumpKind, session: std::sync::Arc<Session> },
    Userspace { opener: Box<Opener>, session: std::sync::Arc<Session> },
}

fn split(wire: &TcpStream, records: Records) -> (Out, In) {
    match records {
        Records::Plain(pump) => (Out::Plain(pump), In::Plain(pump)),
        Records::Kernel { pump, session } => {
            let start = match session.ending {
                Ending::Fin => closing::Start::of(wire, session.suite),
                Ending::CloseNotify => None,
            };
            (Out::Kernel { pump, session: session.clone(), sealed: 0, given: 0, start }, In::Kernel { pump, session })
        }
        Records::Userspace { sealer, opener, session } => {
            (Out::Userspace { sealer, session: session.clone() }, In::Userspace { opener, session })
        }
    }
}

/// What to wait for before reading. Kernel TLS reports a record that it cannot open as an error alone, without the socket
/// becoming readable (net/tls/tls_sw.c, tls_err_abort).
pub(super) const READ: Interest = Interest::READABLE.add(Interest::ERROR);

/// Reads if there is something to be read, or an error to be heard. tokio's `try_io` knows only one interest at a time.
pub(super) fn try_read<T>(from: &TcpStream, mut read: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match from.try_io(Interest::READABLE, &mut read) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => from.try_io(Interest::ERROR, read),
        result => result,
    }
}

/// Whether a burst of reading ended because nothing was left for now, or for good.
enum Burst {
    Drained,
    Ended,
}

/// Lets the other direction and other connections have the thread after so much work: bytes, and for each read as much as a page of
/// them, so that a peer that sends records with nothing in them does not keep it.
struct Budget(usize);

impl Budget {
    const BYTES: usize = 1 << 20;

    fn new() -> Self {
        Self(Self::BYTES)
    }

    async fn spend(&mut self, bytes: usize) {
        self.0 = self.0.saturating_sub(bytes.max(4096));
        if self.0 == 0 {
            self.0 = Self::BYTES;
            tokio::task::yield_now().await;
        }
    }
}

/// What is counted of what a socket takes, part by part: the counts are right also if the rest never goes.
enum Taken<'a> {
    Nothing,
    Bytes(&'a AtomicU64),
    /// Whole records, by their length and that of their plaintext; the last first.
    Records {
        counter: &'a AtomicU64,
        left: Vec<(usize, usize)>,
        partly: usize,
    },
}

impl Taken<'_> {
    fn took(&mut self, bytes: usize) {
        match self {
            Self::Nothing => {}
            Self::Bytes(counter) => add(counter, bytes),
            Self::Records { counter, left, partly } => {
                *partly += bytes;
                while let Some((_, plaintext)) = left.pop_if(|(record, _)| {
                    let whole = *record <= *partly;
                    *partly -= if whole { *record } else { 0 };
                    whole
                }) {
                    add(counter, plaintext);
                }
            }
        }
    }
}

/// Writes all of `data`, waiting where the socket takes no more.
async fn send_all(to: &TcpStream, mut data: &[u8], mut taken: Taken<'_>) -> io::Result<()> {
    while !data.is_empty() {
        match to.try_io(Interest::WRITABLE, || socket::send(to, data)) {
            Ok(sent) => {
                taken.took(sent);
                data = &data[sent..];
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// As `send_all`, of what a pipe holds.
async fn drain_all(pipe: &mut Pipe, to: &TcpStream, counter: &AtomicU64) -> io::Result<()> {
    while !pipe.is_empty() {
        match to.try_io(Interest::WRITABLE, || pipe.drain(to)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(taken) => add(counter, taken),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// As `send_all`, for several pieces at once.
async fn send_all_vectored(to: &TcpStream, mut pieces: &mut [io::IoSlice<'_>], mut taken: Taken<'_>) -> io::Result<()> {
    while !pieces.is_empty() {
        match to.try_write_vectored(pieces) {
            Ok(sent) => {
                taken.took(sent);
                io::IoSlice::advance_slices(&mut pieces, sent);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Keepalive and retransmission give up with ETIMEDOUT; all else is the peer's reset.
fn wire_lost(error: io::Error) -> PumpError {
    match error.raw_os_error() {
        Some(libc::ETIMEDOUT | libc::EHOSTUNREACH) => PumpError::PeerDead(error),
        _ => PumpError::Wire(error),
    }
}

/// Ends the half of a TCP connection that this side writes.
fn shut(leg: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(leg).shutdown(std::net::Shutdown::Write)
}

fn add(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    /// Without a bias the order is another each time: often enough for each to be first.
    #[tokio::test]
    async fn what_was_revoked_before_its_pump_began_moves_nothing() {
        for pump in [PumpKind::Copy, PumpKind::Splice] {
            for _ in 0..20 {
                let ((mut near, app), (wire, mut far)) = (pair().await, pair().await);
                near.write_all(b"out").await.unwrap();
                far.write_all(b"in").await.unwrap();
                let (revoke, mut revoked) = watch::channel(None);
                revoke.send_replace(Some("a test"));
                let moved = Moved::default();
                let ended = run(&app, &wire, Records::Plain(pump), &moved, &mut revoked).await;
                assert!(matches!(ended, Err(PumpError::Revoked("a test"))), "{ended:?}");
                let counts = (moved.sent.load(Ordering::Relaxed), moved.received.load(Ordering::Relaxed));
                assert_eq!(counts, (0, 0), "{pump:?}");
                // Loopback delivers before the call returns.
                assert_eq!((socket::unread(&near).unwrap(), socket::unread(&far).unwrap()), (0, 0), "{pump:?}");
            }
        }
    }

    #[tokio::test]
    async fn what_waits_for_bytes_has_no_room_for_what_moves_them() {
        let listener = tokio::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (_revoke, mut revoked) = watch::channel(None);
        let moved = Moved::default();
        let waiting = run(&socket, &socket, Records::Plain(PumpKind::Copy), &moved, &mut revoked);
        assert!(size_of_val(&waiting) <= 1300, "{} bytes for each connection", size_of_val(&waiting));
    }
}
