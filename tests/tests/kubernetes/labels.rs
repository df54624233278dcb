//! Namespaces that come into the mesh and leave it while their pods run.

use std::{fs, net::SocketAddr};

use anyhow::{Result, ensure};
use marline_tests::{
    cluster::{Family, Pod, Side},
    wait::{Look, seconds, wait_for},
};
use serde_json::json;

use super::{
    PORT,
    api::NAMESPACES,
    captured, error_of,
    kubelet::{World, node_directory, on_kubernetes},
    serves, talks,
    typed::on,
};

fn label(world: &World<'_>, value: Option<&str>) {
    let labels = value.map(|value| json!({"marline.io/mesh": value}));
    world.api.apply(NAMESPACES, json!({"metadata": {"name": "legacy", "labels": labels}}));
}

/// By mTLS, as soon as the other node has heard of it.
fn reaches(world: &World<'_>, client: &Pod, to: SocketAddr) -> Result<()> {
    wait_for("the other node to hear of it", seconds(20), || {
        Ok(match talks(&client.place, to)? {
            Ok(()) => Look::Done(()),
            Err(why) => Look::NotYet(why),
        })
    })?;
    let entries = world.cluster.agent(client.side)?.wait_entries("mTLS", 0, 1, |entry| entry.connects(client, to))?;
    ensure!(entries.iter().all(|entry| entry.tls.is_some()), "{entries:?}");
    Ok(())
}

#[test]
fn pods_of_a_namespace_that_gets_the_label_are_captured_at_once_and_flagged_for_they_started_without() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let (server, early) = (world.start("foo", "server", Side::B)?, world.start("legacy", "early", Side::A)?);
        let _serving = serves(&server)?;
        world.schedule("legacy", "leaves", Side::A, json!({"marline.io/mesh": "disabled"}));
        let leaves = world.sandbox("leaves", Side::A)?;
        ensure!(world.call("ADD", "legacy", &leaves)?.status.success(), "ADD of one that opts out");
        world.report("legacy", &leaves)?;
        let to = server.socket(Family::V4, PORT);
        ensure!(talks(&early.place, to)?.is_err(), "STRICT, and its namespace is not in the mesh");

        // As when pod and label are made together, and the pod is heard of first: its ADD has been answered.
        label(world, Some("enabled"));
        captured(world, Side::A, "early", true)?;
        reaches(world, &early, to)?;
        // Whose ADD comes after the label has not run without.
        let _after = world.start("legacy", "after", Side::A)?;
        captured(world, Side::A, "after", true)?;
        wait_for("the flag", seconds(20), || {
            let (_, _, text) = on(world.cluster, Side::A)?.part("kubernetes", &[])?;
            let told = text.contains("captured late") && text.contains("legacy/early");
            ensure!(!text.contains("legacy/after") && !text.contains("legacy/leaves"), "{text}");
            Ok(if told { Look::Done(()) } else { Look::NotYet(text) })
        })?;
        ensure!(world.cluster.agent(Side::A)?.metric("marline_kubernetes_pods_captured_late")? == 1.0);
        let pods = world.cluster.agent(Side::A)?.pods()?;
        ensure!(!pods.iter().any(|pod| pod.name == "leaves"), "one that opts out is captured: {pods:?}");

        label(world, None);
        captured(world, Side::A, "early", false)?;
        captured(world, Side::A, "after", false)?;
        ensure!(talks(&early.place, to)?.is_err(), "let go, it speaks plaintext, which STRICT refuses");
        Ok(())
    })
}

/// Namespaces and pods are told of apart: a pod may be heard of before the namespace that it was made together with.
#[test]
fn a_pod_starts_when_its_namespace_is_known_and_not_before() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let server = world.start("foo", "server", Side::B)?;
        let _serving = serves(&server)?;
        let chain = node_directory(world.cluster, Side::A).join("net.d/10-pods.conflist");
        let text = fs::read_to_string(&chain)?;
        fs::write(&chain, text.replace("\"timeoutSeconds\":60", "\"timeoutSeconds\":2"))?;
        world.api.holds(NAMESPACES);
        world.api.apply(NAMESPACES, json!({"metadata": {"name": "new", "labels": {"marline.io/mesh": "enabled"}}}));
        world.schedule("new", "early", Side::A, json!({"app": "early"}));
        let early = world.sandbox("early", Side::A)?;
        let error = error_of(&world.call("ADD", "new", &early)?)?;
        let told = error["code"] == 11 && error.to_string().contains("has not told of the namespace new yet");
        ensure!(told, "{error}");
        // What its own object says needs no namespace.
        world.schedule("new", "leaves", Side::A, json!({"marline.io/mesh": "disabled"}));
        let leaves = world.sandbox("leaves", Side::A)?;
        ensure!(world.call("ADD", "new", &leaves)?.status.success(), "ADD of one that opts out");

        fs::write(&chain, text)?;
        world.api.lets_go(NAMESPACES);
        let added = world.call("ADD", "new", &early)?;
        ensure!(added.status.success(), "{}", String::from_utf8_lossy(&added.stdout));
        captured(world, Side::A, "early", true)?;
        world.report("new", &early)?;
        let to = server.socket(Family::V4, PORT);
        reaches(world, &early, to)?;
        ensure!(
            world.cluster.agent(Side::A)?.metric("marline_kubernetes_pods_captured_late")? == 0.0,
            "it never ran without"
        );
        Ok(())
    })
}
