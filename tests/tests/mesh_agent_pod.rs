//! The agent as a DaemonSet starts it: a pod itself, in a container with what the manifests give it, in a cgroup of its own below the one that
//! it captures.
//! Its own cgroup, and nothing else, is left out of capture; and nobody else may be in there.

use std::fs;

use anyhow::{Context, Result, ensure};
use marline_tests::{
    access_log::{Entry, Records},
    capture::LinkCapture,
    cgroup, chart,
    cluster::{AgentPod, Cluster, ClusterSpec, Family, Pod, Side, network, remains},
    config::Mode,
    flow::{Route, observe},
    process::{Place, Process},
    scenario::{on_mesh, on_network},
    traffic::{Seen, redis::Redis},
    wait::{Look, seconds, wait_for},
};

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const MARKER: &str = "marker-beside-the-agent";
const PORT: u16 = 7000;

fn spec() -> Result<ClusterSpec> {
    let maker = env!("CARGO_BIN_EXE_container").into();
    let pod = AgentPod { maker, root: None, capabilities: chart::capabilities("agent")? };
    Ok(ClusterSpec { agents_are_pods: Some(pod), ..ClusterSpec::pairs(Mode::Strict).without_spares() })
}

/// What becomes of one question, in the client's words.
fn ask(client: &Pod, server: &Pod, family: Family) -> Result<String> {
    let said = client.output(TALKER, &["ask", &server.socket(family, PORT).to_string()], seconds(20))?;
    Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

fn echo(server: &Pod) -> Result<Process> {
    let mut command = server.command(TALKER);
    server.serve("echo", command.args(["echo", &PORT.to_string()]), PORT)
}

fn answered(said: &str) -> bool {
    said.starts_with("answer")
}

#[test]
fn an_agent_below_the_pods_cgroup_captures_the_pods_beside_it_and_not_itself() -> Result<()> {
    on_mesh(&spec()?, |cluster| {
        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        for side in Side::BOTH {
            let (own, pods) =
                (cluster.agent(side)?.cgroup().to_owned(), client.place.cgroup.parent().context("a parent")?);
            let pods = if side == Side::A { pods } else { server.place.cgroup.parent().context("a parent")? };
            ensure!(own.parent() == Some(pods), "{} is not beside {}", own.display(), pods.display());
        }
        let redis = Redis::start(&server, MARKER)?;
        let capture = LinkCapture::start(cluster, &[MARKER])?;
        for family in Family::BOTH {
            let route = Route { client: &client, server: &server, family, connections: 1 };
            let flow = observe(cluster, route, || redis.set_and_get(&client, server.address(family)))?;
            ensure!(flow.seen.exact, "{}", flow.seen.note);
            let mutual = |entry: &Entry| matches!(entry.records, Records::Ktls | Records::Userspace);
            ensure!(flow.entries().all(|entry| mutual(entry) && entry.ended_by_programs()), "{flow:#?}");
            let refused = redis.set_and_get(&outside, server.address(family));
            ensure!(refused.is_err(), "STRICT let a pod from outside in: {refused:?}");
        }
        let wire = capture.finish()?;
        let members = wire
            .streams
            .iter()
            .filter(|stream| !Family::BOTH.map(|family| outside.address(family)).contains(&stream.client.ip()));
        ensure!(members.clone().count() == 2 && members.clone().all(|stream| stream.not_tls() == 0), "{wire:#?}");
        Ok(())
    })
}

#[test]
fn a_process_below_the_agents_own_cgroup_is_captured_and_shut_in_when_the_agent_is_dead() -> Result<()> {
    on_mesh(&spec()?, |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _echo = echo(&server)?;
        let below = cluster.agent(Side::A)?.cgroup().join("below");
        cgroup::create(&below)?;
        let hidden = Pod { place: Place { cgroup: below, ..client.place.clone() }, ..client.clone() };
        let capture = LinkCapture::start(cluster, &["hello?"])?;
        for family in Family::BOTH {
            let route = Route { client: &hidden, server: &server, family, connections: 1 };
            let said = observe(cluster, route, || {
                let said = ask(&hidden, &server, family)?;
                Ok(Seen { port: PORT, exact: answered(&said), note: said })
            })?;
            ensure!(said.seen.exact, "{}", said.seen.note);
        }
        let wire = capture.finish()?;
        ensure!(wire.streams.len() == 2 && wire.not_tls() == 0 && wire.hits("hello?") == 0, "{wire:#?}");
        cluster.agent_mut(Side::A)?.kill()?;
        for client in [&client, &hidden] {
            let said = ask(client, &server, Family::V4)?;
            ensure!(said == "connect: ECONNREFUSED", "the agent is dead: {said}");
        }
        Ok(())
    })
}

#[test]
fn an_agent_that_is_not_alone_in_its_cgroup_or_is_among_the_pods_refuses_to_start() -> Result<()> {
    on_network(&spec()?, |cluster| {
        let place = cluster.agent_place(Side::A);
        cgroup::create(&place.cgroup)?;
        let log = cluster.directory().join("companion.log");
        let mut companion = Process::start("companion", place.command("sleep").arg("1000"), &log)?;
        moved(&place, companion.pid())?;
        refuses(cluster, "not alone there")?;
        companion.kill()?;
        cluster.start_agent(Side::A)?;
        cluster.agent_mut(Side::A)?.kill()?;
        // In the pods' cgroup itself.
        let root = place.cgroup.parent().context("a parent")?.to_owned();
        let mut command = Place { cgroup: root, ..place }.command(cluster.program()?);
        let config = cluster.config_directory(Side::A);
        let mut agent = Process::start("agent", command.args(["agent", "--config"]).arg(config), &log)?;
        let status = agent.wait(seconds(30))?;
        ensure!(!status.success() && agent.log().contains("the agent itself is in"), "{status}: {}", agent.log());
        Ok(())
    })
}

fn moved(place: &Place, pid: u32) -> Result<()> {
    wait_for("the companion to be in the agent's cgroup", seconds(10), || {
        let there = cgroup::processes(&place.cgroup);
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Ok(if there == [pid] && name.trim() == "sleep" {
            Look::Done(())
        } else {
            Look::NotYet(format!("{there:?} {name}"))
        })
    })
}

fn refuses(cluster: &mut Cluster, why: &str) -> Result<()> {
    let agent = cluster.launch_agent(Side::A)?;
    let status = agent.wait_end(seconds(30))?;
    ensure!(!status.success() && agent.log().contains(why), "{status}: {}", agent.log());
    Ok(())
}

#[test]
fn an_agent_that_waits_disturbs_nobody_and_takes_over_when_its_predecessor_ends() -> Result<()> {
    on_mesh(&spec()?, |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _echo = echo(&server)?;
        let capture = LinkCapture::start(cluster, &["hello?"])?;
        let mut given_up = cluster.launch_successor(Side::A)?;
        given_up.wait_log("that it waits", 0, |log| log.contains("waiting for the agent"))?;
        ensure!(given_up.stop()?.success(), "told to stop while it waits, it fails: {}", given_up.log());
        // One that could not go on with the maps that are there does not wait for them.
        let maps = remains::pins(&network::node_name(cluster.name(), Side::A)).join("maps");
        let swap = || {
            let names = [("PROBES", "kept"), ("REFUSED", "PROBES"), ("kept", "REFUSED")];
            names.iter().try_for_each(|(from, to)| fs::rename(maps.join(from), maps.join(to)))
        };
        swap()?;
        let mut unable = cluster.launch_successor(Side::A)?;
        ensure!(!unable.wait_end(seconds(30))?.success(), "it cannot take these maps over: {}", unable.log());
        let why = "this agent could not follow the one that has this node, which goes on";
        ensure!(
            unable.log().contains(why) && unable.log().contains("left by another version of the agent"),
            "{}",
            unable.log()
        );
        swap()?;
        for side in Side::BOTH {
            let skip = cluster.agent(side)?.log().len();
            let mut successor = cluster.launch_successor(side)?;
            successor.wait_log("that it waits", skip, |log| log.contains("waiting for the agent"))?;
            for family in Family::BOTH {
                let said = ask(&client, &server, family)?;
                ensure!(answered(&said), "while another waits on node {}: {said}", side.letter());
            }
            ensure!(cluster.agent_mut(side)?.stop()?.success(), "the predecessor on node {}", side.letter());
            successor.wait_ready()?;
            cluster.follow(successor);
            for family in Family::BOTH {
                // The other agent may still hold for a second that it was refused.
                wait_for("the pods to reach each other", seconds(10), || {
                    let said = ask(&client, &server, family)?;
                    Ok(if answered(&said) { Look::Done(()) } else { Look::NotYet(said) })
                })?;
            }
        }
        let wire = capture.finish()?;
        ensure!(wire.not_tls() == 0 && wire.hits("hello?") == 0, "{wire:#?}");
        Ok(())
    })
}
