//! From the cluster as it is to the snapshot that all other rooms go by: the same that files give. Pure.
//!
//! Who a pod is, the API server says: its namespace and service account. Nothing of it is taken from what a pod can write.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map::Entry},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    model::Model,
    objects::{Key, Pod},
    places::Places,
    roster::{Member, Members, Membership},
    services::{self, Here},
};
use crate::{
    config,
    identity::{SpiffeId, TrustDomains},
    policy::{Labels, Policies, Workload},
    state::{LocalPod, Snapshot, Source},
};

const MESH: &str = "marline.io/mesh";
const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
/// So many remarks are kept; a cluster may give cause for any number.
const REMARKS: usize = 1000;

/// Whose cluster it is seen from.
#[derive(Clone, Debug)]
pub struct Viewpoint {
    pub domains: TrustDomains,
    pub node: Arc<str>,
}

/// What is told of the source beside the snapshot.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Facts {
    /// Workloads of the whole cluster, in the mesh or not.
    pub pods: usize,
    /// `NAMESPACE/NAME` of pods on this node that belong into the mesh and of which nobody has told where they run.
    pub not_captured: Vec<String>,
    /// `NAMESPACE/NAME` of pods on this node that are in the node's own network: they cannot be told apart, and are left alone.
    pub host_network: Vec<String>,
    /// `NAMESPACE/NAME` of pods on this node that are captured and have run uncaptured before.
    pub late: Vec<String>,
    /// The pods of this node.
    pub members: Members,
    /// Objects that cannot be read, and deny; and what else is the matter.
    pub errors: Vec<String>,
    pub warnings: Vec<String>,
}

/// Makes the snapshot. What was worked out for objects that are as they were is taken from the model.
pub fn compile(model: &mut Model, viewpoint: &Viewpoint, places: &Places) -> (Snapshot, Facts) {
    let mut facts = Facts::default();
    let policies = policies(model, viewpoint);
    let own = model.nodes.iter().find(|(key, _)| key.name == viewpoint.node);
    let own = own.map(|(_, slot)| slot.object.labels.clone()).unwrap_or_default();
    let workloads = workloads(model, viewpoint, places, &mut facts);
    let by_address: HashMap<IpAddr, &Arc<Workload>> =
        workloads.iter().flat_map(|(_, _, it)| it.addresses.iter().map(move |address| (*address, it))).collect();
    let here = Here { node: &viewpoint.node, zone: own.get(ZONE) };
    let unheard = services::unheard(model, &by_address);
    let services = services::services(model, here, &by_address, &unheard);
    let nodes = services::nodes(model);
    let virtual_addresses: HashSet<IpAddr> = services.iter().flat_map(|service| service.addresses.clone()).collect();
    let taken = |address: IpAddr| by_address.contains_key(&address) || virtual_addresses.contains(&address);

    let (mut local, mut probes, mut unplaced) = (Vec::new(), BTreeMap::new(), false);
    for (key, uid, workload) in workloads.iter().filter(|(_, _, workload)| workload.in_mesh) {
        let Some(pod) = model.pods.get(key).filter(|pod| pod.node == viewpoint.node) else { continue };
        let place = places.of(uid);
        unplaced |= place.is_none();
        // As one of which nothing was told at all: what is captured stays closed, and what is not stays as it is.
        if facts.members.get(uid).is_none_or(|member| member.mesh != Membership::Inside) {
            continue;
        }
        match place {
            Some(place) => {
                if place.late {
                    facts.late.push(name(key));
                }
                if !pod.probed.is_empty() {
                    probes.insert(place.netns.clone(), Arc::clone(&pod.probed));
                }
                local.push(Arc::new(LocalPod {
                    workload: Arc::clone(workload),
                    netns: place.netns,
                    zone: zone(&own, own.get(ZONE)),
                }));
            }
            None => facts.not_captured.push(name(key)),
        }
    }
    local.sort_by(|a, b| a.netns.cmp(&b.netns));
    let closed = closed(places, &facts.members, &local);

    let mut all: Vec<Arc<Workload>> = workloads.iter().map(|(_, _, workload)| Arc::clone(workload)).collect();
    facts.pods = all.len();
    let objects = || {
        let mut objects: Vec<_> = model.objects.iter().flat_map(|store| store.iter()).collect();
        objects.sort_by_key(|(key, _)| *key);
        objects.into_iter().map(|(_, slot)| &slot.object)
    };
    let compiled = config::compile(&viewpoint.domains, objects(), &all, &taken);
    drop(by_address);
    for object in objects() {
        facts.errors.extend(object.errors.iter().map(ToString::to_string));
        facts.warnings.extend(object.warnings.iter().map(ToString::to_string));
    }
    facts.warnings.extend(compiled.findings.iter().map(ToString::to_string));
    for remarks in [&mut facts.errors, &mut facts.warnings] {
        remarks.sort();
        remarks.truncate(REMARKS);
    }
    all.extend(compiled.workloads);
    // Of one host or address the Service counts, and not the ServiceEntry.
    let services = [compiled.services, services].concat();
    let mut snapshot = Snapshot::new(policies, &viewpoint.domains, all, local);
    snapshot = snapshot.with_services(services).with_nodes(nodes);
    snapshot.warnings = [facts.errors.clone(), facts.warnings.clone()].concat();
    snapshot.sources = sources(model);
    (snapshot.closed, snapshot.unplaced, snapshot.unheard) = (closed, unplaced, unheard);
    snapshot.probes = probes;
    (snapshot, facts)
}

/// Where pods were captured that are not served: their object may go, or tell of their end, long before their processes do. Only what the API
/// server says to be outside of the mesh is let go; for the others the namespace's end is waited for.
fn closed(places: &Places, members: &Members, local: &[Arc<LocalPod>]) -> Vec<PathBuf> {
    let served: HashSet<&Path> = local.iter().map(|local| &*local.netns).collect();
    let outside = |uid: &str| members.get(uid).is_some_and(|member| !member.ended && member.is_outside());
    let told = places.all().into_iter().filter(|(uid, _)| !outside(uid)).map(|(_, place)| place.netns);
    let mut closed: Vec<PathBuf> = told.filter(|netns| !served.contains(&**netns)).collect();
    closed.sort();
    closed
}

fn policies(model: &mut Model, viewpoint: &Viewpoint) -> Arc<Policies> {
    if let Some(policies) = &model.policies {
        return Arc::clone(policies);
    }
    let mut all: Vec<_> = model.objects.iter().flat_map(|store| store.iter()).collect();
    all.sort_by_key(|(key, _)| *key);
    let compiled = Policies::of_objects(&viewpoint.domains, all.into_iter().map(|(_, slot)| &slot.object));
    Arc::clone(model.policies.insert(Arc::new(compiled)))
}

type Known = (Key, Box<str>, Arc<Workload>);

/// All pods that have addresses of their own and have not run to their end, in the order of their names. A pod counts while its init
/// containers run: they connect, too.
fn workloads(model: &mut Model, viewpoint: &Viewpoint, places: &Places, facts: &mut Facts) -> Vec<Known> {
    let namespaces = model.namespaces.iter();
    let namespaces: HashMap<Arc<str>, Membership> =
        namespaces.map(|(key, slot)| (Arc::clone(&key.name), of_namespace(&slot.object.labels))).collect();
    let mut not_told: BTreeSet<Arc<str>> = BTreeSet::new();
    let mut ids: HashMap<(Arc<str>, Arc<str>), Option<SpiffeId>> = HashMap::new();
    let mut found = Vec::with_capacity(model.pods.len());
    for (key, slot) in model.pods.iter_mut() {
        let pod = &slot.object;
        if pod.host_network && !pod.ended && pod.node == viewpoint.node {
            facts.host_network.push(name(key));
        }
        let is_own = pod.node == viewpoint.node;
        let unreported = !pod.ended && !pod.host_network && pod.addresses.is_empty();
        if !is_own && (pod.ended || pod.host_network || unreported) {
            continue;
        }
        let mesh = match pod.labels.get(MESH) {
            Some("enabled") => Membership::Inside,
            Some("disabled") => Membership::Outside,
            said => {
                // Not to be understood is not to opt out.
                if let Some(other) = said {
                    let hint = format!("write {MESH}: enabled or {MESH}: disabled");
                    facts.warnings.push(format!("pod {}: {MESH}: {other:?} is not known; {hint}", name(key)));
                }
                // Namespaces and pods are told apart, and either may come first.
                namespaces.get(&key.namespace).copied().unwrap_or(Membership::NotKnown)
            }
        };
        // Towards the others: what may be in the mesh gets no plaintext.
        let in_mesh = mesh != Membership::Outside;
        if is_own {
            if mesh == Membership::NotKnown && !pod.ended && !pod.host_network {
                not_told.insert(Arc::clone(&key.namespace));
            }
            let (namespace, name) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
            let (host_network, ended) = (pod.host_network, pod.ended);
            facts.members.insert(slot.uid.clone(), Member { namespace, name, mesh, host_network, ended });
        }
        // The API server hears of addresses when the pod has long been able to connect, and of those of a new sandbox later still.
        let told = places.of(&slot.uid).filter(|place| is_own && !place.addresses.is_empty());
        let told = told.map(|place| place.addresses);
        let addresses = told.as_deref().unwrap_or(&pod.addresses);
        if pod.ended || pod.host_network || addresses.is_empty() {
            continue;
        }
        if slot.memo.as_ref().is_none_or(|made| made.in_mesh != in_mesh || *made.addresses != *addresses) {
            let id = ids
                .entry((Arc::clone(&key.namespace), Arc::clone(&pod.account)))
                .or_insert_with(|| SpiffeId::new(viewpoint.domains.own(), &key.namespace, &pod.account).ok());
            slot.memo = id.as_ref().map(|id| Arc::new(workload(key, pod, addresses, id.clone(), in_mesh)));
        }
        match &slot.memo {
            Some(made) => found.push((key, &*slot.uid, pod, Arc::clone(made))),
            None => facts.errors.push(format!("pod {}: its service account gives no identity", name(key))),
        }
    }
    let hint = "the pods there that do not say themselves whether they are in the mesh are neither started nor served";
    facts.warnings.extend(not_told.iter().map(|name| format!("namespace {name} has not been told of yet: {hint}")));
    found.sort_unstable_by_key(|(key, ..)| *key);
    facts.host_network.sort();
    one_for_each_address(found, facts)
}

fn of_namespace(labels: &Labels) -> Membership {
    if labels.get(MESH) == Some("enabled") { Membership::Inside } else { Membership::Outside }
}

/// Addresses are given out again, sometimes before the API server hears that their pod has ended: the youngest that is not on its way out
/// has it, and the other is nobody's workload any more.
fn one_for_each_address(found: Vec<(&Key, &str, &Pod, Arc<Workload>)>, facts: &mut Facts) -> Vec<Known> {
    let rank = |at: usize| found.get(at).map(|(key, _, pod, _)| (!pod.deleting, &pod.created, Reverse(*key)));
    let (mut holders, mut losers): (HashMap<IpAddr, usize>, HashMap<usize, usize>) = (HashMap::new(), HashMap::new());
    for (at, (_, _, _, workload)) in found.iter().enumerate() {
        for address in &workload.addresses {
            match holders.entry(*address) {
                Entry::Vacant(vacant) => {
                    vacant.insert(at);
                }
                Entry::Occupied(mut holder) if rank(*holder.get()) < rank(at) => {
                    losers.insert(*holder.get(), at);
                    holder.insert(at);
                }
                Entry::Occupied(holder) => {
                    losers.insert(at, *holder.get());
                }
            }
        }
    }
    let mut told: Vec<_> =
        losers.iter().filter_map(|(loser, to)| Some((found.get(*loser)?.0, found.get(*to)?.0))).collect();
    told.sort();
    let lost = |(loser, to): (&Key, &Key)| {
        format!("pod {} has an address that {} has too, and younger: it is not known by it", name(loser), name(to))
    };
    facts.warnings.extend(told.into_iter().map(lost));
    let kept = found.iter().enumerate().filter(|(at, _)| !losers.contains_key(at));
    kept.map(|(_, (key, uid, _, workload))| ((*key).clone(), (*uid).into(), Arc::clone(workload))).collect()
}

fn workload(key: &Key, pod: &Pod, addresses: &[IpAddr], id: SpiffeId, in_mesh: bool) -> Workload {
    Workload {
        name: key.name.to_string(),
        namespace: key.namespace.to_string(),
        service_account: pod.account.to_string(),
        id,
        addresses: addresses.to_vec(),
        in_mesh,
        labels: pod.labels.clone(),
        host: Workload::host_of(&key.name, &key.namespace),
    }
}

/// `REGION/ZONE`, where a cluster is in one region: that of the own node.
fn zone(own: &Labels, zone: Option<&str>) -> Option<String> {
    Some(format!("{}/{}", own.get(REGION).unwrap_or_default(), zone?))
}

fn sources(model: &Model) -> Vec<Source> {
    let file: Arc<Path> = Arc::from(Path::new("kubernetes"));
    let kinds = model.objects.iter().zip(config::ObjectKind::ALL);
    let source = |kind: config::ObjectKind, key: &Key| Source {
        resource: format!("{} {}", kind.as_str(), name(key)).into(),
        file: Arc::clone(&file),
        line: 0,
    };
    kinds
        .flat_map(|(store, kind)| store.iter().map(move |(key, _)| (kind, key)))
        .map(|(kind, key)| source(kind, key))
        .collect()
}

fn name(key: &Key) -> String {
    format!("{}/{}", key.namespace, key.name)
}

#[cfg(test)]
mod tests;
