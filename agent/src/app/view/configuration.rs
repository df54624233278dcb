//! The configuration that is in force, as JSON. Of secrets only the places are known here.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::{
    config::{AgentConfig, CaConfig, CaSource},
    policy::Workload,
    state::Snapshot,
};

pub(super) fn workloads(snapshot: &Snapshot) -> Value {
    let local: HashSet<_> = snapshot.local.iter().map(|pod| (&pod.workload.namespace, &pod.workload.name)).collect();
    let mode = |workload: &Workload| workload.in_mesh.then(|| snapshot.policies.authentication.mode(workload, 0));
    let workload = |workload: &Workload| {
        json!({
            "namespace": workload.namespace, "name": workload.name, "identity": workload.id.to_string(),
            "addresses": workload.addresses, "in_mesh": workload.in_mesh,
            "local": local.contains(&(&workload.namespace, &workload.name)), "mode": mode(workload),
            "labels": workload.labels.iter().collect::<std::collections::BTreeMap<_, _>>(),
        })
    };
    json!({
        "generation": snapshot.generation,
        "mode": snapshot.policies.authentication.mesh_mode(),
        "workloads": snapshot.workloads().iter().map(|one| workload(one)).collect::<Vec<_>>(),
    })
}

pub(super) fn services(snapshot: &Snapshot) -> Value {
    let services = snapshot.services().iter().map(|service| {
        let ports = service.ports.iter().map(|(port, endpoints)| {
            let endpoints = endpoints.iter().map(|endpoint| {
                let workload = endpoint.workload.as_ref().map(ToString::to_string);
                json!({"address": endpoint.address, "workload": workload, "zone": endpoint.zone})
            });
            json!({"port": port, "endpoints": endpoints.collect::<Vec<_>>()})
        });
        let node_ports = service.node_ports.iter().map(|(at, it)| json!({"node_port": at, "port": it}));
        json!({
            "host": service.host, "namespace": service.namespace, "addresses": service.addresses,
            "outside": service.outside,
            "ports": ports.collect::<Vec<_>>(), "node_ports": node_ports.collect::<Vec<_>>(),
            "session_affinity_seconds": service.affinity.map(|life| life.as_secs()),
            "subject_alt_names": service.identities.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    });
    json!({"generation": snapshot.generation, "services": services.collect::<Vec<_>>()})
}

/// Where certificates come from: of a token or a key only the file is told.
fn ca(ca: &CaConfig) -> Value {
    let mut shown = match &ca.source {
        CaSource::Embedded(directory) => json!({"path": directory.display().to_string()}),
        CaSource::WorkloadApi(socket) => json!({"workloadApi": format!("unix://{}", socket.display())}),
        CaSource::Remote(remote, roots) => json!({
            "address": format!("https://{}", remote.address), "serverName": remote.server_name, "clusterId": remote.cluster_id,
            "tokenFile": remote.token.display().to_string(), "rootCert": roots.display().to_string(),
        }),
    };
    shown["leafLifetime"] = json!(humantime::format_duration(ca.leaf_lifetime).to_string());
    shown
}

/// Durations as people write them in YAML.
pub(super) fn agent(agent: &AgentConfig) -> Value {
    // A path may hold what JSON has no letters for.
    let path = |path: &std::path::Path| path.display().to_string();
    let time = |duration| humantime::format_duration(duration).to_string();
    let filter = &agent.access_log.filter;
    json!({
        "trustDomain": agent.trust_domain.as_str(),
        "trust": {
            "aliases": agent.trust.domains.aliases().iter().map(|alias| alias.as_str()).collect::<Vec<_>>(),
            "federated": agent.trust.federated.iter().map(|(domain, bundle)| json!({
                "trustDomain": domain.as_str(), "bundle": path(bundle),
            })).collect::<Vec<_>>(),
            "crl": agent.trust.crl.as_deref().map(path),
        },
        "tls": {"pqcOnly": agent.tls.pqc_only},
        "ca": ca(&agent.ca),
        "capture": {"cgroup": path(&agent.capture.cgroup), "pinPath": path(&agent.capture.pin_path)},
        "records": {
            "mode": format!("{:?}", agent.records.mode).to_lowercase(), "requireKtls": agent.records.require_ktls,
        },
        "pump": format!("{:?}", agent.pump).to_lowercase(),
        "direct": {
            "mode": format!("{:?}", agent.direct.mode).to_lowercase(), "keeper": agent.direct.keeper.as_deref().map(path),
            "hold": time(agent.direct.hold), "keyLimit": agent.direct.key_limit,
        },
        "admin": {"address": agent.admin},
        "metrics": {"address": agent.metrics},
        "readiness": {"address": agent.readiness},
        "accessLog": {
            "path": agent.access_log.path.as_deref().map(path), "format": format!("{:?}", agent.access_log.format).to_lowercase(),
            "sample": format!("{}%", agent.access_log.sample * 100.0),
            "filter": {
                "directions": filter.directions, "verdicts": filter.verdicts, "modes": filter.modes,
                "paths": filter.paths, "namespaces": filter.namespaces, "workloads": filter.workloads,
                "minDuration": time(filter.min_duration), "minBytes": filter.min_bytes,
            },
        },
        "timeouts": {
            "connect": time(agent.timeouts.connect), "handshake": time(agent.timeouts.handshake),
            "deadPeer": time(agent.timeouts.dead_peer),
        },
        "kubernetes": agent.kubernetes.as_ref().map(|kubernetes| json!({
            "nodeName": kubernetes.node_name, "kubeconfig": kubernetes.kubeconfig.as_deref().map(path),
            "cni": {
                "socket": path(&kubernetes.cni.socket), "records": path(&kubernetes.cni.records),
                "confDir": kubernetes.cni.configurations.as_deref().map(path),
            },
        })),
    })
}
