//! Direct connections after the agent has let go of them: what is known of each is kept, also beyond the agent's own life; the
//! kernel tells when a socket is gone and what it has carried; a revoked connection is destroyed by its name.
//!
//! Bytes are TCP's: what the peer has acknowledged and what came in order, less the handshake's. Records are in them, 22 bytes each
//! more than what the application wrote.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, Weak, atomic::Ordering},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    bpf::BpfError,
    proxy::{
        Context,
        account::Account,
        authorize::{self, Permit},
        connections::{Facts, lock},
        pod::Pod,
        pump::PumpError,
    },
    sys::{
        diag::{Destruction, Diag, DiagSocket, Event, SocketId},
        netns::NetnsCookie,
        tcp_info::{Opening, TcpState},
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
    /// Namespaces whose sockets' ends are listened for.
    followed: Mutex<HashSet<NetnsCookie>>,
}

struct Live {
    account: Account,
    netns: NetnsCookie,
    ends: Ends,
}

/// After a listener for destroyed sockets has failed.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    #[error("what is known of it cannot be kept")]
    Keep(#[from] BpfError),
    #[error("what is known of it makes no JSON")]
    Json(#[from] serde_json::Error),
}

/// The application has the connection from here on.
pub(super) fn established(
    ctx: &Arc<Context>,
    pod: &Arc<Pod>,
    mut account: Account,
    permit: Permit,
    ends: Ends,
    records: &'static str,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let Some(direct) = &ctx.direct else { return Err("direct connections are off".into()) };
    let live = account.live.clone();
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
    let kept = serde_json::to_vec(&kept).map_err(WatchError::from)?;
    ctx.capture.keep_direct(ends.cookie, &kept).map_err(WatchError::from)?;
    account.handed_over(records);
    direct.watch.enter(ends.cookie, Live { account, netns: pod.netns.cookie(), ends });
    sever_by_name(pod, &live, ends);
    // The rules may have changed since the decision.
    if let Some(revoked) = authorize::revoked_by(&ctx.state.load(), live.direction, &live.facts()) {
        revoked.enforce(&live);
    }
    drop(permit);
    Ok(())
}

fn sever_by_name(pod: &Arc<Pod>, live: &Arc<crate::proxy::connections::Live>, ends: Ends) {
    let pod = pod.clone();
    live.severed_by(move || {
        let id = SocketId { local: ends.local, remote: ends.remote, cookie: ends.cookie };
        match with_diag(&pod, |diag| diag.destroy(&id)) {
            Ok(true) => {}
            Ok(false) => tracing::debug!(?id, "a revoked connection was gone already"),
            Err(error) => tracing::error!(%error, ?id, "a revoked connection cannot be destroyed"),
        }
    });
}

/// Resets a connection that is of no use to anybody.
pub(super) fn destroy(pod: &Pod, cookie: u64, socket: &OwnedFd) {
    let found = with_diag(pod, |diag| Ok(diag.all()?.into_iter().find(|found| found.id.cookie == cookie)));
    match found.and_then(|found| found.map_or(Ok(false), |found| with_diag(pod, |diag| diag.destroy(&found.id)))) {
        Ok(_) => {}
        Err(error) => tracing::error!(%error, ?socket, "a connection cannot be ended"),
    }
}

/// Whether the application's end of a leg has been accepted, or will not be while no bytes come (TCP_DEFER_ACCEPT).
pub(super) fn accepted(pod: &Pod, local: SocketAddr, remote: SocketAddr) -> bool {
    match with_diag(pod, |diag| diag.find(local, remote)) {
        Ok(Some(found)) => found.inode != 0 || found.state == TcpState::SYN_RECEIVED,
        // Accepted and gone, or not to be known: the leg will tell.
        Ok(None) | Err(_) => true,
    }
}

fn with_diag<T>(pod: &Pod, ask: impl FnOnce(&Diag) -> io::Result<T>) -> io::Result<T> {
    if let Some(diag) = pod.diag.get() {
        return ask(diag);
    }
    let diag = Diag::open(&pod.netns)?;
    ask(pod.diag.get_or_init(|| diag))
}

/// Takes over what a predecessor has left in the pod, and listens for the ends of direct connections there.
pub(super) fn follow(ctx: &Arc<Context>, pod: &Arc<Pod>) {
    let Some(direct) = &ctx.direct else { return };
    if !lock(&direct.watch.followed).insert(pod.netns.cookie()) {
        return;
    }
    match Destruction::open(&pod.netns) {
        Ok(ends) => {
            if let Err(error) = adopt(ctx, pod) {
                tracing::error!("direct connections of an earlier agent are not known: {error}");
            }
            tokio::spawn(listen(Arc::downgrade(ctx), pod.clone(), ends));
        }
        Err(error) => {
            lock(&direct.watch.followed).remove(&pod.netns.cookie());
            tracing::error!(%error, pod = %pod.netns.path().display(), "the ends of direct connections cannot be heard of");
        }
    }
}

impl Watch {
    /// Whether there are direct connections in a namespace; in one that is not known there may be.
    pub fn any(&self, netns: Option<NetnsCookie>) -> bool {
        netns.is_none_or(|netns| lock(&self.counts).contains_key(&netns))
    }

    fn enter(&self, cookie: u64, live: Live) {
        *lock(&self.counts).entry(live.netns).or_default() += 1;
        lock(&self.live).insert(cookie, live);
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
    loop {
        let event = ends.next().await;
        let Some(ctx) = ctx.upgrade() else { return };
        match event {
            Ok(Event::Destroyed(socket)) => ended(&ctx, &socket),
            Ok(Event::Lost) => missed(&ctx, &pod),
            Err(error) => {
                tracing::error!(%error, "the ends of direct connections cannot be heard of");
                missed(&ctx, &pod);
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

fn ended(ctx: &Context, socket: &DiagSocket) {
    let cookie = socket.id.cookie;
    let Some(direct) = &ctx.direct else { return };
    let Some(Live { account, ends, netns }) = lock(&direct.watch.live).remove(&cookie) else { return };
    direct.watch.leave(netns);
    if let Err(error) = ctx.capture.forget_direct(cookie) {
        tracing::warn!("a connection's record cannot be removed: {}", with_causes(&error));
    }
    let fin = socket.fin_received(!WITHOUT_RECORDS);
    let payload = socket.counts.and_then(|counts| counts.payload(ends.opening, fin));
    if let Some(payload) = payload {
        let moved = &account.live.moved;
        moved.sent.store(payload.sent.saturating_sub(ends.sent), Ordering::Relaxed);
        moved.received.store(payload.received.saturating_sub(ends.received), Ordering::Relaxed);
    }
    let result = match (account.live.revoked(), payload) {
        (Some(reason), _) => Err(PumpError::Revoked(reason)),
        (None, Some(_)) => Ok(()),
        // An abortive close wipes the counts.
        (None, None) => Err(PumpError::Application(io::ErrorKind::ConnectionReset.into())),
    };
    account.finished(&result);
}

/// Some ends were not told: whatever is not there any more has ended.
fn missed(ctx: &Context, pod: &Pod) {
    let Some(direct) = &ctx.direct else { return };
    let Ok(there) = cookies(pod) else { return };
    let netns = pod.netns.cookie();
    let gone: Vec<_> =
        lock(&direct.watch.live).extract_if(|cookie, live| live.netns == netns && !there.contains(cookie)).collect();
    for (cookie, live) in gone {
        direct.watch.leave(netns);
        let _ = ctx.capture.forget_direct(cookie);
        live.account.unobserved();
    }
}

fn cookies(pod: &Pod) -> io::Result<HashSet<u64>> {
    Ok(with_diag(pod, Diag::all)?.into_iter().map(|socket| socket.id.cookie).collect())
}

/// What a predecessor has kept of this pod: connections that live go on under this agent's eyes, the others are accounted.
fn adopt(ctx: &Arc<Context>, pod: &Arc<Pod>) -> io::Result<()> {
    let Some(direct) = &ctx.direct else { return Ok(()) };
    let kept = ctx.capture.direct_kept().map_err(|error| io::Error::other(with_causes(&error)))?;
    let there = cookies(pod)?;
    let known: HashSet<u64> = lock(&direct.watch.live).keys().copied().collect();
    for (cookie, bytes) in kept.into_iter().filter(|(cookie, _)| !known.contains(cookie)) {
        let Ok(kept) = serde_json::from_slice::<Kept>(&bytes) else {
            tracing::error!(cookie, "what an earlier agent has kept of a direct connection cannot be read");
            continue;
        };
        if kept.netns != pod.netns.cookie().0 {
            continue;
        }
        let mut account = Account::attempt(&ctx.connections, &ctx.metrics, &ctx.log, kept.direction);
        account.count();
        let opening = if kept.direction == Direction::Outbound { Opening::Active } else { Opening::Passive };
        let ends =
            Ends { cookie, local: kept.local, remote: kept.remote, opening, sent: kept.sent, received: kept.received };
        account.live.learn(|facts| kept.teach(facts, pod));
        if !there.contains(&cookie) {
            let _ = ctx.capture.forget_direct(cookie);
            account.unobserved();
            continue;
        }
        let live = account.live.clone();
        direct.watch.enter(cookie, Live { account, netns: pod.netns.cookie(), ends });
        sever_by_name(pod, &live, ends);
        if let Some(revoked) = authorize::revoked_by(&ctx.state.load(), live.direction, &live.facts()) {
            revoked.enforce(&live);
        }
    }
    Ok(())
}

impl Kept {
    fn teach(self, facts: &mut Facts, pod: &Pod) {
        facts.source = self.source;
        facts.destination = self.destination;
        facts.mode = Some(Mode::Mtls);
        facts.records = Some("ktls");
        facts.path = Some(Path::Direct);
        facts.tls = self.tls;
        facts.policy = self.policy;
        facts.sni = self.sni;
        facts.proved = self.proved.and_then(|id| id.parse().ok());
        facts.served = (self.direction == Direction::Inbound).then(|| pod.workload.clone());
    }
}
