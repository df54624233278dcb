//! A small mesh to try policies on: the cast of Istio's own examples, loaded through the configuration as users do.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use marline::{
    config::{self, ConfigErrors, Loaded},
    identity::SpiffeId,
    policy::{Attempt, MtlsMode, Peer, Verdict, Workload},
};
use tempfile::TempDir;

const AGENT: &str =
    "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nspec:\n  ca: {path: ca}\n  capture: {cgroup: /c}\n";

/// Namespace, name, service account, address, labels. The namespace `legacy` is out of the mesh.
const CAST: &[(&str, &str, &str, &str, &str)] = &[
    ("foo", "httpbin", "httpbin", "10.0.1.1", "app: httpbin, version: v1"),
    ("foo", "sleep", "sleep", "10.0.1.2", "app: sleep"),
    ("foo", "tcp-echo", "default", "10.0.1.4", "app: tcp-echo"),
    ("foo", "finance", "finance", "10.0.1.3", "app: finance"),
    ("bar", "httpbin", "httpbin", "10.0.2.1", "app: httpbin, version: v1"),
    ("bar", "sleep", "sleep", "10.0.2.2", "app: sleep"),
    ("legacy", "httpbin", "httpbin", "10.0.3.1", "app: httpbin, marline.io/mesh: disabled"),
    ("legacy", "sleep", "sleep", "10.0.3.2", "app: sleep, marline.io/mesh: disabled"),
    ("default", "productpage", "bookinfo-productpage", "10.0.4.1", "app: productpage, version: v1"),
    ("default", "reviews", "bookinfo-reviews", "10.0.4.2", "app: reviews, version: v3"),
    ("default", "sleep", "sleep", "10.0.4.3", "app: sleep"),
    ("default", "mongodb", "default", "10.0.4.4", "app: mongodb"),
    ("default", "ratings", "bookinfo-ratings-v2", "10.0.4.5", "app: ratings, version: v2"),
    ("istio-system", "ingress", "istio-ingressgateway-service-account", "10.0.5.1", "app: istio-ingressgateway"),
    ("my-ns", "foo", "foo", "10.0.6.1", "app: foo, stage: prod"),
    ("my-ns", "other", "other", "fd00::6", "app: other"),
];

pub struct Bed {
    pub loaded: Loaded,
}

impl Bed {
    pub fn new(policies: &str) -> Self {
        let loaded = load(policies).unwrap_or_else(|errors| panic!("refused:\n{errors}\n{policies}"));
        Self { loaded }
    }

    pub fn workload(&self, name: &str) -> &Arc<Workload> {
        let found = self.loaded.snapshot.workloads().iter().find(|workload| workload.to_string() == name);
        found.unwrap_or_else(|| panic!("nobody is called {name}"))
    }

    pub fn mode(&self, workload: &str, port: u16) -> MtlsMode {
        self.loaded.snapshot.policies.authentication.mode(self.workload(workload), port)
    }

    /// What is decided of a call, once all is known of it, and by whose word.
    ///
    /// The source is a workload (`foo/sleep`; in mTLS if it is in the mesh), one that speaks plaintext (`~foo/sleep`), an address
    /// (`ip:1.2.3.4`) or a proved identity (`id:td/ns/a/sa/b`, `id:td/ns/a/sa/b@1.2.3.4`). The destination is a workload and
    /// a port (`foo/httpbin:80`), or one of its addresses (`foo/httpbin@1.2.3.4:80`).
    pub fn decide(&self, source: &str, destination: &str) -> Verdict<'_> {
        let (destination, local) = self.destination(destination);
        let (from, id) = self.source(source);
        let sni = format!("outbound_.{}_._.{}", local.port(), destination.host);
        let peer = match &id {
            Some(id) => Peer::Proved { id, sni: Some(&sni) },
            None => Peer::Nobody,
        };
        let authorization = &self.loaded.snapshot.policies.authorization;
        let early = Attempt { source: from, destination: local, peer: Peer::NotYetKnown };
        let early = authorization.decide(destination, &early).verdict;
        let decided = authorization.decide(destination, &Attempt { peer, source: from, destination: local }).verdict;
        assert_ne!(decided, Verdict::Open, "{source} to {destination}: all is known");
        match early {
            Verdict::Open => {}
            early => assert_eq!(
                matches!(early, Verdict::Denied(_)),
                matches!(decided, Verdict::Denied(_)),
                "{source} to {destination}: what is decided before the handshake stays"
            ),
        }
        decided
    }

    pub fn destination(&self, text: &str) -> (&Arc<Workload>, SocketAddr) {
        let (place, port) = text.rsplit_once(':').unwrap();
        let (name, address) = match place.split_once('@') {
            Some((name, address)) => (name, Some(address.parse().unwrap())),
            None => (place, None),
        };
        let workload = self.workload(name);
        (workload, SocketAddr::new(address.unwrap_or(workload.addresses[0]), port.parse().unwrap()))
    }

    pub fn source(&self, text: &str) -> (IpAddr, Option<SpiffeId>) {
        if let Some(address) = text.strip_prefix("ip:") {
            return (address.parse().unwrap(), None);
        }
        if let Some(id) = text.strip_prefix("id:") {
            let (id, address) = id.split_once('@').unwrap_or((id, "192.0.2.1"));
            return (address.parse().unwrap(), Some(format!("spiffe://{id}").parse().unwrap()));
        }
        let workload = self.workload(text.trim_start_matches('~'));
        let id = (workload.in_mesh && !text.starts_with('~')).then(|| workload.id.clone());
        (workload.addresses[0], id)
    }

    /// Field and message of each warning.
    pub fn warnings(&self) -> Vec<String> {
        let text = |finding: &config::Finding| {
            format!("{}: {}", finding.field.as_deref().unwrap_or_default(), finding.message)
        };
        self.loaded.warnings.iter().map(text).collect()
    }
}

pub fn load(policies: &str) -> Result<Loaded, ConfigErrors> {
    load_files(&[policies])
}

/// Each text as a file of its own, named in this order.
pub fn load_files(policies: &[&str]) -> Result<Loaded, ConfigErrors> {
    load_as("cluster.local", policies)
}

pub fn load_as(trust_domain: &str, policies: &[&str]) -> Result<Loaded, ConfigErrors> {
    config::load(directory(trust_domain, policies).path())
}

/// A configuration of the agent, the cast, and the policies.
pub fn directory(trust_domain: &str, policies: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("agent.yaml"), format!("{AGENT}  trustDomain: {trust_domain}\n")).unwrap();
    fs::write(dir.path().join("cast.yaml"), cast()).unwrap();
    for (n, text) in policies.iter().enumerate() {
        fs::write(dir.path().join(format!("policy-{n:03}.yaml")), text).unwrap();
    }
    dir
}

fn cast() -> String {
    let entry = |(namespace, name, account, address, labels): &(&str, &str, &str, &str, &str)| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
             metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n\
             spec: {{address: \"{address}\", serviceAccount: {account}}}\n---\n"
        )
    };
    CAST.iter().map(entry).collect()
}
