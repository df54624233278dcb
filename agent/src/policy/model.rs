//! What policy talks about: workloads and mTLS modes. Plain data, made by `control`, held by `state`.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use serde::Serialize;

use crate::identity::SpiffeId;

/// One workload (a pod, usually), local or on another node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Workload {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub id: SpiffeId,
    /// In canonical form: an IPv4 address is never written as an IPv4-mapped IPv6 address.
    pub addresses: Vec<IpAddr>,
    /// Whether its connections are meant to be mTLS: false when it is labelled out of the mesh.
    pub in_mesh: bool,
    pub labels: Labels,
    /// `NAME.NAMESPACE.svc.cluster.local`: the host part of the SNI that Istio's peers expect.
    pub host: String,
}

/// Labels in the order of their keys: of a workload, or those that a selector asks for. A clone is another handle on the same ones,
/// and a hundred thousand workloads are worth the smaller form.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Labels(Arc<[(Box<str>, Box<str>)]>);

impl Labels {
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(known, _)| (**known).cmp(key)).ok()?;
        self.0.get(at).map(|(_, value)| &**value)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all labels of `selector` are among these. A selector without labels selects everything.
    pub fn satisfy(&self, selector: &Self) -> bool {
        selector.iter().all(|(key, value)| self.get(key) == Some(value))
    }
}

impl<K: Into<Box<str>>, V: Into<Box<str>>> FromIterator<(K, V)> for Labels {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(labels: I) -> Self {
        let sorted: BTreeMap<_, _> = labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        Self(sorted.into_iter().collect())
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Labels {
    fn from(labels: [(&str, &str); N]) -> Self {
        labels.into_iter().collect()
    }
}

impl Workload {
    /// The host name of a workload or service in the cluster's domain.
    pub fn host_of(name: &str, namespace: &str) -> String {
        format!("{name}.{namespace}.svc.cluster.local")
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Istio's mTLS modes. PERMISSIVE is what Istio does when nothing is said.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    Strict,
    #[default]
    Permissive,
    Disable,
}

impl fmt::Display for MtlsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "STRICT",
            Self::Permissive => "PERMISSIVE",
            Self::Disable => "DISABLE",
        })
    }
}
