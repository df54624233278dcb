//! PeerAuthentication, read as it was written, and what it has in common with AuthorizationPolicy. What Istio's own validation refuses is an error here too
//! (istio/istio pkg/config/validation/validation.go); which of several counts is `policy`'s to say.

use std::{
    collections::BTreeMap,
    time::{Duration, UNIX_EPOCH},
};

use super::{
    document::Pair,
    fields::{Fields, Unknown},
    finding::{Origin, Report},
    resources::{Metadata, OUR_PREFIX},
};
use crate::policy::{Header, Labels, MtlsMode, PeerAuthentication, PolicyName};

pub(super) const DRY_RUN: &str = "istio.io/dry-run";

/// None is UNSET: inherited.
const MODES: [(&str, Option<MtlsMode>); 4] = [
    ("STRICT", Some(MtlsMode::Strict)),
    ("PERMISSIVE", Some(MtlsMode::Permissive)),
    ("DISABLE", Some(MtlsMode::Disable)),
    ("UNSET", None),
];

pub(super) fn peer_authentication(
    origin: &Origin,
    metadata: Metadata,
    document: &[Pair],
    report: &mut Report,
) -> Option<PeerAuthentication> {
    let before = report.errors.len();
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata", "status"]);
    let created = made(&top, &metadata, report);
    if metadata.annotations.contains_key(DRY_RUN) {
        let hint = "remove it, or move the resource out of the directory until it shall act";
        top.warning(report, "metadata.annotations", format!("{DRY_RUN} has no effect on a PeerAuthentication"), hint);
    }
    let (mut selector, mut mode, mut ports) = (Labels::default(), None, BTreeMap::new());
    if let Some(mut spec) = top.fields(report, "spec") {
        selector = read_selector(&mut spec, report, "selector");
        mode = read_mode(&mut spec, report, "mtls");
        ports = read_ports(&mut spec, report);
        if selector.is_empty() && !ports.is_empty() {
            let hint = "say in spec.selector.matchLabels which workloads have these ports";
            spec.error(report, "portLevelMtls", "takes a selector: ports belong to workloads", hint);
        }
        spec.finish(report, Unknown::Error);
    }
    top.finish(report, Unknown::Error);
    let sound = metadata.sound && report.errors.len() == before;
    let header = header("PeerAuthentication", metadata, created, selector);
    let policy = PeerAuthentication { header, mode, ports };
    if policy.is_void() {
        let message = "a PeerAuthentication in istio-system with a selector has no effect, in Istio as here";
        let hint = "put it into the namespace of the workloads, or remove the selector";
        report.warnings.push(origin.finding("spec.selector", origin.line, message.to_owned(), hint.to_owned()));
    }
    sound.then_some(policy)
}

pub(super) fn header(kind: &'static str, metadata: Metadata, created: Option<Duration>, selector: Labels) -> Header {
    Header { name: PolicyName { kind, namespace: metadata.namespace, name: metadata.name }, created, selector }
}

/// Checks what policies have in their metadata, and gives the time of their making.
pub(super) fn made(top: &Fields<'_>, metadata: &Metadata, report: &mut Report) -> Option<Duration> {
    for key in metadata.annotations.keys().chain(metadata.labels.keys()).filter(|key| key.starts_with(OUR_PREFIX)) {
        top.error(report, "metadata", format!("{key} means nothing on this kind of resource"), "remove it");
    }
    let text = metadata.created.as_ref()?;
    let created = humantime::parse_rfc3339_weak(text).ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    if created.is_none() {
        let hint = "write it as Kubernetes does, 2024-01-31T12:00:00Z, or remove it";
        let message = format!("{text:?} is not a time, and of two equal policies the older counts");
        top.error(report, "metadata.creationTimestamp", message, hint);
    }
    created
}

/// As Istio has it, an empty selector is none (validateWorkloadSelector).
pub(super) fn read_selector(spec: &mut Fields<'_>, report: &mut Report, key: &'static str) -> Labels {
    let Some(mut selector) = spec.fields(report, key) else { return Labels::default() };
    let labels = selector.texts(report, "matchLabels");
    for (key, value) in &labels {
        if key.is_empty() || key.contains('*') || value.contains('*') {
            let hint = "write each label out: a selector knows neither wildcards nor empty keys";
            selector.error(report, "matchLabels", format!("{key:?}: {value:?} selects nothing"), hint);
        }
    }
    selector.finish(report, Unknown::Error);
    if labels.is_empty() {
        let hint = format!("remove spec.{key}, or write matchLabels");
        spec.warning(report, key, "selects without labels, and so everything in its reach", hint);
    }
    labels.into_iter().collect()
}

fn read_mode(fields: &mut Fields<'_>, report: &mut Report, key: &'static str) -> Option<MtlsMode> {
    let mut mtls = fields.fields(report, key)?;
    let mode = mtls.choice(report, "mode", &MODES);
    mtls.finish(report, Unknown::Error);
    mode.flatten()
}

fn read_ports(spec: &mut Fields<'_>, report: &mut Report) -> BTreeMap<u16, Option<MtlsMode>> {
    let mut ports = BTreeMap::new();
    for (key, mut fields) in spec.mappings(report, "portLevelMtls") {
        let mode = fields.choice(report, "mode", &MODES).flatten();
        match key.parse::<u16>() {
            Ok(port) if port != 0 => {
                if ports.insert(port, mode).is_some() {
                    spec.error(report, "portLevelMtls", format!("port {port} is there twice"), "keep one of them");
                }
            }
            _ => {
                let hint = "write the number of the workload's port, 1 to 65535";
                spec.error(report, "portLevelMtls", format!("{key:?} is not a port"), hint);
            }
        }
        fields.finish(report, Unknown::Error);
    }
    ports
}
