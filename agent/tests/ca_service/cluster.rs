//! Services in a cluster: several at once, with one root, one ledger and no leader; what becomes of them when the API server is away, forbids,
//! or has been written to by others.

use std::{fs, process::Command, sync::Arc};

use axum::http::Method;
use marline::{
    ca, config,
    control::{files::WatchSettings, trust::load_pinned},
    identity::{Ca, Trust, TrustDomain, TrustFiles},
};
use rustls::RootCertStore;
use serde_json::{Value, json};
use tonic::Code;

use crate::{bed::*, fake_cluster::FakeCluster};

pub const AGENT_A: &str = "pod:marline-system/marline-agent/agent-a";
pub const AGENT_B: &str = "pod:marline-system/marline-agent/agent-b";
const MAPS: &str = "/api/v1/namespaces/marline-system/configmaps";
const SECRETS: &str = "/api/v1/namespaces/marline-system/secrets";
const SECRET: &str = "/api/v1/namespaces/marline-system/secrets/marline-ca";

/// Two nodes with an agent each; shop/web and shop/db run on node-a, shop/api on node-b.
pub async fn cluster() -> Arc<FakeCluster> {
    let cluster = FakeCluster::start().await;
    cluster.pod("marline-system", "agent-a", "marline-agent", "node-a");
    cluster.pod("marline-system", "agent-b", "marline-agent", "node-b");
    cluster.pod("shop", "web-1", "web", "node-a");
    cluster.pod("shop", "db-1", "db", "node-a");
    cluster.pod("shop", "api-1", "api", "node-b");
    cluster
}

/// A client goes by the roots that are published.
fn take_root(cluster: &FakeCluster, bed: &Bed) {
    bed.write("ca/root-cert.pem", &cluster.root());
}

pub async fn running(cluster: &FakeCluster) -> Bed {
    let mut bed = cluster.service();
    bed.run().await;
    take_root(cluster, &bed);
    bed
}

pub fn trust(cluster: &FakeCluster) -> Trust {
    let mut roots = RootCertStore::empty();
    for root in der(&cluster.root()) {
        roots.add(root).unwrap();
    }
    Trust::new(TrustDomain::default(), Arc::new(roots))
}

fn ledger(cluster: &FakeCluster, node: &str) -> Value {
    let object = cluster.object("configmaps", &format!("marline-ca.{node}")).expect("no ledger");
    serde_json::from_str(object["data"]["ledger.json"].as_str().unwrap()).unwrap()
}

/// `IDENTITY SERIAL` of all that the ledger has.
pub fn listed(cluster: &FakeCluster, node: &str) -> Vec<String> {
    let book = ledger(cluster, node);
    let of = |(id, all): (&String, &Value)| -> Vec<String> {
        all.as_array().unwrap().iter().map(|one| format!("{id} {}", one[0].as_str().unwrap())).collect()
    };
    book["certificates"].as_object().unwrap().iter().flat_map(of).collect()
}

async fn start_fails(bed: &Bed) -> String {
    let (settings, _) = config::load_ca_server(&bed.path("ca.yaml")).unwrap();
    let error = ca::start(settings, WatchSettings::default()).await.err().expect("it started");
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        text.push_str(&format!(": {next}"));
        cause = next.source();
    }
    text
}

pub fn revoke(bed: &Bed, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marline"));
    command.args(["ca", "revoke", "--config"]).arg(bed.path("ca.yaml")).args(arguments);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_that_start_at_once_on_an_empty_cluster_end_with_one_root() {
    let cluster = cluster().await;
    // All of them have seen that there is nothing before the first makes something.
    cluster.gathers(Method::POST, SECRETS, 3);
    let mut beds = [cluster.service(), cluster.service(), cluster.service()];
    let [one, two, three] = &mut beds;
    tokio::join!(one.run(), two.run(), three.run());
    assert_eq!(cluster.asked(&format!("POST {SECRETS}")), 3, "they did meet");
    let root = cluster.root();
    assert_eq!(root.matches("BEGIN CERTIFICATE").count(), 1);
    for bed in &beds {
        take_root(&cluster, bed);
        let chain = bed.ask(AGENT_A, WEB).await.unwrap();
        assert_eq!(chain.last(), Some(&root));
        assert_eq!(verified(trust(&cluster), &chain).unwrap().to_string(), WEB);
    }
    assert_eq!(listed(&cluster, "node-a").len(), 3);
    // And one that comes later takes what is there.
    let late = running(&cluster).await;
    assert_eq!(late.ask(AGENT_A, DB).await.unwrap().last(), Some(&root));
    assert_eq!(cluster.asked(&format!("POST {SECRETS}")), 3);
}

#[tokio::test]
async fn an_agent_gets_those_of_pods_on_its_node_and_no_others() {
    let cluster = cluster().await;
    let bed = running(&cluster).await;
    assert!(bed.ask(AGENT_A, WEB).await.is_ok());
    assert!(bed.ask(AGENT_B, API).await.is_ok());
    refused(bed.ask(AGENT_A, API).await, Code::PermissionDenied, "node node-a runs no workload of shop/api");
    refused(bed.ask("pod:shop/web/web-1", DB).await, Code::PermissionDenied, "its own certificate alone");
    assert!(bed.ask("pod:shop/web/web-1", WEB).await.is_ok());
    // One that has run to its end runs there no more; one that was made just now does.
    cluster.change_pod("shop", "db-1", |pod| pod["status"]["phase"] = json!("Succeeded"));
    refused(bed.ask(AGENT_A, DB).await, Code::PermissionDenied, "runs no workload of shop/db");
    cluster.pod("shop", "db-2", "db", "node-a");
    cluster.is_not_cached("db-2");
    assert!(bed.ask(AGENT_A, DB).await.is_ok());
    // A name that would select something else if it were a text of the selector.
    let odd = "spiffe://cluster.local/ns/shop/sa/x,spec.nodeName=node-b";
    assert!(bed.ask(AGENT_A, odd).await.is_err());
    cluster.fails(Method::GET, "/api/v1/namespaces/shop/pods", 500);
    refused(bed.ask(AGENT_A, WEB).await, Code::Unavailable, "which pods the node has");
    assert_eq!(listed(&cluster, "node-a").len(), 3, "what was refused is not there");
}

#[tokio::test]
async fn where_the_review_names_no_node_the_tokens_pod_tells_it() {
    let cluster = cluster().await;
    cluster.names_pods_alone();
    let bed = running(&cluster).await;
    assert!(bed.ask(AGENT_A, WEB).await.is_ok());
    refused(bed.ask(AGENT_A, API).await, Code::PermissionDenied, "node node-a runs no workload");
    cluster.fails(Method::GET, "/api/v1/namespaces/marline-system/pods/agent-a", 403);
    refused(bed.ask(AGENT_A, WEB).await, Code::Unavailable, "the token's pod");
    cluster.fails(Method::GET, "/api/v1/namespaces/marline-system/pods/agent-a", 0);
    for (change, why) in [
        (("metadata", "uid", "another"), "not there any more"),
        (("metadata", "uid", "uid-agent-a"), ""),
        (("spec", "nodeName", ""), "runs on no node"),
    ] {
        cluster.change_pod("marline-system", "agent-a", |pod| pod[change.0][change.1] = json!(change.2));
        match why {
            "" => assert!(bed.ask(AGENT_A, WEB).await.is_ok()),
            why => refused(bed.ask(AGENT_A, WEB).await, Code::PermissionDenied, why),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_two_services_hand_out_at_once_is_all_in_the_ledger() {
    let cluster = cluster().await;
    let (one, two) = (running(&cluster).await, running(&cluster).await);
    // Both have read the same version.
    cluster.gathers(Method::GET, "/api/v1/namespaces/marline-system/configmaps/marline-ca.node-a", 2);
    let mut tasks = tokio::task::JoinSet::new();
    for (n, bed) in [&one, &two].into_iter().cycle().take(24).enumerate() {
        let mut client = bed.client().await;
        let id = if n % 3 == 0 { WEB } else { DB };
        tasks.spawn(async move {
            let (_, csr) = new_csr(id);
            (id, send(&mut client, AGENT_A, Some(id), &csr, 3600).await)
        });
    }
    let mut handed_out = Vec::new();
    for (id, result) in tasks.join_all().await {
        handed_out.push(format!("{id} {}", serial(&result.unwrap())));
    }
    let mut there = listed(&cluster, "node-a");
    handed_out.sort();
    there.sort();
    assert_eq!(handed_out, there);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_shut_out_gets_nothing_of_any_service_and_all_that_it_has_is_on_the_list() {
    let cluster = cluster().await;
    let (one, two) = (running(&cluster).await, running(&cluster).await);
    let before = [one.ask(AGENT_A, WEB).await.unwrap(), two.ask(AGENT_A, DB).await.unwrap()];
    let other = two.ask(AGENT_B, API).await.unwrap();

    // While others ask for more of it: what they get is on the list, or they get nothing.
    let mut tasks = tokio::task::JoinSet::new();
    for bed in [&one, &two].into_iter().cycle().take(40) {
        let mut client = bed.client().await;
        tasks.spawn(async move {
            let (_, csr) = new_csr(WEB);
            send(&mut client, AGENT_A, Some(WEB), &csr, 3600).await
        });
    }
    let (code, text) = tokio::task::block_in_place(|| revoke(&one, &["--node", "node-a"]));
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("is shut out") && text.contains("in ConfigMap marline-root"), "{text}");
    let meanwhile: Vec<_> = tasks.join_all().await.into_iter().filter_map(Result::ok).collect();
    for bed in [&one, &two] {
        refused(bed.ask(AGENT_A, WEB).await, Code::PermissionDenied, "was shut out at");
        assert!(bed.ask(AGENT_B, API).await.is_ok());
    }

    // An agent reads the list beside the root, as it is mounted.
    let mounted = tempfile::tempdir().unwrap();
    let published = cluster.object("configmaps", "marline-root").unwrap();
    for name in ["root.pem", "ca-crl.pem"] {
        fs::write(mounted.path().join(name), published["data"][name].as_str().unwrap()).unwrap();
    }
    let files = TrustFiles { domains: TrustDomain::default().into(), ..TrustFiles::default() };
    let judge = |chain: &[String]| verified(load_pinned(&mounted.path().join("root.pem"), &files).unwrap(), chain);
    for chain in before.iter().chain(&meanwhile) {
        assert!(judge(chain).is_err(), "one was left out of {} and 2", meanwhile.len());
    }
    assert_eq!(judge(&other).unwrap().to_string(), API);

    let (code, text) = tokio::task::block_in_place(|| revoke(&two, &["--node", "node-a"]));
    assert!(
        code == 0 && text.contains("was shut out already") && text.contains("not on the revocation list already"),
        "{text}"
    );
    let (_, text) = tokio::task::block_in_place(|| revoke(&two, &["--node", "node-a", "--undo"]));
    assert!(text.contains("may have certificates again"), "{text}");
    assert!(one.ask(AGENT_A, WEB).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_was_taken_away_is_put_back_and_one_of_a_root_that_is_gone_goes_too() {
    let cluster = cluster().await;
    let bed = running(&cluster).await;
    bed.ask(AGENT_A, WEB).await.unwrap();
    let (code, text) = tokio::task::block_in_place(|| revoke(&bed, &["--node", "node-a"]));
    assert_eq!(code, 0, "{text}");
    let list = || cluster.object("configmaps", "marline-root")?["data"].get("ca-crl.pem").cloned();
    let (there, looks) = (list(), || cluster.asked(&format!("GET {MAPS}/marline-root")));
    assert!(there.is_some());
    let before = looks();
    until("the service has seen the list", async || looks() > before + 1).await;
    cluster.write("configmaps", "marline-root", |object| {
        object["data"].as_object_mut().unwrap().remove("ca-crl.pem");
    });
    until("the list is there again", async || list() == there).await;
    cluster.delete("configmaps", "marline-root");
    until("it is there again with its object", async || list() == there).await;

    // Nobody believes what the old key has signed any more; its list would make agents refuse the new root.
    let next = Ca::new_files(&TrustDomain::default()).unwrap();
    let new_root = next.iter().find(|file| file.0 == "root-cert.pem").unwrap().1.clone();
    cluster.write("secrets", "marline-ca", |object| {
        for (name, bytes) in &next {
            object["data"][*name] = serde_json::to_value(k8s_openapi::ByteString(bytes.to_vec())).unwrap();
        }
    });
    until("the new root is published", async || cluster.root().as_bytes() == new_root.as_slice()).await;
    assert_eq!(list(), None);
    take_root(&cluster, &bed);
    until("the new root signs", async || bed.ask(AGENT_B, API).await.is_ok()).await;
    let (code, text) = tokio::task::block_in_place(|| revoke(&bed, &["--node", "node-b"]));
    assert!(code == 0 && list().is_some(), "{text}");
    let mounted = tempfile::tempdir().unwrap();
    let published = cluster.object("configmaps", "marline-root").unwrap();
    for name in ["root.pem", "ca-crl.pem"] {
        fs::write(mounted.path().join(name), published["data"][name].as_str().unwrap()).unwrap();
    }
    let files = TrustFiles { domains: TrustDomain::default().into(), ..TrustFiles::default() };
    assert!(load_pinned(&mounted.path().join("root.pem"), &files).is_ok());
}

#[tokio::test]
async fn without_the_ledger_there_is_no_certificate_and_the_service_is_not_ready() {
    let cluster = cluster().await;
    let bed = running(&cluster).await;
    assert!(bed.ask(AGENT_A, WEB).await.is_ok());
    assert_eq!(bed.status("/readyz").await.0, 200);
    for status in [403, 500, 409] {
        cluster.fails(Method::PUT, MAPS, status);
        refused(bed.ask(AGENT_A, WEB).await, Code::Unavailable, "cannot write down");
        cluster.fails(Method::GET, MAPS, status);
        assert_eq!(bed.status("/readyz").await.0, 503, "{status}");
        cluster.fails(Method::PUT, MAPS, 0);
        cluster.fails(Method::GET, MAPS, 0);
        assert_eq!(bed.status("/readyz").await.0, 200);
    }
    assert_eq!(listed(&cluster, "node-a").len(), 1);
    cluster.write("configmaps", "marline-ca.node-a", |object| {
        object["data"]["ledger.json"] = json!("{\"node\": \"node-b\"}")
    });
    refused(bed.ask(AGENT_A, WEB).await, Code::Unavailable, "cannot write down");
    assert!(bed.ask(AGENT_B, API).await.is_ok(), "others have ledgers of their own");
    cluster.fails(Method::POST, "/apis/authentication.k8s.io", 500);
    refused(bed.ask(AGENT_B, API).await, Code::Unavailable, "could not be asked about the token");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_published_root_is_kept_right_and_a_new_one_is_taken_by_all() {
    let cluster = cluster().await;
    let (one, two) = (running(&cluster).await, running(&cluster).await);
    assert!(one.ask(AGENT_A, WEB).await.is_ok());
    let root = cluster.root();
    cluster.write("configmaps", "marline-root", |object| {
        object["data"]["root.pem"] = json!("mine");
        object["data"]["more"] = json!("is left alone");
    });
    until("the root is right again", async || cluster.root() == root).await;
    assert_eq!(cluster.object("configmaps", "marline-root").unwrap()["data"]["more"], "is left alone");
    cluster.delete("configmaps", "marline-root");
    until("the root is there again", async || cluster.object("configmaps", "marline-root").is_some()).await;

    // A root is rotated by what is in the Secret: both are believed, the new one signs.
    let next = Ca::new_files(&TrustDomain::default()).unwrap();
    let encoded = |bytes: &[u8]| serde_json::to_value(k8s_openapi::ByteString(bytes.to_vec())).unwrap();
    let of = |name: &str| next.iter().find(|file| file.0 == name).unwrap().1.clone();
    let both = [of("root-cert.pem").as_slice(), root.as_bytes()].concat();
    cluster.write("secrets", "marline-ca", |object| {
        for name in ["ca-key.pem", "ca-cert.pem", "cert-chain.pem"] {
            object["data"][name] = encoded(&of(name));
        }
        object["data"]["root-cert.pem"] = encoded(&both);
    });
    until("both roots are published", async || cluster.root().matches("BEGIN").count() == 2).await;
    let new = der(std::str::from_utf8(&of("root-cert.pem")).unwrap());
    for bed in [&one, &two] {
        take_root(&cluster, bed);
        until("the new root signs", async || {
            let chain = bed.ask(AGENT_A, WEB).await.unwrap();
            let mut roots = RootCertStore::empty();
            roots.add(new[0].clone()).unwrap();
            verified(Trust::new(TrustDomain::default(), Arc::new(roots)), &chain).is_ok()
        })
        .await;
    }
    // Half of it is refused.
    let published = cluster.root();
    cluster.write("secrets", "marline-ca", |object| object["data"]["ca-cert.pem"] = encoded(root.as_bytes()));
    one.reloaded("ca", "rejected", 1).await;
    assert!(one.ask(AGENT_A, WEB).await.is_ok());
    assert_eq!(cluster.root(), published);
    // What the old key has signed, `revoke` says that it could not list.
    cluster.write("secrets", "marline-ca", |object| object["data"]["ca-cert.pem"] = encoded(&of("ca-cert.pem")));
    let (code, text) = tokio::task::block_in_place(|| revoke(&one, &["--node", "node-a"]));
    assert!(code == 1 && text.contains("NOT revoked") && text.contains("signed with another key"), "{code} {text}");
}

#[tokio::test]
async fn a_root_that_is_believed_is_never_replaced_by_a_new_one_because_its_key_is_gone() {
    let cluster = cluster().await;
    let bed = running(&cluster).await;
    cluster.delete("secrets", "marline-ca");
    let text = start_fails(&cluster.service()).await;
    assert!(text.contains("Secret marline-ca is gone") && text.contains("or delete the ConfigMap too"), "{text}");
    bed.reloaded("ca", "rejected", 1).await;
    assert!(cluster.object("secrets", "marline-ca").is_none());
    assert!(bed.ask(AGENT_A, WEB).await.is_ok(), "who has it goes on");
}

#[tokio::test]
async fn a_service_that_may_not_or_cannot_start_says_why() {
    let cluster = cluster().await;
    for (method, path, status, why) in [
        (Method::GET, SECRET, 403, "Secret marline-ca: this service may not do that (403)"),
        (Method::GET, SECRET, 401, "does not take this service's own token (401)"),
        (Method::POST, SECRETS, 403, "making Secret marline-ca: this service may not"),
        (Method::POST, MAPS, 403, "writing ConfigMap marline-root: this service may not"),
        (Method::POST, MAPS, 409, "others write it all the time"),
        (Method::GET, MAPS, 500, "ConfigMap marline-root: told to (500)"),
    ] {
        cluster.fails(method.clone(), path, status);
        let text = start_fails(&cluster.service()).await;
        assert!(text.contains(why), "{text}");
        cluster.fails(method, path, 0);
    }
    let bed = cluster.service();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text =
        fs::read_to_string(bed.path("ca.yaml")).unwrap().replace(&cluster.address.to_string(), &nobody.to_string());
    bed.write("ca.yaml", &text);
    assert!(start_fails(&bed).await.contains("ConfigMap marline-root"));
}
