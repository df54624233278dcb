//! DestinationRule, read as it was written. Which of several counts is `policy`'s to say.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    document::Pair,
    fields::{Fields, Unknown},
    finding::{Origin, Report},
    policies::{header, made, read_selector},
    resources::Metadata,
    services::{identities, port},
};
use crate::policy::{ClientTls, DestinationRule, Keepalive, Subset, Traffic, Workload};

pub(super) fn destination_rule(
    origin: &Origin,
    metadata: Metadata,
    document: &[Pair],
    report: &mut Report,
) -> Option<DestinationRule> {
    let before = report.errors.len();
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata", "status"]);
    let created = made(&top, &metadata, report);
    if !top.has("spec") {
        top.error(report, "spec", "is missing", "write spec.host");
    }
    let mut spec = top.fields(report, "spec")?;
    let hint = "write the service's name, its name in full, or one with * at its beginning";
    let host = spec.required(report, "host", hint).unwrap_or_default();
    let rest = host.strip_prefix("*.").unwrap_or(if host == "*" { "" } else { host });
    if rest.contains('*') {
        spec.error(report, "host", format!("{host:?} has a wildcard where none can be"), hint);
    }
    let exported_to = spec.has("exportTo").then(|| spec.strings(report, "exportTo"));
    let exported_to = exported_to.filter(|to| !to.contains(&"*")).map(|to| {
        let name = |to: &str| if to == "." { metadata.namespace.clone() } else { to.to_owned() };
        to.into_iter().map(name).collect()
    });
    let selector = read_selector(&mut spec, report, "workloadSelector");
    let (mut traffic, mut ports) = (Traffic::default(), BTreeMap::new());
    if let Some(mut fields) = spec.fields(report, "trafficPolicy") {
        (traffic, ports) = traffic_policy(&mut fields, report);
        fields.finish(report, Unknown::Error);
    }
    let subsets = subsets(&mut spec, report);
    spec.finish(report, Unknown::Error);
    top.finish(report, Unknown::Error);
    let host = if host.contains(['.', '*']) { host.to_owned() } else { Workload::host_of(host, &metadata.namespace) };
    let sound = metadata.sound && report.errors.len() == before;
    let header = header("DestinationRule", metadata, created, selector);
    sound.then(|| DestinationRule { header, host, exported_to, traffic: Arc::new(traffic), ports, subsets })
}

/// Read to the end, so that what is wrong is said; `policy explain` shows which endpoints each has.
fn subsets(spec: &mut Fields<'_>, report: &mut Report) -> Vec<Subset> {
    let mut subsets: Vec<Subset> = Vec::new();
    for mut fields in spec.items(report, "subsets").unwrap_or_default() {
        let name = fields.required(report, "name", "give the subset a name").unwrap_or_default().to_owned();
        let labels = fields.texts(report, "labels").into_iter().collect();
        if let Some(mut policy) = fields.fields(report, "trafficPolicy") {
            traffic_policy(&mut policy, report);
            policy.finish(report, Unknown::Error);
        }
        if subsets.iter().any(|known| known.name == name) {
            fields.error(report, "name", format!("subset {name:?} is there twice"), "rename or remove one of the two");
        }
        fields.finish(report, Unknown::Error);
        subsets.push(Subset { name, labels });
    }
    if !subsets.is_empty() {
        let message = "has no effect: what chooses a subset is a VirtualService, which is not acted on";
        spec.warning(report, "subsets", message, "leave it: without routes nothing goes to a subset, in Istio neither");
    }
    subsets
}

/// For the service, and for single ports of it.
fn traffic_policy(fields: &mut Fields<'_>, report: &mut Report) -> (Traffic, BTreeMap<u16, Arc<Traffic>>) {
    let mut ports = BTreeMap::new();
    for mut fields in fields.items(report, "portLevelSettings").unwrap_or_default() {
        let number = fields.fields(report, "port").and_then(|mut inner| port(&mut inner, report, "number"));
        let read = Arc::new(traffic_of(&mut fields, report));
        match number {
            None => fields.error(report, "port.number", "is missing", "say which port of the service it is"),
            Some(number) => {
                if ports.insert(number, read).is_some() {
                    fields.error_here(report, format!("port {number} is there twice"), "remove one of the two");
                }
            }
        }
        fields.finish(report, Unknown::Error);
    }
    (traffic_of(fields, report), ports)
}

fn traffic_of(fields: &mut Fields<'_>, report: &mut Report) -> Traffic {
    let mut traffic = Traffic::default();
    if let Some(mut tls) = fields.fields(report, "tls") {
        read_tls(&mut tls, report, &mut traffic);
        tls.finish(report, Unknown::Error);
    }
    if let Some(mut pool) = fields.fields(report, "connectionPool") {
        if let Some(mut tcp) = pool.fields(report, "tcp") {
            read_tcp(&mut tcp, report, &mut traffic);
            tcp.finish(report, Unknown::Error);
        }
        if pool.take("http").is_some() {
            let hint = "leave it for Istio's sake";
            pool.warning(report, "http", "has no effect: Marline does not look into HTTP", hint);
        }
        pool.finish(report, Unknown::Error);
    }
    for (key, message) in [
        ("loadBalancer", "has no effect: the endpoint with the fewest connections is chosen, of the own zone first"),
        ("outlierDetection", "has no effect: an endpoint that refuses is tried last for ten seconds"),
        ("retryBudget", "has no effect: what is retried is connecting, up to four endpoints"),
    ] {
        if fields.take(key).is_some() {
            fields.warning(report, key, message, "leave it for Istio's sake");
        }
    }
    for key in ["proxyProtocol", "tunnel"] {
        if fields.take(key).is_some() {
            let hint = "remove it; servers that want it cannot be reached through Marline yet";
            fields.error(report, key, "is not done here, and would change what the server gets", hint);
        }
    }
    traffic
}

fn read_tls(tls: &mut Fields<'_>, report: &mut Report, traffic: &mut Traffic) {
    const MODES: [(&str, Option<ClientTls>); 4] = [
        ("DISABLE", Some(ClientTls::Disable)),
        ("ISTIO_MUTUAL", Some(ClientTls::IstioMutual)),
        ("SIMPLE", None),
        ("MUTUAL", None),
    ];
    traffic.tls = match tls.choice(report, "mode", &MODES) {
        Some(None) => {
            let hint = "let the application speak TLS itself, or write ISTIO_MUTUAL for workloads of the mesh";
            tls.error(report, "mode", "TLS towards servers outside of the mesh is not done here yet", hint);
            None
        }
        mode => mode.flatten(),
    };
    traffic.identities = identities(tls, report);
    for key in ["clientCertificate", "privateKey", "caCertificates", "credentialName", "caCrl", "insecureSkipVerify"] {
        if tls.take(key).is_some() {
            tls.error(report, key, "means nothing with this mode", "remove it: the mesh's own certificates are used");
        }
    }
    if tls.take("sni").is_some() {
        tls.warning(report, "sni", "has no effect: it is outbound_.PORT_._.HOST", "leave it for Istio's sake");
    }
}

fn read_tcp(tcp: &mut Fields<'_>, report: &mut Report, traffic: &mut Traffic) {
    const LEAST: Duration = Duration::from_millis(1);
    traffic.connect_timeout = tcp.duration(report, "connectTimeout", LEAST);
    traffic.max_connections = tcp.count(report, "maxConnections").and_then(|count| usize::try_from(count).ok());
    if let Some(mut fields) = tcp.fields(report, "tcpKeepalive") {
        traffic.keepalive = Some(Keepalive {
            probes: fields.count(report, "probes"),
            time: fields.duration(report, "time", Duration::from_secs(1)),
            interval: fields.duration(report, "interval", Duration::from_secs(1)),
        });
        fields.finish(report, Unknown::Error);
    }
    for key in ["maxConnectionDuration", "idleTimeout"] {
        if tcp.take(key).is_some() {
            tcp.warning(
                report,
                key,
                "has no effect: connections live for as long as their ends want",
                "leave it for Istio's sake",
            );
        }
    }
}
