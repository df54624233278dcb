//! What a pod counts as while nothing was told of its namespace: that may come later than the pod, and go before it.

use super::*;

fn in_namespace(namespace: &str, name: &str, address: &str, label: Option<&str>) -> Json {
    let mut pod = addressed(name, address);
    pod["metadata"]["namespace"] = json!(namespace);
    if let Some(label) = label {
        pod["metadata"]["labels"][MESH] = json!(label);
    }
    pod
}

/// Namespaces and pods are told of apart: a pod may be there first.
#[test]
fn of_a_pod_whose_namespace_was_not_told_of_nothing_is_assumed_but_that_it_may_be_in_the_mesh() {
    let mut outside = in_namespace("new", "outside", "10.0.0.4", Some("disabled"));
    outside["spec"]["nodeName"] = json!("node-b");
    let pods = vec![
        in_namespace("new", "web", "10.0.0.1", None),
        in_namespace("new", "placed", "10.0.0.2", Some("nonsense")),
        in_namespace("new", "inside", "10.0.0.3", Some("enabled")),
        outside,
    ];
    let places = Places::default();
    for name in ["placed", "inside"] {
        places.tell(&format!("uid-{name}"), PodPlace { netns: name.into(), ..PodPlace::default() });
    }
    let mut model = Cluster { pods, ..Cluster::default() }.model();
    let (snapshot, facts) = compile(&mut model, &viewpoint(), &places);
    let in_mesh = |snapshot: &Snapshot| {
        let all = snapshot.workloads().iter();
        all.filter(|workload| workload.in_mesh).map(|workload| workload.name.clone()).collect::<Vec<_>>()
    };
    let local = |snapshot: &Snapshot| snapshot.local.iter().map(|local| local.netns.clone()).collect::<Vec<_>>();
    assert_eq!(in_mesh(&snapshot), ["inside", "placed", "web"], "no plaintext to what may be in the mesh");
    assert_eq!(facts.members["uid-web"].mesh, Membership::NotKnown);
    assert_eq!(facts.members["uid-placed"].mesh, Membership::NotKnown, "what it says is not to be understood");
    assert_eq!(facts.members["uid-inside"].mesh, Membership::Inside, "it says so itself");
    assert!(!facts.members["uid-web"].is_outside());
    assert_eq!((local(&snapshot), snapshot.closed.clone()), (vec!["inside".into()], vec!["placed".into()]));
    assert!(snapshot.unplaced, "one of an earlier agent's pods may be this");
    assert_eq!(facts.not_captured, Vec::<String>::new());
    assert!(facts.warnings.iter().any(|it| it.starts_with("namespace new has not been told of")), "{facts:?}");

    let told = |labelled, version| Item { version: Some(version), ..trimmed(namespace("new", labelled)) };
    model.apply(Update::Namespaces(Change::Apply(told(false, 2))));
    let (snapshot, facts) = compile(&mut model, &viewpoint(), &places);
    assert_eq!((in_mesh(&snapshot), facts.warnings.len()), (vec!["inside".into()], 1));
    assert_eq!(facts.members["uid-web"].mesh, Membership::Outside);
    model.apply(Update::Namespaces(Change::Apply(told(true, 3))));
    let (snapshot, facts) = compile(&mut model, &viewpoint(), &places);
    assert_eq!(local(&snapshot), [PathBuf::from("inside"), PathBuf::from("placed")]);
    assert_eq!(facts.not_captured, ["new/web"]);
}

#[test]
fn pods_whose_namespace_goes_first_are_closed_and_nobody_else_is_touched() {
    let pods = || {
        let other = in_namespace("bar", "other", "10.0.0.2", None);
        vec![addressed("web", "10.0.0.1"), other, in_namespace("plain", "none", "10.0.0.3", None)]
    };
    let all = || vec![namespace("foo", true), namespace("bar", true), namespace("plain", false)];
    let places = Places::default();
    for name in ["web", "other", "none"] {
        places.tell(&format!("uid-{name}"), PodPlace { netns: name.into(), ..PodPlace::default() });
    }
    let mut model = Cluster { namespaces: all(), pods: pods(), ..Cluster::default() }.model();
    let local = |snapshot: &Snapshot| snapshot.local.iter().map(|local| local.netns.clone()).collect::<Vec<_>>();
    let before = compile(&mut model, &viewpoint(), &places).0;
    assert_eq!(local(&before), [PathBuf::from("other"), PathBuf::from("web")]);
    for name in ["bar", "plain"] {
        let key = Key { namespace: "".into(), name: name.into() };
        model.apply(Update::Namespaces(Change::Delete { key, uid: name.into(), version: Some(5) }));
    }
    let (snapshot, facts) = compile(&mut model, &viewpoint(), &places);
    assert_eq!((local(&snapshot), &snapshot.closed[..]), (vec!["web".into()], &["none".into(), "other".into()][..]));
    assert!(!snapshot.unplaced && facts.errors.is_empty());
    let web = |snapshot: &Snapshot| Arc::clone(snapshot.workload("10.0.0.1".parse().unwrap()).unwrap());
    assert!(Arc::ptr_eq(&web(&before), &web(&snapshot)));
    for json in &pods()[1..] {
        let item: Item<Pod> = trimmed(json.clone());
        model.apply(Update::Pods(Change::Delete { key: item.key, uid: item.uid, version: Some(6) }));
    }
    let (snapshot, facts) = compile(&mut model, &viewpoint(), &places);
    assert_eq!((snapshot.workloads().len(), facts.warnings.len()), (1, 0));
}

/// Slices are told of apart from pods, too.
#[test]
fn an_endpoint_of_a_pod_that_was_not_told_of_is_left_out_until_it_is_and_so_is_one_whose_pod_is_gone() {
    let of = |address: &str, kind: &str| {
        let mut endpoint = endpoint(address, true, true, "node-b");
        endpoint["targetRef"] = json!({"kind": kind, "name": "some"});
        endpoint
    };
    let in_nodes_network = pod("host", |pod| {
        pod["spec"]["hostNetwork"] = json!(true);
        pod["spec"]["nodeName"] = json!("node-b");
        pod["status"] = json!({"phase": "Running", "podIP": "192.0.2.1", "hostIP": "192.0.2.1"});
    });
    let nobodys = endpoint("198.51.100.1", true, true, "node-b");
    let managed = |name: &str, by: &str, endpoints: Json| {
        let mut slice = slice(name, endpoints);
        slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] = json!(by);
        slice
    };
    let all = json!([of("10.0.0.1", "Pod"), of("192.0.2.1", "Pod"), of("198.51.100.2", "Node"), nobodys]);
    // It may mean an address of the pod in a network of its own.
    let others = json!([of("198.51.100.3", "Pod")]);
    let mut model = Cluster {
        namespaces: vec![namespace("foo", true)],
        pods: vec![in_nodes_network],
        services: vec![
            json!({"metadata": {"name": "web", "namespace": "foo", "resourceVersion": "1"}, "spec": spec()}),
        ],
        slices: vec![
            managed("a", "endpointslice-controller.k8s.io", all),
            managed("b", "another.example", others.clone()),
            slice("c", others),
        ],
        ..Cluster::default()
    }
    .model();
    let seen = |model: &mut Model| {
        let snapshot = compile(model, &viewpoint(), &Places::default()).0;
        let service = snapshot.service_of_host("web.foo.svc.cluster.local").unwrap();
        let led: Vec<_> = service.ports[&80].iter().map(|endpoint| endpoint.address.ip().to_string()).collect();
        (led, snapshot.unheard.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let rest = ["192.0.2.1", "198.51.100.1", "198.51.100.2", "198.51.100.3"].map(String::from);
    assert_eq!(seen(&mut model), (rest.to_vec(), vec!["10.0.0.1".to_owned()]));

    let item = Item { version: Some(2), ..trimmed::<Pod>(addressed("web", "10.0.0.1")) };
    let (key, uid) = (item.key.clone(), item.uid.clone());
    model.apply(Update::Pods(Change::Apply(item)));
    assert_eq!(seen(&mut model), ([&["10.0.0.1".to_owned()][..], &rest].concat(), Vec::new()));
    model.apply(Update::Pods(Change::Delete { key, uid, version: Some(9) }));
    assert_eq!(seen(&mut model), (rest.to_vec(), vec!["10.0.0.1".to_owned()]));
}
