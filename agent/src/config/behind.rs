//! What is behind services: their endpoints, found among the workloads.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    finding::{Origin, Report},
    resources::WorkloadEntry,
    services::{Behind, Port, ServiceResource, Target},
};
use crate::policy::{Service, ServiceEndpoint, Workload};

/// All services with ports and endpoints. An endpoint of a headless one is called at the service's port, as Istio's listeners for them are
/// (istio/istio pilot/pkg/networking/core/listener.go, `buildSidecarOutboundListeners`).
pub(super) fn services(
    resources: &[ServiceResource],
    entries: &[WorkloadEntry],
    workloads: &[Arc<Workload>],
    report: &mut Report,
) -> Vec<Arc<Service>> {
    let by_address: HashMap<IpAddr, &Arc<Workload>> = workloads
        .iter()
        .flat_map(|workload| workload.addresses.iter().map(move |address| (*address, workload)))
        .collect();
    unique_addresses(resources, &by_address, report);
    let namespaces = by_namespace(entries);
    let mut services = Vec::new();
    for resource in resources {
        let found = candidates(resource, &namespaces, &by_address, report);
        let headless = resource.addresses.is_empty();
        let ports = resource.ports.iter().map(|port| (port.number, endpoints(port, &found, headless))).collect();
        services.push(Arc::new(Service {
            host: resource.hosts.first().cloned().unwrap_or_default(),
            namespace: resource.namespace.clone(),
            addresses: resource.addresses.clone(),
            ports,
            identities: resource.identities.clone(),
            ..Service::default()
        }));
    }
    services
}

/// Who could be an endpoint, whatever the port.
struct Candidate<'a> {
    address: IpAddr,
    workload: Option<Arc<Workload>>,
    ports: &'a BTreeMap<String, u16>,
    zone: Option<String>,
}

fn by_namespace(entries: &[WorkloadEntry]) -> HashMap<&str, Vec<&WorkloadEntry>> {
    let mut namespaces: HashMap<&str, Vec<&WorkloadEntry>> = HashMap::new();
    for entry in entries {
        namespaces.entry(&entry.namespace).or_default().push(entry);
    }
    namespaces
}

fn candidates<'a>(
    resource: &'a ServiceResource,
    namespaces: &HashMap<&str, Vec<&'a WorkloadEntry>>,
    by_address: &HashMap<IpAddr, &Arc<Workload>>,
    report: &mut Report,
) -> Vec<Candidate<'a>> {
    match &resource.behind {
        Behind::Nothing => Vec::new(),
        Behind::Selector(labels) => {
            let selected = |entry: &&&WorkloadEntry| {
                // A selector without labels selects nothing, as in Kubernetes.
                !labels.is_empty() && entry.labels.satisfy(labels)
            };
            let all = namespaces.get(resource.namespace.as_str()).map_or(&[][..], Vec::as_slice);
            let candidate = |entry: &&'a WorkloadEntry| Candidate {
                address: entry.address,
                workload: by_address.get(&entry.address).map(|workload| Arc::clone(workload)),
                ports: &entry.ports,
                zone: entry.zone.clone(),
            };
            all.iter().filter(selected).map(candidate).collect()
        }
        Behind::Endpoints(endpoints) => endpoints
            .iter()
            .map(|inline| {
                let workload = by_address.get(&inline.address).map(|workload| Arc::clone(workload));
                if workload.is_none() && resource.internal {
                    let message = format!("{} is no workload's address", inline.address);
                    let hint = "write a WorkloadEntry for it: it says whose identity must answer";
                    let finding = resource.origin.finding("spec.endpoints", inline.line, message, hint.to_owned());
                    report.errors.push(finding);
                }
                Candidate { address: inline.address, workload, ports: &inline.ports, zone: inline.zone.clone() }
            })
            .collect(),
    }
}

fn endpoints(port: &Port, candidates: &[Candidate<'_>], headless: bool) -> Vec<ServiceEndpoint> {
    let listens_at = |candidate: &Candidate<'_>| match &port.target {
        _ if headless => Some(port.number),
        _ if candidate.ports.contains_key(&port.name) => candidate.ports.get(&port.name).copied(),
        Target::Number(number) => Some(*number),
        Target::Name(name) => candidate.ports.get(name).copied(),
    };
    let endpoint = |candidate: &Candidate<'_>| {
        Some(ServiceEndpoint {
            address: SocketAddr::new(candidate.address, listens_at(candidate)?),
            workload: candidate.workload.clone(),
            zone: candidate.zone.clone(),
        })
    };
    candidates.iter().filter_map(endpoint).collect()
}

fn unique_addresses(resources: &[ServiceResource], by_address: &HashMap<IpAddr, &Arc<Workload>>, report: &mut Report) {
    let mut seen: HashMap<IpAddr, &Origin> = HashMap::new();
    for resource in resources {
        for address in &resource.addresses {
            let other = match (seen.entry(*address), by_address.get(address)) {
                (_, Some(workload)) => format!("workload {workload}"),
                (Entry::Occupied(first), None) => format!("{} in {}", first.get().resource, first.get().place()),
                (Entry::Vacant(vacant), None) => {
                    vacant.insert(&resource.origin);
                    continue;
                }
            };
            let message = format!("{address} is the address of {other} too");
            let hint = "an address stands for one service: correct or remove one of the two".to_owned();
            report.errors.push(resource.origin.finding("spec", resource.origin.line, message, hint));
        }
    }
}
