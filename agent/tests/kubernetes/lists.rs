//! What is believed after lists.

use std::path::PathBuf;

use marline::{control::kubernetes::PodPlace, policy::MtlsMode};
use serde_json::json;

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

/// Of a list that has many pages, what was told is not asked for again because one page was refused or cut.
#[tokio::test]
async fn a_page_that_is_refused_for_now_or_cut_is_asked_for_again_and_no_other() {
    let Answer::Said(_, whole) = Answer::recorded("list-pods-page2") else { panic!() };
    let half = || vec![whole[..whole.len() / 2].to_owned()];
    let busy =
        json!({"kind": "Status", "status": "Failure", "reason": "TooManyRequests", "code": 429, "message": "busy"});
    let bed = Bed::ready(|api| {
        api.lists(PODS, Answer::recorded("list-pods-page1"));
        for wrong in [
            Answer::Said(429, busy.to_string()),
            Answer::Said(500, "etcdserver: request timed out".into()),
            Answer::Stream(half(), true),
            Answer::Stream(half(), false),
        ] {
            api.answers_once("/api/v1/pods#more", wrong);
        }
        api.answers_once("/api/v1/pods#more", Answer::recorded("list-pods-page2"));
        api.answers_once("/api/v1/pods#more", last_page());
    })
    .await;
    assert_eq!(workloads(&bed.state.load()), RECORDED);
    assert_eq!(bed.api.asked("/api/v1/pods?limit").len(), 1, "the first page");
    let more = bed.api.asked("/api/v1/pods#more");
    assert_eq!(more.len(), 6, "{more:?}");
    assert!(more[..5].iter().all(|asked| *asked == more[0]) && more[5] != more[0], "{more:?}");
    bed.tells("that it is well again", |report| report.away.is_none() && report.times_away == 1).await;
}

/// As of an API server that has forgotten where the pages were.
#[tokio::test]
async fn a_page_that_is_never_answered_or_refused_for_good_is_given_up_with_its_list() {
    for (status, times) in [(500, 10), (400, 1)] {
        let bed = Bed::ready(|api| {
            api.answers_once(PODS, Answer::recorded("list-pods-page1"));
            for _ in 0..times {
                api.answers_once("/api/v1/pods#more", Answer::Said(status, "no".into()));
            }
        })
        .await;
        assert_eq!(workloads(&bed.state.load()), RECORDED);
        assert_eq!(bed.api.asked("/api/v1/pods#more").len(), times, "{status}");
        assert_eq!(bed.api.asked("/api/v1/pods?limit").len(), 2, "{status}");
    }
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
    for path in [NODES, NAMESPACES] {
        bed.api.is_watched(path).await;
        let list = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
        assert_eq!(bed.api.accepted(path), [list], "{path}");
        let one = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
        assert_eq!(bed.api.accepted(&format!("{path}#watch")), [one], "{path}");
    }
    bed.api.is_watched(PODS).await;
    assert_eq!([bed.api.accepted(PODS), bed.api.accepted("/api/v1/pods#watch")].concat(), ["application/json"; 2]);
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
