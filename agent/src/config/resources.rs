//! What all of Istio's resources have in common, and the WorkloadEntry. Policies are read by `config::policies`.
//!
//! Each is read on its own here; what only shows when all are known (two of one name, one address twice) is
//! `config::assemble`'s.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use super::{
    document::Pair,
    fields::{Fields, Unknown},
    finding::{Origin, Report},
    services::numbers,
};
use crate::policy::Labels;

pub(super) const DEFAULT_NAMESPACE: &str = "default";

pub(super) const NETNS: &str = "marline.io/netns";
const MESH: &str = "marline.io/mesh";
pub(super) const OUR_PREFIX: &str = "marline.io/";

/// What every resource has.
#[derive(Default)]
pub(super) struct Metadata {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    /// As it was written; only policies go by it.
    pub(super) created: Option<String>,
    /// Whether name and namespace are what they should be. The rest is read even so, to find what is wrong there.
    pub(super) sound: bool,
}

/// A WorkloadEntry, checked by itself.
#[derive(Clone, PartialEq)]
pub(super) struct WorkloadEntry {
    pub(super) origin: Origin,
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) service_account: String,
    pub(super) address: IpAddr,
    pub(super) address_line: u64,
    pub(super) labels: Labels,
    pub(super) in_mesh: bool,
    pub(super) netns: Option<PathBuf>,
    /// By the names that services give them.
    pub(super) ports: BTreeMap<String, u16>,
    /// `REGION/ZONE`.
    pub(super) zone: Option<String>,
}

/// Reads `metadata`. The name is checked to be one that Kubernetes would take, as it becomes part of host names.
pub(super) fn metadata(origin: &Origin, document: &[Pair], report: &mut Report) -> Metadata {
    let mut top = Fields::top(origin, document);
    if !top.has("metadata") {
        top.error(report, "metadata.name", "is missing", "give the resource a name");
    }
    let Some(mut fields) = top.fields(report, "metadata") else { return Metadata::default() };
    let before = report.errors.len();
    let name = fields.required(report, "name", "give the resource a name").unwrap_or_default().to_owned();
    let namespace =
        fields.text(report, "namespace").filter(|text| !text.is_empty()).unwrap_or(DEFAULT_NAMESPACE).to_owned();
    for (key, text, dots) in [("name", &name, true), ("namespace", &namespace, false)] {
        if !text.is_empty()
            && let Err(message) = kubernetes_name(text, dots)
        {
            fields.error(report, key, message, "write a name of a-z, 0-9 and '-'");
        }
    }
    let sound = report.errors.len() == before;
    let labels = fields.texts(report, "labels");
    let annotations = fields.texts(report, "annotations");
    let created = fields.text(report, "creationTimestamp").map(str::to_owned);
    // What an API server adds to whatever it hands out.
    fields.skip(&["uid", "resourceVersion", "generation", "managedFields", "selfLink"]);
    fields.skip(&["ownerReferences", "finalizers", "generateName", "deletionTimestamp"]);
    fields.finish(report, Unknown::Warning);
    Metadata { name, namespace, labels, annotations, created, sound }
}

pub(super) fn workload_entry(
    origin: &Origin,
    metadata: Metadata,
    document: &[Pair],
    report: &mut Report,
) -> Option<WorkloadEntry> {
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata", "status"]);
    let netns = netns(&top, &metadata, report);
    if !top.has("spec") {
        top.error(report, "spec", "is missing", "write spec.address and spec.serviceAccount");
    }
    let spec = top.fields(report, "spec");
    let Some(mut spec) = spec else {
        top.finish(report, Unknown::Error);
        return None;
    };

    let address = workload_address(&mut spec, report);
    let service_account = match spec.text(report, "serviceAccount") {
        None | Some("") => "default".to_owned(),
        Some(account) => account.to_owned(),
    };
    let account_is_good = kubernetes_name(&service_account, true);
    if let Err(message) = &account_is_good {
        spec.error(
            report,
            "serviceAccount",
            message.as_str(),
            "write the name of a service account: a-z, 0-9, '-' and '.'",
        );
    }
    let spec_labels = spec.texts(report, "labels");
    let in_mesh = in_mesh(&top, &metadata.labels, &spec_labels, report);
    // As Istio does: labels of both places, those in the metadata first.
    let mut labels = spec_labels;
    labels.extend(metadata.labels);
    let ports = numbers(&mut spec, report);
    let zone = locality(&mut spec, report).or_else(|| zone_of(&labels));
    for key in ["network", "weight"] {
        if spec.take(key).is_some() {
            let hint = "remove it, or leave it for Istio's sake";
            spec.warning(report, key, "has no effect in this version of Marline", hint);
        }
    }
    let address_line = spec.line_of("address");
    spec.finish(report, Unknown::Error);
    top.finish(report, Unknown::Error);
    account_is_good.ok().filter(|()| metadata.sound)?;
    Some(WorkloadEntry {
        origin: origin.clone(),
        name: metadata.name,
        namespace: metadata.namespace,
        service_account,
        address: address?,
        address_line,
        labels: labels.into_iter().collect(),
        in_mesh: in_mesh?,
        netns: netns.ok()?,
        ports,
        zone,
    })
}

/// Istio's `REGION/ZONE/SUBZONE`, without the last.
pub(super) fn locality(fields: &mut Fields<'_>, report: &mut Report) -> Option<String> {
    let text = fields.text(report, "locality").filter(|text| !text.is_empty())?;
    Some(text.split('/').take(2).collect::<Vec<_>>().join("/"))
}

/// The same by the labels that Kubernetes gives nodes, and Istio takes of workloads.
fn zone_of(labels: &BTreeMap<String, String>) -> Option<String> {
    let region = labels.get("topology.kubernetes.io/region");
    let zone = labels.get("topology.kubernetes.io/zone")?;
    Some(region.map_or_else(|| format!("/{zone}"), |region| format!("{region}/{zone}")))
}

/// Nothing if an annotation is wrong, an empty option if there is none.
fn netns(top: &Fields<'_>, metadata: &Metadata, report: &mut Report) -> Result<Option<PathBuf>, ()> {
    let mut result = Ok(None);
    for (key, value) in metadata.annotations.iter().filter(|(key, _)| key.starts_with(OUR_PREFIX)) {
        let path = PathBuf::from(value);
        if key != NETNS {
            let hint = format!("known here: {NETNS}; whether a workload is in the mesh is the label {MESH}");
            top.error(report, "metadata.annotations", format!("{key} is not known"), hint);
            result = Err(());
        } else if !path.is_absolute() {
            let hint = "write the path of a network namespace, such as /run/netns/POD";
            top.error(report, "metadata.annotations", format!("{NETNS}: {value:?} is not an absolute path"), hint);
            result = Err(());
        } else if result.is_ok() {
            result = Ok(Some(path));
        }
    }
    result
}

fn in_mesh(
    top: &Fields<'_>,
    metadata: &BTreeMap<String, String>,
    spec: &BTreeMap<String, String>,
    report: &mut Report,
) -> Option<bool> {
    let mut result = Some(None);
    for (field, labels) in [("metadata.labels", metadata), ("spec.labels", spec)] {
        for (key, value) in labels.iter().filter(|(key, _)| key.starts_with(OUR_PREFIX)) {
            match (key.as_str(), value.as_str()) {
                (MESH, "enabled") => result = result.map(|said| said.or(Some(true))),
                (MESH, "disabled") => result = result.map(|said| said.or(Some(false))),
                (MESH, other) => {
                    let hint = format!("write {MESH}: enabled or {MESH}: disabled");
                    top.error(report, field, format!("{MESH}: {other:?} is not known"), hint);
                    result = None;
                }
                (other, _) => {
                    top.error(report, field, format!("{other} is not known"), format!("known here: {MESH}"));
                    result = None;
                }
            }
        }
    }
    result.map(|said| said.unwrap_or(true))
}

fn workload_address(spec: &mut Fields<'_>, report: &mut Report) -> Option<IpAddr> {
    let hint = "write the workload's IP address";
    let text = spec.required(report, "address", hint)?;
    let problem = match text.parse::<IpAddr>() {
        Ok(address) => {
            let address = address.to_canonical();
            let broadcast = address == IpAddr::from([255, 255, 255, 255]);
            if !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast) {
                return Some(address);
            }
            format!("{text} is not an address that others can reach a workload at")
        }
        Err(_) if text.starts_with("unix://") => format!("{text:?} is a Unix socket, which Marline does not capture"),
        Err(_) => format!("{text:?} is not an IP address, and Marline does not look up host names"),
    };
    spec.error(report, "address", problem, hint);
    None
}

/// RFC 1123 as Kubernetes has it: a label, or labels with dots between.
fn kubernetes_name(text: &str, dots: bool) -> Result<(), String> {
    if text.is_empty() {
        return Err("is missing or empty".to_owned());
    }
    let limit = if dots { 253 } else { 63 };
    if text.len() > limit {
        return Err(format!("is longer than {limit} characters"));
    }
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    };
    if if dots { text.split('.').all(label) } else { label(text) } {
        return Ok(());
    }
    Err(format!("{text:?} is not a name that Kubernetes would take"))
}
