//! The connections that live now: what is known of each, its byte counts, and the handle by which it is revoked. One entry is
//! made per captured connection and goes with it.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

use serde::Serialize;
use tokio::{net::TcpStream, sync::watch};

use super::pump::Moved;
use crate::{
    identity::{SpiffeId, trust::Voucher},
    metrics::{Open, Progress},
    policy::Workload,
    tls::records::Session,
    words::{Direction, Endpoint, Mode, Path, PumpKind, TlsFacts},
};

/// What is learned on the way through the stages.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Facts {
    pub source: Endpoint,
    pub destination: Endpoint,
    /// The service whose virtual address the application connected to; the destination is one of its endpoints.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    pub mode: Option<Mode>,
    pub records: Option<&'static str>,
    pub pump: Option<PumpKind>,
    pub path: Option<Path>,
    /// Why it is not direct, where it could be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_reason: Option<&'static str>,
    pub tls: Option<TlsFacts>,
    /// The policies that decided, if any had a say.
    pub policy: Option<String>,
    /// The AUDIT rule that matched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<String>,
    /// Why policies that are only tried would have denied it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<String>,
    /// The server name that an mTLS client asked for.
    #[serde(skip)]
    pub sni: Option<String>,
    /// The address of that service that it connected to.
    #[serde(skip)]
    pub called: Option<SocketAddr>,
    /// Whom the peer's certificate proved.
    #[serde(skip)]
    pub proved: Option<SpiffeId>,
    /// By which chain, to be judged again when trust changes.
    #[serde(skip)]
    pub voucher: Option<Voucher>,
    /// The local workload that an inbound connection is for: policies select it, at whatever address it was called.
    #[serde(skip)]
    pub served: Option<Arc<Workload>>,
}

pub struct Live {
    pub id: u64,
    pub direction: Direction,
    pub since: SystemTime,
    pub started: Instant,
    pub moved: Moved,
    facts: Mutex<Facts>,
    revoke: watch::Sender<Option<&'static str>>,
    wire: Mutex<Option<std::sync::Weak<TcpStream>>>,
    /// Its two ends, which are to be told of when it is gone.
    ends: OnceLock<[SocketAddr; 2]>,
    /// From when it is counted as opened until it is as closed.
    counted: Mutex<Option<Open>>,
    session: OnceLock<Arc<Session>>,
    /// How a connection is ended that the agent does not hold.
    sever: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Live {
    pub fn facts(&self) -> Facts {
        lock(&self.facts).clone()
    }

    pub fn learn(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut lock(&self.facts));
    }

    pub fn watch_wire(&self, wire: &Arc<TcpStream>) {
        *lock(&self.wire) = Some(Arc::downgrade(wire));
        if let (Ok(local), Ok(peer)) = (wire.local_addr(), wire.peer_addr()) {
            let _ = self.ends.set([local, peer]);
        }
    }

    /// The two ends that the connection between the nodes has or had: here and there.
    pub fn ends(&self) -> Option<[SocketAddr; 2]> {
        self.ends.get().copied()
    }

    pub fn wire(&self) -> Option<Arc<TcpStream>> {
        lock(&self.wire).as_ref().and_then(std::sync::Weak::upgrade)
    }

    /// Counts what it has moved since the last time, if it is counted.
    pub fn report(&self) {
        if let Some(open) = &*lock(&self.counted) {
            open.report(self.progress());
        }
    }

    pub fn count(&self, open: Open) {
        *lock(&self.counted) = Some(open);
    }

    pub fn counted(&self) -> Option<Open> {
        lock(&self.counted).take()
    }

    pub fn is_counted(&self) -> bool {
        lock(&self.counted).is_some()
    }

    /// Where changes of its keys are counted.
    pub fn keyed_by(&self, session: &Arc<Session>) {
        let _ = self.session.set(session.clone());
    }

    pub fn progress(&self) -> Progress {
        let (updates_sent, updates_received) = self.session.get().map(|session| session.updates()).unwrap_or_default();
        Progress {
            sent: self.moved.sent.load(Ordering::Relaxed),
            received: self.moved.received.load(Ordering::Relaxed),
            updates_sent,
            updates_received,
        }
    }

    /// Ends the connection by a reset, for the reason given.
    pub fn revoke(&self, reason: &'static str) {
        self.revoke.send_replace(Some(reason));
        if let Some(sever) = self.sever.get() {
            sever();
        }
    }

    /// The reason for which it was revoked, if it was.
    pub fn revoked(&self) -> Option<&'static str> {
        *self.revoke.borrow()
    }

    /// From now on a revocation is carried out by `sever`, also one that came before.
    pub fn severed_by(&self, sever: impl Fn() + Send + Sync + 'static) {
        if self.sever.set(Box::new(sever)).is_ok()
            && self.revoked().is_some()
            && let Some(sever) = self.sever.get()
        {
            sever();
        }
    }

    pub fn revocation(&self) -> watch::Receiver<Option<&'static str>> {
        self.revoke.subscribe()
    }
}

/// How many connections that have ended are remembered.
const REMEMBERED: usize = 512;

/// A connection that has ended, and how.
#[derive(Clone, Serialize)]
pub struct Ended {
    pub id: u64,
    pub direction: Direction,
    /// Milliseconds since 1970.
    pub started_ms: u64,
    pub duration_ms: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub verdict: &'static str,
    pub reason: Option<&'static str>,
    /// In words.
    pub close: String,
    pub facts: Facts,
    /// The two ends between the nodes, if it came so far: by them it is told from others of the same workloads.
    pub wire: Option<[SocketAddr; 2]>,
}

/// All that live, and the last of those that have ended. Cheap to clone.
#[derive(Clone, Default)]
pub struct Connections {
    live: Arc<Mutex<HashMap<u64, Arc<Live>>>>,
    next: Arc<AtomicU64>,
    ended: Arc<Mutex<VecDeque<Ended>>>,
}

impl Connections {
    pub fn open(&self, direction: Direction, since: SystemTime) -> Arc<Live> {
        let (age, now) = (since.elapsed().unwrap_or_default(), Instant::now());
        let live = Arc::new(Live {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            direction,
            since,
            started: now.checked_sub(age).unwrap_or(now),
            moved: Moved::default(),
            facts: Mutex::default(),
            revoke: watch::Sender::new(None),
            wire: Mutex::new(None),
            ends: OnceLock::new(),
            counted: Mutex::new(None),
            session: OnceLock::new(),
            sever: OnceLock::new(),
        });
        lock(&self.live).insert(live.id, live.clone());
        live
    }

    pub fn close(&self, live: &Live) {
        lock(&self.live).remove(&live.id);
    }

    /// For people who ask a moment later. The access log has all of them.
    pub fn remember(&self, ended: Ended) {
        let mut all = lock(&self.ended);
        if all.len() >= REMEMBERED {
            all.pop_front();
        }
        all.push_back(ended);
    }

    /// The oldest first.
    pub fn ended(&self) -> Vec<Ended> {
        lock(&self.ended).iter().cloned().collect()
    }

    pub fn all(&self) -> Vec<Arc<Live>> {
        lock(&self.live).values().cloned().collect()
    }
}

/// What a panicking holder left is whole: nothing here is changed in steps.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
