//! What the API server says of services beside their endpoints, seen from a pod: session affinity, the nodes' ports, zones, endpoints of which
//! only some are in the mesh. All under STRICT.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use marline_tests::{
    access_log::Entry,
    cluster::{Pod, Side, network::link_address},
    process::Process,
    traffic::nginx::Nginx,
    wait::{Look, seconds, wait_for},
};
use serde_json::{Value, json};

use super::{
    api::{NODES, SERVICES, SLICES},
    kubelet::{World, on_kubernetes},
};

const NODE_PORT: u16 = 30_080;
/// Of a service, for clients that are not in the cluster. Nobody there has it.
const OUTSIDE: &str = "203.0.113.7";

fn service(world: &World<'_>, name: &str, spec: Value) {
    world.api.apply(SERVICES, json!({"metadata": {"name": name, "namespace": "foo"}, "spec": spec}));
}

/// Each endpoint with whether it is ready, and the zone it is meant for.
fn slice(world: &World<'_>, service: &str, endpoints: &[(&Pod, bool, Option<&str>)]) {
    let endpoint = |(pod, ready, zone): &(&Pod, bool, Option<&str>)| {
        let hints = zone.map(|zone| json!({"forZones": [{"name": zone}]}));
        json!({"addresses": [pod.v4.to_string()], "nodeName": format!("node-{}", pod.side.letter()), "hints": hints, "targetRef": {"kind": "Pod", "name": pod.name},
               "conditions": {"ready": ready, "serving": ready, "terminating": false}})
    };
    world.api.apply(
        SLICES,
        json!({
            "metadata": {"name": format!("{service}-1"), "namespace": "foo", "labels": {
                "kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            }},
            "addressType": "IPv4", "ports": [{"name": "", "port": 80, "protocol": "TCP"}],
            "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        }),
    );
}

/// Which of the pods answers there.
fn who(client: &Pod, to: &str) -> Result<String> {
    let url = format!("http://{to}/");
    let said = client.output("curl", &["-sS", "--fail", "-m", "10", "-w", "\n%{remote_ip}", &url], seconds(20))?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.status.success(), "{to}: {}", String::from_utf8_lossy(&said.stderr));
    let (page, peer) = text.rsplit_once('\n').context("the peer's address")?;
    ensure!(to.split(':').next() == Some(peer), "{to} was asked for, and {peer} seen");
    let name = page.split("from ").nth(1).and_then(|rest| rest.split(['<', '\n', ' ']).next()).unwrap_or_default();
    Ok(name.to_owned())
}

/// Who answers in some tries.
fn all(client: &Pod, to: &str) -> Result<BTreeSet<String>> {
    (0..6).map(|_| who(client, to)).collect()
}

/// Waits until just these answer.
fn leads_to(client: &Pod, to: &str, names: &[&str]) -> Result<()> {
    let expected: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
    wait_for(format!("{to} to lead to {names:?}"), seconds(20), || {
        Ok(match all(client, to) {
            Ok(found) if found == expected => Look::Done(()),
            other => Look::NotYet(format!("{other:?}")),
        })
    })
}

#[test]
fn services_lead_where_kube_proxy_would_send_the_same_connection_and_by_mtls() -> Result<()> {
    on_kubernetes(|world| {
        for side in Side::BOTH {
            let labels = json!({"topology.kubernetes.io/zone": format!("z-{}", side.letter())});
            world.api.apply(NODES, json!({"metadata": {"name": format!("node-{}", side.letter()), "labels": labels}}));
        }
        world.cluster.start_agents()?;
        let client = world.start("foo", "client", Side::A)?;
        let (near, far) = (world.start("foo", "near", Side::A)?, world.start("foo", "far", Side::B)?);
        let plain = world.start("legacy", "plain", Side::B)?;
        let _serving =
            [Nginx::start(&near, "from near")?, Nginx::start(&far, "from far")?, Nginx::start(&plain, "from plain")?];
        let ports = json!([{"port": 80, "protocol": "TCP"}]);

        // A name for DNS, with an address that is outside: nothing of it is the mesh's.
        let node = world.cluster.node(Side::B);
        let log = world.cluster.directory().join("outside.log");
        let mut outside = Process::start("echo", node.command(super::TALKER).args(["echo", "7001"]), &log)?;
        outside.listens(&node.netns, 7001)?;
        let external = link_address(Side::B);
        service(
            world,
            "outside",
            json!({"type": "ExternalName", "externalName": external.to_string(), "ports": [{"port": 7001}]}),
        );

        // The zone's own where hints say so, and all of them where one endpoint has none.
        service(world, "zones", json!({"clusterIP": "10.96.1.1", "ports": ports}));
        slice(world, "zones", &[(&near, true, Some("z-a")), (&far, true, Some("z-b"))]);
        leads_to(&client, "10.96.1.1:80", &["near"])?;
        slice(world, "zones", &[(&near, true, Some("z-b")), (&far, true, Some("z-a"))]);
        leads_to(&client, "10.96.1.1:80", &["far"])?;
        slice(world, "zones", &[(&near, true, Some("z-a")), (&far, true, None)]);
        leads_to(&client, "10.96.1.1:80", &["far", "near"])?;
        super::talks(&client.place, (external, 7001).into())?.map_err(anyhow::Error::msg)?;

        // One endpoint for one client, until it is not ready any more; the other then keeps the session.
        let affinity = json!({"clusterIP": "10.96.1.2", "ports": [{"port": 80, "protocol": "TCP", "nodePort": NODE_PORT}],
                              "type": "NodePort", "externalIPs": [OUTSIDE], "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}});
        service(world, "sticky", affinity);
        slice(world, "sticky", &[(&far, true, None)]);
        leads_to(&client, "10.96.1.2:80", &["far"])?;
        slice(world, "sticky", &[(&near, true, None), (&far, true, None)]);
        let fresh = |there: usize| {
            wait_for("the endpoints to be heard of", seconds(20), || {
                let text = world.cluster.agent(Side::A)?.admin("/services")?.body;
                let services: Value = serde_json::from_str(&text)?;
                let sticky = services["services"].as_array().into_iter().flatten();
                let mut sticky = sticky.filter(|it| it["host"] == "sticky.foo.svc.cluster.local");
                let count = sticky.next().and_then(|it| it["ports"][0]["endpoints"].as_array()).map(Vec::len);
                Ok(if count == Some(there) { Look::Done(()) } else { Look::NotYet(text) })
            })
        };
        fresh(2)?;
        let only = |name: &str, to: &str| -> Result<()> {
            let found = all(&client, to)?;
            ensure!(found.len() == 1 && found.contains(name), "{to}: {found:?}, not {name} alone");
            Ok(())
        };
        only("far", "10.96.1.2:80")?;
        slice(world, "sticky", &[(&near, true, None), (&far, false, None)]);
        fresh(1)?;
        only("near", "10.96.1.2:80")?;
        slice(world, "sticky", &[(&near, true, None), (&far, true, None)]);
        fresh(2)?;
        only("near", "10.96.1.2:80")?;

        // Every node's port is the service's, and so is its address for outside: the same session, the same identity, and mTLS.
        let [a, b] = Side::BOTH.map(|side| format!("{}:{NODE_PORT}", link_address(side)));
        for to in [a, b, format!("{OUTSIDE}:80")] {
            let before = world.cluster.agent(Side::A)?.entries()?.len();
            only("near", &to)?;
            let of_service = |entry: &Entry| entry.service.as_deref() == Some("sticky.foo.svc.cluster.local");
            let entries = world.cluster.agent(Side::A)?.wait_entries(&to, before, 6, of_service)?;
            let identity = |entry: &Entry| entry.destination.identity.clone().unwrap_or_default();
            let right = |entry: &Entry| entry.tls.is_some() && identity(entry).ends_with("/ns/foo/sa/near");
            ensure!(entries.iter().all(right), "{entries:#?}");
        }

        // Partly in the mesh, and no endpoint on this node.
        service(world, "partly", json!({"clusterIP": "10.96.1.3", "ports": ports}));
        slice(world, "partly", &[(&far, true, None), (&plain, true, None)]);
        let before = world.cluster.agent(Side::A)?.entries()?.len();
        leads_to(&client, "10.96.1.3:80", &["far", "plain"])?;
        for (pod, mode) in [(&far, "mtls"), (&plain, "plaintext")] {
            let to = |entry: &Entry| entry.connects(&client, (pod.v4, 80).into());
            let entries = world.cluster.agent(Side::A)?.wait_entries(mode, before, 1, to)?;
            ensure!(entries.iter().all(|entry| entry.mode.as_deref() == Some(mode)), "{entries:#?}");
        }
        service(world, "partly", json!({"clusterIP": "10.96.1.3", "ports": ports, "internalTrafficPolicy": "Local"}));
        let before = world.cluster.agent(Side::A)?.entries()?.len();
        wait_for("no endpoint of this node", seconds(20), || {
            let went = all(&client, "10.96.1.3:80");
            Ok(if went.is_err() { Look::Done(()) } else { Look::NotYet(format!("{went:?}")) })
        })?;
        let refused = |entry: &Entry| entry.reason.as_deref() == Some("no_endpoint");
        world.cluster.agent(Side::A)?.wait_entries("no_endpoint", before, 1, refused).map(drop)
    })
}

/// Slices and pods are told of apart. Whether a pod of which a slice alone has told is in the mesh is not known, and plaintext to it could be a mistake.
#[test]
fn nobody_speaks_to_an_endpoint_whose_pod_was_not_told_of() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let client = world.start("foo", "client", Side::A)?;
        let late = world.sandbox("late", Side::B)?;
        let _serving = Nginx::start(&late, "from late")?;
        let [service_address, pod_address] = ["10.96.1.1:80".to_owned(), format!("{}:80", late.v4)];
        service(world, "web", json!({"clusterIP": "10.96.1.1", "ports": [{"port": 80, "protocol": "TCP"}]}));
        slice(world, "web", &[(&late, true, None)]);
        let agent = || world.cluster.agent(Side::A);
        wait_for("the slice to be heard of", seconds(20), || {
            let (before, went) = (agent()?.entries()?.len(), who(&client, &pod_address));
            let Err(refused) = went else { return Ok(Look::NotYet("it answers: nothing was told of it".into())) };
            let is_so = |entry: &Entry| entry.reason.as_deref() == Some("pod_not_told");
            agent()?.wait_entries("pod_not_told", before, 1, is_so)?;
            Ok(Look::Done(refused))
        })?;
        let before = agent()?.entries()?.len();
        let refused = who(&client, &service_address);
        ensure!(refused.is_err(), "{refused:?}");
        agent()?.wait_entries("no_endpoint", before, 1, |entry| entry.reason.as_deref() == Some("no_endpoint"))?;

        // Outside of the mesh, and known to be.
        world.schedule("foo", "late", Side::B, json!({"marline.io/mesh": "disabled"}));
        world.report("foo", &late)?;
        leads_to(&client, &service_address, &["late"])?;
        leads_to(&client, &pod_address, &["late"])
    })
}
