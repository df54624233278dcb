//! What a cluster means.

mod histories;
mod membership;

use std::path::PathBuf;

use serde_json::{Value as Json, json};

use super::{super::model::Update, super::objects::*, super::places::PodPlace, super::store::Change, *};
use crate::{config::ObjectKind, policy::ServiceEndpoint};

fn viewpoint() -> Viewpoint {
    Viewpoint { domains: TrustDomains::default(), node: "node-a".into() }
}

fn trimmed<T: Trimmed>(json: Json) -> Item<T> {
    T::trim(serde_json::from_value(json).unwrap(), &mut Names::default()).unwrap()
}

fn object(kind: ObjectKind, json: Json) -> Item<config::Object> {
    istio(kind, serde_json::from_value(json).unwrap(), &mut Names::default()).unwrap()
}

/// What each kind has in it.
#[derive(Default)]
struct Cluster {
    namespaces: Vec<Json>,
    pods: Vec<Json>,
    services: Vec<Json>,
    slices: Vec<Json>,
    policies: Vec<Json>,
}

impl Cluster {
    fn model(self) -> Model {
        let mut model = Model::default();
        fn list<T: Trimmed>(all: Vec<Json>) -> Change<T> {
            Change::Replace { items: all.into_iter().map(trimmed).collect(), version: Some(1) }
        }
        let node = json!({"metadata": {"name": "node-a", "labels": {REGION: "r", ZONE: "z-a"}}});
        model.apply(Update::Namespaces(list(self.namespaces)));
        model.apply(Update::Pods(list(self.pods)));
        model.apply(Update::Services(list(self.services)));
        model.apply(Update::EndpointSlices(list(self.slices)));
        assert!(!model.is_complete());
        model.apply(Update::Nodes(list(vec![node])));
        for kind in ObjectKind::ALL {
            let ours = if kind == ObjectKind::PeerAuthentication { &self.policies[..] } else { &[] };
            let items = ours.iter().map(|json| object(kind, json.clone())).collect();
            model.apply(Update::Istio(kind, Change::Replace { items, version: Some(1) }));
        }
        assert!(model.is_complete());
        model
    }

    fn compiled(self) -> (Snapshot, Facts) {
        compile(&mut self.model(), &viewpoint(), &Places::default())
    }
}

fn namespace(name: &str, enabled: bool) -> Json {
    let labels = if enabled { json!({MESH: "enabled"}) } else { json!({}) };
    json!({"metadata": {"name": name, "uid": name, "resourceVersion": "1", "labels": labels}})
}

fn pod(name: &str, change: impl FnOnce(&mut Json)) -> Json {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "foo", "uid": format!("uid-{name}"), "resourceVersion": "1",
                     "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": "web"}},
        "spec": {"nodeName": "node-a", "serviceAccountName": "web"},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
    });
    change(&mut pod);
    pod
}

fn addressed(name: &str, address: &str) -> Json {
    pod(name, |pod| pod["status"] = json!({"phase": "Running", "podIP": address}))
}

fn known(pods: Vec<Json>) -> (Vec<(String, bool)>, Facts) {
    let (snapshot, facts) = Cluster { namespaces: vec![namespace("foo", true)], pods, ..Cluster::default() }.compiled();
    (snapshot.workloads().iter().map(|workload| (workload.to_string(), workload.in_mesh)).collect(), facts)
}

#[test]
fn a_pod_counts_from_when_it_has_an_address_to_its_end() {
    let alone = |change: fn(&mut Json)| known(vec![pod("web", change)]).0;
    let there = vec![("foo/web".to_owned(), true)];
    assert_eq!(alone(|_| {}), there);
    assert_eq!(alone(|pod| pod["status"]["phase"] = json!("Pending")), there, "its init containers connect, too");
    assert_eq!(alone(|pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z")), there);
    assert_eq!(alone(|pod| pod["status"]["phase"] = json!("Succeeded")), []);
    assert_eq!(alone(|pod| pod["status"]["phase"] = json!("Failed")), []);
    assert_eq!(alone(|pod| pod["status"] = json!({"phase": "Running"})), []);
    assert_eq!(alone(|pod| pod["status"] = json!({"podIP": "127.0.0.1"})), []);
}

#[test]
fn enrolment_is_the_namespaces_and_the_pod_may_leave_it() {
    let labelled = |value: &str| known(vec![pod("web", |pod| pod["metadata"]["labels"][MESH] = json!(value))]);
    assert!(!labelled("disabled").0[0].1);
    let (workloads, facts) = labelled("nonsense");
    assert!(workloads[0].1, "what is not understood does not opt out");
    assert!(facts.warnings[0].contains("nonsense"), "{facts:?}");
    let elsewhere =
        Cluster { namespaces: vec![namespace("foo", false)], pods: vec![pod("web", |_| {})], ..Cluster::default() };
    assert!(!elsewhere.compiled().0.workloads()[0].in_mesh);
}

#[test]
fn who_a_pod_is_the_api_server_says_and_no_annotation() {
    let pod = pod("web", |pod| {
        pod["metadata"]["annotations"] = json!({"marline.io/netns": "/proc/1/ns/net", "serviceAccountName": "admin"});
        pod["metadata"]["labels"]["serviceAccountName"] = json!("admin");
    });
    let (snapshot, facts) =
        Cluster { namespaces: vec![namespace("foo", true)], pods: vec![pod], ..Cluster::default() }.compiled();
    assert_eq!(snapshot.workloads()[0].id.to_string(), "spiffe://cluster.local/ns/foo/sa/web");
    assert_eq!((snapshot.local.len(), facts.not_captured), (0, vec!["foo/web".to_owned()]));
}

#[test]
fn a_pod_in_the_nodes_network_is_reported_and_is_nobodys_workload() {
    let (workloads, facts) = known(vec![pod("web", |pod| pod["spec"]["hostNetwork"] = json!(true))]);
    assert_eq!((workloads, facts.host_network, facts.not_captured), (vec![], vec!["foo/web".to_owned()], vec![]));
}

#[test]
fn only_what_is_outside_of_the_mesh_is_let_go_and_what_has_ended_or_is_unknown_stays_closed() {
    let at = |name: &str| PathBuf::from(format!("/run/netns/{name}"));
    let places = Places::default();
    for name in ["served", "ended", "unknown", "outside", "late"] {
        places.tell(&format!("uid-{name}"), PodPlace { netns: at(name), ..PodPlace::default() });
    }
    let address = |address: &'static str| {
        move |pod: &mut Json| pod["status"] = json!({"phase": "Running", "podIPs": [{"ip": address}]})
    };
    let pods = |with_lost: bool| {
        let mut pods = vec![
            pod("served", address("10.0.0.2")),
            pod("ended", |pod| pod["status"]["phase"] = json!("Failed")),
            pod("outside", |pod| {
                address("10.0.0.3")(pod);
                pod["metadata"]["labels"][MESH] = json!("disabled");
            }),
            // Its address is a younger one's.
            pod("late", |pod| {
                address("10.0.0.2")(pod);
                pod["metadata"]["creationTimestamp"] = json!("2025-01-01T00:00:00Z");
            }),
        ];
        pods.extend(with_lost.then(|| pod("lost", address("10.0.0.4"))));
        Cluster { namespaces: vec![namespace("foo", true)], pods, ..Cluster::default() }
    };
    let (snapshot, _) = compile(&mut pods(false).model(), &viewpoint(), &places);
    assert_eq!(snapshot.local.iter().map(|local| local.netns.clone()).collect::<Vec<_>>(), [at("served")]);
    assert_eq!(snapshot.closed, [at("ended"), at("late"), at("unknown")]);
    assert!(!snapshot.unplaced);
    let (lost, _) = compile(&mut pods(true).model(), &viewpoint(), &places);
    assert!(lost.unplaced && !lost.describes_the_same_as(&snapshot));
}

#[test]
fn a_pod_is_captured_when_it_is_told_where_it_runs_by_its_uid() {
    let places = Places::default();
    places.tell("uid-web", PodPlace { netns: PathBuf::from("/run/netns/web"), ..PodPlace::default() });
    places.tell("uid-far", PodPlace { netns: PathBuf::from("/run/netns/far"), ..PodPlace::default() });
    let far = pod("far", |pod| {
        (pod["spec"]["nodeName"], pod["status"]["podIPs"], pod["status"]["podIP"]) =
            (json!("node-b"), json!(null), json!("10.0.0.2"))
    });
    let mut model =
        Cluster { namespaces: vec![namespace("foo", true)], pods: vec![pod("web", |_| {}), far], ..Cluster::default() }
            .model();
    let (snapshot, facts) = compile(&mut model, &viewpoint(), &places);
    assert_eq!(snapshot.local.len(), 1, "and the other is on another node");
    assert_eq!(
        (snapshot.local[0].netns.to_str(), snapshot.local[0].zone.as_deref()),
        (Some("/run/netns/web"), Some("r/z-a"))
    );
    assert_eq!(facts.not_captured, Vec::<String>::new());
    places.forget("uid-web");
    let (snapshot, facts) = compile(&mut model, &viewpoint(), &places);
    assert_eq!((snapshot.local.len(), facts.not_captured.len()), (0, 1));
}

#[test]
fn the_kubelet_is_let_in_at_the_ports_of_captured_pods_of_its_own_node_alone() {
    let probed = |name: &str, port: u16| {
        pod(name, |pod| {
            pod["spec"]["containers"] = json!([{"livenessProbe": {"httpGet": {"port": port}}}]);
            pod["status"] = json!({"podIP": format!("10.0.0.{port}")});
        })
    };
    let mut outside = probed("outside", 4);
    outside["metadata"]["labels"][MESH] = json!("disabled");
    let mut far = probed("far", 2);
    far["spec"]["nodeName"] = json!("node-b");
    let mut pods = vec![probed("web", 1), far, probed("unplaced", 3), outside, addressed("none", "10.0.0.5")];
    let places = Places::default();
    for name in ["web", "far", "outside", "none"] {
        places.tell(&format!("uid-{name}"), PodPlace { netns: name.into(), ..PodPlace::default() });
    }
    let compiled = |pods: &[Json]| {
        let cluster = Cluster { namespaces: vec![namespace("foo", true)], pods: pods.to_vec(), ..Cluster::default() };
        compile(&mut cluster.model(), &viewpoint(), &places).0
    };
    let snapshot = compiled(&pods);
    let declared: Vec<_> =
        snapshot.probes.iter().map(|(path, ports)| (path.to_str().unwrap(), ports.to_vec())).collect();
    assert_eq!(declared, [("web", vec![1])]);
    // The object says no more of it.
    pods[0]["spec"]["containers"] = json!([{"name": "c"}]);
    let without = compiled(&pods);
    assert!(without.probes.is_empty() && !without.describes_the_same_as(&snapshot));
}

#[test]
fn of_two_pods_with_one_address_the_younger_has_it() {
    let older = addressed("older", "10.0.0.1");
    let mut younger = addressed("younger", "10.0.0.1");
    younger["metadata"]["creationTimestamp"] = json!("2026-01-02T00:00:00Z");
    let (workloads, facts) = known(vec![older.clone(), younger.clone()]);
    assert_eq!(workloads, [("foo/younger".to_owned(), true)]);
    assert!(facts.warnings[0].contains("foo/older"), "{facts:?}");
    younger["metadata"]["deletionTimestamp"] = json!("2026-01-03T00:00:00Z");
    assert_eq!(known(vec![older, younger]).0, [("foo/older".to_owned(), true)], "but not while it leaves");
}

fn slice(name: &str, endpoints: Json) -> Json {
    json!({"metadata": {"name": name, "namespace": "foo", "resourceVersion": "1", "labels": {"kubernetes.io/service-name": "web"}},
           "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}]})
}

fn endpoint(address: &str, ready: bool, serving: bool, node: &str) -> Json {
    json!({"addresses": [address], "conditions": {"ready": ready, "serving": serving, "terminating": !ready}, "nodeName": node, "zone": "z-a"})
}

fn reached(spec: Json, slices: Vec<Json>) -> Vec<String> {
    let service = json!({"metadata": {"name": "web", "namespace": "foo", "resourceVersion": "1"}, "spec": spec});
    let pods = vec![addressed("web", "10.0.0.1")];
    let cluster = Cluster {
        namespaces: vec![namespace("foo", true)],
        pods,
        services: vec![service],
        slices,
        ..Cluster::default()
    };
    let (snapshot, _) = cluster.compiled();
    let Some(service) = snapshot.service_of_host("web.foo.svc.cluster.local") else { return vec!["none".into()] };
    let told = |endpoint: &ServiceEndpoint| {
        let workload = endpoint.workload.as_ref().map(|workload| workload.to_string()).unwrap_or_default();
        format!("{} {workload}", endpoint.address)
    };
    service.ports.get(&80).into_iter().flatten().map(told).collect()
}

fn spec() -> Json {
    json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::96"], "ports": [{"name": "http", "port": 80, "targetPort": "http"}]})
}

#[test]
fn a_service_leads_to_what_is_ready_and_else_to_what_still_serves() {
    let (web, outside) = (endpoint("10.0.0.1", true, true, "node-a"), endpoint("192.0.2.1", true, true, "node-b"));
    let leaving = endpoint("10.0.0.1", false, true, "node-a");
    assert_eq!(
        reached(spec(), vec![slice("a", json!([web.clone(), outside.clone()]))]),
        ["10.0.0.1:8080 foo/web", "192.0.2.1:8080 "]
    );
    assert_eq!(reached(spec(), vec![slice("a", json!([leaving.clone(), outside]))]), ["192.0.2.1:8080 "]);
    assert_eq!(reached(spec(), vec![slice("a", json!([leaving]))]), ["10.0.0.1:8080 foo/web"]);
    assert_eq!(
        reached(spec(), vec![slice("a", json!([endpoint("10.0.0.1", false, false, "node-a")]))]),
        Vec::<String>::new()
    );
    assert_eq!(reached(spec(), vec![slice("a", json!([web.clone()])), slice("b", json!([web]))]).len(), 1, "it is one");
    assert_eq!(reached(spec(), Vec::new()), Vec::<String>::new());
}

#[test]
fn a_service_that_is_local_only_leads_nowhere_else() {
    let both = json!([endpoint("10.0.0.1", true, true, "node-a"), endpoint("10.0.0.2", true, true, "node-b")]);
    let mut local = spec();
    local["internalTrafficPolicy"] = json!("Local");
    assert_eq!(reached(local, vec![slice("a", both)]), ["10.0.0.1:8080 foo/web"]);
}

#[test]
fn a_headless_service_leads_to_where_its_endpoints_listen_and_an_external_name_is_dns() {
    let headless = json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"name": "http", "port": 80}]});
    let slices = || vec![slice("a", json!([endpoint("10.0.0.1", true, true, "node-a")]))];
    assert_eq!(reached(headless, slices()), ["10.0.0.1:8080 foo/web"]);
    assert_eq!(reached(json!({"type": "ExternalName", "externalName": "example.com"}), slices()), ["none"]);
}

#[test]
fn policies_are_compiled_again_only_when_one_changes() {
    let policy = json!({"metadata": {"name": "p", "namespace": "foo", "resourceVersion": "1"}, "spec": {"mtls": {"mode": "STRICT"}}});
    let mut model = Cluster { policies: vec![policy], ..Cluster::default() }.model();
    let (first, _) = compile(&mut model, &viewpoint(), &Places::default());
    model.apply(Update::Pods(Change::Apply(Item { version: Some(2), ..trimmed(addressed("web", "10.0.0.1")) })));
    let (second, _) = compile(&mut model, &viewpoint(), &Places::default());
    assert!(Arc::ptr_eq(&first.policies, &second.policies));
    let key = Key { namespace: "foo".into(), name: "p".into() };
    model
        .apply(Update::Istio(ObjectKind::PeerAuthentication, Change::Delete { key, uid: "".into(), version: Some(3) }));
    let (third, _) = compile(&mut model, &viewpoint(), &Places::default());
    assert!(first.policies != third.policies);
}

/// What the runtime has told counts first, for pods of this node alone: of a sandbox that was made anew the API server has the old addresses.
#[test]
fn a_pod_is_known_by_the_addresses_that_its_runtime_told() {
    let places = Places::default();
    let told = |address: &str| PodPlace { addresses: Box::new([address.parse().unwrap()]), ..PodPlace::default() };
    places.tell("uid-web", told("10.0.0.9"));
    places.tell("uid-far", PodPlace { late: true, ..told("10.0.0.8") });
    let unreported = |pod: &mut serde_json::Value| pod["status"] = json!({});
    let far = pod("far", |pod| {
        unreported(pod);
        pod["spec"]["nodeName"] = json!("node-b");
    });
    places.tell("uid-anew", told("10.0.0.7"));
    let pods = vec![pod("web", unreported), pod("anew", |_| {}), far];
    let mut model = Cluster { namespaces: vec![namespace("foo", true)], pods, ..Cluster::default() }.model();
    let (snapshot, facts) = compile(&mut model, &viewpoint(), &places);
    let known: Vec<_> = snapshot.workloads().iter().map(|it| (it.name.as_str(), it.addresses.clone())).collect();
    let of = |address: &str| vec![address.parse().unwrap()];
    assert_eq!(known, [("anew", of("10.0.0.7")), ("web", of("10.0.0.9"))]);
    assert_eq!((snapshot.local.len(), facts.members.len(), facts.late.len()), (2, 2, 0));
}
