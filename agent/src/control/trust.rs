//! Follows the CA's directory, or the pinned roots of a CA elsewhere, or what a Workload API tells, and the other files of trust: when one
//! changes all are read again, and take the place of what was as a whole if they prove themselves: a CA must be able to sign what its own
//! roots verify. If they do not, the last good ones stay.
//!
//! A directory that Kubernetes mounts from a Secret changes by a link that is swapped; one that a person writes to changes file by file,
//! and its halves are refused. What good files are, `identity` knows.

use std::{
    collections::BTreeSet,
    convert,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, time::sleep};

use super::{
    files::WatchSettings,
    follow::{Sources, follow},
};
use crate::{
    identity::{
        Ca, IdentityError, LiveCa, Manager, Trust, TrustFiles, ca, manager, trust::files::Supplied,
        workload_api::WorkloadApi,
    },
    metrics::Metrics,
    words::with_causes,
};

/// Where our own roots come from.
#[derive(Clone)]
pub enum Origin {
    /// The embedded CA's directory.
    Directory {
        dir: PathBuf,
        ca: LiveCa,
    },
    /// The roots of a CA elsewhere, in PEM.
    Pinned(PathBuf),
    Told(WorkloadApi),
}

/// What is followed, and who is told.
pub struct Followed {
    pub origin: Origin,
    pub files: TrustFiles,
    pub identities: Manager,
    pub metrics: Arc<Metrics>,
    pub refusal: LastRefusal,
}

/// Why the files as they are now were refused, if they were.
pub type LastRefusal = Arc<Mutex<Option<String>>>;

/// Reads the CA in `dir` and all else that trust is made from.
pub fn load(dir: &Path, files: &TrustFiles) -> Result<(Ca, Trust), IdentityError> {
    let ca = Ca::open(dir)?;
    ca.require_trust_domain(files.domains.own())?;
    let trust = files.load(dir, &ca)?;
    Ok((ca, trust))
}

/// Reads the pinned roots and all else that trust is made from.
pub fn load_pinned(roots: &Path, files: &TrustFiles) -> Result<Trust, IdentityError> {
    files.assemble(Supplied::by_file(roots, files.domains.own())?)
}

impl Origin {
    /// A CA only where there is one here. Nothing at all if nothing was told yet.
    fn load(&self, files: &TrustFiles) -> Result<Option<(Option<Ca>, Trust)>, IdentityError> {
        match self {
            Self::Directory { dir, .. } => load(dir, files).map(|(ca, trust)| Some((Some(ca), trust))),
            Self::Pinned(roots) => load_pinned(roots, files).map(|trust| Some((None, trust))),
            Self::Told(api) => api.supplied().map(|told| files.assemble(told).map(|trust| (None, trust))).transpose(),
        }
    }

    fn paths(&self, files: &TrustFiles) -> Vec<PathBuf> {
        let mut paths = match self {
            Self::Directory { dir, .. } => ca::file_paths(dir),
            Self::Pinned(roots) => vec![roots.clone()],
            Self::Told(_) => Vec::new(),
        };
        let beside = match self {
            Self::Directory { dir, .. } => Some(dir.as_path()),
            Self::Pinned(roots) => roots.parent(),
            Self::Told(_) => None,
        };
        paths.extend(files.paths(beside));
        paths
    }

    /// For people.
    fn name(&self) -> String {
        match self {
            Self::Directory { dir, .. } => dir.display().to_string(),
            Self::Pinned(roots) => roots.display().to_string(),
            Self::Told(api) => manager::Source::name(api).to_string(),
        }
    }
}

/// Keeps the CA and trust in step with the files until `shutdown` becomes true or its sender is gone.
pub async fn watch(followed: Followed, settings: WatchSettings, shutdown: watch::Receiver<bool>) {
    let sources = Sources::files(followed.origin.paths(&followed.files));
    let sources = match &followed.origin {
        Origin::Told(api) => sources.and_told(api.changes()),
        Origin::Directory { .. } | Origin::Pinned(_) => sources,
    };
    let (origin, files) = (followed.origin.clone(), followed.files.clone());
    let read = Arc::new(move || origin.load(&files).map_err(|error| with_causes(&error)));
    let overdue = warn_of_overdue_lists(followed.identities.clone(), settings.poll);
    let took = move |read| match read {
        // Nothing was told yet.
        Ok(None) => {}
        Ok(Some((ca, trust))) => followed.accept(ca, trust),
        Err(why) => followed.reject(why),
    };
    tokio::select! {
        () = follow(sources, read, convert::identity, took, settings, shutdown) => {}
        () = overdue => {}
    }
}

impl Followed {
    fn accept(&self, ca: Option<Ca>, trust: Trust) {
        for (domain, roots) in trust.bundles() {
            tracing::info!(%domain, roots, "trusted to vouch for a trust domain");
        }
        for list in trust.revoked().iter().filter(|list| !list.is_of_known_ca()) {
            tracing::warn!(
                issuer = list.issuer,
                "a revocation list of a CA that is not known here: it counts when a peer shows that CA"
            );
        }
        // Trust first: what the new signer signs must be believed here.
        self.identities.trust_store().replace(trust);
        let replaced = match (&self.origin, ca) {
            (Origin::Directory { ca: live, .. }, Some(ca)) => live.replace(ca),
            _ => false,
        };
        if replaced {
            tracing::info!("another certificate of the CA signs from now on: workloads' certificates are replaced");
            self.identities.resign();
        } else if matches!(self.origin, Origin::Told(_)) {
            self.identities.supplied();
        } else {
            self.identities.renew_unbelieved();
        }
        self.tell(None);
        self.metrics.trust_reloaded(true);
    }

    fn reject(&self, why: String) {
        tracing::error!(
            origin = self.origin.name(),
            "the CA's files were refused, the last good ones stay in force: {why}"
        );
        self.tell(Some(why));
        self.metrics.trust_reloaded(false);
    }

    fn tell(&self, refusal: Option<String>) {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = refusal;
    }
}

/// An overdue list goes on counting: refusing everybody of its CA instead would end the mesh for want of a file.
async fn warn_of_overdue_lists(identities: Manager, poll: Duration) {
    let mut warned = BTreeSet::new();
    loop {
        let now = SystemTime::now();
        let trust = identities.trust();
        let stale: BTreeSet<String> =
            trust.revoked().iter().filter(|list| list.is_stale(now)).map(|list| list.issuer.clone()).collect();
        for issuer in stale.difference(&warned) {
            tracing::warn!(
                issuer,
                "a revocation list is overdue (its nextUpdate has passed): what it says still counts, and what was revoked since is not known; replace the file"
            );
        }
        warned = stale;
        sleep(poll).await;
    }
}
