//! What policy talks about: workloads and mTLS modes. Plain data, made by `control`, held by `state`.

use std::{collections::BTreeMap, fmt, net::IpAddr};

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
    pub labels: BTreeMap<String, String>,
    /// `NAME.NAMESPACE.svc.cluster.local`: the host part of the SNI that Istio's peers expect.
    pub host: String,
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
