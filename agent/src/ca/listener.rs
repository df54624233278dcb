//! Takes connections and does their TLS handshakes, each in a task of its own and within a time limit, so that one that stalls keeps nobody
//! waiting. Connections are bounded, all together and from one address: more of them wait in the listener's queue, or are closed. So is one
//! on which nobody proves who it is.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::{REQUEST, metrics::Metrics};

/// One address may have this part of all connections.
const SHARE: u32 = 8;
/// While the process has no more descriptors to give.
pub(super) const BREATH: Duration = Duration::from_millis(100);

/// A connection whose handshake is done.
pub struct Accepted {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// When it is closed if nobody has proved who it is by then. None when somebody has.
    deadline: Option<Pin<Box<Sleep>>>,
    /// What a request that is being answered then may still take.
    reprieve: Option<Duration>,
    metrics: Arc<Metrics>,
    _place: Place,
}

/// What the service knows of a connection, and tells of its requests.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    requests: Arc<Requests>,
}

#[derive(Default, Debug)]
struct Requests {
    authenticated: AtomicBool,
    /// Those that are being answered.
    pending: AtomicU32,
}

/// A request that is being answered.
pub struct Pending(Arc<Requests>);

impl Peer {
    fn new(address: SocketAddr) -> Self {
        Self { address, requests: Arc::default() }
    }

    pub fn request(&self) -> Pending {
        self.requests.pending.fetch_add(1, Ordering::Relaxed);
        Pending(Arc::clone(&self.requests))
    }
}

impl Pending {
    /// Somebody has proved who it is: the connection may stay.
    pub fn authenticated(&self) {
        self.0.authenticated.store(true, Ordering::Relaxed);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Takes connections until `shutdown` becomes true.
pub fn accept(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    connections: u32,
    handshake: Duration,
    metrics: Arc<Metrics>,
    shutdown: watch::Receiver<bool>,
) -> ReceiverStream<io::Result<Accepted>> {
    let (sender, receiver) = mpsc::channel(16);
    let doorman = Doorman {
        acceptor: TlsAcceptor::from(config),
        slots: Arc::new(Semaphore::new(usize::try_from(connections).unwrap_or(Semaphore::MAX_PERMITS))),
        places: Places::new(connections),
        handshake,
        metrics,
    };
    tokio::spawn(doorman.run(listener, sender, shutdown));
    ReceiverStream::new(receiver)
}

struct Doorman {
    acceptor: TlsAcceptor,
    slots: Arc<Semaphore>,
    places: Places,
    handshake: Duration,
    metrics: Arc<Metrics>,
}

impl Doorman {
    async fn run(
        self,
        listener: TcpListener,
        sender: mpsc::Sender<io::Result<Accepted>>,
        mut shutdown: watch::Receiver<bool>,
    ) {
        loop {
            let next = async {
                let slot = Arc::clone(&self.slots).acquire_owned().await;
                (slot, listener.accept().await)
            };
            let (slot, accepted) = tokio::select! {
                next = next => next,
                _ = shutdown.wait_for(|stop| *stop) => return,
            };
            let Ok(slot) = slot else { return };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("a connection could not be accepted: {error}");
                    sleep(BREATH).await;
                    continue;
                }
            };
            let Some(place) = self.places.take(peer.ip(), slot) else {
                self.metrics.connection("too_many_of_one_address");
                continue;
            };
            let _ = stream.set_nodelay(true);
            let (acceptor, sender) = (self.acceptor.clone(), sender.clone());
            let (limit, metrics) = (self.handshake, Arc::clone(&self.metrics));
            tokio::spawn(async move {
                let outcome = match timeout(limit, acceptor.accept(stream)).await {
                    Err(_) => "handshake_too_slow",
                    Ok(Err(error)) => {
                        tracing::debug!(%peer, "TLS handshake: {error}");
                        "handshake_failed"
                    }
                    Ok(Ok(stream)) => {
                        let accepted = Accepted {
                            stream,
                            peer: Peer::new(peer),
                            deadline: Some(Box::pin(sleep(limit))),
                            reprieve: Some(REQUEST),
                            metrics: Arc::clone(&metrics),
                            _place: place,
                        };
                        let _ = sender.send(Ok(accepted)).await;
                        "accepted"
                    }
                };
                metrics.connection(outcome);
            });
        }
    }
}

#[derive(Clone)]
pub(super) struct Places {
    most: u32,
    taken: Arc<Mutex<HashMap<IpAddr, u32>>>,
}

/// One of an address's connections.
pub(super) struct Place {
    places: Places,
    address: IpAddr,
    _slot: OwnedSemaphorePermit,
}

impl Places {
    pub(super) fn new(connections: u32) -> Self {
        Self { most: (connections / SHARE).max(1), taken: Arc::default() }
    }

    pub(super) fn take(&self, address: IpAddr, slot: OwnedSemaphorePermit) -> Option<Place> {
        let address = network(address);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(address).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Place { places: self.clone(), address, _slot: slot })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

/// A machine has an IPv6 network of its own, mostly.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        other => other,
    }
}

impl Connected for Accepted {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl Accepted {
    /// Whether its time is up: a connection that holds a place must be somebody's.
    fn is_overdue(&mut self, context: &mut Context<'_>) -> bool {
        if self.peer.requests.authenticated.load(Ordering::Relaxed) {
            self.deadline = None;
        }
        let Some(deadline) = &mut self.deadline else { return false };
        while deadline.as_mut().poll(context).is_ready() {
            let pending = self.peer.requests.pending.load(Ordering::Relaxed) > 0;
            let Some(more) = self.reprieve.take().filter(|_| pending) else { return true };
            deadline.as_mut().reset(Instant::now() + more);
        }
        false
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_overdue(context) {
            self.metrics.connection("never_authenticated");
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
