//! Service (of Kubernetes) and ServiceEntry, read as they were written. Which workloads are behind them is `config::assemble`'s to find.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    document::{Pair, Value},
    fields::{Fields, Unknown},
    finding::{Origin, Report},
    resources::{Metadata, locality},
};
use crate::{
    identity::SpiffeId,
    policy::{Labels, Workload},
};

/// Either kind.
#[derive(Clone, PartialEq)]
pub(super) struct ServiceResource {
    pub(super) origin: Origin,
    pub(super) namespace: String,
    pub(super) hosts: Vec<String>,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ports: Vec<Port>,
    pub(super) behind: Behind,
    pub(super) identities: Vec<SpiffeId>,
    /// Whether its endpoints are workloads of the mesh.
    pub(super) internal: bool,
}

#[derive(Clone, PartialEq)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) number: u16,
    pub(super) target: Target,
}

/// Where the endpoints listen, unless they say otherwise by the port's name.
#[derive(Clone, PartialEq)]
pub(super) enum Target {
    Number(u16),
    /// Only who has a port of this name listens.
    Name(String),
}

/// What is behind a service.
#[derive(Clone, PartialEq)]
pub(super) enum Behind {
    /// The workloads of its namespace with these labels.
    Selector(Labels),
    Endpoints(Vec<Inline>),
    /// Nothing is said.
    Nothing,
}

#[derive(Clone, PartialEq)]
pub(super) struct Inline {
    pub(super) address: IpAddr,
    pub(super) line: u64,
    pub(super) ports: BTreeMap<String, u16>,
    pub(super) zone: Option<String>,
}

pub(super) fn service(
    origin: &Origin,
    metadata: Metadata,
    document: &[Pair],
    report: &mut Report,
) -> Option<ServiceResource> {
    let before = report.errors.len();
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata", "status"]);
    if !top.has("spec") {
        top.error(report, "spec", "is missing", "write spec.ports and what is behind them");
    }
    let mut spec = top.fields(report, "spec")?;
    if spec.text(report, "type") == Some("ExternalName") {
        let hint = "write a ServiceEntry, or move it out of the directory";
        spec.warning(report, "type", "ExternalName is an affair of DNS: it has no effect", hint);
        return None;
    }
    let mut addresses: BTreeSet<IpAddr> = BTreeSet::new();
    let single = spec.text(report, "clusterIP").into_iter();
    for text in single.chain(spec.strings(report, "clusterIPs")).filter(|text| !matches!(*text, "" | "None")) {
        addresses.extend(address(&spec, report, "clusterIP", text));
    }
    let ports = ports(&mut spec, report, "port");
    let selector = spec.texts(report, "selector");
    // What kube-proxy and load balancers go by.
    spec.skip(&["ipFamilies", "ipFamilyPolicy", "sessionAffinity", "sessionAffinityConfig", "internalTrafficPolicy"]);
    spec.skip(&["externalTrafficPolicy", "externalIPs", "externalName", "healthCheckNodePort", "loadBalancerIP"]);
    spec.skip(&["loadBalancerClass", "loadBalancerSourceRanges", "allocateLoadBalancerNodePorts"]);
    spec.skip(&["publishNotReadyAddresses", "trafficDistribution"]);
    spec.finish(report, Unknown::Warning);
    top.finish(report, Unknown::Error);
    (metadata.sound && report.errors.len() == before).then(|| ServiceResource {
        origin: origin.clone(),
        hosts: vec![Workload::host_of(&metadata.name, &metadata.namespace)],
        namespace: metadata.namespace,
        addresses: addresses.into_iter().collect(),
        ports,
        behind: if selector.is_empty() { Behind::Nothing } else { Behind::Selector(selector.into_iter().collect()) },
        identities: Vec::new(),
        internal: true,
    })
}

pub(super) fn service_entry(
    origin: &Origin,
    metadata: Metadata,
    document: &[Pair],
    report: &mut Report,
) -> Option<ServiceResource> {
    let before = report.errors.len();
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata", "status"]);
    if !top.has("spec") {
        top.error(report, "spec", "is missing", "write spec.ports and what is behind them");
    }
    let mut spec = top.fields(report, "spec")?;
    let hosts: Vec<String> = spec.strings(report, "hosts").into_iter().map(str::to_owned).collect();
    if hosts.is_empty() {
        spec.error(report, "hosts", "is missing or empty", "write at least one host name");
    }
    let texts = spec.strings(report, "addresses");
    let addresses: Vec<_> = texts.iter().filter_map(|text| address(&spec, report, "addresses", text)).collect();
    let ports = ports(&mut spec, report, "number");
    let locations = [("MESH_EXTERNAL", false), ("MESH_INTERNAL", true)];
    let internal = spec.choice(report, "location", &locations).unwrap_or(false);
    let resolutions =
        [("NONE", "NONE"), ("STATIC", "STATIC"), ("DNS", "DNS"), ("DNS_ROUND_ROBIN", "DNS"), ("DYNAMIC_DNS", "DNS")];
    let resolution = spec.choice(report, "resolution", &resolutions).unwrap_or("NONE");
    if resolution == "DNS" {
        let hint = "write resolution: STATIC and the endpoints' IP addresses";
        spec.error(report, "resolution", "Marline does not look up host names", hint);
    }
    let identities = identities(&mut spec, report);
    let selector = spec.fields(report, "workloadSelector").map(|mut selector| {
        let labels = selector.texts(report, "labels");
        selector.finish(report, Unknown::Error);
        labels
    });
    let endpoints = endpoints(&mut spec, report);
    let behind = match (selector, endpoints) {
        (Some(_), Some(_)) => {
            let hint = "keep one of the two";
            spec.error(report, "workloadSelector", "cannot be together with endpoints", hint);
            Behind::Nothing
        }
        (Some(labels), None) => Behind::Selector(labels.into_iter().collect()),
        (None, Some(endpoints)) => Behind::Endpoints(endpoints),
        (None, None) => Behind::Nothing,
    };
    if resolution == "NONE" && !matches!(behind, Behind::Nothing) {
        let hint = "write resolution: STATIC, or remove the endpoints";
        spec.error(
            report,
            "resolution",
            "NONE sends connections where the application does: it has no endpoints",
            hint,
        );
    }
    if spec.take("exportTo").is_some() {
        let hint = "remove it, or leave it for Istio's sake; AuthorizationPolicy says who may call whom";
        spec.warning(report, "exportTo", "has no effect: the service is known in all namespaces", hint);
    }
    spec.finish(report, Unknown::Error);
    top.finish(report, Unknown::Error);
    // Without endpoints of its own a connection goes where the application sends it: nothing stands between.
    let addresses = if resolution == "NONE" { Vec::new() } else { addresses };
    (metadata.sound && report.errors.len() == before).then(|| ServiceResource {
        origin: origin.clone(),
        namespace: metadata.namespace,
        hosts,
        addresses,
        ports,
        behind,
        identities,
        internal,
    })
}

fn address(spec: &Fields<'_>, report: &mut Report, key: &str, text: &str) -> Option<IpAddr> {
    let parsed = text.parse::<IpAddr>().ok().map(|address| address.to_canonical());
    if parsed.is_none_or(|address| address.is_unspecified() || address.is_loopback() || address.is_multicast()) {
        let hint = "write single IP addresses; a block (CIDR) cannot be one service's here";
        spec.error(report, key, format!("{text:?} is no address that a service can have"), hint);
        return None;
    }
    parsed
}

/// The TCP ports; `number` is the name of the field that clients' port is in.
fn ports(spec: &mut Fields<'_>, report: &mut Report, number: &'static str) -> Vec<Port> {
    let mut ports: Vec<Port> = Vec::new();
    for mut fields in spec.items(report, "ports").unwrap_or_default() {
        let name = fields.text(report, "name").unwrap_or_default().to_owned();
        let udp = fields.text(report, "protocol").is_some_and(|protocol| matches!(protocol, "UDP" | "SCTP"));
        let client = port(&mut fields, report, number);
        let target = match fields.take("targetPort").map(|node| &node.value) {
            None => client.map(Target::Number),
            Some(Value::Text(name)) => Some(Target::Name(name.clone())),
            Some(Value::Integer(number)) => match u16::try_from(*number) {
                Ok(number) if number != 0 => Some(Target::Number(number)),
                _ => {
                    fields.error(report, "targetPort", "is no port", "write a number from 1 to 65535, or a name");
                    None
                }
            },
            Some(other) => {
                let message = format!("must be a number or a name, but is {}", other.kind());
                fields.error(report, "targetPort", message, "write a number from 1 to 65535, or a name");
                None
            }
        };
        fields.skip(&["nodePort", "appProtocol"]);
        if let (Some(number), Some(target), false) = (client, target, udp) {
            if ports.iter().any(|port| port.number == number) {
                fields.error_here(report, format!("port {number} is there twice"), "remove one of the two");
            }
            ports.push(Port { name, number, target });
        }
        fields.finish(report, Unknown::Error);
    }
    ports
}

pub(super) fn port(fields: &mut Fields<'_>, report: &mut Report, key: &'static str) -> Option<u16> {
    let number = match fields.take(key).map(|node| &node.value) {
        Some(Value::Integer(number)) => u16::try_from(*number).ok().filter(|number| *number != 0),
        _ => None,
    };
    if number.is_none() {
        fields.error(report, key, "is missing or no port", "write a number from 1 to 65535");
    }
    number
}

pub(super) fn identities(spec: &mut Fields<'_>, report: &mut Report) -> Vec<SpiffeId> {
    let mut identities = Vec::new();
    for text in spec.strings(report, "subjectAltNames") {
        match text.parse() {
            Ok(id) => identities.push(id),
            Err(error) => {
                let hint = "write SPIFFE IDs: spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT";
                spec.error(report, "subjectAltNames", format!("{text:?}: {error}"), hint);
            }
        }
    }
    identities
}

fn endpoints(spec: &mut Fields<'_>, report: &mut Report) -> Option<Vec<Inline>> {
    let mut endpoints = Vec::new();
    for mut fields in spec.items(report, "endpoints")? {
        let line = fields.line_of("address");
        let hint = "write the endpoint's IP address";
        let text = fields.required(report, "address", hint);
        let address = text.and_then(|text| address(&fields, report, "address", text));
        let ports = numbers(&mut fields, report);
        let zone = locality(&mut fields, report);
        // Who it is, its WorkloadEntry says.
        fields.skip(&["labels", "serviceAccount", "network", "weight"]);
        fields.finish(report, Unknown::Error);
        endpoints.extend(address.map(|address| Inline { address, line, ports, zone }));
    }
    Some(endpoints)
}

/// Ports by their names.
pub(super) fn numbers(fields: &mut Fields<'_>, report: &mut Report) -> BTreeMap<String, u16> {
    let Some(inner) = fields.fields(report, "ports") else { return BTreeMap::new() };
    let mut numbers = BTreeMap::new();
    for (name, value) in inner.values() {
        match value {
            Value::Integer(number) if (1..=65535).contains(number) => {
                numbers.insert(name.to_owned(), u16::try_from(*number).unwrap_or_default());
            }
            _ => inner.error(report, name, "is no port", "write a number from 1 to 65535"),
        }
    }
    numbers
}
