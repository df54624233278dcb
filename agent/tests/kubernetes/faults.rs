//! What is believed while the API server is away, confused, or does not let the agent in.

use std::time::{Duration, Instant};

use marline::{control::kubernetes::Source, identity::TrustDomains, policy::MtlsMode, words::with_causes};

use crate::bed::*;

fn knows_all(bed: &Bed) -> bool {
    let snapshot = bed.state.load();
    let pod = snapshot.workload("10.244.0.11".parse().unwrap());
    pod.is_some_and(|pod| snapshot.policies.authentication.mode(pod, 8080) == MtlsMode::Strict)
        && snapshot.workloads().len() == 9
}

#[tokio::test]
async fn after_410_what_was_known_stays_until_the_list_is_complete() {
    let bed = Bed::ready(|_| {}).await;
    bed.api.is_watched(PODS).await;
    bed.api.holds("/api/v1/pods#more");
    // The second page has all but what is on the first, and neither knows of one pod more.
    bed.api.lists(PODS, Answer::recorded("list-pods-page1"));
    bed.api.lists("/api/v1/pods#more", Answer::list(Vec::new(), 500));
    bed.api.sends(PODS, &events("410-watch-too-old").concat());
    bed.api.was_asked("/api/v1/pods#more", 1).await;
    assert!(knows_all(&bed), "half of a list is nothing");
    assert_eq!(bed.health.report().away, None, "it is no fault");
    bed.api.lets_go("/api/v1/pods#more");
    bed.knows("the new list", |snapshot| workloads(snapshot) == ["bar/httpbin-a", "bar/httpbin-b", "bar/sleep-a"])
        .await;
}

#[tokio::test]
async fn a_410_as_the_answer_to_a_watch_leads_to_a_list() {
    let gone =
        r#"{"kind":"Status","status":"Failure","message":"too old resource version","reason":"Expired","code":410}"#;
    let bed = Bed::ready(|api| api.answers_once("/api/v1/pods#watch", Answer::Said(410, gone.into()))).await;
    bed.api.was_asked("/api/v1/pods?", 2).await;
    bed.api.is_watched(PODS).await;
    assert!(knows_all(&bed));
}

#[tokio::test]
async fn a_stream_that_the_server_refuses_with_500_is_tried_again_and_nothing_is_forgotten() {
    let bed = Bed::ready(|api| {
        for _ in 0..3 {
            api.answers_once("/api/v1/pods#watch", Answer::recorded("watchlist-refused-500"));
        }
    })
    .await;
    bed.api.is_watched(PODS).await;
    assert!(bed.api.asked("/api/v1/pods#watch").len() >= 4);
    bed.tells("that it is well again", |report| report.away.is_none() && report.times_away > 0).await;
    assert!(knows_all(&bed));
}

#[tokio::test]
async fn a_token_that_is_not_taken_is_told_of_and_nothing_is_believed() {
    let bed = Bed::with_token("another", |_| {}).await;
    let report = bed.tells("401", |report| report.away.as_ref().is_some_and(|why| why.contains("401"))).await;
    assert!(!report.ready);
    assert_eq!(bed.state.load().generation, 1);
}

#[tokio::test]
async fn a_kind_that_may_not_be_listed_is_named_and_nothing_is_believed_without_it() {
    let bed = Bed::start(|api| api.lists(PODS, Answer::recorded("403-anonymous"))).await;
    let report = bed.tells("403", |report| report.away.as_ref().is_some_and(|why| why.contains("403"))).await;
    let why = report.away.unwrap();
    assert!(why.starts_with("pods: ") && why.contains("cannot list resource \"pods\""), "{why}");
    assert!(!report.ready);
    bed.api.lists(PODS, Answer::recorded("list-pods"));
    bed.is_ready().await;
    bed.tells("that it is well", |report| report.away.is_none()).await;
}

#[tokio::test]
async fn a_rehearsal_names_the_kind_that_may_not_be_listed_and_does_without_those_that_a_cluster_can_be_without() {
    let bed = Bed::ready(|api| api.unlists(PEERS)).await;
    let source = Source::open(&bed.config, TrustDomains::default()).await.unwrap();
    source.rehearse(LONG).await.unwrap();
    bed.api.lists(PODS, Answer::recorded("403-anonymous"));
    let refused = with_causes(&source.rehearse(LONG).await.unwrap_err());
    assert!(refused.contains("pods cannot be listed") && refused.contains("403"), "{refused}");
    bed.api.unlists(PODS);
    assert!(source.rehearse(LONG).await.is_err(), "without pods there is nothing to follow");
}

#[tokio::test]
async fn while_the_server_refuses_everything_what_was_known_stays() {
    let bed = Bed::ready(|_| {}).await;
    let generation = bed.state.load().generation;
    for path in [PODS, PEERS, AUTHORIZATIONS] {
        bed.api.is_watched(path).await;
        bed.api.lists(&format!("{path}#watch"), Answer::recorded("401-bad-token"));
        bed.api.lists(path, Answer::recorded("403-anonymous"));
        bed.api.ends(path, true);
    }
    // Watches fail until lists are made, and these do, too.
    bed.api.was_asked("/api/v1/pods?", 2).await;
    let report = bed.tells("that it is away", |report| report.away.is_some()).await;
    assert!(report.ready && knows_all(&bed));
    assert_eq!(bed.state.load().generation, generation);
    for path in [PODS, PEERS, AUTHORIZATIONS] {
        bed.api.unlists(&format!("{path}#watch"));
    }
    bed.api.lists(PODS, Answer::list(vec![pod("only", |_| {})], 900));
    bed.api.lists(PEERS, Answer::recorded("list-peerauthentications"));
    bed.api.lists(AUTHORIZATIONS, Answer::recorded("list-authorizationpolicies"));
    bed.knows("the list after that", |snapshot| workloads(snapshot) == ["foo/only"]).await;
    bed.tells("that it is back", |report| report.away.is_none() && report.times_away == 1).await;
}

#[tokio::test]
async fn a_kind_that_is_suddenly_unknown_keeps_its_policies() {
    let bed = Bed::ready(|_| {}).await;
    bed.api.is_watched(PEERS).await;
    bed.api.unlists(PEERS);
    bed.api.sends(PEERS, &events("410-watch-too-old").concat());
    let report = bed.tells("404", |report| report.away.as_ref().is_some_and(|why| why.contains("404"))).await;
    assert!(!report.absent.contains(&"peerauthentications"));
    assert!(knows_all(&bed));
}

/// It may be that nobody was there to hear that the objects went, and then the kind.
#[tokio::test]
async fn a_kind_that_stays_unknown_for_long_is_gone_in_the_end() {
    let doubt = Duration::from_millis(400);
    let bed = Bed::with_settings(|settings| settings.doubt = doubt, |_| {}).await;
    bed.is_ready().await;
    bed.api.is_watched(PEERS).await;
    bed.api.unlists(PEERS);
    let since = Instant::now();
    bed.api.sends(PEERS, &events("410-watch-too-old").concat());
    let report = bed.tells("404", |report| report.away.as_ref().is_some_and(|why| why.contains("404"))).await;
    assert!(!report.absent.contains(&"peerauthentications"));
    bed.tells("that it is gone", |report| report.absent.contains(&"peerauthentications")).await;
    assert!(since.elapsed() >= doubt);
    bed.knows("it without", |snapshot| snapshot.policies.len() == 2).await;
    assert_eq!(bed.health.report().away, None);
}

/// Its objects went first, which the watch has told; and what is not there any more is not watched.
#[tokio::test]
async fn a_kind_that_goes_when_its_objects_have_gone_is_no_trouble() {
    let bed = Bed::ready(|api| api.lists(PEERS, Answer::list(Vec::new(), 300))).await;
    bed.api.is_watched(PEERS).await;
    bed.api.lists(&format!("{PEERS}#watch"), Answer::recorded("404-crd-absent"));
    bed.api.unlists(PEERS);
    bed.api.ends(PEERS, false);
    bed.tells("that it is gone", |report| report.absent.contains(&"peerauthentications")).await;
    assert_eq!((bed.health.report().away, bed.health.report().times_away), (None, 0));
    assert_eq!(bed.api.asked(&format!("{PEERS}#watch")).len(), 2, "once, and not until it is given up");
}

#[tokio::test]
async fn an_answer_that_is_no_list_or_is_cut_is_tried_again() {
    let Answer::Said(_, whole) = Answer::recorded("list-pods") else { panic!() };
    let bed = Bed::ready(|api| {
        api.answers_once(PODS, Answer::Said(200, "<html>a proxy's</html>".into()));
        api.answers_once(PODS, Answer::Stream(vec![whole[..whole.len() / 2].to_owned()], true));
        api.answers_once(PODS, Answer::Stream(vec![whole[..whole.len() / 2].to_owned()], false));
        api.answers_once(PODS, Answer::Said(503, "unavailable".into()));
    })
    .await;
    assert_eq!(bed.api.asked("/api/v1/pods?").len(), 5);
    assert!(knows_all(&bed));
}
