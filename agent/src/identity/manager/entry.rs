//! One identity's certificate, as it stands: what is held, when the next is due, what was said of it. Asking for the next is the
//! manager's.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tokio::sync::Notify;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::identity::{SpiffeId, Svid, humantime};

/// With less than this part of its life left a certificate should have been replaced long ago.
const EXPIRING: f64 = 0.25;
const FIRST_RETRY: Duration = Duration::from_secs(1);
pub(super) const LAST_RETRY: Duration = Duration::from_secs(300);

#[derive(Default)]
pub(super) struct Entry {
    pub svid: Option<Arc<Svid>>,
    pub made: Option<SystemTime>,
    /// When to ask for the next certificate.
    pub due: Option<SystemTime>,
    /// Whether it has been asked for, and no answer is there.
    pub asked: bool,
    /// Attempts that failed since the last success.
    pub failed: u32,
    pub last_error: Option<String>,
    /// By which of the signers that followed each other it was signed.
    pub signer: u64,
    /// What was said of its end already, so that it is said once.
    pub said: CertState,
    /// Wakes those who wait for a certificate.
    pub came: Arc<Notify>,
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
    pub source: String,
    /// Whether the CA signs with another certificate now: then this one is about to be replaced.
    pub signer_replaced: bool,
    /// Renewals that failed since the last one that did not.
    pub failed_renewals: u32,
    pub last_error: Option<String>,
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
    pub fn state(&self, now: SystemTime) -> CertState {
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

    /// Whether the next one should be asked for. A clock that was set back since it came may leave a certificate of the future, which
    /// peers refuse.
    pub fn wants_another(&self, now: SystemTime) -> bool {
        let is_due = self.due.is_some_and(|due| due <= now);
        let set_back = self.made.is_some_and(|made| made > now + Duration::from_secs(1));
        let of_the_future = self.svid.as_ref().is_some_and(|svid| svid.not_before > now);
        !self.asked && (is_due || self.failed == 0 && set_back && of_the_future)
    }

    /// Says once that a certificate is about to end, and once that it has.
    pub fn warn(&mut self, id: &SpiffeId, now: SystemTime) {
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

    /// Takes a new certificate.
    pub fn renewed(&mut self, svid: Svid, now: SystemTime, due: Option<SystemTime>, signer: u64) {
        let came = Arc::clone(&self.came);
        *self = Self { svid: Some(Arc::new(svid)), made: Some(now), due, signer, came, ..Self::default() };
        self.came.notify_waiters();
    }

    /// The source has no other than the one that is held.
    pub fn confirmed(&mut self, now: SystemTime, due: Option<SystemTime>, signer: u64) {
        (self.asked, self.due, self.signer) = (false, due, signer);
        (self.failed, self.last_error) = (0, None);
        self.made = self.made.map(|made| made.min(now));
    }

    /// There is none, for now: it is tried again after a while.
    pub fn failed(&mut self, id: &SpiffeId, now: SystemTime, lifetime: Duration, error: String) {
        let wait = retry_after(self.failed, lifetime);
        self.failed = self.failed.saturating_add(1);
        self.due = Some(now + wait);
        self.asked = false;
        let held = match self.svid.as_ref().map(|svid| svid.not_after.duration_since(now)) {
            Some(Ok(left)) => format!("the present one is good for another {}", humantime(left)),
            Some(Err(_)) => "the present one has expired".to_owned(),
            None => "there is none".to_owned(),
        };
        // The same thing again and again is said less and less often.
        let again = self.last_error.as_ref() == Some(&error);
        if !again || self.failed.is_power_of_two() {
            tracing::warn!(identity = %id, attempt = self.failed, retry = humantime(wait), "no new certificate: {error}; {held}");
        }
        self.last_error = Some(error);
    }

    pub fn info(&self, id: &SpiffeId, now: SystemTime, signer: u64, source: &Arc<str>) -> SvidInfo {
        let svid = self.svid.as_deref();
        SvidInfo {
            id: id.clone(),
            serial: svid.map(|svid| svid.serial.clone()),
            not_before: svid.map(|svid| unix_seconds(svid.not_before)),
            not_after: svid.map(|svid| unix_seconds(svid.not_after)),
            valid: svid.is_some_and(|svid| svid.is_valid_at(now)),
            state: self.state(now),
            renews_at: self.due.map(unix_seconds),
            seconds_to_expiry: svid.map(|svid| seconds_between(now, svid.not_after)),
            issuer: svid.and_then(issuer),
            source: source.to_string(),
            signer_replaced: self.signer < signer,
            failed_renewals: self.failed,
            last_error: self.last_error.clone(),
        }
    }
}

/// Doubles with each failure, up to five minutes or a twentieth of a certificate's life, whichever is shorter; then a
/// random half is taken off, so that nodes do not come back to a CA in step.
pub(super) fn retry_after(failed: u32, lifetime: Duration) -> Duration {
    let cap = LAST_RETRY.min(lifetime / 20).max(Duration::from_millis(100));
    let wait = FIRST_RETRY.saturating_mul(1 << failed.min(16)).min(cap);
    wait.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

fn issuer(svid: &Svid) -> Option<String> {
    let (_, leaf) = X509Certificate::from_der(svid.key.cert.first()?).ok()?;
    Some(leaf.issuer().to_string())
}

fn seconds_between(from: SystemTime, to: SystemTime) -> i64 {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    to.duration_since(from).map_or_else(|error| -seconds(error.duration()), seconds)
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
