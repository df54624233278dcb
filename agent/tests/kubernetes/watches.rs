//! What is believed after events, however they come.

use marline::{
    control::kubernetes::Report,
    policy::{self, MtlsMode, Outbound},
};
use serde_json::json;

use crate::bed::*;

const HTTPBIN: &str = "httpbin.foo.svc.cluster.local";

#[tokio::test]
async fn a_pod_that_comes_changes_and_goes_is_known_so_at_each_step() {
    let bed = Bed::ready(|_| {}).await;
    bed.api.is_watched(PODS).await;
    let told = events("watch-pods-add-ip-relabel-delete");
    let late = |label: &'static str| {
        move |snapshot: &marline::state::Snapshot| {
            snapshot.workload("10.244.1.99".parse().unwrap()).is_some_and(|pod| pod.labels.get("app") == Some(label))
        }
    };
    bed.api.sends(PODS, &told[0]);
    bed.api.sends(PODS, &told[1]);
    bed.knows("the pod with its address", late("sleep")).await;
    bed.api.sends(PODS, &told[2]);
    bed.knows("its new label", late("renamed")).await;
    bed.api.sends(PODS, &told[3..].concat());
    bed.knows("that it is gone", |snapshot| snapshot.workloads().len() == 9).await;
    bed.api.ends(PODS, false);
    bed.api.was_asked("/api/v1/pods#watch", 2).await;
    assert!(bed.api.asked("/api/v1/pods#watch")[1].contains("resourceVersion=316&"), "from the bookmark");
    assert_eq!(bed.api.asked("/api/v1/pods?").len(), 1, "without another list");
}

/// Namespaces and pods are told of apart, and either may come first.
#[tokio::test]
async fn a_pod_of_a_namespace_that_was_not_told_of_yet_is_spoken_to_by_mtls_or_not_at_all() {
    let bed = Bed::ready(|api| api.holds("/api/v1/namespaces#watch")).await;
    bed.api.was_asked("/api/v1/namespaces#watch", 1).await;
    bed.api.is_watched(PODS).await;
    let newcomer = |namespace: &str, uid: &str, version: u64, address: &str| {
        let object = pod("newcomer", |pod| {
            let metadata = &mut pod["metadata"];
            (metadata["namespace"], metadata["uid"]) = (json!(namespace), json!(uid));
            metadata["resourceVersion"] = json!(version.to_string());
            pod["status"]["podIP"] = json!(address);
            pod["status"]["podIPs"] = json!([{"ip": address}]);
        });
        format!("{}\n", json!({"type": "ADDED", "object": object}))
    };
    let spoken_to = |snapshot: &marline::state::Snapshot, address: &str| -> Option<Outbound> {
        let there = snapshot.workload(address.parse().unwrap())?;
        Some(policy::outbound(&snapshot.policies, Some(there), 8080))
    };
    let mtls = |known: Option<Outbound>| matches!(known, Some(Outbound::Mtls { .. }));
    bed.api.sends(PODS, &newcomer("new", "uid-new", 400, "10.244.9.1"));
    bed.api.sends(PODS, &newcomer("plain", "uid-plain", 401, "10.244.9.2"));
    bed.knows("both pods", |snapshot| spoken_to(snapshot, "10.244.9.2").is_some()).await;
    let snapshot = bed.state.load();
    assert!(mtls(spoken_to(&snapshot, "10.244.9.1")) && mtls(spoken_to(&snapshot, "10.244.9.2")));
    let not_told = |report: &Report| {
        let all = report.facts.warnings.iter().filter(|warning| warning.starts_with("namespace "));
        all.cloned().collect::<Vec<_>>()
    };
    let report = bed.tells("of the namespaces", |report| not_told(report).len() == 2).await;
    assert!(not_told(&report)[0].starts_with("namespace new has not been told of"), "{report:?}");
    assert_eq!(report.facts.not_captured.len(), 4, "it may be none that belongs into the mesh");

    bed.api.lets_go("/api/v1/namespaces#watch");
    bed.api.is_watched(NAMESPACES).await;
    for (name, label, version) in [("plain", json!({}), 402), ("new", json!({"marline.io/mesh": "enabled"}), 403)] {
        let metadata = json!({"name": name, "uid": name, "resourceVersion": version.to_string(), "labels": label});
        bed.api.sends(NAMESPACES, &format!("{}\n", json!({"type": "ADDED", "object": {"metadata": metadata}})));
    }
    let plain = |snapshot: &marline::state::Snapshot| spoken_to(snapshot, "10.244.9.2") == Some(Outbound::Plaintext);
    bed.knows("that one is outside", plain).await;
    let report = bed.tells("that the other is not", |report| report.facts.not_captured.len() == 5).await;
    assert_eq!(not_told(&report), Vec::<String>::new());
    assert!(mtls(spoken_to(&bed.state.load(), "10.244.9.1")));
}

#[tokio::test]
async fn an_endpoint_that_leaves_gets_no_new_connections() {
    let bed = Bed::ready(|_| {}).await;
    bed.api.is_watched(SLICES).await;
    let told = events("watch-endpointslices-drain");
    bed.api.sends(SLICES, &told[0]);
    bed.knows("that it leaves", |snapshot| endpoints(snapshot, HTTPBIN, 8000) == ["10.244.1.12:8080"]).await;
    let generation = bed.state.load().generation;
    bed.api.sends(SLICES, &told[1..].concat());
    // What follows is a change of another kind: after it the one before has been taken in.
    bed.api.is_watched(PODS).await;
    bed.api.sends(PODS, &pod_event("ADDED", "mark", 400, "10.244.9.9"));
    bed.knows("the mark", |snapshot| snapshot.workloads().len() == 10).await;
    assert_eq!(endpoints(&bed.state.load(), HTTPBIN, 8000), ["10.244.1.12:8080"]);
    assert!(bed.state.load().generation > generation);
}

#[tokio::test]
async fn modes_change_as_policies_do() {
    let bed = Bed::ready(|_| {}).await;
    bed.api.is_watched(PEERS).await;
    let mode = |address: &'static str, mode: MtlsMode| {
        move |snapshot: &marline::state::Snapshot| {
            let pod = snapshot.workload(address.parse().unwrap()).unwrap();
            snapshot.policies.authentication.mode(pod, 8080) == mode
        }
    };
    let (foo, bar) = ("10.244.0.11", "10.244.0.14");
    let told = events("watch-peerauthentications");
    assert!(mode(foo, MtlsMode::Strict)(&bed.state.load()));
    bed.api.sends(PEERS, &told[0]);
    bed.knows("PERMISSIVE", mode(foo, MtlsMode::Permissive)).await;
    bed.api.sends(PEERS, &told[1]);
    bed.knows("STRICT", mode(foo, MtlsMode::Strict)).await;
    assert!(mode(bar, MtlsMode::Strict)(&bed.state.load()));
    bed.api.sends(PEERS, &told[2]);
    bed.knows("that bar's is gone", mode(bar, MtlsMode::Permissive)).await;
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_denies_is_told_of_and_holds_nobody_else_up() {
    let bed = Bed::ready(|_| {}).await;
    bed.api.is_watched(AUTHORIZATIONS).await;
    let policy = |version: u64, action: &str| {
        let metadata = json!({"name": "bad", "namespace": "bar", "uid": "u", "resourceVersion": version.to_string()});
        let object = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata,
                            "spec": {"action": action, "rules": [{}]}});
        format!("{}\n", json!({"type": "ADDED", "object": object}))
    };
    bed.api.sends(AUTHORIZATIONS, &policy(400, "PERMIT"));
    let report = bed.tells("the error", |report| !report.facts.errors.is_empty()).await;
    assert!(report.facts.errors[0].contains("AuthorizationPolicy bar/bad: spec.action"), "{report:?}");
    let denied = |address: &str| {
        let snapshot = bed.state.load();
        let pod = snapshot.workload(address.parse().unwrap()).unwrap();
        let client = "10.244.0.13".parse().unwrap();
        let local = std::net::SocketAddr::new(pod.addresses[0], 8080);
        let inbound = marline::policy::inbound(&snapshot.policies, pod, local, client, None, false);
        matches!(inbound, marline::policy::Inbound::Deny(_))
    };
    assert!(denied("10.244.0.14") && !denied("10.244.0.17"));
    bed.api.is_watched(PODS).await;
    bed.api.sends(PODS, &pod_event("ADDED", "new", 400, "10.244.9.9"));
    bed.knows("a new pod meanwhile", |snapshot| snapshot.workloads().len() == 10).await;
    bed.api.sends(AUTHORIZATIONS, &policy(401, "ALLOW"));
    bed.tells("that it is mended", |report| report.facts.errors.is_empty()).await;
    assert!(!denied("10.244.0.14"));
}

#[tokio::test]
async fn a_stream_that_is_slow_or_cut_within_an_event_loses_nothing() {
    let bed = Bed::ready(|_| {}).await;
    bed.api.is_watched(PODS).await;
    let event = pod_event("ADDED", "slow", 400, "10.244.9.1");
    for piece in event.as_bytes().chunks(97) {
        bed.api.sends(PODS, std::str::from_utf8(piece).unwrap());
        tokio::task::yield_now().await;
    }
    bed.knows("what came slowly", |snapshot| snapshot.workload("10.244.9.1".parse().unwrap()).is_some()).await;
    let event = pod_event("ADDED", "cut", 401, "10.244.9.2");
    bed.api.sends(PODS, &event[..event.len() / 2]);
    bed.api.ends(PODS, true);
    bed.api.was_asked("/api/v1/pods#watch", 2).await;
    bed.api.is_watched(PODS).await;
    assert!(bed.api.asked("/api/v1/pods#watch")[1].contains("resourceVersion=400&"), "from what was told whole");
    bed.api.sends(PODS, &event);
    bed.knows("what was cut", |snapshot| snapshot.workload("10.244.9.2".parse().unwrap()).is_some()).await;
    assert_eq!(bed.api.asked("/api/v1/pods?").len(), 1);
}

#[tokio::test]
async fn events_that_come_twice_late_or_in_disorder_end_in_the_truth() {
    let bed = Bed::ready(|_| {}).await;
    bed.api.is_watched(PODS).await;
    let (added, moved) = (pod_event("ADDED", "p", 400, "10.244.9.1"), pod_event("MODIFIED", "p", 401, "10.244.9.2"));
    let deleted = pod_event("DELETED", "p", 402, "10.244.9.2");
    let anew = pod_event("ADDED", "p", 403, "10.244.9.3");
    let other = pod_event("ADDED", "q", 404, "10.244.9.4");
    // Deleted before it was added, added again by a late event, and one of the same name that is another.
    bed.api.sends(PODS, &[&*deleted, &moved, &added, &added, &anew, &deleted, &moved, &other, &other].concat());
    bed.knows("the last of them", |snapshot| snapshot.workload("10.244.9.4".parse().unwrap()).is_some()).await;
    let snapshot = bed.state.load();
    let there: Vec<_> =
        (1..5).filter(|n| snapshot.workload(format!("10.244.9.{n}").parse().unwrap()).is_some()).collect();
    assert_eq!(there, [3, 4]);
}
