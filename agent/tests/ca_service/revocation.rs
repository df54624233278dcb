//! Shutting a node out, while the service runs and while it does not: no more certificates, and none of those that it has counts.

use std::{collections::HashSet, fs, pin::pin, sync::Arc, time::Duration};

use marline::{
    ca::{
        ledger::file,
        revoke::{self, Outcome},
    },
    identity::{Ca, Trust, TrustDomain, TrustFiles},
};
use tokio::time::timeout;
use tonic::Code;
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use crate::bed::*;

fn revoked(bed: &Bed, node: &str) -> Outcome {
    revoke::revoke(&bed.kept(), node).unwrap()
}

/// What an agent whose CA files these are believes.
fn trust(bed: &Bed) -> Trust {
    let files = TrustFiles { domains: TrustDomain::default().into(), ..TrustFiles::default() };
    files.load(&bed.path("ca"), &bed.ca()).unwrap()
}

/// The CRL number and the serials of the last list in the file.
fn list(bed: &Bed) -> (u64, HashSet<String>) {
    let pem = fs::read(bed.path("ca/ca-crl.pem")).unwrap();
    let last = pem::parse_many(&pem).unwrap().pop().unwrap();
    let (_, list) = CertificateRevocationList::from_der(last.contents()).unwrap();
    let serials = list.iter_revoked_certificates();
    let serials = serials.map(|entry| entry.raw_serial().iter().map(|byte| format!("{byte:02X}")).collect()).collect();
    (list.crl_number().unwrap().try_into().unwrap(), serials)
}

#[tokio::test]
async fn a_node_that_is_shut_out_gets_no_certificate_and_those_it_has_are_refused() {
    let bed = Bed::start("").await;
    let (a, also_a, b) = (
        bed.ask(TOKEN_A, WEB).await.unwrap(),
        bed.ask(TOKEN_A, DB).await.unwrap(),
        bed.ask(TOKEN_B, API).await.unwrap(),
    );
    assert!(verified(trust(&bed), &a).is_ok());
    let outcome = revoked(&bed, "node-a");
    assert!(outcome.changed && outcome.known, "{outcome:?}");
    assert_eq!((outcome.list.unwrap().1, outcome.other_signer, outcome.unreadable), (2, 0, 0));

    // The token is as good as before; it is the node that is shut out.
    refused(bed.ask(TOKEN_A, WEB).await, Code::PermissionDenied, "node node-a was shut out at 2");
    let line = bed.noted("permission_denied", "was shut out");
    assert!(line["serial"].is_null(), "{line}");
    assert!(bed.ask(TOKEN_B, API).await.is_ok());
    for chain in [&a, &also_a] {
        let error = verified(trust(&bed), chain).unwrap_err();
        assert!(error.contains("Revoked"), "{error}");
    }
    assert!(verified(trust(&bed), &b).is_ok());

    let (number, serials) = list(&bed);
    assert_eq!(serials, [serial(&a), serial(&also_a)].into());
    let again = revoked(&bed, "node-a");
    assert!(!again.changed && again.list.is_none(), "{again:?}");
    assert_eq!(list(&bed), (number, serials));
}

#[tokio::test]
async fn a_node_that_is_let_in_again_gets_new_certificates_and_the_old_ones_stay_revoked() {
    let bed = Bed::start("").await;
    let before = bed.ask(TOKEN_A, WEB).await.unwrap();
    revoked(&bed, "node-a");
    let (first, _) = list(&bed);
    let settings = bed.kept();
    assert!(revoke::undo(&settings, "node-a").unwrap());
    assert!(!revoke::undo(&settings, "node-a").unwrap());
    let after = bed.ask(TOKEN_A, WEB).await.unwrap();
    assert!(verified(trust(&bed), &before).is_err());
    assert!(verified(trust(&bed), &after).is_ok());
    // And once more: what is listed stays listed, and the number grows.
    assert_eq!(revoked(&bed, "node-a").list.unwrap().1, 1);
    let (second, serials) = list(&bed);
    assert!(second > first);
    assert_eq!(serials, [serial(&before), serial(&after)].into());
}

#[tokio::test]
async fn what_has_expired_goes_from_the_list_and_what_is_not_known_to_have_stays() {
    let bed = Bed::start("").await;
    let (web, db) = (bed.ask(TOKEN_A, WEB).await.unwrap(), bed.ask(TOKEN_A, DB).await.unwrap());
    revoked(&bed, "node-a");
    assert_eq!(list(&bed).1, [serial(&web), serial(&db)].into());
    // The ledger says that one had expired before it was listed, and of the other nothing any more.
    let mut lines = bed.ledger();
    lines.retain(|line| line["serial"] != serial(&db));
    lines
        .iter_mut()
        .filter(|line| line["serial"] == serial(&web))
        .for_each(|line| line["not_after"] = "2026-01-01T00:00:00Z".into());
    bed.write("state/ledger.jsonl", &lines.iter().map(|line| format!("{line}\n")).collect::<String>());
    let api = bed.ask(TOKEN_B, API).await.unwrap();
    let outcome = revoked(&bed, "node-b");
    assert_eq!(outcome.list.unwrap().1, 1);
    assert_eq!(list(&bed).1, [serial(&db), serial(&api)].into());
    // What another key has signed is not the certificate that is listed.
    let mut lines = bed.ledger();
    let line = lines.iter_mut().find(|line| line["serial"] == serial(&api)).unwrap();
    (line["not_after"], line["signer"]) = ("2026-01-01T00:00:00Z".into(), "00".into());
    bed.write("state/ledger.jsonl", &lines.iter().map(|line| format!("{line}\n")).collect::<String>());
    revoke::undo(&bed.kept(), "node-b").unwrap();
    let next = bed.ask(TOKEN_B, API).await.unwrap();
    revoked(&bed, "node-b");
    assert_eq!(list(&bed).1, [serial(&db), serial(&api), serial(&next)].into());
}

#[tokio::test]
async fn a_node_can_be_shut_out_while_no_service_runs() {
    let mut bed = Bed::start("").await;
    let chain = bed.ask(TOKEN_A, WEB).await.unwrap();
    bed.running.take().unwrap().stop().await.unwrap();
    // What was moved away is part of the ledger.
    fs::rename(bed.path("state/ledger.jsonl"), bed.path("state/ledger.jsonl.1")).unwrap();
    assert_eq!(revoked(&bed, "node-a").list.unwrap().1, 1);
    assert!(verified(trust(&bed), &chain).is_err());
    bed.run().await;
    refused(bed.ask(TOKEN_A, WEB).await, Code::PermissionDenied, "was shut out");
}

#[tokio::test]
async fn other_lists_in_the_file_stay_and_what_another_key_has_signed_is_told() {
    let bed = Bed::start("").await;
    bed.reloaded("ca", "accepted", 1).await;
    bed.ask(TOKEN_A, WEB).await.unwrap();
    revoked(&bed, "node-a");
    let first = fs::read_to_string(bed.path("ca/ca-crl.pem")).unwrap();
    let settings = bed.kept();
    revoke::undo(&settings, "node-a").unwrap();
    bed.ask(TOKEN_A, WEB).await.unwrap();

    // Another root, with the old one beside it.
    let old = fs::read_to_string(bed.path("ca/root-cert.pem")).unwrap();
    Ca::init(&bed.path("next"), &TrustDomain::default()).unwrap();
    let new = fs::read_to_string(bed.path("next/root-cert.pem")).unwrap();
    fs::write(bed.path("ca/root-cert.pem"), format!("{new}{old}")).unwrap();
    for name in ["cert-chain.pem", "ca-cert.pem", "ca-key.pem"] {
        fs::copy(bed.path("next").join(name), bed.path("ca").join(name)).unwrap();
    }
    until("the new CA signs", async || {
        let chain = bed.ask(TOKEN_A, WEB).await.unwrap();
        let lines = bed.ledger();
        assert_eq!(lines.last().unwrap()["serial"], serial(&chain));
        lines.first().unwrap()["signer"] != lines.last().unwrap()["signer"]
    })
    .await;
    let outcome = revoked(&bed, "node-a");
    assert!(outcome.other_signer >= 2, "{outcome:?}");
    assert!(outcome.list.unwrap().1 >= 1);
    let both = fs::read_to_string(bed.path("ca/ca-crl.pem")).unwrap();
    assert!(both.starts_with(&first), "the old CA's list is there as it was");
    assert_eq!(pem::parse_many(&both).unwrap().len(), 2);
    assert_eq!(trust(&bed).revoked().len(), 2, "agents take both");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_certificate_falls_between_the_list_and_being_shut_out() {
    let bed = Arc::new(Bed::start("limits: {perNode: {perMinute: 100000, burst: 100000}}").await);
    let mut asking = Vec::new();
    for _ in 0..4 {
        let bed = Arc::clone(&bed);
        asking.push(tokio::spawn(async move {
            let mut client = bed.client().await;
            let (_, csr) = new_csr(WEB);
            let mut serials = Vec::new();
            loop {
                match send(&mut client, TOKEN_A, Some(WEB), &csr, 3600).await {
                    Ok(chain) => serials.push(serial(&chain)),
                    Err(status) => return (serials, status),
                }
            }
        }));
    }
    until("some certificates", async || bed.ledger_lines() > 40).await;
    let there = Arc::clone(&bed);
    tokio::task::spawn_blocking(move || revoked(&there, "node-a")).await.unwrap();
    let (_, listed) = list(&bed);
    for task in asking {
        let (serials, status) = task.await.unwrap();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        assert!(serials.iter().all(|serial| listed.contains(serial)));
    }
}

#[tokio::test]
async fn while_a_node_is_being_shut_out_no_certificate_is_handed_out() {
    let bed = Bed::start("").await;
    let lock = file::lock(&bed.path("state")).unwrap();
    let (_, csr) = new_csr(WEB);
    let mut client = bed.client().await;
    let mut asked = pin!(send(&mut client, TOKEN_A, Some(WEB), &csr, 60));
    assert!(timeout(Duration::from_millis(300), &mut asked).await.is_err(), "it waits for the lock");
    bed.write("state/revoked-nodes.json", "{\"node-a\": \"2026-01-01T00:00:00Z\"}");
    drop(lock);
    refused(asked.await, Code::PermissionDenied, "was shut out at 2026-01-01");
}

#[tokio::test]
async fn a_list_of_nodes_that_cannot_be_read_shuts_out_everybody() {
    let bed = Bed::start("").await;
    bed.write("state/revoked-nodes.json", "{");
    refused(bed.ask(TOKEN_A, WEB).await, Code::Unavailable, "issues none");
    bed.write("state/revoked-nodes.json", "{}");
    assert!(bed.ask(TOKEN_A, WEB).await.is_ok());
}
