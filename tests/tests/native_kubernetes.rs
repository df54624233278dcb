//! Pods of two Kubernetes nodes, from the scheduler to DEL: an API server over HTTPS, the CNI plugin called as a runtime calls it, agents that
//! know nothing but what these tell.

#[path = "kubernetes/api.rs"]
mod api;
#[path = "kubernetes/kubelet.rs"]
mod kubelet;
#[path = "kubernetes/labels.rs"]
mod labels;
#[path = "kubernetes/services.rs"]
mod services;
#[path = "native_commands/typed.rs"]
mod typed;

use std::{
    fs,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, ensure};
use api::{PODS, SERVICES, SLICES};
use kubelet::{World, on_kubernetes, result, uid};
use marline::sys::netns::Netns;
use marline_tests::{
    cgroup,
    cluster::{Family, Pod, Side},
    process::{Place, Process, output},
    wait::{Look, seconds, wait_for},
};
use serde_json::{Value, json};
use typed::on;

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const PORT: u16 = 7000;

fn talks(from: &Place, to: SocketAddr) -> Result<Result<(), String>> {
    let mut command = from.command(TALKER);
    let said = output(command.args(["many", &to.to_string(), "2", "1"]), seconds(20))?;
    let words = [said.stdout, said.stderr].concat();
    Ok(if said.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&words).trim().to_owned()) })
}

fn serves(pod: &Pod) -> Result<Process> {
    pod.serve("echo", pod.command(TALKER).args(["echo", &PORT.to_string()]), PORT)
}

fn error_of(answer: &std::process::Output) -> Result<Value> {
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    ensure!(!answer.status.success(), "it succeeded: {text}");
    serde_json::from_str(&text).with_context(|| text)
}

/// Waits until a pod of this name is captured at its path, or is not any more.
fn captured(world: &World<'_>, side: Side, name: &str, there: bool) -> Result<()> {
    world.cluster.agent(side)?.wait_pod(name, there)
}

#[test]
fn pods_are_captured_before_they_start_and_all_nine_pairs_are_as_they_should_be() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let (client, server) = (world.start("foo", "client", Side::A)?, {
            world.schedule("foo", "server", Side::B, json!({}));
            let pod = world.sandbox("server", Side::B)?;
            let added = world.call("ADD", "foo", &pod)?;
            ensure!(added.status.success(), "{}", String::from_utf8_lossy(&added.stdout));
            // At this moment, with no address at the API server.
            let pods = world.cluster.agent(Side::B)?.pods()?;
            ensure!(pods.iter().any(|it| it.name == "server" && it.state == "ready"), "{pods:?}");
            ensure!(added.stdout.trim_ascii() == result(&pod).to_string().as_bytes(), "not to the letter");
            let checked = world.call("CHECK", "foo", &pod)?;
            ensure!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
            world.report("foo", &pod)?;
            pod
        });
        let (outside, plain) = (world.start("legacy", "outside", Side::A)?, world.start("legacy", "plain", Side::B)?);
        let (node, other) = (world.cluster.node(Side::A), world.cluster.node(Side::B));
        let (_one, _two) = (serves(&server)?, serves(&plain)?);
        let log = world.cluster.directory().join("node-echo.log");
        let mut third =
            Process::start("echo on node b", other.command(TALKER).args(["echo", &PORT.to_string()]), &log)?;
        third.listens(&other.netns, PORT)?;
        let on_node: SocketAddr = (marline_tests::cluster::network::link_address(Side::B), PORT).into();
        // Both agents hear of the addresses in their own time.
        for side in Side::BOTH {
            wait_for("all pods to be known", seconds(20), || {
                let known = world.cluster.agent(side)?.admin("/workloads")?.body;
                let all = [&client, &server, &outside, &plain].iter().all(|pod| known.contains(&pod.v6.to_string()));
                Ok(if all { Look::Done(()) } else { Look::NotYet(known) })
            })?;
        }
        for family in Family::BOTH {
            let (mesh, none) = (server.socket(family, PORT), plain.socket(family, PORT));
            for (what, from, to, may) in [
                ("mesh to mesh", &client.place, mesh, true),
                ("mesh to none", &client.place, none, true),
                ("mesh to node", &client.place, on_node, true),
                ("none to mesh", &outside.place, mesh, false),
                ("none to none", &outside.place, none, true),
                ("none to node", &outside.place, on_node, true),
                ("node to mesh", &node, mesh, false),
                ("node to none", &node, none, true),
                ("node to node", &node, on_node, true),
            ] {
                let went = talks(from, to)?;
                ensure!(went.is_ok() == may, "{what} at {to}: {went:?}");
            }
        }
        let entries = world.cluster.agent(Side::A)?.wait_entries("mTLS", 0, 4, |entry| {
            entry.connects(&client, server.socket(Family::V4, PORT))
                || entry.connects(&client, server.socket(Family::V6, PORT))
        })?;
        ensure!(entries.iter().all(|entry| entry.tls.is_some()), "{entries:?}");
        on(world.cluster, Side::A)?.types(&["status"])?.has(0, &["connected since", "this node is well"])?;

        // DEL alone opens nothing; with the namespace the capture goes.
        let deleted = world.call("DEL", "foo", &client)?;
        ensure!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stdout));
        ensure!(talks(&client.place, server.socket(Family::V4, PORT))?.is_ok(), "still captured after DEL");
        world.end("foo", &client)?;
        captured(world, Side::A, "client", false)?;
        let records = fs::read_dir(kubelet::node_directory(world.cluster, Side::A).join("pods"))?.count();
        wait_for("the record to go", seconds(20), || {
            let now = fs::read_dir(kubelet::node_directory(world.cluster, Side::A).join("pods"))?.count();
            Ok(if now == 1 { Look::Done(()) } else { Look::NotYet(format!("{records}, then {now}")) })
        })
    })
}

#[test]
fn an_agent_that_is_restarted_or_killed_keeps_pods_captured_and_starts_none_meanwhile() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let (client, server) = (world.start("foo", "client", Side::A)?, world.start("foo", "server", Side::B)?);
        let plain = world.start("legacy", "plain", Side::B)?;
        let (_one, _two) = (serves(&server)?, serves(&plain)?);
        let to = server.socket(Family::V4, PORT);
        for kill in [false, true] {
            if kill {
                world.cluster.agent_mut(Side::A)?.kill()?
            } else {
                let _ended = world.cluster.agent_mut(Side::A)?.stop()?;
            }
            for address in [to, plain.socket(Family::V4, PORT)] {
                let went = talks(&client.place, address)?;
                ensure!(went.as_ref().is_err_and(|why| why.contains("ECONNREFUSED")), "without its agent: {went:?}");
            }
            let name = if kill { "meanwhile-2" } else { "meanwhile-1" };
            world.schedule("foo", name, Side::A, json!({}));
            let pod = world.sandbox(name, Side::A)?;
            let chain = kubelet::node_directory(world.cluster, Side::A).join("net.d/10-pods.conflist");
            let text = fs::read_to_string(&chain)?;
            fs::write(&chain, text.replace("\"timeoutSeconds\":60", "\"timeoutSeconds\":1"))?;
            let error = error_of(&world.call("ADD", "foo", &pod)?)?;
            fs::write(&chain, text)?;
            let said = error.to_string();
            ensure!(
                error["code"] == 11 && said.contains("does not answer") && said.contains("marline status"),
                "{said}"
            );
            let deleted = world.call("DEL", "foo", &pod)?;
            ensure!(deleted.status.success(), "DEL without an agent: {}", String::from_utf8_lossy(&deleted.stdout));
            // One that comes while the agent starts waits for it.
            let (caller, late) = (world.caller(), pod.clone());
            let waiting = thread::spawn(move || caller.call("ADD", "foo", &late));
            let before = world.cluster.agent(Side::A)?.log().len();
            world.cluster.start_agent(Side::A)?;
            let added = waiting.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            ensure!(added.status.success(), "{}", String::from_utf8_lossy(&added.stdout));
            captured(world, Side::A, "client", true)?;
            let went = wait_for("client to reach server", seconds(20), || {
                Ok(match talks(&client.place, to)? {
                    Ok(()) => Look::Done(()),
                    Err(why) => Look::NotYet(why),
                })
            });
            went?;
            // What was known was never let go.
            let said = world.cluster.agent(Side::A)?.log().get(before..).unwrap_or_default().to_owned();
            let of_client = format!("is let go netns={}", Netns::open(&client.place.netns)?.cookie().0);
            let let_go = said.contains("has left the mesh") || said.lines().any(|line| line.ends_with(&of_client));
            ensure!(!let_go && !said.contains("uncaptured"), "{said}");
            world.end("foo", &pod)?;
        }
        Ok(())
    })
}

#[test]
fn pods_from_before_the_plugin_and_pods_that_are_labelled_later_are_captured_late_and_flagged() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agent(Side::B)?;
        let server = world.start("foo", "server", Side::B)?;
        let _serving = serves(&server)?;
        let plain = world.start("legacy", "plain", Side::B)?;
        let _plain = serves(&plain)?;
        // It runs, and its node has neither agent nor plugin.
        world.schedule("foo", "early", Side::A, json!({"app": "early"}));
        let early = world.sandbox("early", Side::A)?;
        world.report("foo", &early)?;
        let log = early.directory.join("stays.log");
        // A process of the runtime's in the pod's cgroup and the node's network, which started first, as with CRI-O.
        let conmon = Place { netns: world.cluster.node(Side::A).netns, ..early.place.clone() };
        let _conmon = Process::start("conmon", conmon.command("sleep").arg("1000"), &log)?;
        let pause = Process::start("pause", early.command("sleep").arg("1000"), &log)?;
        wait_for("the pod to run", seconds(10), || {
            let there = cgroup::processes(&early.place.cgroup).contains(&pause.pid());
            Ok(if there { Look::Done(()) } else { Look::NotYet("not there".into()) })
        })?;
        ensure!(talks(&early.place, plain.socket(Family::V4, PORT))?.is_ok(), "it is not captured yet");
        ensure!(talks(&early.place, server.socket(Family::V4, PORT))?.is_err(), "STRICT");
        world.cluster.start_agent(Side::A)?;
        captured(world, Side::A, "early", true)?;
        ensure!(talks(&early.place, server.socket(Family::V4, PORT))?.is_ok(), "captured, it speaks mTLS");
        let node = on(world.cluster, Side::A)?;
        let flagged = |names: &[&str]| {
            let (_, _, text) = node.part("kubernetes", &[])?;
            let all = names.iter().all(|name| text.contains(name));
            Ok(if all && text.contains("captured late") { Look::Done(()) } else { Look::NotYet(text) })
        };
        wait_for("the flag", seconds(20), || flagged(&["foo/early"]))?;
        ensure!(world.cluster.agent(Side::A)?.metric("marline_kubernetes_pods_captured_late")? == 1.0);

        // A label later.
        let later = world.start("legacy", "later", Side::A)?;
        ensure!(talks(&later.place, server.socket(Family::V4, PORT))?.is_err(), "not in the mesh");
        let label = |world: &World<'_>, value: &str| {
            world.api.change(PODS, "legacy", "later", |pod| pod["metadata"]["labels"]["marline.io/mesh"] = json!(value))
        };
        label(world, "enabled")?;
        captured(world, Side::A, "later", true)?;
        wait_for("the label to reach the other node", seconds(20), || {
            Ok(match talks(&later.place, server.socket(Family::V4, PORT))? {
                Ok(()) => Look::Done(()),
                Err(why) => Look::NotYet(why),
            })
        })?;
        wait_for("the flag", seconds(20), || flagged(&["foo/early", "legacy/later"]))?;
        label(world, "disabled")?;
        captured(world, Side::A, "later", false)?;
        ensure!(talks(&later.place, plain.socket(Family::V4, PORT))?.is_ok(), "let go");

        // The late one stays captured and flagged when the agent is started anew.
        world.cluster.start_agent(Side::A)?;
        captured(world, Side::A, "early", true)?;
        wait_for("the flag", seconds(20), || flagged(&["foo/early"])).map(drop)
    })
}

#[test]
fn a_pod_whose_object_goes_before_its_processes_stays_closed_until_they_are_gone() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let (client, plain) = (world.start("foo", "client", Side::A)?, world.start("legacy", "plain", Side::B)?);
        let _serving = serves(&plain)?;
        let to = plain.socket(Family::V4, PORT);
        ensure!(talks(&client.place, to)?.is_ok(), "it may speak to who is not in the mesh");
        // As after `kubectl delete --force`, or a phase that ends before the processes do.
        world.api.delete(PODS, "foo", "client");
        captured(world, Side::A, "client", false)?;
        let closed = |when: &str| {
            let went = talks(&client.place, to)?;
            ensure!(went.is_err(), "{when}: it goes out in the clear");
            Ok(())
        };
        closed("its object is gone")?;
        world.cluster.start_agent(Side::A)?;
        closed("its agent was started anew")?;
        let said = world.cluster.agent(Side::A)?.log();
        ensure!(!said.contains("has left the mesh") && !said.contains("is let go"), "{said}");
        let (at, before) = (client.place.netns.display().to_string(), said.len());
        world.end("foo", &client)?;
        let skip = |log: &str| log.get(before..).unwrap_or_default().to_owned();
        world.cluster.agent(Side::A)?.wait_log("the end of its namespace", 0, |log| {
            skip(log).lines().any(|line| line.contains("has left the mesh") && line.contains(&at))
        })?;
        Ok(())
    })
}

#[test]
fn an_add_that_cannot_be_answered_fails_in_time_and_says_why() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agent(Side::A)?;
        let chain = kubelet::node_directory(world.cluster, Side::A).join("net.d/10-pods.conflist");
        let text = fs::read_to_string(&chain)?;
        fs::write(&chain, text.replace("\"timeoutSeconds\":60", "\"timeoutSeconds\":2"))?;
        // The API server has not told of it.
        let unknown = world.sandbox("unknown", Side::A)?;
        let error = error_of(&world.call("ADD", "foo", &unknown)?)?;
        ensure!(error["code"] == 11 && error.to_string().contains("has not told of this pod"), "{error}");
        // Of that name there is another: what the kubelet says is not believed.
        world.api.apply(
            PODS,
            json!({
                "metadata": {"name": "unknown", "namespace": "foo", "uid": "another"},
                "spec": {"nodeName": "node-a"}, "status": {},
            }),
        );
        let error = error_of(&world.call("ADD", "foo", &unknown)?)?;
        ensure!(error.to_string().contains("has not told of this pod"), "{error}");
        // Somebody else's UID.
        world.schedule("legacy", "other", Side::A, json!({}));
        world.api.change(PODS, "legacy", "other", |pod| pod["metadata"]["uid"] = json!(uid("unknown")))?;
        let error = error_of(&world.call("ADD", "foo", &unknown)?)?;
        ensure!(error.to_string().contains("legacy/other"), "{error}");
        // The node's own network under a pod's name.
        let mut node = unknown.clone();
        node.place.netns = world.cluster.node(Side::A).netns;
        let error = error_of(&world.call("ADD", "foo", &node)?)?;
        ensure!(error["code"] == 100 && error.to_string().contains("node's own"), "{error}");
        // The plugin is taken out of the chain: the node is not ready, and says so.
        let without =
            text.split(",\n    {\"socket\"").next().map(|head| format!("{head}\n  ]\n}}\n")).context("the entry")?;
        fs::write(&chain, without)?;
        wait_for("readiness to name the plugin", seconds(20), || {
            let said = world.cluster.agent(Side::A)?.readiness()?;
            Ok(if said.status == 503 && said.body.contains("CNI plugin is missing") {
                Look::Done(())
            } else {
                Look::NotYet(said.body)
            })
        })?;
        on(world.cluster, Side::A)?.types(&["status"])?.has(1, &["the CNI plugin is missing", "marline cni install"])
    })
}

#[test]
fn two_hundred_pods_come_and_go_at_the_same_time() -> Result<()> {
    const PODS_AT_ONCE: usize = 200;
    on_kubernetes(|world| {
        world.cluster.start_agent(Side::A)?;
        let mut pods = Vec::new();
        for index in 0..PODS_AT_ONCE {
            let name = format!("p{index}");
            world.schedule("foo", &name, Side::A, json!({}));
            pods.push(world.sandbox(&name, Side::A)?);
        }
        let began = std::time::Instant::now();
        let each = |command: &'static str| -> Result<()> {
            let caller = world.caller();
            thread::scope(|scope| {
                let calls: Vec<_> = pods
                    .iter()
                    .map(|pod| {
                        (
                            pod,
                            scope.spawn({
                                let caller = caller.clone();
                                move || caller.call(command, "foo", pod)
                            }),
                        )
                    })
                    .collect();
                for (pod, call) in calls {
                    let said = call.join().map_err(|_| anyhow::anyhow!("panicked"))??;
                    ensure!(
                        said.status.success(),
                        "{command} of {}: {}",
                        pod.name,
                        String::from_utf8_lossy(&said.stdout)
                    );
                }
                Ok(())
            })
        };
        each("ADD")?;
        println!("{PODS_AT_ONCE} pods were captured in {:?}", began.elapsed());
        let ready = world.cluster.agent(Side::A)?.pods()?.iter().filter(|pod| pod.state == "ready").count();
        ensure!(ready == PODS_AT_ONCE, "{ready} are ready");
        each("DEL")?;
        for pod in &pods {
            world.cluster.remove_pod(&pod.name)?;
            world.api.delete(PODS, "foo", &pod.name);
        }
        wait_for("all to be let go", seconds(30), || {
            let left = world.cluster.agent(Side::A)?.pods()?.len();
            Ok(if left == 0 { Look::Done(()) } else { Look::NotYet(format!("{left} are left")) })
        })
    })
}

fn slice(world: &World<'_>, pods: &[(&Pod, bool)]) {
    let endpoint = |(pod, ready): &(&Pod, bool)| json!({"addresses": [pod.v4.to_string()], "conditions": {"ready": ready, "serving": true, "terminating": !ready}});
    world.api.apply(
        SLICES,
        json!({
            "metadata": {"name": "web-1", "namespace": "foo", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": PORT, "protocol": "TCP"}],
            "endpoints": pods.iter().map(endpoint).collect::<Vec<_>>(),
        }),
    );
}

#[test]
fn a_rolling_restart_under_load_fails_no_request() -> Result<()> {
    const VIRTUAL: &str = "10.96.0.20";
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let client = world.start("foo", "client", Side::A)?;
        world.api.apply(
            SERVICES,
            json!({
                "metadata": {"name": "web", "namespace": "foo"},
                "spec": {"clusterIP": VIRTUAL, "clusterIPs": [VIRTUAL], "ports": [{"port": 80, "protocol": "TCP"}]},
            }),
        );
        let mut running = Vec::new();
        for name in ["web-0", "web-1"] {
            let pod = world.start("foo", name, Side::B)?;
            running.push((serves(&pod)?, pod));
        }
        slice(world, &[(&running[0].1, true), (&running[1].1, true)]);
        let to: SocketAddr = format!("{VIRTUAL}:80").parse()?;
        wait_for("the service to answer", seconds(20), || {
            Ok(match talks(&client.place, to)? {
                Ok(()) => Look::Done(()),
                Err(why) => Look::NotYet(why),
            })
        })?;
        // That agent a goes by what the slice says now.
        let heard = |world: &World<'_>, there: &Pod, gone: &Pod| {
            wait_for("the endpoints to be heard of", seconds(20), || {
                let services = world.cluster.agent(Side::A)?.admin("/services")?.body;
                let (there, gone) =
                    (services.contains(&format!("{}:", there.v4)), services.contains(&format!("{}:", gone.v4)));
                Ok(if there && !gone { Look::Done(()) } else { Look::NotYet(services) })
            })
        };
        let (stop, place) = (AtomicBool::new(false), client.place.clone());
        thread::scope(|scope| -> Result<()> {
            let load = scope.spawn(|| -> Result<u32> {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    let said = output(place.command(TALKER).args(["many", &to.to_string(), "40", "4"]), seconds(40))?;
                    let words = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
                    ensure!(said.status.success(), "after {rounds} rounds: {words}");
                    rounds += 1;
                }
                Ok(rounds)
            });
            let rolled = (|| -> Result<()> {
                for (at, name) in ["web-2", "web-3"].into_iter().enumerate() {
                    let fresh = world.start("foo", name, Side::B)?;
                    running.push((serves(&fresh)?, fresh));
                    let (old, stays, fresh) = (&running[0].1, &running[1].1, &running[2].1);
                    slice(world, &[(old, false), (stays, true), (fresh, true)]);
                    heard(world, fresh, old)?;
                    // Its connections end, then it does, as with a grace period.
                    let before = world.cluster.agent(Side::B)?.entries()?.len();
                    world.cluster.agent(Side::B)?.wait_entries("the others", before, 40, |_| true)?;
                    let (mut process, old) = running.remove(0);
                    process.kill()?;
                    world.end("foo", &old)?;
                    slice(world, &[(&running[0].1, true), (&running[1].1, true)]);
                    println!("{at}: {} is gone", old.name);
                }
                Ok(())
            })();
            stop.store(true, Ordering::Relaxed);
            let rounds = load.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            rolled?;
            ensure!(rounds > 2, "only {rounds} rounds of requests");
            println!("{rounds} rounds of 40 requests");
            Ok(())
        })
    })
}
