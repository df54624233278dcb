//! What is believed after lists.

use std::path::PathBuf;

use marline::{control::kubernetes::PodPlace, policy::MtlsMode};

use crate::bed::*;

const RECORDED: [&str; 9] = [
    "bar/httpbin-a",
    "bar/httpbin-b",
    "bar/sleep-a",
    "foo/httpbin-a",
    "foo/httpbin-b",
    "foo/sleep-a",
    "legacy/httpbin-a",
    "legacy/httpbin-b",
    "legacy/sleep-a",
];

#[tokio::test]
async fn what_was_recorded_is_what_is_believed() {
    let bed = Bed::ready(|_| {}).await;
    let snapshot = bed.state.load();
    assert_eq!(workloads(&snapshot), RECORDED);
    let pod = snapshot.workload("10.244.1.12".parse().unwrap()).unwrap();
    assert_eq!(
        (pod.to_string(), pod.id.to_string(), pod.in_mesh),
        ("foo/httpbin-b".into(), "spiffe://cluster.local/ns/foo/sa/httpbin".into(), true)
    );
    assert!(std::sync::Arc::ptr_eq(pod, snapshot.workload("fd00:10:244::c".parse().unwrap()).unwrap()));
    assert_eq!(pod.labels.get("version"), Some("v1"));
    let outside = snapshot.workload("10.244.0.17".parse().unwrap()).unwrap();
    assert_eq!((outside.to_string(), outside.in_mesh), ("legacy/httpbin-a".into(), false));

    let service = snapshot.service("10.0.0.141".parse().unwrap()).unwrap();
    assert_eq!(service.host, "httpbin.foo.svc.cluster.local");
    assert_eq!(endpoints(&snapshot, &service.host, 8000), ["10.244.0.11:8080", "10.244.1.12:8080"]);
    assert_eq!(
        endpoints(&snapshot, "httpbin-headless.bar.svc.cluster.local", 8080),
        ["10.244.0.14:8080", "10.244.1.15:8080"]
    );

    let authentication = &snapshot.policies.authentication;
    assert_eq!(
        (authentication.mode(pod, 8080), authentication.mode(outside, 8080)),
        (MtlsMode::Strict, MtlsMode::Permissive)
    );
    assert_eq!((snapshot.policies.len(), snapshot.policies.destinations.len()), (5, 1));

    let report = bed.health.report();
    assert_eq!((report.away, report.waiting.len()), (None, 0));
    assert_eq!(report.facts.host_network, ["foo/hostnet"]);
    assert_eq!(
        report.facts.not_captured,
        ["bar/httpbin-a", "bar/sleep-a", "foo/httpbin-a", "foo/sleep-a"],
        "node-a's, of the mesh"
    );
    assert_eq!(report.facts.errors, Vec::<String>::new());
    assert!(snapshot.local.is_empty());
}

/// What the two recorded pages leave: they were recorded with four pods each.
fn last_page() -> Answer {
    let list = recorded("list-pods");
    Answer::list(list["response"]["body"]["items"].as_array().unwrap()[8..].to_vec(), 310)
}

#[tokio::test]
async fn a_list_in_pages_is_one_list() {
    let bed = Bed::ready(|api| {
        api.lists(PODS, Answer::recorded("list-pods-page1"));
        api.answers_once("/api/v1/pods#more", Answer::recorded("list-pods-page2"));
        api.answers_once("/api/v1/pods#more", last_page());
    })
    .await;
    assert_eq!(workloads(&bed.state.load()), RECORDED);
    assert_eq!(bed.api.asked("/api/v1/pods#more?limit=500&continue=").len(), 2);
    bed.api.is_watched(PODS).await;
    assert!(bed.api.asked("/api/v1/pods#watch")[0].contains("resourceVersion=310&"));
}

#[tokio::test]
async fn pages_that_are_too_old_are_asked_for_from_the_first() {
    let gone = r#"{"kind":"Status","status":"Failure","message":"The provided continue parameter is too old","reason":"Expired","code":410}"#;
    let bed = Bed::ready(|api| {
        api.lists(PODS, Answer::recorded("list-pods-page1"));
        api.answers_once("/api/v1/pods#more", Answer::Said(410, gone.into()));
        api.answers_once("/api/v1/pods#more", Answer::recorded("list-pods-page2"));
        api.answers_once("/api/v1/pods#more", last_page());
    })
    .await;
    assert_eq!(workloads(&bed.state.load()), RECORDED);
    assert_eq!(bed.api.asked("/api/v1/pods?limit").len(), 2);
}

#[tokio::test]
async fn nothing_is_believed_before_everything_was_listed() {
    let bed = Bed::start(|api| api.holds(AUTHORIZATIONS)).await;
    let report = bed.tells("that all else was listed", |report| report.waiting == ["authorizationpolicies"]).await;
    assert!(!report.ready);
    assert_eq!((bed.state.load().generation, bed.state.load().workloads().len()), (1, 0));
    bed.api.lets_go(AUTHORIZATIONS);
    bed.is_ready().await;
    assert_eq!(bed.state.load().generation, 2, "all at once");
    assert_eq!(workloads(&bed.state.load()), RECORDED);
}

#[tokio::test]
async fn nodes_are_asked_for_one_and_namespaces_by_their_metadata() {
    let bed = Bed::ready(|_| {}).await;
    let asked = bed.api.asked("/api/v1/nodes?limit");
    assert!(asked[0].ends_with("&fieldSelector=metadata%2Ename%3Dnode%2Da"), "{asked:?}");
}

#[tokio::test]
async fn kinds_that_the_cluster_has_not_are_looked_for_until_it_has_them() {
    let bed = Bed::ready(|api| api.unlists(PEERS)).await;
    assert_eq!(bed.health.report().absent, ["peerauthentications", "serviceentries", "workloadentries"]);
    assert_eq!(bed.state.load().policies.len(), 2);
    bed.api.lists(PEERS, Answer::recorded("list-peerauthentications"));
    bed.knows("the policies", |snapshot| snapshot.policies.len() == 5).await;
    bed.tells("that they are there", |report| report.absent == ["serviceentries", "workloadentries"]).await;
}

#[tokio::test]
async fn policies_under_an_older_version_of_their_kind_count() {
    let bed = Bed::ready(|api| {
        api.unlists(PEERS);
        api.lists("/apis/security.istio.io/v1beta1/peerauthentications", Answer::recorded("list-peerauthentications"));
    })
    .await;
    assert_eq!(bed.state.load().policies.len(), 5);
    bed.api.is_watched("/apis/security.istio.io/v1beta1/peerauthentications").await;
}

#[tokio::test]
async fn a_pod_is_served_from_when_it_is_told_where_it_runs() {
    let bed = Bed::ready(|_| {}).await;
    let list = recorded("list-pods");
    let uid = |namespace: &str, name: &str| {
        let items = list["response"]["body"]["items"].as_array().unwrap();
        let item =
            items.iter().find(|item| item["metadata"]["namespace"] == namespace && item["metadata"]["name"] == name);
        item.unwrap()["metadata"]["uid"].as_str().unwrap().to_owned()
    };
    let netns = PathBuf::from("/run/netns/sleep");
    bed.places.tell(&uid("foo", "sleep-a"), PodPlace { netns: netns.clone(), ..PodPlace::default() });
    bed.knows("the pod's place", |snapshot| snapshot.local.len() == 1).await;
    let snapshot = bed.state.load();
    assert_eq!((snapshot.local[0].workload.to_string(), &snapshot.local[0].netns), ("foo/sleep-a".into(), &netns));
    bed.tells("the others", |report| report.facts.not_captured.len() == 3).await;
    // Of the namespace that is not in the mesh, nobody is captured.
    bed.places.tell(&uid("legacy", "sleep-a"), PodPlace { netns: "/run/netns/legacy".into(), ..PodPlace::default() });
    bed.places.forget(&uid("foo", "sleep-a"));
    bed.knows("that it is gone", |snapshot| snapshot.local.is_empty()).await;
}
