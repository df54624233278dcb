//! Keeps a fresh certificate for every identity that is present on the node: asked for when the identity appears, renewed
//! at half of its life, kept until it expires when renewing fails, dropped with the last workload that needs it.
//!
//! Which identities are present is for the caller to say (`retain`); certificates come from a [`Source`]: the embedded CA, one elsewhere
//! (`identity::remote`), or a SPIFFE Workload API (`identity::workload_api`). How one certificate stands is `entry`'s.

mod entry;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use rustls::pki_types::UnixTime;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

use super::{IdentityError, SpiffeId, Svid, Trust, TrustStore, humantime};
use crate::words::with_causes;

pub use entry::{CertState, SvidInfo};

use entry::Entry;

/// Timers count the time that the machine is awake and know nothing of a clock that is set: look at the calendar this
/// often, whatever the timer says.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// Certificates of a signer that was replaced are renewed within this time.
const LONGEST_RESIGN: Duration = Duration::from_secs(10);
/// Between one certificate and the next.
const SHORTEST_WAIT: Duration = Duration::from_millis(500);
/// How many certificates are asked for at once: enough that a CA elsewhere is not waited for one by one, and no more than it can
/// take from each of a thousand nodes.
const AT_ONCE: usize = 16;

#[derive(Clone, Debug)]
pub struct ManagerSettings {
    pub leaf_lifetime: Duration,
}

impl Default for ManagerSettings {
    fn default() -> Self {
        Self { leaf_lifetime: Duration::from_secs(24 * 3_600) }
    }
}

/// A certificate that is on its way.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<Svid, IdentityError>> + Send + 'a>>;

/// Where certificates come from.
pub trait Source: Send + Sync {
    /// How it is called towards people.
    fn name(&self) -> Arc<str>;

    fn issue<'a>(&'a self, id: &'a SpiffeId, lifetime: Duration) -> Answer<'a>;

    /// Whether it tells by itself when there is another certificate (`Manager::supplied`), so that asking at half of a life is in vain.
    fn tells(&self) -> bool {
        false
    }
}

/// A clone is another handle on the same certificates.
#[derive(Clone)]
pub struct Manager {
    shared: Arc<Shared>,
}

struct Shared {
    source: Box<dyn Source>,
    trust: TrustStore,
    settings: ManagerSettings,
    /// Grows when another key signs.
    signer: AtomicU64,
    entries: Mutex<BTreeMap<SpiffeId, Entry>>,
    /// Wakes `run` when there is something new to wait for.
    changed: Notify,
    issued: AtomicU64,
    failures: AtomicU64,
}

/// Totals since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ManagerCounters {
    pub issued: u64,
    pub failures: u64,
}

impl Manager {
    pub fn new(source: impl Source + 'static, trust: TrustStore, settings: ManagerSettings) -> Self {
        Self {
            shared: Arc::new(Shared {
                source: Box::new(source),
                trust,
                settings,
                signer: AtomicU64::new(0),
                entries: Mutex::default(),
                changed: Notify::new(),
                issued: AtomicU64::new(0),
                failures: AtomicU64::new(0),
            }),
        }
    }

    /// Holds certificates for exactly these identities: `run` asks for those that are missing, the others are dropped.
    pub fn retain(&self, present: &BTreeSet<SpiffeId>) {
        let now = SystemTime::now();
        let mut entries = self.entries();
        entries.retain(|id, _| present.contains(id));
        for id in present {
            if !entries.contains_key(id) {
                entries.insert(id.clone(), Entry { due: Some(now), ..Entry::default() });
            }
        }
        drop(entries);
        self.shared.changed.notify_one();
    }

    /// The certificate to use now; none if there never was one or it has expired.
    pub fn svid(&self, id: &SpiffeId) -> Option<Arc<Svid>> {
        let svid = self.entries().get(id)?.svid.clone()?;
        if !svid.is_valid_at(SystemTime::now()) {
            // The clock was set, or renewing fails: that is looked at now, and not when a timer says so.
            self.shared.changed.notify_one();
            return None;
        }
        Some(svid)
    }

    /// Returns when there is a certificate to use. For ever, if the identity is not one of those that are present.
    pub async fn until_held(&self, id: &SpiffeId) {
        loop {
            let Some(came) = self.entries().get(id).map(|entry| Arc::clone(&entry.came)) else {
                return std::future::pending().await;
            };
            let came = came.notified();
            tokio::pin!(came);
            // Before looking, so that none is missed that comes meanwhile.
            came.as_mut().enable();
            if self.svid(id).is_some() {
                return;
            }
            came.await;
        }
    }

    /// Why there is none: what the last attempt said.
    pub fn last_error(&self, id: &SpiffeId) -> Option<String> {
        self.entries().get(id)?.last_error.clone()
    }

    /// Whom to believe now.
    pub fn trust(&self) -> Arc<Trust> {
        self.shared.trust.load()
    }

    pub fn trust_store(&self) -> &TrustStore {
        &self.shared.trust
    }

    /// The chain that peers are shown for an identity, in PEM. The key stays where it is.
    pub fn chain_pem(&self, id: &SpiffeId) -> Option<String> {
        let svid = self.entries().get(id)?.svid.clone()?;
        Some(svid.key.cert.iter().map(|der| pem(der)).collect())
    }

    /// Another key signs from now on: replaces what the earlier ones have signed, soon and not all at once; what nobody would believe any
    /// more, at once.
    pub fn resign(&self) {
        let (now, trust) = (SystemTime::now(), self.trust());
        let signer = self.shared.signer.fetch_add(1, Ordering::SeqCst) + 1;
        let spread = LONGEST_RESIGN.min(self.shared.settings.leaf_lifetime / 20);
        for (id, entry) in self.entries().iter_mut().filter(|(_, entry)| entry.signer < signer) {
            let believed = entry.svid.as_ref().is_some_and(|svid| is_believed(&trust, id, svid));
            let wait = if believed { spread.mul_f64(rand::random()) } else { Duration::ZERO };
            entry.due = Some(entry.due.map_or(now + wait, |due| due.min(now + wait)));
        }
        self.shared.changed.notify_one();
    }

    /// Asks for another certificate in the place of each that nobody would believe any more, as it was revoked, or its root removed.
    pub fn renew_unbelieved(&self) {
        let (now, trust) = (SystemTime::now(), self.trust());
        for (id, entry) in self.entries().iter_mut() {
            if entry.svid.as_ref().is_some_and(|svid| svid.is_valid_at(now) && !is_believed(&trust, id, svid)) {
                tracing::warn!(identity = %id, "a certificate of ours is not believed any more: it is replaced");
                entry.due = Some(now);
            }
        }
        self.shared.changed.notify_one();
    }

    /// The source has other certificates than before: all are taken anew.
    pub fn supplied(&self) {
        let now = SystemTime::now();
        // An answer that is on its way is of before.
        let mut entries = self.entries();
        self.shared.signer.fetch_add(1, Ordering::SeqCst);
        entries.values_mut().for_each(|entry| entry.due = Some(now));
        drop(entries);
        self.shared.changed.notify_one();
    }

    /// Renews until `shutdown` becomes true or its sender is gone.
    pub async fn run(&self, mut shutdown: watch::Receiver<bool>) {
        let mut asked = JoinSet::new();
        loop {
            let sleep = match self.ask(SystemTime::now(), &mut asked) {
                // An answer makes room for the next question.
                _ if asked.len() >= AT_ONCE => LONGEST_SLEEP,
                Some(due) => due.duration_since(SystemTime::now()).unwrap_or_default().min(LONGEST_SLEEP),
                None => LONGEST_SLEEP,
            };
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                () = self.shared.changed.notified() => {}
                Some(_) = asked.join_next() => {}
                stopped = shutdown.wait_for(|stop| *stop) => {
                    drop(stopped);
                    return;
                }
            }
        }
    }

    pub fn list(&self) -> Vec<SvidInfo> {
        let (now, signer) = (SystemTime::now(), self.shared.signer.load(Ordering::SeqCst));
        let source = self.shared.source.name();
        self.entries().iter().map(|(id, entry)| entry.info(id, now, signer, &source)).collect()
    }

    pub fn counters(&self) -> ManagerCounters {
        ManagerCounters {
            issued: self.shared.issued.load(Ordering::Relaxed),
            failures: self.shared.failures.load(Ordering::Relaxed),
        }
    }

    /// Asks for what is due, as far as there is room, those first that have nothing to use. Returns when the next is due.
    fn ask(&self, now: SystemTime, asked: &mut JoinSet<()>) -> Option<SystemTime> {
        let mut entries = self.entries();
        let mut due: Vec<_> = entries.iter().filter(|(_, entry)| entry.wants_another(now)).collect();
        due.sort_by_key(|(_, entry)| (entry.svid.as_ref().is_some_and(|svid| svid.is_valid_at(now)), entry.due));
        let due: Vec<SpiffeId> =
            due.into_iter().take(AT_ONCE.saturating_sub(asked.len())).map(|(id, _)| id.clone()).collect();
        for id in due {
            if let Some(entry) = entries.get_mut(&id) {
                entry.asked = true;
            }
            let question = Question { manager: self.clone(), id, now, since: Instant::now(), answered: false };
            asked.spawn(question.ask());
        }
        for (id, entry) in entries.iter_mut() {
            entry.warn(id, now);
        }
        entries.values().filter(|entry| !entry.asked).filter_map(|entry| entry.due).min()
    }

    fn answered(&self, id: &SpiffeId, now: SystemTime, signer: u64, result: Result<Svid, IdentityError>) {
        let mut entries = self.entries();
        // The identity has left meanwhile.
        let Some(entry) = entries.get_mut(id) else { return };
        let tells = self.shared.source.tells();
        // If the signer was replaced meanwhile, or more was told, this may be of the one before.
        let outdated = (signer < self.shared.signer.load(Ordering::SeqCst)).then_some(now);
        match result {
            Ok(svid) if tells && entry.svid.as_ref().is_some_and(|held| held.serial == svid.serial) => {
                entry.confirmed(now, outdated, signer);
            }
            Ok(svid) => {
                self.shared.issued.fetch_add(1, Ordering::Relaxed);
                let life = svid.not_after.duration_since(now).unwrap_or_default();
                tracing::info!(identity = %id, serial = svid.serial, life = humantime(life), "new certificate");
                // Between 45 % and 55 % of its life, so that a node's certificates do not all come due together; and not at once again, from a
                // source whose certificates have next to no life left.
                let wait = life.mul_f64(0.45 + rand::random::<f64>() / 10.0).max(SHORTEST_WAIT);
                let due = outdated.or((!tells).then_some(now + wait));
                entry.renewed(svid, now, due, signer);
            }
            Err(error) => {
                self.shared.failures.fetch_add(1, Ordering::Relaxed);
                if error.withdraws() && entry.svid.take().is_some() {
                    tracing::warn!(identity = %id, "its certificate was taken back: it is not used any more");
                }
                entry.failed(id, now, self.shared.settings.leaf_lifetime, with_causes(&error));
            }
        }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<SpiffeId, Entry>> {
        // No code that holds the lock leaves an entry half-changed: a poisoned map is a good map.
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One certificate that is asked for. However it ends, the entry learns of it.
struct Question {
    manager: Manager,
    id: SpiffeId,
    now: SystemTime,
    since: Instant,
    answered: bool,
}

impl Question {
    async fn ask(mut self) {
        let shared = &self.manager.shared;
        let signer = shared.signer.load(Ordering::SeqCst);
        // Signing happens without the lock: connections ask for certificates meanwhile.
        let result = shared.source.issue(&self.id, shared.settings.leaf_lifetime).await;
        self.manager.answered(&self.id, self.now + self.since.elapsed(), signer, result);
        self.answered = true;
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        if !self.answered
            && let Some(entry) = self.manager.entries().get_mut(&self.id)
        {
            let lifetime = self.manager.shared.settings.leaf_lifetime;
            entry.failed(
                &self.id,
                self.now + self.since.elapsed(),
                lifetime,
                "asking for it was broken off".to_owned(),
            );
        }
    }
}

fn is_believed(trust: &Trust, id: &SpiffeId, svid: &Svid) -> bool {
    let usage = webpki::KeyUsage::client_auth();
    svid.key.cert.split_first().is_some_and(|(leaf, intermediates)| {
        trust.verify(id.trust_domain(), leaf, intermediates, UnixTime::now(), usage).is_ok()
    })
}

pub(crate) fn pem(der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der), config)
}
