//! Where the pods of this node run, as whoever sets their networks up tells it, by their UIDs. Nobody else says it: neither an object of
//! the API server nor a pod.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

/// Where one pod runs.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct PodPlace {
    /// A path that can be opened for setns.
    pub netns: PathBuf,
    /// Below the cgroup that is captured, where that is known.
    pub cgroup: Option<PathBuf>,
    /// That it was given when its network was set up: they count before what the API server knows, which hears of a new sandbox later.
    pub addresses: Box<[IpAddr]>,
    /// It has run uncaptured, so it may have connections that are not encrypted.
    pub late: bool,
}

/// All that was told. A clone is another handle on the same.
#[derive(Clone, Debug)]
pub struct Places(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    by_uid: Mutex<HashMap<Box<str>, PodPlace>>,
    changed: watch::Sender<u64>,
}

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Shared { by_uid: Mutex::default(), changed: watch::Sender::new(0) }))
    }
}

impl Places {
    /// Takes note of a pod's place; one that was told before is replaced.
    pub fn tell(&self, uid: &str, place: PodPlace) {
        let known = self.lock().insert(uid.into(), place.clone());
        if known.as_ref() != Some(&place) {
            self.0.changed.send_modify(|count| *count += 1);
        }
    }

    /// The pod is gone.
    pub fn forget(&self, uid: &str) {
        if self.lock().remove(uid).is_some() {
            self.0.changed.send_modify(|count| *count += 1);
        }
    }

    pub fn of(&self, uid: &str) -> Option<PodPlace> {
        self.lock().get(uid).cloned()
    }

    pub fn all(&self) -> Vec<(Box<str>, PodPlace)> {
        self.lock().iter().map(|(uid, place)| (uid.clone(), place.clone())).collect()
    }

    /// How often anything has changed so far.
    pub fn changes(&self) -> u64 {
        *self.0.changed.borrow()
    }

    /// Hears of every change.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, PodPlace>> {
        self.0.by_uid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
