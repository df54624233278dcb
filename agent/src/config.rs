//! Configuration: a directory of Istio's YAML and of Marline's own, read as a whole into a snapshot, or refused as a
//! whole with every error named. The same code reads at the start and at every change; noticing changes is
//! `control::files`'s.

mod agent;
mod assemble;
mod authorization;
mod behind;
mod ca_lists;
mod ca_server;
mod destinations;
mod document;
mod fields;
mod finding;
mod objects;
mod policies;
mod resources;
mod services;
mod single;
mod unsupported;

use std::{
    collections::HashMap,
    fs, io, mem,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use agent::{
    AccessLogConfig, AccessLogFilter, AccessLogFormat, AgentConfig, CaConfig, CaSource, CaptureConfig, CniConfig,
    DirectConfig, DirectMode, KubernetesConfig, PumpMode, RecordsConfig, RecordsMode, SpareMode, Timeouts, TlsConfig,
};
pub use ca_lists::{Network, Placements, TokenEntry, load_ca_nodes, load_ca_tokens};
pub use ca_server::{
    ApiServer, CaCluster, CaFiles, CaLimits, CaServerConfig, Keeping, KubernetesReview, load_ca_server,
};
pub use finding::{ConfigErrors, Finding};
pub use objects::{Compiled, Object, ObjectKind, compile};

use crate::{
    identity::TrustDomains,
    policy::{
        Authentication, Authorization, AuthorizationPolicy, DestinationRule, DestinationRules, PeerAuthentication,
        Policies, PolicyName,
    },
    state::{Snapshot, Source},
};
use document::{Node, Pair, Value};
use finding::{Origin, Report, about_file};
use resources::WorkloadEntry;
use services::ServiceResource;
use unsupported::unsupported;

/// A hundred thousand workloads are 20 MB.
const LARGEST_FILE: u64 = 256 << 20;

/// A sound configuration.
#[derive(Debug)]
pub struct Loaded {
    pub agent: AgentConfig,
    pub snapshot: Snapshot,
    pub warnings: Vec<Finding>,
}

/// Sound policies, and the workloads that they are for.
#[derive(Debug)]
pub struct LoadedPolicies {
    pub snapshot: Snapshot,
    pub warnings: Vec<Finding>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Agent,
    Policies,
}

/// Reads every `*.yaml`, `*.yml` and `*.json` of `dir`. Hidden files are left out: in a mounted ConfigMap they are the
/// versions behind the visible ones.
pub fn load(dir: &Path) -> Result<Loaded, ConfigErrors> {
    read(dir, None)
}

/// Reads the directory for its policies: an AgentConfig may be missing, and all else must be sound.
pub fn load_policies(dir: &Path) -> Result<LoadedPolicies, ConfigErrors> {
    let (_, snapshot, report) = read_all(dir, None, Need::Policies);
    match report.errors.is_empty() {
        true => Ok(LoadedPolicies { snapshot, warnings: report.into_warnings() }),
        false => Err(report.into_errors()),
    }
}

/// Reads the directory again, for an agent that runs: identities stay in the trust domain that it runs with, as a new
/// one takes a restart.
pub fn reload(dir: &Path, running: &AgentConfig) -> Result<Loaded, ConfigErrors> {
    let aliases = running.trust.domains.aliases().iter().cloned();
    read(dir, Some(&TrustDomains::new(running.trust_domain.clone(), aliases)))
}

/// The files that make up the configuration, in the order of their names.
pub(crate) fn configuration_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if is_configuration(&path) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a regular file: a pipe would keep the agent waiting for ever.
pub(crate) fn read_file(file: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(file)?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if metadata.len() > LARGEST_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {LARGEST_FILE} bytes")));
    }
    fs::read(file)
}

fn read(dir: &Path, domains: Option<&TrustDomains>) -> Result<Loaded, ConfigErrors> {
    match read_all(dir, domains, Need::Agent) {
        (Some(agent), mut snapshot, report) if report.errors.is_empty() => {
            let warnings = report.into_warnings();
            snapshot.warnings = warnings.iter().map(ToString::to_string).collect();
            Ok(Loaded { agent, snapshot, warnings })
        }
        (_, _, report) => Err(report.into_errors()),
    }
}

/// The snapshot is good for nothing if the report holds errors.
fn read_all(dir: &Path, domains: Option<&TrustDomains>, need: Need) -> (Option<AgentConfig>, Snapshot, Report) {
    let mut documents = Documents::default();
    match configuration_files(dir) {
        Err(error) => {
            let hint = "give the directory that holds the agent's YAML files";
            documents.report.errors.push(about_file(dir, None, format!("cannot be read: {error}"), hint));
        }
        Ok(files) if files.is_empty() => {
            let hint = "put at least an AgentConfig there";
            documents.report.errors.push(about_file(
                dir,
                None,
                "holds no *.yaml, *.yml or *.json file".to_owned(),
                hint,
            ));
        }
        Ok(files) => {
            for file in files {
                documents.read_file(dir, &file);
            }
            documents.check_agents(dir, need);
        }
    }
    let mut report = mem::take(&mut documents.report);
    let mut names = HashMap::new();
    for origin in mem::take(&mut documents.named) {
        assemble::unique_name(&mut names, origin, &mut report);
    }
    let agent = mem::take(&mut documents.agents).into_iter().next().and_then(|(_, agent)| agent);
    // Without a sound AgentConfig nothing is loaded, but the contradictions among workloads shall be told as well.
    let domains = domains.or(agent.as_ref().map(|agent| &agent.trust.domains)).cloned().unwrap_or_default();
    documents.name_as_here(&domains);
    let policies = documents.policies(&domains, &names, &mut report);
    let mut snapshot = assemble::snapshot(&domains, policies, &documents.workloads, &documents.services, &mut report);
    let source = |Origin { file, line, resource }| Source { resource, file, line };
    snapshot.sources = names.into_values().map(source).collect();
    (agent, snapshot, report)
}

fn is_configuration(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let known = ["yaml", "yml", "json"];
    !hidden && path.extension().is_some_and(|extension| known.iter().any(|known| extension.eq_ignore_ascii_case(known)))
}

/// Resources by `KIND NAMESPACE/NAME`.
type Names = HashMap<Arc<str>, Origin>;

/// What files hold, document by document; as much as one thread has read, or all together.
#[derive(Default)]
struct Documents {
    /// Of resources whose names are to be unique.
    named: Vec<Origin>,
    /// Without a configuration if one was there and could not be read.
    agents: Vec<(Origin, Option<AgentConfig>)>,
    peers: Vec<PeerAuthentication>,
    authorizations: Vec<AuthorizationPolicy>,
    workloads: Vec<WorkloadEntry>,
    services: Vec<ServiceResource>,
    destinations: Vec<DestinationRule>,
    report: Report,
}

impl Documents {
    fn read_file(&mut self, dir: &Path, file: &Path) {
        let text = match read_file(file).map(String::from_utf8) {
            Err(error) => {
                let hint = "make it readable to the agent, or remove it";
                self.report.errors.push(about_file(file, None, format!("cannot be read: {error}"), hint));
                return;
            }
            Ok(Err(error)) => {
                let line =
                    1 + error.as_bytes().iter().take(error.utf8_error().valid_up_to()).filter(|b| **b == b'\n').count();
                let message = "is not UTF-8 text".to_owned();
                self.report.errors.push(about_file(file, Some(line as u64), message, "save it as UTF-8"));
                return;
            }
            Ok(Ok(text)) => text,
        };
        let shared: Arc<Path> = file.into();
        let (parts, error) = document::parse(&text, |part: &mut Self, node| part.read_document(dir, &shared, &node));
        for part in parts {
            self.append(part);
        }
        if let Some(error) = error {
            let hint = "correct it; what follows in this file was not read";
            let message = format!("is not valid YAML: {}", error.message);
            self.report.errors.push(about_file(file, error.line, message, hint));
        }
    }

    fn append(&mut self, mut part: Self) {
        self.named.append(&mut part.named);
        self.agents.append(&mut part.agents);
        self.peers.append(&mut part.peers);
        self.authorizations.append(&mut part.authorizations);
        self.workloads.append(&mut part.workloads);
        self.services.append(&mut part.services);
        self.destinations.append(&mut part.destinations);
        self.report.append(part.report);
    }

    fn read_document(&mut self, dir: &Path, file: &Arc<Path>, node: &Node) {
        let Value::Map(document) = &node.value else {
            let message = format!("expected a resource, found {}", node.value.kind());
            let hint = "write apiVersion, kind, metadata and spec";
            self.report.errors.push(about_file(file, Some(node.line), message, hint));
            return;
        };
        let (kind, version) = (text_of(document, "kind"), text_of(document, "apiVersion"));
        if kind == "List" && version == "v1" {
            self.read_list(dir, file, node.line, document);
            return;
        }
        let resource = resource_name(kind, document).into();
        let mut origin = Origin { file: Arc::clone(file), line: node.line, resource };
        let report = &mut self.report;
        if kind.is_empty() || version.is_empty() {
            let field = if kind.is_empty() { "kind" } else { "apiVersion" };
            origin.resource = "document".into();
            let hint = "write apiVersion and kind as texts at the top of each document".to_owned();
            report.errors.push(origin.finding(field, node.line, "is missing or no text".to_owned(), hint));
            return;
        }
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        match (kind, group, version) {
            ("AgentConfig", "marline.io", "v1alpha1") => {
                let agent = agent::read(dir, &origin, document, report);
                self.agents.push((origin, agent));
                return;
            }
            ("WorkloadEntry", "networking.istio.io", "v1" | "v1beta1" | "v1alpha3") => {
                let metadata = resources::metadata(&origin, document, report);
                self.workloads.extend(resources::workload_entry(&origin, metadata, document, report));
            }
            ("ServiceEntry", "networking.istio.io", "v1" | "v1beta1" | "v1alpha3") => {
                let metadata = resources::metadata(&origin, document, report);
                self.services.extend(services::service_entry(&origin, metadata, document, report));
            }
            ("DestinationRule", "networking.istio.io", "v1" | "v1beta1" | "v1alpha3") => {
                let metadata = resources::metadata(&origin, document, report);
                self.destinations.extend(destinations::destination_rule(&origin, metadata, document, report));
            }
            ("Service", "", "v1") => {
                let metadata = resources::metadata(&origin, document, report);
                self.services.extend(services::service(&origin, metadata, document, report));
            }
            ("PeerAuthentication", "security.istio.io", "v1" | "v1beta1") => {
                let metadata = resources::metadata(&origin, document, report);
                self.peers.extend(policies::peer_authentication(&origin, metadata, document, report));
            }
            ("AuthorizationPolicy", "security.istio.io", "v1" | "v1beta1") => {
                let metadata = resources::metadata(&origin, document, report);
                self.authorizations.extend(authorization::authorization_policy(&origin, metadata, document, report));
            }
            _ => {
                let (message, hint) = unsupported(kind, group, version);
                report.errors.push(origin.finding("", node.line, message, hint));
                return;
            }
        }
        self.named.push(origin);
    }

    /// What `kubectl get -o yaml` prints.
    fn read_list(&mut self, dir: &Path, file: &Arc<Path>, line: u64, document: &[Pair]) {
        match document.iter().find(|pair| pair.key == "items").map(|pair| &pair.value.value) {
            Some(Value::List(items)) => {
                for item in items {
                    self.read_document(dir, file, item);
                }
            }
            _ => {
                let hint = "write the resources below items, or as documents of their own";
                self.report.errors.push(about_file(
                    file,
                    Some(line),
                    "a List without a list of items".to_owned(),
                    hint,
                ));
            }
        }
    }

    /// Who may answer for services, by the names that workloads have here: an alias means the same mesh.
    fn name_as_here(&mut self, domains: &TrustDomains) {
        let rules = self.destinations.iter_mut();
        let traffic = rules.flat_map(|rule| std::iter::once(&mut rule.traffic).chain(rule.ports.values_mut()));
        let named = traffic.map(|traffic| &mut Arc::make_mut(traffic).identities);
        let services = self.services.iter_mut().map(|service| &mut service.identities);
        for id in named.chain(services).flatten() {
            *id = domains.canonical(id);
        }
    }

    /// Compiles the policies, and tells which of them an older one makes void.
    fn policies(&mut self, domains: &TrustDomains, names: &Names, report: &mut Report) -> Policies {
        let authentication = Authentication::compile(mem::take(&mut self.peers));
        for (void, first) in authentication.superseded() {
            let message = format!("has no effect: {first} is older and says the mode already");
            let hint = "keep one of them for the whole namespace (or mesh); the oldest counts, then the first by name";
            tell_void(names, void, message, hint, report);
        }
        let destinations = DestinationRules::compile(mem::take(&mut self.destinations));
        for (void, first) in destinations.superseded() {
            let message = format!("has no effect: {first} is older, and for the same host and clients");
            tell_void(names, void, message, "keep one of them; the oldest counts, then the first by name", report);
        }
        let authorization = Authorization::compile(domains, mem::take(&mut self.authorizations));
        Policies { authentication, authorization, destinations }
    }

    fn check_agents(&mut self, dir: &Path, need: Need) {
        let report = &mut self.report;
        let Some(((first, _), others)) = self.agents.split_first() else {
            if need == Need::Policies {
                return;
            }
            let hint = "add one: apiVersion marline.io/v1alpha1, spec.ca.path, spec.capture.cgroup";
            report.errors.push(about_file(dir, None, "holds no resource of kind AgentConfig".to_owned(), hint));
            return;
        };
        if let Some((agent, Some(AgentConfig { kubernetes: Some(_), .. }))) = self.agents.first()
            && need == Need::Agent
        {
            for origin in &self.named {
                let message =
                    format!("is beside spec.kubernetes of {}: all resources come from the API server", agent.place());
                let hint = "give it to the API server and remove it here, or remove spec.kubernetes".to_owned();
                report.errors.push(origin.finding("", origin.line, message, hint));
            }
        }
        for (origin, _) in others {
            let message = format!("there is another AgentConfig in {}", first.place());
            report.errors.push(origin.finding("kind", origin.line, message, "keep one of them".to_owned()));
        }
    }
}

fn tell_void(names: &Names, name: &PolicyName, message: String, hint: &str, report: &mut Report) {
    if let Some(origin) = names.get(name.to_string().as_str()) {
        report.warnings.push(origin.finding("metadata.name", origin.line, message, hint.to_owned()));
    }
}

fn text_of<'a>(document: &'a [Pair], key: &str) -> &'a str {
    match document.iter().find(|pair| pair.key == key).map(|pair| &pair.value.value) {
        Some(Value::Text(text)) => text,
        _ => "",
    }
}

/// `KIND NAMESPACE/NAME` as far as they can be read; the agent's own resource has no namespace.
fn resource_name(kind: &str, document: &[Pair]) -> String {
    let metadata = match document.iter().find(|pair| pair.key == "metadata").map(|pair| &pair.value.value) {
        Some(Value::Map(metadata)) => metadata.as_slice(),
        _ => &[],
    };
    let name = match text_of(metadata, "name") {
        "" => assemble::UNNAMED,
        name => name,
    };
    match (kind, text_of(metadata, "namespace")) {
        ("AgentConfig" | "CaServer" | "CaTokens" | "CaNodes", _) => format!("{kind} {name}"),
        (_, "") => format!("{kind} {}/{name}", resources::DEFAULT_NAMESPACE),
        (_, namespace) => format!("{kind} {namespace}/{name}"),
    }
}
