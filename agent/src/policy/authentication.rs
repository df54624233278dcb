//! PeerAuthentication: which mTLS mode a workload's port has, and which resource says so.
//!
//! The rules are Istio's: istio/istio pilot/pkg/security/authn/policy_applier.go (`ComposePeerAuthentication`) and
//! pilot/pkg/model/authentication.go (`addPeerAuthentication`).

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::{
    MtlsMode, Workload,
    select::{Header, Index, PolicyName, ROOT_NAMESPACE, Selective},
};

/// A PeerAuthentication as it was written. No mode is UNSET: inherited.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAuthentication {
    pub header: Header,
    pub mode: Option<MtlsMode>,
    pub ports: BTreeMap<u16, Option<MtlsMode>>,
}

impl PeerAuthentication {
    /// In the root namespace a selector makes a PeerAuthentication void: "PeerAuthentication policies with workload
    /// selectors are ignored when deployed in the root namespace" (istio/api security/v1beta1/peer_authentication.proto;
    /// the test "ignore non-emptypb selector in root namespace" of istio/istio policy_applier_test.go holds it).
    pub fn is_void(&self) -> bool {
        self.header.is_of_mesh() && !self.header.selector.is_empty()
    }
}

/// What a mode came from, the narrowest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Port,
    Workload,
    Namespace,
    Mesh,
}

/// One step on the way to a mode.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Step<'a> {
    pub level: Level,
    pub policy: &'a PolicyName,
    /// None where it is UNSET and the next step decides.
    pub mode: Option<MtlsMode>,
}

/// All PeerAuthentications, ready to be asked.
#[derive(PartialEq, Default, Debug)]
pub struct Authentication {
    mesh: Option<PeerAuthentication>,
    namespaces: HashMap<String, PeerAuthentication>,
    workloads: Index<PeerAuthentication>,
    superseded: Vec<(PolicyName, PolicyName)>,
}

impl Selective for PeerAuthentication {
    fn header(&self) -> &Header {
        &self.header
    }
}

impl Authentication {
    pub fn compile(mut policies: Vec<PeerAuthentication>) -> Self {
        policies.sort_by(|a, b| a.header.by_age(&b.header));
        let mut compiled = Self::default();
        let mut workloads = Vec::new();
        for policy in policies.into_iter().filter(|policy| !policy.is_void()) {
            if !policy.header.selector.is_empty() {
                workloads.push(policy);
                continue;
            }
            let namespace = policy.header.name.namespace.clone();
            let first = match namespace == ROOT_NAMESPACE {
                true => compiled.mesh.as_ref(),
                false => compiled.namespaces.get(&namespace),
            };
            if let Some(first) = first {
                compiled.superseded.push((policy.header.name, first.header.name.clone()));
            } else if namespace == ROOT_NAMESPACE {
                compiled.mesh = Some(policy);
            } else {
                compiled.namespaces.insert(namespace, policy);
            }
        }
        compiled.workloads = Index::new(workloads);
        compiled
    }

    /// All that have an effect.
    pub fn written(&self) -> impl Iterator<Item = &PeerAuthentication> {
        self.mesh.iter().chain(self.namespaces.values()).chain(self.workloads.iter())
    }

    /// The name of the one that selects a workload by its labels.
    pub fn selecting(&self, workload: &Workload) -> Option<&PolicyName> {
        self.of_workload(workload).map(|policy| &policy.header.name)
    }

    pub(super) fn len(&self) -> usize {
        usize::from(self.mesh.is_some()) + self.namespaces.len() + self.workloads.len()
    }

    /// The mode of a workload's port.
    pub fn mode(&self, workload: &Workload, port: u16) -> MtlsMode {
        let own = self.of_workload(workload);
        own.and_then(|policy| policy.ports.get(&port).copied().flatten())
            .or_else(|| own.and_then(|policy| policy.mode))
            .or_else(|| self.namespaces.get(&workload.namespace).and_then(|policy| policy.mode))
            .or_else(|| self.mesh.as_ref().and_then(|policy| policy.mode))
            .unwrap_or_default()
    }

    /// The mode of the mesh, where nothing narrower speaks.
    pub fn mesh_mode(&self) -> MtlsMode {
        self.mesh.as_ref().and_then(|policy| policy.mode).unwrap_or_default()
    }

    /// Every resource with a say in the mode of a port, the narrowest first: the first that has a mode decides.
    pub fn steps(&self, workload: &Workload, port: u16) -> Vec<Step<'_>> {
        let own = self.of_workload(workload);
        let namespace = self.namespaces.get(&workload.namespace);
        let port_says = own.and_then(|policy| policy.ports.get(&port).map(|mode| (Level::Port, policy, *mode)));
        let others = [(Level::Workload, own), (Level::Namespace, namespace), (Level::Mesh, self.mesh.as_ref())];
        let others = others.into_iter().filter_map(|(level, policy)| policy.map(|policy| (level, policy, policy.mode)));
        port_says
            .into_iter()
            .chain(others)
            .map(|(level, policy, mode)| Step { level, policy: &policy.header.name, mode })
            .collect()
    }

    /// Those that an older one of the same namespace makes void, each with that one.
    pub fn superseded(&self) -> &[(PolicyName, PolicyName)] {
        &self.superseded
    }

    /// Of several that select a workload the oldest alone counts; their ports are not merged.
    fn of_workload(&self, workload: &Workload) -> Option<&PeerAuthentication> {
        // In the root namespace selectors are void and were left out.
        self.workloads.applying(workload).into_iter().next()
    }
}
