//! Whose connection it is, in the labels of Istio's standard metrics. What is not known is `unknown`, as in Istio. Labels are made
//! from what the mesh's configuration and certificates say; nothing that a peer merely sends becomes one.

use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};

use super::table::Key;
use crate::{
    identity::SpiffeId,
    policy::{Service, Workload},
    state::Snapshot,
    words::{Direction, Endpoint, Mode},
};

const UNKNOWN: &str = "unknown";
/// For all that there is no room for.
const OTHER: &str = "other";

/// What is known of a connection when its labels are fixed.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    pub direction: Direction,
    pub source: &'a Endpoint,
    pub destination: &'a Endpoint,
    /// The service's host, if the application connected to one.
    pub service: Option<&'a str>,
    pub mode: Option<Mode>,
    /// Whom the peer's certificate proved.
    pub proved: Option<&'a SpiffeId>,
}

/// One end in Istio's labels.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct End {
    workload: String,
    namespace: String,
    principal: String,
    app: String,
    version: String,
    canonical_service: String,
    canonical_revision: String,
}

/// The labels of `istio_tcp_*`, without the response flags.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Flow {
    reporter: &'static str,
    policy: &'static str,
    source: End,
    destination: End,
    service: String,
    service_name: String,
    service_namespace: String,
}

/// A workload of this node and what its connections are: by this the share of mTLS is told.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Side {
    pub reporter: &'static str,
    pub namespace: String,
    pub workload: String,
    pub mode: &'static str,
}

/// A refusal by policy.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Denial {
    pub reporter: &'static str,
    pub policy: String,
    pub reason: &'static str,
}

impl Flow {
    pub fn new(snapshot: &Snapshot, seen: &Seen<'_>) -> Self {
        let mtls = seen.mode == Some(Mode::Mtls);
        let end = |end: &Endpoint, peer: bool| {
            let workload = end.address.and_then(|address| snapshot.workload(address.ip()));
            End::new(end, workload.map(|workload| &**workload), mtls, seen.proved.filter(|_| peer))
        };
        let inbound = seen.direction == Direction::Inbound;
        // A server's agent is not told which service was called; the endpoint's first one is the best guess, as in ztunnel.
        let guessed = || seen.destination.address.filter(|_| inbound).and_then(|at| snapshot.service_behind(at));
        let (service, service_name, service_namespace) = match (seen.service, guessed()) {
            (Some(host), _) => snapshot.service_of_host(host).map_or_else(|| unnamed(host), named),
            (None, Some(service)) => named(service),
            (None, None) => unnamed(UNKNOWN),
        };
        Self {
            reporter: reporter(seen.direction),
            policy: security_policy(seen.mode),
            source: end(seen.source, inbound),
            destination: end(seen.destination, !inbound),
            service,
            service_name,
            service_namespace,
        }
    }
}

impl End {
    fn new(end: &Endpoint, workload: Option<&Workload>, mtls: bool, proved: Option<&SpiffeId>) -> Self {
        let label =
            |names: &[&str]| names.iter().find_map(|name| workload?.labels.get(name)).filter(|value| !value.is_empty());
        let name = label(&["service.istio.io/workload-name"]).or(end.workload.as_deref());
        let namespace = end.namespace.as_deref().or(proved.map(SpiffeId::namespace));
        let canonical = label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]).or(name);
        let revision = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
        let revision = label(&revision).or(workload.map(|_| "latest"));
        Self {
            workload: owned(name),
            namespace: owned(namespace),
            // An address proves nothing: in plaintext nobody is a principal.
            principal: owned(end.identity.as_deref().filter(|_| mtls)),
            app: owned(label(&["app"])),
            version: owned(label(&["version"])),
            canonical_service: owned(canonical),
            canonical_revision: owned(revision),
        }
    }

    fn other() -> Self {
        let other = || OTHER.to_owned();
        Self {
            workload: other(),
            namespace: other(),
            principal: other(),
            app: other(),
            version: other(),
            canonical_service: other(),
            canonical_revision: other(),
        }
    }

    fn stands(&self, known: &dyn Fn(&str, &str) -> bool) -> bool {
        [UNKNOWN, OTHER].contains(&self.workload.as_str()) || known(&self.namespace, &self.workload)
    }
}

impl Key for Flow {
    fn overflow(&self) -> Self {
        let other = || OTHER.to_owned();
        Self {
            reporter: self.reporter,
            policy: self.policy,
            source: End::other(),
            destination: End::other(),
            service: other(),
            service_name: other(),
            service_namespace: other(),
        }
    }

    fn stands(&self, known: &dyn Fn(&str, &str) -> bool) -> bool {
        self.source.stands(known) && self.destination.stands(known)
    }
}

impl Side {
    /// Of the end that is on this node.
    pub fn new(snapshot: &Snapshot, seen: &Seen<'_>, mode: Mode) -> Self {
        let own = if seen.direction == Direction::Outbound { seen.source } else { seen.destination };
        let workload = own.address.and_then(|address| snapshot.workload(address.ip()));
        let end = End::new(own, workload.map(|workload| &**workload), false, None);
        Self {
            reporter: reporter(seen.direction),
            namespace: end.namespace,
            workload: end.workload,
            mode: mode.as_str(),
        }
    }
}

impl Side {
    /// The same workload's in the other mode.
    pub fn counterpart(&self) -> Self {
        let mode = if self.mode == Mode::Mtls.as_str() { Mode::Plaintext } else { Mode::Mtls };
        Self { mode: mode.as_str(), ..self.clone() }
    }
}

impl Key for Side {
    fn overflow(&self) -> Self {
        Self { namespace: OTHER.to_owned(), workload: OTHER.to_owned(), ..*self }
    }

    fn stands(&self, known: &dyn Fn(&str, &str) -> bool) -> bool {
        [UNKNOWN, OTHER].contains(&self.workload.as_str()) || known(&self.namespace, &self.workload)
    }
}

impl Key for Denial {
    fn overflow(&self) -> Self {
        Self { policy: OTHER.to_owned(), ..*self }
    }

    /// Policies that have gone are forgotten when room is short.
    fn stands(&self, _: &dyn Fn(&str, &str) -> bool) -> bool {
        true
    }
}

/// The name by which a workload is counted.
pub fn counted_as(workload: &Workload) -> &str {
    workload.labels.get("service.istio.io/workload-name").filter(|name| !name.is_empty()).unwrap_or(&workload.name)
}

/// With the response flags, as they are written.
pub struct Flagged<'a>(pub &'a Flow, pub &'static str);

impl EncodeLabelSet for Flagged<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let flow = self.0;
        let (source, destination) = (&flow.source, &flow.destination);
        let labels = [
            ("reporter", flow.reporter),
            ("source_workload", &source.workload),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", &source.principal),
            ("source_app", &source.app),
            ("source_version", &source.version),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.canonical_revision),
            ("source_cluster", UNKNOWN),
            ("destination_workload", &destination.workload),
            ("destination_workload_namespace", &destination.namespace),
            ("destination_principal", &destination.principal),
            ("destination_app", &destination.app),
            ("destination_version", &destination.version),
            ("destination_canonical_service", &destination.canonical_service),
            ("destination_canonical_revision", &destination.canonical_revision),
            ("destination_cluster", UNKNOWN),
            ("destination_service", &flow.service),
            ("destination_service_name", &flow.service_name),
            ("destination_service_namespace", &flow.service_namespace),
            ("request_protocol", "tcp"),
            ("response_flags", self.1),
            ("connection_security_policy", flow.policy),
        ];
        labels.encode(encoder)
    }
}

/// Istio's label: the source's side reports outbound connections, the destination's inbound ones.
pub fn reporter(direction: Direction) -> &'static str {
    if direction == Direction::Outbound { "source" } else { "destination" }
}

pub fn security_policy(mode: Option<Mode>) -> &'static str {
    match mode {
        Some(Mode::Mtls) => "mutual_tls",
        Some(Mode::Plaintext) => "none",
        None => UNKNOWN,
    }
}

fn owned(text: Option<&str>) -> String {
    text.unwrap_or(UNKNOWN).to_owned()
}

/// Host, name and namespace, as Istio writes them: a Service of Kubernetes by its name, any other by its host.
fn named(service: &Arc<Service>) -> (String, String, String) {
    let behind = format!(".{}.svc.", service.namespace);
    let name = service.host.split_once(&behind).map_or(service.host.as_str(), |(name, _)| name);
    (service.host.clone(), name.to_owned(), service.namespace.clone())
}

fn unnamed(host: &str) -> (String, String, String) {
    (host.to_owned(), host.to_owned(), UNKNOWN.to_owned())
}
