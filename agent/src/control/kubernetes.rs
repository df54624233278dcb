//! The API server as the source: what it tells of the cluster becomes the same snapshots that files give. `wire` asks, `follow` keeps up with
//! one kind, `store` and `model` hold what is known, `compile` says what it means, `health` how it goes.
//!
//! There is no snapshot before all kinds were listed once, and none is made of half a list.

mod compile;
mod follow;
mod health;
mod model;
mod objects;
mod places;
mod probes;
mod roster;
mod services;
mod store;
mod wire;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::de::IgnoredAny;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::{sleep_until, timeout, timeout_at},
};

pub use compile::{Facts, Viewpoint};
pub use follow::Settings;
pub use health::{Health, Report};
pub use model::{Kind, Model, Update};
pub use objects::{Item, Key};
pub use places::{Places, PodPlace};
pub use roster::{Listed, Member, Members, Membership, Roster};
pub use store::Change;
pub use wire::{Api, Asked, WireError};

use crate::{
    config::{KubernetesConfig, ObjectKind},
    identity::TrustDomains,
    state::State,
};
use follow::Follower;
use objects::{Namespace, Node, Pod, Raw, Service, Slice, Trimmed};

/// Longer than an API server under load takes.
const CONNECT: Duration = Duration::from_secs(10);
/// What may wait to be taken in; beyond it the watches wait.
const QUEUE: usize = 256;
/// Of the time that passes, at most one part in so many goes into making snapshots, however much changes.
const SHARE: u32 = 8;

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("which node this is is not said; set spec.kubernetes.nodeName, or NODE_NAME from the pod's spec.nodeName")]
    NoNode,
    #[error("there is no service account of a pod here; run in a pod, or set spec.kubernetes.kubeconfig")]
    NotInCluster(#[source] Box<kube::config::InClusterError>),
    #[error("spec.kubernetes.kubeconfig {path}")]
    Kubeconfig { path: String, source: Box<kube::config::KubeconfigError> },
    #[error("the API server cannot be talked to")]
    Client(#[source] Box<kube::Error>),
    #[error("{0} cannot be listed")]
    Kind(&'static str, #[source] WireError),
    #[error("the API server has not listed one object of each kind within {0:?}")]
    Slow(Duration),
}

/// All that the source needs to run.
pub struct Source {
    pub api: Api,
    pub viewpoint: Viewpoint,
    pub places: Places,
    pub roster: Roster,
    pub health: Health,
    pub settings: Settings,
}

impl Source {
    pub async fn open(config: &KubernetesConfig, domains: TrustDomains) -> Result<Self, SourceError> {
        let node = config.node_name.clone().or_else(|| std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()));
        let node: Arc<str> = node.ok_or(SourceError::NoNode)?.into();
        Ok(Self {
            api: Api::new(client(config).await?, Arc::clone(&node)),
            viewpoint: Viewpoint { domains, node },
            places: Places::default(),
            roster: Roster::default(),
            health: Health::default(),
            settings: Settings::default(),
        })
    }

    /// Whether what will be followed can be: one object of each kind is asked for.
    pub async fn rehearse(&self, patience: Duration) -> Result<(), SourceError> {
        let asking = async {
            for kind in Kind::all() {
                self.rehearse_kind(kind).await.map_err(|error| SourceError::Kind(kind.plural(), error))?;
            }
            Ok(())
        };
        timeout(patience, asking).await.unwrap_or(Err(SourceError::Slow(patience)))
    }

    async fn rehearse_kind(&self, kind: Kind) -> Result<(), WireError> {
        for path in kind.paths() {
            match self.api.page::<IgnoredAny>(kind, path, 1, None).await {
                Err(WireError::Absent) => {}
                answer => return answer.map(drop),
            }
        }
        if kind.may_be_absent() { Ok(()) } else { Err(WireError::Absent) }
    }

    /// Keeps `state` in step with the cluster until `shutdown` becomes true or its sender is gone.
    pub async fn run(self, state: State, mut shutdown: watch::Receiver<bool>) {
        let (sender, mut updates) = mpsc::channel(QUEUE);
        let mut followers = self.followers(&sender);
        drop(sender);
        let mut places = self.places.subscribe();
        let mut model = Model::default();
        loop {
            let mut changed = tokio::select! {
                update = updates.recv() => match update {
                    Some(update) => model.apply(update),
                    None => return,
                },
                _ = places.changed() => true,
                Some(ended) = followers.join_next() => {
                    tracing::error!(?ended, "a kind is not followed any more");
                    return;
                }
                _ = shutdown.wait_for(|stop| *stop) => return,
            };
            // What comes at the same time makes one snapshot.
            let until = tokio::time::Instant::now() + self.settings.quiet;
            while let Ok(Some(update)) = timeout_at(until, updates.recv()).await {
                changed |= model.apply(update);
            }
            self.health.waiting(model.missing());
            if !changed || !model.is_complete() {
                continue;
            }
            let began = Instant::now();
            let (viewpoint, places) = (self.viewpoint.clone(), self.places.clone());
            let told = places.changes();
            let made = spawn_blocking(move || {
                let (snapshot, facts) = compile::compile(&mut model, &viewpoint, &places);
                (model, snapshot, facts)
            });
            let Ok((kept, snapshot, mut facts)) = made.await else { return };
            model = kept;
            let members = std::mem::take(&mut facts.members);
            self.health.facts(facts);
            let first = !*self.health.ready().borrow();
            if first || !state.load().describes_the_same_as(&snapshot) {
                let (workloads, local) = (snapshot.workloads().len(), snapshot.local.len());
                let generation = state.replace(snapshot);
                if first {
                    tracing::info!(generation, workloads, local, "the cluster is known");
                } else {
                    tracing::debug!(generation, workloads, local, "the cluster has changed");
                }
            }
            self.roster.set(members, told);
            self.health.set_ready();
            let rest = tokio::time::Instant::now() + began.elapsed() * SHARE;
            tokio::select! {
                () = sleep_until(rest) => {}
                _ = shutdown.wait_for(|stop| *stop) => return,
            }
        }
    }

    fn followers(&self, updates: &mpsc::Sender<Update>) -> JoinSet<()> {
        let mut followers = JoinSet::new();
        for kind in Kind::all() {
            match kind {
                Kind::Namespaces => {
                    self.follow::<Namespace>(&mut followers, updates, kind, |_, change| Update::Namespaces(change));
                }
                Kind::Pods => self.follow::<Pod>(&mut followers, updates, kind, |_, change| Update::Pods(change)),
                Kind::Services => {
                    self.follow::<Service>(&mut followers, updates, kind, |_, change| Update::Services(change));
                }
                Kind::EndpointSlices => {
                    self.follow::<Slice>(&mut followers, updates, kind, |_, change| Update::EndpointSlices(change));
                }
                Kind::Nodes => self.follow::<Node>(&mut followers, updates, kind, |_, change| Update::Nodes(change)),
                Kind::Istio(_) => {
                    let follower = Follower {
                        api: self.api.clone(),
                        kind,
                        settings: self.settings,
                        health: self.health.clone(),
                        updates: updates.clone(),
                        trim: |kind, raw: Raw, names| objects::istio(istio_kind(kind)?, raw, names),
                        wrap: |kind, change| {
                            Update::Istio(istio_kind(kind).unwrap_or(ObjectKind::AuthorizationPolicy), change)
                        },
                    };
                    followers.spawn(follower.run());
                }
            }
        }
        followers
    }

    fn follow<T: Trimmed>(
        &self,
        followers: &mut JoinSet<()>,
        updates: &mpsc::Sender<Update>,
        kind: Kind,
        wrap: fn(Kind, Change<T>) -> Update,
    ) {
        let follower = Follower {
            api: self.api.clone(),
            kind,
            settings: self.settings,
            health: self.health.clone(),
            updates: updates.clone(),
            trim: |_, wire, names| T::trim(wire, names),
            wrap,
        };
        followers.spawn(follower.run());
    }
}

fn istio_kind(kind: Kind) -> Option<ObjectKind> {
    if let Kind::Istio(kind) = kind { Some(kind) } else { None }
}

async fn client(settings: &KubernetesConfig) -> Result<Client, SourceError> {
    let mut config = match &settings.kubeconfig {
        None => Config::incluster().map_err(|error| SourceError::NotInCluster(Box::new(error)))?,
        Some(path) => {
            let wrong = |source| SourceError::Kubeconfig { path: path.display().to_string(), source: Box::new(source) };
            let read = Kubeconfig::read_from(path).map_err(wrong)?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.map_err(wrong)?
        }
    };
    config.connect_timeout = Some(CONNECT);
    // `follow` tries again, and says so.
    config.default_retry = false;
    Client::try_from(config).map_err(|error| SourceError::Client(Box::new(error)))
}
