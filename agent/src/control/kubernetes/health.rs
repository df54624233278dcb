//! How the source is: what it waits for, since when it hears of everything, or why it does not. Logs a change once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::sync::watch;

use super::{compile::Facts, model::Kind, wire::WireError};
use crate::words::with_causes;

/// A clone is another handle on the same.
#[derive(Clone, Debug)]
pub struct Health(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    ready: watch::Sender<bool>,
}

#[derive(Debug)]
struct Inner {
    waiting: BTreeSet<Kind>,
    absent: BTreeSet<Kind>,
    /// Why a kind is not heard of.
    troubles: BTreeMap<Kind, String>,
    /// Since when there are troubles, or none.
    since: SystemTime,
    facts: Facts,
    away: u64,
}

/// What is told of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Whether there was a complete list of everything.
    pub ready: bool,
    /// Why not all is heard of, if it is not: what is known stays in force meanwhile.
    pub away: Option<String>,
    /// Since when it is so.
    pub since: SystemTime,
    /// What was not listed yet.
    pub waiting: Vec<&'static str>,
    /// Kinds that the cluster does not know.
    pub absent: Vec<&'static str>,
    /// How often it was away so far.
    pub times_away: u64,
    pub facts: Facts,
}

impl Default for Health {
    fn default() -> Self {
        let inner = Inner {
            waiting: Kind::all().collect(),
            absent: BTreeSet::new(),
            troubles: BTreeMap::new(),
            since: SystemTime::now(),
            facts: Facts::default(),
            away: 0,
        };
        Self(Arc::new(Shared { inner: Mutex::new(inner), ready: watch::Sender::new(false) }))
    }
}

impl Health {
    /// This kind is heard of.
    pub(super) fn well(&self, kind: Kind) {
        let mut inner = self.lock();
        inner.absent.remove(&kind);
        if let Some(text) = inner.recover(kind) {
            tracing::info!("{text}");
        }
    }

    /// The cluster does not know this kind, which is well.
    pub(super) fn absent(&self, kind: Kind) {
        let mut inner = self.lock();
        if inner.absent.insert(kind) {
            tracing::info!(kind = kind.plural(), "the cluster does not have this kind; it is looked for again");
        }
        if let Some(text) = inner.recover(kind) {
            tracing::info!("{text}");
        }
    }

    pub(super) fn trouble(&self, kind: Kind, error: &WireError) {
        if let Some(text) = self.lock().trouble(kind, with_causes(error)) {
            tracing::error!("{text}");
        }
    }

    /// What was listed meanwhile, and what there is to tell of it.
    pub(super) fn facts(&self, facts: Facts) {
        let mut inner = self.lock();
        let news = facts.errors.iter().filter(|error| !inner.facts.errors.contains(error));
        for error in news {
            tracing::error!("cluster: {error}; until it is mended, what it is about is denied");
        }
        for warning in facts.warnings.iter().filter(|warning| !inner.facts.warnings.contains(warning)) {
            tracing::warn!("cluster: {warning}");
        }
        inner.facts = facts;
    }

    pub(super) fn waiting(&self, missing: impl Iterator<Item = Kind>) {
        self.lock().waiting = missing.collect();
    }

    pub(super) fn set_ready(&self) {
        self.0.ready.send_replace(true);
    }

    /// Becomes true with the first complete list of everything, and stays so.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.0.ready.subscribe()
    }

    pub fn report(&self) -> Report {
        let inner = self.lock();
        let plural = |kinds: &BTreeSet<Kind>| kinds.iter().map(|kind| kind.plural()).collect();
        let more = inner.troubles.len().saturating_sub(1);
        let more = if more > 0 { format!(" (and {more} more kinds)") } else { String::new() };
        Report {
            ready: *self.0.ready.borrow(),
            away: inner.troubles.iter().next().map(|(kind, why)| format!("{}: {why}{more}", kind.plural())),
            since: inner.since,
            waiting: plural(&inner.waiting),
            absent: plural(&inner.absent),
            times_away: inner.away,
            facts: inner.facts.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// What the log shall have of it: each reason when it comes, once, however many kinds have it and however often it is tried.
    fn trouble(&mut self, kind: Kind, why: String) -> Option<String> {
        if self.troubles.is_empty() {
            self.since = SystemTime::now();
            self.away += 1;
        }
        let is_new = !self.troubles.values().any(|known| *known == why);
        let text = is_new
            .then(|| format!("the API server is not heard of; what is known stays in force: {}: {why}", kind.plural()));
        self.troubles.insert(kind, why);
        text
    }

    /// What the log shall have of it: when a reason has gone.
    fn recover(&mut self, kind: Kind) -> Option<String> {
        let why = self.troubles.remove(&kind)?;
        if self.troubles.is_empty() {
            self.since = SystemTime::now();
            return Some("the API server is heard of again".to_owned());
        }
        let is_over = !self.troubles.values().any(|other| *other == why);
        let others: Vec<_> = self.troubles.keys().map(|kind| kind.plural()).collect();
        is_over.then(|| format!("the API server is heard of again, but not of {}", others.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_each_reason_once_and_the_end_of_each() {
        let health = Health::default();
        let mut inner = health.lock();
        let all = [Kind::Namespaces, Kind::Pods, Kind::Services];
        let [namespaces, pods, services] = all;
        let down = || "the API server cannot be reached".to_owned();
        let text = inner.trouble(pods, down()).unwrap();
        assert!(text.ends_with("stays in force: pods: the API server cannot be reached"), "{text}");
        for kind in all.into_iter().chain(all) {
            assert_eq!(inner.trouble(kind, down()), None, "it is one reason");
        }
        let text = inner.trouble(pods, "403".to_owned()).unwrap();
        assert!(text.ends_with("pods: 403"), "{text}");
        assert_eq!(inner.trouble(pods, "403".to_owned()), None, "not at each try");
        assert_eq!(inner.recover(namespaces), None, "services are not heard of yet");
        assert_eq!(inner.recover(services).unwrap(), "the API server is heard of again, but not of pods");
        assert_eq!(inner.recover(services), None);
        assert_eq!(inner.recover(pods).unwrap(), "the API server is heard of again");
        assert_eq!(inner.away, 1);
        assert!(inner.trouble(pods, "403".to_owned()).is_some(), "and again when it comes again");
        assert_eq!(inner.away, 2);
    }
}
