//! A small mesh to try policies on: the cast of Istio's own examples, loaded through the configuration as users do.

use std::{fs, sync::Arc};

use marline::{
    config::{self, ConfigErrors, Loaded},
    policy::{MtlsMode, Workload},
};

const AGENT: &str =
    "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nspec:\n  ca: {path: ca}\n  capture: {cgroup: /c}\n";

/// Namespace, name, service account, address, labels. The namespace `legacy` is out of the mesh.
const CAST: &[(&str, &str, &str, &str, &str)] = &[
    ("foo", "httpbin", "httpbin", "10.0.1.1", "app: httpbin, version: v1"),
    ("foo", "sleep", "sleep", "10.0.1.2", "app: sleep"),
    ("foo", "finance", "finance", "10.0.1.3", "app: finance"),
    ("bar", "httpbin", "httpbin", "10.0.2.1", "app: httpbin, version: v1"),
    ("bar", "sleep", "sleep", "10.0.2.2", "app: sleep"),
    ("legacy", "httpbin", "httpbin", "10.0.3.1", "app: httpbin, marline.io/mesh: disabled"),
    ("legacy", "sleep", "sleep", "10.0.3.2", "app: sleep, marline.io/mesh: disabled"),
    ("default", "productpage", "bookinfo-productpage", "10.0.4.1", "app: productpage, version: v1"),
    ("default", "reviews", "bookinfo-reviews", "10.0.4.2", "app: reviews, version: v3"),
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
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("agent.yaml"), format!("{AGENT}  trustDomain: {trust_domain}\n")).unwrap();
    fs::write(dir.path().join("cast.yaml"), cast()).unwrap();
    for (n, text) in policies.iter().enumerate() {
        fs::write(dir.path().join(format!("policy-{n:03}.yaml")), text).unwrap();
    }
    config::load(dir.path())
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
