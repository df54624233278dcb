//! Follows the configuration directory: when a file changes the whole is read again, and swapped in as a whole if it
//! is sound. If it is not, the last good one stays. What a sound configuration is, `config` knows.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::follow::{Sources, follow};
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
    shutdown: watch::Receiver<bool>,
) {
    let sources = Sources::directory(dir.clone(), config::configuration_files);
    let read = {
        let (dir, running) = (dir.clone(), running.clone());
        Arc::new(move || config::reload(&dir, &running))
    };
    let unread = {
        let dir = dir.clone();
        move |why| ConfigErrors::about(&dir, why)
    };
    let mut follower = Follower { dir, running, state, observer, announced: Vec::new() };
    let took = move |read| match read {
        Ok(loaded) => follower.accept(loaded),
        Err(errors) => follower.reject(&errors),
    };
    follow(sources, read, unread, took, settings, shutdown).await;
}

/// Logs a configuration's warnings, at the start.
pub fn log_warnings(warnings: &[Finding]) {
    for warning in warnings {
        tracing::warn!("configuration: {warning}");
    }
}

/// What becomes of what was read.
struct Follower {
    dir: PathBuf,
    running: AgentConfig,
    state: State,
    observer: Arc<dyn ReloadObserver>,
    /// The fields of the agent's own settings that were announced to need a restart.
    announced: Vec<&'static str>,
}

impl Follower {
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
}
