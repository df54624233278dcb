//! Keeps the kernel programs at the kubelet's cgroup, which is made anew whenever the kubelet is started. Without it none of the kubelet's
//! probes is let in, and the agent says so.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::task::spawn_blocking;

use crate::{
    bpf::{BpfError, Capture},
    config::AgentConfig,
    words::with_causes,
};

const LOOK: Duration = Duration::from_secs(2);

/// The cgroup, or why there is none, as it was found last. A clone is another handle on the same.
#[derive(Clone)]
pub(super) struct Kubelet(Arc<Shared>);

struct Shared {
    capture: Capture,
    place: Option<PathBuf>,
    found: Mutex<Result<PathBuf, String>>,
}

impl Kubelet {
    /// `None` where there is no Kubernetes; then nothing is left of what an agent before this one has let in.
    pub(super) fn find(agent: &AgentConfig, capture: &Capture) -> Result<Option<Self>, BpfError> {
        let Some(kubernetes) = &agent.kubernetes else { return capture.forget_kubelet().map(|()| None) };
        let place = kubernetes.kubelet_cgroup.clone();
        let shared =
            Shared { capture: capture.clone(), place, found: Mutex::new(Err("not looked for yet".to_owned())) };
        shared.look();
        Ok(Some(Self(Arc::new(shared))))
    }

    pub(super) fn found(&self) -> Result<PathBuf, String> {
        self.0.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) async fn run(self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let shared = self.0.clone();
            if let Err(error) = spawn_blocking(move || shared.look()).await {
                tracing::error!(%error, "looking for the kubelet's cgroup has failed");
            }
        }
    }
}

impl Shared {
    fn look(&self) {
        let now = self.capture.follow_kubelet(self.place.as_deref()).map_err(|fault| with_causes(&fault));
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if *found != now {
            match &now {
                Ok(cgroup) => {
                    tracing::info!(cgroup = %cgroup.display(), "the kubelet's probes are known by its cgroup")
                }
                Err(why) => tracing::warn!("the kubelet's probes are not let in where plaintext is refused: {why}"),
            }
            *found = now;
        }
    }
}
