//! What a cluster's services need not remember any more goes: ledgers that hold nothing, whichever service finds them, and what has expired
//! from the revocation list. Nothing that counts is forgotten with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::http::Method;
use marline::identity::hex;
use serde_json::{Value, json};
use tonic::Code;
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use crate::{
    bed::*,
    cluster::{AGENT_A, AGENT_B, cluster, listed, revoke, running},
    fake_cluster::FakeCluster,
};

const DAY: i64 = 86_400;

/// `{"WEB": [[SERIAL, END, SIGNER]]}` with an end that is so many seconds from now.
fn ending_in(seconds: i64) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    json!({WEB: [["4A", now.checked_add_signed(seconds).unwrap(), "abcdefabcdefabcd"]]})
}

/// A ledger as a service leaves it.
fn put(cluster: &FakeCluster, name: &str, text: &str) {
    cluster.write("configmaps", name, |object| {
        object["metadata"]["labels"] = json!({"marline.io/ca-ledger": "true"});
        object["data"] = json!({"ledger.json": text});
    });
}

fn put_book(cluster: &FakeCluster, book: &Value) {
    put(cluster, &format!("marline-ca.{}", book["node"].as_str().unwrap()), &book.to_string());
}

#[tokio::test]
async fn ledgers_that_hold_nothing_any_more_are_deleted_and_no_others() {
    let cluster = cluster().await;
    // More than are read at once.
    let gone: Vec<String> = (0..60).map(|n| format!("gone-{n:02}")).collect();
    for node in &gone {
        put_book(&cluster, &json!({"node": node, "certificates": ending_in(-2 * DAY)}));
    }
    put_book(&cluster, &json!({"node": "let-in-again", "certificates": {}}));
    put_book(
        &cluster,
        &json!({"node": "shut-out", "shut_out": "2026-01-01T00:00:00Z", "certificates": ending_in(-2 * DAY)}),
    );
    put_book(&cluster, &json!({"node": "the-last", "certificates": ending_in(-2 * DAY)}));
    put_book(&cluster, &json!({"node": "lives", "certificates": ending_in(60)}));
    put_book(&cluster, &json!({"node": "ended-just-now", "certificates": ending_in(-60)}));
    put_book(&cluster, &json!({"node": "of-a-later-version", "certificates": {}, "more": 1}));
    put(&cluster, "marline-ca.half", "{");
    put(&cluster, "marline-ca.of-another", &json!({"node": "another"}).to_string());
    cluster
        .write("configmaps", "somebody-elses", |object| object["data"] = json!({"ledger.json": "{\"node\": \"x\"}"}));

    // Two services: what one of them has deleted is not there for the other.
    let (_one, _two) = (running(&cluster).await, running(&cluster).await);
    let there = |name: &str| cluster.object("configmaps", name).is_some();
    // They are read in this order.
    until("the end of the last", async || !there("marline-ca.the-last")).await;
    for node in gone.iter().map(String::as_str).chain(["let-in-again"]) {
        assert!(!there(&format!("marline-ca.{node}")), "{node}");
    }
    for node in ["shut-out", "lives", "ended-just-now", "of-a-later-version", "half", "of-another"] {
        assert!(there(&format!("marline-ca.{node}")), "{node}");
    }
    assert!(there("somebody-elses") && there("marline-root"));
    for deletion in cluster.deletions() {
        assert_eq!(deletion.conditions, ["resourceVersion", "uid"], "{}", deletion.path);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_is_written_while_it_is_being_deleted_stays() {
    for shuts_out in [false, true] {
        let cluster = cluster().await;
        put_book(&cluster, &json!({"node": "node-a", "certificates": ending_in(-2 * DAY)}));
        let ledger = "/api/v1/namespaces/marline-system/configmaps/marline-ca.node-a";
        cluster.holds(Some((Method::DELETE, ledger)));
        let one = running(&cluster).await;
        until("it is about to be deleted", async || cluster.asked(&format!("DELETE {ledger}")) == 1).await;
        let mut kept = Vec::new();
        if shuts_out {
            let (code, text) = tokio::task::block_in_place(|| revoke(&one, &["--node", "node-a"]));
            assert_eq!(code, 0, "{text}");
        } else {
            kept.push(format!("{WEB} {}", serial(&one.ask(AGENT_A, WEB).await.unwrap())));
        }
        cluster.holds(None);
        until("the answer", async || cluster.deletions().len() == 1).await;
        assert!(!cluster.deletions()[0].done);
        assert_eq!(listed(&cluster, "node-a"), kept);
        match shuts_out {
            true => refused(one.ask(AGENT_A, WEB).await, Code::PermissionDenied, "was shut out"),
            false => assert!(one.ask(AGENT_A, DB).await.is_ok()),
        }
    }
}

#[tokio::test]
async fn a_ledger_that_is_deleted_between_reading_and_writing_it_is_made_anew() {
    let cluster = cluster().await;
    let one = running(&cluster).await;
    one.ask(AGENT_A, WEB).await.unwrap();
    let ledger = "/api/v1/namespaces/marline-system/configmaps/marline-ca.node-a";
    // The service has read it, and its write is kept back.
    cluster.holds(Some((Method::PUT, ledger)));
    let mut client = one.client().await;
    let (_, csr) = new_csr(DB);
    let asked = tokio::spawn(async move { send(&mut client, AGENT_A, Some(DB), &csr, 3600).await });
    until("the write", async || cluster.asked(&format!("PUT {ledger}")) == 1).await;
    cluster.delete("configmaps", "marline-ca.node-a");
    cluster.holds(None);
    let chain = tokio::time::timeout(Duration::from_secs(20), asked).await.unwrap().unwrap().unwrap();
    assert_eq!(listed(&cluster, "node-a"), [format!("{DB} {}", serial(&chain))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_expired_goes_from_the_published_list_and_what_is_not_known_to_have_stays() {
    let cluster = cluster().await;
    let bed = running(&cluster).await;
    let of = |chain: &[String]| serial(chain);
    let (web, db) = (bed.ask(AGENT_A, WEB).await.unwrap(), bed.ask(AGENT_A, DB).await.unwrap());
    let shut_out = |node: &str| {
        let (code, text) = tokio::task::block_in_place(|| revoke(&bed, &["--node", node]));
        assert_eq!(code, 0, "{text}");
    };
    let published = || cluster.object("configmaps", "marline-root").unwrap()["data"].clone();
    let expiries = || -> BTreeMap<String, u64> {
        serde_json::from_str(published()["ca-crl-expiries.json"].as_str().unwrap()).unwrap()
    };
    let listed = || -> BTreeSet<String> {
        let list = pem::parse(published()["ca-crl.pem"].as_str().unwrap()).unwrap();
        let (_, list) = CertificateRevocationList::from_der(list.contents()).unwrap();
        let serials = list.iter_revoked_certificates().map(|entry| hex::upper(entry.raw_serial()));
        serials.collect()
    };
    shut_out("node-a");
    assert_eq!(listed(), [of(&web), of(&db)].into());
    let end = |chain: &[String]| not_after(chain).duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(expiries(), [(of(&web), end(&web)), (of(&db), end(&db))].into());
    // One had expired before it was listed, as is written there, and of the other nothing is.
    let text = json!({of(&web): 1}).to_string();
    cluster.write("configmaps", "marline-root", |object| object["data"]["ca-crl-expiries.json"] = json!(text));
    let api = bed.ask(AGENT_B, API).await.unwrap();
    shut_out("node-b");
    assert_eq!(listed(), [of(&db), of(&api)].into());
    assert_eq!(expiries(), [(of(&api), end(&api))].into());
}
