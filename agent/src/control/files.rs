//! Follows the configuration directory: when a file changes the whole is read again, and swapped in as a whole if it
//! is sound. If it is not, the last good one stays. What a sound configuration is, `config` knows.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, task::spawn_blocking, time::sleep};

use super::watched::WatchedDirectory;
use crate::{
    config::{self, AgentConfig, ConfigErrors, Finding, Loaded},
    state::State,
};

/// Told of each reload, for the metrics and for those who ask how it went.
pub trait ReloadObserver: Send + Sync {
    /// `restart` names the fields of the agent's own settings that have changed and wait for a restart.
    fn accepted(&self, generation: u64, warnings: &[Finding], restart: &[&'static str]);
    fn rejected(&self, errors: &ConfigErrors);
}

/// How quick to react, and how often to look without being told.
#[derive(Clone, Copy, Debug)]
pub struct WatchSettings {
    /// Wait until the directory was quiet for so long: editors and `cp` change files in several steps.
    pub quiet: Duration,
    /// For file systems that tell nothing, links that point elsewhere, and a directory that was replaced.
    pub poll: Duration,
}

impl Default for WatchSettings {
    fn default() -> Self {
        Self { quiet: Duration::from_millis(200), poll: Duration::from_secs(10) }
    }
}

/// Keeps `state` in step with the files in `dir` until `shutdown` becomes true or its sender is gone. `running` is the
/// configuration that the agent was started with: changes of it are announced, not made.
pub async fn watch(
    dir: PathBuf,
    running: AgentConfig,
    state: State,
    observer: Arc<dyn ReloadObserver>,
    settings: WatchSettings,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut follower = Follower { dir: dir.clone(), running, state, observer, seen: None, announced: Vec::new() };
    let mut directory = WatchedDirectory::new(dir);
    loop {
        // Before reading: what changes from here on is an event for the next round.
        directory.renew();
        follower.follow(settings.quiet).await;
        tokio::select! {
            () = directory.changed() => {}
            () = sleep(settings.poll) => continue,
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        // More events put the reading off, but not for ever.
        for _ in 0..10 {
            tokio::select! {
                () = directory.changed() => {}
                () = sleep(settings.quiet) => break,
            }
        }
    }
}

/// Logs a configuration's warnings, at the start.
pub fn log_warnings(warnings: &[Finding]) {
    for warning in warnings {
        tracing::warn!("configuration: {warning}");
    }
}

/// What was read last, and what became of it.
struct Follower {
    dir: PathBuf,
    running: AgentConfig,
    state: State,
    observer: Arc<dyn ReloadObserver>,
    /// The contents that were accepted or rejected last.
    seen: Option<u64>,
    /// The fields of the agent's own settings that were announced to need a restart.
    announced: Vec<&'static str>,
}

impl Follower {
    /// Reads the directory if it holds something else than the last time.
    async fn follow(&mut self, quiet: Duration) {
        // A file that changes while we read it would give half of the old and half of the new.
        for _ in 0..10 {
            let before = self.fingerprint().await;
            if self.seen.is_some() && before == self.seen {
                return;
            }
            let (dir, running) = (self.dir.clone(), self.running.clone());
            let Ok(result) = spawn_blocking(move || config::reload(&dir, &running)).await else { return };
            if self.fingerprint().await == before {
                self.seen = before;
                match result {
                    Ok(loaded) => self.accept(loaded),
                    Err(errors) => self.reject(&errors),
                }
                return;
            }
            sleep(quiet).await;
        }
        tracing::warn!(directory = %self.dir.display(), "the configuration keeps changing while it is read, so it is not read yet");
    }

    fn accept(&mut self, loaded: Loaded) {
        log_warnings(&loaded.warnings);
        let changed = self.running.changed_fields(&loaded.agent);
        if changed != self.announced {
            if !changed.is_empty() {
                tracing::warn!(fields = changed.join(", "), "the agent's own settings changed: that needs a restart");
            }
            self.announced = changed;
        }
        let current = self.state.load();
        // With an API server as the source the files hold the agent's own settings and nothing else.
        if self.running.kubernetes.is_some() {
            self.observer.accepted(current.generation, &loaded.warnings, &self.announced);
            return;
        }
        if current.describes_the_same_as(&loaded.snapshot) {
            self.observer.accepted(current.generation, &loaded.warnings, &self.announced);
            return;
        }
        let (workloads, local) = (loaded.snapshot.workloads().len(), loaded.snapshot.local.len());
        let mode = loaded.snapshot.policies.authentication.mesh_mode();
        let generation = self.state.replace(loaded.snapshot);
        tracing::info!(generation, workloads, local, %mode, "configuration accepted");
        self.observer.accepted(generation, &loaded.warnings, &self.announced);
    }

    fn reject(&self, errors: &ConfigErrors) {
        let generation = self.state.load().generation;
        for error in &errors.errors {
            tracing::error!("configuration: {error}");
        }
        tracing::error!(
            errors = errors.errors.len(),
            generation,
            directory = %self.dir.display(),
            "configuration rejected: the last good one stays in force"
        );
        self.observer.rejected(errors);
    }

    /// None if the directory cannot be read: that is worth a try each time, until it can.
    async fn fingerprint(&self) -> Option<u64> {
        let dir = self.dir.clone();
        spawn_blocking(move || fingerprint(&dir).ok()).await.ok().flatten()
    }
}

fn fingerprint(dir: &Path) -> std::io::Result<u64> {
    let mut hasher = DefaultHasher::new();
    for file in config::configuration_files(dir)? {
        file.hash(&mut hasher);
        // A file that cannot be read is a configuration error, and so part of what was seen.
        match config::read_file(&file) {
            Ok(bytes) => bytes.hash(&mut hasher),
            Err(error) => error.kind().hash(&mut hasher),
        }
    }
    Ok(hasher.finish())
}
