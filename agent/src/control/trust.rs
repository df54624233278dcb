//! Follows the CA's directory, or the pinned roots of a CA elsewhere, or what a Workload API tells, and the other files of trust: when one
//! changes all are read again, and take the place of what was as a whole if they prove themselves: a CA must be able to sign what its own
//! roots verify. If they do not, the last good ones stay.
//!
//! A directory that Kubernetes mounts from a Secret changes by a link that is swapped; one that a person writes to changes file by file,
//! and its halves are refused. What good files are, `identity` knows.

use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use zeroize::Zeroize as _;

use super::{files::WatchSettings, watched::WatchedDirectory};
use crate::{
    config,
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
pub async fn watch(followed: Followed, settings: WatchSettings, mut shutdown: watch::Receiver<bool>) {
    let paths = followed.origin.paths(&followed.files);
    let (_silent, mut told) = match &followed.origin {
        Origin::Told(api) => (None, api.changes()),
        Origin::Directory { .. } | Origin::Pinned(_) => {
            let (sender, told) = watch::channel(0);
            (Some(sender), told)
        }
    };
    let places: BTreeSet<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
    let mut directories: Vec<_> = places.into_iter().map(|place| WatchedDirectory::new(place.to_owned())).collect();
    let mut follower = Follower { followed, paths, seen: None, refused: None, stale: BTreeSet::new() };
    loop {
        // Before reading: what changes from here on is an event for the next round.
        directories.iter_mut().for_each(WatchedDirectory::renew);
        let count = *told.borrow_and_update();
        follower.follow(settings.quiet, count).await;
        follower.warn_of_stale_lists();
        tokio::select! {
            () = any_changed(&directories), if !directories.is_empty() => {}
            // It comes as a whole.
            Ok(()) = told.changed() => continue,
            () = sleep(settings.poll) => continue,
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        // More events put the reading off, but not for ever.
        for _ in 0..10 {
            tokio::select! {
                () = any_changed(&directories) => {}
                () = sleep(settings.quiet) => break,
            }
        }
    }
}

pub(super) async fn any_changed(directories: &[WatchedDirectory]) {
    let mut waiting: Vec<_> = directories.iter().map(|directory| Box::pin(directory.changed())).collect();
    std::future::poll_fn(|context| {
        let ready = waiting.iter_mut().any(|one| one.as_mut().poll(context).is_ready());
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

struct Follower {
    followed: Followed,
    paths: Vec<PathBuf>,
    /// The contents that were accepted or rejected last.
    seen: Option<u64>,
    /// What was refused last, and why: that is said once, and tried again at each look, as what is wrong need not be in the files. A
    /// certificate may be of a clock that is ahead.
    refused: Option<(Option<u64>, String)>,
    /// Lists that were said to be overdue.
    stale: BTreeSet<String>,
}

impl Follower {
    /// Reads the files if they hold something else than the last time, or if more was told.
    async fn follow(&mut self, quiet: Duration, told: u64) {
        for _ in 0..10 {
            let before = self.fingerprint(told).await;
            if self.seen.is_some() && self.seen == before {
                return;
            }
            let (origin, files) = (self.followed.origin.clone(), self.followed.files.clone());
            let result = match spawn_blocking(move || origin.load(&files)).await {
                Ok(result) => result,
                // Whoever follows the files no more would not hear of what is taken back: that ends the agent.
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return,
            };
            // What changed while it was read may be half of the old and half of the new.
            if self.fingerprint(told).await == before {
                match result {
                    Ok(None) => return,
                    Ok(Some((ca, trust))) => {
                        (self.seen, self.refused) = (before, None);
                        self.accept(ca, trust);
                    }
                    Err(error) => {
                        self.seen = None;
                        self.reject(before, &error);
                    }
                }
                return;
            }
            sleep(quiet).await;
        }
        tracing::warn!(
            origin = self.followed.origin.name(),
            "the CA's files keep changing while they are read, so they are not read yet"
        );
    }

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
        self.followed.identities.trust_store().replace(trust);
        let identities = &self.followed.identities;
        let replaced = match (&self.followed.origin, ca) {
            (Origin::Directory { ca: live, .. }, Some(ca)) => live.replace(ca),
            _ => false,
        };
        if replaced {
            tracing::info!("another certificate of the CA signs from now on: workloads' certificates are replaced");
            identities.resign();
        } else if matches!(self.followed.origin, Origin::Told(_)) {
            identities.supplied();
        } else {
            identities.renew_unbelieved();
        }
        self.tell(None);
        self.followed.metrics.trust_reloaded(true);
    }

    fn reject(&mut self, files: Option<u64>, error: &IdentityError) {
        let text = with_causes(error);
        let refused = Some((files, text.clone()));
        if self.refused == refused {
            return;
        }
        self.refused = refused;
        self.tell(Some(text.clone()));
        tracing::error!(
            origin = self.followed.origin.name(),
            "the CA's files were refused, the last good ones stay in force: {text}"
        );
        self.followed.metrics.trust_reloaded(false);
    }

    fn tell(&self, refusal: Option<String>) {
        *self.followed.refusal.lock().unwrap_or_else(PoisonError::into_inner) = refusal;
    }

    /// An overdue list goes on counting: refusing everybody of its CA instead would end the mesh for want of a file.
    fn warn_of_stale_lists(&mut self) {
        let now = SystemTime::now();
        let trust = self.followed.identities.trust();
        let stale: BTreeSet<String> =
            trust.revoked().iter().filter(|list| list.is_stale(now)).map(|list| list.issuer.clone()).collect();
        for issuer in stale.difference(&self.stale) {
            tracing::warn!(
                issuer,
                "a revocation list is overdue (its nextUpdate has passed): what it says still counts, and what was revoked since is not known; replace the file"
            );
        }
        self.stale = stale;
    }

    async fn fingerprint(&self, told: u64) -> Option<u64> {
        let paths = self.paths.clone();
        spawn_blocking(move || fingerprint(&paths, told)).await.ok()
    }
}

pub(super) fn fingerprint(paths: &[PathBuf], told: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    told.hash(&mut hasher);
    for path in paths {
        path.hash(&mut hasher);
        // A file that is not there, or cannot be read, is part of what was seen.
        match config::read_file(path).map_err(|error: io::Error| error.kind()) {
            // One of them is the CA's key.
            Ok(mut bytes) => {
                bytes.hash(&mut hasher);
                bytes.zeroize();
            }
            Err(kind) => kind.hash(&mut hasher),
        }
    }
    hasher.finish()
}
