//! Where the cluster's services lead from this node, by kube-proxy's rules: what is ready, near by what the hints say, else what goes away and
//! still serves. Pure.
//!
//! Hints are EndpointSlices' own: their controller writes them where a service asks for it (`spec.trafficDistribution`, topology mode), so the
//! service's own words are not looked at, as kube-proxy does not.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::{
    model::Model,
    objects::{Condition, Endpoint, Hints, Key, Service, ServicePort, Slice},
};
use crate::policy::{self, ServiceEndpoint, Workload};

/// From where it is looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Here<'a> {
    pub node: &'a str,
    pub zone: Option<&'a str>,
}

/// Which endpoints a connection may go to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reach {
    /// Those of the cluster, the near ones alone where hints say so.
    Cluster,
    /// Those of this node.
    Node,
    /// All that there are: clients choose by themselves.
    Any,
}

/// One place where a port of a service is served.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Place<'a> {
    pub address: SocketAddr,
    pub endpoint: &'a Endpoint,
}

pub(super) fn services(
    model: &Model,
    here: Here<'_>,
    by_address: &HashMap<IpAddr, &Arc<Workload>>,
    unheard: &HashSet<IpAddr>,
) -> Vec<Arc<policy::Service>> {
    let mut slices: HashMap<(&str, &str), Vec<(&Key, &Slice)>> = HashMap::new();
    for (key, slot) in model.slices.iter() {
        slices.entry((&key.namespace, &slot.object.service)).or_default().push((key, &slot.object));
    }
    // A name for DNS is nothing that connections go through: they go to what it leads to.
    let mut all: Vec<_> = model.services.iter().filter(|(_, slot)| !slot.object.external).collect();
    all.sort_unstable_by_key(|(key, _)| *key);
    let made = |key: &Key, service: &Service| {
        let mut slices = slices.get(&(&*key.namespace, &*key.name)).cloned().unwrap_or_default();
        slices.sort_unstable_by_key(|(key, _)| *key);
        let led = |port: &ServicePort, reach| {
            let mut all = places(&slices, &port.name, here);
            all.retain(|place| !unheard.contains(&place.address.ip()));
            let there = usable(&all, reach, here);
            let endpoint = |place: Place<'_>| ServiceEndpoint {
                address: place.address,
                workload: by_address.get(&place.address.ip()).map(|workload| Arc::clone(workload)),
                // What is near, the hints have said.
                zone: None,
            };
            there.into_iter().map(endpoint).collect::<Vec<_>>()
        };
        let own = match (service.addresses.is_empty(), service.local_only) {
            (true, _) => Reach::Any,
            (false, true) => Reach::Node,
            (false, false) => Reach::Cluster,
        };
        let ports = |reach| service.ports.iter().map(|port| (port.number, led(port, reach))).collect();
        let node_ports: BTreeMap<u16, u16> =
            service.ports.iter().filter_map(|port| Some((port.node_port?, port.number))).collect();
        // Of a family that the service has no address of, kube-proxy has no such rules.
        let has_family = |of: &IpAddr| service.addresses.iter().any(|own| own.is_ipv4() == of.is_ipv4());
        let outside: Vec<IpAddr> = service.outside.iter().copied().filter(has_family).collect();
        // As kube-proxy does for the cluster's own pods, whatever is said of traffic from outside.
        let exposed = own != Reach::Cluster && !(node_ports.is_empty() && outside.is_empty());
        Arc::new(policy::Service {
            host: Workload::host_of(&key.name, &key.namespace),
            namespace: key.namespace.to_string(),
            addresses: service.addresses.clone(),
            ports: ports(own),
            identities: Vec::new(),
            node_ports,
            outside,
            exposed: exposed.then(|| ports(Reach::Cluster)),
            affinity: service.affinity.map(|seconds| Duration::from_secs(seconds.into())),
            families_apart: true,
        })
    };
    all.into_iter().map(|(key, slot)| made(key, &slot.object)).collect()
}

/// Addresses that slices say are pods', and of whose pods nothing was told: slices and pods are told of apart, and either may come or go first.
/// Nobody knows whether such a pod is in the mesh.
pub(super) fn unheard(model: &Model, by_address: &HashMap<IpAddr, &Arc<Workload>>) -> HashSet<IpAddr> {
    let endpoints = model.slices.iter().flat_map(|(_, slot)| &slot.object.endpoints);
    let of_pods = endpoints.filter(|endpoint| endpoint.of_pod).map(|endpoint| endpoint.address);
    let mut unheard: HashSet<IpAddr> = of_pods.filter(|address| !by_address.contains_key(address)).collect();
    if !unheard.is_empty() {
        // In its node's network a pod is no workload, and known.
        let known = model.pods.iter().map(|(_, slot)| &slot.object).filter(|pod| pod.host_network && !pod.ended);
        for address in known.flat_map(|pod| &pod.addresses) {
            unheard.remove(address);
        }
    }
    unheard
}

/// The addresses of all nodes, where any service has a port there: those that their pods tell of. Nodes' own objects would have them, too, and
/// are what a large cluster's API server has most to tell of.
pub(super) fn nodes(model: &Model) -> HashSet<IpAddr> {
    if !model.services.iter().any(|(_, slot)| slot.object.ports.iter().any(|port| port.node_port.is_some())) {
        return HashSet::new();
    }
    let running = model.pods.iter().map(|(_, slot)| &slot.object).filter(|pod| !pod.ended);
    running.flat_map(|pod| pod.host_addresses.iter().copied()).collect()
}

/// Everywhere that one port of a service is served, in the order of addresses. What several slices name is one: ready, if it is so in one
/// of them, and rather of this node.
pub(super) fn places<'a>(slices: &[(&Key, &'a Slice)], port: &str, here: Here<'_>) -> Vec<Place<'a>> {
    let mut found: BTreeMap<SocketAddr, &Endpoint> = BTreeMap::new();
    for (_, slice) in slices {
        let Some((_, listens)) = slice.ports.iter().find(|(name, _)| **name == *port) else { continue };
        for endpoint in &slice.endpoints {
            let rank = |it: &Endpoint| (it.condition == Condition::Ready, it.node.as_deref() == Some(here.node));
            let known = found.entry(SocketAddr::new(endpoint.address, *listens)).or_insert(endpoint);
            if rank(known) < rank(endpoint) {
                *known = endpoint;
            }
        }
    }
    found.into_iter().map(|(address, endpoint)| Place { address, endpoint }).collect()
}

/// Those that connections may go to. Each IP family is by itself, as with kube-proxy.
pub(super) fn usable<'a>(all: &[Place<'a>], reach: Reach, here: Here<'_>) -> Vec<Place<'a>> {
    if reach == Reach::Any {
        return all.to_vec();
    }
    let near = |place: &&Place<'_>| reach != Reach::Node || place.endpoint.node.as_deref() == Some(here.node);
    let mut usable = Vec::with_capacity(all.len());
    for is_v4 in [true, false] {
        let there = || all.iter().filter(near).filter(move |place| place.address.is_ipv4() == is_v4);
        let of = |condition| there().copied().filter(move |place| place.endpoint.condition == condition);
        let ready: Vec<Place<'a>> = of(Condition::Ready).collect();
        if ready.is_empty() {
            usable.extend(of(Condition::Leaving));
            continue;
        }
        let hinted = if reach == Reach::Cluster { hinted(&ready, here) } else { Hinted::Nothing };
        usable.extend(ready.into_iter().filter(|place| hinted.takes(place.endpoint, here)));
    }
    usable
}

/// What the hints of all ready endpoints together come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hinted {
    Node,
    Zone,
    Nothing,
}

/// Hints count if each ready endpoint has some, and one of them is for here.
fn hinted(ready: &[Place<'_>], here: Here<'_>) -> Hinted {
    let all = |some: fn(&Hints) -> bool| ready.iter().all(|it| it.endpoint.hints.as_deref().is_some_and(some));
    let here = |kind: Hinted| ready.iter().any(|it| kind.takes(it.endpoint, here));
    if all(|hints| !hints.nodes.is_empty()) && here(Hinted::Node) {
        Hinted::Node
    } else if all(|hints| !hints.zones.is_empty()) && here(Hinted::Zone) {
        Hinted::Zone
    } else {
        Hinted::Nothing
    }
}

impl Hinted {
    fn takes(self, endpoint: &Endpoint, here: Here<'_>) -> bool {
        let hints = endpoint.hints.as_deref();
        match self {
            Self::Node => hints.is_some_and(|hints| hints.nodes.iter().any(|node| **node == *here.node)),
            Self::Zone => hints.is_some_and(|hints| hints.zones.iter().any(|zone| Some(&**zone) == here.zone)),
            Self::Nothing => true,
        }
    }
}

#[cfg(test)]
mod tests;
