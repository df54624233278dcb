//! Istio's resources one by one, as an API server hands them out, and what those that are there mean together. A directory with one wrong
//! file is refused as a whole; a cluster cannot be: whoever may write to one namespace would hold up all others. So what cannot be read
//! denies where it would have had a say, until it is mended. Fetching them is `control::kubernetes`'s.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use serde_json::Value as Json;

use super::{
    Documents, authorization, behind, destinations,
    document::{Node, Pair, Value},
    finding::{Finding, Origin, Report},
    policies, resources, services,
};
use crate::{
    identity::{SpiffeId, TrustDomain, TrustDomains},
    policy::{
        AuthorizationPolicy, ClientTls, DestinationRule, Header, Labels, PeerAuthentication, Policies, PolicyName,
        Service, Traffic, Workload,
        authorization::{Action, Rule},
    },
};

/// The kinds of Istio's resources that are acted on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ObjectKind {
    PeerAuthentication,
    AuthorizationPolicy,
    DestinationRule,
    ServiceEntry,
    WorkloadEntry,
}

/// One resource, read.
#[derive(Clone, PartialEq)]
pub struct Object {
    read: Read,
    /// Why it denies, if it does.
    pub errors: Vec<Finding>,
    pub warnings: Vec<Finding>,
}

#[derive(Clone, PartialEq)]
enum Read {
    Peer(PeerAuthentication),
    Authorization(AuthorizationPolicy),
    Destination(DestinationRule),
    Service(Arc<services::ServiceResource>),
    Workload(Arc<resources::WorkloadEntry>),
    /// It cannot be read, not even whom it is about.
    Nothing,
}

/// What all objects mean together. The workloads of WorkloadEntries are beside those that were known already.
pub struct Compiled {
    pub workloads: Vec<Arc<Workload>>,
    pub services: Vec<Arc<Service>>,
    pub findings: Vec<Finding>,
}

impl ObjectKind {
    pub const ALL: [Self; 5] = [
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
        Self::DestinationRule,
        Self::ServiceEntry,
        Self::WorkloadEntry,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::DestinationRule => "DestinationRule",
            Self::ServiceEntry => "ServiceEntry",
            Self::WorkloadEntry => "WorkloadEntry",
        }
    }
}

impl Object {
    /// Reads one. Its namespace and name are those that the API server knows it by.
    pub fn read(kind: ObjectKind, namespace: &str, name: &str, object: &Json) -> Self {
        let resource: Arc<str> = format!("{} {namespace}/{name}", kind.as_str()).into();
        let origin = Origin { file: Arc::from(Path::new("kubernetes")), line: 0, resource };
        let (mut report, mut read) = (Report::default(), None);
        match tree(object, 0) {
            Some(Node { value: Value::Map(mut document), .. }) => {
                without_capture(&mut document);
                read = read_map(kind, &origin, &document, &mut report);
            }
            _ => {
                let (message, hint) = ("is no resource, or is nested too deeply", "write it anew");
                report.errors.push(origin.finding("", 0, message.to_owned(), hint.to_owned()));
            }
        }
        let placeless = |findings: Vec<Finding>| -> Vec<Finding> {
            findings.into_iter().map(|finding| Finding { line: None, ..finding }).collect()
        };
        let read = read.unwrap_or_else(|| denying(kind, &origin, namespace, name, object));
        Self { read, errors: placeless(report.errors), warnings: placeless(report.warnings) }
    }
}

/// Policies alone: they are the same for as long as no policy changes.
impl Policies {
    pub fn of_objects<'a>(domains: &TrustDomains, objects: impl Iterator<Item = &'a Object>) -> Self {
        let mut documents = Documents::default();
        for object in objects {
            match &object.read {
                Read::Peer(policy) => documents.peers.push(policy.clone()),
                Read::Authorization(policy) => documents.authorizations.push(policy.clone()),
                Read::Destination(rule) => documents.destinations.push(rule.clone()),
                Read::Service(_) | Read::Workload(_) | Read::Nothing => {}
            }
        }
        documents.name_as_here(domains);
        documents.policies(domains, &HashMap::new(), &mut Report::default())
    }
}

/// The workloads and services of ServiceEntries and WorkloadEntries, in the order of `objects`. An address that is `taken` stays whose it
/// is: whoever may write a WorkloadEntry or ServiceEntry shall not stand in for a pod or a Service.
pub fn compile<'a>(
    domains: &TrustDomains,
    objects: impl Iterator<Item = &'a Object>,
    pods: &[Arc<Workload>],
    taken: &dyn Fn(IpAddr) -> bool,
) -> Compiled {
    let (mut entries, mut resources, mut findings) = (Vec::new(), Vec::new(), Vec::new());
    let mut addresses: HashSet<IpAddr> = HashSet::new();
    let refuse = |origin: &Origin, address: IpAddr| {
        let message = format!("{address} is the address of a pod, a Service or another entry too, and stays theirs");
        let hint = "an address belongs to one: correct or remove one of the two".to_owned();
        Finding { line: None, ..origin.finding("spec", 0, message, hint) }
    };
    for object in objects {
        match &object.read {
            Read::Workload(entry) if taken(entry.address) || !addresses.insert(entry.address) => {
                findings.push(refuse(&entry.origin, entry.address));
            }
            Read::Workload(entry) => entries.push(resources::WorkloadEntry::clone(entry)),
            Read::Service(resource) => {
                let mut resource = services::ServiceResource::clone(resource);
                for id in &mut resource.identities {
                    *id = domains.canonical(id);
                }
                resources.push(resource);
            }
            _ => {}
        }
    }
    for resource in &mut resources {
        let origin = resource.origin.clone();
        resource.addresses.retain(|address| {
            let free = !taken(*address) && addresses.insert(*address);
            if !free {
                findings.push(refuse(&origin, *address));
            }
            free
        });
    }
    let mut report = Report::default();
    let workload = |entry: &resources::WorkloadEntry| super::assemble::workload(domains.own(), &[entry], &mut report);
    let workloads: Vec<_> = entries.iter().filter_map(workload).collect();
    let all: Vec<_> = if resources.is_empty() { Vec::new() } else { [pods, &workloads].concat() };
    let services = behind::services(&resources, &entries, &all, &mut report);
    findings.extend(report.errors.into_iter().map(|finding| Finding { line: None, ..finding }));
    Compiled { workloads, services, findings }
}

fn read_map(kind: ObjectKind, origin: &Origin, document: &[Pair], report: &mut Report) -> Option<Read> {
    let metadata = resources::metadata(origin, document, report);
    let read =
        match kind {
            ObjectKind::PeerAuthentication => {
                policies::peer_authentication(origin, metadata, document, report).map(Read::Peer)
            }
            ObjectKind::AuthorizationPolicy => {
                authorization::authorization_policy(origin, metadata, document, report).map(Read::Authorization)
            }
            ObjectKind::DestinationRule => {
                destinations::destination_rule(origin, metadata, document, report).map(Read::Destination)
            }
            ObjectKind::ServiceEntry => services::service_entry(origin, metadata, document, report)
                .map(|service| Read::Service(Arc::new(service))),
            ObjectKind::WorkloadEntry => resources::workload_entry(origin, metadata, document, report)
                .map(|entry| Read::Workload(Arc::new(entry))),
        };
    read.filter(|_| report.errors.is_empty())
}

/// A service account that no cluster can have: its name is none.
const NOBODY: &str = "_unreadable";

/// What an object that cannot be read means. A policy denies in all of its namespace, because its selector is not to be relied on; for the
/// host of a DestinationRule nobody may answer, nor at the address of a WorkloadEntry; at those of a ServiceEntry nothing listens.
/// Without them such an address would be a stranger's, who is spoken to in plaintext.
fn denying(kind: ObjectKind, origin: &Origin, namespace: &str, name: &str, object: &Json) -> Read {
    let policy = PolicyName { kind: kind.as_str(), namespace: namespace.to_owned(), name: name.to_owned() };
    // Of two the older counts, and this one must.
    let header = Header { name: policy, created: Some(Duration::ZERO), selector: Labels::default() };
    match kind {
        ObjectKind::PeerAuthentication | ObjectKind::AuthorizationPolicy => {
            let rules = vec![Rule::default()];
            Read::Authorization(AuthorizationPolicy { header, action: Action::Deny, dry_run: false, rules })
        }
        ObjectKind::DestinationRule => {
            let host = object.pointer("/spec/host").and_then(Json::as_str).filter(|host| !host.is_empty());
            let host = match host {
                None => "*".to_owned(),
                Some(host) if host.contains(['.', '*']) => host.to_owned(),
                Some(host) => Workload::host_of(host, namespace),
            };
            let nobody = TrustDomain::parse("nobody.marline.internal")
                .and_then(|domain| SpiffeId::new(&domain, "nobody", "nobody"))
                .into_iter()
                .collect();
            let traffic =
                Arc::new(Traffic { tls: Some(ClientTls::IstioMutual), identities: nobody, ..Traffic::default() });
            let (ports, subsets) = Default::default();
            Read::Destination(DestinationRule { header, host, exported_to: None, traffic, ports, subsets })
        }
        ObjectKind::WorkloadEntry => {
            let address = object.pointer("/spec/address").and_then(Json::as_str).and_then(|text| text.parse().ok());
            address.map_or(Read::Nothing, |address| {
                Read::Workload(Arc::new(resources::WorkloadEntry {
                    origin: origin.clone(),
                    name: name.to_owned(),
                    namespace: namespace.to_owned(),
                    service_account: NOBODY.to_owned(),
                    address,
                    address_line: 0,
                    labels: Labels::default(),
                    in_mesh: true,
                    netns: None,
                    ports: BTreeMap::default(),
                    zone: None,
                }))
            })
        }
        ObjectKind::ServiceEntry => {
            let texts = |pointer| object.pointer(pointer).and_then(Json::as_array).into_iter().flatten();
            let hosts = texts("/spec/hosts").filter_map(Json::as_str).map(str::to_owned).collect();
            let addresses = texts("/spec/addresses").filter_map(Json::as_str).filter_map(|text| text.parse().ok());
            let addresses: Vec<IpAddr> = addresses.collect();
            if addresses.is_empty() {
                return Read::Nothing;
            }
            Read::Service(Arc::new(services::ServiceResource {
                origin: origin.clone(),
                namespace: namespace.to_owned(),
                hosts,
                addresses,
                ports: Vec::new(),
                behind: services::Behind::Nothing,
                identities: Vec::new(),
                internal: true,
            }))
        }
    }
}

/// What is captured on a node is not for objects to say that anybody with a right to one namespace can write. And what an API server adds
/// may be large and is of no concern.
fn without_capture(document: &mut [Pair]) {
    let metadata = document.iter_mut().find(|pair| pair.key == "metadata");
    let Some(Pair { value: Node { value: Value::Map(metadata), .. }, .. }) = metadata else { return };
    for pair in metadata.iter_mut().filter(|pair| pair.key == "annotations") {
        if let Value::Map(annotations) = &mut pair.value.value {
            annotations.retain(|annotation| annotation.key != resources::NETNS);
        }
    }
}

/// Nothing if it is deeper than a resource can be.
fn tree(json: &Json, depth: usize) -> Option<Node> {
    const DEPTH: usize = 32;
    if depth > DEPTH {
        return None;
    }
    let value = match json {
        Json::Null => Value::Null,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => match number.as_i128() {
            Some(integer) => Value::Integer(integer),
            None => Value::Float(number.as_f64()?),
        },
        Json::String(text) => Value::Text(text.clone()),
        Json::Array(list) => Value::List(list.iter().map(|node| tree(node, depth + 1)).collect::<Option<_>>()?),
        Json::Object(map) => {
            // Large, and no reader wants it.
            let wanted = map.iter().filter(|(key, _)| *key != "managedFields");
            let pair = |(key, value): (&String, &Json)| {
                Some(Pair { key: key.clone(), line: 0, value: tree(value, depth + 1)? })
            };
            Value::Map(wanted.map(pair).collect::<Option<_>>()?)
        }
    };
    Some(Node { line: 0, value })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::policy::{self, Attempt, DenyReason, Inbound, Outbound, Peer, evaluate::Verdict};

    fn workload(namespace: &str) -> Workload {
        Workload {
            name: "web".into(),
            namespace: namespace.into(),
            service_account: "web".into(),
            id: SpiffeId::new(&TrustDomain::default(), namespace, "web").unwrap(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            in_mesh: true,
            labels: Labels::from([("app", "web")]),
            host: Workload::host_of("web", namespace),
        }
    }

    fn object(kind: ObjectKind, namespace: &str, spec: Json) -> Object {
        Object::read(kind, namespace, "p", &json!({"metadata": {"name": "p", "namespace": namespace}, "spec": spec}))
    }

    fn policies(object: Object) -> Policies {
        Policies::of_objects(&TrustDomains::default(), [object].iter())
    }

    fn denied(policies: &Policies, namespace: &str) -> bool {
        let id = SpiffeId::new(&TrustDomain::default(), "other", "client").unwrap();
        let attempt = Attempt {
            source: "10.0.0.9".parse().unwrap(),
            destination: "10.0.0.1:80".parse().unwrap(),
            peer: Peer::Proved { id: &id, sni: None },
        };
        matches!(policies.authorization.decide(&workload(namespace), &attempt).verdict, Verdict::Denied(_))
    }

    #[test]
    fn a_policy_that_cannot_be_read_denies_in_its_namespace_and_names_itself() {
        for (kind, spec) in [
            (ObjectKind::AuthorizationPolicy, json!({"action": "PERMIT"})),
            (ObjectKind::AuthorizationPolicy, json!({"rules": [{"fromm": []}]})),
            (ObjectKind::PeerAuthentication, json!({"mtls": {"mode": "STRIKT"}})),
        ] {
            let read = object(kind, "shop", spec);
            assert_eq!(read.errors.len(), 1, "{:?}", read.errors);
            assert!(read.errors[0].to_string().starts_with(&format!("kubernetes: {} shop/p", kind.as_str())));
            let policies = policies(read);
            assert!(denied(&policies, "shop") && !denied(&policies, "front"));
            let (local, client) = ("10.0.0.1:80".parse().unwrap(), "10.0.0.9".parse().unwrap());
            let Inbound::Deny(DenyReason::Rule(why)) =
                policy::inbound(&policies, &workload("shop"), local, client, None, false)
            else {
                panic!("not denied by its address alone")
            };
            assert!(why.contains("shop/p"), "{why}");
        }
        let mesh = policies(object(ObjectKind::PeerAuthentication, "istio-system", json!({"mtls": "STRICT"})));
        assert!(denied(&mesh, "shop") && denied(&mesh, "front"));
    }

    #[test]
    fn a_policy_that_can_be_read_means_what_it_says() {
        let strict = object(ObjectKind::PeerAuthentication, "shop", json!({"mtls": {"mode": "STRICT"}}));
        assert!(strict.errors.is_empty(), "{:?}", strict.errors);
        let policies = policies(strict);
        assert!(!denied(&policies, "shop"));
        assert_eq!(policies.authentication.mode(&workload("shop"), 80), policy::MtlsMode::Strict);
    }

    #[test]
    fn for_the_host_of_a_rule_that_cannot_be_read_nobody_may_answer() {
        let rule = object(
            ObjectKind::DestinationRule,
            "shop",
            json!({"host": "web", "trafficPolicy": {"tls": {"mode": "SIMPLE"}}}),
        );
        assert_eq!(rule.errors.len(), 1, "{:?}", rule.errors);
        let policies = policies(rule);
        let (client, host) = (workload("front"), Workload::host_of("web", "shop"));
        let found = policies.destinations.asked(&client, "shop", &host).next().unwrap();
        let traffic = found.traffic_at(80);
        let server = workload("shop");
        let towards = |endpoint| policy::towards(&policies, endpoint, 80, None, traffic);
        assert_eq!(towards(Some(&server)), Outbound::Mtls { expect: Vec::new() });
        let Outbound::Mtls { expect } = towards(None) else { panic!("plaintext") };
        assert!(expect.iter().all(|id| id.to_string().contains("nobody")), "{expect:?}");
    }

    #[test]
    fn an_entry_says_neither_what_is_captured_nor_stands_in_for_a_pod() {
        let entry = Object::read(
            ObjectKind::WorkloadEntry,
            "shop",
            "vm",
            &json!({"metadata": {"name": "vm", "namespace": "shop", "annotations": {"marline.io/netns": "/proc/1/ns/net"}},
                    "spec": {"address": "10.0.0.1"}}),
        );
        let Read::Workload(read) = &entry.read else { panic!("{:?}", entry.errors) };
        assert_eq!(read.netns, None);
        let domains = TrustDomains::default();
        let free = compile(&domains, [&entry].into_iter(), &[], &|_| false);
        assert_eq!((free.workloads.len(), free.findings.len()), (1, 0));
        let taken = compile(&domains, [&entry].into_iter(), &[], &|_| true);
        assert_eq!((taken.workloads.len(), taken.findings.len()), (0, 1));
    }

    #[test]
    fn the_addresses_of_an_entry_that_cannot_be_read_are_no_strangers() {
        let entry = object(ObjectKind::WorkloadEntry, "shop", json!({"address": "10.0.0.7", "serviceAccount": "A B"}));
        let service = object(
            ObjectKind::ServiceEntry,
            "shop",
            json!({"hosts": ["db.example"], "addresses": ["240.0.0.1"], "ports": "5432"}),
        );
        assert!(!entry.errors.is_empty() && !service.errors.is_empty());
        let domains = TrustDomains::default();
        let compiled = compile(&domains, [&entry, &service].into_iter(), &[], &|_| false);
        let [workload] = compiled.workloads.as_slice() else { panic!("{:?}", compiled.findings) };
        assert_eq!((workload.in_mesh, workload.addresses.clone()), (true, vec!["10.0.0.7".parse().unwrap()]));
        let policies = Policies::of_objects(&domains, [&entry, &service].into_iter());
        let Outbound::Mtls { expect } = policy::towards(&policies, Some(workload), 80, None, &Traffic::default())
        else {
            panic!("plaintext to a workload that cannot be read")
        };
        assert!(expect.iter().all(|id| id.service_account() == NOBODY), "{expect:?}");
        let [service] = compiled.services.as_slice() else { panic!("{:?}", compiled.findings) };
        assert!(service.ports.is_empty() && service.addresses == ["240.0.0.1".parse::<IpAddr>().unwrap()]);
        let to = "240.0.0.1:5432".parse().unwrap();
        assert_eq!(service.endpoints(to, None, |_| Some(0), 0).map(|found| found.len()), None, "nothing listens there");
        // A pod's address stays the pod's.
        assert_eq!(compile(&domains, [&entry].into_iter(), &[], &|_| true).workloads.len(), 0);
    }

    proptest! {
        #[test]
        fn no_object_makes_reading_it_panic(text in "\\PC*|[\\[\\]{}\":,a-z0-9]{0,60}") {
            let json = serde_json::from_str(&text).unwrap_or(json!({"metadata": text, "spec": [text]}));
            for kind in ObjectKind::ALL {
                let read = Object::read(kind, "shop", "p", &json);
                prop_assert!(!read.errors.is_empty());
            }
        }
    }
}
