//! One directory that is watched for changes, whatever its path leads to by now. What changed, and whether that matters, is its
//! reader's to find out.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf, sync::Arc};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::sync::Notify;

/// The kernel's notifications about one directory, as long as it is the one behind the path.
pub(super) struct WatchedDirectory {
    path: PathBuf,
    events: Arc<Notify>,
    watcher: Option<(RecommendedWatcher, (u64, u64))>,
    complained: bool,
}

impl WatchedDirectory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, events: Arc::new(Notify::new()), watcher: None, complained: false }
    }

    pub(super) async fn changed(&self) {
        self.events.notified().await;
    }

    /// Begins to watch, again if the path leads to another directory now.
    pub(super) fn renew(&mut self) {
        let identity = fs::metadata(&self.path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        if self.watcher.is_some() && self.watcher.as_ref().map(|(_, watched)| *watched) == identity {
            return;
        }
        self.watcher = None;
        let Some(identity) = identity else { return };
        match self.watcher() {
            Ok(watcher) => {
                self.watcher = Some((watcher, identity));
                self.complained = false;
            }
            Err(error) if !self.complained => {
                self.complained = true;
                tracing::warn!(directory = %self.path.display(), "changes are noticed late, by looking: {error}");
            }
            Err(_) => {}
        }
    }

    fn watcher(&self) -> notify::Result<RecommendedWatcher> {
        let events = Arc::clone(&self.events);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading opens files too: only what may have changed one counts. An error may be a lost event.
            let read_only = matches!(&event, Ok(event) if matches!(event.kind,
                EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write)));
            if !read_only {
                events.notify_one();
            }
        })?;
        watcher.watch(&self.path, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}
