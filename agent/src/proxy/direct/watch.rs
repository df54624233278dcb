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
    time::{Duration, Instant},
};

use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use super::{Direct, ask, keys, noted};
use crate::{
    proxy::{
        Context,
        account::Account,
        connections::{self, lock},
        pod::Pod,
        pump::PumpError,
    },
    sys::{
        diag::{Destruction, Diag, DiagSocket, Event, SocketId},
        netns::NetnsCookie,
        tcp_info::{Opening, Payload, TcpState},
        vital::vital,
    },
    tls::config::WITHOUT_RECORDS,
    words::Direction,
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

    /// Goes on counting where an earlier agent may have left it.
    pub fn adopt(&self, account: &Account, socket: &DiagSocket) {
        if let Some(payload) = socket.counts.and_then(|counts| counts.payload(self.opening, None)) {
            self.count(account, payload);
        }
        account.adopted();
    }

    fn id(&self) -> SocketId {
        SocketId { local: self.local, remote: self.remote, cookie: self.cookie }
    }
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
    /// Namespaces of which all that is kept is this agent's own. Its lock is taken before all the others.
    adopted: Mutex<HashSet<NetnsCookie>>,
    /// Sockets, by their cookies, of which this agent keeps what it knows, and which no application has yet.
    noted: Mutex<HashSet<u64>>,
}

pub(super) struct Live {
    account: Account,
    netns: NetnsCookie,
    ends: Ends,
    /// Since when its key has sealed all that it may.
    spent: Option<Instant>,
}

impl Live {
    pub fn new(account: Account, netns: NetnsCookie, ends: Ends) -> Self {
        Self { account, netns, ends, spent: None }
    }
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

/// From now on the connection is ended when it is revoked, and at once if the rules have changed since it was let in.
pub(super) fn supervise(ctx: &Context, pod: &Arc<Pod>, live: &Arc<connections::Live>, ends: Ends) {
    let (pod, runtime) = (pod.clone(), ctx.runtime.clone());
    live.severed_by(move || {
        let pod = pod.clone();
        runtime.spawn(async move { ask::end(&pod, ends.id()).await });
    });
    ctx.judge_now(live);
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
            tokio::spawn(vital(begin(Arc::downgrade(ctx), pod.clone(), begun)));
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
        noted::adopt(ctx, pod).await?;
        lock(&direct.watch.adopted).insert(pod.netns.cookie());
    }
    Ok(ends)
}

impl Watch {
    /// Whether what an earlier agent has kept of a namespace is known.
    pub fn adopted(&self, netns: NetnsCookie) -> bool {
        lock(&self.adopted).contains(&netns)
    }

    /// Unless it is `known` for something else: if the namespace is a pod's again, all is taken over anew.
    pub fn disown(&self, netns: NetnsCookie, known: impl FnOnce() -> bool) {
        let mut adopted = lock(&self.adopted);
        if !known() {
            adopted.remove(&netns);
        }
    }

    /// What is kept of a socket is this agent's own, until `no_note`.
    pub fn note(&self, cookie: u64) {
        lock(&self.noted).insert(cookie);
    }

    pub fn no_note(&self, cookie: u64) {
        lock(&self.noted).remove(&cookie);
    }

    /// Whether what is kept of a socket is no predecessor's.
    pub fn is_own(&self, cookie: u64) -> bool {
        lock(&self.noted).contains(&cookie) || lock(&self.live).contains_key(&cookie)
    }

    /// Whether there are direct connections in a namespace.
    pub fn any(&self, netns: NetnsCookie) -> bool {
        lock(&self.counts).contains_key(&netns)
    }

    pub fn enter(&self, live: Live) {
        *lock(&self.counts).entry(live.netns).or_default() += 1;
        lock(&self.live).insert(live.ends.cookie, live);
    }

    /// The same if the namespace is followed and `still` says that its pod is: neither changes in between.
    pub fn enter_if(&self, still: impl FnOnce() -> bool, live: impl FnOnce() -> Live) -> bool {
        let followed = lock(&self.followed);
        if !still() {
            return false;
        }
        let live = live();
        let enters = followed.contains(&live.netns);
        if enters {
            self.enter(live);
        }
        enters
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
            drop(followed);
            self.tidy(netns);
        }
        over
    }
}

fn ended(ctx: &Context, socket: &DiagSocket) {
    let cookie = socket.id.cookie;
    let Some(direct) = &ctx.direct else { return };
    let Some(Live { account, ends, netns, spent }) = lock(&direct.watch.live).remove(&cookie) else { return };
    direct.watch.leave(netns);
    noted::forget(ctx, cookie);
    let fin = socket.fin_received(!WITHOUT_RECORDS);
    let payload = socket.counts.and_then(|counts| counts.payload(ends.opening, fin));
    if let Some(payload) = payload {
        ends.count(&account, payload);
    }
    let result = match (account.live.revoked(), payload) {
        (Some(reason), _) => Err(PumpError::Revoked(reason)),
        (None, _) if spent.is_some() => Err(PumpError::KeySpent),
        // No close leaves anything unanswered: the peer's reset did, as of a program that closes before it has read all, or its silence.
        (None, Some(Payload { unanswered: 1.., .. })) => Err(PumpError::Wire(io::ErrorKind::ConnectionReset.into())),
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
        noted::forget(ctx, cookie);
        live.account.unobserved();
    }
}

async fn cookies(pod: &Arc<Pod>) -> io::Result<HashSet<u64>> {
    Ok(ask::ask(pod, Diag::all).await?.into_iter().map(|socket| socket.id.cookie).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::{direct::DirectSettings, offload::Capabilities};

    #[test]
    fn that_a_namespace_was_taken_over_is_forgotten_with_the_last_that_is_known_of_it() {
        let settings = DirectSettings { keeper: "/nowhere".into(), hold: Duration::ZERO, key_limit: 0 };
        let direct = Direct::new(settings, &Capabilities::none("a test"));
        let (filtered, followed) = (NetnsCookie(1), NetnsCookie(2));
        lock(&direct.filters).insert(filtered, 1);
        lock(&direct.watch.followed).insert(followed);
        lock(&direct.watch.adopted).extend((1..1_000).map(NetnsCookie));
        (1..1_000).map(NetnsCookie).for_each(|netns| direct.tidy(netns));
        assert_eq!(*lock(&direct.watch.adopted), HashSet::from([filtered, followed]));
        // Neither a pod nor a connection is there.
        assert!(direct.unfollow(followed));
        assert!(!direct.watch.adopted(followed));
    }

    #[test]
    fn what_this_agent_keeps_of_a_connection_is_taken_over_by_no_pod() {
        let watch = Watch::default();
        watch.note(7);
        assert_eq!([7, 8].map(|cookie| watch.is_own(cookie)), [true, false]);
        watch.no_note(7);
        assert!(!watch.is_own(7));
    }
}
