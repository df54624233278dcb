//! Direct connections after the agent has let go of them: what is known of each is kept, also beyond the agent's own life; the
//! kernel tells when a socket is gone and what it has carried; a revoked connection is destroyed by its name.
//!
//! Bytes are TCP's: what the peer has acknowledged and what came in order, less the handshake's. Records are in them, 22 bytes each
//! more than what the application wrote.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, Weak, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use super::{Direct, ask, keys};
use crate::{
    bpf::BpfError,
    proxy::{
        Context,
        account::Account,
        authorize::{self, Permit},
        connections::{self, Facts, lock},
        pod::Pod,
        pump::PumpError,
    },
    sys::{
        diag::{Destruction, Diag, DiagSocket, Event, SocketId},
        netns::NetnsCookie,
        tcp_info::{Opening, Payload, TcpState},
    },
    tls::config::WITHOUT_RECORDS,
    words::{Direction, Endpoint, Mode, Path, TlsFacts, with_causes},
};

/// The two ends of a direct connection, as the kernel names them in the pod, and what its handshake took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub cookie: u64,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub opening: Opening,
    pub sent: u64,
    pub received: u64,
}

impl Ends {
    fn count(&self, account: &Account, payload: Payload) {
        let moved = &account.live.moved;
        moved.sent.store(payload.sent.saturating_sub(self.sent), Ordering::Relaxed);
        moved.received.store(payload.received.saturating_sub(self.received), Ordering::Relaxed);
    }

    fn id(&self) -> SocketId {
        SocketId { local: self.local, remote: self.remote, cookie: self.cookie }
    }
}

/// What is kept for a successor, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct Kept {
    netns: u64,
    direction: Direction,
    since: u64,
    local: SocketAddr,
    remote: SocketAddr,
    sent: u64,
    received: u64,
    source: Endpoint,
    destination: Endpoint,
    proved: Option<String>,
    sni: Option<String>,
    tls: Option<TlsFacts>,
    policy: Option<String>,
}

#[derive(Default)]
pub(super) struct Watch {
    live: Mutex<HashMap<u64, Live>>,
    /// How many there are in each namespace.
    counts: Mutex<HashMap<NetnsCookie, usize>>,
    /// Namespaces whose sockets' ends are listened for. Its lock is taken before that of the pods.
    followed: Mutex<HashSet<NetnsCookie>>,
    /// Namespaces for which that is about to begin. Its lock is taken before all the others.
    beginning: Mutex<HashSet<NetnsCookie>>,
    /// Namespaces of which all that is kept is this agent's own.
    adopted: Mutex<HashSet<NetnsCookie>>,
}

struct Live {
    account: Account,
    netns: NetnsCookie,
    ends: Ends,
    /// Since when its key has sealed all that it may.
    spent: Option<Instant>,
}

/// A connection whose cipher has a limit.
pub(super) struct Limited {
    pub direction: Direction,
    /// By what later ones like it are known: see `Direct::ciphers`.
    pub end: SocketAddr,
    pub spent: Option<Instant>,
}

/// The cipher without a limit, as rustls calls it.
const LASTING: &str = "TLS13_CHACHA20_POLY1305_SHA256";
/// After a listener for destroyed sockets has failed.
const RETRY: Duration = Duration::from_secs(1);
/// How long a connection waits to be told whether its leg was accepted.
const ANSWER: Duration = Duration::from_millis(200);

#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    #[error("what is known of it cannot be kept")]
    Keep(#[from] BpfError),
    #[error("what is known of it makes no JSON")]
    Json(#[from] serde_json::Error),
    #[error("its pod is not served any more, or as another workload")]
    Pod,
}

/// What is known of a connection is where a successor finds it. That comes before anything that cannot be undone, for the room is
/// bounded; dropped before the application has the connection, it is forgotten.
pub(super) struct Noted {
    ctx: Arc<Context>,
    pod: Arc<Pod>,
    ends: Ends,
    handed_over: bool,
}

impl Noted {
    pub fn new(ctx: &Arc<Context>, pod: &Arc<Pod>, account: &Account, ends: Ends) -> Result<Self, WatchError> {
        let live = &account.live;
        let facts = live.facts();
        let kept = Kept {
            netns: pod.netns.cookie().0,
            direction: live.direction,
            since: live.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
            local: ends.local,
            remote: ends.remote,
            sent: ends.sent,
            received: ends.received,
            source: facts.source,
            destination: facts.destination,
            proved: facts.proved.map(|id| id.to_string()),
            sni: facts.sni,
            tls: facts.tls,
            policy: facts.policy,
        };
        ctx.capture.keep_direct(ends.cookie, &serde_json::to_vec(&kept)?)?;
        Ok(Self { ctx: ctx.clone(), pod: pod.clone(), ends, handed_over: false })
    }

    /// The application has the connection from here on.
    pub fn hand_over(mut self, mut account: Account, permit: Permit, records: &'static str) -> Result<(), WatchError> {
        let Some(direct) = &self.ctx.direct else { return Err(WatchError::Pod) };
        let netns = self.pod.netns.cookie();
        let live = account.live.clone();
        {
            let followed = lock(&direct.watch.followed);
            let same = direct.pod(netns).is_some_and(|now| now.workload.id == self.pod.workload.id);
            if !(same && followed.contains(&netns)) {
                return Err(WatchError::Pod);
            }
            account.handed_over(records);
            direct.watch.enter(self.ends.cookie, Live { account, netns, ends: self.ends, spent: None });
        }
        self.handed_over = true;
        sever_by_name(&self.ctx, &self.pod, &live, self.ends);
        // The rules may have changed since the decision.
        if let Some(revoked) = authorize::revoked_by(&self.ctx.state.load(), live.direction, &live.facts()) {
            revoked.enforce(&live);
        }
        drop(permit);
        Ok(())
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if !self.handed_over {
            forget(&self.ctx, self.ends.cookie);
        }
    }
}

fn forget(ctx: &Context, cookie: u64) {
    if let Err(error) = ctx.capture.forget_direct(cookie) {
        tracing::warn!("a connection's record cannot be removed: {}", with_causes(&error));
    }
}

fn sever_by_name(ctx: &Context, pod: &Arc<Pod>, live: &Arc<connections::Live>, ends: Ends) {
    let (pod, runtime) = (pod.clone(), ctx.runtime.clone());
    live.severed_by(move || {
        let pod = pod.clone();
        runtime.spawn(async move { ask::end(&pod, ends.id()).await });
    });
}

/// Resets a connection that is of no use to anybody, on a thread that may wait.
pub(super) fn destroy(pod: &Pod, ends: &Ends) {
    ask::end_now(pod, ends.id());
}

/// Whether the application's end of a leg has been accepted, or will not be while no bytes come (TCP_DEFER_ACCEPT).
pub(super) async fn accepted(pod: &Arc<Pod>, local: SocketAddr, remote: SocketAddr) -> bool {
    match timeout(ANSWER, ask::ask(pod, move |diag| diag.find(local, remote))).await {
        Ok(Ok(Some(found))) => found.inode != 0 || found.state == TcpState::SYN_RECEIVED,
        // Accepted and gone, or not to be known: the leg will tell.
        Ok(Ok(None) | Err(_)) | Err(_) => true,
    }
}

/// Takes over what a predecessor has left in the pod, and listens for the ends of direct connections there: for as long as it is
/// served, or has any. New ones are made from when that is done, which the result tells.
pub(super) fn follow(ctx: &Arc<Context>, pod: &Arc<Pod>) -> oneshot::Receiver<()> {
    let (begun, told) = oneshot::channel();
    if let Some(direct) = &ctx.direct {
        let (netns, mut beginning) = (pod.netns.cookie(), lock(&direct.watch.beginning));
        if !direct.watch.follows(netns) && beginning.insert(netns) {
            tokio::spawn(begin(Arc::downgrade(ctx), pod.clone(), begun));
        }
    }
    told
}

/// Tries until it succeeds, or the pod is not served any more.
async fn begin(ctx: Weak<Context>, pod: Arc<Pod>, begun: oneshot::Sender<()>) {
    let netns = pod.netns.cookie();
    let ends = loop {
        let Some(ctx) = ctx.upgrade() else { return };
        let Some(direct) = &ctx.direct else { return };
        {
            let mut beginning = lock(&direct.watch.beginning);
            if direct.pod(netns).is_none() {
                beginning.remove(&netns);
                return;
            }
        }
        match take_over(&ctx, &pod).await {
            Ok(ends) => {
                let mut beginning = lock(&direct.watch.beginning);
                lock(&direct.watch.followed).insert(netns);
                beginning.remove(&netns);
                break ends;
            }
            Err(error) => {
                let pod = pod.netns.path().display();
                tracing::error!(%error, %pod, "direct connections cannot be followed");
            }
        }
        drop(ctx);
        tokio::time::sleep(RETRY).await;
    };
    let _ = begun.send(());
    listen(ctx, pod, ends).await;
}

async fn take_over(ctx: &Arc<Context>, pod: &Arc<Pod>) -> io::Result<Destruction> {
    let Some(direct) = &ctx.direct else { return Err(io::ErrorKind::Unsupported.into()) };
    let ends = Destruction::open(&pod.netns)?;
    if !direct.watch.adopted(pod.netns.cookie()) {
        adopt(ctx, pod).await?;
        lock(&direct.watch.adopted).insert(pod.netns.cookie());
    }
    Ok(ends)
}

impl Watch {
    /// Whether what an earlier agent has kept of a namespace is known.
    pub fn adopted(&self, netns: NetnsCookie) -> bool {
        lock(&self.adopted).contains(&netns)
    }

    /// Whether there are direct connections in a namespace.
    pub fn any(&self, netns: NetnsCookie) -> bool {
        lock(&self.counts).contains_key(&netns)
    }

    fn enter(&self, cookie: u64, live: Live) {
        *lock(&self.counts).entry(live.netns).or_default() += 1;
        lock(&self.live).insert(cookie, live);
    }

    /// Notes what a socket has sent. `None` if it is no direct connection, or has a cipher without a limit.
    pub fn count(&self, socket: &DiagSocket, sent: u64, limit: u64) -> Option<Limited> {
        let mut live = lock(&self.live);
        let live = live.get_mut(&socket.id.cookie)?;
        if let Some(payload) = socket.counts.and_then(|counts| counts.payload(live.ends.opening, None)) {
            live.ends.count(&live.account, payload);
        }
        let (direction, facts) = (live.account.live.direction, live.account.live.facts());
        if facts.tls.is_none_or(|tls| tls.cipher == LASTING) {
            return None;
        }
        if sent >= limit && live.spent.is_none() {
            live.spent = Some(Instant::now());
        }
        let end = if direction == Direction::Outbound { live.ends.remote } else { live.ends.local };
        Some(Limited { direction, end, spent: live.spent })
    }

    fn leave(&self, netns: NetnsCookie) {
        let mut counts = lock(&self.counts);
        if let Some(count) = counts.get_mut(&netns) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&netns);
            }
        }
    }

    /// Whether the ends of connections in this namespace are heard of: else there are no direct ones.
    pub fn follows(&self, netns: NetnsCookie) -> bool {
        lock(&self.followed).contains(&netns)
    }
}

async fn listen(ctx: Weak<Context>, pod: Arc<Pod>, mut ends: Destruction) {
    let Some(mut changes) = ctx.upgrade().map(|ctx| ctx.pods_changed.subscribe()) else { return };
    let mut looks = tokio::time::interval(keys::LOOK);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut look: Option<JoinHandle<()>> = None;
    loop {
        let mut time = false;
        let event = tokio::select! {
            event = ends.next() => Some(event),
            changed = changes.changed() => if changed.is_ok() { None } else { return },
            _ = looks.tick() => {
                time = true;
                None
            }
        };
        let Some(ctx) = ctx.upgrade() else { return };
        if time
            && look.as_ref().is_none_or(JoinHandle::is_finished)
            && ctx.direct.as_ref().is_some_and(|direct| direct.watch.any(pod.netns.cookie()))
        {
            look = Some(tokio::spawn(keys::check(ctx.clone(), pod.clone())));
        }
        match event {
            None => {}
            Some(Ok(Event::Destroyed(socket))) => ended(&ctx, &socket),
            Some(Ok(Event::Lost)) => missed(&ctx, &pod).await,
            Some(Err(error)) => {
                tracing::error!(%error, "the ends of direct connections cannot be heard of");
                missed(&ctx, &pod).await;
                tokio::time::sleep(RETRY).await;
            }
        }
        if ctx.direct.as_ref().is_none_or(|direct| direct.unfollow(pod.netns.cookie())) {
            return;
        }
    }
}

impl Direct {
    /// Whether nothing is to be heard of a namespace any more; from then on it is not followed.
    fn unfollow(&self, netns: NetnsCookie) -> bool {
        let mut followed = lock(&self.watch.followed);
        let over = self.pod(netns).is_none() && !self.watch.any(netns);
        if over {
            followed.remove(&netns);
        }
        over
    }
}

fn ended(ctx: &Context, socket: &DiagSocket) {
    let cookie = socket.id.cookie;
    let Some(direct) = &ctx.direct else { return };
    let Some(Live { account, ends, netns, spent }) = lock(&direct.watch.live).remove(&cookie) else { return };
    direct.watch.leave(netns);
    forget(ctx, cookie);
    let fin = socket.fin_received(!WITHOUT_RECORDS);
    let payload = socket.counts.and_then(|counts| counts.payload(ends.opening, fin));
    if let Some(payload) = payload {
        ends.count(&account, payload);
    }
    let result = match (account.live.revoked(), payload) {
        (Some(reason), _) => Err(PumpError::Revoked(reason)),
        (None, _) if spent.is_some() => Err(PumpError::KeySpent),
        (None, Some(_)) => Ok(()),
        // An abortive close wipes the counts.
        (None, None) => Err(PumpError::Application(io::ErrorKind::ConnectionReset.into())),
    };
    account.finished(&result);
}

/// Some ends were not told: whatever is not there any more has ended.
async fn missed(ctx: &Context, pod: &Arc<Pod>) {
    let Some(direct) = &ctx.direct else { return };
    let netns = pod.netns.cookie();
    // Those that come while the kernel answers may not be in the answer.
    let known: HashSet<u64> =
        lock(&direct.watch.live).iter().filter(|(_, live)| live.netns == netns).map(|(cookie, _)| *cookie).collect();
    let Ok(there) = cookies(pod).await else { return };
    let gone: Vec<_> =
        lock(&direct.watch.live).extract_if(|cookie, _| known.contains(cookie) && !there.contains(cookie)).collect();
    for (cookie, live) in gone {
        direct.watch.leave(netns);
        forget(ctx, cookie);
        live.account.unobserved();
    }
}

async fn cookies(pod: &Arc<Pod>) -> io::Result<HashSet<u64>> {
    Ok(ask::ask(pod, Diag::all).await?.into_iter().map(|socket| socket.id.cookie).collect())
}

/// What a predecessor has kept of this pod: connections that live go on under this agent's eyes, the others are accounted.
async fn adopt(ctx: &Arc<Context>, pod: &Arc<Pod>) -> io::Result<()> {
    let Some(direct) = &ctx.direct else { return Ok(()) };
    let there = cookies(pod).await?;
    for (cookie, kept) in kept(ctx)?.into_iter().filter(|(_, kept)| kept.netns == pod.netns.cookie().0) {
        let opening = if kept.direction == Direction::Outbound { Opening::Active } else { Opening::Passive };
        let ends =
            Ends { cookie, local: kept.local, remote: kept.remote, opening, sent: kept.sent, received: kept.received };
        let served = (kept.direction == Direction::Inbound).then(|| pod.workload.clone());
        let account = kept.account(ctx);
        account.live.learn(|facts| facts.served = served);
        if !there.contains(&cookie) {
            forget(ctx, cookie);
            account.unobserved();
            continue;
        }
        let live = account.live.clone();
        direct.watch.enter(cookie, Live { account, netns: pod.netns.cookie(), ends, spent: None });
        sever_by_name(ctx, pod, &live, ends);
        if let Some(revoked) = authorize::revoked_by(&ctx.state.load(), live.direction, &live.facts()) {
            revoked.enforce(&live);
        }
    }
    Ok(())
}

/// Accounts what is kept of namespaces that no pod of the mesh is in: nobody will hear of those connections' ends.
pub(super) fn forget_strangers(ctx: &Context) {
    let Some(direct) = &ctx.direct else { return };
    match kept(ctx) {
        Ok(all) => {
            for (cookie, kept) in all {
                let netns = NetnsCookie(kept.netns);
                if !direct.watch.adopted(netns) && direct.pod(netns).is_none() {
                    forget(ctx, cookie);
                    kept.account(ctx).unobserved();
                }
            }
        }
        Err(error) => tracing::error!("direct connections of an earlier agent are not known: {error}"),
    }
}

/// All that is kept; what cannot be read is nobody's.
fn kept(ctx: &Context) -> io::Result<Vec<(u64, Kept)>> {
    let all = ctx.capture.direct_kept().map_err(|error| io::Error::other(with_causes(&error)))?;
    let read = all.into_iter().filter_map(|(cookie, bytes)| match serde_json::from_slice(&bytes) {
        Ok(kept) => Some((cookie, kept)),
        Err(error) => {
            tracing::error!(%error, cookie, "what an earlier agent has kept of a direct connection cannot be read");
            forget(ctx, cookie);
            None
        }
    });
    Ok(read.collect())
}

impl Kept {
    /// The account goes on where the earlier agent has left it.
    fn account(self, ctx: &Context) -> Account {
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(self.since);
        let mut account = Account::resume(&ctx.connections, &ctx.metrics, &ctx.log, self.direction, since);
        account.count();
        account.live.learn(|facts| self.teach(facts));
        account
    }

    fn teach(self, facts: &mut Facts) {
        facts.source = self.source;
        facts.destination = self.destination;
        facts.mode = Some(Mode::Mtls);
        facts.records = Some("ktls");
        facts.path = Some(Path::Direct);
        facts.tls = self.tls;
        facts.policy = self.policy;
        facts.sni = self.sni;
        facts.proved = self.proved.and_then(|id| id.parse().ok());
    }
}
