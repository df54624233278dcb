//! What the agent may do in a cluster is what it does.

use crate::{bed::*, rights};

/// All kinds, in their first versions.
const ALL: [&str; 10] = [
    "/api/v1/namespaces",
    PODS,
    "/api/v1/services",
    "/api/v1/nodes",
    SLICES,
    PEERS,
    AUTHORIZATIONS,
    "/apis/networking.istio.io/v1/destinationrules",
    "/apis/networking.istio.io/v1/serviceentries",
    "/apis/networking.istio.io/v1/workloadentries",
];

#[tokio::test]
async fn the_agents_role_grants_what_the_agent_asks_for_and_nothing_else() {
    let bed = Bed::ready(|api| {
        for absent in &ALL[8..] {
            api.lists(absent, Answer::list(Vec::new(), 1));
        }
    })
    .await;
    for path in ALL {
        bed.api.is_watched(path).await;
    }
    let asked = bed.api.asked("").into_iter().map(|asked| {
        let (key, query) = asked.split_once('?').unwrap();
        // The server answers nothing but GET.
        let (taken, name) = rights::taken("GET", key.split('#').next().unwrap(), query);
        assert_eq!(name, None, "{asked}");
        taken
    });
    assert_eq!(asked.collect::<rights::Rights>(), rights::granted("marline-agent"));
}
