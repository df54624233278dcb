//! Keeps a fresh certificate for every identity that is present on the node: made when the identity appears, renewed
//! at half of its life, kept until it expires when renewing fails, dropped with the last workload that needs it.
//!
//! Which identities are present is for the caller to say (`retain`); making certificates is `identity::ca`'s.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use rustls::pki_types::UnixTime;
use serde::Serialize;
use tokio::sync::{Notify, watch};

use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{IdentityError, LiveCa, SpiffeId, Svid, Trust, TrustStore, humantime};

/// Timers count the time that the machine is awake and know nothing of a clock that is set: look at the calendar this
/// often, whatever the timer says.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// Certificates of a signer that was replaced are renewed within this time.
const LONGEST_RESIGN: Duration = Duration::from_secs(10);
/// With less than this part of its life left a certificate should have been replaced long ago.
const EXPIRING: f64 = 0.25;
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(300);

#[derive(Clone, Debug)]
pub struct ManagerSettings {
    pub leaf_lifetime: Duration,
}

impl Default for ManagerSettings {
    fn default() -> Self {
        Self { leaf_lifetime: Duration::from_secs(24 * 3_600) }
    }
}

/// Where certificates come from. The embedded CA today; a remote one has the same shape.
pub(super) trait Source: Send + Sync {
    fn issue(&self, id: &SpiffeId, lifetime: Duration) -> Result<Svid, IdentityError>;
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

#[derive(Default)]
struct Entry {
    svid: Option<Arc<Svid>>,
    made: Option<SystemTime>,
    /// When to ask for the next certificate.
    due: Option<SystemTime>,
    /// Attempts that failed since the last success.
    failed: u32,
    last_error: Option<String>,
    /// By which of the signers that followed each other it was signed.
    signer: u64,
    /// What was said of its end already, so that it is said once.
    said: CertState,
}

/// What the agent holds for one identity.
#[derive(Clone, Debug, Serialize)]
pub struct SvidInfo {
    pub id: SpiffeId,
    pub serial: Option<String>,
    /// Seconds since 1970.
    pub not_before: Option<u64>,
    pub not_after: Option<u64>,
    pub valid: bool,
    pub state: CertState,
    /// When the next one is asked for.
    pub renews_at: Option<u64>,
    pub seconds_to_expiry: Option<i64>,
    /// The subject of the CA that signed it.
    pub issuer: Option<String>,
    /// Where it comes from.
    pub source: &'static str,
    /// Whether the CA signs with another certificate now: then this one is about to be replaced.
    pub signer_replaced: bool,
    /// Renewals that failed since the last one that did not.
    pub failed_renewals: u32,
    pub last_error: Option<String>,
}

/// Totals since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ManagerCounters {
    pub issued: u64,
    pub failures: u64,
}

/// How a certificate stands.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CertState {
    #[default]
    Valid,
    /// The next one has been asked for.
    Due,
    /// It ends soon, and renewing has failed for long.
    Expiring,
    Expired,
    /// There never was one.
    Missing,
}

impl Entry {
    fn state(&self, now: SystemTime) -> CertState {
        let Some(svid) = &self.svid else { return CertState::Missing };
        // Certificates are dated back for clocks that are behind: that is no part of a life.
        let life = svid.not_after.duration_since(self.made.unwrap_or(svid.not_before)).unwrap_or_default();
        match svid.not_after.duration_since(now) {
            _ if !svid.is_valid_at(now) => CertState::Expired,
            Ok(left) if left < life.mul_f64(EXPIRING) => CertState::Expiring,
            _ if self.due.is_some_and(|due| due <= now) || self.failed > 0 => CertState::Due,
            _ => CertState::Valid,
        }
    }

    /// Says once that a certificate is about to end, and once that it has.
    fn warn(&mut self, id: &SpiffeId, now: SystemTime) {
        let state = self.state(now);
        if std::mem::replace(&mut self.said, state) == state {
            return;
        }
        let left = self.svid.as_ref().and_then(|svid| svid.not_after.duration_since(now).ok()).unwrap_or_default();
        let error = self.last_error.as_deref().unwrap_or("none");
        match state {
            CertState::Expiring => {
                tracing::warn!(identity = %id, left = humantime(left), "a certificate is about to expire and could not be renewed; last error: {error}");
            }
            CertState::Expired => {
                tracing::error!(identity = %id, "a certificate has expired: its workload's connections fail until there is another; last error: {error}");
            }
            CertState::Valid | CertState::Due | CertState::Missing => {}
        }
    }
}

impl Manager {
    pub fn new(ca: LiveCa, trust: TrustStore, settings: ManagerSettings) -> Self {
        Self::with_source(Box::new(ca), trust, settings)
    }

    /// Holds certificates for exactly these identities: makes those that are missing at once and drops the others.
    /// One that cannot be made is logged, counted, and tried again by `run`.
    pub fn retain(&self, present: &BTreeSet<SpiffeId>) {
        let now = SystemTime::now();
        let missing: Vec<SpiffeId> = {
            let mut entries = self.entries();
            entries.retain(|id, _| present.contains(id));
            present.iter().filter(|id| !entries.contains_key(*id)).cloned().collect()
        };
        for id in missing {
            self.entries().entry(id.clone()).or_default();
            self.renew(&id, now);
        }
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

    /// Renews until `shutdown` becomes true or its sender is gone.
    pub async fn run(&self, mut shutdown: watch::Receiver<bool>) {
        loop {
            let next = self.renew_due(SystemTime::now());
            let sleep = next
                .and_then(|due| due.duration_since(SystemTime::now()).ok())
                .unwrap_or(if next.is_some() { Duration::ZERO } else { LONGEST_SLEEP })
                .min(LONGEST_SLEEP);
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                () = self.shared.changed.notified() => {}
                stopped = shutdown.wait_for(|stop| *stop) => {
                    drop(stopped);
                    return;
                }
            }
        }
    }

    pub fn list(&self) -> Vec<SvidInfo> {
        let (now, signer) = (SystemTime::now(), self.shared.signer.load(Ordering::SeqCst));
        self.entries()
            .iter()
            .map(|(id, entry)| {
                let svid = entry.svid.as_deref();
                SvidInfo {
                    id: id.clone(),
                    serial: svid.map(|svid| svid.serial.clone()),
                    not_before: svid.map(|svid| unix_seconds(svid.not_before)),
                    not_after: svid.map(|svid| unix_seconds(svid.not_after)),
                    valid: svid.is_some_and(|svid| svid.is_valid_at(now)),
                    state: entry.state(now),
                    renews_at: entry.due.map(unix_seconds),
                    seconds_to_expiry: svid.map(|svid| seconds_between(now, svid.not_after)),
                    issuer: svid.and_then(issuer),
                    source: "embedded CA",
                    signer_replaced: entry.signer < signer,
                    failed_renewals: entry.failed,
                    last_error: entry.last_error.clone(),
                }
            })
            .collect()
    }

    pub fn counters(&self) -> ManagerCounters {
        ManagerCounters {
            issued: self.shared.issued.load(Ordering::Relaxed),
            failures: self.shared.failures.load(Ordering::Relaxed),
        }
    }

    pub(super) fn with_source(source: Box<dyn Source>, trust: TrustStore, settings: ManagerSettings) -> Self {
        Self {
            shared: Arc::new(Shared {
                source,
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

    /// Renews what is due and says when the next is.
    fn renew_due(&self, now: SystemTime) -> Option<SystemTime> {
        let due: Vec<SpiffeId> = self
            .entries()
            .iter()
            // A clock that was set back leaves a certificate of the future, which peers refuse: replace it as well.
            .filter(|(_, entry)| {
                entry.due.is_some_and(|due| due <= now)
                    || entry.failed == 0 && entry.svid.as_ref().is_some_and(|svid| svid.not_before > now)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            self.renew(&id, now);
        }
        for (id, entry) in self.entries().iter_mut() {
            entry.warn(id, now);
        }
        self.entries().values().filter_map(|entry| entry.due).min()
    }

    fn renew(&self, id: &SpiffeId, now: SystemTime) {
        let signer = self.shared.signer.load(Ordering::SeqCst);
        // Signing happens without the lock: connections ask for certificates meanwhile.
        let result = self.shared.source.issue(id, self.shared.settings.leaf_lifetime);
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(id) else { return };
        match result {
            Ok(svid) => {
                self.shared.issued.fetch_add(1, Ordering::Relaxed);
                let life = svid.not_after.duration_since(now).unwrap_or_default();
                tracing::info!(identity = %id, serial = svid.serial, life = humantime(life), "new certificate");
                // Between 45 % and 55 % of its life, so that a node's certificates do not all come due together.
                let mut due = now + life.mul_f64(0.45 + rand::random::<f64>() / 10.0);
                if signer < self.shared.signer.load(Ordering::SeqCst) {
                    // The signer was replaced meanwhile, and this may be of the one before.
                    due = now;
                }
                *entry =
                    Entry { svid: Some(Arc::new(svid)), made: Some(now), due: Some(due), signer, ..Entry::default() };
            }
            Err(error) => {
                self.shared.failures.fetch_add(1, Ordering::Relaxed);
                let wait = retry_after(entry.failed, self.shared.settings.leaf_lifetime);
                entry.failed = entry.failed.saturating_add(1);
                entry.due = Some(now + wait);
                let error = with_causes(&error);
                let held = match entry.svid.as_ref().map(|svid| svid.not_after.duration_since(now)) {
                    Some(Ok(left)) => format!("the present one is good for another {}", humantime(left)),
                    Some(Err(_)) => "the present one has expired".to_owned(),
                    None => "there is none".to_owned(),
                };
                tracing::warn!(identity = %id, attempt = entry.failed, retry = humantime(wait), "no new certificate: {error}; {held}");
                entry.last_error = Some(error);
            }
        }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<SpiffeId, Entry>> {
        // No code that holds the lock leaves an entry half-changed: a poisoned map is a good map.
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Doubles with each failure, up to five minutes or a twentieth of a certificate's life, whichever is shorter; then a
/// random half is taken off, so that nodes do not come back to a CA in step.
fn retry_after(failed: u32, lifetime: Duration) -> Duration {
    let cap = LAST_RETRY.min(lifetime / 20).max(Duration::from_millis(100));
    let wait = FIRST_RETRY.saturating_mul(1 << failed.min(16)).min(cap);
    wait.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

fn is_believed(trust: &Trust, id: &SpiffeId, svid: &Svid) -> bool {
    let usage = webpki::KeyUsage::client_auth();
    svid.key.cert.split_first().is_some_and(|(leaf, intermediates)| {
        trust.verify(id.trust_domain(), leaf, intermediates, UnixTime::now(), usage).is_ok()
    })
}

fn issuer(svid: &Svid) -> Option<String> {
    let (_, leaf) = X509Certificate::from_der(svid.key.cert.first()?).ok()?;
    Some(leaf.issuer().to_string())
}

pub(super) fn pem(der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der), config)
}

fn seconds_between(from: SystemTime, to: SystemTime) -> i64 {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    to.duration_since(from).map_or_else(|error| -seconds(error.duration()), seconds)
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::identity::{Ca, TrustDomain};

    const LIFE: Duration = Duration::from_secs(24 * 3_600);

    /// A CA that can be out of order.
    struct Flaky {
        ca: LiveCa,
        down: Arc<AtomicBool>,
    }

    impl Source for Flaky {
        fn issue(&self, id: &SpiffeId, lifetime: Duration) -> Result<Svid, IdentityError> {
            match self.down.load(Ordering::SeqCst) {
                true => Err(IdentityError::CaExpired(Duration::from_secs(1))),
                false => self.ca.issue(id, lifetime),
            }
        }
    }

    fn manager(life: Duration) -> (Manager, Arc<AtomicBool>) {
        let dir = tempfile::tempdir().unwrap();
        Ca::init(dir.path(), &TrustDomain::parse("cluster.local").unwrap()).unwrap();
        let down = Arc::new(AtomicBool::new(false));
        let ca = LiveCa::new(Ca::open(dir.path()).unwrap());
        let domain = TrustDomain::parse("cluster.local").unwrap();
        let trust = TrustStore::new(Trust::new(domain, ca.load().roots()));
        let source = Flaky { ca, down: Arc::clone(&down) };
        (Manager::with_source(Box::new(source), trust, ManagerSettings { leaf_lifetime: life }), down)
    }

    fn id(account: &str) -> SpiffeId {
        SpiffeId::new(&TrustDomain::parse("cluster.local").unwrap(), "shop", account).unwrap()
    }

    fn ids(accounts: &[&str]) -> BTreeSet<SpiffeId> {
        accounts.iter().map(|account| id(account)).collect()
    }

    #[test]
    fn a_certificate_that_nobody_believes_any_more_is_replaced_at_once_and_others_are_not() {
        let (manager, _) = manager(LIFE);
        manager.retain(&ids(&["web"]));
        let now = SystemTime::now();
        manager.renew_unbelieved();
        manager.renew_due(now + Duration::from_secs(1));
        assert_eq!(manager.counters().issued, 1);
        let dir = tempfile::tempdir().unwrap();
        let domain = TrustDomain::parse("cluster.local").unwrap();
        Ca::init(dir.path(), &domain).unwrap();
        manager.trust_store().replace(Trust::new(domain, Ca::open(dir.path()).unwrap().roots()));
        manager.renew_unbelieved();
        manager.renew_due(now + Duration::from_secs(1));
        assert_eq!(manager.counters().issued, 2);
    }

    #[test]
    fn certificates_come_and_go_with_their_workloads() {
        let (manager, _) = manager(LIFE);
        assert!(manager.svid(&id("web")).is_none());
        manager.retain(&ids(&["web", "db"]));
        let web = manager.svid(&id("web")).unwrap();
        assert_eq!(web.id, id("web"));
        manager.retain(&ids(&["web", "client"]));
        assert!(manager.svid(&id("db")).is_none(), "gone with its last workload");
        assert_eq!(manager.svid(&id("web")).unwrap().serial, web.serial, "not made again");
        let listed: Vec<_> = manager.list().into_iter().map(|info| (info.id, info.valid)).collect();
        assert_eq!(listed, [(id("client"), true), (id("web"), true)]);
        assert_eq!(manager.counters(), ManagerCounters { issued: 3, failures: 0 });
    }

    #[test]
    fn a_certificate_is_renewed_at_half_of_its_life_and_not_before() {
        let (manager, _) = manager(LIFE);
        manager.retain(&ids(&["web"]));
        let first = manager.svid(&id("web")).unwrap().serial.clone();
        let now = SystemTime::now();
        let due = manager.renew_due(now + LIFE.mul_f64(0.44)).unwrap();
        assert_eq!(manager.svid(&id("web")).unwrap().serial, first);
        assert!(due >= now + LIFE.mul_f64(0.44) && due <= now + LIFE.mul_f64(0.56));
        manager.renew_due(now + LIFE.mul_f64(0.56));
        assert_ne!(manager.svid(&id("web")).unwrap().serial, first);
    }

    #[test]
    fn many_certificates_do_not_come_due_together() {
        let (manager, _) = manager(LIFE);
        manager.retain(&(0..50).map(|n| id(&format!("a{n}"))).collect());
        let due: BTreeSet<_> = manager.entries().values().map(|entry| entry.due.unwrap()).collect();
        let spread = due.last().unwrap().duration_since(*due.first().unwrap()).unwrap();
        assert!(spread > LIFE / 40, "only {spread:?} apart");
    }

    #[test]
    fn a_failed_renewal_keeps_the_certificate_until_it_expires() {
        let (manager, down) = manager(LIFE);
        manager.retain(&ids(&["web"]));
        let first = manager.svid(&id("web")).unwrap().serial.clone();
        down.store(true, Ordering::SeqCst);
        let mut now = SystemTime::now() + LIFE.mul_f64(0.56);
        let mut attempts = 0;
        while now < SystemTime::now() + LIFE.mul_f64(0.99) {
            let next = manager.renew_due(now).unwrap();
            assert!(next > now && next <= now + LAST_RETRY, "it waits, and not for ever");
            attempts += 1;
            now = next;
        }
        assert!((100..400).contains(&attempts), "{attempts} attempts in ten hours are neither a storm nor a sleep");
        assert_eq!(manager.svid(&id("web")).unwrap().serial, first, "still good, still used");
        let info = manager.list().remove(0);
        assert_eq!((info.failed_renewals, info.valid), (attempts, true));
        assert!(info.last_error.unwrap().contains("expired"));
        assert_eq!(manager.counters().failures, u64::from(attempts));

        down.store(false, Ordering::SeqCst);
        manager.renew_due(now);
        assert_ne!(manager.svid(&id("web")).unwrap().serial, first);
        assert_eq!(manager.list().remove(0).failed_renewals, 0);
    }

    #[test]
    fn an_identity_that_could_not_be_had_is_tried_again() {
        let (manager, down) = manager(LIFE);
        down.store(true, Ordering::SeqCst);
        manager.retain(&ids(&["web"]));
        assert!(manager.svid(&id("web")).is_none());
        assert!(!manager.list().remove(0).valid);
        down.store(false, Ordering::SeqCst);
        let soon = manager.renew_due(SystemTime::now()).unwrap();
        manager.renew_due(soon);
        assert!(manager.svid(&id("web")).is_some());
    }

    #[test]
    fn a_clock_that_is_set_back_gets_a_certificate_of_the_new_time() {
        let (manager, _) = manager(LIFE);
        manager.retain(&ids(&["web"]));
        let first = manager.svid(&id("web")).unwrap().serial.clone();
        manager.renew_due(SystemTime::now() - Duration::from_secs(3_600));
        assert_ne!(manager.svid(&id("web")).unwrap().serial, first);
    }

    #[test]
    fn a_clock_that_is_set_forward_gets_a_certificate_at_once_and_the_expired_one_is_not_used() {
        let (manager, down) = manager(Duration::from_secs(1_800));
        manager.retain(&ids(&["web"]));
        let first = manager.svid(&id("web")).unwrap();
        let later = SystemTime::now() + Duration::from_secs(3_600);
        assert!(!first.is_valid_at(later));
        assert_eq!(manager.entries()[&id("web")].state(later), CertState::Expired);
        down.store(true, Ordering::SeqCst);
        manager.renew_due(later);
        assert_eq!(manager.entries()[&id("web")].state(later), CertState::Expired, "and said so while the CA is away");
        down.store(false, Ordering::SeqCst);
        manager.entries().get_mut(&id("web")).unwrap().due = Some(later);
        manager.renew_due(later);
        assert_ne!(manager.svid(&id("web")).unwrap().serial, first.serial);
    }

    #[test]
    fn a_certificate_goes_from_valid_to_due_to_expiring_to_expired() {
        let (manager, down) = manager(LIFE);
        down.store(true, Ordering::SeqCst);
        manager.retain(&ids(&["db"]));
        assert_eq!(manager.list().remove(0).state, CertState::Missing);
        down.store(false, Ordering::SeqCst);
        manager.retain(&ids(&["web"]));
        let now = SystemTime::now();
        let state = |part: f64| manager.entries()[&id("web")].state(now + LIFE.mul_f64(part));
        let states = [0.1, 0.6, 0.8, 1.1].map(state);
        assert_eq!(states, [CertState::Valid, CertState::Due, CertState::Expiring, CertState::Expired]);
    }

    #[test]
    fn what_another_signer_has_signed_is_replaced_soon_and_not_all_at_once() {
        let (manager, _) = manager(LIFE);
        manager.retain(&(0..20).map(|n| id(&format!("a{n}"))).collect());
        let now = SystemTime::now();
        manager.resign();
        assert!(manager.list().iter().all(|info| info.signer_replaced));
        let due: BTreeSet<_> = manager.entries().values().map(|entry| entry.due.unwrap()).collect();
        assert!(due.len() > 10 && due.last().unwrap() < &(now + LONGEST_RESIGN + Duration::from_secs(1)));
        manager.renew_due(now + LONGEST_RESIGN + Duration::from_secs(1));
        assert!(manager.list().iter().all(|info| !info.signer_replaced));
        assert_eq!(manager.counters().issued, 40);
    }

    #[test]
    fn an_expired_certificate_is_not_given_out() {
        let (manager, _) = manager(LIFE);
        manager.retain(&ids(&["web"]));
        let old = manager.svid(&id("web")).unwrap();
        let now = SystemTime::now();
        let expired = Svid {
            id: id("web"),
            key: Arc::clone(&old.key),
            serial: String::new(),
            not_before: now - LIFE,
            not_after: now,
        };
        manager.entries().get_mut(&id("web")).unwrap().svid = Some(Arc::new(expired));
        assert!(manager.svid(&id("web")).is_none());
        assert!(!manager.list().remove(0).valid);
    }

    #[test]
    fn retries_grow_and_stay_in_bounds() {
        for (failed, lifetime, least, most) in [
            (0, LIFE, 500, 1_000),
            (3, LIFE, 4_000, 8_000),
            (40, LIFE, 150_000, 300_000),
            (40, Duration::from_secs(4), 100, 200),
        ] {
            for _ in 0..50 {
                let wait = retry_after(failed, lifetime);
                assert!(
                    wait >= Duration::from_millis(least) && wait <= Duration::from_millis(most),
                    "{failed}: {wait:?}"
                );
            }
        }
    }

    #[tokio::test]
    async fn the_running_manager_renews_by_itself_and_stops_when_told() {
        let (manager, _) = manager(Duration::from_secs(2));
        let (stop, stopped) = watch::channel(false);
        let running = tokio::spawn({
            let manager = manager.clone();
            async move { manager.run(stopped).await }
        });
        manager.retain(&ids(&["web"]));
        let first = manager.svid(&id("web")).unwrap().serial.clone();
        let renewed = async {
            while manager.counters().issued < 3 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), renewed).await.unwrap();
        assert_ne!(manager.list().remove(0).serial.unwrap(), first);
        stop.send(true).unwrap();
        tokio::time::timeout(Duration::from_secs(5), running).await.unwrap().unwrap();
    }
}
