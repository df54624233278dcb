//! Istio's resources as far as Marline acts on them: WorkloadEntry and the mesh-wide PeerAuthentication.
//!
//! Each is read on its own here; what only shows when all are known (two of one name, one address twice) is
//! `config::assemble`'s.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use super::{
    document::{Node, Pair, Value},
    fields::{Fields, Unknown},
    finding::{Origin, Report},
};
use crate::policy::MtlsMode;

/// Istio's namespace for what holds in the whole mesh.
pub(super) const ROOT_NAMESPACE: &str = "istio-system";
pub(super) const DEFAULT_NAMESPACE: &str = "default";

const NETNS: &str = "marline.io/netns";
const MESH: &str = "marline.io/mesh";
const OUR_PREFIX: &str = "marline.io/";

/// What every resource has.
#[derive(Default)]
pub(super) struct Metadata {
    pub(super) name: String,
    pub(super) namespace: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    /// Whether name and namespace are what they should be. The rest is read even so, to find what is wrong there.
    sound: bool,
}

/// A WorkloadEntry, checked by itself.
pub(super) struct WorkloadEntry {
    pub(super) origin: Origin,
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) service_account: String,
    pub(super) address: IpAddr,
    pub(super) address_line: u64,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) in_mesh: bool,
    pub(super) netns: Option<PathBuf>,
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
    // What an API server adds to whatever it hands out.
    fields.skip(&["uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "selfLink"]);
    fields.skip(&["ownerReferences", "finalizers", "generateName", "deletionTimestamp"]);
    fields.finish(report, Unknown::Warning);
    Metadata { name, namespace, labels, annotations, sound }
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
    for key in ["ports", "network", "locality", "weight"] {
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
        labels,
        in_mesh: in_mesh?,
        netns: netns.ok()?,
    })
}

/// The mesh-wide mode, if this is the mesh-wide resource. Any other demands something that is not built yet, and to
/// ignore it would be to protect less than was asked for.
pub(super) fn peer_authentication(
    origin: &Origin,
    metadata: &Metadata,
    document: &[Pair],
    report: &mut Report,
) -> Option<MtlsMode> {
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata", "status"]);
    for key in metadata.annotations.keys().chain(metadata.labels.keys()).filter(|key| key.starts_with(OUR_PREFIX)) {
        top.error(report, "metadata", format!("{key} means nothing on this kind of resource"), "remove it");
    }
    let before = report.errors.len();
    let unsupported = "would be ignored by this version of Marline, which knows one mesh-wide mode only";
    let hint = "set the mode for the whole mesh, in a PeerAuthentication in istio-system without selector";
    if metadata.sound && metadata.namespace != ROOT_NAMESPACE {
        let what = format!("a mode for the namespace {} alone {unsupported}", metadata.namespace);
        top.error(report, "metadata.namespace", what, hint);
    }
    let mut mode = None;
    if let Some(mut spec) = top.fields(report, "spec") {
        if let Some(mut selector) = spec.fields(report, "selector") {
            if !selector.texts(report, "matchLabels").is_empty() {
                selector.error(report, "matchLabels", format!("a mode for some workloads {unsupported}"), hint);
            }
            selector.finish(report, Unknown::Error);
        }
        let no_ports = |node: &Node| matches!(&node.value, Value::Map(pairs) if pairs.is_empty());
        if spec.take("portLevelMtls").is_some_and(|node| !no_ports(node)) {
            spec.error(report, "portLevelMtls", format!("a mode for some ports {unsupported}"), hint);
        }
        if let Some(mut mtls) = spec.fields(report, "mtls") {
            let modes = [
                ("STRICT", MtlsMode::Strict),
                ("PERMISSIVE", MtlsMode::Permissive),
                ("DISABLE", MtlsMode::Disable),
                // Nothing is above the mesh to inherit from.
                ("UNSET", MtlsMode::default()),
            ];
            mode = mtls.choice(report, "mode", &modes);
            mtls.finish(report, Unknown::Error);
        }
        spec.finish(report, Unknown::Error);
    }
    top.finish(report, Unknown::Error);
    (metadata.sound && report.errors.len() == before).then_some(mode.unwrap_or_default())
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
