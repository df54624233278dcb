//! Follows one kind: a list in pages, then watches from where the list ends, for ever. What was known stays until a complete list takes
//! its place. Every wait has jitter, so that a thousand agents do not come back at one moment. The first lists wait for nothing: agents of a
//! rollout come in steps, and whom the API server has no time for it sends away, to come back with jitter.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::{
    health::Health,
    model::{Kind, Update},
    objects::{Item, Key, Names},
    store::Change,
    wire::{Api, Event, WireError},
};

/// How patient to be.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Objects in a page of a list.
    pub page: u32,
    /// After a failure; doubled after each further one.
    pub backoff: Duration,
    pub longest_backoff: Duration,
    /// How often to look for kinds that the cluster does not know.
    pub absent: Duration,
    /// For how long it must be said, and nothing else, that a kind is unknown of which there are objects, before that is believed.
    pub doubt: Duration,
    /// A watch that tells nothing for so long, not even a bookmark, is begun again.
    pub silence: Duration,
    /// How long a watch shall last.
    pub watch: Duration,
    /// Changes that come within so long make one snapshot.
    pub quiet: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            page: 500,
            backoff: Duration::from_millis(500),
            longest_backoff: Duration::from_secs(30),
            absent: Duration::from_secs(60),
            doubt: Duration::from_secs(300),
            silence: Duration::from_secs(100),
            watch: Duration::from_secs(290),
            quiet: Duration::from_millis(100),
        }
    }
}

/// So many watches that fail one after the other, and a list is made.
const FAILURES: u32 = 5;
/// So many failures of one page one after the other, two minutes of them, and its list is begun anew: API servers remember pages for some five.
const PAGE_FAILURES: u32 = 10;
/// Nobody sends an agent away for longer.
const LONGEST_ASKED: Duration = Duration::from_secs(60);

pub struct Follower<W, T> {
    pub api: Api,
    pub kind: Kind,
    pub settings: Settings,
    pub health: Health,
    pub updates: mpsc::Sender<Update>,
    pub trim: fn(Kind, W, &mut Names) -> Option<Item<T>>,
    pub wrap: fn(Kind, Change<T>) -> Update,
}

/// Nobody listens any more.
struct Deserted;

enum Ended {
    /// Go on from this version.
    At(String),
    /// Only a list helps.
    Stale,
}

impl<W: DeserializeOwned, T> Follower<W, T> {
    /// Ends when nobody takes the updates any more.
    pub async fn run(self) {
        let (mut names, mut failures) = (Names::default(), 0);
        // Of kinds that may be absent: what there is of them.
        let mut held = HashSet::new();
        // Since when nothing else is said than that there is no such kind.
        let mut unknown: Option<Instant> = None;
        loop {
            let listed = self.list(&mut names, &mut held).await;
            unknown = match &listed {
                Ok(Err(WireError::Absent)) => unknown.or_else(|| Some(Instant::now())),
                _ => None,
            };
            // An API server that forgets a kind of which there are objects is not believed at once: it may have been started just now.
            let believed = held.is_empty() || unknown.is_some_and(|since| since.elapsed() >= self.settings.doubt);
            let (path, version) = match listed {
                Err(Deserted) => return,
                Ok(Err(WireError::Absent)) if self.kind.may_be_absent() && believed => {
                    if !held.is_empty() {
                        let (kind, objects) = (self.kind.plural(), held.len());
                        tracing::warn!(
                            kind,
                            objects,
                            "the cluster has no such kind any more; what it had counts no longer"
                        );
                        held.clear();
                    }
                    self.health.absent(self.kind);
                    failures = 0;
                    // There is none of it: that is known as well as a list's content.
                    if self.send(Change::Replace { items: Vec::new(), version: None }).await.is_err() {
                        return;
                    }
                    sleep(jittered(self.settings.absent)).await;
                    continue;
                }
                // The list took so long that its version was forgotten meanwhile.
                Ok(Err(WireError::Gone)) => {
                    self.back_off(&mut failures, None).await;
                    continue;
                }
                Ok(Err(error)) => {
                    self.health.trouble(self.kind, &error);
                    self.back_off(&mut failures, error.retry_after()).await;
                    continue;
                }
                Ok(Ok(found)) => found,
            };
            self.health.well(self.kind);
            let mut at = version;
            let mut failed = 0;
            loop {
                let since = Instant::now();
                match self.watch(path, at.clone(), &mut names, &mut held).await {
                    Err(Deserted) => return,
                    Ok(Ok(Ended::Stale)) => break,
                    Ok(Ok(Ended::At(version))) => {
                        // Cut as soon as it began is no way to go on.
                        let progress = version != at || since.elapsed() > self.settings.backoff;
                        at = version;
                        if progress {
                            (failures, failed) = (0, 0);
                        } else {
                            self.back_off(&mut failures, None).await;
                        }
                    }
                    Ok(Err((version, error))) => {
                        if version != at {
                            failed = 0;
                        }
                        at = version;
                        self.health.trouble(self.kind, &error);
                        failed += 1;
                        self.back_off(&mut failures, error.retry_after()).await;
                        if failed >= FAILURES {
                            break;
                        }
                    }
                }
            }
            self.back_off(&mut failures, None).await;
        }
    }

    /// A whole list, under the first of its paths that the API server knows.
    async fn list(
        &self,
        names: &mut Names,
        held: &mut HashSet<Key>,
    ) -> Result<Result<(&'static str, String), WireError>, Deserted> {
        let mut absent = WireError::Absent;
        for path in self.kind.paths() {
            match self.pages(path, names).await {
                Err(WireError::Absent) => absent = WireError::Absent,
                Err(error) => return Ok(Err(error)),
                Ok((items, version)) => {
                    *held = items.iter().filter(|_| self.kind.may_be_absent()).map(|item| item.key.clone()).collect();
                    self.send(Change::Replace { items, version: version.parse().ok() }).await?;
                    return Ok(Ok((path, version)));
                }
            }
        }
        Ok(Err(absent))
    }

    async fn pages(&self, path: &str, names: &mut Names) -> Result<(Vec<Item<T>>, String), WireError> {
        let (mut items, mut version, mut next, mut failures) = (Vec::new(), String::new(), None::<String>, 0);
        loop {
            let page = match self.api.page::<W>(self.kind, path, self.settings.page, next.as_deref()).await {
                // To begin anew for one page would be the most work for an API server that has too much of it.
                Err(error) if next.is_some() && error.is_passing() && failures + 1 < PAGE_FAILURES => {
                    self.health.trouble(self.kind, &error);
                    self.back_off(&mut failures, error.retry_after()).await;
                    continue;
                }
                page => page?,
            };
            failures = 0;
            // All pages are of one moment; events after it come by the watch.
            if version.is_empty() {
                version = page.version;
            }
            items.extend(page.items.into_iter().filter_map(|wire| (self.trim)(self.kind, wire, names)));
            match page.next {
                None => return Ok((items, version)),
                more if more == next => return Err(WireError::Cut("a list does not come to its end".to_owned())),
                more => next = more,
            }
        }
    }

    /// One watch to its end; an error comes with the version that was reached.
    async fn watch(
        &self,
        path: &str,
        mut at: String,
        names: &mut Names,
        held: &mut HashSet<Key>,
    ) -> Result<Result<Ended, (String, WireError)>, Deserted> {
        let mut watch = match self.api.watch(self.kind, path, &at, jittered(self.settings.watch)).await {
            Err(WireError::Gone) => return Ok(Ok(Ended::Stale)),
            // Whether it is gone altogether or has another version, a list tells.
            Err(WireError::Absent) if self.kind.may_be_absent() => return Ok(Ok(Ended::Stale)),
            Err(error) => return Ok(Err((at, error))),
            Ok(watch) => watch,
        };
        let mut told = false;
        loop {
            let next = watch.next::<W>(self.settings.silence);
            let next = match told {
                true => next.await,
                // A watch that is not ended at once is one, also where nothing happens.
                false => match timeout(self.settings.backoff, next).await {
                    Ok(next) => next,
                    Err(_) => {
                        told = true;
                        self.health.well(self.kind);
                        continue;
                    }
                },
            };
            let event = match next {
                Err(error) => return Ok(Err((at, error))),
                Ok(None) => return Ok(Ok(Ended::At(at))),
                Ok(Some(event)) => event,
            };
            let (item, deleted) = match event {
                Event::Error(status) => match WireError::from(status) {
                    WireError::Gone => return Ok(Ok(Ended::Stale)),
                    error => return Ok(Err((at, error))),
                },
                Event::Bookmark(bookmark) => {
                    let version = bookmark.metadata.resource_version;
                    if let Ok(reached) = version.parse() {
                        self.send(Change::Reached(reached)).await?;
                    }
                    at = version;
                    (None, false)
                }
                Event::Added(wire) | Event::Modified(wire) => ((self.trim)(self.kind, wire, names), false),
                Event::Deleted(wire) => ((self.trim)(self.kind, wire, names), true),
            };
            if !told {
                told = true;
                self.health.well(self.kind);
            }
            let Some(item) = item else { continue };
            if let Some(version) = item.version {
                at = version.to_string();
            }
            if self.kind.may_be_absent() {
                match deleted {
                    true => held.remove(&item.key),
                    false => held.insert(item.key.clone()),
                };
            }
            self.send(match deleted {
                true => Change::Delete { key: item.key, uid: item.uid, version: item.version },
                false => Change::Apply(item),
            })
            .await?;
        }
    }

    async fn send(&self, change: Change<T>) -> Result<(), Deserted> {
        self.updates.send((self.wrap)(self.kind, change)).await.map_err(|_| Deserted)
    }

    async fn back_off(&self, failures: &mut u32, asked: Option<Duration>) {
        let wait = pause(&self.settings, *failures, asked);
        *failures = failures.saturating_add(1);
        sleep(wait).await;
    }
}

/// As long as was asked for at least, and up to half as long again: those that were sent away at one moment shall not come back at one.
fn pause(settings: &Settings, failures: u32, asked: Option<Duration>) -> Duration {
    let own = settings.backoff.saturating_mul(1 << failures.min(16)).min(settings.longest_backoff);
    let asked = asked.unwrap_or_default().min(LONGEST_ASKED);
    jittered(own).max(asked + asked.mul_f64(rand::random_range(0.0..0.5)))
}

/// Between half of it and all of it.
fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(rand::random_range(0.5..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_grows_to_its_longest_and_is_never_shorter_than_was_asked_for() {
        let settings = Settings::default();
        let seconds = Duration::from_secs;
        for _ in 0..100 {
            for (failures, most) in [(0, 0.5), (1, 1.0), (3, 4.0), (6, 30.0), (u32::MAX, 30.0)] {
                let wait = pause(&settings, failures, None).as_secs_f64();
                assert!((most / 2.0..=most).contains(&wait), "{failures}: {wait}");
            }
            let asked = pause(&settings, 0, Some(seconds(7)));
            assert!((seconds(7)..seconds(11)).contains(&asked), "{asked:?}");
            assert!(pause(&settings, 9, Some(seconds(1))) >= seconds(15), "its own counts if it is longer");
            let long = pause(&settings, 0, Some(seconds(u64::MAX)));
            assert!((seconds(60)..=seconds(90)).contains(&long), "{long:?}");
        }
    }
}
