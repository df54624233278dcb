//! What a successor of this agent must know of direct connections: noted in a map that outlives it, taken over from there.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{
    ask,
    watch::{self, Ends, Live},
};
use crate::{
    bpf::BpfError,
    identity::trust::KeptVoucher,
    proxy::{Context, account::Account, authorize::Permit, connections::Facts, pod::Pod},
    sys::{diag::Diag, netns::NetnsCookie, tcp_info::Opening},
    words::{Direction, Endpoint, Mode, Path, TlsFacts, with_causes},
};

/// As it is kept, in JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    netns: u64,
    direction: Direction,
    since: u64,
    local: SocketAddr,
    remote: SocketAddr,
    sent: u64,
    received: u64,
    source: Endpoint,
    destination: Endpoint,
    #[serde(default)]
    service: Option<String>,
    #[serde(default)]
    called: Option<SocketAddr>,
    proved: Option<String>,
    /// An agent that knew nothing of it has left none.
    #[serde(default)]
    voucher: Option<KeptVoucher>,
    sni: Option<String>,
    tls: Option<TlsFacts>,
    policy: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum NotedError {
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
    pub fn new(ctx: &Arc<Context>, pod: &Arc<Pod>, account: &Account, ends: Ends) -> Result<Self, NotedError> {
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
            service: facts.service,
            called: facts.called,
            proved: facts.proved.map(|id| id.to_string()),
            voucher: facts.voucher.map(|voucher| voucher.kept()),
            sni: facts.sni,
            tls: facts.tls,
            policy: facts.policy,
        };
        // Undone by its drop.
        let noted = Self { ctx: ctx.clone(), pod: pod.clone(), ends, handed_over: false };
        if let Some(direct) = &ctx.direct {
            direct.watch.note(ends.cookie);
        }
        ctx.capture.keep_direct(ends.cookie, &serde_json::to_vec(&kept)?)?;
        Ok(noted)
    }

    /// The application has the connection from here on.
    pub fn hand_over(mut self, mut account: Account, permit: Permit, records: &'static str) -> Result<(), NotedError> {
        let Some(direct) = &self.ctx.direct else { return Err(NotedError::Pod) };
        let netns = self.pod.netns.cookie();
        let live = account.live.clone();
        let still = || direct.pod(netns).is_some_and(|now| now.workload.id == self.pod.workload.id);
        let entered = direct.watch.enter_if(still, || {
            account.handed_over(records);
            Live::new(account, netns, self.ends)
        });
        if !entered {
            return Err(NotedError::Pod);
        }
        self.handed_over = true;
        watch::supervise(&self.ctx, &self.pod, &live, self.ends);
        drop(permit);
        Ok(())
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if !self.handed_over {
            forget(&self.ctx, self.ends.cookie);
        }
        if let Some(direct) = &self.ctx.direct {
            direct.watch.no_note(self.ends.cookie);
        }
    }
}

pub(super) fn forget(ctx: &Context, cookie: u64) {
    if let Err(error) = ctx.capture.forget_direct(cookie) {
        tracing::warn!("a connection's record cannot be removed: {}", with_causes(&error));
    }
}

/// What a predecessor has kept of this pod: connections that live go on under this agent's eyes, the others are accounted.
pub(super) async fn adopt(ctx: &Arc<Context>, pod: &Arc<Pod>) -> io::Result<()> {
    let Some(direct) = &ctx.direct else { return Ok(()) };
    let mut all = kept(ctx)?;
    // What cannot be read may be anybody's.
    all.retain(|(cookie, kept)| {
        !direct.watch.is_own(*cookie) && kept.as_ref().is_none_or(|kept| kept.netns == pod.netns.cookie().0)
    });
    if all.is_empty() {
        // The kernel goes through the sockets of all namespaces to tell those of one.
        return Ok(());
    }
    let there = ask::ask(pod, Diag::all).await?;
    for (cookie, kept) in all {
        let socket = there.iter().find(|socket| socket.id.cookie == cookie);
        let kept = match (kept, socket) {
            (Some(kept), _) => kept,
            // Nobody could say whether it is still allowed.
            (None, Some(socket)) => {
                tracing::error!(cookie, "what is known of a direct connection cannot be read: it is ended");
                forget(ctx, cookie);
                ask::end(pod, socket.id).await;
                continue;
            }
            (None, None) => continue,
        };
        let opening = if kept.direction == Direction::Outbound { Opening::Active } else { Opening::Passive };
        let ends =
            Ends { cookie, local: kept.local, remote: kept.remote, opening, sent: kept.sent, received: kept.received };
        let served = (kept.direction == Direction::Inbound).then(|| pod.workload.clone());
        let account = kept.account(ctx);
        account.live.learn(|facts| facts.served = served);
        let Some(socket) = socket else {
            forget(ctx, cookie);
            account.unobserved();
            continue;
        };
        ends.adopt(&account, socket);
        let live = account.live.clone();
        direct.watch.enter(Live::new(account, pod.netns.cookie(), ends));
        watch::supervise(ctx, pod, &live, ends);
    }
    Ok(())
}

/// Accounts what is kept of namespaces that no pod of the mesh is in: nobody will hear of those connections' ends.
pub(super) fn forget_strangers(ctx: &Context) {
    let Some(direct) = &ctx.direct else { return };
    match kept(ctx) {
        Ok(all) => {
            for (cookie, kept) in all {
                let Some(kept) = kept else { continue };
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

/// All that is kept, by the sockets' cookies, as far as it can be read.
fn kept(ctx: &Context) -> io::Result<Vec<(u64, Option<Kept>)>> {
    let all = ctx.capture.direct_kept().map_err(|error| io::Error::other(with_causes(&error)))?;
    Ok(all.into_iter().map(|(cookie, bytes)| (cookie, serde_json::from_slice(&bytes).ok())).collect())
}

impl Kept {
    /// The account goes on where the earlier agent has left it.
    fn account(self, ctx: &Context) -> Account {
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(self.since);
        let mut account = Account::resume(ctx, self.direction, since);
        account.count();
        account.live.learn(|facts| self.teach(facts));
        account
    }

    fn teach(self, facts: &mut Facts) {
        facts.source = self.source;
        facts.destination = self.destination;
        facts.service = self.service;
        facts.called = self.called;
        facts.mode = Some(Mode::Mtls);
        facts.records = Some("ktls");
        facts.path = Some(Path::Direct);
        facts.tls = self.tls;
        facts.policy = self.policy;
        facts.sni = self.sni;
        facts.proved = self.proved.and_then(|id| id.parse().ok());
        facts.voucher = self.voucher.and_then(|kept| kept.restore());
    }
}
