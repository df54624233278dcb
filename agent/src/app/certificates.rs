//! Puts together what keeps workloads' certificates and trust fresh, by where they come from: the embedded CA, a CA elsewhere, or a
//! SPIFFE Workload API.

use std::sync::Arc;

use tokio::{sync::watch, task::JoinSet};

use crate::{
    admin::AdminError,
    config::{AgentConfig, CaSource},
    control::{
        files::WatchSettings,
        trust::{self, Followed, LastRefusal, Origin},
    },
    identity::{
        IdentityError, LiveCa, Manager, ManagerSettings, TrustStore, remote::RemoteCa, trust::files::Supplied,
        workload_api::WorkloadApi,
    },
    metrics::Metrics,
};

pub(super) struct Certificates {
    pub(super) manager: Manager,
    origin: Origin,
}

impl Certificates {
    /// Reads what is here. What is elsewhere is asked later: an agent starts, with its pods closed, also when nobody answers.
    pub(super) fn open(agent: &AgentConfig) -> Result<Self, IdentityError> {
        let settings = ManagerSettings { leaf_lifetime: agent.ca.leaf_lifetime };
        Ok(match &agent.ca.source {
            CaSource::Embedded(dir) => {
                let (ca, trust) = trust::load(dir, &agent.trust)?;
                let ca = LiveCa::new(ca);
                let manager = Manager::new(ca.clone(), TrustStore::new(trust), settings);
                Self { manager, origin: Origin::Directory { dir: dir.clone(), ca } }
            }
            CaSource::Remote(remote, roots) => {
                let trust = TrustStore::new(trust::load_pinned(roots, &agent.trust)?);
                let manager = Manager::new(RemoteCa::new(remote, trust.clone())?, trust, settings);
                Self { manager, origin: Origin::Pinned(roots.clone()) }
            }
            CaSource::WorkloadApi(socket) => {
                let trust = TrustStore::new(agent.trust.assemble(Supplied::nothing())?);
                let api = WorkloadApi::new(socket, trust.clone());
                let manager = Manager::new(api.clone(), trust, settings);
                Self { manager, origin: Origin::Told(api) }
            }
        })
    }

    pub(super) fn run(
        self,
        servers: &mut JoinSet<Result<(), AdminError>>,
        agent: &AgentConfig,
        metrics: &Arc<Metrics>,
        refusal: LastRefusal,
        stopped: &watch::Receiver<bool>,
    ) {
        if let Origin::Told(api) = &self.origin {
            let (api, own, stopped) = (api.clone(), agent.trust_domain.clone(), stopped.clone());
            servers.spawn(async move {
                api.run(own, stopped).await;
                Ok(())
            });
        }
        let manager = self.manager.clone();
        let followed = Followed {
            origin: self.origin,
            files: agent.trust.clone(),
            identities: self.manager,
            metrics: metrics.clone(),
            refusal,
        };
        servers.spawn({
            let stopped = stopped.clone();
            async move {
                trust::watch(followed, WatchSettings::default(), stopped).await;
                Ok(())
            }
        });
        servers.spawn({
            let stopped = stopped.clone();
            async move {
                manager.run(stopped).await;
                Ok(())
            }
        });
    }
}
