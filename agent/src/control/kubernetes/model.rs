//! What the API server has told so far, kind by kind. Pure: changes in, the cluster as it is out. What it means for the mesh is
//! `compile`'s to say; nothing is said before every kind was listed once.

use std::sync::Arc;

use super::{
    objects::{Namespace, Node, Pod, Service, Slice},
    store::{Change, Store},
};
use crate::{
    config::{Object, ObjectKind},
    policy::{Policies, Workload},
};

/// What is listed and watched.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    Namespaces,
    Pods,
    Services,
    EndpointSlices,
    /// Only this agent's own.
    Nodes,
    Istio(ObjectKind),
}

/// A change of one kind.
pub enum Update {
    Namespaces(Change<Namespace>),
    Pods(Change<Pod>),
    Services(Change<Service>),
    EndpointSlices(Change<Slice>),
    Nodes(Change<Node>),
    Istio(ObjectKind, Change<Object>),
}

/// The cluster, as far as it is known.
#[derive(Default)]
pub struct Model {
    pub(super) namespaces: Store<Namespace>,
    pub(super) pods: Store<Pod, Option<Arc<Workload>>>,
    pub(super) services: Store<Service>,
    pub(super) slices: Store<Slice>,
    pub(super) nodes: Store<Node>,
    /// In the order of `ObjectKind::ALL`.
    pub(super) objects: [Store<Object>; ObjectKind::ALL.len()],
    /// Compiled, for as long as no policy changes.
    pub(super) policies: Option<Arc<Policies>>,
}

impl Kind {
    pub fn all() -> impl Iterator<Item = Self> {
        let core = [Self::Namespaces, Self::Pods, Self::Services, Self::EndpointSlices, Self::Nodes];
        core.into_iter().chain(ObjectKind::ALL.into_iter().map(Self::Istio))
    }
}

impl Model {
    /// Tells whether anything is different now.
    pub fn apply(&mut self, update: Update) -> bool {
        match update {
            Update::Namespaces(change) => self.namespaces.apply(change),
            Update::Pods(change) => self.pods.apply(change),
            Update::Services(change) => self.services.apply(change),
            Update::EndpointSlices(change) => self.slices.apply(change),
            Update::Nodes(change) => self.nodes.apply(change),
            Update::Istio(kind, change) => {
                let store = self.objects.iter_mut().zip(ObjectKind::ALL).find(|(_, known)| *known == kind);
                let changed = store.is_some_and(|(store, _)| store.apply(change));
                if changed {
                    self.policies = None;
                }
                changed
            }
        }
    }

    /// Whether there was a complete list of everything: before that, nothing is known of what is forbidden.
    pub fn is_complete(&self) -> bool {
        self.missing().next().is_none()
    }

    /// What was not listed yet.
    pub fn missing(&self) -> impl Iterator<Item = Kind> {
        Kind::all().filter(|kind| !self.has(*kind))
    }

    fn has(&self, kind: Kind) -> bool {
        match kind {
            Kind::Namespaces => self.namespaces.is_complete(),
            Kind::Pods => self.pods.is_complete(),
            Kind::Services => self.services.is_complete(),
            Kind::EndpointSlices => self.slices.is_complete(),
            Kind::Nodes => self.nodes.is_complete(),
            Kind::Istio(kind) => {
                self.objects.iter().zip(ObjectKind::ALL).any(|(store, known)| known == kind && store.is_complete())
            }
        }
    }
}
