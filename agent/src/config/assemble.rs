//! All resources together: contradictions between them are found here, and what is sound becomes a snapshot.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use super::{
    behind,
    finding::{Origin, Report},
    resources::WorkloadEntry,
    services::ServiceResource,
};
use crate::{
    identity::{SpiffeId, TrustDomain, TrustDomains},
    policy::{Policies, Workload},
    state::{LocalPod, Snapshot},
};

/// Stands for a name that is missing, and is none that Kubernetes would take.
pub(super) const UNNAMED: &str = "(unnamed)";

/// Makes the snapshot. Whatever is contradictory is reported, and then the snapshot must not be used.
pub(super) fn snapshot(
    domains: &TrustDomains,
    policies: Policies,
    entries: &[WorkloadEntry],
    services: &[ServiceResource],
    report: &mut Report,
) -> Snapshot {
    unique_addresses(entries, report);
    let trust_domain = domains.own();
    let mut workloads = Vec::new();
    let mut pods: BTreeMap<&PathBuf, Vec<&WorkloadEntry>> = BTreeMap::new();
    for entry in entries {
        match &entry.netns {
            Some(netns) => pods.entry(netns).or_default().push(entry),
            None => workloads.extend(workload(trust_domain, &[entry], report)),
        }
    }
    let mut local = Vec::new();
    for (netns, entries) in pods {
        agree(netns, &entries, report);
        let Some(workload) = workload(trust_domain, &entries, report) else { continue };
        // A pod that opted out is known, so that others speak plaintext to it, and is left alone.
        if workload.in_mesh {
            let zone = entries.iter().find_map(|entry| entry.zone.clone());
            local.push(Arc::new(LocalPod { workload: Arc::clone(&workload), netns: netns.clone(), zone }));
        }
        workloads.push(workload);
    }
    let services = behind::services(services, entries, &workloads, report);
    Snapshot::new(policies, domains, workloads, local).with_services(services)
}

/// Reports the second and every further resource of one kind, namespace and name.
pub(super) fn unique_name(seen: &mut HashMap<Arc<str>, Origin>, origin: Origin, report: &mut Report) {
    // The lack of a name is reported by its own reader.
    if origin.resource.ends_with(UNNAMED) {
        return;
    }
    match seen.entry(Arc::clone(&origin.resource)) {
        hash_map::Entry::Vacant(vacant) => {
            vacant.insert(origin);
        }
        hash_map::Entry::Occupied(first) => {
            let message = format!("there is another of this kind and name in {}", first.get().place());
            report.errors.push(origin.finding(
                "metadata.name",
                origin.line,
                message,
                "rename or remove one".to_owned(),
            ));
        }
    }
}

fn unique_addresses(entries: &[WorkloadEntry], report: &mut Report) {
    let mut seen: HashMap<IpAddr, &WorkloadEntry> = HashMap::new();
    for entry in entries {
        if let Some(first) = seen.get(&entry.address) {
            let message = format!(
                "{} is the address of {} in {} too",
                entry.address,
                first.origin.resource,
                first.origin.place()
            );
            let hint = "an address belongs to one workload: correct or remove one of the two".to_owned();
            report.errors.push(entry.origin.finding("spec.address", entry.address_line, message, hint));
            continue;
        }
        seen.insert(entry.address, entry);
    }
}

/// A dual-stack pod is two entries with one network namespace: they must describe one workload.
fn agree(netns: &std::path::Path, entries: &[&WorkloadEntry], report: &mut Report) {
    let Some((first, others)) = entries.split_first() else { return };
    for other in others {
        let differences = [
            ("metadata.namespace", first.namespace != other.namespace),
            ("spec.serviceAccount", first.service_account != other.service_account),
            // Policies select by them, too.
            ("labels", first.in_mesh != other.in_mesh || first.labels != other.labels),
        ];
        for (field, _) in differences.iter().filter(|(_, differs)| *differs) {
            let message = format!(
                "differs from that of {} in {}, which has the same network namespace {}",
                first.origin.resource,
                first.origin.place(),
                netns.display()
            );
            let hint = "a pod has one identity: make both agree, or correct one annotation marline.io/netns".to_owned();
            report.errors.push(other.origin.finding(field, other.origin.line, message, hint));
        }
    }
}

pub(super) fn workload(
    trust_domain: &TrustDomain,
    entries: &[&WorkloadEntry],
    report: &mut Report,
) -> Option<Arc<Workload>> {
    let first = entries.first()?;
    let id = SpiffeId::new(trust_domain, &first.namespace, &first.service_account)
        .map_err(|error| {
            let hint = "correct the namespace or the service account".to_owned();
            let finding = first.origin.finding("spec.serviceAccount", first.origin.line, error.to_string(), hint);
            report.errors.push(finding);
        })
        .ok()?;
    Some(Arc::new(Workload {
        name: first.name.clone(),
        namespace: first.namespace.clone(),
        service_account: first.service_account.clone(),
        id,
        addresses: entries.iter().map(|entry| entry.address).collect(),
        in_mesh: first.in_mesh,
        labels: first.labels.clone(),
        host: Workload::host_of(&first.name, &first.namespace),
    }))
}
