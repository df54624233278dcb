//! That services lead where kube-proxy would send the same connection, whatever the objects say.

use std::{collections::BTreeSet, path::PathBuf};

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::{
    super::{
        compile::{Viewpoint, compile},
        model::Update,
        objects::{Item, Names, Trimmed, istio},
        places::{Places, PodPlace},
        store::Change,
    },
    *,
};
use crate::{
    config::ObjectKind,
    identity::TrustDomains,
    state::{Called, Snapshot},
};

fn list<T: Trimmed>(all: Vec<Json>) -> Change<T> {
    let mut names = Names::default();
    let trimmed = |json| -> Item<T> { T::trim(serde_json::from_value(json).unwrap(), &mut names).unwrap() };
    Change::Replace { items: all.into_iter().map(trimmed).collect(), version: Some(1) }
}

fn named(name: &str, mut object: Json) -> Json {
    (object["metadata"]["name"], object["metadata"]["namespace"]) = (json!(name), json!("foo"));
    object
}

/// On node-a in zone z-a, where `client` is captured; all of the namespace is in the mesh.
fn seen(services: Vec<Json>, slices: Vec<Json>, pods: Vec<Json>, rules: Vec<Json>) -> Snapshot {
    let mut model = Model::default();
    let namespace = json!({"metadata": {"name": "foo", "labels": {"marline.io/mesh": "enabled"}}});
    let node = json!({"metadata": {"name": "node-a", "labels": {"topology.kubernetes.io/zone": "z-a"}}});
    model.apply(Update::Namespaces(list(vec![namespace])));
    model.apply(Update::Nodes(list(vec![node])));
    model.apply(Update::Services(list(services)));
    model.apply(Update::EndpointSlices(list(slices)));
    model.apply(Update::Pods(list(pods)));
    for kind in ObjectKind::ALL {
        let of_kind = rules.iter().filter(|_| kind == ObjectKind::DestinationRule);
        let read = |json: &Json| istio(kind, serde_json::from_value(json.clone()).unwrap(), &mut Names::default());
        let items = of_kind.map(|json| read(json).unwrap()).collect();
        model.apply(Update::Istio(kind, Change::Replace { items, version: Some(1) }));
    }
    let places = Places::default();
    places.tell("uid-client", PodPlace { netns: PathBuf::from("/run/netns/client"), ..PodPlace::default() });
    let viewpoint = Viewpoint { domains: TrustDomains::default(), node: "node-a".into() };
    compile(&mut model, &viewpoint, &places).0
}

fn pod(name: &str, node: &str, address: &str, host: &str) -> Json {
    let mut pod = json!({"spec": {"nodeName": node, "serviceAccountName": name},
        "status": {"phase": "Running", "podIP": address, "hostIP": host, "hostIPs": [{"ip": host}]}});
    pod["metadata"]["uid"] = json!(format!("uid-{name}"));
    named(name, pod)
}

fn slice(name: &str, service: &str, port: Json, endpoints: Json) -> Json {
    let mut slice = json!({"endpoints": endpoints, "ports": [port]});
    slice["metadata"]["labels"] = json!({"kubernetes.io/service-name": service});
    named(name, slice)
}

fn http(number: u16) -> Json {
    json!({"name": "http", "port": number, "protocol": "TCP"})
}

fn ready(address: &str) -> Json {
    json!({"addresses": [address], "conditions": {"ready": true}})
}

/// Where a connection of the client's can go, in order, and the service's port; nothing if it is not a service's.
fn led(snapshot: &Snapshot, to: &str) -> Option<(u16, Vec<String>)> {
    let (to, client) = (to.parse().unwrap(), &snapshot.local[0].workload);
    let Called { service, port, .. } = snapshot.called(client, to)?;
    let order = service.endpoints(to, snapshot.local[0].zone.as_deref(), |_| Some(0), 0).unwrap_or_default();
    Some((port, order.iter().map(|endpoint| endpoint.address.to_string()).collect()))
}

fn client() -> Json {
    pod("client", "node-a", "10.0.0.1", "192.0.2.1")
}

#[test]
fn a_nodes_port_is_the_services_at_every_node_and_nothing_else_there_is() {
    let far = pod("web", "node-b", "10.0.0.2", "192.0.2.2");
    let old = |mut pod: Json| {
        pod["status"]["phase"] = json!("Failed");
        pod
    };
    let gone = old(pod("gone", "node-c", "10.0.0.3", "192.0.2.3"));
    let service = named(
        "web",
        json!({"spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
               "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "http", "port": 80, "nodePort": 30053, "protocol": "UDP"}]}}),
    );
    let slices = vec![slice("a", "web", http(8080), json!([ready("10.0.0.2")]))];
    let snapshot = seen(vec![service], slices, vec![client(), far, gone], Vec::new());
    let web = Some((80, vec!["10.0.0.2:8080".to_owned()]));
    for node in ["192.0.2.1", "192.0.2.2", "[::ffff:192.0.2.2]"] {
        assert_eq!(led(&snapshot, &format!("{node}:30080")), web, "{node}");
    }
    for other in
        ["192.0.2.1:80", "192.0.2.1:6443", "192.0.2.1:30053", "192.0.2.3:30080", "192.0.2.9:30080", "10.0.0.2:30080"]
    {
        assert_eq!(led(&snapshot, other), None, "{other} is not the service's");
    }
    assert_eq!(led(&snapshot, "10.96.0.1:80"), Some((80, vec![])), "no endpoint is on this node");
    let service = snapshot.service_at("192.0.2.2:30080".parse().unwrap()).unwrap();
    let endpoint = &service.exposed.as_ref().unwrap()[&80][0];
    assert_eq!(endpoint.workload.as_ref().unwrap().to_string(), "foo/web", "whose identity is asked for");
}

fn exposed(name: &str, cluster_ip: &str, number: u16, external: &[&str], status: Json) -> Json {
    let port = json!({"name": "http", "port": number});
    let spec =
        json!({"clusterIP": cluster_ip, "externalIPs": external, "externalTrafficPolicy": "Local", "ports": [port]});
    named(name, json!({"spec": spec, "status": status}))
}

#[test]
fn addresses_for_outside_lead_to_the_service_and_a_load_balancer_that_is_a_proxy_is_gone_through() {
    let ingress = json!({"loadBalancer": {"ingress": [
        {"ip": "203.0.113.10"}, {"ip": "203.0.113.11", "ipMode": "VIP"}, {"ip": "203.0.113.12", "ipMode": "Proxy"},
        {"hostname": "lb.example"}, {"ip": "2001:db8::1"}, {"ip": "no address"},
    ]}});
    let mut narrow = exposed(
        "narrow",
        "10.96.0.2",
        80,
        &["203.0.113.20"],
        json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.21"}]}}),
    );
    narrow["spec"]["loadBalancerSourceRanges"] = json!(["198.51.100.0/24"]);
    let services = vec![
        exposed("web", "10.96.0.1", 80, &["203.0.113.1", "192.0.2.1"], ingress),
        narrow,
        // Two with one address, at ports of their own.
        exposed("other", "10.96.0.3", 443, &["203.0.113.1"], json!({"loadBalancer": {}})),
        exposed("headless", "None", 80, &["203.0.113.30"], json!({})),
    ];
    let to = |service: &str, number| {
        slice(service, service, http(number), json!([{"addresses": ["10.0.0.2"], "nodeName": "node-b"}]))
    };
    let slices = vec![to("web", 8080), to("narrow", 8081), to("other", 8443), to("headless", 8082)];
    let snapshot = seen(services, slices, vec![client()], Vec::new());
    for (at, port, endpoint) in [
        ("203.0.113.1:80", 80, "10.0.0.2:8080"),
        ("[::ffff:203.0.113.1]:80", 80, "10.0.0.2:8080"),
        ("203.0.113.10:80", 80, "10.0.0.2:8080"),
        ("203.0.113.11:80", 80, "10.0.0.2:8080"),
        ("192.0.2.1:80", 80, "10.0.0.2:8080"),
        ("203.0.113.20:80", 80, "10.0.0.2:8081"),
        ("203.0.113.1:443", 443, "10.0.0.2:8443"),
    ] {
        assert_eq!(led(&snapshot, at), Some((port, vec![endpoint.to_owned()])), "{at}");
    }
    // As it would go without a mesh: by kube-proxy's own rules, or out of the cluster.
    for at in ["203.0.113.12:80", "203.0.113.21:80", "203.0.113.1:8080", "203.0.113.30:80", "[2001:db8::1]:80"] {
        assert_eq!(led(&snapshot, at), None, "{at}");
    }
}

#[test]
fn a_services_address_for_outside_is_never_a_pods_nor_another_services_own() {
    let thief = exposed("a-thief", "10.96.0.9", 80, &["10.0.0.2", "10.96.0.1"], json!({}));
    let web = named("web", json!({"spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]}}));
    let slices = vec![
        slice("a", "a-thief", http(666), json!([ready("10.0.0.6")])),
        slice("b", "web", http(8080), json!([ready("10.0.0.2")])),
    ];
    let snapshot =
        seen(vec![thief, web], slices, vec![client(), pod("web", "node-b", "10.0.0.2", "192.0.2.2")], Vec::new());
    assert_eq!(led(&snapshot, "10.0.0.2:80"), None, "the pod itself");
    assert_eq!(led(&snapshot, "10.96.0.1:80"), Some((80, vec!["10.0.0.2:8080".into()])));
}

#[test]
fn a_workloads_address_is_no_nodes_whatever_a_pod_is_said_to_run_on() {
    let service = named(
        "web",
        json!({"spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}}),
    );
    let liar = pod("liar", "node-b", "10.0.0.3", "10.0.0.2");
    let victim = pod("victim", "node-b", "10.0.0.2", "192.0.2.2");
    let snapshot = seen(vec![service], Vec::new(), vec![client(), victim, liar], Vec::new());
    assert_eq!(led(&snapshot, "10.0.0.2:30080"), None);
}

#[test]
fn what_rules_say_of_a_port_counts_at_the_nodes_port_and_at_a_headless_endpoints_too() {
    let web = json!({"spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}});
    let headless =
        json!({"spec": {"clusterIP": "None", "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}});
    let rule = |host: &str| {
        named(
            host,
            json!({"spec": {"host": host, "trafficPolicy": {"portLevelSettings": [{"port": {"number": 80}, "connectionPool": {"tcp": {"maxConnections": 7}}}]}}}),
        )
    };
    let snapshot = seen(
        vec![named("web", web), named("db", headless)],
        vec![
            slice("a", "web", http(8080), json!([ready("10.0.0.2")])),
            // As a name of a container's port comes to be a number: each pod's own.
            slice("b", "db", http(5432), json!([ready("10.0.0.3")])),
            slice("c", "db", http(5433), json!([ready("10.0.0.4")])),
        ],
        vec![client(), pod("db", "node-b", "10.0.0.3", "192.0.2.2")],
        vec![rule("web"), rule("db")],
    );
    let limit = |to: &str| {
        let called = snapshot.called(&snapshot.local[0].workload, to.parse().unwrap())?;
        Some((called.service.host.split('.').next().unwrap_or_default(), called.port, called.traffic.max_connections))
    };
    for to in ["10.96.0.1:80", "192.0.2.2:30080"] {
        assert_eq!(limit(to), Some(("web", 80, Some(7))), "{to}");
    }
    // With the service's port as at Istio's sidecars, which listen so for each endpoint, whatever the pod itself has at that port.
    for to in ["10.0.0.3:5432", "10.0.0.4:5433", "10.0.0.3:80"] {
        assert_eq!(limit(to), Some(("db", 80, Some(7))), "{to}");
    }
    assert_eq!((limit("10.0.0.3:5433"), limit("10.0.0.2:8080")), (None, None));
}

/// What DNS makes of the name is an address: inside a service's, and outside nobody's.
#[test]
fn an_external_name_takes_nothing_and_its_connections_go_by_what_dns_says() {
    let alias = json!({"spec": {"type": "ExternalName", "externalName": "web.foo.svc.cluster.local", "ports": [{"port": 80, "nodePort": 0}]}});
    let outside = json!({"spec": {"type": "ExternalName", "externalName": "203.0.113.9", "clusterIP": "", "ports": [{"port": 443}]}});
    let web = json!({"spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]}});
    let services = vec![named("alias", alias), named("outside", outside), named("web", web)];
    let slices = vec![slice("a", "web", http(8080), json!([ready("10.0.0.2")]))];
    let snapshot = seen(services, slices, vec![client()], Vec::new());
    assert_eq!(snapshot.services().len(), 1);
    assert!(snapshot.service_of_host("alias.foo.svc.cluster.local").is_none());
    assert_eq!(led(&snapshot, "10.96.0.1:80"), Some((80, vec!["10.0.0.2:8080".into()])));
    assert_eq!(led(&snapshot, "203.0.113.9:443"), None, "as it would go without a mesh");
}

#[test]
fn affinity_is_for_who_asks_for_it_and_lasts_three_hours_if_nothing_is_said() {
    let spec = |more: Json| {
        let mut spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        named("web", json!({"spec": spec}))
    };
    for (more, seconds) in [
        (json!({}), None),
        (json!({"sessionAffinity": "None", "sessionAffinityConfig": null}), None),
        (json!({"sessionAffinity": "ClientIP"}), Some(10_800)),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 30}}}),
            Some(30),
        ),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": -1}}}),
            Some(10_800),
        ),
    ] {
        let snapshot = seen(vec![spec(more.clone())], Vec::new(), vec![client()], Vec::new());
        assert_eq!(snapshot.services()[0].affinity.map(|life| life.as_secs()), seconds, "{more}");
    }
}

#[test]
fn services_without_selectors_lead_to_what_somebody_has_written_and_no_further() {
    let service = |name: &str| {
        named(
            name,
            json!({"spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd96::1"], "ports": [{"name": "http", "port": 80}]}}),
        )
    };
    let slices = vec![
        slice(
            "a",
            "db",
            http(5432),
            json!([ready("203.0.113.5"), {"addresses": ["203.0.113.6"]}, {"addresses": ["10.0.0.1"], "conditions": {}}]),
        ),
        slice("b", "db", json!({"name": "other", "port": 1}), json!([ready("203.0.113.7")])),
        slice("c", "db", http(5432), json!([ready("db.example"), ready("127.0.0.1"), ready("fd01::5")])),
        slice("d", "another", http(5432), json!([ready("203.0.113.8")])),
    ];
    let snapshot = seen(vec![service("db")], slices, vec![client()], Vec::new());
    let v4 = ["10.0.0.1:5432", "203.0.113.5:5432", "203.0.113.6:5432"].map(str::to_owned).to_vec();
    assert_eq!(led(&snapshot, "10.96.0.1:80"), Some((80, v4)));
    assert_eq!(led(&snapshot, "[fd96::1]:80"), Some((80, vec!["[fd01::5]:5432".into()])));
    // Partly in the mesh.
    let all = &snapshot.services()[0].ports[&80];
    let of: Vec<_> = all.iter().map(|it| it.workload.as_ref().map(ToString::to_string)).collect();
    assert_eq!(of, [Some("foo/client".into()), None, None, None]);
}

#[test]
fn what_is_published_before_it_is_ready_counts_as_ready() {
    let service = named(
        "web",
        json!({"spec": {"clusterIP": "10.96.0.1", "publishNotReadyAddresses": true, "ports": [{"name": "http", "port": 80}]}}),
    );
    let early =
        json!({"addresses": ["10.0.0.2"], "conditions": {"ready": true, "serving": false, "terminating": true}});
    let snapshot = seen(vec![service], vec![slice("a", "web", http(80), json!([early]))], vec![client()], Vec::new());
    assert_eq!(led(&snapshot, "10.96.0.1:80"), Some((80, vec!["10.0.0.2:80".into()])));
}

/// An endpoint as its slice has it.
#[derive(Clone, Debug)]
struct Said {
    v4: bool,
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
    node: Option<&'static str>,
    zones: Vec<&'static str>,
    nodes: Vec<&'static str>,
}

fn said() -> impl Strategy<Value = Said> {
    let condition = || prop::option::of(any::<bool>());
    let nodes = || prop::sample::select(vec!["node-a", "node-b"]);
    let zones = prop::collection::vec(prop::sample::select(vec!["z-a", "z-b"]), 0..3);
    // Mostly with hints: one without any voids all others.
    let zones = prop_oneof![1 => zones, 3 => Just(vec!["z-a"]), 3 => Just(vec!["z-b"])];
    let hinted = prop_oneof![2 => Just(Vec::new()), 2 => prop::collection::vec(nodes(), 1..3)];
    let likely = prop_oneof![2 => Just(None), 1 => Just(Some(true)), 2 => Just(Some(false))];
    (any::<bool>(), likely, condition(), condition(), prop::option::of(nodes()), zones, hinted).prop_map(
        |(v4, ready, serving, terminating, node, zones, nodes)| Said {
            v4,
            ready,
            serving,
            terminating,
            node,
            zones,
            nodes,
        },
    )
}

fn address_of(number: usize, said: &Said) -> String {
    if said.v4 { format!("10.0.0.{}", number + 10) } else { format!("fd00::{}", number + 10) }
}

/// kube-proxy's rules, in its words: CategorizeEndpoints and topologyModeFromHints of pkg/proxy/topology.go.
fn allowed(all: &[Said], v4: bool, local: bool) -> BTreeSet<String> {
    let family: Vec<(usize, &Said)> = all.iter().enumerate().filter(|(_, it)| it.v4 == v4).collect();
    let is_ready = |it: &Said| it.ready.unwrap_or(true);
    let is_leaving = |it: &Said| !is_ready(it) && it.serving.unwrap_or(true) && it.terminating.unwrap_or(false);
    let is_local = |it: &Said| it.node == Some("node-a");
    let ready: Vec<_> = family.iter().filter(|(_, it)| is_ready(it)).collect();
    let by_node = !local
        && ready.iter().all(|(_, it)| !it.nodes.is_empty())
        && ready.iter().any(|(_, it)| it.nodes.contains(&"node-a"));
    let by_zone = !local
        && ready.iter().all(|(_, it)| !it.zones.is_empty())
        && ready.iter().any(|(_, it)| it.zones.contains(&"z-a"));
    let first = |it: &Said| {
        is_ready(it)
            && if local {
                is_local(it)
            } else if by_node {
                it.nodes.contains(&"node-a")
            } else {
                !by_zone || it.zones.contains(&"z-a")
            }
    };
    let last = |it: &Said| is_leaving(it) && (!local || is_local(it));
    let of = |rule: &dyn Fn(&Said) -> bool| -> BTreeSet<String> {
        let found = family.iter().filter(|(_, it)| rule(it));
        let addresses = found.map(|(number, it)| SocketAddr::new(address_of(*number, it).parse().unwrap(), 8080));
        addresses.map(|address| address.to_string()).collect()
    };
    let preferred = of(&first);
    if preferred.is_empty() { of(&last) } else { preferred }
}

proptest! {
    #[test]
    fn connections_go_where_kube_proxy_would_send_them(all in prop::collection::vec(said(), 0..8), local: bool, split in 0_usize..8, turn: usize) {
        let policy = if local { "Local" } else { "Cluster" };
        let service = named("web", json!({"spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd96::1"],
            "internalTrafficPolicy": policy, "externalTrafficPolicy": "Local", "externalIPs": ["203.0.113.1", "2001:db8::1"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.2", "ipMode": "VIP"}]}}}));
        let endpoint = |(number, it): (usize, &Said)| {
            let named = |all: &[&str]| all.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
            json!({"addresses": [address_of(number, it)], "nodeName": it.node, "hints": {"forZones": named(&it.zones), "forNodes": named(&it.nodes)},
                   "conditions": {"ready": it.ready, "serving": it.serving, "terminating": it.terminating}})
        };
        let mut endpoints: Vec<Json> = all.iter().enumerate().map(endpoint).collect();
        let rest = endpoints.split_off(split.min(endpoints.len()));
        let slices = vec![slice("a", "web", http(8080), json!(endpoints)), slice("b", "web", http(8080), json!(rest))];
        let pods = vec![client(), pod("v6", "node-b", "10.0.0.2", "fd02::2")];
        let snapshot = seen(vec![service], slices, pods, Vec::new());
        for (to, v4, local) in [("10.96.0.1:80", true, local), ("[fd96::1]:80", false, local), ("192.0.2.1:30080", true, false), ("[fd02::2]:30080", false, false),
            ("203.0.113.1:80", true, false), ("203.0.113.2:80", true, false), ("[2001:db8::1]:80", false, false)] {
            let to: SocketAddr = to.parse().unwrap();
            let called = snapshot.called(&snapshot.local[0].workload, to).unwrap();
            let order = called.service.endpoints(to, snapshot.local[0].zone.as_deref(), |_| Some(0), turn).unwrap();
            let found: BTreeSet<String> = order.iter().map(|endpoint| endpoint.address.to_string()).collect();
            prop_assert_eq!(found.len(), order.len());
            prop_assert_eq!(found, allowed(&all, v4, local), "{}", to);
        }
    }
}
