//! What is kept of the API server's objects: the fields that decide something, and nothing else. A pod of 10 kB stays with some hundred bytes,
//! because what is not named here is skipped while the answer is read.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value as Json;

use super::probes::{self, WireContainer};
use crate::{
    config::{Object, ObjectKind},
    policy::Labels,
};

/// Namespace and name; the namespace is empty where objects have none.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Key {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

/// One object, and which of its versions it is.
#[derive(Clone, PartialEq, Debug)]
pub struct Item<T> {
    pub key: Key,
    /// One of the same name that was made anew has another.
    pub uid: Box<str>,
    /// Orders the versions of all objects of a kind. `None` if the API server's are no numbers.
    pub version: Option<u64>,
    pub object: T,
}

/// What every object has, as it is on the wire.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    name: String,
    namespace: String,
    uid: String,
    resource_version: String,
    labels: Option<BTreeMap<String, String>>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
}

/// An object of which a part is kept.
pub trait Trimmed: Sized + Send + 'static {
    type Wire: DeserializeOwned + Send;
    /// Nothing is kept of what has no name.
    fn trim(wire: Self::Wire, names: &mut Names) -> Option<Item<Self>>;
}

/// What many objects have in common: namespaces, service accounts, nodes, and lists of ports.
#[derive(Default)]
pub struct Names {
    texts: HashSet<Arc<str>>,
    ports: HashSet<Arc<[u16]>>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace {
    pub labels: Labels,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    pub labels: Labels,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    pub labels: Labels,
    /// Empty until it is scheduled.
    pub node: Arc<str>,
    pub account: Arc<str>,
    pub host_network: bool,
    /// It has run to its end: its addresses may be another's by now.
    pub ended: bool,
    pub deleting: bool,
    /// In seconds, as it is written; of two pods with one address the younger has it.
    pub created: Box<str>,
    pub addresses: Box<[IpAddr]>,
    /// That its kubelet connects to.
    pub probed: Arc<[u16]>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Of a headless one there are none.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Only endpoints on the client's own node count.
    pub local_only: bool,
    /// A name for DNS, and nothing that connections go through.
    pub external: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// The name by which slices say where it leads.
    pub name: Box<str>,
    pub number: u16,
}

/// An EndpointSlice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    /// The service's name.
    pub service: Arc<str>,
    pub endpoints: Box<[Endpoint]>,
    /// By name.
    pub ports: Box<[(Box<str>, u16)]>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    pub address: IpAddr,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub ready: bool,
    /// Going away, and still taking connections: the last resort.
    pub serving: bool,
}

/// A resource of Istio's, with the kind that it was asked for by.
#[derive(Deserialize)]
#[serde(transparent)]
pub struct Raw(Json);

impl Names {
    pub fn shared(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let shared: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&shared));
        shared
    }

    pub fn shared_ports(&mut self, ports: &[u16]) -> Arc<[u16]> {
        if let Some(known) = self.ports.get(ports) {
            return Arc::clone(known);
        }
        let shared: Arc<[u16]> = ports.into();
        self.ports.insert(Arc::clone(&shared));
        shared
    }
}

impl Metadata {
    fn item<T>(&self, names: &mut Names, object: T) -> Option<Item<T>> {
        let key = Key { namespace: names.shared(&self.namespace), name: self.name.as_str().into() };
        let version = self.resource_version.parse().ok();
        (!self.name.is_empty()).then(|| Item { key, uid: self.uid.as_str().into(), version, object })
    }

    fn labels(&mut self) -> Labels {
        self.labels.take().unwrap_or_default().into_iter().collect()
    }
}

/// Namespaces and nodes are asked for by their metadata alone.
#[derive(Deserialize)]
pub struct MetadataOnly {
    metadata: Metadata,
}

impl Trimmed for Namespace {
    type Wire = MetadataOnly;
    fn trim(mut wire: MetadataOnly, names: &mut Names) -> Option<Item<Self>> {
        let labels = wire.metadata.labels();
        wire.metadata.item(names, Self { labels })
    }
}

impl Trimmed for Node {
    type Wire = MetadataOnly;
    fn trim(mut wire: MetadataOnly, names: &mut Names) -> Option<Item<Self>> {
        let labels = wire.metadata.labels();
        wire.metadata.item(names, Self { labels })
    }
}

#[derive(Deserialize)]
pub struct WirePod {
    metadata: Metadata,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<WireContainer>>,
    init_containers: Option<Vec<WireContainer>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Deserialize)]
struct PodIp {
    #[serde(default)]
    ip: String,
}

impl Trimmed for Pod {
    type Wire = WirePod;
    fn trim(mut wire: WirePod, names: &mut Names) -> Option<Item<Self>> {
        let (spec, status) = (&wire.spec, &wire.status);
        let several = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
        let mut addresses: Vec<IpAddr> =
            status.pod_ip.as_deref().into_iter().chain(several).filter_map(address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        let account = spec.service_account_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("default");
        let pod = Self {
            labels: wire.metadata.labels.take().unwrap_or_default().into_iter().collect(),
            node: names.shared(spec.node_name.as_deref().unwrap_or_default()),
            account: names.shared(account),
            host_network: spec.host_network == Some(true),
            ended: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            deleting: wire.metadata.deletion_timestamp.is_some(),
            created: wire.metadata.creation_timestamp.take().unwrap_or_default().into(),
            addresses: addresses.into(),
            probed: probes::ports(
                spec.containers.as_deref().unwrap_or_default(),
                spec.init_containers.as_deref().unwrap_or_default(),
                names,
            ),
        };
        wire.metadata.item(names, pod)
    }
}

#[derive(Deserialize)]
pub struct WireService {
    metadata: Metadata,
    #[serde(default)]
    spec: ServiceSpec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    ports: Option<Vec<WirePort>>,
    internal_traffic_policy: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WirePort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<i64>,
}

impl WirePort {
    /// Name and number of one for TCP.
    fn tcp(&self) -> Option<(Box<str>, u16)> {
        let tcp = self.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let number = u16::try_from(self.port?).ok().filter(|number| *number != 0 && tcp)?;
        Some((self.name.as_deref().unwrap_or_default().into(), number))
    }
}

impl Trimmed for Service {
    type Wire = WireService;
    fn trim(wire: WireService, names: &mut Names) -> Option<Item<Self>> {
        let spec = &wire.spec;
        let all = spec.cluster_ip.iter().chain(spec.cluster_ips.iter().flatten());
        let mut addresses: Vec<IpAddr> = all.filter_map(|text| address(text)).collect();
        addresses.sort_unstable();
        addresses.dedup();
        let ports = spec.ports.iter().flatten().filter_map(WirePort::tcp);
        let service = Self {
            addresses,
            ports: ports.map(|(name, number)| ServicePort { name, number }).collect(),
            local_only: spec.internal_traffic_policy.as_deref() == Some("Local"),
            external: spec.r#type.as_deref() == Some("ExternalName"),
        };
        wire.metadata.item(names, service)
    }
}

#[derive(Deserialize)]
pub struct WireSlice {
    metadata: Metadata,
    endpoints: Option<Vec<WireEndpoint>>,
    ports: Option<Vec<WirePort>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireEndpoint {
    addresses: Vec<String>,
    conditions: Conditions,
    node_name: Option<String>,
    zone: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
}

impl Trimmed for Slice {
    type Wire = WireSlice;
    fn trim(mut wire: WireSlice, names: &mut Names) -> Option<Item<Self>> {
        let labels = wire.metadata.labels.take().unwrap_or_default();
        let service = labels.get("kubernetes.io/service-name").map(String::as_str).unwrap_or_default();
        let service = names.shared(service);
        let endpoint = |endpoint: &WireEndpoint| {
            // What is not said is ready, and what is ready serves.
            let ready = endpoint.conditions.ready.unwrap_or(true);
            Some(Endpoint {
                // The first alone counts, as it does for kube-proxy.
                address: endpoint.addresses.first().and_then(|text| address(text))?,
                node: endpoint.node_name.as_deref().map(|name| names.shared(name)),
                zone: endpoint.zone.as_deref().map(|name| names.shared(name)),
                ready,
                serving: endpoint.conditions.serving.unwrap_or(ready),
            })
        };
        let endpoints = wire.endpoints.iter().flatten().filter_map(endpoint).collect();
        let ports = wire.ports.iter().flatten().filter_map(WirePort::tcp).collect();
        wire.metadata.item(names, Self { service, endpoints, ports })
    }
}

/// Reads one of Istio's resources. An object whose metadata is not one is nobody's.
pub fn istio(kind: ObjectKind, raw: Raw, names: &mut Names) -> Option<Item<Object>> {
    let metadata = raw.0.get("metadata").and_then(|json| Metadata::deserialize(json).ok())?;
    let object = Object::read(kind, &metadata.namespace, &metadata.name, &raw.0);
    metadata.item(names, object)
}

/// One that a workload or service can have.
fn address(text: &str) -> Option<IpAddr> {
    let address = text.parse::<IpAddr>().ok()?.to_canonical();
    (!address.is_unspecified() && !address.is_loopback() && !address.is_multicast()).then_some(address)
}
