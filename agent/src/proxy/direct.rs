//! Direct connections: after the handshake the application's own socket is the TLS connection, and the agent is out of the way.
//!
//! Both sides are upgrades of the proxied path, per connection: whatever speaks against one, it is [`Why`], and the bytes go through
//! the agent as ever. `client` connects in the application's place while it is held in connect(); `server` hands ready sockets
//! out at accept(); `close` sees to it that what the kernel has accepted is not lost when a socket is closed; `watch` knows
//! the connections that the agent does not hold any more, and ends them when they are revoked; `keys` bounds what one key seals.
//! How calls come to be held is `sys::seccomp`'s and the keeper's; `filter` receives them, on threads that no other pod depends
//! on, and `ask` keeps questions about a pod's sockets off the others' threads.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustls::CipherSuite;
use tokio::time::timeout;

use super::{Context, connections::lock, offload::Capabilities, pod::Pod};
use crate::{
    keeper::{KeeperError, Link},
    sys::netns::NetnsCookie,
    tls::{config, ktls},
    words::{Direction, PumpKind, with_causes},
};

mod ask;
mod client;
mod close;
mod filter;
mod keys;
mod noted;
mod parts;
mod server;
mod socket;
mod waiting;
mod watch;

pub(super) use ask::Turns;
pub(in crate::proxy) use parts::canonical;
pub(super) use server::{Offered, Ready};

/// How the operator wants it.
#[derive(Debug, Clone)]
pub struct DirectSettings {
    /// Where the keeper's sockets are.
    pub keeper: PathBuf,
    /// How long a non-blocking connect() may be held.
    pub hold: Duration,
    /// How many bytes, records included, one key of AES-GCM may seal.
    pub key_limit: u64,
}

/// Why a connection goes through the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// Nothing in the pod runs under the filter.
    NoFilter,
    /// The call was not held: io_uring, another entry than the native one, or a process without the filter.
    NotNotified,
    /// The kernel's records are not up to it: see [`usable`].
    Kernel,
    /// The socket has an option that does not go with records.
    SocketOption,
    /// The other end did not agree.
    PeerNotReady,
    /// The handshake took longer than a connect() may be held.
    TooSlow,
    /// Not a connection of the mesh: its bytes are not encrypted.
    Plaintext,
    /// Policy forbids it; the proxied path says so.
    Policy,
    /// Too many at once.
    Busy,
    /// The application listens for IPv6, and an IPv4 socket is all there is this once.
    AddressFamily,
    /// The calling process could not be reached.
    Caller,
    /// Something else than the agent wrote on the socket.
    Interference,
    /// A part of the agent was not up to it; its log says more.
    Agent,
}

impl Why {
    /// The label by which it is counted and shown.
    pub fn label(self) -> &'static str {
        match self {
            Self::NoFilter => "no_filter",
            Self::NotNotified => "not_notified",
            Self::Kernel => "kernel",
            Self::SocketOption => "socket_option",
            Self::PeerNotReady => "peer_not_ready",
            Self::TooSlow => "handshake_too_slow",
            Self::Plaintext => "plaintext",
            Self::Policy => "policy",
            Self::Busy => "busy",
            Self::AddressFamily => "address_family",
            Self::Caller => "caller",
            Self::Interference => "interference",
            Self::Agent => "agent",
        }
    }
}

/// Whether this kernel's records can be an application's. Where splice stalls, sendfile() of an application would.
fn usable(kernel: &Capabilities) -> bool {
    config::WITHOUT_RECORDS
        || (!kernel.suites.is_empty() && kernel.pump == PumpKind::Splice && stays_connected().unwrap_or(false))
}

/// A socket that is handed out is not under the hooks: it must not become another connection.
fn stays_connected() -> std::io::Result<bool> {
    let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let socket = std::net::TcpStream::connect(listener.local_addr()?)?;
    ktls::attach(&socket).map_err(std::io::Error::other)?;
    ktls::stays_connected(&socket)
}

/// What all direct connections of an agent share.
pub struct Direct {
    settings: DirectSettings,
    usable: bool,
    pods: Mutex<HashMap<NetnsCookie, Arc<Pod>>>,
    /// How many filters there are in a pod.
    filters: Mutex<HashMap<NetnsCookie, usize>>,
    /// Why a connect() was left to the kernel, by the socket's cookie, until the connection comes by the proxied way.
    left: Mutex<HashMap<u64, Why>>,
    /// Whether every pod has been served, once.
    settled: AtomicBool,
    /// Whether the keeper is there.
    kept: AtomicBool,
    /// The filters whose calls are received.
    served: Mutex<Vec<Weak<filter::Filter>>>,
    /// Whether this agent ends, and receives no more.
    ending: tokio::sync::watch::Sender<bool>,
    /// Destinations that are not worth another try yet.
    avoided: Mutex<HashMap<SocketAddr, (Instant, Why)>>,
    /// Where connections go on for long, by the far end of those from the pods and the near end of those to them.
    lasting: Mutex<HashSet<(Direction, SocketAddr)>>,
    /// Whether the kernel has a cipher for them.
    lasting_possible: bool,
    server: server::Server,
    watch: watch::Watch,
}

/// How long a destination is not tried again.
const AVOID: Duration = Duration::from_secs(30);
/// Bounds the memories above; when one is full it is forgotten.
const REMEMBERED: usize = 1 << 16;
/// How long a pod waits for its direct connections to be taken over.
const TAKEN_OVER: Duration = Duration::from_secs(1);
/// After the keeper was not there.
const RETRY: Duration = Duration::from_secs(1);

impl Direct {
    pub fn new(settings: DirectSettings, kernel: &Capabilities) -> Self {
        Self {
            settings,
            usable: usable(kernel),
            pods: Mutex::default(),
            filters: Mutex::default(),
            left: Mutex::default(),
            settled: AtomicBool::new(false),
            kept: AtomicBool::new(false),
            served: Mutex::default(),
            ending: tokio::sync::watch::Sender::new(false),
            avoided: Mutex::default(),
            lasting: Mutex::default(),
            lasting_possible: kernel.suites.contains(&CipherSuite::TLS13_CHACHA20_POLY1305_SHA256),
            server: server::Server::default(),
            watch: watch::Watch::default(),
        }
    }

    /// What a client's handshake may agree on: that the server is direct.
    pub fn usable(&self) -> bool {
        self.usable
    }

    /// The keeper's directory, and whether it answers there.
    pub fn keeper(&self) -> (&std::path::Path, bool) {
        (&self.settings.keeper, self.kept.load(Ordering::Relaxed))
    }

    pub fn filtered(&self, netns: NetnsCookie) -> bool {
        lock(&self.filters).contains_key(&netns)
    }

    /// Whether connections can be handed to applications of this pod.
    pub fn ready(&self, netns: NetnsCookie) -> bool {
        self.usable && self.filtered(netns) && self.watch.follows(netns) && lock(&self.pods).contains_key(&netns)
    }

    /// Whether accept() on this port is known to be held, or not known not to be.
    pub fn heard(&self, netns: NetnsCookie, port: u16) -> bool {
        self.server.heard(netns, port)
    }

    fn pod(&self, netns: NetnsCookie) -> Option<Arc<Pod>> {
        lock(&self.pods).get(&netns).cloned()
    }

    /// Why a connection that came by the proxied way was not direct.
    pub fn why(&self, netns: NetnsCookie, socket: u64) -> Why {
        match lock(&self.left).remove(&socket) {
            Some(why) => why,
            None if self.filtered(netns) => Why::NotNotified,
            None => Why::NoFilter,
        }
    }

    fn leave(&self, socket: u64, why: Why) {
        let mut left = lock(&self.left);
        if left.len() >= REMEMBERED {
            left.clear();
        }
        left.insert(socket, why);
    }

    /// Forgets that a namespace was taken over, where nothing is known of it any more: there may be many in an agent's life.
    fn tidy(&self, netns: NetnsCookie) {
        let served = || self.filtered(netns) || self.pod(netns).is_some();
        self.watch.disown(netns, || served() || self.watch.follows(netns) || self.watch.any(netns));
    }

    fn avoided(&self, destination: SocketAddr) -> Option<Why> {
        let mut avoided = lock(&self.avoided);
        let (since, why) = *avoided.get(&destination)?;
        if since.elapsed() < AVOID {
            return Some(why);
        }
        avoided.remove(&destination);
        None
    }

    fn avoid(&self, destination: SocketAddr, why: Why) {
        let mut avoided = lock(&self.avoided);
        if avoided.len() >= REMEMBERED {
            avoided.clear();
        }
        avoided.insert(destination, (Instant::now(), why));
    }
}

/// A pod's calls are served for as long as this lives.
pub(super) struct Enrolled<'a>(&'a Context, NetnsCookie);

impl<'a> Enrolled<'a> {
    /// From here on the pod's connects and accepts are the agent's to answer; what a predecessor left is taken over.
    pub async fn new(ctx: &'a Arc<Context>, pod: &Arc<Pod>) -> Option<Self> {
        let direct = ctx.direct.as_ref()?;
        let cookie = pod.netns.cookie();
        lock(&direct.pods).insert(cookie, pod.clone());
        let enrolled = Self(ctx, cookie);
        // The pod is served without that, too; what it waits for may be in the pod's own hands.
        let _ = timeout(TAKEN_OVER, watch::follow(ctx, pod)).await;
        Some(enrolled)
    }
}

impl Drop for Enrolled<'_> {
    fn drop(&mut self) {
        if let Some(direct) = &self.0.direct {
            let mut pods = lock(&direct.pods);
            pods.remove(&self.1);
            direct.server.forget(self.1);
            drop(pods);
        }
        self.0.pods_changed.send_modify(|count| *count += 1);
    }
}

/// Takes the notify descriptors from the keeper and answers what they hold, as long as the agent lives.
pub(super) async fn run(ctx: Arc<Context>) {
    let Some(direct) = &ctx.direct else { return };
    tokio::spawn(forget_strangers(ctx.clone()));
    let mut absent = false;
    loop {
        match Link::open(&direct.settings.keeper).await {
            Ok(link) => {
                absent = false;
                tracing::info!(keeper = %direct.settings.keeper.display(), "connected to the keeper");
                direct.moved();
                direct.kept.store(true, Ordering::Relaxed);
                if let Err(error) = take(&ctx, &link).await {
                    tracing::error!("the keeper: {}", with_causes(&error));
                }
                direct.kept.store(false, Ordering::Relaxed);
            }
            Err(error) if !absent => {
                absent = true;
                tracing::warn!("no direct connections for new pods: {}", with_causes(&error));
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn take(ctx: &Arc<Context>, link: &Link) -> Result<(), KeeperError> {
    let mut changes = ctx.pods_changed.subscribe();
    let mut told = false;
    loop {
        // Calls that have waited for an agent go on when what the kernel makes of them is served.
        if !told && served(ctx) {
            told = link.ready().inspect_err(|error| tracing::warn!("the keeper: {}", with_causes(error))).is_ok();
        }
        let retry = !told && served(ctx);
        tokio::select! {
            held = link.next() => match held {
                Ok(Some(held)) => filter::start(ctx, held),
                Ok(None) => return Ok(()),
                // A new connection would wait until this one has ended, which every filter holds open.
                Err(error @ KeeperError::Strange(_)) => tracing::error!("the keeper: {}", with_causes(&error)),
                Err(error) => return Err(error),
            },
            _ = changes.changed(), if !told => {}
            () = tokio::time::sleep(RETRY), if retry => {}
        }
    }
}

/// Whether every local pod is served. One that cannot be does not keep the others' calls waiting: the keeper's patience ends.
fn served(ctx: &Context) -> bool {
    let Some(direct) = &ctx.direct else { return false };
    let (snapshot, pods) = (ctx.state.load(), lock(&direct.pods));
    let enrolled: HashSet<_> = pods.values().map(|pod| pod.netns.path()).collect();
    snapshot.local.iter().all(|local| enrolled.contains(local.netns.as_path()))
}

/// What a predecessor has kept of pods that are not of the mesh any more is forgotten, once it is known which are.
async fn forget_strangers(ctx: Arc<Context>) {
    let mut changes = ctx.pods_changed.subscribe();
    while !served(&ctx) {
        if changes.changed().await.is_err() {
            return;
        }
    }
    if let Some(direct) = &ctx.direct {
        direct.settled.store(true, Ordering::SeqCst);
    }
    noted::forget_strangers(&ctx);
}
