//! What becomes of a configuration directory: sound ones load, every fault of a bad one is named.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{fs, net::IpAddr, path::Path, time::Duration};

use marline::{
    config::{self, AccessLogFilter, AccessLogFormat, CaSource, ConfigErrors, Finding, Loaded, PumpMode, RecordsMode},
    policy::MtlsMode,
};
use proptest::prelude::*;
use tempfile::TempDir;

const AGENT: &str = "apiVersion: marline.io/v1alpha1
kind: AgentConfig
metadata: {name: node}
spec:
  ca: {path: ca}
  capture: {cgroup: /sys/fs/cgroup/pods}
";

fn directory(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn load(files: &[(&str, &str)]) -> Result<Loaded, ConfigErrors> {
    config::load(directory(files).path())
}

/// Loads `text` beside a sound AgentConfig.
fn with_agent(text: &str) -> Result<Loaded, ConfigErrors> {
    load(&[("agent.yaml", AGENT), ("more.yaml", text)])
}

fn entry(name: &str, address: &str, more_metadata: &str, more_spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: {name}\n{more_metadata}\
         spec:\n  address: \"{address}\"\n{more_spec}---\n"
    )
}

fn file_name(finding: &Finding) -> &str {
    finding.file.file_name().unwrap().to_str().unwrap()
}

#[test]
fn the_example_of_two_nodes_loads_and_means_what_it_says() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/example");
    for (node, local, remote) in [("node-a", "client", "web"), ("node-b", "web", "client")] {
        let loaded = config::load(&example.join(node)).unwrap_or_else(|errors| panic!("{node}:\n{errors}"));
        assert_eq!(loaded.warnings, [], "{node}");
        let snapshot = &loaded.snapshot;
        assert_eq!(snapshot.policies.authentication.mesh_mode(), MtlsMode::Permissive);
        assert_eq!(snapshot.local.len(), 1, "{node}: a dual-stack pod is one pod");
        let pod = &snapshot.local[0];
        assert_eq!(pod.workload.addresses.len(), 2);
        assert_eq!(pod.workload.id.to_string(), format!("spiffe://cluster.local/ns/shop/sa/{local}"));
        assert_eq!(pod.workload.host, format!("{local}.shop.svc.cluster.local"));
        assert_eq!(pod.netns, Path::new("/run/netns").join(local));
        for (name, addresses) in [("client", ["10.10.1.2", "fd00:10:1::2"]), ("web", ["10.10.2.2", "fd00:10:2::2"])] {
            for address in addresses {
                let workload = snapshot.workload(address.parse().unwrap()).unwrap();
                assert_eq!((workload.service_account.as_str(), workload.in_mesh), (name, true), "{address}");
            }
        }
        assert!(!snapshot.workload(IpAddr::from([10, 10, 2, 3])).unwrap().in_mesh);
        assert!(snapshot.local_identities().iter().all(|id| id.service_account() != remote));
        // The comments promise that what is written there are the defaults.
        let defaults = load(&[("agent.yaml", AGENT)]).unwrap().agent;
        assert_eq!(loaded.agent.changed_fields(&defaults), ["spec.ca", "spec.capture.cgroup"]);
    }
}

#[test]
fn every_setting_of_the_agent_is_read() {
    let dir = directory(&[(
        "a.yml",
        "apiVersion: marline.io/v1alpha1
kind: AgentConfig
spec:
  trustDomain: example.org
  ca: {path: /etc/ca, leafLifetime: 1h30m}
  capture: {cgroup: /cg, pinPath: /bpf/x}
  records: {mode: kernel, requireKtls: true}
  pump: copy
  admin: {address: \"[::1]:1\"}
  metrics: {address: \"0.0.0.0:2\"}
  readiness: {address: \"127.0.0.1:3\"}
  accessLog:
    path: /var/log/x
    format: text
    sample: 2.5%
    filter:
      directions: [inbound]
      verdicts: [allowed, refused]
      modes: [mtls]
      paths: [proxied, direct]
      namespaces: [shop]
      workloads: [shop/web, db]
      minDuration: 1s
      minBytes: 1Ki
  timeouts: {connect: 1s, handshake: 2500ms, deadPeer: 3m}
",
    )]);
    let agent = config::load(dir.path()).unwrap().agent;
    assert_eq!(agent.trust_domain.as_str(), "example.org");
    assert_eq!(agent.ca.source, CaSource::Embedded("/etc/ca".into()));
    assert_eq!(agent.ca.leaf_lifetime, Duration::from_secs(5_400));
    assert_eq!((agent.capture.cgroup.to_str(), agent.capture.pin_path.to_str()), (Some("/cg"), Some("/bpf/x")));
    assert_eq!(
        (agent.records.mode, agent.records.require_ktls, agent.pump),
        (RecordsMode::Kernel, true, PumpMode::Copy)
    );
    assert_eq!((agent.admin.port(), agent.metrics.port(), agent.readiness.port()), (1, 2, 3));
    assert_eq!(agent.access_log.path.as_deref(), Some(Path::new("/var/log/x")));
    assert_eq!((agent.access_log.format, agent.access_log.sample), (AccessLogFormat::Text, 0.025));
    let filter = AccessLogFilter {
        directions: vec!["inbound"],
        verdicts: vec!["allowed", "refused"],
        modes: vec!["mtls"],
        paths: vec!["proxied", "direct"],
        namespaces: vec!["shop".into()],
        workloads: vec!["shop/web".into(), "db".into()],
        min_duration: Duration::from_secs(1),
        min_bytes: 1024,
    };
    assert_eq!(agent.access_log.filter, filter);
    assert_eq!(agent.timeouts.connect, Duration::from_secs(1));
    assert_eq!(agent.timeouts.handshake, Duration::from_millis(2_500));
    assert_eq!(agent.timeouts.dead_peer, Duration::from_secs(180));
}

#[test]
fn a_relative_ca_lies_in_the_configuration_directory() {
    let dir = directory(&[("a.yaml", AGENT)]);
    assert_eq!(config::load(dir.path()).unwrap().agent.ca.source, CaSource::Embedded(dir.path().join("ca")));
}

#[test]
fn json_multi_document_yaml_and_what_kubectl_prints_are_read_alike() {
    let list = "{\n\t\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n\t{\"apiVersion\": \"networking.istio.io/v1beta1\",\
        \"kind\": \"WorkloadEntry\", \"metadata\": {\"name\": \"a\", \"uid\": \"1\", \"creationTimestamp\": \"2024-01-01T00:00:00Z\"},\
        \"spec\": {\"address\": \"10.0.0.1\"}, \"status\": {}}]}";
    let yaml = format!("{AGENT}---\n---\n{}{}", entry("b", "10.0.0.2", "", ""), entry("c", "::ffff:10.0.0.3", "", ""));
    let loaded = load(&[("x.json", list), ("y.yaml", &yaml)]).unwrap();
    assert_eq!(loaded.warnings, []);
    for (address, name) in [([10, 0, 0, 1], "a"), ([10, 0, 0, 2], "b"), ([10, 0, 0, 3], "c")] {
        let workload = loaded.snapshot.workload(address.into()).unwrap();
        assert_eq!(workload.name, name);
        assert_eq!(workload.id.to_string(), "spiffe://cluster.local/ns/default/sa/default");
    }
}

#[test]
fn other_files_and_hidden_ones_are_no_configuration() {
    let dir = directory(&[("a.yaml", AGENT), ("notes.txt", "kind: [")]);
    fs::create_dir(dir.path().join("..2024_01_01")).unwrap();
    fs::write(dir.path().join(".hidden.yaml"), "kind: [").unwrap();
    fs::create_dir(dir.path().join("ca")).unwrap();
    config::load(dir.path()).unwrap();
}

#[test]
fn the_mesh_wide_mode_is_the_one_in_the_root_namespace() {
    let policy = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: default, namespace: istio-system}}\n{spec}"
        )
    };
    let cases = [
        ("spec: {mtls: {mode: STRICT}}", MtlsMode::Strict),
        ("spec: {mtls: {mode: PERMISSIVE}}", MtlsMode::Permissive),
        ("spec: {mtls: {mode: DISABLE}}", MtlsMode::Disable),
        ("spec: {mtls: {mode: UNSET}}", MtlsMode::Permissive),
        ("spec: {selector: {matchLabels: {}}, portLevelMtls: {}, mtls: {mode: STRICT}}", MtlsMode::Strict),
        ("spec: {}", MtlsMode::Permissive),
        ("", MtlsMode::Permissive),
    ];
    for (spec, mode) in cases {
        let loaded = with_agent(&policy(spec)).unwrap_or_else(|errors| panic!("{spec}:\n{errors}"));
        assert_eq!(loaded.snapshot.policies.authentication.mesh_mode(), mode, "{spec}");
    }
    let nothing_said = load(&[("a.yaml", AGENT)]).unwrap().snapshot.policies;
    assert_eq!(nothing_said.authentication.mesh_mode(), MtlsMode::Permissive);
}

#[test]
fn labels_decide_who_is_in_the_mesh_and_who_is_enrolled() {
    let netns = |name: &str| format!("  annotations: {{marline.io/netns: /run/netns/{name}}}\n");
    let text = [
        entry("in", "10.0.0.1", &netns("in"), ""),
        entry("out", "10.0.0.2", &netns("out"), "  labels: {marline.io/mesh: disabled}\n"),
        // Istio merges the labels of both places and prefers the metadata's.
        entry(
            "both",
            "10.0.0.3",
            &format!("  labels: {{marline.io/mesh: enabled}}\n{}", netns("both")),
            "  labels: {marline.io/mesh: disabled, app: x}\n",
        ),
    ]
    .concat();
    let snapshot = with_agent(&text).unwrap().snapshot;
    let enrolled: Vec<&str> = snapshot.local.iter().map(|pod| pod.workload.name.as_str()).collect();
    assert_eq!(enrolled, ["both", "in"]);
    let find = |last: u8| snapshot.workload(IpAddr::from([10, 0, 0, last])).unwrap();
    assert!(find(1).in_mesh && !find(2).in_mesh && find(3).in_mesh);
    assert_eq!(find(3).labels.get("app"), Some("x"));
}

#[test]
fn fields_without_effect_are_warned_of_by_name() {
    let spec = "  ports: {http: 80}\n  network: n\n  locality: r/z\n  weight: 3\n  serviceAccount: web\n";
    let loaded = with_agent(&entry("a", "10.0.0.1", "  wrong: 1\n", spec)).unwrap();
    let warned: Vec<_> = loaded.warnings.iter().map(|w| (w.field.as_deref().unwrap(), w.line.unwrap())).collect();
    assert_eq!(warned, [("metadata.wrong", 5), ("spec.network", 9), ("spec.weight", 11)]);
    for warning in &loaded.warnings {
        assert_eq!((file_name(warning), warning.resource.as_deref()), ("more.yaml", Some("WorkloadEntry default/a")));
    }
}

/// Each fault: the document, and then file, line, field and a part of the message that must be reported, and nothing
/// else must be.
#[test]
fn every_fault_is_named_with_file_line_field_and_reason() {
    let pa = |metadata: &str, spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: x, {metadata}}}\nspec: {spec}\n"
        )
    };
    let netns = |path: &str| format!("  annotations: {{marline.io/netns: {path}}}\n");
    let agent = |spec: &str| {
        format!(
            "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nspec:\n  ca: {{path: ca}}\n  capture: {{cgroup: /c}}\n{spec}"
        )
    };
    type Fault = (u64, &'static str, &'static str);
    let beside_agent: Vec<(String, Vec<Fault>)> = vec![
        ("kind: [".into(), vec![(1, "", "not valid YAML")]),
        ("a: 1\na: 2".into(), vec![(2, "", "not valid YAML")]),
        ("- a".into(), vec![(1, "", "expected a resource, found a list")]),
        ("hello".into(), vec![(1, "", "expected a resource, found a text")]),
        ("kind: WorkloadEntry".into(), vec![(1, "apiVersion", "missing")]),
        ("apiVersion: v1\nkind: 7".into(), vec![(1, "kind", "missing or no text")]),
        ("apiVersion: v1\nkind: List".into(), vec![(1, "", "without a list of items")]),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: s}".into(), vec![(1, "", "not known")]),
        (
            "# moved\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: s}".into(),
            vec![(2, "", "tokens would go unchecked")],
        ),
        (
            "apiVersion: networking.istio.io/v2\nkind: WorkloadEntry\nmetadata: {name: s}".into(),
            vec![(1, "", "version v2")],
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: s}".into(),
            vec![(1, "", "not one of the group")],
        ),
        (agent(""), vec![(1, "kind", "another AgentConfig")]),
        (entry("a", "web.example.org", "", ""), vec![(6, "spec.address", "not an IP address")]),
        (entry("a", "unix:///run/x", "", ""), vec![(6, "spec.address", "Unix socket")]),
        (entry("a", "fe80::1%eth0", "", ""), vec![(6, "spec.address", "not an IP address")]),
        (entry("a", "10.0.0.1/32", "", ""), vec![(6, "spec.address", "not an IP address")]),
        (entry("a", "", "", ""), vec![(6, "spec.address", "missing or empty")]),
        (entry("a", "127.0.0.1", "", ""), vec![(6, "spec.address", "not an address that others can reach")]),
        (entry("a", "::", "", ""), vec![(6, "spec.address", "not an address that others can reach")]),
        (entry("a", "::ffff:224.0.0.1", "", ""), vec![(6, "spec.address", "not an address that others can reach")]),
        (entry("UPPER", "10.0.0.1", "", ""), vec![(4, "metadata.name", "Kubernetes")]),
        (
            entry("UPPER", "nowhere", "", "  x: 1\n"),
            vec![(4, "metadata.name", "Kubernetes"), (6, "spec.address", "not an IP"), (7, "spec.x", "not known")],
        ),
        (entry("7", "10.0.0.1", "", ""), vec![(4, "metadata.name", "must be a text, but is a number")]),
        (entry("a", "10.0.0.1", "  namespace: a.b\n", ""), vec![(5, "metadata.namespace", "Kubernetes")]),
        (entry("a", "10.0.0.1", "", "  serviceAccount: ../x\n"), vec![(7, "spec.serviceAccount", "Kubernetes")]),
        (entry("a", "10.0.0.1", "", "  serviceAcount: x\n"), vec![(7, "spec.serviceAcount", "not known")]),
        (
            entry("a", "10.0.0.1", "", "  labels: {app: yes-or-no, v: 1}\n"),
            vec![(7, "spec.labels.v", "must be a text")],
        ),
        (
            entry("a", "10.0.0.1", "", "  labels: {marline.io/mesh: \"off\"}\n"),
            vec![(7, "spec.labels", "\"off\" is not known")],
        ),
        (
            entry("a", "10.0.0.1", "", "  labels: {marline.io/mehs: disabled}\n"),
            vec![(7, "spec.labels", "marline.io/mehs is not known")],
        ),
        (entry("a", "10.0.0.1", &netns("run/x"), ""), vec![(5, "metadata.annotations", "not an absolute path")]),
        (
            entry("a", "10.0.0.1", "  annotations: {marline.io/netsn: /run/x}\n", ""),
            vec![(5, "metadata.annotations", "marline.io/netsn is not known")],
        ),
        (
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n".into(),
            vec![(1, "metadata.name", "missing"), (1, "spec", "missing")],
        ),
        (
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: a}\nspce: {}\n".into(),
            vec![(1, "spec", "missing"), (4, "spce", "not known")],
        ),
        (
            [entry("a", "10.0.0.1", "", ""), entry("a", "10.0.0.2", "", "")].concat(),
            vec![(8, "metadata.name", "another of this kind and name in ")],
        ),
        (
            [entry("a", "10.0.0.1", "", ""), entry("b", "::ffff:10.0.0.1", "", "")].concat(),
            vec![(13, "spec.address", "10.0.0.1 is the address of WorkloadEntry default/a in ")],
        ),
        (
            [entry("a", "10.0.0.1", &netns("/n"), ""), entry("b", "fd00::1", &netns("/n"), "  serviceAccount: b\n")]
                .concat(),
            vec![(9, "spec.serviceAccount", "the same network namespace /n")],
        ),
        (
            [
                entry("a", "10.0.0.1", &netns("/n"), ""),
                entry(
                    "b",
                    "fd00::1",
                    &format!("  namespace: b\n{}", netns("/n")),
                    "  labels: {marline.io/mesh: disabled}\n",
                ),
            ]
            .concat(),
            vec![(9, "metadata.namespace", "the same network namespace"), (9, "labels", "the same network namespace")],
        ),
        (
            [
                entry("a", "10.0.0.1", &netns("/n"), "  labels: {app: a}\n"),
                entry("b", "fd00::1", &netns("/n"), "  labels: {app: b}\n"),
            ]
            .concat(),
            vec![(10, "labels", "the same network namespace /n")],
        ),
        (
            pa("namespace: shop", "{portLevelMtls: {80: {mode: DISABLE}}}"),
            vec![(4, "spec.portLevelMtls", "takes a selector")],
        ),
        (
            pa("namespace: shop", "{selector: {matchLabels: {app: x}}, portLevelMtls: {0: {mode: DISABLE}}}"),
            vec![(4, "spec.portLevelMtls", "\"0\" is not a port")],
        ),
        (
            pa("namespace: shop", "{selector: {matchLabels: {app: x}}, portLevelMtls: {http: {}, 80: STRICT}}"),
            vec![
                (4, "spec.portLevelMtls.80", "must be a mapping"),
                (4, "spec.portLevelMtls", "\"http\" is not a port"),
            ],
        ),
        (
            pa("namespace: shop", "{selector: {matchLabels: {app: x}}, portLevelMtls: {80: {mdoe: STRICT}}}"),
            vec![(4, "spec.portLevelMtls.80.mdoe", "not known")],
        ),
        (
            pa("namespace: shop", "{selector: {matchLabels: {app: \"x*\"}}, mtls: {mode: STRICT}}"),
            vec![(4, "spec.selector.matchLabels", "selects nothing")],
        ),
        (
            pa("namespace: shop", "{selector: {matchExpressions: []}, mtls: {mode: STRICT}}"),
            vec![(4, "spec.selector.matchExpressions", "not known")],
        ),
        (
            pa("creationTimestamp: yesterday", "{mtls: {mode: STRICT}}"),
            vec![(3, "metadata.creationTimestamp", "is not a time")],
        ),
        (
            pa("labels: {marline.io/mesh: disabled}", "{mtls: {mode: STRICT}}"),
            vec![(3, "metadata", "means nothing on this kind")],
        ),
        (
            pa("namespace: istio-system", "{mtls: {mode: strict}}"),
            vec![(4, "spec.mtls.mode", "\"strict\" is not known")],
        ),
        (pa("namespace: istio-system", "{mtls: {mode: 3}}"), vec![(4, "spec.mtls.mode", "must be a text")]),
        (pa("namespace: istio-system", "{mtls: STRICT}"), vec![(4, "spec.mtls", "must be a mapping")]),
        (pa("namespace: istio-system", "{mtsl: {mode: STRICT}}"), vec![(4, "spec.mtsl", "not known")]),
    ];
    let alone: Vec<(String, Vec<Fault>)> = vec![
        ("apiVersion: marline.io/v1alpha1\nkind: AgentConfig\n".into(), vec![(1, "spec", "missing")]),
        (
            "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nspec: {}\n".into(),
            vec![(3, "spec.ca.path", "missing"), (3, "spec.capture.cgroup", "missing")],
        ),
        (
            "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nspec: {ca: {path: 1}, capture: {cgroup: x}}\n".into(),
            vec![
                (3, "spec.ca.path", "must be a text, but is a number"),
                (3, "spec.capture.cgroup", "not an absolute path"),
            ],
        ),
        (agent("  trustDomain: Cluster.Local\n"), vec![(6, "spec.trustDomain", "holds 'C'")]),
        (agent("  records: kernal\n"), vec![(6, "spec.records", "\"kernal\" is not known")]),
        (
            agent("  records: {mode: userspace, requireKtls: true}\n"),
            vec![(6, "spec.records.requireKtls", "contradicts mode userspace")],
        ),
        (agent("  records: {mode: auto, requireKtl: true}\n"), vec![(6, "spec.records.requireKtl", "not known")]),
        (agent("  records: {requireKtls: \"true\"}\n"), vec![(6, "spec.records.requireKtls", "must be true or false")]),
        (agent("  pump: spice\n"), vec![(6, "spec.pump", "\"spice\" is not known")]),
        (agent("  admin: {address: localhost:1}\n"), vec![(6, "spec.admin.address", "not an address with a port")]),
        (
            agent("  metrics: {address: \"127.0.0.1:15000\"}\n"),
            vec![(6, "spec.metrics", "is the address of admin too")],
        ),
        (agent("  admin: {address: \"0.0.0.0:15000\"}\n"), vec![(6, "spec.admin", "can be reached from other hosts")]),
        (agent("  admin: {address: \"10.0.0.1:15000\"}\n"), vec![(6, "spec.admin", "can be reached from other hosts")]),
        (agent("  admin: {address: \"[::]:15000\"}\n"), vec![(6, "spec.admin", "can be reached from other hosts")]),
        (agent("  accessLog: {sample: 10}\n"), vec![(6, "spec.accessLog.sample", "must be a text")]),
        (agent("  accessLog: {sample: 101%}\n"), vec![(6, "spec.accessLog.sample", "is not a share")]),
        (agent("  accessLog: {sample: NaN%}\n"), vec![(6, "spec.accessLog.sample", "is not a share")]),
        (agent("  accessLog: {smaple: 10%}\n"), vec![(6, "spec.accessLog.smaple", "not known")]),
        (agent("  accessLog: {filter: {mode: [mtls]}}\n"), vec![(6, "spec.accessLog.filter.mode", "not known")]),
        (
            agent("  accessLog: {filter: {verdicts: [denied]}}\n"),
            vec![(6, "spec.accessLog.filter.verdicts", "\"denied\" is not known")],
        ),
        (
            agent("  accessLog: {filter: {minBytes: lots, minDuration: 5}}\n"),
            vec![
                (6, "spec.accessLog.filter.minDuration", "must be a text"),
                (6, "spec.accessLog.filter.minBytes", "not a number of bytes"),
            ],
        ),
        (agent("  accessLog: {path: log.json}\n"), vec![(6, "spec.accessLog.path", "not an absolute path")]),
        (agent("  timeouts:\n    connect: 10\n"), vec![(7, "spec.timeouts.connect", "must be a text")]),
        (agent("  timeouts:\n    deadPeer: 10ms\n"), vec![(7, "spec.timeouts.deadPeer", "too short")]),
        (agent("  timeouts:\n    handshake: 1 hour\n"), vec![(7, "spec.timeouts.handshake", "not a duration")]),
        (agent("  nothing: 1\nstatus: {}\n"), vec![(6, "spec.nothing", "not known")]),
    ];
    let runs = beside_agent.iter().map(|(text, faults)| (with_agent(text), text, faults, "more.yaml"));
    let runs = runs.chain(alone.iter().map(|(text, faults)| (load(&[("a.yaml", text)]), text, faults, "a.yaml")));
    for (result, text, faults, file) in runs {
        let errors = result.err().unwrap_or_else(|| panic!("accepted:\n{text}"));
        let found: Vec<_> = errors
            .errors
            .iter()
            .map(|e| (e.line.unwrap_or_default(), e.field.as_deref().unwrap_or_default()))
            .collect();
        let expected: Vec<_> = faults.iter().map(|(line, field, _)| (*line, *field)).collect();
        assert_eq!(found, expected, "{text}\n{errors}");
        for (error, (_, _, part)) in errors.errors.iter().zip(faults) {
            assert!(error.message.contains(part), "{:?} does not say {part:?}", error.message);
            assert_eq!(file_name(error), file);
            assert!(!error.hint.is_empty());
        }
        assert_eq!(errors.to_string().lines().count(), faults.len(), "one line each:\n{errors}");
    }
}

#[test]
fn the_errors_of_all_files_are_listed_at_once() {
    let dir = directory(&[
        ("1.yaml", &entry("a", "nowhere", "", "  serviceAccount: \"no good\"\n")),
        ("2.yaml", &format!("{}{}", entry("b", "10.0.0.1", "", "  x: 1\n"), "kind: [")),
        ("4.yaml", AGENT),
    ]);
    fs::write(dir.path().join("3.yaml"), b"a: \xff\n").unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("5.yaml")).unwrap();
    fs::create_dir(dir.path().join("6.yaml")).unwrap();
    // A pipe that nobody writes to would keep a careless reader for ever.
    assert!(std::process::Command::new("mkfifo").arg(dir.path().join("7.yaml")).status().unwrap().success());
    fs::File::create(dir.path().join("8.yaml")).unwrap().set_len(1 << 30).unwrap();
    let errors = config::load(dir.path()).unwrap_err();
    let files: Vec<&str> = errors.errors.iter().map(file_name).collect();
    assert_eq!(
        files,
        ["1.yaml", "1.yaml", "2.yaml", "2.yaml", "3.yaml", "5.yaml", "6.yaml", "7.yaml", "8.yaml"],
        "{errors}"
    );
    let json = serde_json::to_value(&errors).unwrap();
    assert_eq!(json["errors"][0]["field"], "spec.address");
    assert_eq!(json["errors"][0]["line"], 6);
}

#[test]
fn a_directory_without_an_agent_is_refused() {
    let missing = config::load(Path::new("/nonexistent/marline")).unwrap_err();
    assert!(missing.to_string().contains("cannot be read"), "{missing}");
    let empty = load(&[]).unwrap_err();
    assert!(empty.to_string().contains("holds no *.yaml"), "{empty}");
    let headless = load(&[("a.yaml", &entry("a", "10.0.0.1", "", ""))]).unwrap_err();
    assert!(headless.to_string().contains("no resource of kind AgentConfig"), "{headless}");
    assert_eq!(headless.errors.len(), 1);
}

#[test]
fn contradictions_are_told_even_without_a_sound_agent() {
    let workloads = [entry("a", "10.0.0.1", "", ""), entry("b", "10.0.0.1", "", "")].concat();
    let agent = AGENT.replace("cgroup: /", "cgroup: ");
    let errors = load(&[("a.yaml", &agent), ("w.yaml", &workloads)]).unwrap_err();
    let fields: Vec<_> = errors.errors.iter().map(|error| error.field.as_deref().unwrap()).collect();
    assert_eq!(fields, ["spec.capture.cgroup", "spec.address"]);
}

#[test]
fn a_slip_of_the_finger_is_answered_with_the_right_word() {
    let errors = with_agent(&entry("a", "10.0.0.1", "", "  serviceAcount: x\n")).unwrap_err();
    assert!(errors.to_string().contains("did you mean serviceAccount?"), "{errors}");
}

#[test]
fn names_cannot_forge_lines_of_the_report() {
    let text = "apiVersion: v1\nkind: \"Secret\\n/etc/x:1: forged\\e[31m\"\nmetadata: {name: \"a\\rb\"}\n";
    let errors = with_agent(text).unwrap_err();
    let shown = errors.to_string();
    assert_eq!(shown.lines().count(), 1, "{shown}");
    assert!(!shown.chars().any(char::is_control), "{shown:?}");
}

#[test]
fn a_reload_keeps_the_trust_domain_that_the_agent_runs_with() {
    let dir = directory(&[("a.yaml", AGENT), ("w.yaml", &entry("a", "10.0.0.1", "", ""))]);
    let running = config::load(dir.path()).unwrap().agent;
    fs::write(dir.path().join("a.yaml"), AGENT.replace("spec:", "spec:\n  trustDomain: other.org\n  pump: copy"))
        .unwrap();
    let loaded = config::reload(dir.path(), &running).unwrap();
    assert_eq!(running.changed_fields(&loaded.agent), ["spec.trustDomain", "spec.pump"]);
    assert_eq!(*loaded.snapshot.trust_domains.own(), running.trust_domain);
    assert_eq!(loaded.snapshot.workloads()[0].id.trust_domain(), &running.trust_domain);
}

fn yaml_like() -> impl Strategy<Value = String> {
    let words = "apiVersion|kind|metadata|spec|name|namespace|labels|annotations|AgentConfig|WorkloadEntry|PeerAuthentication|\
        List|items|v1|marline.io/v1alpha1|networking.istio.io/v1|security.istio.io/v1|istio-system|mtls|mode|STRICT|address|\
        10.0.0.1|serviceAccount|marline.io/netns|/n|ca|path|capture|cgroup|records|timeouts|connect|10s|null|true|1|1e9|\\.\\.";
    let marks = "|: |:\n  |\n|\n- |\n---\n|\\[|\\]|\\{|\\}|, |\"|'|&a |\\*a|!!str |#| \\||>|\t|\\\\|  ";
    proptest::collection::vec(proptest::string::string_regex(&format!("({words}{marks})")).unwrap(), 0..60)
        .prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let dir = directory(&[("agent.yaml", AGENT)]);
        fs::write(dir.path().join("x.yaml"), bytes).unwrap();
        let _ = config::load(dir.path());
    }

    #[test]
    fn no_yaml_makes_the_reader_panic_and_each_error_is_one_line(text in yaml_like(), as_agent in any::<bool>()) {
        let result = if as_agent { load(&[("a.yaml", &text)]) } else { with_agent(&text) };
        if let Err(errors) = result {
            prop_assert!(!errors.errors.is_empty());
            prop_assert_eq!(errors.to_string().lines().count(), errors.errors.len());
        }
    }

    #[test]
    fn no_mutation_of_a_sound_file_makes_the_reader_panic(at in any::<proptest::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let sound = format!("{AGENT}---\n{}", entry("a", "10.0.0.1", "  annotations: {marline.io/netns: /n}\n", "  labels: {a: b}\n"));
        let mut bytes = sound.into_bytes();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] = byte }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x.yaml"), bytes).unwrap();
        let _ = config::load(dir.path());
    }

    #[test]
    fn the_order_of_files_never_matters(order in Just([0usize, 1, 2, 3]).prop_shuffle()) {
        let parts = [AGENT.to_owned(), entry("a", "10.0.0.1", "", ""), entry("b", "10.0.0.2", "", ""), entry("c", "10.0.0.3", "", "")];
        let files: Vec<(String, &str)> = order.iter().enumerate().map(|(n, part)| (format!("{n}.yaml"), parts[*part].as_str())).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), *text)).collect();
        let snapshot = load(&files).unwrap().snapshot;
        for (last, name) in [(1, "a"), (2, "b"), (3, "c")] {
            prop_assert_eq!(&snapshot.workload(IpAddr::from([10, 0, 0, last])).unwrap().name, name);
        }
    }
}

#[test]
fn trust_is_read_and_what_is_wrong_with_it_is_named() {
    let with = |lines: &str| {
        let agent = AGENT.replace("spec:", &format!("spec:\n{lines}"));
        let dir = directory(&[("a.yaml", &agent)]);
        config::load(dir.path()).map(|loaded| loaded.agent).map_err(|errors| errors.to_string())
    };
    let agent = with(
        "  trust:\n    aliases: [old.example, older.example]\n    federated:\n    - {trustDomain: other.example, bundle: other.pem}\n    crl: /etc/crl.pem\n  tls: {pqcOnly: true}",
    )
    .unwrap();
    assert_eq!(agent.trust.domains.to_string(), "cluster.local, old.example, older.example");
    assert!(agent.trust.federated[0].1.ends_with("other.pem") && agent.trust.federated[0].1.is_absolute());
    assert_eq!(agent.trust.crl.as_deref(), Some(std::path::Path::new("/etc/crl.pem")));
    assert!(agent.tls.pqc_only);
    for (lines, says) in [
        ("  trust: {aliases: [cluster.local]}", "spec.trust.aliases"),
        ("  trust: {aliases: [a.org, a.org]}", "a.org is there twice"),
        ("  trust: {aliases: [A]}", "spec.trust.aliases"),
        ("  trust: {federated: [{trustDomain: cluster.local, bundle: a}]}", "its roots are those in spec.ca.path"),
        (
            "  trustDomain: td2\n  trust: {federated: [{trustDomain: cluster.local, bundle: a}]}",
            "policies that name cluster.local mean this mesh",
        ),
        ("  trust: {federated: [{trustDomain: a.org}]}", "bundle"),
        (
            "  trust: {federated: [{trustDomain: a.org, bundle: a}, {trustDomain: a.org, bundle: b}]}",
            "a.org has a bundle already",
        ),
        ("  trust: {roots: a}", "spec.trust.roots"),
        ("  tls: {pqcOnly: perhaps}", "spec.tls.pqcOnly"),
    ] {
        let refusal = with(lines).unwrap_err();
        assert!(refusal.contains(says), "{lines}: {refusal}");
    }
}

#[test]
fn certificates_come_from_one_place_and_what_is_wrong_with_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let with = |ca: &str| {
        let text = format!(
            "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nspec:\n  ca: {ca}\n  capture: {{cgroup: /c}}\n"
        );
        fs::write(dir.path().join("agent.yaml"), text).unwrap();
        config::load(dir.path()).map(|loaded| loaded.agent.ca.source).map_err(|errors| errors.to_string())
    };
    let remote = "{address: 'https://istiod.istio-system.svc:15012', rootCert: root.pem, tokenFile: /var/token, clusterId: Kubernetes}";
    let CaSource::Remote(settings, roots) = with(remote).unwrap() else { panic!("not a CA elsewhere") };
    assert_eq!(settings.address, "istiod.istio-system.svc:15012");
    assert_eq!((settings.server_name, settings.cluster_id.as_deref()), (None, Some("Kubernetes")));
    assert_eq!((settings.token, roots), ("/var/token".into(), dir.path().join("root.pem")));
    for socket in ["unix:///run/spire/agent.sock", "unix:/run/spire/agent.sock"] {
        let read = with(&format!("{{workloadApi: '{socket}'}}")).unwrap();
        assert_eq!(read, CaSource::WorkloadApi("/run/spire/agent.sock".into()), "{socket}");
    }
    for (ca, says) in [
        ("{}", "spec.ca.path"),
        ("{path: ca, address: 'https://a:1', rootCert: r, tokenFile: t}", "spec.ca.address"),
        ("{path: ca, workloadApi: 'unix:///s'}", "keep path, address or workloadApi"),
        ("{address: 'http://a:1', rootCert: r, tokenFile: t}", "is not encrypted"),
        ("{address: 'https://a', rootCert: r, tokenFile: t}", "is not an address of a CA"),
        ("{address: 'https://u@a:1', rootCert: r, tokenFile: t}", "is not an address of a CA"),
        ("{address: 'https://a:1/path', rootCert: r, tokenFile: t}", "is not an address of a CA"),
        ("{address: 'a:1', rootCert: r, tokenFile: t}", "write https://HOST:PORT"),
        ("{address: 'https://a:1', tokenFile: t}", "spec.ca.rootCert"),
        ("{address: 'https://a:1', rootCert: r}", "spec.ca.tokenFile"),
        ("{path: ca, tokenFile: t}", "spec.ca.tokenFile"),
        ("{workloadApi: 'tcp://127.0.0.1:8081'}", "spec.ca.workloadApi"),
        ("{workloadApi: 'unix:agent.sock'}", "spec.ca.workloadApi"),
    ] {
        let refusal = with(ca).unwrap_err();
        assert!(refusal.contains(says), "{ca}: {refusal}");
    }
}
