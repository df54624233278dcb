//! That a cluster means the same however one came to know it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// One step of a cluster's life.
#[derive(Clone, Debug)]
enum Step {
    Pod {
        name: u8,
        address: u8,
        said: u8,
        incarnation: u8,
    },
    PodGone(u8),
    /// Labelled or not, or gone.
    Namespace(Option<bool>),
    /// Of this port, or gone.
    Service(Option<u8>),
    Slice(u8, Vec<u8>),
    /// The policy, or its end.
    Strict(Option<bool>),
    /// All kinds: a bookmark.
    Reached,
    /// A snapshot is made, and with it what is kept for the next.
    Compile,
    RelistPods,
}

fn gone<T>(namespace: &str, name: &str, version: &str) -> Change<T> {
    Change::Delete {
        key: Key { namespace: namespace.into(), name: name.into() },
        uid: name.into(),
        version: version.parse().ok(),
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u8..4, 0_u8..4, 0_u8..4, 0_u8..2).prop_map(|(name, address, said, incarnation)| Step::Pod { name, address, said, incarnation }),
        1 => (0_u8..4).prop_map(Step::PodGone),
        2 => any::<Option<bool>>().prop_map(Step::Namespace),
        1 => prop::option::weighted(0.7, 80_u8..83).prop_map(Step::Service),
        1 => (0_u8..2, prop::collection::vec(0_u8..4, 0..3)).prop_map(|(name, all)| Step::Slice(name, all)),
        1 => any::<Option<bool>>().prop_map(Step::Strict),
        1 => Just(Step::Reached),
        3 => Just(Step::Compile),
        1 => Just(Step::RelistPods),
    ]
}

proptest! {
    /// What was kept from one snapshot to the next changes nothing, and neither do relists nor events that come twice.
    #[test]
    fn however_it_came_to_be_known_a_cluster_means_the_same(steps in prop::collection::vec(step(), 0..40), twice: bool) {
        let service = |port: u8, version: &str| {
            let mut service = json!({"metadata": {"name": "web", "namespace": "foo", "resourceVersion": version}, "spec": spec()});
            service["spec"]["ports"][0]["port"] = json!(port);
            service
        };
        let base = || Cluster { namespaces: vec![namespace("foo", true)], services: vec![service(80, "1")], ..Cluster::default() };
        let (mut lived, mut truth) = (base().model(), base());
        let (mut pods, mut slices) = (BTreeMap::new(), BTreeMap::new());
        let places = Places::default();
        for (at, step) in steps.into_iter().enumerate() {
            let version = (10 + at).to_string();
            let mut tell = |update: &dyn Fn() -> Update| for _ in 0..=u8::from(twice) { lived.apply(update()); };
            match step {
                Step::Pod { name, address, said, incarnation } => {
                    let json = pod(&name.to_string(), |pod| {
                        pod["metadata"]["uid"] = json!(format!("{name}-{incarnation}"));
                        pod["metadata"]["resourceVersion"] = json!(version);
                        pod["metadata"]["labels"][MESH] = json!(["enabled", "disabled", "", "what"][usize::from(said)]);
                        pod["spec"]["serviceAccountName"] = json!(format!("account-{incarnation}"));
                        pod["status"] = json!({"podIP": format!("10.0.0.{}", address + 1)});
                    });
                    tell(&|| Update::Pods(Change::Apply(trimmed(json.clone()))));
                    pods.insert(name, json);
                }
                Step::PodGone(name) => {
                    if let Some(mut json) = pods.remove(&name) {
                        json["metadata"]["resourceVersion"] = json!(version);
                        tell(&|| {
                            let item: Item<Pod> = trimmed(json.clone());
                            Update::Pods(Change::Delete { key: item.key, uid: item.uid, version: item.version })
                        });
                    }
                }
                Step::Namespace(Some(enabled)) => {
                    let mut json = namespace("foo", enabled);
                    json["metadata"]["resourceVersion"] = json!(version);
                    tell(&|| Update::Namespaces(Change::Apply(trimmed(json.clone()))));
                    truth.namespaces = vec![json];
                }
                Step::Namespace(None) => {
                    tell(&|| Update::Namespaces(gone("", "foo", &version)));
                    truth.namespaces.clear();
                }
                Step::Service(Some(port)) => {
                    let json = service(port, &version);
                    tell(&|| Update::Services(Change::Apply(trimmed(json.clone()))));
                    truth.services = vec![json];
                }
                Step::Service(None) => {
                    tell(&|| Update::Services(gone("foo", "web", &version)));
                    truth.services.clear();
                }
                Step::Slice(name, all) => {
                    let all: Vec<_> = all.iter().map(|at| endpoint(&format!("10.0.0.{}", at + 1), true, true, "node-a")).collect();
                    let mut json = slice(&name.to_string(), json!(all));
                    json["metadata"]["resourceVersion"] = json!(version);
                    tell(&|| Update::EndpointSlices(Change::Apply(trimmed(json.clone()))));
                    slices.insert(name, json);
                }
                Step::Strict(Some(strict)) => {
                    let mode = if strict { "STRICT" } else { "DISABLE" };
                    let json = json!({"metadata": {"name": "p", "namespace": "foo", "resourceVersion": version}, "spec": {"mtls": {"mode": mode}}});
                    tell(&|| Update::Istio(ObjectKind::PeerAuthentication, Change::Apply(object(ObjectKind::PeerAuthentication, json.clone()))));
                    truth.policies = vec![json];
                }
                Step::Strict(None) => {
                    tell(&|| Update::Istio(ObjectKind::PeerAuthentication, gone("foo", "p", &version)));
                    truth.policies.clear();
                }
                Step::Reached => {
                    let reached = version.parse().unwrap();
                    tell(&|| Update::Namespaces(Change::Reached(reached)));
                    tell(&|| Update::Pods(Change::Reached(reached)));
                    tell(&|| Update::Services(Change::Reached(reached)));
                    tell(&|| Update::EndpointSlices(Change::Reached(reached)));
                    tell(&|| Update::Istio(ObjectKind::PeerAuthentication, Change::Reached(reached)));
                }
                Step::Compile => drop(compile(&mut lived, &viewpoint(), &places)),
                Step::RelistPods => {
                    let items = pods.values().cloned().map(trimmed).collect();
                    lived.apply(Update::Pods(Change::Replace { items, version: version.parse().ok() }));
                }
            }
        }
        truth.pods = pods.into_values().collect();
        truth.slices = slices.into_values().collect();
        let (known, facts) = compile(&mut lived, &viewpoint(), &places);
        let (listed, expected) = compile(&mut truth.model(), &viewpoint(), &places);
        prop_assert!(known.describes_the_same_as(&listed), "{:?}\n{:?}", known.workloads(), listed.workloads());
        prop_assert_eq!(facts, expected);
    }
}
