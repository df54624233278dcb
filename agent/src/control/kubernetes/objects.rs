//! What is kept of the API server's objects: the fields that decide something, and nothing else. A pod of 10 kB stays with some hundred bytes,
//! because what is not named here is skipped while the answer is read.

use std::{
    collections::{BTreeMap, HashSet},
    hash::Hash,
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

/// So many of a sort are kept whether they are used or not.
const PRUNE_FROM: usize = 1024;

/// What many objects have in common: namespaces, service accounts, nodes and their addresses, and lists of ports.
#[derive(Default)]
pub struct Names {
    texts: Common<str>,
    addresses: Common<[IpAddr]>,
    ports: Common<[u16]>,
}

/// One of each that is in use.
struct Common<T: ?Sized> {
    known: HashSet<Arc<T>>,
    prune_at: usize,
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
    /// Its node's, as the kubelet tells them.
    pub host_addresses: Arc<[IpAddr]>,
    /// That its kubelet connects to.
    pub probed: Arc<[u16]>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Of a headless one there are none.
    pub addresses: Vec<IpAddr>,
    /// For clients outside, and led inside to where the others lead: external IPs, and those of load balancers that leave them as they are.
    pub outside: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Only endpoints on the client's own node count.
    pub local_only: bool,
    /// A name for DNS, and nothing that connections go through.
    pub external: bool,
    /// For so many seconds after a connection the client's next goes to the same endpoint.
    pub affinity: Option<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// The name by which slices say where it leads.
    pub name: Box<str>,
    pub number: u16,
    /// The same on every node.
    pub node_port: Option<u16>,
}

/// An EndpointSlice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    /// The service's name.
    pub service: Arc<str>,
    /// Without those that nothing is sent to.
    pub endpoints: Box<[Endpoint]>,
    /// By name.
    pub ports: Box<[(Box<str>, u16)]>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    pub address: IpAddr,
    pub node: Option<Arc<str>>,
    pub condition: Condition,
    /// Whether one of [`OWN_CONTROLLERS`] says that it is a pod's.
    pub of_pod: bool,
    /// For whom it is meant, where that is said.
    pub hints: Option<Box<Hints>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    Ready,
    /// Going away, and still taking connections: the last resort.
    Leaving,
}

/// The nodes and zones whose clients an endpoint is meant for.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Hints {
    pub nodes: Box<[Arc<str>]>,
    pub zones: Box<[Arc<str>]>,
}

/// A resource of Istio's, with the kind that it was asked for by.
#[derive(Deserialize)]
#[serde(transparent)]
pub struct Raw(Json);

impl Names {
    pub fn shared(&mut self, text: &str) -> Arc<str> {
        self.texts.shared(text)
    }

    pub fn shared_addresses(&mut self, addresses: &[IpAddr]) -> Arc<[IpAddr]> {
        self.addresses.shared(addresses)
    }

    pub fn shared_ports(&mut self, ports: &[u16]) -> Arc<[u16]> {
        self.ports.shared(ports)
    }

    /// How many texts, addresses and ports there are.
    #[cfg(test)]
    pub fn counts(&self) -> [usize; 3] {
        [self.texts.known.len(), self.addresses.known.len(), self.ports.known.len()]
    }
}

impl<T: ?Sized> Default for Common<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), prune_at: PRUNE_FROM }
    }
}

impl<T: ?Sized + Eq + Hash> Common<T>
where
    Arc<T>: for<'a> From<&'a T>,
{
    fn shared(&mut self, value: &T) -> Arc<T> {
        if let Some(known) = self.known.get(value) {
            return Arc::clone(known);
        }
        // Objects come and go, and each may bring one that nobody had.
        if self.known.len() >= self.prune_at {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.prune_at = (2 * self.known.len()).max(PRUNE_FROM);
        }
        let shared = Arc::from(value);
        self.known.insert(Arc::clone(&shared));
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
    #[serde(rename = "hostIP")]
    host_ip: Option<String>,
    #[serde(rename = "hostIPs")]
    host_ips: Option<Vec<PodIp>>,
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
        let all = |one: &Option<String>, several: &Option<Vec<PodIp>>| {
            let several = several.iter().flatten().map(|ip| ip.ip.as_str());
            let mut all: Vec<IpAddr> = one.as_deref().into_iter().chain(several).filter_map(address).collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        let addresses = all(&status.pod_ip, &status.pod_ips);
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
            host_addresses: names.shared_addresses(&all(&status.host_ip, &status.host_ips)),
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
    #[serde(default)]
    status: ServiceStatus,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceStatus {
    load_balancer: Option<LoadBalancer>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct LoadBalancer {
    ingress: Option<Vec<Ingress>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Ingress {
    ip: Option<String>,
    ip_mode: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    load_balancer_source_ranges: Option<Vec<String>>,
    ports: Option<Vec<WirePort>>,
    internal_traffic_policy: Option<String>,
    session_affinity: Option<String>,
    session_affinity_config: Option<AffinityConfig>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AffinityConfig {
    #[serde(rename = "clientIP")]
    client_ip: Option<ClientIp>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ClientIp {
    timeout_seconds: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WirePort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<i64>,
    node_port: Option<i64>,
}

impl WirePort {
    /// Name and number of one for TCP.
    fn tcp(&self) -> Option<(Box<str>, u16)> {
        let tcp = self.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let number = number(self.port).filter(|_| tcp)?;
        Some((self.name.as_deref().unwrap_or_default().into(), number))
    }

    fn of_service(&self) -> Option<ServicePort> {
        self.tcp().map(|(name, number)| ServicePort { name, number, node_port: self::number(self.node_port) })
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
        let service = Self {
            addresses,
            outside: outside(spec, &wire.status),
            ports: spec.ports.iter().flatten().filter_map(WirePort::of_service).collect(),
            local_only: spec.internal_traffic_policy.as_deref() == Some("Local"),
            external: spec.r#type.as_deref() == Some("ExternalName"),
            affinity: affinity(spec),
        };
        wire.metadata.item(names, service)
    }
}

/// Kubernetes' own: of a pod they name the addresses that its status has. Those of others may be in networks of their own.
const OWN_CONTROLLERS: [&str; 2] = ["endpointslice-controller.k8s.io", "endpointslicemirroring-controller.k8s.io"];

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
    target_ref: Option<Target>,
    hints: Option<WireHints>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Target {
    kind: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireHints {
    for_zones: Option<Vec<Named>>,
    for_nodes: Option<Vec<Named>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Named {
    name: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl Conditions {
    /// Nothing is sent to an endpoint without one.
    fn condition(&self) -> Option<Condition> {
        // What is not said is ready and serves.
        match (self.ready.unwrap_or(true), self.serving.unwrap_or(true), self.terminating.unwrap_or(false)) {
            (true, _, _) => Some(Condition::Ready),
            (false, true, true) => Some(Condition::Leaving),
            (false, _, _) => None,
        }
    }
}

impl Trimmed for Slice {
    type Wire = WireSlice;
    fn trim(mut wire: WireSlice, names: &mut Names) -> Option<Item<Self>> {
        let labels = wire.metadata.labels.take().unwrap_or_default();
        let service = labels.get("kubernetes.io/service-name").map(String::as_str).unwrap_or_default();
        let service = names.shared(service);
        let managed = labels.get("endpointslice.kubernetes.io/managed-by");
        let own = managed.is_some_and(|by| OWN_CONTROLLERS.contains(&by.as_str()));
        let endpoint = |endpoint: &WireEndpoint| {
            let mut shared = |all: &Option<Vec<Named>>| {
                all.iter().flatten().map(|named| names.shared(&named.name)).collect::<Box<[_]>>()
            };
            let hints = endpoint.hints.as_ref();
            let hints = hints.map(|all| Hints { nodes: shared(&all.for_nodes), zones: shared(&all.for_zones) });
            Some(Endpoint {
                // The first alone counts, as it does for kube-proxy.
                address: endpoint.addresses.first().and_then(|text| address(text))?,
                node: endpoint.node_name.as_deref().map(|name| names.shared(name)),
                condition: endpoint.conditions.condition()?,
                of_pod: own && endpoint.target_ref.as_ref().is_some_and(|target| target.kind == "Pod"),
                hints: hints.filter(|hints| *hints != Hints::default()).map(Box::new),
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

/// As kube-proxy takes them. A load balancer that is a proxy wants to be gone through; and where it says who may come, kube-proxy's own rules
/// have to be met.
fn outside(spec: &ServiceSpec, status: &ServiceStatus) -> Vec<IpAddr> {
    let anybody = spec.load_balancer_source_ranges.as_ref().is_none_or(Vec::is_empty);
    let is_virtual = |ingress: &&Ingress| anybody && ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP");
    let balancer = status.load_balancer.as_ref().and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
    let balancers = balancer.filter(is_virtual).filter_map(|ingress| ingress.ip.as_ref());
    let all = spec.external_ips.iter().flatten().chain(balancers);
    let mut all: Vec<IpAddr> = all.filter_map(|text| address(text)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Kubernetes' own default, where the API server has not written it.
const AFFINITY: u32 = 10_800;

fn affinity(spec: &ServiceSpec) -> Option<u32> {
    let seconds = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    let seconds = seconds.and_then(|seconds| u32::try_from(seconds).ok()).filter(|seconds| *seconds != 0);
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| seconds.unwrap_or(AFFINITY))
}

fn number(port: Option<i64>) -> Option<u16> {
    u16::try_from(port?).ok().filter(|number| *number != 0)
}

/// One that a workload or service can have.
fn address(text: &str) -> Option<IpAddr> {
    let address = text.parse::<IpAddr>().ok()?.to_canonical();
    (!address.is_unspecified() && !address.is_loopback() && !address.is_multicast()).then_some(address)
}
