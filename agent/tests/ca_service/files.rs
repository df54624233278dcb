//! The files that the service follows: what is good in them counts at once, what is not changes nothing.

use std::fs;

use marline::identity::{Ca, TrustDomain};
use tonic::Code;

use crate::bed::*;

#[tokio::test]
async fn tokens_come_and_go_with_their_file() {
    let bed = Bed::start("").await;
    bed.reloaded("tokens", "accepted", 1).await;
    bed.write("tokens.yaml", &tokens(&[("new", "node-a", "")]));
    bed.reloaded("tokens", "accepted", 2).await;
    assert!(bed.ask("new", WEB).await.is_ok());
    refused(bed.ask(TOKEN_A, WEB).await, Code::Unauthenticated, "not known here");

    bed.write("tokens.yaml", "kind: nonsense");
    bed.reloaded("tokens", "rejected", 1).await;
    assert!(bed.ask("new", WEB).await.is_ok(), "the last good ones stay");
    fs::remove_file(bed.path("tokens.yaml")).unwrap();
    bed.reloaded("tokens", "rejected", 2).await;
    assert!(bed.ask("new", WEB).await.is_ok());
}

#[tokio::test]
async fn what_runs_on_a_node_changes_with_its_file() {
    let bed = Bed::start("").await;
    bed.reloaded("nodes", "accepted", 1).await;
    refused(bed.ask(TOKEN_B, WEB).await, Code::PermissionDenied, "runs no workload");
    bed.write("nodes.yaml", &NODES.replace("[shop/api]", "[shop/api, shop/web]").replace("[shop/web, shop/db]", "[]"));
    bed.reloaded("nodes", "accepted", 2).await;
    assert!(bed.ask(TOKEN_B, WEB).await.is_ok());
    refused(bed.ask(TOKEN_A, WEB).await, Code::PermissionDenied, "runs no workload");
    bed.write("nodes.yaml", &NODES.replace("shop/api", "shop"));
    bed.reloaded("nodes", "rejected", 1).await;
    assert!(bed.ask(TOKEN_B, WEB).await.is_ok(), "the last good one stays");
}

#[tokio::test]
async fn a_ca_that_is_replaced_signs_from_then_on_and_half_of_one_does_not() {
    let bed = Bed::start("").await;
    bed.reloaded("ca", "accepted", 1).await;
    let before = bed.ask(TOKEN_A, WEB).await.unwrap();
    Ca::init(&bed.path("next"), &TrustDomain::default()).unwrap();
    let old_root = bed.path("old-root.pem");
    fs::copy(bed.path("ca/root-cert.pem"), &old_root).unwrap();

    // The key first: it does not fit the certificate.
    fs::copy(bed.path("next/ca-key.pem"), bed.path("ca/ca-key.pem")).unwrap();
    bed.reloaded("ca", "rejected", 1).await;
    let mut client = bed.client().await;
    let (_, csr) = new_csr(WEB);
    let meanwhile = send(&mut client, TOKEN_A, Some(WEB), &csr, 60).await.unwrap();
    assert_eq!(meanwhile[1], before[1], "the last good one signs");

    for name in ["root-cert.pem", "cert-chain.pem", "ca-cert.pem"] {
        fs::copy(bed.path("next").join(name), bed.path("ca").join(name)).unwrap();
    }
    bed.reloaded("ca", "accepted", 2).await;
    // A connection of before goes on, a new one sees a certificate of the new CA.
    let after = send(&mut client, TOKEN_A, Some(WEB), &csr, 60).await.unwrap();
    assert_eq!(der(&after[1]), der(&fs::read_to_string(bed.path("next/root-cert.pem")).unwrap()));
    assert!(
        connect(bed.address(), &old_root, "127.0.0.1".parse().unwrap()).await.is_err(),
        "the old root is not shown"
    );
    let again = bed.ask(TOKEN_A, WEB).await.unwrap();
    assert_eq!(again[1], after[1]);
}

#[tokio::test]
async fn all_roots_come_last_while_a_root_is_rotated() {
    let bed = Bed::start("").await;
    bed.reloaded("ca", "accepted", 1).await;
    Ca::init(&bed.path("next"), &TrustDomain::default()).unwrap();
    let own = fs::read_to_string(bed.path("ca/root-cert.pem")).unwrap();
    let both = format!("{own}{}", fs::read_to_string(bed.path("next/root-cert.pem")).unwrap());
    fs::write(bed.path("ca/root-cert.pem"), &both).unwrap();
    bed.reloaded("ca", "accepted", 2).await;
    let chain = bed.ask(TOKEN_A, WEB).await.unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(der(&chain[1]), der(&both));
}
