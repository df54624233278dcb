//! What the cluster's CA service may do in a cluster is what it does.

use crate::{bed::*, cluster, fake_cluster::FakeCluster, rights};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cas_roles_grant_what_it_asks_for_and_nothing_else() {
    let api = FakeCluster::start().await;
    api.names_pods_alone();
    api.pod("marline-system", "agent-a", "marline-agent", "node-a");
    api.pod("shop", "web-1", "web", "node-a");
    let mut bed = api.service();
    // Something is over, and is deleted.
    let gone = "marline-ca.gone";
    api.write("configmaps", gone, |object| {
        object["metadata"]["labels"] = serde_json::json!({"marline.io/ca-ledger": "true"});
        object["data"] = serde_json::json!({"ledger.json": "{\"node\": \"gone\"}"});
    });
    bed.run().await;
    bed.write("ca/root-cert.pem", &api.root());
    let agent = "pod:marline-system/marline-agent/agent-a";
    for _ in 0..2 {
        bed.ask(agent, WEB).await.unwrap();
    }
    let (code, text) = tokio::task::block_in_place(|| cluster::revoke(&bed, &["--node", "node-a"]));
    assert_eq!(code, 0, "{text}");
    assert!(bed.ask(agent, WEB).await.is_err(), "shut out");
    until("the end of what is over", async || api.object("configmaps", gone).is_none()).await;
    let granted = rights::granted("marline-ca");
    let mut used = rights::Rights::new();
    for asked in api.all_asked() {
        let (method, path) = asked.split_once(' ').unwrap();
        let (taken, name) = rights::taken(method, path, "");
        let named = name.map(|name| format!("{taken}={name}")).filter(|named| granted.contains(named));
        used.insert(named.unwrap_or(taken));
    }
    assert_eq!(used, granted);
}
