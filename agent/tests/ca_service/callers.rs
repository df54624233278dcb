//! Who a caller is by its token, and what it may have.

use std::time::{Duration, SystemTime};

use prost_types::value::Kind;
use tonic::{Code, Request};

use crate::bed::*;
use marline::identity::wire::istio::{CertificateRequest, IMPERSONATED_IDENTITY};

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

#[tokio::test]
async fn nobody_gets_a_certificate_without_a_token_that_counts() {
    let bed = Bed::start("").await;
    let (_, csr) = new_csr(WEB);
    let mut client = bed.client().await;
    refused(send(&mut client, "", Some(WEB), &csr, 60).await, Code::Unauthenticated, "authorization: Bearer TOKEN");
    bed.noted("unauthenticated", "there is no token");
    for token in ["unknown", "token-of-node-", "token-of-node-aa", &"x".repeat(4000)] {
        refused(send(&mut client, token, Some(WEB), &csr, 60).await, Code::Unauthenticated, "not known here");
        let line = bed.noted("unauthenticated", "not known here");
        assert!(line["node"].is_null() && line["identity"].is_null(), "{line}");
    }
    let mut request = Request::new(CertificateRequest { csr, validity_duration: 60, metadata: None });
    request.metadata_mut().insert("authorization", format!("Basic {TOKEN_A}").parse().unwrap());
    refused(client.create_certificate(request).await, Code::Unauthenticated, "there is no token");
    assert!(!std::fs::read_to_string(bed.path("state/ledger.jsonl")).unwrap().contains(TOKEN_A), "no secret is noted");
}

#[tokio::test]
async fn a_token_that_is_expired_for_another_audience_or_from_elsewhere_is_refused() {
    let mut bed = Bed::files("");
    let hour = Duration::from_secs(3_600);
    let (past, future) = (time(SystemTime::now() - hour), time(SystemTime::now() + hour));
    bed.write(
        "tokens.yaml",
        &tokens(&[
            (
                "good",
                "node-a",
                &format!(", expires: \"{future}\", audience: marline-ca, from: [127.0.0.2, 10.0.0.0/8]"),
            ),
            ("old", "node-a", &format!(", expires: \"{past}\"")),
            ("other", "node-a", ", audience: istio-ca"),
        ]),
    );
    bed.run().await;
    let (_, csr) = new_csr(WEB);
    let mut here = bed.client().await;
    let mut allowed = bed.client_from("127.0.0.2".parse().unwrap()).await;
    assert!(send(&mut allowed, "good", Some(WEB), &csr, 60).await.is_ok());
    for (token, reason) in [
        ("good", "may not be used from 127.0.0.1"),
        ("old", "has expired"),
        ("other", "meant for another audience than this service, marline-ca"),
    ] {
        refused(send(&mut here, token, Some(WEB), &csr, 60).await, Code::Unauthenticated, reason);
        bed.noted("unauthenticated", reason);
    }
}

#[tokio::test]
async fn a_node_gets_certificates_for_what_runs_on_it_alone() {
    let bed = Bed::start("").await;
    for (token, id) in [(TOKEN_A, WEB), (TOKEN_A, DB), (TOKEN_B, API)] {
        assert!(bed.ask(token, id).await.is_ok(), "{id}");
    }
    for (token, id, reason) in [
        (TOKEN_B, WEB, "node node-b runs no workload of shop/web"),
        (TOKEN_A, API, "node node-a runs no workload of shop/api"),
        (TOKEN_A, "spiffe://cluster.local/ns/other/sa/web", "runs no workload of other/web"),
        (TOKEN_A, "spiffe://other.example/ns/shop/sa/web", "is not of this CA's trust domain, cluster.local"),
    ] {
        refused(bed.ask(token, id).await, Code::PermissionDenied, reason);
        let line = bed.noted("permission_denied", reason);
        assert_eq!(line["identity"], id);
    }
}

#[tokio::test]
async fn an_agent_must_say_for_whom_and_say_it_well() {
    let bed = Bed::start("").await;
    let (_, csr) = new_csr(WEB);
    let mut client = bed.client().await;
    refused(
        send(&mut client, TOKEN_A, None, &csr, 60).await,
        Code::InvalidArgument,
        "metadata.ImpersonatedIdentity is missing",
    );
    for id in ["", "web", "spiffe://cluster.local", "spiffe://cluster.local/ns/shop/sa/web/x", &"x".repeat(3000)] {
        let result = send(&mut client, TOKEN_A, Some(id), &csr, 60).await;
        refused(result, Code::InvalidArgument, "metadata.ImpersonatedIdentity");
    }
    let value = prost_types::Value { kind: Some(Kind::NumberValue(1.0)) };
    let metadata = prost_types::Struct { fields: [(IMPERSONATED_IDENTITY.to_owned(), value)].into() };
    let mut request = Request::new(CertificateRequest { csr, validity_duration: 60, metadata: Some(metadata) });
    request.metadata_mut().insert("authorization", format!("Bearer {TOKEN_A}").parse().unwrap());
    refused(client.create_certificate(request).await, Code::InvalidArgument, "must be a text");
}

#[tokio::test]
async fn a_node_that_asks_too_often_is_told_when_to_come_back_and_others_are_not_kept_waiting() {
    let bed = Bed::start("limits: {perNode: {perMinute: 1, burst: 3}}").await;
    for _ in 0..3 {
        assert!(bed.ask(TOKEN_A, WEB).await.is_ok());
    }
    let reason = "node node-a asks more often than 1 times a minute (limits.perNode): come back in";
    refused(bed.ask(TOKEN_A, WEB).await, Code::ResourceExhausted, reason);
    bed.noted("resource_exhausted", reason);
    assert!(bed.ask(TOKEN_B, API).await.is_ok());
    assert!(bed.status("/metrics").await.1.contains("marline_ca_requests_total{outcome=\"resource_exhausted\"} 1"));
}
